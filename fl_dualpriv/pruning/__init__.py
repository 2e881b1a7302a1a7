"""Dual-Priv Pruning (arXiv:2506.07077): visual tokens inside the image tower, and noised updates."""
