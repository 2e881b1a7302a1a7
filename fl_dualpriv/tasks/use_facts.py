"""Typed facts about the use of a prompt outside its run, without torch."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["context", "head", "linear-probe", "prototypes", "soft-prompt", "lora"]


@dataclass(frozen=True, kw_only=True)
class BackboneFacts:
    """Frozen model that a prompt is for.

    Attributes:
        name: Name as configured. For a folder only the last part of its path, because the path itself is private.
        pretrained: open_clip's tag, or for a file only its name.
        is_local: True if the weights were in a folder or file. A user of the prompt must then give the path of their
            own copy.
        precision: Precision of the matrix products.
        fingerprint: Fingerprint of the weights, see `Backbone.fingerprint`.
        image_side: Key of weights, image tower, image preprocessing and pruner, see `ImageEncoder.feature_key`.
    """

    name: str
    pretrained: str
    is_local: bool
    precision: Literal["fp32", "bf16"]
    fingerprint: str
    image_side: str


@dataclass(frozen=True, kw_only=True)
class PrunerFacts:
    """Fields of `VisualTokenPruner`."""

    layer: int
    keep_ratio: float
    contextual: int
    merge: Literal["average", "sum", "attention"]
    score: Literal["attention", "random"]
    fusion_noise_std: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class UseFacts:
    """Facts about the use of a prompt.

    Attributes:
        kind: Kind of the learned tensor. ``context``: words of the text, before each class name (the class token stands
            at the end); ``head``: low-rank factors over the zero-shot features; ``linear-probe``: weights and a bias
            for each class; ``prototypes``: a direction for each class; ``soft-prompt``: words before a question;
            ``lora``: factors beside a language model's layers.
        classes: Class names, in the order of the classifier; empty for questions.
        template: Template with one ``{}`` for the class name, or for questions the words of the un-tuned model.
        max_tokens: Tokens of a question and its answer; 0 for images.
        backbone: The frozen model.
        pruner: Pruner of visual tokens, or None.
    """

    kind: Kind
    classes: tuple[str, ...]
    template: str
    max_tokens: int
    backbone: BackboneFacts
    pruner: PrunerFacts | None

    @property
    def asks_questions(self) -> bool:
        """True if the prompt answers questions about images instead of naming classes."""
        return self.kind in ("soft-prompt", "lora")
