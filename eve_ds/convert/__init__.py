"""Weights of other formats to EVE-DS model folders, and back: ``python -m eve_ds.convert``."""
