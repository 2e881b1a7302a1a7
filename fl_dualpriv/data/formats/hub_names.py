"""The meaning of ``datasets:NAME``, found without importing the package datasets. Standard library only."""

from pathlib import Path

HUB = "datasets:"
PARQUET = ".parquet"
_SAVED = ("dataset_dict.json", "state.json")
"""Files that ``DatasetDict.save_to_disk`` and ``Dataset.save_to_disk`` write."""


def source_and_configuration(name: str) -> tuple[str, str]:
    """Split ``NAME#CONFIGURATION`` in two; a path that exists is not split."""
    if Path(name).expanduser().exists():
        return name, ""
    source, _, configuration = name.partition("#")
    return source, configuration


def absolute_name(name: str, base: Path) -> str:
    """Make a path absolute, relative to ``base``; any other name is a name on the hub and does not change.

    Args:
        name: Name without ``datasets:``.
        base: Folder in which the user typed the name.
    """
    path = base / Path(name).expanduser()
    if path.exists():
        return str(path)
    source, mark, configuration = name.partition("#")
    path = base / Path(source).expanduser()
    return f"{path}{mark}{configuration}" if path.exists() else name


def is_saved(folder: Path) -> bool:
    """True if the package datasets saved this folder."""
    return any((folder / mark).is_file() for mark in _SAVED)


def hub_name(path: str) -> str | None:
    """Return the name to load with the package datasets; None if ``data.path`` names files of questions.

    A folder that datasets saved and a parquet file need no ``datasets:`` before the name.
    """
    if path.startswith(HUB):
        return path.removeprefix(HUB)
    place = Path(path).expanduser()
    return path if is_saved(place) or (place.suffix.lower() == PARQUET and place.is_file()) else None
