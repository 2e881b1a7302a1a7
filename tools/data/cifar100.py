"""Make the folder of CIFAR-100 (owner's page: https://www.cs.toronto.edu/~kriz/cifar.html).

    python -m tools.data.cifar100 --archive cifar-100-python.tar.gz --out FOLDER

The archive is the one for Python. Its pickles are read without running anything that they name. The images are written
as PNG files, and the name of a file is the number of the image in the owners' file. The owners' split has no val. The
classes are the 100 fine ones.
"""

import argparse
import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fl_dualpriv.errors import ConfigError
from tools.data import command, safe_pickle, splits
from tools.data.archives import Archives, Member
from tools.data.layout import Picture, Plan, folder_name
from tools.data.png import png
from tools.data.safe_pickle import PickledArray

NAME = "CIFAR-100"
PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
ARCHIVES = ("cifar-100-python.tar.gz",)
TEMPLATE = "a photo of a {}."
_SIDE = 32


def plan(archives: Archives, args: argparse.Namespace) -> Plan:
    """Return the plan: the owners' split with a val that is cut from train.

    Raises:
        ConfigError: If the archive is missing, or if one of its pickles is refused or has other content.
    """
    top = archives.locate({ARCHIVES[0]: ("train", "test", "meta")})[0]
    classes = _class_names(archives, f"{top}meta")
    pictures = []
    for number, split in enumerate(("train", "test")):
        pixels, labels = _images(archives, top + split, len(classes))
        for row, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            member = Member(f"{split}/{row:05}.png", ARCHIVES[0], (number, row), functools.partial(_png, image))
            pictures.append(Picture(split, folder_name(classes[label]), member))
    names = {folder_name(name): splits.words(name) for name in classes}
    rule = splits.owners_and_val("the file train is train, the file test is test")
    return Plan(splits.with_val(pictures, args.val_fraction, args.seed), names, TEMPLATE, rule)


def _class_names(archives: Archives, path: str) -> list[str]:
    document = safe_pickle.load(archives.read(path), path)
    names = document.get(b"fine_label_names") if isinstance(document, dict) else None
    if isinstance(names, list) and all(isinstance(name, bytes) and folder_name(_text(name)) for name in names):
        return [_text(name) for name in names]
    raise _other_content(path, "a list of texts fine_label_names")


def _images(archives: Archives, path: str, n_classes: int) -> tuple[NDArray[np.uint8], list[int]]:
    """Return images (images, 3072), red before green before blue, and their class ids."""
    document = safe_pickle.load(archives.read(path), path)
    found = document if isinstance(document, dict) else {}
    data, labels = found.get(b"data"), found.get(b"fine_labels")
    try:
        pixels = data.pixels() if isinstance(data, PickledArray) else None
    except ValueError as error:
        raise _other_content(path, f"bytes of pixels ({error})") from error
    if pixels is None or pixels.shape[1:] != (3 * _SIDE**2,):
        raise _other_content(path, f"an array data of shape (images, {3 * _SIDE**2})")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(x in range(n_classes) for x in labels):
        raise _other_content(path, f"a list fine_labels of {len(pixels)} integers from 0 to {n_classes - 1}")
    return pixels, labels


def _png(image: NDArray[np.uint8]) -> bytes:
    return png(image.reshape(3, _SIDE, _SIDE).transpose(1, 2, 0))


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")


def _other_content(path: str, wanted: str) -> ConfigError:
    return ConfigError(f"{path} does not have {wanted}; download {ARCHIVES[0]}, the one for Python, from {PAGE}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with the given arguments, or with those of the command line."""
    command.run(NAME, PAGE, plan, command.parser(__doc__, coop=False).parse_args(argv))


if __name__ == "__main__":
    main()
