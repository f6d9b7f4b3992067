"""Finds, checks, decodes and fingerprints images."""
