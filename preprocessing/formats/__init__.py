"""Files that raw data sets come in: text lines, JSON, tables, tars, parquet, folders."""
