"""Files that ship with the library: the embedded demo."""

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

VQA_DEMO_FOLDER = Path(next(iter(__path__))) / "vqa"
"""Folder of the question-answering model, in the form that transformers reads, and of `sheets.npz`."""


def demo_folder() -> Traversable:
    """Folder of the demo's files, inside the installed package."""
    return resources.files("fl_dualpriv.assets") / "demo"
