"""Dual-Priv pruning of visual tokens inside and after image towers."""
