"""Benchmarks against peers: `python -m simulations.benchmarks.NAME` runs one, `make bench` all of them."""
