"""The embedded demo's private task: sketches of a hundred classes, each drawn in a private domain, in three splits.

Class ids are ordered by category, with ten classes each. Ten clients that split the ids evenly hold one category each.
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

from fl_dualpriv.assets import demo_folder
from fl_dualpriv.data.demo import rendering
from fl_dualpriv.data.demo.drawn import DrawnImages
from fl_dualpriv.data.demo.rendering import DOMAINS, render_private

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class DemoSplit(DrawnImages):
    """One split: labelled 32 x 32 RGB images, rendered on request and always the same."""

    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    sketches: NDArray[np.uint8]
    domains: NDArray[np.uint8]
    seeds: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def domain_names(self) -> tuple[str, ...]:
        """The private domains; see `ImageDataset`."""
        return DOMAINS

    def image(self, index: int) -> Image.Image:
        """Draw the image at ``index`` in its private domain.

        Raises:
            IndexError: If there is no such index.
        """
        domain = DOMAINS[int(self.domains[index])]
        return Image.fromarray(render_private(self.sketches[index], domain, int(self.seeds[index])))

    def _drawn_from(self) -> tuple[Path, Sequence[NDArray]]:
        return Path(rendering.__file__), (self.sketches, self.domains, self.seeds)


@functools.lru_cache(maxsize=1)
def load_demo() -> dict[str, DemoSplit]:
    """Load the splits ``train``, ``val`` and ``test``; no image is in two of them, and the demo CLIP has seen none."""
    with np.load(io.BytesIO((demo_folder() / "images.npz").read_bytes())) as arrays:
        columns = {name: arrays[name] for name in ("labels", "sketches", "domain", "seed", "split")}
    names = tuple(_classes()["class_names"])
    splits = {}
    for number, split in enumerate(SPLITS):
        rows = columns["split"] == number
        labels, sketches, domains, seeds = (columns[name][rows] for name in ("labels", "sketches", "domain", "seed"))
        splits[split] = DemoSplit(labels.astype(np.int64), names, sketches, domains, seeds)
    return splits


def demo_template() -> str:
    """Return the template whose words are the initial context of a prompt; ``{}`` is the class name."""
    return _classes()["template"]


def demo_categories() -> dict[str, tuple[str, ...]]:
    """Return the class names of each category, in the order of their ids."""
    return {category: tuple(names) for category, names in _classes()["categories"].items()}


@functools.lru_cache(maxsize=1)
def _classes() -> dict:
    return json.loads((demo_folder() / "classes.json").read_text(encoding="utf-8"))
