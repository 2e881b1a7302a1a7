"""Federated prompt learning for vision-language models with differential privacy that is true."""

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
    """`load_prompt` comes with torch, which whoever only asks for the version does without."""
    if name != "load_prompt":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fl_dualpriv.publish.use import load_prompt

    return load_prompt
