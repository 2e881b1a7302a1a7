"""Questions from a Hugging Face data set, a saved folder, a parquet file or a folder that `datasets` reads."""

import hashlib
from collections import Counter
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from fl_dualpriv.data.folder import FolderSplit
from fl_dualpriv.data.hub import HubImages, images_of, tables_with_train, with_images
from fl_dualpriv.data.images import ImageDataset
from fl_dualpriv.data.layout import Labels
from fl_dualpriv.data.questions import DEFAULT_TEMPLATE, QuestionSet, QuestionSplits, cut_by_image, subset
from fl_dualpriv.errors import ConfigError

_TYPES = ("type", "question_type", "answer_type")


def load_hub_questions(
    name: str, val_fraction: float, test_fraction: float, seed: int, on_bad: Literal["raise", "keep"]
) -> QuestionSplits:
    """Read a data set with the columns image, question, and answer or answers; see `load_questions`.

    If a record has several answers, the most frequent one counts. The type of a question is read from the column
    ``type``, ``question_type`` or ``answer_type``, if there is one. ``NAME#CONFIGURATION`` picks a configuration of
    the hub.
    """
    tables = tables_with_train(name)
    for split, table in tables.items():
        lacking = [column for column in ("image", "question") if column not in table.column_names]
        lacking += [] if {"answer", "answers"} & set(table.column_names) else ["answer"]
        if lacking:
            raise ConfigError(
                f"data.path = datasets:{name}: split {split} has no column {', '.join(lacking)}; it has "
                f"{', '.join(table.column_names)}"
            )
        tables[split] = with_images(table, "image", f"datasets:{name}, split {split}")
    kind = next((c for c in _TYPES if all(c in table.column_names for table in tables.values())), None)
    types = tuple(sorted({str(t) for table in tables.values() for t in (table[kind] if kind else ("",))}))
    sets = {split: _question_set(table, split, kind, types, on_bad, name) for split, table in tables.items()}
    missing = {n: f for n, f in (("val", val_fraction), ("test", test_fraction)) if n not in sets}
    if missing:
        train = sets["train"]
        for split, images in cut_by_image(len(train.images), missing, seed).items():
            sets[split] = subset(train, images, _some(train.images, images))
    return QuestionSplits(sets["train"], sets["val"], sets["test"], types, DEFAULT_TEMPLATE)


def _question_set(
    table: Any, split: str, kind: str | None, types: tuple[str, ...], on_bad: Literal["raise", "keep"], name: str
) -> QuestionSet:
    questions = tuple(str(q or "").strip() for q in table["question"])
    answers = tuple(_answer(a) for a in table["answer" if "answer" in table.column_names else "answers"])
    bad = [i for i, pair in enumerate(zip(questions, answers, strict=True)) if not all(pair)]
    if on_bad == "raise" and bad:
        raise ConfigError(
            f"data.path = datasets:{name}: {len(bad)} records without question or answer (the first: {bad[0]})"
        )
    faults = [""] * len(questions)
    for i in bad:
        faults[i] = f"record {i}: no question or no answer"
    number = {text: i for i, text in enumerate(types)}
    labels = [number[str(t)] for t in table[kind]] if kind else [0] * len(questions)
    rows, image_of = _distinct_images(table)
    return QuestionSet(
        images=images_of(table, "image", rows, f"split {split} of datasets:{name}", _without_labels(len(rows)), name),
        image_of=image_of,
        questions=tuple("" if fault else question for question, fault in zip(questions, faults, strict=True)),
        answers=answers,
        labels=np.array(labels, dtype=np.int64),
        class_names=types,
        faults=tuple(faults),
    )


def _without_labels(count: int) -> Labels:
    """Return the labels of images without classes and domains."""
    return Labels(labels=np.zeros(count, dtype=np.int64), class_names=("image",))


def _some(images: ImageDataset, chosen: np.ndarray) -> ImageDataset:
    """Return some of the images, by their indices."""
    of = _without_labels(len(chosen))
    if isinstance(images, FolderSplit):
        return FolderSplit.labelled((images.paths[i] for i in chosen), of)
    assert isinstance(images, HubImages)
    return replace(images, rows=images.rows[chosen], of=of)


def _distinct_images(table: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the first row of each image, and each record's image; equal bytes or equal paths mean the same image."""
    raw = table.select_columns(["image"])
    first: dict[bytes, int] = {}
    image_of = np.zeros(len(raw), dtype=np.int64)
    rows: list[int] = []
    for row, record in enumerate(raw):
        image = record["image"] or {}
        content = image.get("bytes") or str(image.get("path") or row).encode()
        key = hashlib.sha256(content).digest()
        if key not in first:
            first[key] = len(rows)
            rows.append(row)
        image_of[row] = first[key]
    return np.array(rows, dtype=np.int64), image_of


def _answer(value: Any) -> str:
    """Return one answer: the most frequent of several, and the ``answer`` entry of a dictionary."""
    if isinstance(value, list | tuple):
        texts = [_answer(one) for one in value]
        return Counter(texts).most_common(1)[0][0] if texts else ""
    if isinstance(value, dict):
        return _answer(value.get("answer", ""))
    return " ".join(str(value or "").split())
