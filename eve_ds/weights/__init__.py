"""Weights in files: other naming schemes, other image sizes, strict loading.

Nothing is imported here: commands that fail early, or only start other commands, must not wait for torch.
"""
