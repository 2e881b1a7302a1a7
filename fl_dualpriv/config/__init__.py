"""The run configuration: keys, ranges and rules, and the privacy plans that follow from them."""
