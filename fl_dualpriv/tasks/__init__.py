"""Tasks: data, model, partition and objective of a run, built once per process."""
