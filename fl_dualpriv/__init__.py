"""Federated prompt learning for vision-language models with proved differential privacy."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fl_dualpriv.publish.use import load_prompt

__all__ = ["__version__", "load_prompt"]

try:
    __version__ = version("fl-dualpriv")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """Import `load_prompt` on first use, because it needs torch and a query of the version does not."""
    if name != "load_prompt":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fl_dualpriv.publish.use import load_prompt

    return load_prompt
