"""Files in zip and tar archives, in unpacked folders and by themselves, read by their paths.

No file is unpacked to the path that an archive gives. Archives are refused if a member has an absolute path or a path
with "..", or is a link or a device.
"""

import contextlib
import functools
import lzma
import re
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fl_dualpriv.data.formats.pixels import EXTENSIONS
from fl_dualpriv.errors import ConfigError

# Damaged archives raise many kinds of error. RuntimeError is that of a zip file with a password.
DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,
    OSError,
    ValueError,
)
_ENDINGS = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz")
_FEW = 5


@dataclass(frozen=True)
class Member:
    """One file of an archive.

    Attributes:
        path: Path in the archive, with "/" between its parts.
        archive: Name of the archive in messages.
        place: Number of the archive, and place in it. In the order of the places a compressed archive is read once.
        content: Function that returns the bytes of the file.
    """

    path: str
    archive: str
    place: tuple[int, int]
    content: Callable[[], bytes]

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.path.rpartition("/")[2]

    def read(self) -> bytes:
        """Return the bytes of the file.

        Raises:
            ConfigError: If the archive is damaged.
        """
        try:
            return self.content()
        except DAMAGED as error:
            raise ConfigError(
                f"{self.archive}: {self.path} cannot be read ({error}); download the archive again"
            ) from error


class _Listed(NamedTuple):
    """A file as its archive lists it; ``fault`` says why it is refused, and is empty if it is not."""

    name: str
    place: int
    content: Callable[[], bytes]
    fault: str


def few(items: Collection[str]) -> str:
    """Return the first five items and the number of the others, for a message.

    Example:
        >>> few(["a", "b", "c", "d", "e", "f", "g"])
        'a, b, c, d, e and 2 more'
    """
    more = len(items) - _FEW
    return ", ".join(list(items)[:_FEW]) + (f" and {more} more" if more > 0 else "")


def is_image(name: str) -> bool:
    """True if the reader of image folders takes a file of this name."""
    return Path(name).suffix.lower() in EXTENSIONS and not name.startswith(".")


class Archives:
    """All files of the given archives by their paths. Use it in a ``with`` statement.

    The path of a file in an unpacked folder begins with the name of that folder. Hidden files, such as those that macOS
    adds, have no part in `members`; `left_out` counts them.

    Attributes:
        members: Files by path.
    """

    def __init__(self, given: Sequence[Path], scratch: Path, page: str, nested: Collection[str] = ()) -> None:
        """Open the archives and list their files.

        Args:
            given: Archives, unpacked folders and single files.
            scratch: Folder for copies of nested archives.
            page: Web page from which the archives can be downloaded, for messages.
            nested: Names of the archives inside an archive that are opened too. Such an archive is not opened if it
                lies beside a folder with its files.

        Raises:
            ConfigError: If an archive is missing or damaged, if a member is refused, or if two files have one path.
        """
        missing = [str(path) for path in given if not path.exists()]
        if missing:
            raise ConfigError(
                f"--archive names {len(missing)} of {len(given)} that do not exist: {few(missing)}; give the files "
                f"that you downloaded from {page}, or their unpacked folders"
            )
        self.members: dict[str, Member] = {}
        self._page = page
        self._given = [path.name or str(path) for path in given]
        self._hidden: list[str] = []
        self._read: set[str] = set()
        self._stack = contextlib.ExitStack()
        self._opened = 0
        self._refused: list[str] = []
        self._twice: list[str] = []
        damaged = []
        try:
            for path in given:
                try:
                    self._add(path, path.name, "", scratch, nested)
                except DAMAGED as error:
                    damaged.append(f"{path} ({error})")
            self._check(damaged)
        except BaseException:
            self._stack.close()
            raise
        self._places = {*self.members, *(folder for path in self.members for folder in _folders_above(path))}

    def __enter__(self) -> "Archives":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def locate(self, wanted: Mapping[str, Sequence[str]]) -> list[str]:
        """Find the folder in which an archive's files and folders lie, for each archive.

        Args:
            wanted: Paths of files and folders that the archive holds beside each other, by the name of the archive.

        Returns:
            For each archive the path of that folder, which is empty or ends in "/".

        Raises:
            ConfigError: If the files of some archives are missing, or lie in several folders.
        """
        found, missing, several = [], [], []
        for archive, paths in wanted.items():
            roots = [{p[: -len(path)] for p in self._places if f"/{p}".endswith(f"/{path}")} for path in paths]
            together = sorted(set.intersection(*roots))
            found += together[:1]
            if not together:
                lacking = [path for path, root in zip(paths, roots, strict=True) if not root] or paths
                missing.append(f"{archive} ({few(lacking)})")
            elif len(together) > 1:
                several.append(f"{archive} ({few([root or './' for root in together])})")
        problems = []
        if missing:
            problems.append(
                f"files of {len(missing)} archives are missing: {', '.join(missing)}. Given are "
                f"{', '.join(self._given)}. Download the others from {self._page} and add --archive FILE for each"
            )
        if several:
            problems.append(
                f"files of {len(several)} archives lie in several folders: {', '.join(several)}. Give each archive once"
            )
        if problems:
            raise ConfigError("\n".join(problems))
        return found

    def classes(self, root: str) -> dict[str, list[Member]]:
        """Return the images that lie directly in the folders of a folder, by the name of their folder."""
        found: dict[str, list[Member]] = {}
        for path in sorted(self.members):
            parts = path[len(root) :].split("/")
            if path.startswith(root) and len(parts) == 2 and is_image(parts[1]):
                found.setdefault(parts[0], []).append(self.members[path])
        return found

    def read(self, path: str) -> bytes:
        """Return the bytes of a file that is not an image.

        Raises:
            ConfigError: If there is no such file, or if the archive is damaged.
        """
        if path not in self.members:
            raise ConfigError(
                f"{path} is in none of {', '.join(self._given)}; download the archives from {self._page} again"
            )
        self._read.add(path)
        return self.members[path].read()

    def text(self, path: str) -> str:
        """Return the text of a file.

        Raises:
            ConfigError: If there is no such file, if it is not UTF-8, or if the archive is damaged.
        """
        try:
            return self.read(path).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not a UTF-8 text ({error}); download the archive again") from error

    def left_out(self, used: Collection[str]) -> dict[str, int]:
        """Count the files that were neither used nor read, by folder and kind of name.

        Args:
            used: Paths of the files that were used.
        """
        rest = [path for path in self.members if path not in used and path not in self._read]
        return dict(sorted(Counter(_kind(path) for path in [*rest, *self._hidden]).items()))

    def _add(self, path: Path, shown: str, prefix: str, scratch: Path, nested: Collection[str]) -> None:
        number = self._opened
        self._opened += 1
        inner = []
        for listed in list(_listing(path, self._stack)):  # all or none of the files of a damaged archive
            if fault := listed.fault or _path_fault(listed.name):
                self._refused.append(f"{shown}: {listed.name!r} {fault}")
                continue
            parts = [part for part in listed.name.split("/") if part not in ("", ".")]
            name = prefix + "/".join(parts)
            if any(part.startswith(".") or part == "__MACOSX" for part in parts):
                self._hidden.append(name)
            elif name in self.members:
                self._twice.append(f"{name} ({self.members[name].archive} and {shown})")
            else:
                self.members[name] = Member(name, shown, (number, listed.place), listed.content)
                inner += [name] if parts[-1] in nested else []
        for name in inner:
            folder = f"{name.removesuffix('.gz').removesuffix('.tar').removesuffix('.zip')}/"
            if not any(other.startswith(folder) for other in self.members):
                member = self.members.pop(name)
                copy = scratch / f"{number}-{member.name}"
                copy.write_bytes(member.content())
                self._add(copy, f"{shown}: {name}", f"{name.rpartition('/')[0]}/".lstrip("/"), scratch, ())

    def _check(self, damaged: list[str]) -> None:
        problems = []
        if damaged:
            problems.append(
                f"{len(damaged)} archives cannot be read: {few(damaged)}; download them from {self._page} again"
            )
        if self._refused:
            problems.append(
                f"{len(self._refused)} members of the archives are refused: {few(self._refused)}; allowed are files "
                f"and folders with paths inside the archive; download the archives from {self._page} again"
            )
        if self._twice:
            problems.append(
                f"{len(self._twice)} files are there twice: {few(self._twice)}; give each archive once, packed or "
                "unpacked"
            )
        if problems:
            raise ConfigError("\n".join(problems))


def _listing(path: Path, stack: contextlib.ExitStack) -> Iterator[_Listed]:
    """List the files of an archive or a folder; any other file is listed by itself."""
    if path.is_dir():
        yield from _in_folder(path)
        return
    if zipfile.is_zipfile(path):
        yield from _in_zip(stack.enter_context(zipfile.ZipFile(path)))
        return
    try:
        tar = stack.enter_context(tarfile.TarFile.open(path, "r:*", errors="replace"))
    except DAMAGED:
        if path.name.lower().endswith(_ENDINGS):
            raise
        yield _Listed(path.name, 0, path.read_bytes, "")
        return
    yield from _in_tar(tar)


def _in_folder(folder: Path) -> Iterator[_Listed]:
    # The folder's own name, because the paths in most archives begin with it. It may not make the files hidden.
    top = folder.resolve().name.lstrip(".")
    for place, path in enumerate(sorted(folder.rglob("*"))):
        name = f"{top}/{path.relative_to(folder).as_posix()}"
        if path.is_symlink():
            yield _Listed(name, place, path.read_bytes, "is a link")
        elif path.is_file():
            yield _Listed(name, place, path.read_bytes, "")
        elif not path.is_dir():
            yield _Listed(name, place, path.read_bytes, "is a device")


def _in_zip(archive: zipfile.ZipFile) -> Iterator[_Listed]:
    for info in archive.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0 if the archive was not made on Unix
        fault = "is a link" if kind == stat.S_IFLNK else "is a device"
        if kind in (0, stat.S_IFREG, stat.S_IFDIR):
            fault = ""
        if not info.is_dir():
            yield _Listed(info.filename, info.header_offset, functools.partial(archive.read, info), fault)


def _in_tar(archive: tarfile.TarFile) -> Iterator[_Listed]:
    for info in archive:
        fault = "" if info.isreg() else "is a link" if info.issym() or info.islnk() else "is a device"
        if not info.isdir():
            yield _Listed(info.name, info.offset_data, functools.partial(_of_tar, archive, info), fault)


def _of_tar(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(info)
    assert file is not None, "only regular files are read"
    with file:
        return file.read()


def _path_fault(name: str) -> str:
    """Say why a member's path is refused; empty if it is not."""
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        return "has an absolute path"
    if ".." in name.split("/"):
        return 'has a path with ".."'
    return "has a path with a backslash or a zero" if "\\" in name or "\0" in name else ""


def _folders_above(path: str) -> Iterator[str]:
    while path := path.rpartition("/")[0]:
        yield path


def _kind(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    if name.startswith("."):
        shown = "._*" if name.startswith("._") else name
    else:
        shown = f"*{suffix}" if (suffix := Path(name).suffix) else name
    return f"{folder}{slash}{shown}"
