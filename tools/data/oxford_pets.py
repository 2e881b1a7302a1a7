"""Make the folder of Oxford-IIIT Pets (owner's page: https://www.robots.ox.ac.uk/~vgg/data/pets/).

    python -m tools.data.oxford_pets --archive images.tar.gz --archive annotations.tar.gz --out FOLDER

The owners' split has no val. The name of a class is that of the breed in small letters, as in CoOp. With --split only
the images are needed.
"""

import argparse
from collections.abc import Sequence

from fl_dualpriv.errors import ConfigError
from tools.data import command, splits
from tools.data.archives import Archives, few
from tools.data.layout import Plan, folder_name
from tools.data.splits import Entry

NAME = "Oxford-IIIT Pets"
PAGE = "https://www.robots.ox.ac.uk/~vgg/data/pets/"
ARCHIVES = ("images.tar.gz", "annotations.tar.gz")
TEMPLATE = "a photo of a {}, a type of pet."
_LISTS = {"train": "annotations/trainval.txt", "test": "annotations/test.txt"}


def plan(archives: Archives, args: argparse.Namespace) -> Plan:
    """Return the plan: CoOp's split file, or the owners' lists with a val that is cut from train.

    Raises:
        ConfigError: If archives or images are missing, or if a list or the split file is wrong.
    """
    images, annotations = ARCHIVES
    if args.split is not None:
        root = f"{archives.locate({images: ('images',)})[0]}images/"
        return splits.coop_plan(args.split, archives, root, TEMPLATE, lambda path, label, name: folder_name(name))
    top, lists = archives.locate({images: ("images",), annotations: tuple(_LISTS.values())})
    entries, wrong = [], []
    for split, path in _LISTS.items():
        for line in archives.text(lists + path).splitlines():
            # Such as "great_pyrenees_104 16 2 11": image, class, species, and number of the breed in the species.
            match line.split():
                case [image, _, _, _] if breed := _breed(image):
                    entries.append(Entry(split, folder_name(breed), f"{top}images/{image}.jpg"))
                case []:
                    pass
                case _:
                    wrong.append(f"{path}: {line!r}")
    if wrong:
        raise ConfigError(
            f"{len(wrong)} lines of the owners' lists are wrong: {few(wrong)}; a line is IMAGE CLASS SPECIES BREED: "
            f"download {annotations} from {PAGE} again"
        )
    pictures = splits.pictures_of(archives, entries, " and ".join(_LISTS.values()))
    names = {entry.folder: splits.words(entry.folder) for entry in entries}
    rule = splits.owners_and_val("trainval.txt is train, test.txt is test")
    return Plan(splits.with_val(pictures, args.val_fraction, args.seed), names, TEMPLATE, rule)


def _breed(image: str) -> str:
    """Return the breed in the name of an image; empty if there is none."""
    return image.rpartition("_")[0].lower()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with the given arguments, or with those of the command line."""
    command.run(NAME, PAGE, plan, command.parser(__doc__).parse_args(argv))


if __name__ == "__main__":
    main()
