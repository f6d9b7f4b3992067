"""Commands on prepared data: `verify`, `inspect`, `duplicates`, `tokenizer`."""
