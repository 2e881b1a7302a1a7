"""Benchmarks against peers: `python -m benchmarks.NAME` runs one, `make bench` all of them."""
