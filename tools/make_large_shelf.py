"""Make a larger shelf task from the embedded sketches, for curves over the number of clients and of their images.

    python -m tools.make_large_shelf --out build/large-shelf --setting 60x240 --setting 1000x20

writes pictures once, and for each setting ``CLIENTSxIMAGES/`` the lists train.csv, val.csv and test.csv of path, label
and domain, which ``data.path`` takes. Held-out pictures are those of the embedded task. The training pictures are new
compositions: the embedded task has 40 training sketches of each class, so **a sketch occurs in many pictures and in
many clients**. An ε about a picture or about a client is therefore none about a sketch.

A smaller setting uses the first pictures of each domain of a larger one, so settings differ in numbers only.
"""

import argparse
import csv
import io
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fl_dualpriv.data.demo.shelf import DOMAINS, SHELVES, ShelfSplit, load_shelf, shelf_candidates, shelf_template
from fl_dualpriv.data.demo.shelf_drawing import PLACES, draw
from fl_dualpriv.files import write_bytes, write_json

Setting = tuple[int, int]
"""Number of clients, and of images of each."""


def training_sketches(split: ShelfSplit) -> dict[int, NDArray[np.uint8]]:
    """Return class → its private training sketches, (sketch, 28, 28), each once."""
    own = np.array([PLACES.index(("left", SHELVES[domain % 2])) for domain in split.domains])
    counted = split.sketches[np.arange(len(split)), own]
    return {label: np.unique(counted[split.labels == label], axis=0) for label in np.unique(split.labels)}


def other_sketches(split: ShelfSplit) -> NDArray[np.uint8]:
    """Return the public sketches that stand in the other places of pictures, (sketch, 28, 28), each once."""
    own = np.array([PLACES.index(("left", SHELVES[domain % 2])) for domain in split.domains])
    is_other = np.ones(split.sketches.shape[:2], bool)
    is_other[np.arange(len(split)), own] = False
    return np.unique(split.sketches[is_other], axis=0)


def picture(
    rng: np.random.Generator, own: NDArray[np.uint8], others: NDArray[np.uint8], domain: int
) -> NDArray[np.uint8]:
    """Draw a training picture, (48, 48): one of the class's sketches on the domain's shelf, three others around it."""
    sketches = others[rng.integers(len(others), size=4)]
    sketches[PLACES.index(("left", SHELVES[domain % 2]))] = own[rng.integers(len(own))]
    yes = np.array([True])
    return draw(sketches[None], yes, yes, rng, dim="dim" in DOMAINS[domain])[0]


def make(out: Path, settings: list[Setting]) -> None:
    """Write the pictures and the lists of all settings; pictures that are there are not drawn again."""
    splits = load_shelf()
    own, others = training_sketches(splits["train"]), other_sketches(splits["train"])
    names = splits["train"].class_names
    most = max(-(-clients * images // len(DOMAINS)) for clients, images in settings)
    rows: dict[str, list[tuple[str, str, str]]] = {"train": [], "val": [], "test": []}
    for number in range(most):
        for domain in range(len(DOMAINS)):
            label = number % len(names)
            file = f"train/{domain}-{number:05d}.png"
            if not (out / file).exists():
                rng = np.random.default_rng([7, domain, number])
                _write(out / file, picture(rng, own[label], others, domain))
            rows["train"].append((f"../{file}", names[label], DOMAINS[domain]))
    for name in ("val", "test"):
        split = splits[name]
        for index, (label, domain) in enumerate(zip(split.labels, split.domains, strict=True)):
            file = f"{name}/{index:05d}.png"
            if not (out / file).exists():
                _write(out / file, np.asarray(split.image(index).convert("L")))
            rows[name].append((f"../{file}", names[label], DOMAINS[domain]))
    for clients, images in settings:
        folder = out / f"{clients}x{images}"
        count = -(-clients * images // len(DOMAINS)) * len(DOMAINS)
        for name, listed in rows.items():
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(["image", "label", "domain"])
            writer.writerows(listed[:count] if name == "train" else listed)
            write_bytes(folder / f"{name}.csv", text.getvalue().encode())
    write_json(out / "classes.json", {"template": shelf_template(), "class-names": {name: name for name in names}})
    write_json(
        out / "about.json",
        {
            "made by": "python -m tools.make_large_shelf",
            "sketches of each class": min(len(sketches) for sketches in own.values()),
            "candidates": list(shelf_candidates()),
            "warning": "a sketch occurs in several pictures and clients: no ε here is about a sketch",
        },
    )


def _write(file: Path, gray: NDArray[np.uint8]) -> None:
    content = io.BytesIO()
    Image.fromarray(gray).save(content, "PNG")
    write_bytes(file, content.getvalue())


def parse_setting(text: str) -> Setting:
    """Read ``CLIENTSxIMAGES``.

    Raises:
        argparse.ArgumentTypeError: If it is something else.

    Example:
        >>> parse_setting("60x240")
        (60, 240)
    """
    clients, _, images = text.partition("x")
    if not (clients.isdigit() and images.isdigit() and int(clients) and int(images)):
        raise argparse.ArgumentTypeError(f"{text!r} is not CLIENTSxIMAGES, for example 60x240")
    return int(clients), int(images)


def main() -> None:
    """Make the task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--setting", type=parse_setting, action="append", required=True, help="CLIENTSxIMAGES")
    args = parser.parse_args()
    make(args.out, args.setting)
    print(json.dumps({"folder": str(args.out), "settings": [f"{c}x{n}" for c, n in args.setting]}))


if __name__ == "__main__":
    main()
