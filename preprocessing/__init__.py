"""Raw data sets -> Arrow shards with a manifest. Never imports torch. See README.md beside this file."""
