"""Federated prompt learning for vision-language models with differential privacy that is true."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fl-dualpriv")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"
