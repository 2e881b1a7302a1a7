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
        """Name of each class id, as it appears in the prompt."""
        ...

    @property
    def domains(self) -> np.ndarray | None:
        """Domain id of each image: integers, shape (images,), indices into ``domain_names``; None without domains.

        Domains are public metadata, like classes. Only ``data.partition = "by-domain"`` reads them.
        """
        ...

    @property
    def domain_names(self) -> tuple[str, ...]:
        """Name of each domain id, the same for all splits of a data set; empty without domains."""
        ...

    @property
    def clients(self) -> np.ndarray | None:
        """Client id of each image: integers, shape (images,), indices into ``client_names``; None without clients.

        Only ``data.partition = "by-client"`` reads them.
        """
        ...

    @property
    def client_names(self) -> tuple[str, ...]:
        """Name of each client id, the same for all splits of a data set; empty without clients."""
        ...

    def __len__(self) -> int:
        """Return the number of images, readable or not."""
        ...

    def name(self, index: int) -> str:
        """Return the name of one image, such as its path, for messages to the owner of the data."""
        ...

    def image(self, index: int) -> Image.Image:
        """Decode one image to RGB; ``BadImageError`` if it cannot be decoded."""
        ...

    @property
    def content_hash(self) -> str:
        """Hash that changes whenever the result of ``image`` may change for any index; paths do not enter it."""
        ...

    def unchanged(self, index: int) -> bool:
        """True if a record is still the one that ``content_hash`` hashed. Callers check it before and after a read.

        It is also True if ``content_hash`` was never computed.
        """
        ...

    def unreadable(self, index: int) -> int | None:
        """Return the error number if ``content_hash`` could not read a record, such as a missing file; else None."""
        ...


@dataclass(frozen=True, eq=False)
class DataSplits:
    """Three disjoint data sets over the same classes, and the prompt template, with one ``{}`` for the class name."""

    train: ImageDataset
    val: ImageDataset
    test: ImageDataset
    class_names: tuple[str, ...]
    template: str


def probe_image() -> Image.Image:
    """Return a fixed synthetic image that is not private data. Its features identify the model that made them.

    It shows smooth coloured waves. It is not square, and no model reads images of its size.
    """
    y, x = np.mgrid[0:_HEIGHT, 0:_WIDTH]
    waves = [np.sin(x / 9 + y / 31), np.sin(y / 13 - x / 57), np.cos((x + 2 * y) / 23)]
    return Image.fromarray(np.rint(127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8))
