"""Flower's programs and engines: environment, simulation, bundle and processes."""
