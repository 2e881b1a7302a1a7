"""The proof-bearing part: per-example gradients, clipping, noise, accounting. No flwr, no open_clip, no config."""
