"""Pruning between two blocks of a classifier's image tower, for every kind of tower."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.models.load import load_backbone
from fl_dualpriv.models.pruning.attention import importance
from fl_dualpriv.models.pruning.in_tower import check_prunable, encode_pruned, open_clip_tower
from fl_dualpriv.models.pruning.tokens import VisualTokenPruner
from tests.fl_dualpriv.models.pruning.small_towers import KINDS, images, images_for, open_clip, small


def half(layer: int = 1, **changes: Any) -> VisualTokenPruner:
    return VisualTokenPruner(**({"layer": layer, "keep_ratio": 0.5} | changes))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [1, -2])
@torch.no_grad()
def test_as_many_tokens_as_patches_and_none_fused_is_exactly_the_models_own(kind: str, layer: int):
    own, tower = small(kind).encode(images_for(kind)), small(kind).tower
    for dominant in (tower.n_patches, tower.n_patches + 1):
        every = VisualTokenPruner(layer=layer, dominant=dominant, contextual=0)
        check_prunable(tower, every)
        assert torch.equal(encode_pruned(tower, images_for(kind), every), own)
    # 1 - 1/1000 of at most 100 patches rounds up to all of them.
    assert torch.equal(encode_pruned(tower, images_for(kind), half(layer, keep_ratio=0.999)), own)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_fusing_a_single_patch_only_reorders_tokens(kind: str):
    # One patch is left and is "fused" with nothing. Attention and pooling do not see the order of their tokens, so the
    # features are the model's own up to rounding.
    tower = small(kind).tower
    for merge in ("attention", "average", "sum"):
        pruner = VisualTokenPruner(layer=1, dominant=tower.n_patches - 1, merge=merge)
        pruned = encode_pruned(tower, images_for(kind), pruner)
        torch.testing.assert_close(pruned, small(kind).encode(images_for(kind)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [1, -2])
@torch.no_grad()
def test_pruning_by_hand(kind: str, layer: int):
    tower, pixels = small(kind).tower, images_for(kind)
    pruner = half(layer, keep_ratio=0.25, contextual=2, merge="average")
    depth = layer if layer > 0 else len(tower.blocks) - 1
    tokens = tower.hidden(pixels, depth - 1)
    block = tower.blocks[depth - 1]
    attention, keys = importance(tower.read(block), tokens, tower.n_prefix, reads_cls=tower.reads_cls)
    tokens = tower.step(block, tokens)
    rows = []
    for i in range(3):
        ranked = sorted(range(tower.n_patches), key=lambda j: (-float(attention[i, j]), j))
        kept = sorted(ranked[: tower.n_patches // 4])
        rest = [j for j in range(tower.n_patches) if j not in kept]
        a, b = rest[0], rest[len(rest) // 2]
        near = torch.nn.functional.cosine_similarity
        joins_b = [float(near(keys[i, j], keys[i, b], 0)) > float(near(keys[i, j], keys[i, a], 0)) for j in rest]
        groups = [[j for j, other in zip(rest, joins_b, strict=True) if j != b and (not other or j == a)]]
        groups.append([j for j in rest if j not in groups[0]])
        patches = tokens[i, tower.n_prefix :]
        fused = [patches[group].mean(dim=0) for group in groups]
        left = torch.cat([patches[kept], torch.stack(fused)])
        left = left if tower.settle is None else tower.settle(left)
        rows.append(torch.cat([tokens[i, : tower.n_prefix], left]))
    tokens = torch.stack(rows)
    for later in tower.blocks[depth:]:
        tokens = tower.step(later, tokens)
    actual = encode_pruned(tower, pixels, pruner)
    torch.testing.assert_close(actual, tower.finish(tokens), rtol=0, atol=2e-5)
    assert (actual - small(kind).encode(pixels)).abs().max() > 1e-3  # it does something


class Everything:
    """A pruner of somebody's own: it drops all patches but the first, and notes what it was given."""

    layer = 1

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def n_tokens(self, n_patches: int) -> int:
        return 1

    def keeps_all(self, n_patches: int) -> bool:
        return False

    def __call__(self, patches: Tensor, attention: Tensor, keys: Tensor, images: Tensor) -> Tensor:
        self.given = [patches, attention, keys, images]
        return patches[:, :1]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cls_and_registers_are_never_given_to_a_pruner_and_never_lost(kind: str):
    tower, pixels, pruner = small(kind).tower, images_for(kind), Everything()
    whole, left = tower.hidden(pixels, 1), tower.pruned(pixels, 1, pruner)
    assert left.shape[1] == tower.n_prefix + 1
    assert torch.equal(left[:, : tower.n_prefix], whole[:, : tower.n_prefix])
    assert torch.equal(pruner.given[0], whole[:, tower.n_prefix :])
    assert [x.shape[:2] for x in pruner.given[:3]] == [(3, tower.n_patches)] * 3
    assert pruner.given[3] is pixels


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_later_blocks_see_fewer_tokens(kind: str):
    tower, seen = small(kind).tower, []
    handles = [b.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1])) for b in tower.blocks]
    encode_pruned(tower, images_for(kind), half(2))
    for handle in handles:
        handle.remove()
    whole, left = tower.n_prefix + tower.n_patches, tower.n_prefix + tower.n_patches // 2 + 1
    assert seen == [whole, whole, *[left] * (len(tower.blocks) - 2)]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_random_control_gives_other_features(kind: str):
    tower, pixels = small(kind).tower, images_for(kind)
    chosen, control = (encode_pruned(tower, pixels, half(score=score)) for score in ("attention", "random"))
    assert (chosen - control).abs().amax(dim=1).min() > 1e-3
    assert torch.equal(control, encode_pruned(tower, pixels, half(score="random")))


def test_no_gradient_under_no_grad_and_one_for_tokens_otherwise():
    tower = small("open_clip").tower
    pixels = images(1).requires_grad_()
    with torch.no_grad():
        assert not encode_pruned(tower, pixels, half()).requires_grad
    encode_pruned(tower, pixels, half()).sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_layers_and_numbers_that_do_not_fit_are_refused_at_the_start(kind: str):
    tower = small(kind).tower
    depth = len(tower.blocks)
    check_prunable(tower, half(depth - 1))
    for layer in (depth, -1, depth + 1, -depth - 1):
        with pytest.raises(ConfigError, match=rf"visual-layer = {layer}: .* {depth} blocks.*choose 1 to {depth - 1} "):
            check_prunable(tower, half(layer))
    crowded = half(dominant=tower.n_patches - 1, keep_ratio=None, contextual=2, merge="sum")
    with pytest.raises(ConfigError, match="too few for k = 2 fused tokens"):
        check_prunable(tower, crowded)


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_another_size(kind: str):
    side = small(kind).tower.image_size[0]
    with pytest.raises(ConfigError, match=f"images of {side + 32} x {side + 32} pixels; .* reads {side} x {side}"):
        encode_pruned(small(kind).tower, images(2, side + 32), half())


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        pytest.param({"layers": [1, 1, 1, 1], "width": 8}, "a ModifiedResNet", id="resnet"),
        pytest.param({"qk_norm": True}, "its blocks are custom", id="custom block"),
    ],
)
def test_other_towers_of_open_clip_are_refused_only_if_pruning_is_on(make_clip_dir, vision: dict, message: str):
    name = f"local-dir:{make_clip_dir({'vision_cfg': vision})}"
    assert load_backbone(name, "", "cpu").image_features(images()).shape[0] == 3
    with pytest.raises(ConfigError, match=rf"{message}.*visual-keep-ratio = 1"):
        load_backbone(name, "", "cpu", half())


def test_other_towers_of_timm_are_refused():
    tower = open_clip.timm_model.TimmModel("test_resnet", embed_dim=8, image_size=64, pool="avg")
    with pytest.raises(ConfigError, match=r"this image tower is a ResNet; set pruning.visual-keep-ratio = 1"):
        open_clip_tower(tower)


def test_a_model_of_open_clip_with_a_timm_tower_and_a_pruner(make_clip_dir):
    vision = {"image_size": 64, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
    name = f"local-dir:{make_clip_dir({'vision_cfg': vision})}"
    plain, pruned = load_backbone(name, "", "cpu"), load_backbone(name, "", "cpu", half())
    whole = plain.image_features(images(side=64))
    assert (pruned.image_features(images(side=64)) - whole).abs().max() > 1e-3
    assert pruned.feature_key != plain.feature_key
    every = load_backbone(name, "", "cpu", VisualTokenPruner(layer=-2, dominant=16, contextual=0))
    assert torch.equal(every.image_features(images(side=64)), whole)


@pytest.mark.parametrize("kind", ["transformers CLIP", "transformers SigLIP"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_of_transformers_with_a_pruner(kind: str, precision: Any, request: pytest.FixtureRequest):
    folder = request.getfixturevalue("hf_clip_dir" if "CLIP" in kind and "Sig" not in kind else "hf_siglip_dir")
    name = f"hf:{folder}"
    plain = load_backbone(name, "", "cpu", None, precision)
    pruned = load_backbone(name, "", "cpu", half(), precision)
    features, whole = pruned.image_features(images()), plain.image_features(images())
    assert features.shape == whole.shape
    assert (features - whole).abs().max() > 1e-3
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3), rtol=0, atol=1e-5)
    assert pruned.feature_key != plain.feature_key
    assert pruned.fingerprint == plain.fingerprint
    every = load_backbone(name, "", "cpu", VisualTokenPruner(layer=1, dominant=16, contextual=0), precision)
    assert torch.equal(every.image_features(images()), whole)
    with pytest.raises(ConfigError, match="visual-layer = 2: this image tower has 2 blocks, and at least one must"):
        load_backbone(name, "", "cpu", half(2), precision)
