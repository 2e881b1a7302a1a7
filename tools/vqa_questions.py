"""Training data of the demo question answerer: easy-VQA's pictures, sheets of them, and questions about a sheet.

Only `make_vqa_assets` and `vqa_model` use this module.
"""

import io
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fl_dualpriv.data.demo_questions import COLOURS, DYES, PANEL_SIDE, PANELS, PRIVATE_PANEL, SHAPES, TYPES, draw_sheet

COLOUR_NAMES = tuple(COLOURS)
DYE_NAMES = tuple(DYES)
YES_NO_FORMS = (
    "is there a {}?",
    "is there a {} in the image?",
    "is a {} present?",
    "does the image contain a {}?",
    "is there not a {}?",
    "is there not a {} in the image?",
    "is no {} present?",
    "does the image not contain a {}?",
)
"""The second four are negated."""

SHAPE_FORMS = (
    "what is the {} shape?",
    "what shape does the image contain?",
    "what shape is in the image?",
    "what shape is present?",
)
COLOUR_FORMS = (
    "what color is the {}?",
    "what color is the shape?",
    "what is the color of the {}?",
    "what is the color of the shape?",
)


FILLERS = ("some", "picture", "here", "panel")
"""Words before a question that carry no information."""

TEMPLATE = "some picture panel here"
"""Words from which a prompt starts; they name no panel and no dye."""

N_PUBLIC, N_HELD_OUT, N_TRAIN = 1350, 150, 1900
"""Number of pictures for training the model, for measuring it, and for private training; the rest is private val."""

Record = tuple[int, str, str, str]
"""Picture, question, answer and type."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of one shape each, and easy-VQA's questions about them."""

    coverage: NDArray[np.uint8]  # (picture, PANEL_SIDE, PANEL_SIDE), in steps of 17
    paper: NDArray[np.uint8]  # (picture, 3)
    colours: NDArray[np.int64]
    shapes: NDArray[np.int64]
    questions: tuple[tuple[tuple[str, str], ...], ...]  # (question, answer) pairs of each picture

    def __len__(self) -> int:
        return len(self.colours)

    def rows(self, rows: NDArray[np.int64]) -> "Pictures":
        """Return the pictures of some rows."""
        return Pictures(
            self.coverage[rows],
            self.paper[rows],
            self.colours[rows],
            self.shapes[rows],
            tuple(self.questions[i] for i in rows),
        )


def cut(pictures: Pictures) -> dict[str, Pictures]:
    """Split easy-VQA's training pictures at random into public, held-out, private train and private val pictures."""
    order = np.random.default_rng(0).permutation(len(pictures))
    ends = np.cumsum([N_PUBLIC, N_HELD_OUT, N_TRAIN])
    names = ("public", "held-out", "train", "val")
    return {name: pictures.rows(rows) for name, rows in zip(names, np.split(order, ends), strict=True)}


def question_type(question: str, answer: str) -> str:
    """Return the type of a question, one of `TYPES`."""
    if answer in SHAPES:
        return "shape"
    if answer in COLOURS:
        return "color"
    words = question.rstrip("?").split()
    negated = "not" in words or "no" in words
    return ("not-" if negated else "is-") + ("color" if set(words) & set(COLOURS) else "shape")


def read_pictures(folder: Path) -> Pictures:
    """Read easy-VQA's ``train`` or ``test`` folder, without the few pictures whose shape no question reveals."""
    asked: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, number in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        asked[number].append((question, answer))
    palette = np.array(list(COLOURS.values()), dtype=np.float64)
    pictures: list[tuple[NDArray[np.uint8], NDArray[np.uint8], int, int, tuple[tuple[str, str], ...]]] = []
    for number, questions in sorted(asked.items()):
        shape = _shape_of(questions)
        if shape is None:
            continue
        pixels = np.array(Image.open(folder / "images" / f"{number}.png").convert("RGB"))
        codes, counts = np.unique(pixels.astype(np.int64) @ (65536, 256, 1), return_counts=True)
        values = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1)
        light = (values >= 225).all(axis=1)
        paper = values[light][counts[light].argmax()].astype(np.float64)
        inks = (values[:, None] == palette).all(axis=2)
        colour = int((counts @ inks).argmax())
        line = palette[colour] - paper
        share = np.clip((pixels - paper) @ line / (line @ line), 0, 1)
        shrunk = Image.fromarray(share.astype(np.float32)).resize((PANEL_SIDE, PANEL_SIDE), Image.Resampling.BOX)
        pictures.append(
            (
                np.round(np.array(shrunk) * 15).astype(np.uint8) * 17,
                paper.astype(np.uint8),
                colour,
                shape,
                tuple(questions),
            )
        )
    coverage, papers, colours, shapes, questions = zip(*pictures, strict=True)
    return Pictures(np.stack(coverage), np.stack(papers), np.array(colours), np.array(shapes), questions)


def _shape_of(questions: list[tuple[str, str]]) -> int | None:
    """Return the only shape that the questions and answers leave possible; None if there is not exactly one."""
    possible = set(SHAPES)
    for question, answer in questions:
        kind = question_type(question, answer)
        named = set(question.rstrip("?").split()) & set(SHAPES)
        if kind == "shape":
            possible &= {answer}
        elif kind == "color" and named:
            possible &= named
        elif kind in ("is-shape", "not-shape"):
            possible = possible & named if (answer == "yes") == (kind == "is-shape") else possible - named
    return SHAPES.index(possible.pop()) if len(possible) == 1 else None


PANEL_OF = np.array([2 * (row // 4) + column // 4 for row, column in np.ndindex(8, 8)])
"""Panel of each of a sheet's eight by eight patches."""


@dataclass(frozen=True, eq=False)
class Sheets:
    """Sheets of pictures, and their content."""

    pixels: NDArray[np.uint8]  # (sheet, side, side, 3)
    shapes: NDArray[np.int64]  # (sheet, panel)
    shown: NDArray[np.int64]  # (sheet, panel): the visible colours
    covered: NDArray[np.bool_]  # (sheet, patch): the patches that show most of the shapes


def public_sheets(pictures: Pictures, number: int, rng: np.random.Generator) -> Sheets:
    """Make sheets of random pictures, mirrored at random and painted in random colours."""
    picked = rng.integers(len(pictures), size=(number, 4))
    coverage = pictures.coverage[picked]
    coverage = np.where(rng.random((number, 4, 1, 1)) < 0.5, coverage[..., ::-1], coverage)
    paper = pictures.paper[rng.integers(len(pictures), size=(number, 4))]
    shown = rng.integers(len(COLOURS), size=(number, 4))
    patches = coverage.reshape(number, 2, 2, 4, PANEL_SIDE // 4, 4, PANEL_SIDE // 4).mean(axis=(4, 6))
    covered = patches >= np.maximum(patches.max(axis=(3, 4), keepdims=True) / 2, 1)
    covered = covered.transpose(0, 1, 3, 2, 4).reshape(number, -1)
    return Sheets(draw_sheet(coverage, paper, shown, "plain"), pictures.shapes[picked], shown, covered)


@dataclass(frozen=True)
class Asked:
    """A question about one panel, and the facts that the answer needs: a class index for each entry of `FACTS`."""

    words: str
    question: str
    answer: str
    facts: tuple[int, int, int, int]


FACTS = (len(SHAPES), len(COLOURS), len(SHAPES) + len(COLOURS) + 1, 2)
"""Number of shapes, of colours, of things that a statement names (the last one: none), and of negation values."""


def ask(kind: str, sheets: Sheets, sheet: int, rng: np.random.Generator) -> Asked:
    """Make a question in one of easy-VQA's forms about a panel of a sheet under a dye, and words that name both.

    The thing that a false statement names is mostly visible elsewhere on the sheet, so the model must look at the right
    panel.

    Args:
        kind: One of `TYPES`.
        sheets: All sheets.
        sheet: Index of the sheet.
        rng: Source of all random choices.
    """
    panel, dye = int(rng.integers(len(PANELS))), int(rng.integers(len(DYES)))
    shapes, colours = sheets.shapes[sheet], np.argsort(DYES[DYE_NAMES[dye]])[sheets.shown[sheet]]
    shape, colour, words = int(shapes[panel]), int(colours[panel]), describe(panel, dye, rng)
    if kind == "shape":
        question = SHAPE_FORMS[rng.integers(4)].format(COLOUR_NAMES[colour])
        return Asked(words, question, SHAPES[shape], (shape, colour, FACTS[2] - 1, 0))
    if kind == "color":
        question = COLOUR_FORMS[rng.integers(4)].format(SHAPES[shape])
        return Asked(words, question, COLOUR_NAMES[colour], (shape, colour, FACTS[2] - 1, 0))
    of_colour, negated = kind.endswith("color"), kind.startswith("not")
    names, values = (COLOUR_NAMES, colours) if of_colour else (SHAPES, shapes)
    named, true = int(values[panel]), rng.random() < 0.5
    if not true:
        others = sorted({int(v) for v in values} - {named})
        if not others or rng.random() < 0.3:
            others = [v for v in range(len(names)) if v != named]
        named = others[rng.integers(len(others))]
    question = YES_NO_FORMS[4 * negated + rng.integers(4)].format(names[named] + (" shape" if of_colour else ""))
    facts = (shape, colour, named + (len(SHAPES) if of_colour else 0), int(negated))
    return Asked(words, question, "yes" if true != negated else "no", facts)


def read_aloud(sheets: Sheets, sheet: int, rng: np.random.Generator) -> list[tuple[str, bool]]:
    """Describe a sheet under a dye, panel by panel in random order.

    A description gives the model far more to learn than the single word of an answer.

    Returns:
        The words, each with True if the image determines it.
    """
    dye = int(rng.integers(len(DYES)))
    colours = np.argsort(DYES[DYE_NAMES[dye]])[sheets.shown[sheet]]
    text = [(DYE_NAMES[dye], False)]
    for panel in rng.permutation(len(PANELS)):
        text += [(word, False) for word in PANELS[panel].split()]
        text += [(COLOUR_NAMES[colours[panel]], True), (SHAPES[sheets.shapes[sheet, panel]], True)]
    return text


def describe(panel: int, dye: int, rng: np.random.Generator) -> str:
    """Make the words before a question: those of the panel and the dye, and fillers.

    There are one to five words, mostly four. Half of the texts are in random order. Each word for panel or dye is
    present with probability 0.9; if it is missing, the question leaves it open.
    """
    row, column = PANELS[panel].split()
    words = [word for word in (row, column, DYE_NAMES[dye]) if rng.random() < 0.9]
    length = max(len(words), 4 if rng.random() < 0.7 else int(rng.integers(1, 6)))
    words += [FILLERS[rng.integers(len(FILLERS))] for _ in range(length - len(words))]
    if rng.random() < 0.5:
        words = [words[i] for i in rng.permutation(len(words))]
    return " ".join(words)


def vocabulary() -> list[str]:
    """Return every word of questions, answers, words before a question, and a chat."""
    forms = [form.format("") for form in (*YES_NO_FORMS, *SHAPE_FORMS, *COLOUR_FORMS)]
    texts = [*forms, *PANELS, *DYES, *COLOURS, *SHAPES, *FILLERS, TEMPLATE, "yes no user assistant : ?"]
    return sorted({word for text in texts for word in text.replace("?", " ? ").split()})


def private_pictures(pictures: Pictures, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return a sheet for each picture, (picture, 4), with the picture in the private panel.

    The other pictures come from the same split. Half of them are random. The other half have a colour that the picture
    does not have, and mostly a shape that it does not have, first those that questions about the picture name. So only
    the right panel shows that a statement is false.
    """
    by_look: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i in range(len(pictures)):
        by_look[int(pictures.colours[i]), int(pictures.shapes[i])].append(i)
    sheets = np.empty((len(pictures), 4), dtype=np.int64)
    for i, questions in enumerate(pictures.questions):
        named = {word for question, _ in questions for word in question.rstrip("?").split()}
        colours = _others(COLOUR_NAMES, int(pictures.colours[i]), named, rng)
        shapes = _others(SHAPES, int(pictures.shapes[i]), named, rng)
        shapes = [*shapes, int(rng.integers(len(SHAPES)))]
        telling = [int(rng.choice(by_look[look])) for look in zip(colours[:3], shapes, strict=True)]
        row = [other if rng.random() < 0.5 else int(rng.integers(len(pictures))) for other in telling]
        row.insert(PANELS.index(PRIVATE_PANEL), i)
        sheets[i] = row
    return sheets


def _others(names: tuple[str, ...], index: int, named: set[str], rng: np.random.Generator) -> list[int]:
    """Return the indices of all names except ``index`` in random order, those in ``named`` first."""
    order = [int(v) for v in rng.permutation(len(names)) if v != index]
    return sorted(order, key=lambda v: names[v] not in named)


def private_columns(
    pictures: Pictures, per_type: int, seed: int
) -> tuple[dict[str, NDArray[np.generic]], list[Record]]:
    """Return the arrays of a private split, and its records in random order.

    There are ``per_type`` questions of each type. For types with yes or no answers, half are answered by yes.
    """
    rng = np.random.default_rng(seed)
    sheets = private_pictures(pictures, rng)
    asked: dict[tuple[str, bool], list[Record]] = defaultdict(list)
    for i, pairs in enumerate(pictures.questions):
        for question, answer in pairs:
            asked[question_type(question, answer), answer == "no"].append(
                (i, question, answer, question_type(question, answer))
            )
    records = []
    for kind in TYPES:
        sides = [asked[kind, is_no] for is_no in (False, True) if asked[kind, is_no]]
        number = per_type // len(sides)
        if min(map(len, sides)) < number:
            raise ValueError(
                f"{kind}: {[len(side) for side in sides]} questions are too few for {number} of each answer"
            )
        records += [side[i] for side in sides for i in rng.permutation(len(side))[:number]]
    records = [records[i] for i in rng.permutation(len(records))]
    columns = {
        "coverage": pictures.coverage // 17,
        "paper": pictures.paper,
        "colours": pictures.colours.astype(np.uint8),
        "sheets": sheets.astype(np.uint16),
    }
    return columns, records


def private_archive(splits: dict[str, tuple[Pictures, int]]) -> tuple[bytes, dict[str, list[str]]]:
    """Return the data that `load_vqa_demo` reads: the content of `sheets.npz`, and the texts that records index."""
    columns: dict[str, NDArray[np.generic]] = {}
    records: dict[str, list[Record]] = {}
    for seed, (split, (pictures, per_type)) in enumerate(splits.items()):
        arrays, records[split] = private_columns(pictures, per_type, seed)
        columns |= {f"{split}_{name}": array for name, array in arrays.items()}
    every = [record for split in records.values() for record in split]
    questions, answers = sorted({record[1] for record in every}), sorted({record[2] for record in every})
    for split, rows in records.items():
        columns[f"{split}_records"] = np.array(
            [(i, questions.index(q), answers.index(a), TYPES.index(kind)) for i, q, a, kind in rows], dtype=np.uint16
        )
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **columns)
    return content.getvalue(), {"questions": questions, "answers": answers}
