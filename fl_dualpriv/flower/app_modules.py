"""Import the modules of a Flower app from the app's folder only. Standard library only."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from fl_dualpriv.errors import ConfigError


def put_first(app_dir: Path) -> None:
    """Put the app's folder before all others on the module path.

    After an installation from a checkout the folder is already on the path, but behind the folders of ``PYTHONPATH``.
    A package there may have the same name as one of the app's packages.
    """
    folder = str(app_dir)
    sys.path[:] = [folder, *(entry for entry in sys.path if entry != folder)]
    importlib.invalidate_caches()


def import_from(app_dir: Path, module_name: str) -> ModuleType:
    """Import a module. If the app has a module of that name, check that the import found the app's.

    Args:
        app_dir: Folder of the app. Call `put_first` with it first.
        module_name: Dotted name of the module.

    Raises:
        ConfigError: If another package of that name was imported before, by code that runs at Python's start.
        ImportError: If there is no such module.
    """
    module = importlib.import_module(module_name)
    top = module_name.partition(".")[0]
    is_theirs = (app_dir / top).is_dir() or (app_dir / f"{top}.py").is_file()
    file = Path(module.__file__ or "")
    if is_theirs and not file.resolve().is_relative_to(app_dir.resolve()):
        raise ConfigError(
            f"{module_name} was imported from {file}, but the app in {app_dir} has a module of that name: another "
            f"package called {top!r} was loaded before it; look at PYTHONPATH and at the .pth files of this Python"
        )
    return module
