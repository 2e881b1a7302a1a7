"""The bundle in which a Flower app travels (FAB): its digest, what it says of itself, and how to build it.

The digest is SHA-256 of the bundle's bytes. Flower uses the same number as a run's ``fab-hash``, and its first eight
digits in the names of files and folders.
"""

import hashlib
import io
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fl_dualpriv.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AppBundle:
    """What a bundle is.

    Attributes:
        digest: SHA-256 of its bytes, 64 lower-case hex digits.
        app_id: ``publisher/name``, in its own words.
        version: In its own words.
        files: Names of all files in it.
    """

    digest: str
    app_id: str
    version: str
    files: tuple[str, ...]


def digest_of(content: bytes) -> str:
    """SHA-256 of a bundle's bytes; nothing in it is looked at."""
    return hashlib.sha256(content).hexdigest()


def read_bundle(content: bytes) -> AppBundle:
    """Digest and description of a bundle; runs none of its code.

    Raises:
        ConfigError: If it is not a bundle of a Flower app.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = tuple(archive.namelist())
            project = tomllib.loads(archive.read("pyproject.toml").decode("utf-8"))
        publisher, name = project["tool"]["flwr"]["app"]["publisher"], project["project"]["name"]
        version = project["project"]["version"]
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"no bundle of a Flower app ({type(error).__name__}: {error}); expected what `flwr build` writes"
        ) from error
    return AppBundle(digest=digest_of(content), app_id=f"{publisher}/{name}", version=str(version), files=files)


def build_bundle(app_dir: Path) -> bytes:
    """Build the bundle of an app's folder as ``flwr run`` does; twice, for its digest must not depend on when.

    Raises:
        ConfigError: If there is no app, Flower does not accept it, or two builds differ.
    """
    from flwr.cli.build import build_fab_from_disk

    if not (app_dir / "pyproject.toml").is_file():
        raise ConfigError(f"{app_dir} is not the folder of a Flower app: it has no pyproject.toml")
    try:
        first, second = build_fab_from_disk(app_dir), build_fab_from_disk(app_dir)
    except Exception as error:  # Flower's own errors have no common base
        raise ConfigError(f"{app_dir} cannot be bundled: {error}") from error
    if first != second:
        raise ConfigError(f"two builds of {app_dir} differ: does something write into it? Build it where nothing does")
    return first


def load_bundle(path: Path) -> bytes:
    """The bytes of a ``.fab`` file, or of the bundle built of an app's folder.

    Raises:
        ConfigError: If there is neither.
    """
    if path.is_dir():
        return build_bundle(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give an app's folder or a .fab file") from error
