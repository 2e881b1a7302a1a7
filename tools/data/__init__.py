"""Scripts that make the folder of a standard data set from the archives that its owners distribute."""
