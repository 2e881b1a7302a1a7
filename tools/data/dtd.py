"""Make the folder of DTD (owner's page: https://www.robots.ox.ac.uk/~vgg/data/dtd/).

    python -m tools.data.dtd --archive dtd-r1.0.1.tar.gz --out FOLDER

DTD is the Describable Textures Dataset. Without --split, the split is the first of the owners' ten.
"""

import argparse
from collections.abc import Sequence

from fl_dualpriv.errors import ConfigError
from tools.data import command, splits
from tools.data.archives import Archives, few
from tools.data.layout import SPLITS, Plan
from tools.data.splits import Entry

NAME = "DTD"
PAGE = "https://www.robots.ox.ac.uk/~vgg/data/dtd/"
ARCHIVES = ("dtd-r1.0.1.tar.gz",)
TEMPLATE = "{} texture."


def plan(archives: Archives, args: argparse.Namespace) -> Plan:
    """Return the plan: CoOp's split file, or the first split of the owners.

    Raises:
        ConfigError: If archives or images are missing, or if a list or the split file is wrong.
    """
    parts = ("images",) if args.split is not None else ("images", "labels")
    top = archives.locate({ARCHIVES[0]: parts})[0]
    if args.split is not None:
        return splits.coop_plan(args.split, archives, f"{top}images/", TEMPLATE)
    entries, wrong = [], []
    for split in SPLITS:
        path = f"labels/{split}1.txt"
        for image in filter(None, archives.text(top + path).splitlines()):
            if folder := splits.folder_of_path(image, 0, ""):
                entries.append(Entry(split, folder, f"{top}images/{image}"))
            else:
                wrong.append(f"{path}: {image!r}")
    if wrong:
        raise ConfigError(
            f"{len(wrong)} lines of the owners' lists are wrong: {few(wrong)}; a line is CLASS/IMAGE: download "
            f"{ARCHIVES[0]} from {PAGE} again"
        )
    files = "labels/train1.txt, val1.txt and test1.txt"
    names = {entry.folder: splits.words(entry.folder) for entry in entries}
    return Plan(splits.pictures_of(archives, entries, files), names, TEMPLATE, splits.owners(files))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with the given arguments, or with those of the command line."""
    command.run(NAME, PAGE, plan, command.parser(__doc__).parse_args(argv))


if __name__ == "__main__":
    main()
