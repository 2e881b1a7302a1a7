"""One image that is nobody's, always the same: what a model makes of it says which model it is."""

import numpy as np
from PIL import Image

_HEIGHT, _WIDTH = 180, 240


def probe_image() -> Image.Image:
    """Smooth waves of several directions, in colour; neither square nor of a size that a model reads."""
    y, x = np.mgrid[0:_HEIGHT, 0:_WIDTH]
    waves = [np.sin(x / 9 + y / 31), np.sin(y / 13 - x / 57), np.cos((x + 2 * y) / 23)]
    return Image.fromarray(np.rint(127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8))
