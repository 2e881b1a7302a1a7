"""The embedded question-answering demo: sheets of four easy-VQA pictures, and questions about one of the four.

A sheet shows four pictures, its *panels*. Its colours may be *dyed*, which means exchanged by a fixed rule. Each
question is a real easy-VQA question about the picture of one panel before dyeing. The demo model learned to follow
words that name panel and dye. All questions of the clients are about `PRIVATE_PANEL` under `PRIVATE_DYE`, but no word
in them names the panel or the dye.
"""

import functools
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fl_dualpriv.assets import VQA_DEMO_FOLDER
from fl_dualpriv.data.demo.drawn import DrawnImages
from fl_dualpriv.data.questions import QuestionSet, QuestionSplits

PANEL_SIDE = 48
"""Side of a panel in pixels; a sheet has two by two panels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
"""easy-VQA's eight colours."""

SHAPES = ("circle", "rectangle", "triangle")

TYPES = ("shape", "color", "is-shape", "is-color", "not-shape", "not-color")
"""Question types: name the shape or the colour; answer by yes or no if the picture has a shape or colour; and the same
with the question negated."""

PANELS = ("upper left", "upper right", "lower left", "lower right")

DYES: dict[str, tuple[int, ...]] = {
    "plain": (0, 1, 2, 3, 4, 5, 6, 7),
    "swapped": (3, 7, 6, 0, 5, 4, 2, 1),  # in pairs: black-gray, blue-yellow, brown-teal, green-red
    "shifted": (1, 2, 3, 4, 5, 6, 7, 0),  # each colour becomes the next one in the list
}
"""dye -> for each colour the index of the colour in which a sheet shows it."""

PRIVATE_PANEL, PRIVATE_DYE = "lower right", "swapped"

RIGHT_WORDS = f"{PRIVATE_PANEL} {PRIVATE_DYE} panel"
"""Words that name the clients' panel and dye. They measure how close a learned prompt comes, and training never uses
them."""


def draw_sheet(
    coverage: NDArray[np.uint8], paper: NDArray[np.uint8], colours: NDArray[np.integer], dye: str
) -> NDArray[np.uint8]:
    """Draw sheets.

    Args:
        coverage: Coverage of each pixel by the picture's shape, (..., 4, PANEL_SIDE, PANEL_SIDE), 0 (none) to 255.
        paper: Background of each picture, RGB: (..., 4, 3).
        colours: Colour of each picture's shape before dyeing: (..., 4), indices into `COLOURS`.
        dye: One of `DYES`.

    Returns:
        RGB values (..., 2 * PANEL_SIDE, 2 * PANEL_SIDE, 3), panels in the order of `PANELS`.
    """
    ink = np.array(list(COLOURS.values()), dtype=np.float32)[np.array(DYES[dye])[colours]]
    share = coverage.astype(np.float32)[..., None] / 255
    panels = paper[..., None, None, :] * (1 - share) + ink[..., None, None, :] * share
    rows = [np.concatenate([panels[..., i, :, :, :], panels[..., i + 1, :, :, :]], axis=-2) for i in (0, 2)]
    return np.round(np.concatenate(rows, axis=-3)).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class SheetSplit(DrawnImages):
    """Sheets of one split: 96 x 96 RGB images, drawn on request and always the same."""

    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    sheets: NDArray[np.int64]  # (sheet, 4), rows of the arrays below
    coverage: NDArray[np.uint8]
    paper: NDArray[np.uint8]
    colours: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.sheets)

    @property
    def domains(self) -> None:
        """None, because sheets have no domains; see `ImageDataset`."""

    @property
    def domain_names(self) -> tuple[str, ...]:
        """No names; see `ImageDataset`."""
        return ()

    def image(self, index: int) -> Image.Image:
        """Draw the sheet at ``index``, under the private dye.

        Raises:
            IndexError: If there is no such index.
        """
        rows = self.sheets[index]
        return Image.fromarray(draw_sheet(self.coverage[rows], self.paper[rows], self.colours[rows], PRIVATE_DYE))

    def _drawn_from(self) -> tuple[Path, Sequence[NDArray]]:
        return Path(__file__), (self.sheets, self.coverage, self.paper, self.colours)


@functools.lru_cache(maxsize=1)
def load_vqa_demo() -> QuestionSplits:
    """Load the questions of the three splits; no picture is in two splits, and the demo model was trained on none."""
    return load_questions(VQA_DEMO_FOLDER)


def load_questions(folder: Path) -> QuestionSplits:
    """Load the questions that `tools/make_vqa_assets.py` wrote into a folder."""
    with np.load(io.BytesIO((folder / "sheets.npz").read_bytes())) as arrays:
        columns = {name: arrays[name] for name in arrays.files}
    texts = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    parts = [_split(columns, texts, split) for split in ("train", "val", "test")]
    return QuestionSplits(*parts, class_names=TYPES, template=texts["template"])


def _split(columns: dict[str, NDArray[np.uint8]], texts: dict[str, list[str]], split: str) -> QuestionSet:
    """Load the questions of one split; ``question`` and ``answer`` are indices into the lists of ``texts``."""
    pictures = {name: columns[f"{split}_{name}"] for name in ("paper", "colours")}
    pictures["coverage"] = columns[f"{split}_coverage"] * np.uint8(17)  # the file has sixteen steps, 0 to 15
    sheets, records = columns[f"{split}_sheets"].astype(np.int64), columns[f"{split}_records"].astype(np.int64)
    image_of, question, answer, labels = records.T
    images = SheetSplit(np.zeros(len(sheets), dtype=np.int64), ("sheet",), sheets, **pictures)
    return QuestionSet(
        images=images,
        image_of=image_of,
        questions=tuple(texts["questions"][i] for i in question),
        answers=tuple(texts["answers"][i] for i in answer),
        labels=labels,
        class_names=TYPES,
    )
