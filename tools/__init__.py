"""Scripts that make the embedded demo models and the data sets of the experiments, and a check of the prose."""
