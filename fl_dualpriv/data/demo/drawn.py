"""Images of the embedded demos: drawn when asked for, from arrays in memory, and always the same."""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

from numpy.typing import NDArray


class DrawnImages:
    """What `ImageDataset` asks of images that no file can change; a subclass says what they are drawn from."""

    def _drawn_from(self) -> tuple[Path, Sequence[NDArray]]:
        """The file of the code that draws, and the arrays."""
        raise NotImplementedError

    @property
    def content_hash(self) -> str:
        """See `ImageDataset.content_hash`: of what the images are drawn from, and of the code that draws them."""
        return self._content_hash

    def unchanged(self, index: int) -> bool:
        """See `ImageDataset.unchanged`: they are in memory."""
        return True

    def unreadable(self, index: int) -> int | None:
        """See `ImageDataset.unreadable`."""
        return None

    @functools.cached_property
    def _content_hash(self) -> str:
        code, arrays = self._drawn_from()
        digest = hashlib.sha256(code.read_bytes())
        for array in arrays:
            digest.update(f"{array.dtype} {array.shape}\n".encode() + array.tobytes())
        return digest.hexdigest()
