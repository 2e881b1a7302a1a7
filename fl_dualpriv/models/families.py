"""Differences between the dual encoders of transformers: their text towers, and the form of a preprocessed image.

torch only: the classes of transformers are recognised by the type that their configuration names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

TextKind = Literal["causal", "whole row", "masked"]
"""``causal``: read at the end of text, and no token sees a later one (CLIP). ``whole row``: every token sees every
other, padding included, and the last one is read (SigLIP). ``masked``: every token sees all words, and the first one is
read (BERT and its kind)."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of dual encoders.

    Attributes:
        kind: Name of its class in transformers.
        text: Kind of its text tower.
        offset: Positions that its table holds besides those of tokens: RoBERTa's begin behind its padding index.
        patches: True if a preprocessed image is a list of patches with its own grid (NaFlex), see `packed`.
    """

    kind: str
    text: TextKind
    offset: int = 0
    patches: bool = False


FAMILIES: Mapping[str, Family] = {
    "clip": Family(kind="CLIPModel", text="causal"),
    "metaclip_2": Family(kind="MetaClip2Model", text="causal"),
    "siglip": Family(kind="SiglipModel", text="whole row"),
    "siglip2": Family(kind="Siglip2Model", text="whole row", patches=True),
    "altclip": Family(kind="AltCLIPModel", text="masked", offset=2),
    "chinese_clip": Family(kind="ChineseCLIPModel", text="masked"),
}
"""Families by the ``model_type`` of their configuration."""


def encode_text(model: Any, family: Family, embeddings: Tensor, end: Tensor) -> Tensor:
    """Compute text features of token embeddings; see `Backbone.encode_embeddings`.

    Args:
        model: Model of transformers.
        family: Its family.
        embeddings: Token embeddings without positions, (n, token, ctx_dim).
        end: Index of each row's end of text, (n,).
    """
    text, rows = model.text_model, torch.arange(len(embeddings), device=embeddings.device)
    if family.text == "masked":
        mask = torch.arange(embeddings.shape[1], device=embeddings.device) <= end.to(embeddings.device)[:, None]
        states = text(inputs_embeds=embeddings, attention_mask=mask.long()).last_hidden_state
        return model.text_projection(states[:, 0])
    x = text.embeddings(inputs_embeds=embeddings)
    mask = _causal_mask(x.shape[1], x) if family.text == "causal" else None
    x = text.final_layer_norm(text.encoder(inputs_embeds=x, attention_mask=mask).last_hidden_state)
    if family.text == "causal":
        return model.text_projection(x[rows, end.to(x.device)])
    return text.head(x[:, -1])


def _causal_mask(length: int, like: Tensor) -> Tensor:
    """Return the causal mask (1, 1, token, token) that is added to the scores."""
    return torch.full((1, 1, length, length), float("-inf"), dtype=like.dtype, device=like.device).triu(1)


def packed(made: Mapping[str, Tensor]) -> Tensor:
    """Pack the patches of one image, their mask and their grid into one tensor (patch, 3 + patch_dim), float32.

    All images have the same number of rows, the family's maximum, so that no shape depends on an image. Columns: mask,
    height and width of the grid (the same in every row), and the pixels of the patch.

    Args:
        made: Output of the image processor for one image.
    """
    pixels, mask = made["pixel_values"][0], made["pixel_attention_mask"][0]
    grid = made["spatial_shapes"][0].expand(len(pixels), 2)
    return torch.cat([mask[:, None].float(), grid.float(), pixels.float()], dim=1)


def unpacked(images: Tensor) -> dict[str, Tensor]:
    """Undo `packed` for a batch, (n, patch, 3 + patch_dim). An image of zeros, which pads a batch, gets one patch."""
    mask, grid = images[..., 0].long(), images[:, 0, 1:3].long().clamp(min=1)
    mask = torch.cat([mask[:, :1].clamp(min=1), mask[:, 1:]], dim=1)  # attention over no key would be NaN
    return {"pixel_values": images[..., 3:], "pixel_attention_mask": mask, "spatial_shapes": grid}


def image_encoder(model: Any, family: Family) -> Callable[[Tensor], Tensor]:
    """Return the function from preprocessed images to features, (n, embed_dim), not normalised."""
    if family.patches:
        return lambda images: model.get_image_features(**unpacked(images)).pooler_output
    return lambda images: model.get_image_features(pixel_values=images).pooler_output
