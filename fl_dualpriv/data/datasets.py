"""The one form in which every data set reaches the rest of the library, and the function that loads it."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from fl_dualpriv.data.folder import load_folder
from fl_dualpriv.errors import ConfigError


class ImageDataset(Protocol):
    """Labelled images, decoded one at a time."""

    @property
    def labels(self) -> np.ndarray:
        """Class id of each image: int64, shape (images,), indices into ``class_names``."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the prompt says for each class id."""
        ...

    def __len__(self) -> int:
        """Return the number of images, readable or not."""
        ...

    def image(self, index: int) -> Image.Image:
        """Decode one image to RGB; ``BadImageError`` if that is impossible."""
        ...

    @property
    def content_hash(self) -> str:
        """Changes whenever what ``image`` gives for any index may change; says nothing about where the images lie."""
        ...

    def unchanged(self, index: int) -> bool:
        """Whether a record still is what ``content_hash`` found, if that was asked for; for before and after a read."""
        ...

    def unreadable(self, index: int) -> int | None:
        """Error number with which ``content_hash`` found a record missing or closed; None if it could read it."""
        ...


@dataclass(frozen=True, eq=False)
class DataSplits:
    """Three disjoint data sets over the same classes, and the prompt template with one ``{}`` for the class name."""

    train: ImageDataset
    val: ImageDataset
    test: ImageDataset
    class_names: tuple[str, ...]
    template: str


@functools.lru_cache(maxsize=8)
def load_data(
    ref: Literal["demo", "folder"],
    path: str,
    classes: str,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    on_bad_image: Literal["raise", "keep"],
) -> DataSplits:
    """Load a data set once per process; a directory that changes later is not read again.

    Args:
        ref: ``demo``: the embedded images, no other argument is read. ``folder``: a directory of class folders.
        path: Directory of the images; ``~`` is expanded.
        classes: JSON file with the template and class names, or empty.
        val_fraction: Share of train/ that becomes the validation set where there is no val/.
        test_fraction: The same for test/.
        seed: Of that cut.
        on_bad_image: ``raise``: an unreadable image is an error now. ``keep``: it stays a record, so that counts stay
            public under DP, and ``image`` raises ``BadImageError`` for it.

    Raises:
        ConfigError: If the data set is not usable as given.
    """
    if ref == "demo":
        from fl_dualpriv.data.demo import demo_template, load_demo  # heavy: only where it is asked for

        return _splits(load_demo(), demo_template())
    if ref == "folder":
        if not path.strip():
            raise ConfigError('data.path is empty; give the directory of the images, or set data.ref = "demo"')
        return _splits(*load_folder(Path(path).expanduser(), classes, val_fraction, test_fraction, seed, on_bad_image))
    raise ConfigError(f"data.ref = {ref!r}: must be one of demo, folder")


def _splits(splits: Mapping[str, ImageDataset], template: str) -> DataSplits:
    train = splits["train"]
    return DataSplits(train, splits["val"], splits["test"], train.class_names, template)
