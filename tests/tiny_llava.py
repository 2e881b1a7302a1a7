"""Tiny LLaVA models with random weights, saved as `save_pretrained` does, with a tokenizer and a chat template."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fl_dualpriv.models.transformers import transformers

WORDS = ("what", "which", "color", "shape", "is", "the", "a", "there", "red", "blue", "green", "circle", "square",
         "yes", "no", "?", ":", "USER", "ASSISTANT", "look", "at", "this")  # fmt: skip
QUESTIONS = (
    "what color is the circle ?",
    "is the square red ?",
    "which shape is there ?",
    "is there a blue circle ?",
    "what is this ?",
)
ANSWERS = ("red", "yes", "circle", "no", "a green square")
IMAGE_ID, END_ID = 3, 2
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION: dict[str, Any] = TINY | {"image_size": 32, "patch_size": 8}


def tiny_tokenizer(words: tuple[str, ...] = WORDS) -> Any:
    """Whole words, a start token."""
    ids = {"<unk>": 0, "<s>": 1, "</s>": END_ID, "<image>": IMAGE_ID} | {word: 4 + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # pyright: ignore[reportAttributeAccessIssue]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def save_tiny_llava(
    folder: Path,
    *,
    vision: str = "clip",
    language: str = "llama",
    template: str | None = TEMPLATE,
    layers: int | list[int] = -2,
    text: dict[str, Any] | None = None,
    vision_changes: dict[str, Any] | None = None,
    words: tuple[str, ...] = WORDS,
) -> Path:
    """16 patches of 8 x 8, 2 + 2 blocks of width 32, grouped keys, 64 tokens of context."""
    settings = {"num_key_value_heads": 1, "max_position_embeddings": 64, "vocab_size": 4 + len(words),
                "bos_token_id": 1, "eos_token_id": END_ID, "pad_token_id": END_ID}  # fmt: skip
    languages = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "gpt2": "GPT2Config"}
    strategy = "default" if vision == "clip" else "full"
    visions = {"clip": transformers.CLIPVisionConfig, "siglip": transformers.SiglipVisionConfig}
    config = transformers.LlavaConfig(
        vision_config=visions[vision](**VISION | (vision_changes or {})),
        text_config=getattr(transformers, languages[language])(**TINY | settings | (text or {})),
        image_token_index=IMAGE_ID,
        image_seq_length=16,
        vision_feature_layer=layers,
        vision_feature_select_strategy=strategy,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlavaForConditionalGeneration(config)
        with torch.no_grad():  # initial values are small, zeros and ones: they would hide a wrong use of them
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
                else:
                    parameter.normal_(std=0.2)
    size = {"height": 32, "width": 32}
    if vision == "clip":
        images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    else:
        images = transformers.SiglipImageProcessor(size=size)
    processor = transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=tiny_tokenizer(words),
        patch_size=8,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(vision == "clip"),
        chat_template=template,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
