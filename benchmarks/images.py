"""Folders of small real images for benchmarks: sketches of the embedded demo, rendered with other seeds."""

import shutil
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fl_dualpriv.data.demo.images import demo_template, load_demo
from fl_dualpriv.data.demo.rendering import DOMAINS, render_private
from fl_dualpriv.files import write_json


def sketch_folder(folder: Path, n_cls: int, per_class: Mapping[str, int]) -> Path:
    """Make a folder of images if it does not exist; an unfinished folder is made again.

    Args:
        folder: The folder, which will hold ``classes.json`` and ``images/``.
        n_cls: Number of classes, the first ones of the demo's hundred.
        per_class: Split → number of images of each class. A single split ``train`` makes a folder without splits.

    Returns:
        ``folder``.
    """
    if folder.exists():
        return folder
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    demo = load_demo()["train"]
    names = {f"class-{label:03d}": demo.class_names[label] for label in range(n_cls)}
    made = 0
    for split, count in per_class.items():
        root = unfinished / "images" / (split if len(per_class) > 1 else "")
        for label, name in enumerate(names):
            (root / name).mkdir(parents=True)
            sketches = demo.sketches[demo.labels == label]
            for index in range(count):
                # The demo renders one image of each sketch. Every image here has a seed that the demo does not use.
                sketch, domain = sketches[index % len(sketches)], DOMAINS[(index // len(sketches)) % len(DOMAINS)]
                if index // (len(sketches) * len(DOMAINS)) % 2:
                    sketch = sketch[:, ::-1]
                pixels = render_private(sketch, domain, 2**31 + made)
                (root / name / f"{index:05d}.png").write_bytes(png(pixels))
                made += 1
    write_json(unfinished / "classes.json", {"template": demo_template(), "class-names": names})
    unfinished.replace(folder)
    return folder


def png(pixels: np.ndarray) -> bytes:
    """Encode 8-bit RGB pixels (height, width, 3) as a PNG file with one filter, light compression and no dependency."""
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)  # each row starts with the number of its filter; 0 is none
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
