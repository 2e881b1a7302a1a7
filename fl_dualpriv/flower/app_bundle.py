"""Bundles of Flower apps (FAB): compute the digest, read the description, and build a bundle.

The digest is the SHA-256 of the bundle's bytes. Flower uses the same number as a run's ``fab-hash``. It puts the first
eight digits into the names of files and folders.
"""

import hashlib
import io
import os
import shutil
import tempfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fl_dualpriv.config.plugins import bundled_patterns
from fl_dualpriv.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AppBundle:
    """Description of a bundle.

    Attributes:
        digest: SHA-256 of the bundle's bytes, 64 lower-case hex digits.
        app_id: ``publisher/name``, as the bundle states it.
        version: Version of the app, as the bundle states it.
        files: Names of all files in the bundle.
    """

    digest: str
    app_id: str
    version: str
    files: tuple[str, ...]


def digest_of(content: bytes) -> str:
    """Return the SHA-256 of a bundle's bytes, without a look at the content."""
    return hashlib.sha256(content).hexdigest()


def read_bundle(content: bytes) -> AppBundle:
    """Return digest and description of a bundle. None of the bundle's code runs.

    Raises:
        ConfigError: If the bytes are not a bundle of a Flower app.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = tuple(archive.namelist())
            project = tomllib.loads(archive.read("pyproject.toml").decode("utf-8"))
        publisher, name = project["tool"]["flwr"]["app"]["publisher"], project["project"]["name"]
        version = project["project"]["version"]
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"not the bundle of a Flower app ({type(error).__name__}: {error}); expected what `flwr build` writes"
        ) from error
    return AppBundle(digest=digest_of(content), app_id=f"{publisher}/{name}", version=str(version), files=files)


def travelling_copy(app_dir: Path, folder: Path) -> Path:
    """Copy the files of an app that may travel in its bundle, and return the folder from which Flower shall build it.

    Flower walks through an app's whole folder, which takes many seconds where a virtual environment lies in it. The
    bundle of the copy has the same bytes, because Flower builds it from the same files under the same names.

    Args:
        app_dir: Folder of the app.
        folder: Empty folder for the copy.

    Returns:
        ``folder``; or ``app_dir`` if the app does not list what travels, by patterns that begin with a plain folder or
        file name.
    """
    try:
        places = {_first_name(pattern) for pattern in bundled_patterns(app_dir) or [""]}
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return app_dir
    root = app_dir.resolve()
    for place in (app_dir / name for name in sorted(places | {"pyproject.toml", ".gitignore"})):
        if place.is_symlink():
            continue  # Flower follows no link, to a folder or to a file
        below = [Path(parent, file) for parent, _, files in os.walk(place) for file in files]
        for file in [place] if place.is_file() else below:
            if not file.is_symlink() and file.resolve().is_relative_to(root):
                copy = folder / file.relative_to(app_dir)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
    return folder


def _first_name(pattern: str) -> str:
    name = pattern.removeprefix("/").partition("/")[0]
    if not pattern.startswith("/") or not name or set(name) & set("*?[!"):
        raise ValueError(f"{pattern!r} may match anywhere in the folder")
    return name


def build_bundle(app_dir: Path) -> bytes:
    """Build the bundle of an app's folder as ``flwr run`` does.

    The function builds twice and compares, because the digest must not depend on the time of the build.

    Raises:
        ConfigError: If the folder holds no app, Flower does not accept the app, or the two builds differ.
    """
    from flwr.cli.build import build_fab_from_disk

    if not (app_dir / "pyproject.toml").is_file():
        raise ConfigError(f"{app_dir} is not the folder of a Flower app: it has no pyproject.toml")
    try:
        with tempfile.TemporaryDirectory(prefix="fdp-app-") as one, tempfile.TemporaryDirectory() as other:
            first, second = (build_fab_from_disk(travelling_copy(app_dir, Path(empty))) for empty in (one, other))
    except Exception as error:  # Flower's own errors have no common base
        raise ConfigError(f"{app_dir} cannot be bundled: {error}") from error
    if first != second:
        raise ConfigError(f"two builds of {app_dir} differ: does something write into it? Build it where nothing does")
    return first


def load_bundle(path: Path) -> bytes:
    """Return the bytes of a ``.fab`` file, or of the bundle that is built from an app's folder.

    Raises:
        ConfigError: If the path is neither a readable file nor the folder of an app that can be bundled.
    """
    if path.is_dir():
        return build_bundle(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give an app's folder or a .fab file") from error
