"""Weights in files: other naming schemes, other image sizes, strict loading.

Nothing is imported here: eve_ds.errors needs only weights.errors, and commands that fail early, or only start other
commands, must not wait for torch.
"""
