"""The scores that papers report, from files alone: retrieval recalls, VQA accuracy, NLVR2 accuracy and consistency.

A leaf: imports numpy and the standard library only, so that anyone may import it and scoring needs no torch.
"""
