"""Images of the embedded demos: drawn on request from arrays in memory, and always the same."""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

from numpy.typing import NDArray


class DrawnImages:
    """Methods of `ImageDataset` for images that are in memory; a subclass names the arrays that they are drawn from."""

    def _drawn_from(self) -> tuple[Path, Sequence[NDArray]]:
        """Return the file of the code that draws, and the arrays."""
        raise NotImplementedError

    @property
    def content_hash(self) -> str:
        """Hash of the arrays and of the code that draws the images; see `ImageDataset.content_hash`."""
        return self._content_hash

    @property
    def clients(self) -> None:
        """None, because a demo names no clients; see `ImageDataset`."""

    @property
    def client_names(self) -> tuple[str, ...]:
        """No names; see `ImageDataset`."""
        return ()

    def name(self, index: int) -> str:
        """Return the number of one image; see `ImageDataset.name`."""
        return f"number {index}"

    def unchanged(self, index: int) -> bool:
        """Always True, because the images are in memory; see `ImageDataset.unchanged`."""
        return True

    def unreadable(self, index: int) -> int | None:
        """Return None, because the images are in memory; see `ImageDataset.unreadable`."""
        return None

    @functools.cached_property
    def _content_hash(self) -> str:
        code, arrays = self._drawn_from()
        digest = hashlib.sha256(code.read_bytes())
        for array in arrays:
            digest.update(f"{array.dtype} {array.shape}\n".encode() + array.tobytes())
        return digest.hexdigest()
