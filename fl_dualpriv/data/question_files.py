"""Questions in JSON lines or CSV files: image, question, answer and optionally the question's type and domain."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fl_dualpriv.data.folder import FolderSplit
from fl_dualpriv.data.formats.text_files import KINDS, header, is_text, records_of, split_files
from fl_dualpriv.data.questions import DEFAULT_TEMPLATE, QuestionSet, QuestionSplits, cut_by_image, subset
from fl_dualpriv.errors import ConfigError

_NEEDED = ("image", "question", "answer")
_SHOWN = 5


@dataclass(frozen=True)
class _Row:
    """One record of a file; ``fault`` says why the record cannot be used, and is empty if it can be used."""

    where: str
    image: Path
    question: str
    answer: str
    type: str
    domain: str
    fault: str = ""


def load_question_files(
    path: str,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    on_bad: Literal["raise", "keep"],
    by_domain: bool = False,
) -> QuestionSplits:
    """Read a file, or the files of a folder; see `load_questions`. Images are named relative to their file.

    Each line (JSON lines) or row under a header (CSV) has ``image``, ``question``, ``answer``, and may have ``type``
    and ``domain``. ``domain`` is read only with ``by_domain``. A record without one can then not be used. It is counted
    in the first domain, so that one bad record does not change the number of domains.
    """
    source = Path(path).expanduser()
    if source.is_dir():
        files = split_files(source)
        if "train" not in files:
            raise ConfigError(f"data.path = {path!r} is a folder without train.jsonl or train.csv; add one")
    elif source.is_file() and source.suffix.lower() in KINDS:
        files = {"train": source}
    else:
        raise ConfigError(
            f"data.path = {path!r} is not a file of questions: {source.absolute()} is missing, or is neither .jsonl "
            "nor .csv"
        )
    rows = {name: list(_read(file)) for name, file in files.items()}
    if empty := [files[name].name for name, split_rows in rows.items() if not split_rows]:
        raise ConfigError(f"data.path = {path!r}: {', '.join(empty)} holds no question; add some")
    domains = _domains(path, rows) if by_domain else ()
    if domains:
        rows = {name: [_with_domain(row, domains[0]) for row in split_rows] for name, split_rows in rows.items()}
    if on_bad == "raise":
        _refuse(path, rows)
    types = tuple(sorted({row.type for split_rows in rows.values() for row in split_rows}))
    sets = {name: _question_set(split_rows, types, domains) for name, split_rows in rows.items()}
    train = sets["train"]
    missing = {n: f for n, f in (("val", val_fraction), ("test", test_fraction)) if n not in sets}
    if missing:
        cut = cut_by_image(len(train.images), missing, seed)
        sets |= {name: subset(train, images, _images(train, images)) for name, images in cut.items()}
    return QuestionSplits(sets["train"], sets["val"], sets["test"], types, DEFAULT_TEMPLATE)


def _images(questions: QuestionSet, numbers: np.ndarray) -> FolderSplit:
    assert isinstance(questions.images, FolderSplit)
    return _folder([questions.images.paths[i] for i in numbers])


def _folder(paths: list[Path]) -> FolderSplit:
    return FolderSplit(tuple(paths), np.zeros(len(paths), dtype=np.int64), ("image",))


def _domains(path: str, rows: Mapping[str, list[_Row]]) -> tuple[str, ...]:
    """Return the domains that the records of all splits name, in the order of their names.

    Raises:
        ConfigError: If no record names a domain.
    """
    domains = tuple(sorted({row.domain for split_rows in rows.values() for row in split_rows if row.domain}))
    if not domains:
        raise ConfigError(
            f'data.path = {path!r}: no record names its domain, and data.partition = "by-domain" needs it; add a '
            "column domain, or choose another data.partition"
        )
    return domains


def _with_domain(row: _Row, first: str) -> _Row:
    if row.domain:
        return row
    return replace(row, domain=first, fault=row.fault or f"{row.where}: domain must be a non-empty text in UTF-8")


def _question_set(rows: list[_Row], types: tuple[str, ...], domains: tuple[str, ...]) -> QuestionSet:
    paths = sorted({row.image for row in rows})
    number, kind = ({value: i for i, value in enumerate(values)} for values in (paths, types))
    return QuestionSet(
        images=_folder(paths),
        image_of=np.array([number[row.image] for row in rows], dtype=np.int64),
        questions=tuple("" if row.fault else row.question for row in rows),
        answers=tuple(row.answer for row in rows),
        labels=np.array([kind[row.type] for row in rows], dtype=np.int64),
        class_names=types,
        faults=tuple(row.fault for row in rows),
        domains=np.array([domains.index(row.domain) for row in rows], dtype=np.int64) if domains else None,
        domain_names=domains,
    )


def _refuse(path: str, rows: Mapping[str, list[_Row]]) -> None:
    faults = [row.fault for split_rows in rows.values() for row in split_rows if row.fault]
    faults += [
        f"{image} is missing: an image of {name}"
        for name, split_rows in rows.items()
        for image in sorted({row.image for row in split_rows if not row.fault})
        if not os.path.isfile(image)  # noqa: PTH113 - Path.is_file raises where a name is too long
    ]
    if faults:
        more = f"and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        lines = [f"the questions in {path} cannot be used:", *faults[:_SHOWN], *([more] if more else [])]
        raise ConfigError("\n  ".join(lines))


def _read(file: Path) -> Iterator[_Row]:
    """Read every record of a file. A fault in one record affects no other, because under DP all others must count."""
    if (names := header(file)) is not None and (lacking := [name for name in _NEEDED if name not in names]):
        raise ConfigError(f"{file}: its first line must name the columns; {', '.join(lacking)} is missing")
    for number, record in records_of(file):
        yield _row(file, number, record)


def _row(file: Path, number: int, record: Any) -> _Row:
    """Make a record with its fault. A bad record stays counted, and keeps its image and type if they can be read."""
    where = f"{file.name}, line {number}"
    if not isinstance(record, Mapping):
        return _Row(where, file.parent, "", "", "", "", f"{where}: not a JSON object")
    texts = {name: value for name in _NEEDED if is_text(value := record.get(name))}
    image = file.parent / texts.get("image", "")
    kind, domain = (value.strip() if is_text(value := record.get(name)) else "" for name in ("type", "domain"))
    if bad := [name for name in _NEEDED if name not in texts]:
        return _Row(where, image, "", "", kind, domain, f"{where}: {', '.join(bad)} must be a non-empty text in UTF-8")
    question, answer = (" ".join(texts[name].split()) for name in ("question", "answer"))
    return _Row(where, image, question, answer, kind, domain)
