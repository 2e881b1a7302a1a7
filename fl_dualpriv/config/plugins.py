"""Load plug-ins by their name ``module:Class``; there is no registry.

A module is part of the app, installed, or a file in a folder that the configuration names. Options of a class are its
own fields, under keys ``plugin.<class in lower case>.<field>``. Like the configuration, this module is light to import.
"""

import difflib
import importlib
import json
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from fl_dualpriv.errors import ConfigError

Base = TypeVar("Base")
Value = bool | int | float | str

_PREFIX = "plugin."
FLOWER_TABLE = "plugin.flower."
"""Prefix of the options of Flower's strategies; one for all, because fl-dualpriv has strategies of the same names."""


def load_class(key: str, reference: str, base: type[Base], folder: str = "") -> type[Base]:
    """Import the class that a configuration key names.

    Args:
        key: The key, for messages, such as ``strategy.ref``.
        reference: ``module:Class``.
        base: What the class must derive from.
        folder: Folder of the module if it is neither part of the app nor installed. It stays at the end of the module
            path, so that it shadows no other module.

    Raises:
        ConfigError: If the class cannot be imported, is missing, or is not a subclass of ``base``, or if a module
            outside ``folder`` has the same name.
    """
    module_name, _, class_name = reference.partition(":")
    path_key = next((path for own, path, _ in _SEAMS if own == key), "the folder")
    module = _import(f"{key} = {reference!r}", module_name, folder, path_key)
    candidate = getattr(module, class_name, None)
    if not (isinstance(candidate, type) and issubclass(candidate, base)):
        have = sorted(
            n for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, base) and c is not base
        )
        raise ConfigError(
            f"{key} = {reference!r}: {module_name} has no subclass of {base.__name__} called {class_name!r}; "
            f"it has {', '.join(have) or 'none'}"
        )
    return candidate


def _import(what: str, module_name: str, folder: str, path_key: str) -> ModuleType:
    if folder and folder not in sys.path:
        sys.path.append(folder)
        importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        where = f"; it is not in {path_key} = {folder!r}" if folder and error.name == module_name else ""
        raise ConfigError(f"{what}: cannot import {module_name!r} ({error}){where}") from error
    except Exception as error:  # a plug-in module can raise any error
        raise ConfigError(f"{what}: {module_name!r} fails when imported: {type(error).__name__}: {error}") from error
    file = module.__file__ or ""
    if folder and not Path(file).resolve().is_relative_to(Path(folder).resolve()):
        raise ConfigError(
            f"{what}: {file or 'another module'} has that name already, so the file in {folder} cannot be used: "
            "rename it"
        )
    return module


_SEAMS = (
    ("strategy.ref", "strategy.path", "strategy.options"),
    ("method", "method-path", "method-options"),
    ("prompt.learner", "prompt.learner-path", "prompt.learner-options"),
)
"""Keys of a class, of the folder of its module, and of its packed options."""

CLASS_PATHS = tuple(path_key for _, path_key, _ in _SEAMS)
"""Keys of the folders of modules."""

CLIENT_CLASS_PATHS = tuple(path_key for key, path_key, _ in _SEAMS if key != "strategy.ref")
"""Those of the classes that clients import; a strategy is imported by the server only."""


def find_module(flat: Mapping[str, Value], app_dir: Path, folders: Iterable[Path]) -> dict[str, Value]:
    """Set the path key of each class whose module is a file in one of ``folders``, if the key is empty.

    Args:
        flat: Flat run configuration.
        app_dir: Folder of the app. A module that travels in its bundle needs no path.
        folders: Folders to search, in order, in which a user keeps files of classes.
    """
    found, searched = dict(flat), list(folders)
    for key, path_key, _ in _SEAMS:
        if not flat.get(path_key) and (folder := _module_folder(flat.get(key), app_dir, searched)):
            found[path_key] = str(folder)
    return found


def _module_folder(reference: object, app_dir: Path, folders: Iterable[Path]) -> Path | None:
    """Return the folder that has the module of a class, if it is a user's file that does not travel in the bundle."""
    if not isinstance(reference, str) or ":" not in reference:
        return None
    name = reference.partition(":")[0]
    if not all(part.isidentifier() for part in name.split(".")):
        return None
    if (own := _module_file(app_dir, name)) is not None and _travels(own.relative_to(app_dir), app_dir):
        return None
    return next((folder for folder in folders if _module_file(folder, name) is not None), None)


def _module_file(folder: Path, name: str) -> Path | None:
    """Return the file of a module in a folder, by its dotted name; None if the folder does not have it."""
    place = folder.joinpath(*name.split("."))
    files = (place.with_name(f"{place.name}.py"), place / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def class_files(flat: Mapping[str, Value]) -> list[Path]:
    """Return the files of the classes that lie in a folder which the configuration names."""
    named = [(Path(str(flat[path_key])), str(flat[key])) for key, path_key, _ in _SEAMS if flat.get(path_key)]
    files = [_module_file(folder, reference.partition(":")[0]) for folder, reference in named]
    return [file for file in files if file is not None]


def _travels(file: Path, app_dir: Path) -> bool:
    """True if the app's bundle has the file, a path below the app's folder: an app without a list bundles all."""
    import pathspec  # late, so that the module stays light

    listed = bundled_patterns(app_dir)
    # The patterns are those of .gitignore, as for Flower.
    return listed is None or pathspec.GitIgnoreSpec.from_lines(listed).match_file(file.as_posix())


def bundled_patterns(app_dir: Path) -> list[str] | None:
    """Return the patterns of what travels in the app's bundle, or None if the app does not list it.

    Raises:
        OSError: If the app's ``pyproject.toml`` cannot be read.
        ValueError: If it is not TOML.
        KeyError: If it is not that of a Flower app.
    """
    project = tomllib.loads((app_dir / "pyproject.toml").read_text(encoding="utf-8"))
    return project["tool"]["flwr"]["app"].get("fab-include")


def pack_options(flat: Mapping[str, Value], listed: Mapping[str, Value]) -> dict[str, Value]:
    """Move ``plugin.`` keys that the app does not list into the key of packed options of their class.

    Flower refuses a run with keys that the app's ``pyproject.toml`` does not list, and it cannot list the options of a
    user's class.

    Args:
        flat: Flat run configuration.
        listed: Keys that the app lists.

    Raises:
        ConfigError: If an option belongs to a class that no key names, because no code would read it.
    """
    new = {key: value for key, value in flat.items() if key.startswith(_PREFIX) and key not in listed}
    rest = {key: value for key, value in flat.items() if key not in new}
    named = {seam: str(flat.get(seam[0], "")).partition(":")[2] for seam in _SEAMS}
    tables = {seam: f"{_PREFIX}{class_name.lower()}." for seam, class_name in named.items() if class_name}
    for seam, table in tables.items():
        own = {key: new.pop(key) for key in list(new) if key.startswith(table)}
        if seam is _SEAMS[0]:
            own |= {key: new.pop(key) for key in list(new) if key.startswith(FLOWER_TABLE)}
        if own:
            rest[seam[2]] = json.dumps(json.loads(str(flat.get(seam[2]) or "{}")) | own, sort_keys=True)
    for key in new:
        begins = list(tables.values()) or [FLOWER_TABLE]
        near = difflib.get_close_matches(key, [*listed, begins[0] + key.rpartition(".")[2]], n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        classes = " and ".join(
            f"{seam[0]} names {named[seam]!r}, whose options begin with {tables[seam]}" for seam in tables
        )
        raise ConfigError(f"{key}: {classes or 'strategy.ref names no class'}{guess}")
    return rest


def unpack_options(flat: Mapping[str, Value]) -> dict[str, Value]:
    """Undo `pack_options`; a key in the configuration takes precedence over a packed one."""
    return {**json.loads(str(flat.get("strategy.options") or "{}")), **flat}


def plugin_options(plugin: type, base: type, flat: Mapping[str, Value]) -> dict[str, Value]:
    """Read the fields that a plug-in class adds to its base, from keys ``plugin.<class in lower case>.<field>``.

    Args:
        plugin: Dataclass of the plug-in.
        base: Base of the plug-in. Its fields belong to the library and cannot be set this way.
        flat: Flat run configuration.

    Raises:
        ConfigError: If a key is not such a field, or if a value has another type than the field's default.
    """
    inherited = {field.name for field in fields(base)}
    defaults = {field.name: field.default for field in fields(plugin) if field.name not in inherited and field.init}
    return read_table(f"{_PREFIX}{plugin.__name__.lower()}.", plugin.__name__, defaults, flat, none=MISSING)


def read_table(
    table: str, owner: str, defaults: Mapping[str, object], flat: Mapping[str, Value], *, none: object
) -> dict[str, Value]:
    """Read the values of the keys of one table, by the names of options.

    Args:
        table: Prefix of the keys.
        owner: Class of the options, for messages.
        defaults: Name → default of every option of the class.
        flat: Flat run configuration.
        none: Marker in ``defaults`` for an option without a default.

    Raises:
        ConfigError: If a key is not an option, or if a value has another type than its default.
    """
    names = {name.replace("_", "-"): name for name in defaults}
    options: dict[str, Value] = {}
    for key, value in flat.items():
        if not key.startswith(table):
            continue
        name = names.get(key.removeprefix(table))
        if name is None:
            raise ConfigError(f"{key}: {owner} has no such option; it has {', '.join(names) or 'none'}")
        default = defaults[name]
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if default is not none and type(value) is not type(default):
            raise ConfigError(f"{key} = {value!r}: expected {type(default).__name__}, as {default!r}")
        options[name] = value
    return options
