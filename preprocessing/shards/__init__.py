"""Prepared shards on disk: schema, writer, reader, ids."""
