"""The command ``python -m eve_ds.convert``: weights of other formats to EVE-DS model folders, and back."""
