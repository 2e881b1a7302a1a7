"""Say what the cells of a sweep need and this machine does not have, before anything is loaded or downloaded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fl_dualpriv.config.ranges import ConfigValue
from fl_dualpriv.data.formats.hub_names import HUB
from fl_dualpriv.sweep.cells import Cell

_FOLDERS = ("local-dir:", "hf:")
_DOWNLOADED = "the weights are not in the cache; the first cell downloads them"


@dataclass(frozen=True)
class Missing:
    """A folder, file or set of weights that some cell needs and that is not here.

    Attributes:
        text: One line about it.
        is_downloaded: True if the first cell downloads it where there is a network.
    """

    text: str
    is_downloaded: bool = False


def missing_things(cells: Sequence[Cell]) -> list[Missing]:
    """Return what the cells need and this machine does not have, each once."""
    found: dict[Missing, None] = {}
    for cell in cells:
        found |= dict.fromkeys([*_data(cell.settings), *_weights(cell.settings)])
    return list(found)


MADE = "made-data.json"
"""File in a folder of data that a script made; a table of such data says so."""


def uses_made_data(cells: Sequence[Cell]) -> bool:
    """Return True if the data of a cell were made by a script."""
    return any((Path(str(cell.settings.get("data.path", ""))) / MADE).is_file() for cell in cells)


def _data(settings: Mapping[str, ConfigValue]) -> Iterator[Missing]:
    path = str(settings.get("data.path", ""))
    if path.startswith(HUB):
        name = path.removeprefix(HUB)
        if name.startswith("/") and not Path(name).exists():
            yield Missing(f"data.path = {path!r}: no such folder")
    elif path and not Path(path).exists():
        yield Missing(f"data.path = {path!r}: no such folder or file")
    classes = str(settings.get("data.classes", ""))
    if classes and not Path(classes).exists():
        yield Missing(f"data.classes = {classes!r}: no such file")


def _weights(settings: Mapping[str, ConfigValue]) -> Iterator[Missing]:
    name, pretrained = str(settings["backbone.name"]), str(settings.get("backbone.pretrained", ""))
    kind = next((kind for kind in _FOLDERS if name.startswith(kind)), "")
    place = name.removeprefix(kind)
    if kind and (place.startswith("/") or kind == "local-dir:"):
        if not Path(place).is_dir():
            yield Missing(f"backbone.name = {name!r}: no such folder")
    elif kind or name.startswith("hf-hub:"):
        repository = place.removeprefix("hf-hub:")
        if not _is_cached(repository, "config.json") and not _is_cached(repository, "open_clip_config.json"):
            yield Missing(f"backbone.name = {name!r}: {_DOWNLOADED}", is_downloaded=True)
    elif pretrained.endswith((".safetensors", ".pt", ".pth", ".bin")):
        if not Path(pretrained).is_file():
            yield Missing(f"backbone.pretrained = {pretrained!r}: no such file")
    elif pretrained and not _tag_is_cached(name, pretrained):
        yield Missing(f"backbone.name = {name!r}, pretrained {pretrained!r}: {_DOWNLOADED}", is_downloaded=True)


def _is_cached(repository: str, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, file), str)


def _tag_is_cached(name: str, tag: str) -> bool:
    from fl_dualpriv.models.open_clip import weights_are_here  # late: it imports open_clip

    return weights_are_here(name, tag)
