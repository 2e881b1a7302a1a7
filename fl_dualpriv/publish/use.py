"""A published prompt at work: the frozen model, checked to be the one that it was trained on, and new images.

from fl_dualpriv import load_prompt

prompt = load_prompt("client-3.safetensors")
prompt.predict(["a.png"])[0].label
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fl_dualpriv.data.features import BATCH, encode_images
from fl_dualpriv.data.folder import EXTENSIONS, BadImageError, FolderSplit
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.publish.card import PublishedFacts
from fl_dualpriv.publish.file import read_published
from fl_dualpriv.publish.readers import Reader, check_probe, load_reader


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a prompt says of one image.

    Attributes:
        image: Its file, as given.
        label: The likeliest class, or the answer; empty if the image cannot be used.
        probabilities: Of all classes, the likeliest first; empty for answers.
        error: Why the image cannot be used; empty if it can.
    """

    image: str
    label: str
    probabilities: dict[str, float]
    error: str


class LoadedPrompt:
    """A published prompt with its model.

    Args:
        facts: What is said about it.
        reader: The model with it.
    """

    def __init__(self, facts: PublishedFacts, reader: Reader) -> None:
        self.facts, self._reader = facts, reader

    @property
    def guarantee(self) -> str:
        """What it reveals about the data behind it, a line for each level."""
        return "\n".join(self.facts.lines)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty if it answers questions."""
        return self.facts.use.classes

    def predict(self, images: Sequence[str | Path], question: str | None = None) -> list[Prediction]:
        """What the prompt says of each image; one that cannot be used has an ``error`` and stops no other.

        The result has one entry for each image, in the order of `image_files`.

        Args:
            images: Files, and folders. A folder stands for the images in it and below, see `image_files`.
            question: About every one of them; for prompts that answer questions, and only for those.

        Raises:
            ConfigError: If the question is missing, too much, or cannot be written in the model's tokens.
        """
        return list(self.predictions(images, question))

    def predictions(self, images: Sequence[str | Path], question: str | None = None) -> Iterator[Prediction]:
        """The same one by one."""
        if self.facts.use.asks_questions != (question is not None):
            needs = "answers questions: give one" if question is None else "names classes and answers no question"
            raise ConfigError(f"this prompt {needs}")
        files = image_files(images)
        for start in range(0, len(files), BATCH):
            yield from self._batch(files[start : start + BATCH], question or "")

    def _batch(self, images: Sequence[str | Path], question: str) -> Iterator[Prediction]:
        files = FolderSplit(tuple(map(Path, images)), np.zeros(len(images), dtype=np.int64), self.classes)
        # Batches of one size, as in a run: another size rounds otherwise.
        features, _ = encode_images(self._reader.model, files, np.arange(len(files)), None, pad=True)
        for index, reply in enumerate(self._reader.replies(features, question)):
            label, shares = reply or ("", {})
            error = _why_unusable(files, index) if reply is None else ""
            yield Prediction(image=str(images[index]), label=label, probabilities=shares, error=error)


def image_files(images: Sequence[str | Path]) -> list[str | Path]:
    """The files that are meant: each folder is replaced by the images in it and below, in the order of their paths.

    Hidden files and folders are left out, as in training. A folder without an image stays: it is one that cannot be
    used, and its owner must be told.
    """
    found: list[str | Path] = []
    for image in images:
        inside = _images_below(Path(image)) if Path(image).is_dir() else []
        found += inside or [image]
    return found


def _images_below(folder: Path) -> list[Path]:
    files = [file for file in folder.rglob("*") if file.suffix.lower() in EXTENSIONS and not file.is_dir()]
    return sorted(file for file in files if not any(p.startswith(".") for p in file.relative_to(folder).parts))


def _why_unusable(files: FolderSplit, index: int) -> str:
    if files.paths[index].is_dir():
        return f"a folder without an image ({' '.join(sorted(EXTENSIONS))})"
    try:
        files.image(index)
    except BadImageError as error:
        return str(error.__cause__ or error)
    return "out of proportion, or the model makes numbers of it that are not finite"


def load_prompt(
    path: str | Path, backbone: str | None = None, pretrained: str = "", device: str = "auto"
) -> LoadedPrompt:
    """Read a published prompt and load the model that it is for.

    Args:
        path: The file.
        backbone: Name of the model, as ``backbone.name`` of a run; without it the one that the file names.
        pretrained: Its weights, as ``backbone.pretrained``; only with ``backbone``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ConfigError: If the file is not whole and intact, or the model is not the one that the prompt was trained on.
        PrivacyError: If nothing says what it reveals.
    """
    published = read_published(Path(path))
    use = published.facts.use
    if backbone is None:
        if pretrained:
            raise ConfigError(f"pretrained = {pretrained!r} without a backbone: name the model, too")
        if use.backbone.is_local:
            raise ConfigError(
                f"{path} is for {use.backbone.name!r} {use.backbone.pretrained}, whose weights were a folder or file "
                "of whoever trained it: say where yours are with backbone (--backbone, --pretrained)"
            )
        backbone, pretrained = use.backbone.name, use.backbone.pretrained
    reader = load_reader(use, published.prompt, backbone, pretrained, device)
    check_probe(reader, published.probe, use.backbone.precision)
    return LoadedPrompt(published.facts, reader)
