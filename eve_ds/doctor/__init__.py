"""What ``python -m eve_ds.doctor`` finds out. Standard library alone at the top of each module but torch_side."""
