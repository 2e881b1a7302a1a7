"""Protocol of every frozen vision-language model."""

import functools
from collections.abc import Sequence
from typing import Literal, Protocol

import PIL.Image
from torch import Size, Tensor, device

from fl_dualpriv.models.pruning.in_tower import PatchReading
from fl_dualpriv.models.pruning.tokens import TokenPruner
from fl_dualpriv.models.text.rows import TokenRows
from fl_dualpriv.models.text.text_stack import TextStack

Precision = Literal["fp32", "bf16"]
HUGGING_FACE = "hf:"


class ImageEncoder(Protocol):
    """The frozen image side of a model, reduced to what the data code needs.

    Attributes:
        name: Configured name of the model.
        embed_dim: Width of an image's feature vector.
        device: Device that holds the model.
        visual_prompts: True if the image tower reads trainable prompts. Features must not be cached then.
        mirrors: True if flipping the last dimension of a preprocessed image mirrors the image.
    """

    name: str
    embed_dim: int
    device: device
    visual_prompts: bool
    mirrors: bool

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        """Apply the model's inference transform; the result is float32 (3, height, width).

        A model that reads patches of images of any shape may have another form, the same for all images.
        """
        ...

    def image_features(self, images: Tensor) -> Tensor:
        """Compute features of preprocessed images: (n, 3, height, width) → float32 (n, embed_dim). n may be 0.

        Guarantee:
            Per image: no value of one image enters another's features. A NaN image makes only its own row NaN. The size
            of the batch can change a feature by float rounding, because it changes the order of summation.
        """
        ...

    @property
    def feature_key(self) -> str:
        """Key that changes whenever `image_features` of a file may change."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights in bytes, including a text tower's copies in other layouts and precisions."""
        ...


class Backbone(ImageEncoder, Protocol):
    """A frozen image tower and text tower with a joint feature space.

    The model is in evaluation mode, and no parameter has a gradient. Image features have unit norm. If there is a
    pruner, it prunes their visual tokens.

    Attributes:
        ctx_dim: Width of a token embedding.
        context_length: Length of the longest text, in tokens.
        logit_scale: Factor on the cosine similarity (the exponential of the model's parameter). SigLIP also has a bias
            of the logits. It is the same for every class and cancels in a softmax.
        pruner: Visual token pruner, or None.
        rows: Layout of a token row: the special tokens around the words of a text.
        fills_rows: True if rows must have ``context_length`` tokens, because the tower reads tokens after the end of
            text.
        text_stack: The text tower's weights if classes can share a prompt's prefix, else None.
        plain_reason: Reason why ``text_stack`` is None; empty otherwise.
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
        """Tokenize texts into whole rows, int64 (n, context_length), on the CPU."""
        ...

    def words(self, text: str, *, behind: bool = False) -> list[int]:
        """Return only the token ids of a text's words, without special tokens and without a limit on their number.

        Args:
            text: The words.
            behind: True if they stand behind other words, which some tokenizers mark.

        Raises:
            ConfigError: If the text cannot be written in the model's tokens.
        """
        ...

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Look up token embeddings without positions: ids (..., token) → (..., token, ctx_dim)."""
        ...

    def encode_embeddings(self, embeddings: Tensor, end: Tensor) -> Tensor:
        """Compute text features of token embeddings, always in float32; differentiable in the embeddings.

        For the embeddings of whole rows the result equals the model's own text features. Unless the tower fills rows,
        this also holds for rows that are cut anywhere after their end of text, because no earlier token sees the part
        that is cut off.

        Args:
            embeddings: (n, token, ctx_dim) without positions; ``token`` is ``context_length`` if the tower fills rows.
            end: Index of each row's end of text, (n,). Towers that read another token ignore it.

        Returns:
            (n, embed_dim), not normalised.

        Raises:
            ValueError: If the rows have a length that the tower cannot read.
        """
        ...

    @property
    def n_patches(self) -> int:
        """Number of patches of an image.

        Raises:
            ConfigError: If the model pools its tokens, so that no patch has a separate feature.
        """
        ...

    def patch_features(self, images: Tensor, reading: PatchReading) -> Tensor:
        """Compute unit-norm features of the patches of preprocessed images, float32 (n, n_patches, embed_dim).

        The pruner is not applied. The guarantee is that of `image_features`.

        Args:
            images: Preprocessed images, (n, 3, height, width).
            reading: ``token``: after the last block, the patch is read in the way in which the model reads CLS.
                ``isolated``: CLS is read after a last block in which that patch is the only one left.

        Raises:
            ConfigError: If `n_patches` raises it.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of a SHA-256 over names, types, shapes and bytes of the weights."""
        ...


@functools.lru_cache(maxsize=4)
def input_shape(backbone: ImageEncoder) -> Size:
    """Return the shape of a preprocessed image, (3, height, width), found with a blank image that holds no data."""
    return backbone.preprocess(PIL.Image.new("RGB", (48, 40))).shape
