"""The parts of ``python -m eve_ds.report``: reading a run's folder, charts, and the sections of the page."""
