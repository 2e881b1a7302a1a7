"""Records in JSON lines and CSV files. Standard library only."""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from fl_dualpriv.errors import ConfigError

KINDS = (".jsonl", ".csv")
_SPLITS = ("train", "val", "test")
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")
"""Lone surrogates and zero characters. JSON can hold them, but a file name cannot."""


def given_file_splits(path: Path) -> frozenset[str]:
    """Return the splits among train, val and test that have a separate file in a folder; empty for a single file."""
    return frozenset(split_files(path)) if path.is_dir() else frozenset()


def split_files(folder: Path) -> dict[str, Path]:
    """Find the file of each split; a JSON lines file takes precedence over a CSV file."""
    files = {}
    for name in _SPLITS:
        there = [folder / f"{name}{kind}" for kind in KINDS if (folder / f"{name}{kind}").is_file()]
        if there:
            files[name] = there[0]
    return files


def header(file: Path) -> tuple[str, ...] | None:
    """Return the columns that a CSV file's first line names; None for JSON lines, which have no header.

    Raises:
        ConfigError: If the file cannot be read.
    """
    if file.suffix.lower() != ".csv":
        return None
    return _columns(_text_of(file))


def _columns(text: str) -> tuple[str, ...]:
    return tuple(csv.DictReader(io.StringIO(text)).fieldnames or ())


def first_keys(file: Path) -> tuple[str, ...]:
    """Return the columns of a CSV file, or the keys of the first record of JSON lines; empty if there is none."""
    names = header(file)
    if names is None:
        _, record = next(records_of(file), (0, None))
        names = tuple(record) if isinstance(record, Mapping) else ()
    return names


def records_of(file: Path, *, line_by_line: bool = False) -> Iterator[tuple[int, Any]]:
    """Yield line number and content of every record of a file.

    A fault in one record affects no other, because under DP all others must count. A line that is not JSON gives None.

    Args:
        file: The file.
        line_by_line: True if no cell of a CSV file holds a line break: a stray quote then cannot swallow other records.

    Raises:
        ConfigError: If the file cannot be read.
    """
    text = _text_of(file)
    lines = io.StringIO(text)  # not splitlines, which would also split a line at U+2028 and similar characters
    if file.suffix.lower() == ".csv":
        csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # otherwise one long cell fails the whole file
        if line_by_line:
            names = _columns(text)
            next(lines, None)
            for number, line in enumerate(lines, start=2):
                if line.strip():
                    yield number, dict(zip(names, next(csv.reader([line]), []), strict=False))
            return
        reader = csv.DictReader(lines)
        for record in reader:
            yield reader.line_num, record
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _text_of(file: Path) -> str:
    try:
        # Bytes that are not UTF-8 become lone surrogates, which `is_text` refuses.
        return file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}") from error


def is_text(value: Any) -> TypeGuard[str]:
    """True if a value is a non-empty text that can be written in UTF-8 and holds no zero character."""
    return isinstance(value, str) and bool(value.strip()) and not _UNWRITABLE.search(value)
