"""Draw four sketches on one picture of 48 x 48 pixels, in two columns, each on a card with a pattern.

Captions of the shelf task's CLIP say which of the sketches counts: by its column, by its card, or by both. Every random
choice comes from the generator that the caller passes, so a picture is the same on every machine. Imports only numpy.
"""

import numpy as np
from numpy.typing import NDArray

SIDE = 48
"""Side of a picture, in pixels."""
CELL = SIDE // 2
"""Side of the card of one sketch, in pixels."""
CARDS = ("striped", "dotted", "checked", "shaded")
"""Patterns of cards."""

_SKETCH_SIDE = 28
_MARGIN = 2  # zeros around a sketch, so that a point outside of it reads zero
_ROWS, _COLUMNS = np.indices((CELL, CELL))
_GRID = np.stack([_ROWS, _COLUMNS]).reshape(2, -1) - (CELL - 1) / 2
_PATTERNS = np.stack(
    [
        _ROWS % 4 < 2,
        (_ROWS % 4 < 2) & (_COLUMNS % 4 < 2),
        (_ROWS // 4 + _COLUMNS // 4) % 2 < 1,
        np.ones((CELL, CELL), dtype=bool),
    ]
)
_DEPTH = np.array([0.34, 0.45, 0.34, 0.26])
"""Share of the way from the colour of the paper to that of the pen, at the pattern of each card."""


def draw(
    sketches: NDArray[np.uint8], cards: NDArray[np.integer], dark: NDArray[np.bool_], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Draw pictures, with small random differences in angle, size, place, colour and grain.

    Args:
        sketches: Gray values (picture, 4, 28, 28), 255 where the pen was, in the order upper left, upper right, lower
            left, lower right.
        cards: Index into `CARDS` for each sketch, (picture, 4).
        dark: True for a bright pen on dark paper, (picture,).
        rng: Source of all random differences.

    Returns:
        Gray values (picture, 48, 48).
    """
    n = len(sketches)
    u, grain, tone = rng.uniform(size=(n, 4, 4)), rng.normal(size=(n, SIDE, SIDE)), rng.uniform(size=(n, 2))
    angle, scale = np.deg2rad(16 * u[..., 0] - 8), 0.80 + 0.14 * u[..., 1]
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], -2) / scale[..., None, None]
    shift = 2 * u[..., 2:] - 1
    at = turn @ (_GRID - shift[..., None]) + (_SKETCH_SIDE - 1) / 2
    pen = _read(sketches.reshape(-1, _SKETCH_SIDE, _SKETCH_SIDE), at.reshape(4 * n, 2, -1)).reshape(n, 4, CELL, CELL)
    cells = np.maximum(np.minimum(1.25 * pen, 1), _PATTERNS[cards] * _DEPTH[cards][..., None, None])
    # (picture, row, column, y, x) → (picture, row, y, column, x)
    page = cells.reshape(n, 2, 2, CELL, CELL).transpose(0, 1, 3, 2, 4).reshape(n, SIDE, SIDE)
    ink = np.where(dark, 200 + 45 * tone[:, 0], 10 + 50 * tone[:, 0])[:, None, None]
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
