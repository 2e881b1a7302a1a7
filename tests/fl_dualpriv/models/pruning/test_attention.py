"""Attention from a block's own projections equals what the block itself pays, in every library."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.models.pruning.attention import cls_attention, importance, mean_attention, read_attention
from tests.fl_dualpriv.models.pruning.small_towers import KINDS, images, images_for, small, vision_model

# Same sums in another order: float32 rounding of values below 1.
ROUNDING = {"rtol": 0, "atol": 1e-6}


@torch.no_grad()
def weights_of(block: Any, tokens: Tensor, step: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """What an open_clip or timm block pays, (n, head, token, token), from the library's own code."""
    if isinstance(block.attn, nn.MultiheadAttention):
        x = block.ln_1(tokens)
        return block.attn(x, x, x, need_weights=True, average_attn_weights=False)[1]
    seen: list[Tensor] = []
    handle = block.attn.attn_drop.register_forward_hook(lambda module, args, out: seen.append(out))
    block.attn.fused_attn, fused = False, block.attn.fused_attn  # the slow path has weights
    step(block, tokens)
    handle.remove()
    block.attn.fused_attn = fused
    return seen[0]


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "transformers" not in kind])
@torch.no_grad()
def test_open_clip_and_timm(kind: str, depth: int):
    tower = small(kind).tower
    tokens = tower.hidden(images_for(kind), depth)
    block = tower.blocks[depth]
    attention, keys = importance(tower.read(block), tokens, tower.n_prefix, reads_cls=tower.reads_cls)
    weights = weights_of(block, tokens, tower.step)
    paid = weights[:, :, 0] if tower.reads_cls else weights.mean(dim=2)
    torch.testing.assert_close(attention, paid.mean(dim=1)[:, tower.n_prefix :], **ROUNDING)
    assert keys.shape[:2] == (3, tower.n_patches)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize(("kind", "n_prefix"), [("CLIP", 1), ("Siglip", 0)])
@torch.no_grad()
def test_transformers_without_asking_for_weights(kind: str, n_prefix: int, depth: int):
    eager, fast = vision_model(kind, "eager"), vision_model(kind)
    found = eager(pixel_values=images(), output_attentions=True, output_hidden_states=True)
    asked = fast(pixel_values=images(), output_attentions=True)
    assert not asked.attentions or asked.attentions[0] is None  # sdpa says nothing: why it is not asked
    layer = fast.encoder.layers[depth]
    attention, keys = importance(read_attention(layer), found.hidden_states[depth], n_prefix, reads_cls=kind == "CLIP")
    weights = found.attentions[depth]
    expected = weights[:, :, 0, 1:].mean(dim=1) if kind == "CLIP" else weights.mean(dim=(1, 2))
    torch.testing.assert_close(attention, expected, **ROUNDING)
    projected = layer.self_attn.k_proj(layer.layer_norm1(found.hidden_states[depth])).unflatten(-1, (2, 16)).mean(dim=2)
    torch.testing.assert_close(keys, projected[:, n_prefix:], **ROUNDING)


def test_the_mean_is_exact_however_many_queries_go_at_once():
    # 150 tokens: blocks of 64, 64 and 22.
    queries, keys = torch.randn(2, 2, 150, 3, 4, generator=torch.Generator().manual_seed(0))
    every = (torch.einsum("nqhd,nthd->nhqt", queries, keys) * 0.5).softmax(dim=-1).mean(dim=(1, 2))
    torch.testing.assert_close(mean_attention(queries, keys, 0.5), every, **ROUNDING)
    rows = torch.stack([cls_attention(queries[:, q], keys, 0.5) for q in range(150)]).mean(dim=0)
    torch.testing.assert_close(mean_attention(queries, keys, 0.5), rows, **ROUNDING)


def test_the_score_carries_no_gradient():
    tower = small("open_clip").tower
    tokens = tower.embed(images().requires_grad_())
    attention, keys = importance(read_attention(tower.blocks[0]), tokens, 1, reads_cls=True)
    assert tokens.requires_grad
    assert not attention.requires_grad
    assert not keys.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_scores_of_half_precision_towers_are_float32(dtype: torch.dtype):
    model = vision_model("CLIP").to(dtype)
    tokens = model.pre_layrnorm(model.embeddings(images()))
    attention, keys = importance(read_attention(model.encoder.layers[0]), tokens, 1, reads_cls=True)
    assert attention.dtype == keys.dtype == torch.float32
    exact = vision_model("CLIP")
    expected, _ = importance(
        read_attention(exact.encoder.layers[0]), exact.pre_layrnorm(exact.embeddings(images())), 1, reads_cls=True
    )
    torch.testing.assert_close(attention, expected, rtol=0.1, atol=0.005)


def test_other_blocks_are_refused():
    with pytest.raises(ConfigError, match=r"cannot read the attention .*\(TransformerEncoderLayer\).*keep-ratio = 1"):
        read_attention(nn.TransformerEncoderLayer(8, 2))
    block = small("timm, CLS").tower.blocks[0]

    class Rotating(nn.Module):
        """An attention of timm of another kind, in the same block."""

    block.attn, kept = Rotating(), block.attn
    try:
        with pytest.raises(ConfigError, match="cannot read the attention"):
            read_attention(block)
    finally:
        block.attn = kept
