"""Count the records that can be used, and say why the others cannot: for their owner, never for a server. No torch.

Under differential privacy a record that cannot be used stays a record and contributes zero. Its owner may see the
reason. No value that leaves the node may depend on it.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fl_dualpriv.data.folder import FolderSplit, class_folders, given_splits
from fl_dualpriv.data.formats.pixels import (
    EXTENSIONS,
    BadImageError,
    MissingPackageError,
    SizeError,
    file_fault,
    size_fault,
)
from fl_dualpriv.data.images import ImageDataset
from fl_dualpriv.data.questions import QuestionSet

SECONDS = 20.0
"""Duration after which `look` stops, as soon as it has found a record that can be used."""
_NAMED = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Usable:
    """Result of `look`.

    Attributes:
        what: Plural noun for the records in messages, such as ``images``.
        looked: Indices of the records that were opened, (looked,) int64.
        usable: True for each opened record that can be used, bool (looked,).
        total: Number of all records.
        kinds: Number of opened records that cannot be used, by kind of fault.
        named: Faults of the first records that cannot be used, with names.
    """

    what: str
    looked: np.ndarray
    usable: np.ndarray
    total: int
    kinds: Counter[str]
    named: tuple[str, ...]

    @property
    def count(self) -> int:
        """Number of opened records that can be used."""
        return int(self.usable.sum())

    @property
    def are_all(self) -> bool:
        """True if every opened record can be used."""
        return not self.kinds

    def says(self) -> str:
        """Return the counts by kind in one line, without names."""
        if len(self.looked) < self.total:
            of = f"{self.count} usable of {len(self.looked)} that were looked at"
        else:
            of = f"{self.count} usable of {self.total}"
        kinds = [f"{count} {kind}" for kind, count in self.kinds.most_common()]
        return ", ".join([of, *kinds])

    def refusal(self) -> list[str]:
        """Return problem lines if no record can be used, else an empty list."""
        if self.count or not self.total:
            return []
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common())
        return [f"none of the {self.total} {self.what} can be used: {kinds}", *self.lines()]

    def lines(self) -> list[str]:
        """Name the first records that cannot be used, one a line."""
        more = sum(self.kinds.values()) - len(self.named)
        return [*self.named, *([f"... and {more} more"] if more > 0 else [])]


def look(records: ImageDataset | QuestionSet, what: str, seconds: float = SECONDS) -> Usable:
    """Open each record as a run would. The order is random, so that a partial result is a fair sample.

    Args:
        records: Images, or questions about images.
        what: Plural noun for the records in messages.
        seconds: Duration after which the function stops if it has found a record that can be used. If it has found
            none, it opens all records.
    """
    images: dict[int, tuple[str, str]] = {}
    kinds: Counter[str] = Counter()
    faults: list[tuple[int, str]] = []
    looked: list[int] = []
    deadline, any_usable = time.monotonic() + seconds, False
    for index in np.random.default_rng(0).permutation(len(records)).tolist():
        if any_usable and time.monotonic() > deadline:
            break
        kind, words = _record_fault(records, index, images)
        looked.append(index)
        if kind:
            kinds[kind] += 1
            faults.append((index, words))
        any_usable = any_usable or not kind
    order = np.argsort(np.array(looked, dtype=np.int64), kind="stable")
    bad = {index for index, _ in faults}
    return Usable(
        what=what,
        looked=np.array(looked, dtype=np.int64)[order],
        usable=np.array([index not in bad for index in looked], dtype=bool)[order],
        total=len(records),
        kinds=kinds,
        named=tuple(words for _, words in sorted(faults)[:_NAMED]),
    )


def _record_fault(
    records: ImageDataset | QuestionSet, index: int, images: dict[int, tuple[str, str]]
) -> tuple[str, str]:
    """Return kind and description of a record's fault; ``images`` caches faults of images with several questions."""
    if not isinstance(records, QuestionSet):
        return image_fault(records, index)
    if not records.questions[index]:
        words = records.faults[index] if records.faults else ""
        return "without usable words", words or f"record {index} has no usable words"
    image = int(records.image_of[index])
    if image not in images:
        kind, words = image_fault(records.images, image)
        backslash = isinstance(records.images, FolderSplit) and "\\" in str(records.images.paths[image])
        hint = "; write its path with / in place of \\" if kind and backslash else ""
        images[image] = (f"whose image {_VERBS.get(kind, f'is {kind}')}", words + hint) if kind else ("", "")
    return images[image]


_VERBS = {"cannot be read": "cannot be read", "missing": "is missing"}


def image_fault(images: ImageDataset, index: int) -> tuple[str, str]:
    """Say why an image cannot be used: kind and description, both empty if it can be used."""
    if isinstance(images, FolderSplit):
        return file_fault(images.paths[index])
    try:
        width, height = images.image(index).size
    except SizeError as error:
        return error.kind, str(error)
    except MissingPackageError as error:
        return "of a format that needs a package", str(error)
    except Exception as error:  # decoders raise many kinds
        return "cannot be read", str(error) if isinstance(error, BadImageError) else f"{images.name(index)}: {error}"
    kind = size_fault(width, height)
    return kind, f"image {images.name(index)} has {width} x {height} pixels: it is {kind}" if kind else ""


def without_usable(partitions: Sequence[np.ndarray], inspection: Usable) -> int | None:
    """Count the clients without a single usable record; None if not every record was opened."""
    if len(inspection.looked) < inspection.total:
        return None
    return sum(not inspection.usable[part].any() for part in partitions)


def skipped_files(path: Path, *, by_domain: bool = False) -> Counter[str]:
    """Count the files in a directory of images that no run reads.

    The counts are by file extension. ``outside`` counts images that are in no class folder. With ``by_domain`` the
    class folders lie in one folder per domain.
    """
    counts: Counter[str] = Counter()
    tops = class_folders(path) if given_splits(path) else [path]
    if by_domain:
        counts["outside"] += sum(file.suffix.lower() in EXTENSIONS for top in tops for file in _files(top))
        tops = [domain for top in tops for domain in class_folders(top)]
    for top in tops:
        counts["outside"] += sum(file.suffix.lower() in EXTENSIONS for file in _files(top))
        for folder in class_folders(top):
            counts.update(file.suffix.lower() for file in _files(folder) if file.suffix.lower() not in EXTENSIONS)
    return +counts


def _files(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".") and not entry.is_dir()]
