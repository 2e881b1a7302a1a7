"""LLaVA models of real shapes with random weights, and records of questions with random words."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from fl_dualpriv.learners.answers import AnswerRecords, answer_records
from fl_dualpriv.models.base import Precision
from fl_dualpriv.models.llava import LlavaBackbone
from fl_dualpriv.models.pruning.tokens import TokenPruner
from fl_dualpriv.models.transformers import transformers

_IMAGE_ID, _END_ID, _FIRST_WORD = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class LlavaShape:
    """Sizes of a vision tower (CLIP) and a language model (Llama)."""

    image: int
    patch: int
    vision: tuple[int, int, int]
    """Blocks, width and heads of the vision tower."""
    language: tuple[int, int, int]
    """Blocks, width and heads of the language model."""
    hidden: int
    """Inner width of the language model's feed-forward layers."""
    vocabulary: int

    @property
    def n_patches(self) -> int:
        """Number of visual tokens of an image."""
        return (self.image // self.patch) ** 2


TOY = LlavaShape(image=32, patch=8, vision=(2, 32, 2), language=(2, 32, 2), hidden=64, vocabulary=64)
DEMO = LlavaShape(image=64, patch=8, vision=(4, 128, 4), language=(4, 128, 4), hidden=344, vocabulary=256)
LARGER = LlavaShape(image=64, patch=8, vision=(4, 256, 4), language=(8, 512, 8), hidden=1376, vocabulary=2048)
LLAVA_7B = LlavaShape(
    image=336, patch=14, vision=(24, 1024, 16), language=(32, 4096, 32), hidden=11008, vocabulary=32064
)
"""Shapes: one for self-checks, one of the demo's size, a larger one that a CPU can still train, and LLaVA-1.5-7B."""


def make_parts(shape: LlavaShape, precision: Precision, device: str) -> tuple[Any, Any]:
    """Make a frozen model with seeded random weights, and a processor whose vocabulary is numbered words."""
    blocks, width, heads = shape.vision
    vision = transformers.CLIPVisionConfig(
        image_size=shape.image,
        patch_size=shape.patch,
        num_hidden_layers=blocks,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    blocks, width, heads = shape.language
    language = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        num_hidden_layers=blocks,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=shape.hidden,
        max_position_embeddings=4096,
        eos_token_id=_END_ID,
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=language, image_token_index=_IMAGE_ID)
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(torch.bfloat16 if precision == "bf16" else torch.float32)
        with torch.device(device):
            model = transformers.LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    names = ["<unk>", "<image>", "</s>", *(f"w{i}" for i in range(shape.vocabulary - _FIRST_WORD))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", unk_token="<unk>", additional_special_tokens=["<image>"]
    )
    size = {"height": shape.image, "width": shape.image}
    images = transformers.CLIPImageProcessor(size=size, crop_size=size)
    processor = transformers.LlavaProcessor(image_processor=images, tokenizer=tokenizer, patch_size=shape.patch)
    return model.eval().requires_grad_(False), processor


def make_backbone(
    parts: tuple[Any, Any], pruner: TokenPruner | None, precision: Precision, device: str
) -> LlavaBackbone:
    """Wrap a model and its processor in the library's backbone class."""
    # The meta device, where tensors have no values, does not support autocast.
    plain = mock.patch.object(torch, "autocast", return_value=nullcontext())
    with plain if device == "meta" else nullcontext():
        return LlavaBackbone("random weights", *parts, torch.device(device), pruner, precision)


def make_records(
    backbone: LlavaBackbone, shape: LlavaShape, count: int, words: tuple[int, int], max_tokens: int
) -> AnswerRecords:
    """Make random questions with answers of one word, each question about different visual tokens.

    Args:
        backbone: Backbone whose tokenizer is used.
        shape: Shape of the model.
        count: Number of records.
        words: Least and most words of a question.
        max_tokens: See `answer_records`.
    """
    rng = np.random.default_rng(2)

    def draw(size: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(0, shape.vocabulary - _FIRST_WORD, size))

    questions = [draw(int(rng.integers(words[0], words[1] + 1))) for _ in range(count)]
    visual = 0.02 * torch.randn(count, backbone.embed_dim, generator=torch.Generator().manual_seed(1))
    which = np.arange(count), np.zeros(count)
    return answer_records(backbone, questions, [draw(1) for _ in range(count)], *which, visual, max_tokens, "raise")
