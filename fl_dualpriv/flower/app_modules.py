"""The modules of a Flower app, imported from its folder and from nowhere else. Standard library only."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from fl_dualpriv.errors import ConfigError


def put_first(app_dir: Path) -> None:
    """Put the app's folder before all others on the module path.

    An installation from a checkout has the folder there already, but behind the folders of ``PYTHONPATH``, in which
    another package may have the name of one of the app's.
    """
    folder = str(app_dir)
    sys.path[:] = [folder, *(entry for entry in sys.path if entry != folder)]
    importlib.invalidate_caches()


def import_from(app_dir: Path, module_name: str) -> ModuleType:
    """Import a module, and make sure that it is the app's if the app has one of that name.

    Args:
        app_dir: The app's folder; call `put_first` with it before.
        module_name: Dotted name.

    Raises:
        ConfigError: If another package of that name was imported before, by whatever runs at Python's start.
        ImportError: If there is none.
    """
    module = importlib.import_module(module_name)
    top = module_name.partition(".")[0]
    is_theirs = (app_dir / top).is_dir() or (app_dir / f"{top}.py").is_file()
    file = Path(module.__file__ or "")
    if is_theirs and not file.resolve().is_relative_to(app_dir.resolve()):
        raise ConfigError(
            f"{module_name} was imported from {file}, and the app in {app_dir} has a module of that name: another "
            f"package called {top!r} was loaded before it; look at PYTHONPATH and at the .pth files of this Python"
        )
    return module
