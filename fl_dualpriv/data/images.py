"""Protocol of a set of labelled images, and a probe image."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

_HEIGHT, _WIDTH = 180, 240


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


def probe_image() -> Image.Image:
    """One image that belongs to nobody and is always the same, to tell by its features which model made them.

    It shows smooth coloured waves. It is not square, and no model reads its size.
    """
    y, x = np.mgrid[0:_HEIGHT, 0:_WIDTH]
    waves = [np.sin(x / 9 + y / 31), np.sin(y / 13 - x / 57), np.cos((x + 2 * y) / 23)]
    return Image.fromarray(np.rint(127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8))
