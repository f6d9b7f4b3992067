"""The command ``python -m eve_ds.report``: reading a run folder, charts, and the sections of the page."""
