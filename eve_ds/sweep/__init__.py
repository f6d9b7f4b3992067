"""``python -m eve_ds.sweep``: a table of the paper's ablations, run on a small data set or one's own."""
