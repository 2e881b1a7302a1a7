"""Folder that ``data.ref = "folder"`` reads: where each image goes, checked, then written under a temporary name.

The temporary folder lies beside the final one, which appears by one rename. A script that is killed leaves no final
folder, but it may leave a hidden temporary one.
"""

import contextlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_dualpriv.errors import ConfigError
from tools.data.archives import Member, few, is_image

SPLITS = ("train", "val", "test")
CLASSES, PROVENANCE = "classes.json", "provenance.json"
_MADE = "made"


@dataclass(frozen=True)
class Picture:
    """Place of one image: its split, the folders of its class and of its domain if there is one, and its file."""

    split: str
    folder: str
    member: Member
    domain: str = ""

    @property
    def place(self) -> str:
        """Path of the image's folder in the made folder."""
        return "/".join(part for part in (self.split, self.domain, self.folder) if part)


@dataclass(frozen=True)
class Rule:
    """Rule by which the images were split.

    Attributes:
        words: The rule in words.
        options: Options of the script that it follows, among ``seed`` and ``val_fraction``.
    """

    words: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """All that is written.

    Attributes:
        pictures: Place of each image.
        names: Words for the prompt by class folder.
        template: Prompt template with one ``{}``.
        rule: Rule of the split.
    """

    pictures: list[Picture]
    names: dict[str, str]
    template: str
    rule: Rule

    @property
    def domains(self) -> list[str]:
        """Domain folders in the order of their names; empty without domains."""
        return sorted({picture.domain for picture in self.pictures} - {""})

    def counts(self) -> dict[str, int]:
        """Return the number of images of each split."""
        found = Counter(picture.split for picture in self.pictures)
        return {split: found[split] for split in SPLITS}


def folder_name(words: str) -> str:
    """Return words as the name of a folder.

    Example:
        >>> folder_name("colt's foot")
        'colt_s_foot'
    """
    return re.sub(r"[^\w.-]+", "_", words).strip("._")


def check(plan: Plan) -> None:
    """Refuse a plan whose folder the reader would refuse.

    Raises:
        ConfigError: If there is a problem; the message has every problem, one a line.
    """
    problems = []
    folders = sorted({*plan.names, *(picture.folder for picture in plan.pictures)})
    if len(folders) < 2:
        problems.append(f"the images have {len(folders)} classes ({few(folders)}); give archives with at least 2")
    for split in SPLITS:
        there = {picture.folder for picture in plan.pictures if picture.split == split}
        if lacking := [folder for folder in folders if folder not in there]:
            problems.append(
                f"{split} has no image of {len(lacking)} of {len(folders)} classes: {few(lacking)}; every split needs "
                "an image of every class: give the complete archives"
            )
        if plan.domains and (
            lacking := sorted({*plan.domains} - {p.domain for p in plan.pictures if p.split == split})
        ):
            problems.append(f"{split} has no image of the domains {few(lacking)}; give the complete archives")
    used = Counter(picture.member.path for picture in plan.pictures)
    if twice := [path for path, count in used.items() if count > 1]:
        problems.append(
            f"{len(twice)} images are in a split twice or in two splits: {few(twice)}; a split names each image once"
        )
    if wrong := [picture.member.path for picture in plan.pictures if not is_image(picture.member.name)]:
        problems.append(f"{len(wrong)} files of the split do not have an image's ending: {few(wrong)}; remove them")
    same = Counter(plan.names.values())
    if shared := sorted(folder for folder, name in plan.names.items() if same[name] > 1 or not name.strip()):
        problems.append(f"class folders share a name or have an empty one: {few(shared)}; give each its own name")
    if problems:
        raise ConfigError("\n".join(problems))


@contextlib.contextmanager
def made_at_once(out: Path) -> Iterator[Path]:
    """Yield a temporary folder; at the end, what `write` put there becomes ``out`` by one rename.

    Args:
        out: The final folder, which may not exist. The folder above it is made if it is missing.

    Raises:
        ConfigError: If ``out`` exists.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(f"--out {out} exists; give the name of a folder that does not exist, or remove this one")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        yield Path(scratch)
        (Path(scratch) / _MADE).rename(out)


def write(plan: Plan, provenance: Mapping[str, Any], scratch: Path) -> None:
    """Write the images, `CLASSES` and `PROVENANCE` into the temporary folder of `made_at_once`."""
    made = scratch / _MADE
    made.mkdir()
    folders: set[str] = set()
    names = _file_names(plan.pictures)
    for picture in sorted(plan.pictures, key=lambda picture: picture.member.place):
        if picture.place not in folders:
            folders.add(picture.place)
            (made / picture.place).mkdir(parents=True)
        (made / picture.place / names[picture.member.path]).write_bytes(picture.member.read())
    classes = {"template": plan.template, "class-names": dict(sorted(plan.names.items()))}
    for name, content in ((CLASSES, classes), (PROVENANCE, provenance)):
        (made / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _file_names(pictures: list[Picture]) -> dict[str, str]:
    """Return the name of each written file by the path of its source.

    If two names in a folder are equal, all names of this folder get a number in front.
    """
    together: dict[str, list[Member]] = {}
    for picture in pictures:
        together.setdefault(picture.place, []).append(picture.member)
    names: dict[str, str] = {}
    for members in together.values():
        members.sort(key=lambda member: member.path)
        # Two names that differ in their case only are one file on some systems.
        unique = len({member.name.casefold() for member in members}) == len(members)
        for number, member in enumerate(members):
            names[member.path] = member.name if unique else f"{number:06}_{member.name}"
    return names
