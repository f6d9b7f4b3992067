"""Weights from files: other naming schemes, other image sizes, strict loading.

Nothing is imported here: eve_ds.errors needs weights.errors alone, and a command that ends with a mistake, or starts
others, need not wait for torch.
"""
