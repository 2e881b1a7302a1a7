"""Pickles of containers, texts, numbers and byte arrays, read without running anything that they name.

A pickle may name functions, which the standard reader calls. This reader knows three names, those of NumPy arrays, and
puts harmless classes in their place. It refuses every other name.
"""

import io
import math
import pickle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_dualpriv.errors import ConfigError

_BYTES = (b"u1", b"|u1", "u1", "|u1")


class _Type:
    """Stand-in for ``numpy.dtype``; keeps its code."""

    code: object = None  # for a pickle that makes an object without calling its class

    def __init__(self, code: object, *rest: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and alignment, because single bytes have none."""


class PickledArray:
    """Stand-in for ``numpy.ndarray``; keeps what the pickle says about the array."""

    _state: object = None

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self._state = state

    def pixels(self) -> NDArray[np.uint8]:
        """Return the array.

        Raises:
            ValueError: If it is not an array of bytes in C order with as many bytes as its shape says.
        """
        match self._state:
            case (_, tuple(shape), _Type(code=code), fortran, bytes(content)) if code in _BYTES and not fortran:
                sides = [side for side in shape if isinstance(side, int) and side >= 0]
                if len(sides) == len(shape) and math.prod(sides) == len(content):
                    return np.frombuffer(content, dtype=np.uint8).reshape(sides)
        raise ValueError("an array is not of bytes in C order, or does not have the size of its shape")


_KNOWN: dict[tuple[str, str], type] = {
    ("numpy.core.multiarray", "_reconstruct"): PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): PickledArray,
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): _Type,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of the data")
        return _KNOWN[module, name]


def load(content: bytes, path: str) -> Any:
    """Read a pickle; texts of Python 2 become bytes, and arrays become `PickledArray`.

    Args:
        content: The pickle.
        path: Its path in messages.

    Raises:
        ConfigError: If it is damaged, or if it names anything but NumPy arrays.
    """
    try:
        return _Reader(io.BytesIO(content), encoding="bytes").load()
    # A damaged pickle raises almost any error.
    except Exception as error:
        raise ConfigError(
            f"{path} is refused: {error}; allowed are containers, texts, numbers and NumPy arrays: download the "
            "archive from the owners again"
        ) from error
