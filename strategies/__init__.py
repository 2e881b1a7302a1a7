"""One aggregation rule per file."""
