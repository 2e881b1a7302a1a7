"""Draw four sketches on one picture of 48 x 48 pixels: two shelves with two articles each.

Captions of the shelf task's CLIP say which of the sketches counts, by its side or its shelf. Every random choice comes
from the generator that the caller passes, so a picture is the same on every machine. Imports only numpy.
"""

import numpy as np
from numpy.typing import NDArray

SIDE = 48
"""Side of a picture, in pixels."""
CELL = SIDE // 2
"""Side of the square of one sketch, in pixels."""
PLACES = (("left", "top"), ("right", "top"), ("left", "bottom"), ("right", "bottom"))
"""Side and shelf of each sketch of a picture, in their order."""

_SKETCH_SIDE = 28
_MARGIN = 2  # zeros around a sketch, so that a point outside of it reads zero
_GRID = np.indices((CELL, CELL)).reshape(2, -1) - (CELL - 1) / 2


def draw(
    sketches: NDArray[np.uint8],
    dark: NDArray[np.bool_],
    turned: NDArray[np.bool_],
    rng: np.random.Generator,
    *,
    dim: bool = False,
) -> NDArray[np.uint8]:
    """Draw pictures, with small random differences in angle, size, place, colour and grain.

    Args:
        sketches: Gray values (picture, 4, 28, 28), 255 where the pen was, in the order of `PLACES`.
        dark: True for a bright pen on dark paper, (picture,).
        turned: True if the sketches lie upside down, (picture,).
        rng: Source of all random differences.
        dim: True for a pen of lower brightness on dark paper.

    Returns:
        Gray values (picture, 48, 48).
    """
    n = len(sketches)
    sketches = np.where(turned[:, None, None, None], sketches[..., ::-1, ::-1], sketches)
    u, grain, tone = rng.uniform(size=(n, 4, 4)), rng.normal(size=(n, SIDE, SIDE)), rng.uniform(size=(n, 2))
    angle, scale = np.deg2rad(16 * u[..., 0] - 8), 0.80 + 0.14 * u[..., 1]
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], -2) / scale[..., None, None]
    shift = 2 * u[..., 2:] - 1
    at = turn @ (_GRID - shift[..., None]) + (_SKETCH_SIDE - 1) / 2
    pen = _read(sketches.reshape(-1, _SKETCH_SIDE, _SKETCH_SIDE), at.reshape(4 * n, 2, -1)).reshape(n, 4, CELL, CELL)
    cells = np.minimum(1.25 * pen, 1)
    # (picture, row, column, y, x) → (picture, row, y, column, x)
    page = cells.reshape(n, 2, 2, CELL, CELL).transpose(0, 1, 3, 2, 4).reshape(n, SIDE, SIDE)
    bright = 120 if dim else 200
    ink = np.where(dark, bright + 45 * tone[:, 0], 10 + 50 * tone[:, 0])[:, None, None]
    paper = np.where(dark, 15 + 35 * tone[:, 1], 225 + 25 * tone[:, 1])[:, None, None]
    return np.clip(paper + page * (ink - paper) + 6 * grain, 0, 255).round().astype(np.uint8)


def _read(images: NDArray[np.uint8], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Read images (n, side, side) at points (n, 2, point), in [0, 1], by bilinear interpolation; zero outside."""
    padded = np.pad(images / 255, ((0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN)))
    at = np.clip(at + _MARGIN, 0, padded.shape[1] - 1 - 1e-3)
    low = at.astype(int)
    (y, x), (fy, fx), each = np.moveaxis(low, 1, 0), np.moveaxis(at - low, 1, 0), np.arange(len(images))[:, None]
    above = padded[each, y, x] * (1 - fx) + padded[each, y, x + 1] * fx
    below = padded[each, y + 1, x] * (1 - fx) + padded[each, y + 1, x + 1] * fx
    return above * (1 - fy) + below * fy
