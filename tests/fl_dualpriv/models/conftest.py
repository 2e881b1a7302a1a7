"""Tiny transformers models with random weights, saved as `save_pretrained` does, with tokenizers made here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = (
    "a",
    "photo",
    "of",
    "the",
    "cat",
    "dog",
    "red",
    "fire",
    "truck",
    "great",
    "wall",
    "china",
    "tree",
    "up",
    "close",
)
VISION = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 2}  # fmt: skip
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def _save(folder: Path, model: Any, tokenizer: Any, image_processor: Any) -> Path:
    with torch.no_grad():  # some initial values are zeros and ones, which would hide a wrong use of them
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    for part in (model, tokenizer, image_processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_hf_clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a tiny `CLIPModel`: ``make_hf_clip(text={...})``; byte-level tokens, as CLIP's without any merge."""
    from fl_dualpriv.models.transformers import transformers

    def make(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> Path:
        from open_clip.tokenizer import bytes_to_unicode

        letters = list(bytes_to_unicode().values())
        vocabulary = {token: i for i, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
        vocabulary |= {"<|startoftext|>": 512, "<|endoftext|>": 513}
        settings = TEXT | {"vocab_size": 514, "max_position_embeddings": 48, "bos_token_id": 512, "eos_token_id": 513}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.CLIPModel(
                transformers.CLIPConfig(
                    text_config=settings | (text or {}), vision_config=VISION | (vision or {}), projection_dim=24
                )
            )
        size = {"height": 32, "width": 32}
        images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
        tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[])
        return _save(tmp_path_factory.mktemp("hf-clip"), model, tokenizer, images)

    return make


@pytest.fixture(scope="session")
def hf_clip_dir(make_hf_clip: Callable[..., Path]) -> Path:
    """Folder of the tiny `CLIPModel`."""
    return make_hf_clip()


@pytest.fixture(scope="session")
def hf_siglip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny `SiglipModel`: whole words, no start token, padded with its end token as SigLIP's own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    from fl_dualpriv.models.transformers import transformers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1} | {w: 2 + i for i, w in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    settings = TEXT | {"vocab_size": 20, "max_position_embeddings": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=settings, vision_config=VISION))
        torch.nn.init.constant_(model.logit_scale, 2.0)
        torch.nn.init.constant_(model.logit_bias, -10.0)
    images = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    return _save(tmp_path_factory.mktemp("hf-siglip"), model, tokenizer, images)
