"""The demo question answerer before training: processor, a LLaVA with random weights, and labels for its image tower.

Only `make_vqa_assets` uses this module.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn

from fl_dualpriv.models import torchvision_shim
from tools import vqa_questions as vqa

torchvision_shim.install()
import transformers  # noqa: E402  (needs the shim)

SIDE, PATCH, WIDTH, N_LAYERS = 96, 12, 96, 4
N_VISUAL = (SIDE // PATCH) ** 2
MEAN, STD = 0.5, 0.3
SPECIAL = {"pad": "<pad>", "bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "image": "<image>"}
CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | upper }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_processor() -> Any:
    """Make the model's processor of images and chats; a token is a word, and only the demo's words have tokens."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *vqa.vocabulary()])}
    words = Tokenizer(WordLevel(vocabulary, unk_token=SPECIAL["unk"]))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        **{f"{name}_token": token for name, token in SPECIAL.items() if name != "image"},
        extra_special_tokens={"image_token": SPECIAL["image"]},
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    pictures = transformers.CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    return transformers.LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
        num_additional_image_tokens=1,
    )


def new_model(processor: Any) -> Any:
    """Make a LLaVA with random weights, with the image tower's attention near the identity."""
    vision = transformers.CLIPVisionConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=3,
        projection_dim=96,
        hidden_act="gelu",
    )
    tokenizer = processor.tokenizer
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=256,
        initializer_range=0.08,  # the usual 0.02 suits wide models; this one would hardly learn
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(SPECIAL["image"]),
        image_seq_length=N_VISUAL,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = transformers.LlavaForConditionalGeneration(config)
    tower = model.model.vision_tower
    with torch.no_grad():
        for block in tower.encoder.layers:
            mimetic_init(block.self_attn)
        embeddings = tower.embeddings
        embeddings.position_embedding.weight.normal_(0, 0.1)
        embeddings.class_embedding.normal_(0, 0.1)
        embeddings.patch_embedding.weight.normal_(0, 0.05)
        model.model.language_model.embed_tokens.weight.normal_(0, 0.1)
    return model


@torch.no_grad()
def fit_projector(projector: Any, bank: Tensor) -> None:
    """Initialise the projector for standardised states, because a few dimensions are far larger than the rest.

    Args:
        projector: Projector of the model.
        bank: States of the image tower, (..., width).
    """
    first, second = projector.linear_1, projector.linear_2
    rows = bank.flatten(0, -2)
    std, mean = torch.std_mean(rows, dim=0)
    first.weight.normal_(0, rows.shape[1] ** -0.5).div_(std)
    first.bias.copy_(-first.weight @ mean)
    second.weight.normal_(0, 0.2 * second.in_features**-0.5)


@torch.no_grad()
def mimetic_init(attention: Any) -> None:
    """Start attention near the identity, as the demo CLIP does (`make_demo_assets.mimetic_init`)."""
    width, head = attention.embed_dim, attention.head_dim
    eye = torch.eye(width)
    noise = torch.randn(width, width) / width**0.5
    for h in range(attention.num_heads):
        u, s, vt = torch.linalg.svd(0.7 * torch.randn(width, width) / width**0.5 + 0.7 * eye)
        rows = slice(h * head, (h + 1) * head)
        attention.q_proj.weight[rows] = (u[:, :head] * s[:head].sqrt()).T
        attention.k_proj.weight[rows] = (vt[:head].T * s[:head].sqrt()).T
    u, s, vt = torch.linalg.svd(0.4 * noise - 0.4 * eye)
    attention.v_proj.weight.copy_(vt * s.sqrt()[:, None])
    attention.out_proj.weight.copy_(u * s.sqrt())


def load(folder: Path) -> tuple[Any, Any]:
    """Load the model in single precision and its processor, as any user of transformers does."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoProcessor.from_pretrained(folder, backend="pil")


_SIZES = [len(vqa.PANELS), len(vqa.SHAPES), len(vqa.COLOUR_NAMES)]


class Seeing(nn.Module):
    """Labels and loss for training the image tower's tokens.

    Every patch is trained to know its panel, and a patch that a shape covers also the shape and the colour that is
    seen. CLS is trained to know the pairs of shape and colour on a sheet, after the last layer and before it, where the
    language model reads; so the attention of CLS finds shapes. With labels on means over panels instead, a linear probe
    found the panel of 56 % of the tokens, and the language model did not learn in 450 steps to look at one panel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(96, sum(_SIZES))
        self.sheet = nn.ModuleList(nn.Linear(96, len(vqa.SHAPES) * len(vqa.COLOUR_NAMES)) for _ in range(2))

    def forward(self, hidden: Tensor, last: Tensor, sheets: vqa.Sheets) -> tuple[Tensor, dict[str, float]]:
        """Return loss and figures for states (sheet, 1 + patches, width) before the last layer, and CLS after it."""
        shapes, colours, covered = (torch.from_numpy(x) for x in (sheets.shapes, sheets.shown, sheets.covered))
        panel, shape, colour = self.patch(hidden[:, 1:]).split(_SIZES, dim=-1)
        panels = torch.from_numpy(vqa.PANEL_OF).expand(len(hidden), -1)
        figures, loss = {}, torch.zeros(())
        for name, logits, truth in (
            ("panel", panel.flatten(0, 1), panels.flatten()),
            ("shape", shape[covered], shapes.gather(1, panels)[covered]),
            ("colour", colour[covered], colours.gather(1, panels)[covered]),
        ):
            loss = loss + F.cross_entropy(logits, truth)
            figures[name] = float((logits.argmax(-1) == truth).float().mean())
        there = torch.zeros(len(hidden), 24).scatter_(1, colours * len(vqa.SHAPES) + shapes, 1)
        for head, x in zip(self.sheet, (last, hidden[:, 0]), strict=True):
            loss = loss + 2 * F.binary_cross_entropy_with_logits(head(x), there)
        return loss, {"loss": float(loss.detach())} | figures


def to_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """Preprocess sheets (n, side, side, 3) as the processor does."""
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def see(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the image tower's states before its last layer, and CLS after it."""
    out = model.model.vision_tower(pixel_values=pixels, output_hidden_states=True)
    return out.hidden_states[-2], out.pooler_output
