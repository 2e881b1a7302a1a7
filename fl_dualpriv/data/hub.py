"""Questions from a Hugging Face data set, or a folder that `datasets` reads. Only this file imports datasets."""

import functools
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from fl_dualpriv.data.folder import BadImageError
from fl_dualpriv.data.hub_names import PARQUET, is_saved, source_and_configuration
from fl_dualpriv.data.questions import DEFAULT_TEMPLATE, QuestionSet, QuestionSplits, cut_by_image, subset
from fl_dualpriv.errors import ConfigError

_NAMES = {"train": ("train",), "val": ("validation", "val", "dev"), "test": ("test",)}
_TYPES = ("type", "question_type", "answer_type")


@dataclass(frozen=True, eq=False)
class HubImages:
    """`ImageDataset` over a column of images; ``rows`` holds the first row of each image."""

    table: Any
    rows: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """Zeros, because images have no class here; see `ImageDataset`."""
        return np.zeros(len(self.rows), dtype=np.int64)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of the only class; see `ImageDataset`."""
        return ("image",)

    @property
    def domains(self) -> None:
        """None, because images of questions have no domains; see `ImageDataset`."""

    @property
    def domain_names(self) -> tuple[str, ...]:
        """No names; see `ImageDataset`."""
        return ()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows)

    def image(self, index: int) -> Image.Image:
        """Decode one image to RGB.

        Raises:
            BadImageError: If the image cannot be decoded, or is missing.
        """
        try:
            image = self.table[int(self.rows[index])]["image"]
            return image.convert("RGB")
        except Exception as error:  # on a bad record, decoders may raise any kind
            raise BadImageError(f"image {index}: {type(error).__name__}: {error}") from error

    @property
    def content_hash(self) -> str:
        """Hash of the table's fingerprint in `datasets` and of the rows; see `ImageDataset.content_hash`."""
        return hashlib.sha256(self.table._fingerprint.encode() + self.rows.tobytes()).hexdigest()

    def unchanged(self, index: int) -> bool:
        """Always True, because tables of `datasets` do not change; see `ImageDataset.unchanged`."""
        return True

    def unreadable(self, index: int) -> int | None:
        """Return None; see `ImageDataset.unreadable`."""
        return None


def given_hub_splits(name: str) -> frozenset[str]:
    """Return the splits among train, val and test that a data set has."""
    return frozenset(_splits(name))


def load_hub_questions(
    name: str, val_fraction: float, test_fraction: float, seed: int, on_bad: Literal["raise", "keep"]
) -> QuestionSplits:
    """Read a data set with the columns image, question, and answer or answers; see `load_questions`.

    If a record has several answers, the most frequent one counts. The type of a question is read from the column
    ``type``, ``question_type`` or ``answer_type``, if there is one. ``NAME#CONFIGURATION`` picks a configuration of
    the hub.
    """
    tables = dict(_splits(name))
    if "train" not in tables:
        other_splits = f"it has {', '.join(tables)}" if tables else "nor one called validation or test"
        raise ConfigError(f"data.path = datasets:{name}: it has no split called train; {other_splits}")
    for split, table in tables.items():
        lacking = [column for column in ("image", "question") if column not in table.column_names]
        lacking += [] if {"answer", "answers"} & set(table.column_names) else ["answer"]
        if lacking:
            raise ConfigError(
                f"data.path = datasets:{name}: split {split} has no column {', '.join(lacking)}; it has "
                f"{', '.join(table.column_names)}"
            )
        tables[split] = _with_images(table, f"datasets:{name}, split {split}")
    kind = next((c for c in _TYPES if all(c in table.column_names for table in tables.values())), None)
    types = tuple(sorted({str(t) for table in tables.values() for t in (table[kind] if kind else ("",))}))
    sets = {split: _question_set(table, kind, types, on_bad, f"datasets:{name}") for split, table in tables.items()}
    missing = {n: f for n, f in (("val", val_fraction), ("test", test_fraction)) if n not in sets}
    if missing:
        train = sets["train"]
        assert isinstance(train.images, HubImages)
        for split, images in cut_by_image(len(train.images), missing, seed).items():
            sets[split] = subset(train, images, HubImages(train.images.table, train.images.rows[images]))
    return QuestionSplits(sets["train"], sets["val"], sets["test"], types, DEFAULT_TEMPLATE)


@functools.lru_cache(maxsize=2)
def _splits(name: str) -> dict[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"data.path = datasets:{name} needs the package datasets; install fl-dualpriv[datasets]"
        ) from error
    source, configuration = source_and_configuration(name)
    place = Path(source).expanduser()
    datasets.disable_progress_bars()
    try:
        if is_saved(place):
            data_set: Any = datasets.load_from_disk(str(place))
        elif place.is_file() and place.suffix.lower() == PARQUET:
            data_set = datasets.load_dataset("parquet", data_files=str(place))
        else:
            data_set = datasets.load_dataset(str(place) if place.exists() else source, configuration or None)
    except Exception as error:  # datasets, the hub and the network each raise different kinds
        words = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"data.path = datasets:{name} cannot be loaded: {type(error).__name__}: {words}") from error
    if isinstance(data_set, datasets.Dataset):  # a single table that was saved without splits
        data_set = {"train": data_set}
    names = {split: next((n for n in options if n in data_set), None) for split, options in _NAMES.items()}
    return {split: data_set[n] for split, n in names.items() if n is not None}


def _with_images(table: Any, where: str) -> Any:
    """Return the table with a column of images; in a parquet file, the column may hold image paths or bytes."""
    import datasets

    if isinstance(table.features["image"], datasets.Image):
        return table
    try:
        return table.cast_column("image", datasets.Image())
    except Exception as error:  # pyarrow and datasets each raise different kinds
        raise ConfigError(
            f"data.path = {where}: column image holds {table.features['image']}, no images; it must hold images, their "
            "bytes or their paths"
        ) from error


def _question_set(
    table: Any, kind: str | None, types: tuple[str, ...], on_bad: Literal["raise", "keep"], where: str
) -> QuestionSet:
    questions = tuple(str(q or "").strip() for q in table["question"])
    answers = tuple(_answer(a) for a in table["answer" if "answer" in table.column_names else "answers"])
    bad = [i for i, pair in enumerate(zip(questions, answers, strict=True)) if not all(pair)]
    if on_bad == "raise" and bad:
        raise ConfigError(f"data.path = {where}: {len(bad)} records without question or answer (the first: {bad[0]})")
    faults = [""] * len(questions)
    for i in bad:
        faults[i] = f"record {i}: no question or no answer"
    number = {name: i for i, name in enumerate(types)}
    labels = [number[str(t)] for t in table[kind]] if kind else [0] * len(questions)
    rows, image_of = _distinct_images(table)
    return QuestionSet(
        images=HubImages(table, rows),
        image_of=image_of,
        questions=tuple("" if fault else question for question, fault in zip(questions, faults, strict=True)),
        answers=answers,
        labels=np.array(labels, dtype=np.int64),
        class_names=types,
        faults=tuple(faults),
    )


def _distinct_images(table: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the first row of each image, and each record's image; equal bytes or equal paths mean the same image."""
    import datasets

    raw = table.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
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
