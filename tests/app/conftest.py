"""A folder of images with something to learn, and a count of the messages that the local engine sends."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message
from PIL import Image

from fl_dualpriv.local_engine import LocalGrid


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog", "bus", "tree")):
        (root / name).mkdir()
        for i in range(20):
            pixels = rng.integers(0, 128, (32, 32, 3))
            pixels[8 * label : 8 * label + 8] += 127  # a bright band: something to learn
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many messages of each kind were sent."""
    counts: Counter[str] = Counter()
    push = LocalGrid._push

    def counting(self: LocalGrid, message: Message) -> str:
        counts[message.metadata.message_type] += 1
        return push(self, message)

    monkeypatch.setattr(LocalGrid, "_push", counting)
    return counts
