r"""Make data of the shape of the published tables, and a tiny CLIP, to try their sweep files without weights or data.

    python -m tools.make_paper_shapes --out build/made
    cd build/made && fl-dualpriv sweep ../../simulations/paper/dpfpl-ranks.toml --seeds 1 \
        --set backbone.name=local-dir:clip --set backbone.pretrained= --set rounds=2

writes ``data/NAME/{train,test}/CLASS/*.png`` with the number of classes of each data set and images of noise, and
``clip/``, a CLIP with random weights. Each data set has a file ``made-data.json``: a table of such data is headed "made
data, not comparable", and has no LaTeX form.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from fl_dualpriv.files import write_bytes, write_json
from fl_dualpriv.models import torchvision_shim
from fl_dualpriv.sweep.missing import MADE

torchvision_shim.install()
import open_clip  # noqa: E402  (after the shim)

CLASSES = {"caltech101": 100, "oxford-pets": 37, "oxford-flowers": 102, "food101": 101, "cifar100": 100}
"""Data set → number of classes."""
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
_SIDE = 32


def write_data(folder: Path, classes: int, images: dict[str, int]) -> None:
    """Write images of noise, each class around a colour of its own."""
    rng = np.random.default_rng(classes)
    colours = rng.integers(40, 216, (classes, 3))
    for split, count in images.items():
        for label, colour in enumerate(colours):
            for number in range(count):
                pixels = np.clip(colour + rng.normal(0, 25, (_SIDE, _SIDE, 3)), 0, 255).astype(np.uint8)
                content = io.BytesIO()
                Image.fromarray(pixels).save(content, "PNG")
                write_bytes(folder / split / f"made class {label}" / f"{number}.png", content.getvalue())
    write_json(folder / MADE, {"made by": "python -m tools.make_paper_shapes", "classes": classes})


def write_clip(folder: Path) -> None:
    """Write a CLIP with random weights, as a folder of open_clip."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(**TINY)
    safetensors.torch.save_model(model, str(folder / "open_clip_model.safetensors"))
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": preprocess}))


def main() -> None:
    """Make data and model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=8, help="training images of each class")
    parser.add_argument("--test", type=int, default=2, help="test images of each class")
    args = parser.parse_args()
    for name, classes in CLASSES.items():
        write_data(args.out / "data" / name, classes, {"train": args.train, "val": 1, "test": args.test})
    write_clip(args.out / "clip")


if __name__ == "__main__":
    main()
