"""Raw data sets: a converter for each, and what they share."""
