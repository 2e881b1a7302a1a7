"""Make the folder of Caltech-101 (owner's page: https://data.caltech.edu/records/mzrjq-6wc02).

    python -m tools.data.caltech101 --archive caltech-101.zip --out FOLDER

The archive holds 101_ObjectCategories.tar.gz, which may also be given by itself. The owners publish no split. As in
CoOp, the background and the second folder of faces are left out, and four classes have other names.
"""

import argparse
from collections.abc import Sequence

from tools.data import command, splits
from tools.data.archives import Archives
from tools.data.layout import Plan

NAME = "Caltech-101"
PAGE = "https://data.caltech.edu/records/mzrjq-6wc02"
ARCHIVES = ("caltech-101.zip",)
TEMPLATE = "a photo of a {}."
LEFT_OUT = ("BACKGROUND_Google", "Faces_easy")
NEW_NAMES = {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"}
_FOLDER = "101_ObjectCategories"


def plan(archives: Archives, args: argparse.Namespace) -> Plan:
    """Return the plan: CoOp's split file, or its rule.

    Raises:
        ConfigError: If archives or images are missing, or if the split file is wrong.
    """
    root = f"{archives.locate({ARCHIVES[0]: (_FOLDER,)})[0]}{_FOLDER}/"
    if args.split is not None:
        return splits.coop_plan(args.split, archives, root, TEMPLATE)
    classes = {folder: members for folder, members in archives.classes(root).items() if folder not in LEFT_OUT}
    names = {folder: NEW_NAMES.get(folder, splits.words(folder)) for folder in classes}
    return Plan(splits.coop_cut(classes, args.seed), names, TEMPLATE, splits.COOP_CUT)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with the given arguments, or with those of the command line."""
    args = command.parser(__doc__).parse_args(argv)
    command.run(NAME, PAGE, plan, args, nested=(f"{_FOLDER}.tar.gz",))


if __name__ == "__main__":
    main()
