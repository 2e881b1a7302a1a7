"""Make the folder of Office-Home (owner's page: https://www.hemanthdv.org/officeHomeDataset.html).

    python -m tools.data.office_home --archive OfficeHomeDataset_10072016.zip --out FOLDER

The class folders lie in one folder per domain, for data.partition = "by-domain". The owners publish no split. The name
of a class is that of its folder.
"""

import argparse
from collections.abc import Sequence

from tools.data import command, splits
from tools.data.archives import Archives
from tools.data.layout import Plan

NAME = "Office-Home"
PAGE = "https://www.hemanthdv.org/officeHomeDataset.html"
ARCHIVES = ("OfficeHomeDataset_10072016.zip",)
TEMPLATE = "a photo of a {}."
DOMAINS = ("Art", "Clipart", "Product", "Real World")


def plan(archives: Archives, args: argparse.Namespace) -> Plan:
    """Return the plan: the rule of CoOp for each class of each domain.

    Raises:
        ConfigError: If the archive is missing.
    """
    top = archives.locate({ARCHIVES[0]: DOMAINS})[0]
    pictures, names = [], {}
    for domain in DOMAINS:
        classes = archives.classes(f"{top}{domain}/")
        pictures += splits.coop_cut(classes, args.seed, domain)
        names |= {folder: splits.words(folder) for folder in classes}
    return Plan(pictures, names, TEMPLATE, splits.COOP_CUT)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with the given arguments, or with those of the command line."""
    command.run(NAME, PAGE, plan, command.parser(__doc__, coop=False).parse_args(argv))


if __name__ == "__main__":
    main()
