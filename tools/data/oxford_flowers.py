r"""Make the folder of Oxford Flowers-102 (owner's page: https://www.robots.ox.ac.uk/~vgg/data/flowers/102/).

    python -m tools.data.oxford_flowers --archive 102flowers.tgz --archive imagelabels.mat --archive setid.mat \
        --names cat_to_name.json --out FOLDER

The owners number the classes and do not name them; the file of names is one that CoOp distributes. The owners' split
in setid.mat has 10 images of a class in train and 10 in val. CoOp uses another split, a random one: give it with
--split, and then only the images are needed. The folder of a class begins with the owners' number of the class, so
that the classes keep their order.
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

from scipy.io import loadmat

from fl_dualpriv.errors import ConfigError
from tools.data import command, splits
from tools.data.archives import Archives, few
from tools.data.layout import Plan, folder_name
from tools.data.splits import Entry

NAME = "Oxford Flowers-102"
PAGE = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
ARCHIVES = ("102flowers.tgz", "imagelabels.mat", "setid.mat")
TEMPLATE = "a photo of a {}, a type of flower."
_SETS = {"train": "trnid", "val": "valid", "test": "tstid"}


def plan(archives: Archives, args: argparse.Namespace) -> Plan:
    """Return the plan: CoOp's split file, or the owners' split.

    Raises:
        ConfigError: If archives, images or names are missing, or if a file is wrong.
    """
    images, labels, sets = ARCHIVES
    if args.split is not None:
        if args.names is not None:
            raise ConfigError(f"--names {args.names} would change nothing: --split has the names. Leave it out")
        root = f"{archives.locate({images: ('jpg',)})[0]}jpg/"
        # CoOp counts the classes from 0 and the owners from 1.
        return splits.coop_plan(
            args.split, archives, root, TEMPLATE, lambda path, label, name: _folder(label + 1, name)
        )
    if args.names is None:
        raise ConfigError(
            "--names is missing: the owners do not name the classes; give cat_to_name.json, which CoOp distributes, or "
            "its split file by --split"
        )
    top, in_labels, in_sets = archives.locate({images: ("jpg",), labels: (labels,), sets: (sets,)})
    class_of = dict(enumerate(_numbers(archives, in_labels + labels, "labels"), 1))
    ids = {split: _numbers(archives, in_sets + sets, key) for split, key in _SETS.items()}
    if unknown := sorted({str(number) for numbers in ids.values() for number in numbers if number not in class_of}):
        raise ConfigError(
            f"{sets} names {len(unknown)} images without a label: {few(unknown)}; {labels} has {len(class_of)}: "
            f"download both from {PAGE} again"
        )
    names = _names(args, sorted(set(class_of.values())))
    folders = {number: _folder(number, name) for number, name in names.items()}
    entries = [
        Entry(split, folders[class_of[number]], f"{top}jpg/image_{number:05}.jpg")
        for split, numbers in ids.items()
        for number in numbers
    ]
    pictures = splits.pictures_of(archives, entries, sets)
    return Plan(pictures, {folders[n]: names[n] for n in names}, TEMPLATE, splits.owners(sets))


def _folder(number: int, name: str) -> str:
    return f"{number:03}_{folder_name(name)}"


def _numbers(archives: Archives, path: str, key: str) -> list[int]:
    """Return the positive integers under a key of a .mat file."""
    content = archives.read(path)
    try:
        values = loadmat(io.BytesIO(content))[key].ravel().tolist()
        numbers = [int(value) for value in values]
    # Damaged files raise almost any error.
    except Exception as error:
        raise ConfigError(f"{path} has no list of numbers {key} ({error!r}); download it from {PAGE} again") from error
    if wrong := [str(value) for value, number in zip(values, numbers, strict=True) if value != number or number < 1]:
        raise ConfigError(
            f"{path}: {len(wrong)} of {key} are not positive integers: {few(wrong)}; download it from {PAGE} again"
        )
    return numbers


def _names(args: argparse.Namespace, classes: list[int]) -> dict[int, str]:
    """Return the name of each class from the file of names."""
    document = splits.read_json(args.names, "--names", "cat_to_name.json")
    given = document if isinstance(document, dict) else {}
    found = {number: given[str(number)] for number in classes if isinstance(given.get(str(number)), str)}
    if lacking := [str(number) for number in classes if number not in found]:
        raise ConfigError(
            f"--names {args.names} has no text for {len(lacking)} of {len(classes)} classes: {few(lacking)}; give "
            'cat_to_name.json, an object {"1": "pink primrose"} with all numbers of the owners'
        )
    return {number: splits.words(name) for number, name in found.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with the given arguments, or with those of the command line."""
    options = command.parser(__doc__)
    options.add_argument("--names", type=Path, help="cat_to_name.json; needed without --split")
    command.run(NAME, PAGE, plan, options.parse_args(argv))


if __name__ == "__main__":
    main()
