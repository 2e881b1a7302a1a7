"""Plug-ins are named by ``module:Class``; nothing registers itself."""

import importlib
from collections.abc import Mapping
from dataclasses import MISSING, fields
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


def plugin_options(
    plugin: type, base: type, flat: Mapping[str, bool | int | float | str]
) -> dict[str, bool | int | float | str]:
    """Values for the fields that a plug-in class adds to its base, from keys ``plugin.<class in lower case>.<field>``.

    Args:
        plugin: The dataclass that was named.
        base: Its base; fields of the base are the library's and cannot be set this way.
        flat: Flat run configuration.

    Raises:
        ConfigError: For a key that is no such field, or a value of another type than the field's default.
    """
    prefix = f"plugin.{plugin.__name__.lower()}."
    inherited = {field.name for field in fields(base)}
    own = {
        field.name.replace("_", "-"): field for field in fields(plugin) if field.name not in inherited and field.init
    }
    options = {}
    for key, value in flat.items():
        if not key.startswith(prefix):
            continue
        field = own.get(key.removeprefix(prefix))
        if field is None:
            raise ConfigError(f"{key}: {plugin.__name__} has no such option; it has {', '.join(own) or 'none'}")
        if isinstance(field.default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if field.default is not MISSING and type(value) is not type(field.default):
            raise ConfigError(f"{key} = {value!r}: expected {type(field.default).__name__}, as {field.default!r}")
        options[field.name] = value
    return options
