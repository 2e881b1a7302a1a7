"""Images in directories: one folder per class, or ``train/ val/ test/`` with one folder per class in each.

For a division by domain the class folders lie in one folder per domain: ``train/kitchen/cup/1.png``.
"""

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
from PIL import Image

from fl_dualpriv.data.formats.file_hash import NO_STAMP, file_hash, stamp_of
from fl_dualpriv.data.formats.pixels import EXTENSIONS, decode, file_fault
from fl_dualpriv.data.images import ImageDataset
from fl_dualpriv.data.layout import SPLITS, Labels, Layout, class_names, cut_class, difference
from fl_dualpriv.errors import ConfigError

_NAMED_FILES = 5
_OTHER_NAMES = {
    **dict.fromkeys(("training", "trn"), "train"),
    **dict.fromkeys(("validation", "valid", "dev"), "val"),
    **dict.fromkeys(("testing", "tst"), "test"),
}
"""Usual names of splits that are not ours."""

Files = dict[str, list[Path]]  # sorted image files of each class folder, or of each "domain/class"


@dataclass(frozen=True, eq=False)
class FolderSplit:
    """Images of one split; ``labels`` is int64 of shape (images,) and holds indices into ``class_names``.

    ``domains`` likewise holds indices into ``domain_names``, and ``clients`` into ``client_names``; they are None if
    the images were read without them.
    """

    paths: tuple[Path, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    domains: np.ndarray | None = None
    domain_names: tuple[str, ...] = ()
    clients: np.ndarray | None = None
    client_names: tuple[str, ...] = ()

    @classmethod
    def labelled(cls, paths: Iterable[Path], of: Labels) -> Self:
        """Return files with their labels."""
        return cls(tuple(paths), of.labels, of.class_names, of.domains, of.domain_names, of.clients, of.client_names)

    def __len__(self) -> int:
        """Return the number of images, readable or not."""
        return len(self.paths)

    def image(self, index: int) -> Image.Image:
        """Decode one image to 8-bit RGB.

        Raises:
            BadImageError: If the file cannot be decoded or its samples have no 8-bit form.
        """
        return decode(self.paths[index], self.name(index))

    def name(self, index: int) -> str:
        """Return the path of one image, for messages."""
        return str(self.paths[index])

    @property
    def content_hash(self) -> str:
        """Hash of the bytes of all files in order; see `ImageDataset.content_hash`.

        Every file is read once per process. If a file cannot be read for a reason that may be temporary, the hash is
        unique.
        """
        return self._hashed.content

    def unchanged(self, index: int) -> bool:
        """True if the file is still the one that was hashed; see `ImageDataset.unchanged`.

        False for all files if some file could not be hashed for a reason that may be temporary.
        """
        if "_hashed" not in self.__dict__:  # the hash was never computed, so there is nothing to compare with
            return True
        hashed = self._hashed
        if not hashed.known:
            return False
        if hashed.errors[index]:
            return True
        try:
            return tuple(hashed.stamps[index].tolist()) == stamp_of(self.paths[index].stat())
        except OSError:
            return False

    def unreadable(self, index: int) -> int | None:
        """Return the error number if the file could not be hashed, else None; see `ImageDataset.unreadable`."""
        return int(self._hashed.errors[index]) or None if "_hashed" in self.__dict__ else None

    @functools.cached_property
    def _hashed(self) -> "_Hashed":
        digest, known = hashlib.sha256(), True
        stamps = np.zeros((len(self.paths), len(NO_STAMP)), dtype=np.int64)  # a data set may have millions of files
        errors = np.zeros(len(self.paths), dtype=np.int16)
        for index, path in enumerate(self.paths):
            content, stamps[index], error = file_hash(path)
            digest.update(content)
            if error is None:
                known = False
            else:
                errors[index] = error
        return _Hashed(digest.hexdigest(), stamps, errors, known)


@dataclass(frozen=True, eq=False)
class _Hashed:
    """Hash of a split, with the stamp of each file, (files, 4), and its error number, (files,), 0 if it was read.

    ``known`` is False if the content of some file is not known.
    """

    content: str
    stamps: np.ndarray
    errors: np.ndarray
    known: bool


def load_folder(
    path: Path,
    classes: str,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    on_bad_image: Literal["raise", "keep"],
    by_domain: bool = False,
) -> tuple[dict[str, ImageDataset], str]:
    """Read the layout of a directory of images, without keeping any image in memory.

    Args:
        path: Directory with one folder per class, or with ``train/`` and optionally ``val/`` and ``test/``, which have
            one folder per class each. Hidden files and files without an image extension are ignored.
        classes: JSON file ``{"template": "a photo of a {}", "class-names": {"folder": "name"}}``, either key optional.
            If empty, the name of a class is that of its folder, with ``_`` and ``-`` as spaces.
        val_fraction: Share of each class of train/ that becomes the validation set if there is no val/; at least one
            image.
        test_fraction: Share of each class of train/ that becomes the test set if there is no test/; at least one image.
        seed: Seed of that cut, which depends only on the seed and on the names of class and files.
        on_bad_image: ``raise``: decode every image now and report those that fail. ``keep``: decode none.
        by_domain: True if the class folders lie in one folder per domain. A domain may lack classes.

    Returns:
        The splits ``train``, ``val`` and ``test``, with classes in the order of their folder names; and the template.

    Raises:
        ConfigError: If there is a problem; the message has every problem, one a line.
    """
    layout = read_layout(path, classes, val_fraction, test_fraction, seed, by_domain=by_domain)
    problems = [*layout.problems, *(bad_images(layout.splits.values()) if on_bad_image == "raise" else [])]
    if problems:
        raise unusable(str(path), problems)
    return dict(layout.splits), layout.template


def unusable(path: str, problems: list[str]) -> ConfigError:
    """Return the error for images with problems, one problem a line."""
    return ConfigError("\n  ".join([f"the images in {path} cannot be used:", *problems]))


def read_layout(
    path: Path, classes: str, val_fraction: float, test_fraction: float, seed: int, *, by_domain: bool = False
) -> Layout:
    """Read folders, names and template, and cut missing splits out of train. Opens no image. See `load_folder`.

    Raises:
        ConfigError: If ``path`` is not a directory that can be read.
    """
    if not path.exists():
        raise ConfigError(f"data.path = {str(path)!r}: {path.absolute()} does not exist; give an absolute path")
    if not path.is_dir():
        raise ConfigError(f"data.path = {str(path)!r} is not a directory; give the one that holds the class folders")
    problems: list[str] = []
    try:
        splits = _scan(path, problems, by_domain=by_domain)
        names, template = class_names(classes, _classes_in(splits.get("train", {})), problems)
    except OSError as error:
        raise ConfigError(f"data.path = {str(path)!r} cannot be read: {error}; check its permissions") from error
    if "train" in splits:
        splits = _cut_missing(splits, {"val": val_fraction, "test": test_fraction}, seed, problems)
    train = splits.get("train", {})
    made = {name: _split(splits[name], train, names) for name in SPLITS if name in splits}
    return Layout(made, names, template, problems, is_folder=True)


def class_folders(path: Path) -> list[Path]:
    """Return the folders in a directory in the order of their names, without hidden ones."""
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def given_splits(path: Path) -> frozenset[str]:
    """Return the names among train/, val/ and test/ that are splits in ``path``; empty for a folder of classes."""
    # A class may be called "test". Only a folder of folders is a split, and only if there is also a train/.
    splits = frozenset(folder.name for folder in class_folders(path) if folder.name in SPLITS and class_folders(folder))
    return splits if "train" in splits else frozenset()


def _classes_in(files: Files) -> list[str]:
    """Return the class folders in the order of their names; the same folder in several domains is one class."""
    return sorted({key.rpartition("/")[2] for key in files})


def _domains_in(files: Files) -> list[str]:
    """Return the domain folders in the order of their names; empty without domains."""
    return sorted({key.rpartition("/")[0] for key in files} - {""})


def _scan(path: Path, problems: list[str], *, by_domain: bool) -> dict[str, Files]:
    """Find the class folders and images of each split that exists."""
    # A class may be called "train". Only a folder of folders is a split.
    folders = class_folders(path)
    roots = {folder.name: folder for folder in folders if folder.name in SPLITS and class_folders(folder)}
    if roots or not by_domain:  # a domain may have any name
        for folder in folders:
            right = _OTHER_NAMES.get(folder.name.lower())
            if right is not None and right not in roots and class_folders(folder):
                problems.append(f"{folder.name}/ is not a name of a split: rename it to {right}/")
                roots[right] = folder
    others = [folder.name for folder in folders if folder not in roots.values()]
    if roots:
        if others:
            problems.append(
                f"{', '.join(others)}: beside train/, val/ and test/ there may be no other folder, and each of these "
                "must hold class folders"
            )
        if "train" not in roots:
            problems.append(f"train/ is missing beside {', '.join(roots)}; add it")
    else:
        roots = {"train": path}
    splits = {name: _scan_split(root, path, problems, by_domain=by_domain) for name, root in roots.items()}
    if "train" in splits:
        for what, names_in in (("class", _classes_in), ("domain", _domains_in)):
            problems += [
                f"{name}/ and train/ have different {what} folders: {difference(found, given)}"
                for name, files in splits.items()
                if (found := dict.fromkeys(names_in(files))).keys()
                != (given := dict.fromkeys(names_in(splits["train"]))).keys()
            ]
    return splits


def _class_folders_of(root: Path, path: Path, problems: list[str], *, by_domain: bool) -> dict[str, Path]:
    """Return the class folders of a split by their keys in `Files`."""
    if not by_domain:
        return {folder.name: folder for folder in class_folders(root)}
    folders: dict[str, Path] = {}
    domains = class_folders(root)
    for domain in domains:
        inside = class_folders(domain)
        folders |= {f"{domain.name}/{folder.name}": folder for folder in inside}
        if not inside:
            problems.append(
                f'{domain.relative_to(path)}/ is a domain without a class folder; data.partition = "by-domain" needs '
                "one folder per domain, with one folder per class in each: add some or remove the folder"
            )
    return folders


def _scan_split(root: Path, path: Path, problems: list[str], *, by_domain: bool) -> Files:
    files: Files = {}
    for key, folder in _class_folders_of(root, path, problems, by_domain=by_domain).items():
        shown = folder.relative_to(path)
        if class_folders(folder):
            problems.append(f"{shown}/ has sub-folders; put the images of a class directly into its folder")
        # A directory that is named like an image is not an image. A broken link is an image that cannot be read.
        files[key] = sorted(
            file
            for file in folder.iterdir()
            if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".") and not file.is_dir()
        )
        if not files[key]:
            problems.append(f"{shown}/ holds no image; add some ({' '.join(sorted(EXTENSIONS))}) or remove the folder")
    if (count := len(_classes_in(files))) < 2:
        where = path.name if root == path else root.relative_to(path)
        problems.append(f"{where}/ has {count} class folders; put the images into one folder per class, at least 2")
    return files


def _cut_missing(
    splits: dict[str, Files], fractions: Mapping[str, float], seed: int, problems: list[str]
) -> dict[str, Files]:
    """Cut each split that does not exist out of train, class by class."""
    wanted = {name: fraction for name, fraction in fractions.items() if name not in splits}
    if not wanted:
        return splits
    cut: dict[str, Files] = {**splits, "train": {}, **{name: {} for name in wanted}}
    for folder, files in splits["train"].items():
        if not files:  # already reported
            continue
        for name, chosen in cut_class(folder, len(files), wanted, seed).items():
            cut[name][folder] = sorted(files[i] for i in chosen)
        if not cut["train"][folder]:
            problems.append(
                f"class {folder} has {len(files)} images, too few to cut {' and '.join(wanted)} from them and train on "
                f"the rest; add images, lower the fractions or make {' and '.join(f'{name}/' for name in wanted)}"
            )
    return cut


def _split(files: Files, train: Files, names: Mapping[str, str]) -> FolderSplit:
    """Return a split; the ids of its classes and domains are those of train, of which it may lack some pairs."""
    # Splits may differ in their folders, which is a known problem.
    classes = sorted({*_classes_in(files), *_classes_in(train)})
    domains = sorted({*_domains_in(files), *_domains_in(train)})
    keys = sorted(files)
    counts = [len(files[key]) for key in keys]

    def ids(places: list[int]) -> np.ndarray:
        column = np.repeat(np.array(places, dtype=np.int64), counts)
        column.setflags(write=False)  # splits are cached and shared
        return column

    return FolderSplit(
        paths=tuple(file for key in keys for file in files[key]),
        labels=ids([classes.index(key.rpartition("/")[2]) for key in keys]),
        class_names=tuple(names.get(folder, folder) for folder in classes),
        domains=ids([domains.index(key.rpartition("/")[0]) for key in keys]) if domains else None,
        domain_names=tuple(domains),
    )


def bad_images(splits: Iterable[ImageDataset]) -> list[str]:
    """Return problem lines about files that are not usable images; empty if there is none. Reads only files."""
    files = [file for split in splits if isinstance(split, FolderSplit) for file in split.paths]
    bad = [words for _, words in map(file_fault, files) if words]
    if not bad:
        return []
    more = [f"... and {len(bad) - _NAMED_FILES} more"] if len(bad) > _NAMED_FILES else []
    return [f"{len(bad)} of {len(files)} images cannot be used; repair or remove them", *bad[:_NAMED_FILES], *more]
