"""The command ``python -m eve_ds.dashboard``: a Weights & Biases workspace with a section for each group of metrics."""
