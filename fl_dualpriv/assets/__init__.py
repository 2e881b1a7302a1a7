"""Files that ship with the library: the embedded demos."""

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

VQA_DEMO_FOLDER = Path(next(iter(__path__))) / "vqa"
"""Folder with the question-answering model, in the form that transformers reads, and with `sheets.npz`."""


def demo_folder() -> Traversable:
    """Return the folder of the image demo's files, inside the installed package."""
    return resources.files("fl_dualpriv.assets") / "demo"


def shelf_folder() -> Traversable:
    """Return the folder of the shelf task's files, inside the installed package."""
    return resources.files("fl_dualpriv.assets") / "shelf"


def embedded_model_folder(name: str) -> Traversable | None:
    """Return the folder of an embedded CLIP by its name in ``backbone.name``; None for another name."""
    folders = {"demo": demo_folder, "shelf": shelf_folder}
    return folders[name]() if name in folders else None
