"""Make the folder of EuroSAT (owner's page: https://github.com/phelber/EuroSAT).

    python -m tools.data.eurosat --archive EuroSAT_RGB.zip --out FOLDER

The archive is that of the RGB images; an older one is EuroSAT.zip. The owners publish no split. The class names are
those of CoOp.
"""

import argparse
from collections.abc import Sequence

from tools.data import command, splits
from tools.data.archives import Archives
from tools.data.layout import Plan

NAME = "EuroSAT"
PAGE = "https://github.com/phelber/EuroSAT"
ARCHIVES = ("EuroSAT_RGB.zip",)
TEMPLATE = "a centered satellite photo of {}."
NAMES = {
    "AnnualCrop": "Annual Crop Land",
    "Forest": "Forest",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "River": "River",
    "SeaLake": "Sea or Lake",
}


def plan(archives: Archives, args: argparse.Namespace) -> Plan:
    """Return the plan: CoOp's split file, or its rule.

    Raises:
        ConfigError: If archives or images are missing, or if the split file is wrong.
    """
    # The name of the folder of the class folders differs between the versions of the archive.
    root = archives.locate({ARCHIVES[0]: tuple(NAMES)})[0]
    if args.split is not None:
        return splits.coop_plan(args.split, archives, root, TEMPLATE)
    classes = {folder: members for folder, members in archives.classes(root).items() if folder in NAMES}
    return Plan(splits.coop_cut(classes, args.seed), NAMES, TEMPLATE, splits.COOP_CUT)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with the given arguments, or with those of the command line."""
    command.run(NAME, PAGE, plan, command.parser(__doc__).parse_args(argv))


if __name__ == "__main__":
    main()
