"""Apply a published prompt to new images, with the frozen model that it was trained on. The model is checked.

Example:
    from fl_dualpriv import load_prompt

    prompt = load_prompt("client-3.safetensors")
    prompt.predict(["a.png"])[0].label
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fl_dualpriv.data.folder import FolderSplit
from fl_dualpriv.data.formats.pixels import EXTENSIONS, BadImageError
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.features.images import BATCH, encode_images
from fl_dualpriv.publish.card import PublishedFacts
from fl_dualpriv.publish.file import read_published
from fl_dualpriv.publish.readers import Reader, check_probe, load_reader


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Prediction for one image.

    Attributes:
        image: File of the image, as given.
        label: The likeliest class, or the answer; empty if the image cannot be used.
        probabilities: Probabilities of all classes, the likeliest first; empty for answers.
        error: Reason why the image cannot be used; empty if it can.
    """

    image: str
    label: str
    probabilities: dict[str, float]
    error: str


class LoadedPrompt:
    """Published prompt with its model.

    Args:
        facts: Facts of the prompt.
        reader: The model with the prompt.
    """

    def __init__(self, facts: PublishedFacts, reader: Reader) -> None:
        self.facts, self._reader = facts, reader

    @property
    def guarantee(self) -> str:
        """Statement of what the prompt reveals about its training data, one line per level."""
        return "\n".join(self.facts.lines)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty if the prompt answers questions."""
        return self.facts.use.classes

    def predict(self, images: Sequence[str | Path], question: str | None = None) -> list[Prediction]:
        """Predict the class of each image, or answer a question about it.

        An image that cannot be used gets an ``error`` and does not stop the others. The result has one entry for each
        image, in the order of `image_files`.

        Args:
            images: Files and folders. A folder stands for the images in it and below, see `image_files`.
            question: Question about every image. Prompts that answer questions need it, and only they accept it.

        Raises:
            ConfigError: If the question is missing, not accepted, or cannot be written in the model's tokens.
        """
        return list(self.predictions(images, question))

    def predictions(self, images: Sequence[str | Path], question: str | None = None) -> Iterator[Prediction]:
        """Yield the predictions of `predict` one by one."""
        if self.facts.use.asks_questions != (question is not None):
            needs = "answers questions: give one" if question is None else "names classes and answers no question"
            raise ConfigError(f"this prompt {needs}")
        files = image_files(images)
        for start in range(0, len(files), BATCH):
            yield from self._batch(files[start : start + BATCH], question or "")

    def _batch(self, images: Sequence[str | Path], question: str) -> Iterator[Prediction]:
        files = FolderSplit(tuple(map(Path, images)), np.zeros(len(images), dtype=np.int64), self.classes)
        # All batches have one size, as in a run, because another size rounds differently.
        features, _ = encode_images(self._reader.model, files, np.arange(len(files)), None, pad=True)
        for index, reply in enumerate(self._reader.replies(features, question)):
            label, shares = reply or ("", {})
            error = _why_unusable(files, index) if reply is None else ""
            yield Prediction(image=str(images[index]), label=label, probabilities=shares, error=error)


def image_files(images: Sequence[str | Path]) -> list[str | Path]:
    """Replace each folder by the images in it and below, in the order of their paths.

    Hidden files and folders are left out, as in training. A folder without an image stays in the list, so that the
    user gets an error for it.
    """
    paths: list[str | Path] = []
    for image in images:
        inside = _images_below(Path(image)) if Path(image).is_dir() else []
        paths += inside or [image]
    return paths


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
    return "out of proportion, or the model's features of the image are not finite"


def load_prompt(
    path: str | Path, backbone: str | None = None, pretrained: str = "", device: str = "auto"
) -> LoadedPrompt:
    """Read a published prompt and load the model that it is for.

    Args:
        path: File of the prompt.
        backbone: Name of the model, as ``backbone.name`` of a run. The default is the name in the file.
        pretrained: Weights of the model, as ``backbone.pretrained``. Allowed only with ``backbone``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ConfigError: If the file is damaged, or the model is not the one that the prompt was trained on.
        PrivacyError: If the file does not say what the prompt reveals.
    """
    published = read_published(Path(path))
    use = published.facts.use
    if backbone is None:
        if pretrained:
            raise ConfigError(f"pretrained = {pretrained!r} without a backbone: give backbone too")
        if use.backbone.is_local:
            raise ConfigError(
                f"{path} is for {use.backbone.name!r} {use.backbone.pretrained}, whose weights were a local folder or "
                "file where it was trained: give your copy with backbone (--backbone, --pretrained)"
            )
        backbone, pretrained = use.backbone.name, use.backbone.pretrained
    reader = load_reader(use, published.prompt, backbone, pretrained, device)
    check_probe(reader, published.probe, use.backbone.precision)
    return LoadedPrompt(published.facts, reader)
