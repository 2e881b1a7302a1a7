"""An image's features depend on that image alone: what record-level privacy asks of anything before the gradient.

With one batch size the order of summation is one, so whatever stands beside an image must not change a bit.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fl_dualpriv.models.base import Backbone
from fl_dualpriv.models.load import load_backbone
from fl_dualpriv.models.pruning import fusion, towers
from fl_dualpriv.models.pruning import tokens as visual_tokens
from fl_dualpriv.models.pruning.in_tower import encode_pruned
from fl_dualpriv.models.pruning.published import pruned_hidden
from fl_dualpriv.models.pruning.tokens import VisualTokenPruner
from tests.fl_dualpriv.models.pruning.small_towers import KINDS, images_for, small, vision_model

# In a batch of another size, or at another place, matrix products may sum in another order. To first order each sum
# adds a relative error of its length times u = 2⁻²⁴: in a block of width 32 those over channels (three products and
# two norms of 32, one product of 128) and over 17 tokens (three) have 340 terms. Three blocks, 192 numbers of a patch
# and the projection make 1300 u = 8e-5 of a feature of norm 1. What mixes images moves features by 1e-2 and more.
ROUNDING = 1e-4

PRUNERS: dict[str, VisualTokenPruner | None] = {
    "plain": None,
    "half": VisualTokenPruner(layer=1, keep_ratio=0.5),
    "tenth": VisualTokenPruner(layer=1, keep_ratio=0.1),
    "dropped": VisualTokenPruner(layer=1, keep_ratio=0.5, contextual=0),
    "average": VisualTokenPruner(layer=1, keep_ratio=0.4, contextual=3, merge="average"),
    "sum": VisualTokenPruner(layer=-2, keep_ratio=0.4, contextual=3, merge="sum"),
    "random": VisualTokenPruner(layer=-2, keep_ratio=0.4, contextual=3, merge="average", score="random"),
    "noise": VisualTokenPruner(layer=1, keep_ratio=0.4, contextual=3, merge="average", fusion_noise_std=0.5),
}
BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.fixture(params=PRUNERS.values(), ids=list(PRUNERS))
def backbone(request: pytest.FixtureRequest, tiny_clip_dir) -> Backbone:
    return load_backbone(f"local-dir:{tiny_clip_dir}", "", "cpu", request.param)


def images(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1.0, 0.0, 1e6], ids=["others", "black", "huge"])
def test_values_of_the_batch_mates_never_matter(backbone: Backbone, scale: float):
    batch = images(5)
    changed = batch.clone()
    changed[[0, 1, 3, 4]] = scale * images(4, seed=7)
    # Same shape, so the same order of summation: bitwise.
    assert torch.equal(backbone.image_features(batch)[2], backbone.image_features(changed)[2])
    if scale:
        assert not torch.equal(backbone.image_features(batch)[1], backbone.image_features(changed)[1])


def test_batch_equals_one_by_one(backbone: Backbone):
    batch = images(7)
    alone = torch.cat([backbone.image_features(image[None]) for image in batch])
    torch.testing.assert_close(backbone.image_features(batch), alone, rtol=0, atol=ROUNDING)


def test_permuting_the_batch_permutes_the_features(backbone: Backbone):
    batch, order = images(6), torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = backbone.image_features(batch[order])
    torch.testing.assert_close(permuted, backbone.image_features(batch)[order], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("whole", [True, False], ids=["whole image", "one pixel"])
def test_a_non_finite_image_ruins_only_its_own_row(backbone: Backbone, bad: float, whole: bool):
    batch = images(4)
    spoiled = batch.clone()
    if whole:
        spoiled[1] = bad
    else:
        spoiled[1, 2, 17, 5] = bad
    good = [0, 2, 3]
    features = backbone.image_features(spoiled)
    assert features[1].isnan().all()
    assert torch.equal(features[good], backbone.image_features(batch)[good])


Encode = Callable[[Tensor], Tensor]


def check_isolated(encode: Encode, batch: Tensor) -> None:
    """Image 1 among other images, and among images that are not finite, gives the same bits."""
    with torch.no_grad():
        own = encode(batch)[1]
        for other in (batch.flip(0), torch.zeros_like(batch), torch.full_like(batch, float("nan"))):
            other[1] = batch[1]
            assert torch.equal(encode(other)[1], own), "an image's tokens depend on its batch-mates"


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tower(kind: str, name: str):
    pruner = PRUNERS[name]
    assert pruner is not None
    check_isolated(lambda x: encode_pruned(small(kind).tower, x, pruner), images_for(kind, 4))


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "plain"])
@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_behind_the_tower(kind: str, name: str):
    pruner, model = PRUNERS[name], vision_model(kind)
    assert pruner is not None
    check_isolated(lambda x: pruned_hidden(model, x, pruner), images(4))


def choose_by_the_batch(patch: pytest.MonkeyPatch) -> None:
    own = towers.importance

    def shared(*args: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        attention, keys = own(*args, **settings)
        return attention.mean(dim=0, keepdim=True).expand_as(attention), keys

    patch.setattr(towers, "importance", shared)


def cluster_by_the_batch(patch: pytest.MonkeyPatch) -> None:
    own = visual_tokens.cluster_weights
    patch.setattr(
        visual_tokens, "cluster_weights", lambda keys, *rest: own(keys.mean(0, keepdim=True).expand_as(keys), *rest)
    )


def key_the_noise_by_the_batch(patch: pytest.MonkeyPatch) -> None:
    own = fusion.fusion_noise
    patch.setattr(visual_tokens, "fusion_noise", lambda pixels, *rest: own(pixels[:1].expand_as(pixels), *rest))


def mix_across_the_batch(patch: pytest.MonkeyPatch) -> None:
    own = visual_tokens.mix
    patch.setattr(
        visual_tokens, "mix", lambda weights, tokens: own(weights, tokens).mean(0).expand(len(tokens), -1, -1)
    )


@pytest.mark.parametrize(
    "plant", [choose_by_the_batch, cluster_by_the_batch, key_the_noise_by_the_batch, mix_across_the_batch]
)
def test_a_planted_leak_is_noticed(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch):
    pruner = PRUNERS["noise"]
    assert pruner is not None
    calls: list[Encode] = [
        lambda x: encode_pruned(small("open_clip").tower, x, pruner),
        lambda x: pruned_hidden(vision_model("Siglip"), x, pruner),
    ]
    plant(monkeypatch)
    for encode in calls:
        with pytest.raises(AssertionError, match="depend on its batch-mates"):
            check_isolated(encode, images(4))
