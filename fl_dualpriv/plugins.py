"""Plug-ins are named by ``module:Class``; nothing registers itself."""

import importlib
from typing import TypeVar

from fl_dualpriv.errors import ConfigError

Base = TypeVar("Base")


def load_class(key: str, reference: str, base: type[Base]) -> type[Base]:
    """Import the class that a configuration key names.

    Args:
        key: The key, for messages, such as ``strategy.ref``.
        reference: ``module:Class``.
        base: What the class must derive from.

    Raises:
        ConfigError: If it cannot be imported, is missing, or is no subclass of ``base``.
    """
    module_name, _, class_name = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{key} = {reference!r}: cannot import {module_name!r} ({error})") from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        have = sorted(
            n for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, base) and c is not base
        )
        raise ConfigError(
            f"{key} = {reference!r}: {module_name} has no subclass of {base.__name__} called {class_name!r}; "
            f"it has {', '.join(have) or 'none'}"
        )
    return found
