"""Images: references, folders, exclusion lists, decoding, checks, fingerprints."""
