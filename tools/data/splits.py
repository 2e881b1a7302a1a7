"""Splits: CoOp's split files, the owners' lists, and cuts by a seed.

Reference:
    Zhou et al. 2022, arXiv:2109.01134 (CoOp: its split files, its class names and its cut of 50, 20 and 30 per cent).
"""

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fl_dualpriv.errors import ConfigError
from tools.data.archives import Archives, Member, few
from tools.data.layout import SPLITS, Picture, Plan, Rule

COOP_CUT = Rule(
    "a cut by the rule of CoOp, because the owners publish no split: 50 % of each class are train, 20 % val and 30 % "
    "test, drawn by the seed, in each domain by itself; fewer than 3 images of a class are train only",
    ("seed",),
)
_TRAIN, _VAL = 0.5, 0.2


class Entry(NamedTuple):
    """Line of a split: the split, the class folder, the path of the image, and the domain folder if there is one."""

    split: str
    folder: str
    path: str
    domain: str = ""


def words(name: str) -> str:
    """Return a class's name for the prompt: CoOp replaces underscores by spaces."""
    return name.replace("_", " ").strip()


def pictures_of(archives: Archives, entries: Iterable[Entry], source: str) -> list[Picture]:
    """Find the images that a split names.

    Args:
        archives: The archives.
        entries: The lines of the split.
        source: Name of the split in messages.

    Raises:
        ConfigError: If images are missing in the archives.
    """
    entries = list(entries)
    if missing := [entry.path for entry in entries if entry.path not in archives.members]:
        raise ConfigError(
            f"{len(missing)} of {len(entries)} images that {source} names are not in the archives: {few(missing)}; "
            "give the complete archives of the version that the split belongs to"
        )
    return [Picture(entry.split, entry.folder, archives.members[entry.path], entry.domain) for entry in entries]


def folder_of_path(path: str, label: int, name: str) -> str:
    """Return the folder in which an image lies; empty if it is not exactly one folder deep."""
    folder, _, file = path.rpartition("/")
    return folder if file and "/" not in folder else ""


def coop_plan(
    file: Path,
    archives: Archives,
    root: str,
    template: str,
    folder_of: Callable[[str, int, str], str] = folder_of_path,
) -> Plan:
    """Return the plan of a split file of CoOp.

    Args:
        file: JSON file with the lists ``train``, ``val`` and ``test`` of [path, label, class name].
        archives: The archives.
        root: Folder in the archives to which the paths are relative; it ends in "/".
        template: Prompt template.
        folder_of: Function of path, label and class name that returns the class folder, or an empty text if the line
            is wrong.

    Raises:
        ConfigError: If the file cannot be read, if lines are wrong, or if images are missing in the archives.
    """
    document = read_json(file, "--split", "CoOp's file split_zhou_NAME.json")
    if not isinstance(document, dict) or sorted(document) != sorted(SPLITS):
        keys = few(sorted(document)) if isinstance(document, dict) else type(document).__name__
        raise ConfigError(
            f"--split {file} has {keys}; it must be an object with the keys train, val and test: give CoOp's file"
        )
    entries, wrong = [], []
    names: dict[str, str] = {}
    for split in SPLITS:
        rows = document[split] if isinstance(document[split], list) else [document[split]]
        for number, row in enumerate(rows):
            match row:
                case [str(path), int(label), str(name)] if folder := folder_of(path, label, name):
                    entries.append(Entry(split, folder, root + path))
                    if names.setdefault(folder, words(name)) != words(name):
                        wrong.append(f"{split}[{number}] names {folder} {words(name)!r} and not {names[folder]!r}")
                case _:
                    wrong.append(f"{split}[{number}] is {row!r}")
    if wrong:
        raise ConfigError(
            f"--split {file} has {len(wrong)} wrong lines: {few(wrong)}; a line is [path, label, class name] with one "
            "name for each class folder: give CoOp's file for this data set"
        )
    pictures = pictures_of(archives, entries, f"--split {file}")
    return Plan(pictures, names, template, Rule(f"the split file of CoOp, {file.name}"))


def coop_cut(classes: Mapping[str, Sequence[Member]], seed: int, domain: str = "") -> list[Picture]:
    """Cut each class into train, val and test by the rule of CoOp; see `COOP_CUT`.

    The cut of a class depends only on the seed and on the names of domain, class and files.

    Args:
        classes: Images of each class folder.
        seed: Seed of the cut.
        domain: Domain folder of the classes, if there is one.
    """
    pictures = []
    for folder, members in classes.items():
        total = len(members)
        n_val = max(1, round(_VAL * total))
        n_train = max(1, min(round(_TRAIN * total), total - n_val - 1))
        if total < 3:
            n_train, n_val = total, 0
        order = _shuffled(members, seed, domain, folder)
        for split, start, stop in (
            ("train", 0, n_train),
            ("val", n_train, n_train + n_val),
            ("test", n_train + n_val, total),
        ):
            pictures += [Picture(split, folder, member, domain) for member in order[start:stop]]
    return pictures


def with_val(pictures: Sequence[Picture], fraction: float, seed: int) -> list[Picture]:
    """Move a share of each class of train to val, in each domain by itself.

    At least one image of a class becomes val, and at least one stays; a class with one image stays in train. The cut of
    a class depends only on seed and share, and on the names of domain, class and files.

    Args:
        pictures: Images of train and test.
        fraction: The share.
        seed: Seed of the cut.
    """
    groups: dict[tuple[str, str], list[Member]] = {}
    for picture in pictures:
        if picture.split == "train":
            groups.setdefault((picture.domain, picture.folder), []).append(picture.member)
    val: set[str] = set()
    for (domain, folder), members in groups.items():
        size = min(len(members) - 1, max(1, round(fraction * len(members))))
        val |= {member.path for member in _shuffled(members, seed, domain, folder)[:size]}
    return [
        Picture("val", picture.folder, picture.member, picture.domain)
        if picture.split == "train" and picture.member.path in val
        else picture
        for picture in pictures
    ]


def owners(files: str) -> Rule:
    """Return the rule of an owners' split that has a val."""
    return Rule(f"the split of the owners: {files}")


def owners_and_val(files: str) -> Rule:
    """Return the rule of an owners' split without a val, with the cut of `with_val`."""
    return Rule(
        f"the split of the owners: {files}; val is a share of each class of train, drawn by the seed",
        ("seed", "val_fraction"),
    )


def read_json(file: Path, option: str, wanted: str) -> Any:
    """Read a JSON file that an option names.

    Raises:
        ConfigError: If it cannot be read or is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{option} {file} cannot be read as JSON ({error}); give {wanted}") from error


def _shuffled(members: Sequence[Member], seed: int, domain: str, folder: str) -> list[Member]:
    # Keyed by the class, so that adding a class does not change the cut of the others.
    rng = np.random.default_rng([seed, zlib.crc32(f"{domain}/{folder}".encode())])
    by_path = sorted(members, key=lambda member: member.path)
    return [by_path[index] for index in rng.permutation(len(by_path))]
