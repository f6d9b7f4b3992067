"""`verify`, `inspect`, `duplicates`, `tokenizer`."""
