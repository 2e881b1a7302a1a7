"""The embedded shelf task: pictures of four sketches on cards, of which the left one on the domain's own card counts.

It reads as a story: every shop lays its articles on cards of its own pattern, and the camera's left side is the shop's
own shelf. All pictures are dark, and the counted sketch is always on the left: both are shared by all domains. The card
is each domain's own. Each card lies once on the left and once on the right, beside another card. No public caption
pairs "left" with a card, and the CLIP of the task has seen no dark picture with the name of a left sketch.
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
from fl_dualpriv.data.demo.shelf_drawing import CARDS, draw

DOMAINS = CARDS
"""Private domains, each with its card."""


@dataclass(frozen=True, eq=False)
class ShelfSplit(DrawnImages):
    """One split: labelled 48 x 48 pictures with their domains, drawn on request and always the same.

    Attributes:
        labels: Class id of the sketch that counts, (picture,).
        domains: Index into ``domain_names``, (picture,).
        sketches: The sketches of each picture, (picture, 4, 28, 28), in the order of `draw`. Only the one that counts
            is private.
        cards: Their cards, (picture, 4).
        seeds: Seed of everything else about a picture, (picture,).
    """

    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    domains: NDArray[np.int64]
    domain_names: tuple[str, ...]
    sketches: NDArray[np.uint8]
    cards: NDArray[np.uint8]
    seeds: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Draw the picture at ``index``.

        Raises:
            IndexError: If there is no such index.
        """
        rng = np.random.default_rng(int(self.seeds[index]))
        gray = draw(self.sketches[index][None], self.cards[index][None], np.array([True]), rng)[0]
        return Image.fromarray(gray).convert("RGB")

    def _drawn_from(self) -> tuple[Path, Sequence[NDArray]]:
        return Path(shelf_drawing.__file__), (self.sketches, self.cards, self.domains, self.seeds)


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
            cards=columns["cards"][rows],
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
