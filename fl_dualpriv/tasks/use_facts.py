"""How a prompt is used outside its run: the typed facts, without torch."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["context", "head", "linear-probe", "prototypes", "soft-prompt", "lora"]


@dataclass(frozen=True, kw_only=True)
class BackboneFacts:
    """Which frozen model a prompt is for.

    Attributes:
        name: As configured; of a folder its last part alone, for where it lies is nobody's business.
        pretrained: open_clip's tag; of a file its name alone.
        is_local: The weights lay in a folder or file: whoever uses the prompt says where theirs lie.
        precision: Of the matrix products.
        fingerprint: Of the weights, see `Backbone.fingerprint`.
        image_side: Of weights, image tower, preparation of images and pruner, see `ImageEncoder.feature_key`.
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
    """How a prompt is used.

    Attributes:
        kind: ``context``: words of the text, before each class name (the class token stands at the end); ``head``:
            low-rank factors over the zero-shot features; ``linear-probe``: weights and a bias for each class;
            ``prototypes``: a direction for each class; ``soft-prompt``: before a question; ``lora``: factors beside a
            language model's layers.
        classes: Names, in the order of the classifier; empty for questions.
        template: With one ``{}`` for the class name; of questions the words of the un-tuned model.
        max_tokens: Of a question and its answer; 0 for images.
        backbone: The frozen model.
        pruner: Of visual tokens, or None.
    """

    kind: Kind
    classes: tuple[str, ...]
    template: str
    max_tokens: int
    backbone: BackboneFacts
    pruner: PrunerFacts | None

    @property
    def asks_questions(self) -> bool:
        """Whether it answers questions about images, and does not name classes."""
        return self.kind in ("soft-prompt", "lora")
