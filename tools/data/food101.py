"""Make the folder of Food-101 (owner's page: https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/).

    python -m tools.data.food101 --archive food-101.tar.gz --out FOLDER

The owners' split has no val. The name of a class is that of its folder, as in CoOp.
"""

import argparse
import json
from collections.abc import Sequence

from fl_dualpriv.errors import ConfigError
from tools.data import command, splits
from tools.data.archives import Archives, few
from tools.data.layout import Plan
from tools.data.splits import Entry

NAME = "Food-101"
PAGE = "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/"
ARCHIVES = ("food-101.tar.gz",)
TEMPLATE = "a photo of {}, a type of food."


def plan(archives: Archives, args: argparse.Namespace) -> Plan:
    """Return the plan: CoOp's split file, or the owners' lists with a val that is cut from train.

    Raises:
        ConfigError: If archives or images are missing, or if a list or the split file is wrong.
    """
    parts = ("images",) if args.split is not None else ("images", "meta")
    top = archives.locate({ARCHIVES[0]: parts})[0]
    if args.split is not None:
        return splits.coop_plan(args.split, archives, f"{top}images/", TEMPLATE)
    entries, wrong = [], []
    for split in ("train", "test"):
        for image in _listed(archives, f"{top}meta/{split}"):
            if folder := splits.folder_of_path(image, 0, ""):
                entries.append(Entry(split, folder, f"{top}images/{image}.jpg"))
            else:
                wrong.append(f"{split}: {image!r}")
    if wrong:
        raise ConfigError(
            f"{len(wrong)} lines of the owners' lists are wrong: {few(wrong)}; a line is CLASS/IMAGE: download "
            f"{ARCHIVES[0]} from {PAGE} again"
        )
    pictures = splits.pictures_of(archives, entries, "meta/train and meta/test")
    names = {entry.folder: splits.words(entry.folder) for entry in entries}
    rule = splits.owners_and_val("meta/train is train, meta/test is test")
    return Plan(splits.with_val(pictures, args.val_fraction, args.seed), names, TEMPLATE, rule)


def _listed(archives: Archives, path: str) -> list[str]:
    """Return the images of a list of the owners, which is there as .json and as .txt."""
    if f"{path}.json" not in archives.members:
        return [line for line in archives.text(f"{path}.txt").splitlines() if line]
    text = archives.text(f"{path}.json")
    try:
        return [str(image) for images in json.loads(text).values() for image in images]
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f'{path}.json is not a JSON object {{"CLASS": ["CLASS/IMAGE"]}} ({error}); download {ARCHIVES[0]} from '
            f"{PAGE} again"
        ) from error


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with the given arguments, or with those of the command line."""
    command.run(NAME, PAGE, plan, command.parser(__doc__).parse_args(argv))


if __name__ == "__main__":
    main()
