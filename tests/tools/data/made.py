"""Tiny archives in the shapes that the owners distribute, and the content of a folder that a script made from them."""

import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
from PIL import Image
from scipy.io import savemat

Files = dict[str, bytes]
"""Content by path."""


class Made(NamedTuple):
    """What became of one image of the archives."""

    split: str
    domain: str
    folder: str
    file: str


def picture(number: int, format: str = "JPEG") -> bytes:
    """An image file that differs from that of every other number."""
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (number % 256, number // 256, 7)).save(buffer, format)
    return buffer.getvalue() + b"%d" % number  # decoders stop before it


def pictures(paths: list[str], first: int = 0) -> Files:
    return {path: picture(number, _format(path)) for number, path in enumerate(paths, first)}


def _format(path: str) -> str:
    return "PNG" if path.endswith(".png") else "JPEG"


def tar_gz(path: Path, files: Mapping[str, bytes], mode: Any = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def zipped(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def unpacked(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def mat(path: Path, **lists: list[int]) -> Path:
    savemat(path, dict(lists))
    return path


def jsoned(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def python2_pickle(document: object) -> bytes:
    """A pickle as Python 2 writes it: every text is a string of bytes, and NumPy has the names of its first version."""
    buffer = io.BytesIO()
    _Python2Pickler(buffer, protocol=2).dump(document)
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


_InPython: Any = pickle._Pickler  # type: ignore[attr-defined]


class _Python2Pickler(_InPython):
    dispatch: ClassVar[dict[type, Any]] = dict(_InPython.dispatch)

    def _text(self, text: str | bytes) -> None:
        content = text.encode() if isinstance(text, str) else text
        short = len(content) < 256
        self.write((b"U" + bytes([len(content)]) if short else b"T" + struct.pack("<i", len(content))) + content)
        self.memoize(text)

    dispatch[bytes] = dispatch[str] = _text


def made(out: Path, files: Mapping[str, bytes]) -> dict[str, Made]:
    """What a script made of each image of the archives; every written image must be one of them, byte by byte."""
    source_of = {content: path for path, content in files.items()}
    assert len(source_of) == len(files)
    found: dict[str, Made] = {}
    for file in sorted(file for split in ("train", "val", "test") for file in (out / split).rglob("*.*")):
        if file.is_file():
            split, *domain, folder, name = file.relative_to(out).parts
            source = source_of[file.read_bytes()]
            assert source not in found, "an image was written twice"
            found[source] = Made(split, "/".join(domain), folder, name)
    return found


def tree(out: Path) -> Files:
    return {file.relative_to(out).as_posix(): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}


def provenance(out: Path) -> dict[str, Any]:
    return json.loads((out / "provenance.json").read_text(encoding="utf-8"))


def arguments(out: Path, archives: list[Path], *others: object) -> list[str]:
    return [*(f"--archive={path}" for path in archives), f"--out={out}", *map(str, others)]


def refusal(main: Callable[[list[str]], None], args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a script that stops with status 2 and leaves nothing behind."""
    out = Path(next(arg for arg in args if arg.startswith("--out=")).removeprefix("--out="))
    before = sorted(out.parent.iterdir())
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    assert sorted(out.parent.iterdir()) == before
    message = capsys.readouterr().err
    assert message.strip()
    return message
