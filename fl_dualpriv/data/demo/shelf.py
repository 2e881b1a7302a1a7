"""The embedded shelf task: pictures of four sketches, of which the left one on the domain's own shelf counts.

It reads as a story: a camera sees two shelves, an upper and a lower one, with two articles each. The article of
interest is always on the left, and each shop owns one of the shelves. All pictures are dark, and their articles lie
upside down; in some shops the light is dim, too. The left side is shared by all clients. Shelf and light are each
domain's own. No public caption pairs "left" with a shelf, none names the light, and the CLIP of the task was never told
the left article of a picture that is dark and upside down.
"""

import functools
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fl_dualpriv.assets import shelf_folder
from fl_dualpriv.data.demo import shelf_drawing
from fl_dualpriv.data.demo.drawn import DrawnImages
from fl_dualpriv.data.demo.images import SPLITS
from fl_dualpriv.data.demo.shelf_drawing import draw

SHELVES = ("top", "bottom")
DOMAINS = ("top, bright", "bottom, bright", "top, dim", "bottom, dim")
"""Private domains: the shelf whose left sketch counts, and the light."""


@dataclass(frozen=True, eq=False)
class ShelfSplit(DrawnImages):
    """One split: labelled 48 x 48 pictures with their domains, drawn on request and always the same.

    Attributes:
        labels: Class id of the sketch that counts, (picture,).
        domains: Index into ``domain_names``, (picture,).
        sketches: The sketches of each picture, (picture, 4, 28, 28), in the order of `draw`. Only the one that counts
            is private.
        seeds: Seed of everything else about a picture, (picture,).
    """

    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    domains: NDArray[np.int64]
    domain_names: tuple[str, ...]
    sketches: NDArray[np.uint8]
    seeds: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Draw the picture at ``index``.

        Raises:
            IndexError: If there is no such index.
        """
        rng, yes = np.random.default_rng(int(self.seeds[index])), np.array([True])
        gray = draw(self.sketches[index][None], yes, yes, rng, dim="dim" in DOMAINS[self.domains[index]])[0]
        return Image.fromarray(gray).convert("RGB")

    def _drawn_from(self) -> tuple[Path, Sequence[NDArray]]:
        return Path(shelf_drawing.__file__), (self.sketches, self.domains, self.seeds)


@functools.lru_cache(maxsize=1)
def load_shelf() -> dict[str, ShelfSplit]:
    """Load the splits ``train``, ``val`` and ``test``.

    The sketch that counts in a training picture is in no other picture, and the CLIP has not seen it. One of ``val`` or
    ``test`` is drawn once in each domain. The other three sketches of a picture come from a public set and repeat.
    """
    with np.load(io.BytesIO((shelf_folder() / "pictures.npz").read_bytes())) as arrays:
        columns = {name: arrays[name] for name in arrays.files}
    names = tuple(_classes()["class_names"])
    splits = {}
    for number, split in enumerate(SPLITS):
        rows = columns["split"] == number
        splits[split] = ShelfSplit(
            labels=columns["labels"][rows].astype(np.int64),
            class_names=names,
            domains=columns["domain"][rows].astype(np.int64),
            domain_names=DOMAINS,
            sketches=columns["sketches"][columns["places"][rows]],
            seeds=columns["seed"][rows],
        )
    return splits


def shelf_template() -> str:
    """Return the template whose words are the initial context of a prompt; ``{}`` is the class name."""
    return _classes()["template"]


def shelf_candidates() -> tuple[str, ...]:
    """Return the templates of the public captions, which never pair "left" with an orientation."""
    return tuple(_classes()["candidates"])


@functools.lru_cache(maxsize=1)
def _classes() -> dict:
    return json.loads((shelf_folder() / "classes.json").read_text(encoding="utf-8"))
