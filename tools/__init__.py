"""Scripts that make the embedded demo models and the data sets of the experiments."""
