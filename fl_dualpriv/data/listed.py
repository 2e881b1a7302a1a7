"""Labelled images from a CSV or JSON lines file: path, label, and optionally domain and client of each image."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_dualpriv.data.folder import FolderSplit
from fl_dualpriv.data.formats.text_files import (
    KINDS,
    first_keys,
    given_file_splits,
    header,
    is_text,
    records_of,
    split_files,
)
from fl_dualpriv.data.layout import ROLES, Layout, Reading, Record, layout_of_records
from fl_dualpriv.errors import ConfigError


def is_list(path: Path) -> bool:
    """Return True if a path is a list of records, or a folder with a list called train."""
    return path.suffix.lower() in KINDS if path.is_file() else path.is_dir() and "train" in given_file_splits(path)


def read_list(path: Path, classes: str, fractions: Mapping[str, float], seed: int, reading: Reading) -> Layout:
    """Read a list, or the lists train, val and test of a folder. Opens no image.

    Args:
        path: File or folder. Images are named relative to their list.
        classes: JSON file of template and class names, see `layout.class_names`.
        fractions: Share of each label for ``val`` and ``test`` if they have no list.
        seed: Seed of that cut.
        reading: How the run reads the records.

    Raises:
        ConfigError: If a file cannot be read, or lacks a column.
    """
    files = split_files(path) if path.is_dir() else {"train": path}
    return layout_of_records(
        {name: list(_records(file, reading)) for name, file in files.items()},
        lambda _, places, of: FolderSplit.labelled(places, of),
        classes=classes,
        fractions=fractions,
        seed=seed,
        reading=reading,
        nowhere=path if path.is_dir() else path.parent,  # a folder, which is no image
    )


def holds_questions(path: Path) -> bool:
    """Return True if a list has a column of questions; of JSON lines the first record decides."""
    file = path if path.is_file() else next(iter(split_files(path).values()), None)
    return file is not None and "question" in first_keys(file)


def _records(file: Path, reading: Reading) -> Iterator[Record[Path]]:
    """Read the records. Those of JSON lines find their columns themselves: no record decides for another one.

    Raises:
        ConfigError: If the file has no record, or no record has a column that is needed.
    """
    names, group = header(file), reading.group
    found = {} if names is None else reading.columns.found(names, group, str(file))
    read = list(records_of(file, line_by_line=True))
    if not read:
        raise ConfigError(f"{file} holds no record; add some")
    if names is None:  # the message names the columns that are missing everywhere
        everything = dict.fromkeys(key for _, record in read if isinstance(record, Mapping) for key in record)
        reading.columns.found(tuple(everything), group, str(file))
    for line, record in read:
        texts = {
            role: _text(record, (found[role],) if found else reading.columns.options(role))
            for role in ROLES
            if role in ("image", "label", group)
        }
        place = file.parent / texts["image"] if texts["image"] else file.parent
        label = texts["label"] if texts["image"] else ""  # a record without an image cannot be used either
        yield Record(place=place, label=label, group=texts[group] if group else "", where=f"{file.name}, line {line}")


def _text(record: Any, columns: Sequence[str]) -> str:
    """Return the first cell with a text; numbers and truth values count as text, because a label may be one."""
    for column in columns:
        value = record.get(column) if isinstance(record, Mapping) else None
        if isinstance(value, int | float):
            value = str(value)
        if is_text(value):
            return value.strip()
    return ""
