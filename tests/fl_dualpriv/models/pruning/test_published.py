"""Pruning behind the tower, as published, against the model's own hidden states and weights and loops in plain form."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.models.pruning.published import n_visual_tokens, pruned_hidden
from fl_dualpriv.models.pruning.tokens import VisualTokenPruner
from fl_dualpriv.models.transformers import transformers
from tests.fl_dualpriv.models.pruning.small_towers import images, vision_model

TOWERS = [("CLIP", 1), ("Siglip", 0)]


def some(layer: int = -2, **changes: Any) -> VisualTokenPruner:
    return VisualTokenPruner(**({"layer": layer, "dominant": 6, "contextual": 3, "merge": "sum"} | changes))


@pytest.mark.parametrize("layer", [1, 2, 3, -1, -2, -3])
@pytest.mark.parametrize(("kind", "n_prefix"), TOWERS)
@torch.no_grad()
def test_nothing_pruned_is_exactly_the_models_hidden_state(kind: str, n_prefix: int, layer: int):
    model = vision_model(kind)
    states = model(pixel_values=images(), output_hidden_states=True).hidden_states
    for dominant in (16, 17):
        every = some(layer, dominant=dominant, contextual=0)
        assert torch.equal(pruned_hidden(model, images(), every), states[layer][:, n_prefix:])
        assert n_visual_tokens(model, every) == 16


def by_hand(patches: Tensor, score: Tensor, keys: Tensor, pruner: VisualTokenPruner) -> Tensor:
    """Steps 3 to 8 of the paper for one image, one token after the other."""
    ranked = sorted(range(len(patches)), key=lambda j: -float(score[j]))
    dominant, k = sorted(ranked[: pruner.n_kept(len(patches))]), pruner.contextual
    rest = [j for j in range(len(patches)) if j not in dominant]
    centres = rest[:: len(rest) // k][:k]
    members: dict[int, list[int]] = {centre: [] for centre in centres}
    for j in rest:
        if j not in centres:
            cosine = {c: float(torch.cosine_similarity(keys[j], keys[c], dim=0)) for c in centres}
            members[max(cosine, key=lambda c: cosine[c])].append(j)
    contextual = []
    for centre, cluster in members.items():
        if pruner.merge == "sum":
            contextual.append(patches[centre] + (patches[cluster].mean(dim=0) if cluster else 0))
        else:
            contextual.append((patches[centre] + patches[cluster].sum(dim=0)) / (1 + len(cluster)))
    return torch.stack([*(patches[j] for j in dominant), *contextual])


@pytest.mark.parametrize("merge", ["sum", "average"])
@pytest.mark.parametrize("layer", [1, -2, -1])
@pytest.mark.parametrize(("kind", "n_prefix"), TOWERS)
@torch.no_grad()
def test_as_published(kind: str, n_prefix: int, layer: int, merge: Any):
    eager, seen = vision_model(kind, "eager"), []
    handles = [
        layer.self_attn.k_proj.register_forward_hook(lambda module, args, out: seen.append(out))
        for layer in eager.encoder.layers
    ]
    found = eager(pixel_values=images(), output_attentions=True, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    # attentions[i] is of block i + 1, which makes hidden state i + 1: both have one negative index.
    block = layer - 1 if layer > 0 else layer
    weights = found.attentions[block].mean(dim=1)
    score = weights[:, 0, 1:] if kind == "CLIP" else weights.mean(dim=1)
    keys = seen[block].unflatten(-1, (2, 16)).mean(dim=2)[:, n_prefix:]
    patches = found.hidden_states[layer][:, n_prefix:]
    pruner = some(layer, merge=merge)
    expected = torch.stack([by_hand(patches[i], score[i], keys[i], pruner) for i in range(3)])
    actual = pruned_hidden(vision_model(kind), images(), pruner)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
    assert actual.shape[1] == n_visual_tokens(vision_model(kind), pruner) == 9


@pytest.mark.parametrize(("kind", "n_prefix"), TOWERS)
@pytest.mark.parametrize("dominant", [6, 16])
def test_no_block_behind_the_layer_runs(kind: str, n_prefix: int, dominant: int):
    model, ran = vision_model(kind), []
    for i, layer in enumerate(model.encoder.layers):
        layer.register_forward_hook(lambda module, args, out, i=i: ran.append(i))
    pruned_hidden(model, images(), some(dominant=dominant))
    assert ran == [0, 1]


def test_no_gradient():
    model = vision_model("CLIP")
    assert any(p.requires_grad for p in model.parameters())
    assert not pruned_hidden(model, images().requires_grad_(), some()).requires_grad
    assert not pruned_hidden(model, images(), some(dominant=16)).requires_grad


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_towers_in_half_precision(kind: str, dtype: torch.dtype):
    # All patches are fused into clusters around fixed centres but six that a fixed permutation names: no choice hangs
    # on a rounded score.
    pruner = some(score="random", contextual=10, merge="average")
    pruned = pruned_hidden(vision_model(kind).to(dtype), images(), pruner)
    assert pruned.dtype == dtype
    exact = pruned_hidden(vision_model(kind), images(), pruner)
    assert (pruned.float() - exact).norm() < 0.05 * exact.norm()
    assert pruned_hidden(vision_model(kind).to(dtype), images(), some()).isfinite().all()


def test_the_tower_inside_another_model():
    # Some versions and models of transformers wrap the tower once more.
    model = nn.Module()
    model.vision_model = vision_model("CLIP")
    assert torch.equal(pruned_hidden(model, images(), some()), pruned_hidden(vision_model("CLIP"), images(), some()))


def count(pruner: VisualTokenPruner) -> None:
    n_visual_tokens(vision_model("CLIP"), pruner)


def prune(pruner: VisualTokenPruner) -> None:
    pruned_hidden(vision_model("CLIP"), images(), pruner)


@pytest.mark.parametrize("call", [count, prune])
@pytest.mark.parametrize("layer", [4, -4])
def test_layers_that_the_tower_does_not_have(call: Callable[[VisualTokenPruner], None], layer: int):
    with pytest.raises(ConfigError, match=rf"layer = {layer}: .*has 3 blocks; choose 1 to 3 \(or -3 to -1\)"):
        call(some(layer))


@pytest.mark.parametrize("call", [count, prune])
def test_more_fused_tokens_than_are_left(call: Callable[[VisualTokenPruner], None]):
    with pytest.raises(ConfigError, match=r"n = 16 patches K = 14 .* k = 3 fused tokens; choose a k of 0 to 2"):
        call(some(dominant=14))


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_images_of_another_size(kind: str):
    with pytest.raises(ConfigError, match="images of 64 x 64 pixels; this image tower reads 32 x 32"):
        pruned_hidden(vision_model(kind), images(2, 64), some())


def test_other_towers_are_refused():
    config = transformers.Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    with pytest.raises(ConfigError, match=r"an image tower of kind Dinov2Model; set pruning.visual-keep-ratio = 1"):
        pruned_hidden(transformers.Dinov2Model(config), images(1, 28), some())


def test_it_says_that_fusion_noise_has_no_epsilon():
    assert "fusion noise, if the pruner adds it, has NO ε" in " ".join((pruned_hidden.__doc__ or "").split())
