"""Labelled images of a run before any is opened: splits, class names, template, and every problem of them.

Folders, lists and Hugging Face data sets make the same `Layout`.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from fl_dualpriv.data.images import ImageDataset
from fl_dualpriv.errors import ConfigError

DEFAULT_TEMPLATE = "a photo of a {}"
SPLITS = ("train", "val", "test")
Group = Literal["", "domain", "client"]
"""What else a record needs, because data.partition divides by it: nothing, its domain or its client."""

ROLES = ("image", "label", "domain", "client")
USUAL = {
    "image": ("image", "path", "file", "filename", "file_name", "filepath", "image_path", "img"),
    "label": ("label", "labels", "class", "class_name", "category"),
    "domain": ("domain",),
    "client": ("client", "client_id"),
}
"""Names under which a column is found if the configuration names none, in this order."""

_NAMED = 5
_WORDNET_ID = re.compile(r"n\d{8}")
Place = TypeVar("Place")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Columns of a list or a data set, ``data.*-column``; an empty name means the first one of `USUAL` that exists."""

    image: str = ""
    label: str = ""
    domain: str = ""
    client: str = ""

    def options(self, role: str) -> tuple[str, ...]:
        """Return the names under which a column is looked for, in this order."""
        named = getattr(self, role)
        return (named,) if named else USUAL[role]

    def found(self, there: Sequence[str], group: Group, where: str) -> dict[str, str]:
        """Return the column of each role that the run reads.

        Args:
            there: Names of the columns that exist.
            group: Role that the division among clients needs besides image and label.
            where: Name of the file or data set in messages.

        Raises:
            ConfigError: If a column is missing. The message names all of them.
        """
        needed = ("image", "label", *([group] if group else []))
        columns, problems = {}, []
        for role in needed:
            named = getattr(self, role)
            column = next((name for name in self.options(role) if name in there), None)
            if column is not None:
                columns[role] = column
            elif named:
                problems.append(f"data.{role}-column = {named!r}: there is no such column")
            else:
                problems.append(
                    f"no column is called {' or '.join(USUAL[role])}: name the one of the {role} in data.{role}-column"
                )
        if problems:
            raise ConfigError("\n  ".join([f"{where} has the columns {', '.join(there)}:", *problems]))
        return columns


@dataclass(frozen=True, eq=False)
class Layout:
    """Splits, names and template, with every problem of them.

    Attributes:
        splits: The splits by name. If there is no problem, they are ``train``, ``val`` and ``test``.
        names: Class name by class folder, or by label.
        template: Prompt template with one ``{}`` for the class name.
        problems: Problems, one a line. The images can be used only if there is none.
        is_folder: True if classes are folders.
    """

    splits: Mapping[str, ImageDataset]
    names: dict[str, str]
    template: str
    problems: list[str]
    is_folder: bool = False


@dataclass(frozen=True, kw_only=True)
class Record(Generic[Place]):
    """One record of a list or a data set.

    Attributes:
        place: Place of its image.
        label: Its label; empty if it has none.
        group: Its domain or client; empty if it has none or the run reads none.
        where: Name of the record in messages.
    """

    place: Place
    label: str
    group: str
    where: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """Labels of the images of a split, see `ImageDataset`.

    Attributes:
        labels: Class ids, (images,) int64.
        class_names: Name of each class.
        domains: Domain ids, (images,) int64, or None.
        domain_names: Name of each domain.
        clients: Client ids, (images,) int64, or None.
        client_names: Name of each client.
    """

    labels: np.ndarray
    class_names: tuple[str, ...]
    domains: np.ndarray | None = None
    domain_names: tuple[str, ...] = ()
    clients: np.ndarray | None = None
    client_names: tuple[str, ...] = ()


Make = Callable[[str, list[Any], Labels], ImageDataset]
"""Function that makes a split of its name, the places of its images and their labels."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a run reads labelled images.

    Attributes:
        group: Role that every record must have besides image and label.
        columns: Columns of a list or a data set.
        needs_declared: True if the classes must be declared, by ``data.classes`` or the data set. The nodes of a
            deployment hold different records, and the class list, which is public, must not depend on them.
        on_bad: ``raise`` reports records without image, label or group as problems; ``keep`` keeps them as records.
    """

    group: Group = ""
    columns: Columns = Columns()
    needs_declared: bool = False
    on_bad: Literal["raise", "keep"] = "keep"


def layout_of_records(
    records: Mapping[str, Sequence[Record[Any]]],
    make: Make,
    *,
    classes: str,
    fractions: Mapping[str, float],
    seed: int,
    reading: Reading,
    nowhere: Any,
    declared: Sequence[str] = (),
) -> Layout:
    """Make a layout of records with labels; cut the splits that do not exist out of train, label by label.

    Guarantee:
        Under ``keep`` a record without label or group stays counted. Its image cannot be read, its label and group are
        the first ones, and it adds no name. Where classes must be declared, the same holds for a record with another
        label. Like a file that is missing in a folder, such a record changes the cut, which is drawn from all labels.

    Args:
        records: Records of each split that exists.
        make: Function that makes a split.
        classes: JSON file of template and names, see `class_names`; its names may have labels without a record.
        fractions: Share of each label's records for ``val`` and ``test`` if they do not exist.
        seed: Seed of that cut, which depends only on the seed, on the labels and on their counts.
        reading: How the run reads the records.
        nowhere: Place of an image that cannot be read.
        declared: Labels in their order, if the data declare them; else they are those of the training records.
    """
    # On a node the classes must not depend on its records. A record with another label becomes unreadable there.
    problems: list[str] = []
    group = reading.group
    if reading.needs_declared:
        known = set(declared) or declared_names(classes)
        if not known:
            problems.append(
                "the classes are not declared, and on a node they must not depend on its records: name all of them in "
                'data.classes, {"class-names": {"label": "name"}}'
            )
            return Layout({}, {}, DEFAULT_TEMPLATE, problems)
        records = {
            name: [record if record.label in known else replace(record, label="") for record in split]
            for name, split in records.items()
        }
    # All problems are collected, so that one message tells them together.
    bad = [r.where for split in records.values() for r in split if not r.label or (group and not r.group)]
    if bad and reading.on_bad == "raise":
        problems.append(f"{len(bad)} records have no label{f' or no {group}' if group else ''}: {_some(bad)}; add them")
    if "train" not in records:
        problems.append(f"there is no split called train beside {', '.join(records)}; add it")
    if empty := [name for name, split in records.items() if not split]:
        problems.append(f"{', '.join(empty)} holds no record; add some")
    # Class ids follow the declared order, or the sorted labels of the training records.
    seen = sorted({r.label for r in records.get("train", ()) if r.label})
    labels = list(declared or seen)
    names, template = class_names(classes, labels, problems, may_add=not declared)
    labels = list(declared) or sorted(names)
    for name, split in records.items():
        if unknown := sorted({r.label for r in split} - {""} - set(labels)):
            problems.append(f"{name} has labels that train does not have: {_some(unknown)}")
    if len(labels) < 2:
        problems.append(f"there are {len(labels)} labels; at least 2 are needed")
    groups = sorted({r.group for split in records.values() for r in split if r.group and r.label}) if group else []
    if group and not groups:
        problems.append(f"no record names its {group}; fill data.{group}-column")
    if problems:
        return Layout({}, names, template, problems)
    # From here on the records are good: cut the missing splits, and give each split its ids.
    number = {label: i for i, label in enumerate(labels)}
    cut = _cut(records, number, fractions, seed, problems, may_take_none=reading.needs_declared)
    splits = {}
    for name, split in cut.items():
        places = [nowhere if not r.label or (group and not r.group) else r.place for r in split]
        of_group = np.array([groups.index(r.group) if r.group in groups else 0 for r in split], dtype=np.int64)
        splits[name] = make(
            name,
            places,
            Labels(
                labels=np.array([number.get(r.label, 0) for r in split], dtype=np.int64),
                class_names=tuple(names[label] for label in labels),
                domains=of_group if group == "domain" else None,
                domain_names=tuple(groups) if group == "domain" else (),
                clients=of_group if group == "client" else None,
                client_names=tuple(groups) if group == "client" else (),
            ),
        )
    return Layout(splits, names, template, problems)


def _cut(
    records: Mapping[str, Sequence[Record[Any]]],
    number: Mapping[str, int],
    fractions: Mapping[str, float],
    seed: int,
    problems: list[str],
    *,
    may_take_none: bool,
) -> dict[str, list[Record[Any]]]:
    """Cut the splits that do not exist out of train; ``may_take_none`` leaves a label with few records in train."""
    cut = {name: list(split) for name, split in records.items()}
    wanted = {name: fraction for name, fraction in fractions.items() if name not in records}
    if not wanted:
        return cut
    train = cut["train"]
    taken: dict[str, list[int]] = {name: [] for name in wanted}
    for label in number:
        own = [i for i, record in enumerate(train) if record.label == label]
        if not own:  # a label that is only declared
            continue
        parts = cut_class(label, len(own), wanted, seed)
        if may_take_none and not len(parts["train"]):
            continue
        for name in wanted:
            taken[name] += [own[i] for i in parts[name]]
        if not len(parts["train"]):
            problems.append(
                f"label {label!r} has {len(own)} records, too few to cut {' and '.join(wanted)} from them and train on "
                "the rest; add records, lower the fractions or give these splits"
            )
    gone = {i for chosen in taken.values() for i in chosen}
    cut |= {name: [train[i] for i in sorted(chosen)] for name, chosen in taken.items()}
    cut["train"] = [record for i, record in enumerate(train) if i not in gone]
    return cut


def cut_class(name: str, count: int, fractions: Mapping[str, float], seed: int) -> dict[str, np.ndarray]:
    """Cut the images of one class: indices for each part of ``fractions``, and the rest as ``train``.

    Each part gets at least one image, as long as there are any, because a class without images cannot be scored. The
    cut depends on the seed, the name of the class and the count, so that another class does not change it.
    """
    order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(count)
    parts, start = {}, 0
    for part, fraction in fractions.items():
        size = max(1, round(fraction * count))
        parts[part] = order[start : start + size]
        start += size
    return parts | {"train": order[start:]}


def class_names(
    source: str, folders: Iterable[str], problems: list[str], *, may_add: bool = False
) -> tuple[dict[str, str], str]:
    """Return the name of each class folder or label, and the template; add problems to ``problems``.

    Args:
        source: JSON file ``{"template": "a photo of a {}", "class-names": {"folder": "name"}}``, either key optional.
            If empty, the name of a class is that of its folder, with ``_`` and ``-`` as spaces.
        folders: Class folders or labels.
        problems: List that takes the problems.
        may_add: True if the file may name more classes than ``folders``.
    """
    names = {folder: folder.replace("_", " ").replace("-", " ").strip() for folder in folders}
    template: Any = DEFAULT_TEMPLATE
    given: Any = None
    if source:
        document = _read_classes(Path(source).expanduser(), problems)
        template, given = document.get("template", DEFAULT_TEMPLATE), document.get("class-names")
        if unknown := sorted(document.keys() - {"template", "class-names"}):
            problems.append(f"{source}: unknown keys {', '.join(unknown)}; allowed are template and class-names")
        if given is not None and not (
            isinstance(given, dict) and all(isinstance(name, str) and name.strip() for name in given.values())
        ):
            problems.append(f'{source}: class-names must be an object of non-empty texts: {{"folder": "name"}}')
        elif given is not None and names and not _fits(given, names, may_add=may_add):
            problems.append(f"{source}: class-names do not match the class folders: {difference(given, names)}")
        elif given is not None:
            names = dict(given)
        if not isinstance(template, str) or template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
            problems.append(f"{source}: template {template!r} must be a text with exactly one {{}} for the class name")
    if ids := [folder for folder, name in names.items() if _WORDNET_ID.fullmatch(name)]:
        problems.append(
            f"class folders {_some(ids)} have names that are WordNet ids, which are no words: name each class in "
            f'data.classes, for example {{"class-names": {{"{ids[0]}": "goldfish"}}}}'
        )
    for name in sorted(set(names.values())):
        same = [folder for folder in names if names[folder] == name]
        if len(same) > 1 or not name:
            problems.append(f"class folders {', '.join(same)} share the name {name!r}; rename one")
    return names, template


def declared_names(source: str) -> set[str]:
    """Return the labels that a file of class names declares; empty if there is no file, or it names none."""
    given = _read_classes(Path(source).expanduser(), []).get("class-names") if source else None
    return set(given) if isinstance(given, dict) else set()


def _fits(given: Mapping[str, str], names: Mapping[str, str], *, may_add: bool) -> bool:
    return given.keys() >= names.keys() if may_add else given.keys() == names.keys()


def _read_classes(source: Path, problems: list[str]) -> dict[str, Any]:
    try:
        document = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"data.classes: {source.absolute()} cannot be read: {error.strerror}; give a JSON file")
    except ValueError as error:
        problems.append(f"data.classes: {source} is not JSON: {error}")
    else:
        if isinstance(document, dict):
            return document
        problems.append(f"data.classes: {source} must hold a JSON object with the keys template and class-names")
    return {}


def difference(some: Mapping[str, object], others: Mapping[str, object]) -> str:
    """Say which keys of two mappings differ; empty if none does."""
    missing, extra = sorted(others.keys() - some.keys()), sorted(some.keys() - others.keys())
    parts = [f"{label} {', '.join(names)}" for label, names in (("missing", missing), ("extra", extra)) if names]
    return "; ".join(parts)


def _some(words: Sequence[str]) -> str:
    more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
    return ", ".join(words[:_NAMED]) + more
