"""Raw data sets: a converter per data set, and the base that they share."""
