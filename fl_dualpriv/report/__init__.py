"""The report of runs: one HTML file, made of result files only if the runs state an ε."""
