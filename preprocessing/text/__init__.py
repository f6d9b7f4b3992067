"""Captions, answers and the tokenizer."""
