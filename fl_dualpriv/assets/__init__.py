"""Files that ship with the library: the embedded demos."""

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

VQA_DEMO_FOLDER = Path(next(iter(__path__))) / "vqa"
"""Folder with the question-answering model, in the form that transformers reads, and with `sheets.npz`."""


def demo_folder() -> Traversable:
    """Return the folder of the image demo's files, inside the installed package."""
    return resources.files("fl_dualpriv.assets") / "demo"
