"""Protocol of every frozen vision-language model."""

import functools
from collections.abc import Sequence
from typing import Literal, Protocol

import PIL.Image
from torch import Size, Tensor, device

from fl_dualpriv.models.pruning.in_tower import PatchReading
from fl_dualpriv.models.pruning.tokens import TokenPruner
from fl_dualpriv.models.rows import TokenRows
from fl_dualpriv.models.text_stack import TextStack

Precision = Literal["fp32", "bf16"]
HUGGING_FACE = "hf:"


class ImageEncoder(Protocol):
    """The frozen image side of a model, as far as data need it.

    Attributes:
        name: As configured.
        embed_dim: Numbers in the features of an image.
        device: Where the model is.
        visual_prompts: Whether the image tower reads trainable prompts, which rules out cached features.
    """

    name: str
    embed_dim: int
    device: device
    visual_prompts: bool

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        """The model's inference transform: float32 (3, height, width)."""
        ...

    def image_features(self, images: Tensor) -> Tensor:
        """Features of preprocessed images, (n, 3, height, width) → float32 (n, embed_dim); n may be 0.

        Guarantee:
            Per image: no value of one image enters another's features. A NaN image gives a NaN row of its own. The size
            of the batch can change a feature by float rounding, since it changes the order of summation.
        """
        ...

    @property
    def feature_key(self) -> str:
        """Changes whenever `image_features` of a file may change."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights, with a text tower's copies in other layouts and precisions."""
        ...


class Backbone(ImageEncoder, Protocol):
    """A frozen image tower and text tower with a joint feature space; evaluation mode, no parameter has a gradient.

    Image features have unit norm, and pass through the pruner if there is one.

    Attributes:
        ctx_dim: Width of a token embedding.
        context_length: Longest text, in tokens.
        logit_scale: Factor on the cosine similarity (the exponential of the model's parameter). A bias of the logits,
            as SigLIP has one, is the same for every class and cancels in a softmax.
        pruner: Visual token pruner, or None.
        rows: How a row of tokens is built around the words of a text.
        fills_rows: Whether rows must have ``context_length`` tokens, because what stands after the end is seen.
        text_stack: The text tower's weights where a prompt's prefix can be shared, else None.
        plain_reason: Why ``text_stack`` is None; empty otherwise.
    """

    ctx_dim: int
    context_length: int
    logit_scale: float
    pruner: TokenPruner | None
    rows: TokenRows
    fills_rows: bool
    text_stack: TextStack | None
    plain_reason: str

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids of whole rows, int64 (n, context_length), on the CPU."""
        ...

    def words(self, text: str) -> list[int]:
        """Token ids of a text's words alone, of any number.

        Raises:
            ConfigError: If the text cannot be written in the model's tokens.
        """
        ...

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Ids (..., token) → embeddings (..., token, ctx_dim), without positions."""
        ...

    def encode_embeddings(self, embeddings: Tensor, end: Tensor) -> Tensor:
        """Text features of token embeddings, always in float32; differentiable in them.

        Equal to the model's own text features for the embeddings of whole rows. Unless the tower fills rows, also for
        rows cut anywhere after their end of text, since no earlier token sees what is cut off.

        Args:
            embeddings: (n, token, ctx_dim) without positions; ``token`` is ``context_length`` where rows are filled.
            end: Index of each row's end of text, (n,); not used by towers that read another token.

        Returns:
            (n, embed_dim), not normalised.

        Raises:
            ValueError: If the rows have a length that the tower cannot read.
        """
        ...

    @property
    def n_patches(self) -> int:
        """Patches of an image.

        Raises:
            ConfigError: If the model pools its tokens, so that a patch has no feature of its own.
        """
        ...

    def patch_features(self, images: Tensor, reading: PatchReading) -> Tensor:
        """Features of the patches of preprocessed images, float32 (n, n_patches, embed_dim), each of unit norm.

        Pruners do not matter. Guarantee as `image_features`.

        Args:
            images: (n, 3, height, width).
            reading: ``token``: a patch is read at the end as the model reads CLS. ``isolated``: CLS is read after a
                last block in which that patch is the only one left.

        Raises:
            ConfigError: As `n_patches`.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of a SHA-256 over names, types, shapes and bytes of the weights."""
        ...


@functools.lru_cache(maxsize=4)
def input_shape(backbone: ImageEncoder) -> Size:
    """What the model's preparation makes of an image: (3, height, width), from one that is nobody's."""
    return backbone.preprocess(PIL.Image.new("RGB", (48, 40))).shape
