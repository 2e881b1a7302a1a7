"""The pruner: how many patches stay, which, in which order, and what it refuses."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.models.pruning.fusion import fusion_noise
from fl_dualpriv.models.pruning.tokens import VisualTokenPruner, depth_of
from tests.fl_dualpriv.models.pruning.small_towers import images

N, PATCHES, DIM = 3, 16, 8


def pruner(**changes: Any) -> VisualTokenPruner:
    start: dict[str, Any] = {"layer": 1} if "dominant" in changes else {"layer": 1, "keep_ratio": 0.5}
    return VisualTokenPruner(**(start | changes))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def given(n: int = N) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return drawn(n, PATCHES, DIM), drawn(n, PATCHES, seed=1).softmax(dim=1), drawn(n, PATCHES, 5, seed=2), images(n)


@pytest.mark.parametrize(
    ("ratio", "patches", "kept"),
    # ceil(ratio * patches); 0.07 * 100 is 7.000000000000001 and 0.3 * 10 is 3.0000000000000004 in some orders.
    [(1.0, 16, 16), (0.5, 16, 8), (0.51, 16, 9), (0.07, 100, 7), (0.3, 10, 3), (1e-6, 16, 1), (0.99, 16, 16)],
)
def test_number_of_kept_patches(ratio: float, patches: int, kept: int):
    assert pruner(keep_ratio=ratio).n_kept(patches) == kept
    assert pruner(keep_ratio=ratio).n_tokens(patches) == (kept + 1 if kept < patches else patches)


@pytest.mark.parametrize(("dominant", "contextual", "tokens"), [(6, 4, 10), (6, 10, 16), (6, 0, 6), (15, 1, 16)])
def test_number_of_tokens_with_a_number_of_dominant_ones(dominant: int, contextual: int, tokens: int):
    some = pruner(dominant=dominant, contextual=contextual, merge="average")
    assert some.n_tokens(PATCHES) == some(*given()).shape[1] == tokens
    assert not some.keeps_all(PATCHES)


@pytest.mark.parametrize("dominant", [16, 17, 1000])
@pytest.mark.parametrize("contextual", [0, 1, 4])
def test_as_many_dominant_tokens_as_patches_leave_nothing_to_fuse(dominant: int, contextual: int):
    every = pruner(dominant=dominant, contextual=contextual, merge="sum")
    assert every.keeps_all(PATCHES)
    assert every.n_tokens(PATCHES) == PATCHES
    assert torch.equal(every(*given()), given()[0])


@pytest.mark.parametrize("contextual", [3, 16, 99])
def test_more_fused_tokens_than_are_left(contextual: int):
    # 14 of 16 are kept, 2 are left.
    message = f"visual-fused = {contextual}: of n = 16 patches K = 14 .* 2 left, too few for k = {contextual} .* 0 to 2"
    for call in (lambda p: p.n_tokens(PATCHES), lambda p: p(*given())):
        with pytest.raises(ConfigError, match=message):
            call(pruner(dominant=14, contextual=contextual, merge="average"))


def test_keeps_the_most_attended_in_order_and_fuses_the_rest():
    # Patches 10, 20, 30, 40 of one number. Attention keeps patches 1 and 3 (of 0-3).
    # The rest: 10 with weight .1/(.1+.3) = 1/4 and 30 with 3/4 → 25.
    tokens, attention = torch.tensor([[[10.0], [20.0], [30.0], [40.0]]]), torch.tensor([[0.1, 0.4, 0.3, 0.5]])
    pruned = pruner()(tokens, attention, tokens, images(1))
    torch.testing.assert_close(pruned, torch.tensor([[[20.0], [40.0], [25.0]]]))
    assert pruner(contextual=0)(tokens, attention, tokens, images(1)).flatten().tolist() == [20.0, 40.0]


def test_equal_attention_keeps_the_earlier_patch_and_underflow_gives_the_plain_mean():
    tokens = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
    pruned = pruner()(tokens, torch.zeros(1, 4), tokens, images(1))
    assert pruned.flatten().tolist() == [1.0, 2.0, 6.0]  # (4 + 8) / 2


def kept_places(some: VisualTokenPruner, n: int = N) -> list[list[int]]:
    """Which patches each of n images keeps: a patch is its own number."""
    _, attention, keys, pixels = given(n)
    places = torch.arange(PATCHES, dtype=torch.float32).expand(n, -1).unsqueeze(-1)
    return some(places, attention, keys, pixels)[:, : some.n_kept(PATCHES), 0].int().tolist()


def test_the_random_control_keeps_the_same_patches_of_every_image():
    control = pruner(score="random")
    first, *others = kept_places(control)
    assert all(other == first for other in others)
    assert first == sorted(first)
    assert len(set(first)) == 8
    assert kept_places(control, n=1) == [first]
    assert set(kept_places(pruner(score="random", keep_ratio=0.25))[0]) < set(first)  # one permutation
    chosen = kept_places(pruner())
    assert len({tuple(row) for row in chosen}) == N  # attention's choice is an image's own
    assert first not in chosen
    assert kept_places(pruner(score="random", seed=1))[0] != first


def test_the_random_control_changes_the_choice_alone():
    # With patches in the order of the control's permutation of attention, the fused token is the same formula: it
    # weighs what is left by attention, not by the permutation.
    tokens, attention, keys, pixels = given()
    control = pruner(score="random")
    kept = set(kept_places(control)[0])
    rest = [p for p in range(PATCHES) if p not in kept]
    weights = attention[:, rest] / attention[:, rest].sum(dim=1, keepdim=True)
    expected = torch.einsum("nr,nrd->nd", weights, tokens[:, rest])
    torch.testing.assert_close(control(tokens, attention, keys, pixels)[:, -1], expected)


@pytest.mark.parametrize("merge", ["average", "sum", "attention"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tokens(merge: Any, dtype: torch.dtype):
    tokens, attention, keys, pixels = given()
    some = pruner(merge=merge)
    pruned = some(tokens.to(dtype), attention, keys, pixels)
    assert pruned.dtype == dtype
    # Kept ones are rounded once, fused ones, of numbers up to 4, twice: before the sum in float32 and after it.
    torch.testing.assert_close(pruned.float(), some(tokens, attention, keys, pixels), rtol=0.02, atol=0.02)


def test_choice_and_weights_carry_no_gradient_but_tokens_do():
    tokens, attention, keys, pixels = given()
    for merge in ("average", "sum", "attention"):
        leaves = [x.clone().requires_grad_() for x in (tokens, attention, keys)]
        pruner(merge=merge)(leaves[0], leaves[1], leaves[2], pixels).sum().backward()
        assert leaves[0].grad is not None
        assert leaves[1].grad is None
        assert leaves[2].grad is None


def test_fusion_noise_is_added_to_fused_tokens_alone():
    tokens, attention, keys, pixels = given()
    clean, noisy = pruner(merge="average", contextual=2), pruner(merge="average", contextual=2, fusion_noise_std=0.1)
    difference = noisy(tokens, attention, keys, pixels) - clean(tokens, attention, keys, pixels)
    assert not difference[:, :8].any()
    torch.testing.assert_close(difference[:, 8:], fusion_noise(pixels, (2, DIM), 0.1, 0).float(), rtol=0, atol=1e-6)
    assert "NO ε" in " ".join((VisualTokenPruner.__doc__ or "").split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[({"keep_ratio": r}, r"visual-keep-ratio = .*in \(0, 1\]") for r in (0.0, -0.5, 1.5, float("nan"))],
        ({"dominant": 0}, "dominant = 0"),
        ({"dominant": 4, "keep_ratio": 0.5}, "one of keep_ratio and dominant"),
        ({"keep_ratio": None}, "one of keep_ratio and dominant"),
        ({"layer": 0}, "visual-layer = 0: .*choose 1 or more"),
        ({"contextual": -1}, "visual-fused = -1: must be at least 0"),
        ({"contextual": 2}, 'visual-merge = "attention" makes one token, pruning.visual-fused = 2'),
        ({"merge": "mean"}, "visual-merge = 'mean'; allowed: average, sum, attention"),
        ({"score": "norm"}, "visual-score = 'norm'; allowed: attention, random"),
        *[({"fusion_noise_std": s}, "fusion noise = .*>= 0") for s in (-0.1, float("nan"), float("inf"))],
        ({"fusion_noise_std": 0.1, "contextual": 0}, "fusion-noise has no effect"),
    ],
)
def test_arguments_out_of_range(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        pruner(**changes)


# Hidden states of 3 blocks, counted from either end: 1 2 3 and -3 -2 -1.
@pytest.mark.parametrize(("layer", "depth"), [(1, 1), (2, 2), (3, 3), (-1, 3), (-2, 2), (-3, 1)])
def test_layers_are_counted_as_transformers_counts_hidden_states(layer: int, depth: int):
    assert depth_of(layer, 3, behind=0) == depth


@pytest.mark.parametrize(
    ("layer", "blocks", "behind", "message"),
    [
        (4, 3, 0, "layer = 4: this image tower has 3 blocks; choose 1 to 3 (or -3 to -1), or set"),
        (-4, 3, 0, "layer = -4: this image tower has 3 blocks; choose 1 to 3 (or -3 to -1), or set"),
        (
            3,
            3,
            1,
            "layer = 3: this image tower has 3 blocks, and at least one must follow; choose 1 to 2 (or -3 to -2",
        ),
        (-1, 3, 1, "layer = -1: this image tower has 3 blocks, and at least one must follow; choose 1 to 2"),
        (1, 1, 1, "layer = 1: this image tower has 1 block, and at least one must follow; set pruning.visual-keep"),
    ],
)
def test_layers_that_a_tower_does_not_have(layer: int, blocks: int, behind: int, message: str):
    with pytest.raises(ConfigError, match=re.escape(f"pruning.visual-{message}")):
        depth_of(layer, blocks, behind=behind)


def test_equal_pruners_are_one_key_and_every_field_shows_in_it():
    # Backbones are cached by the pruner, features by its repr.
    assert hash(pruner()) == hash(pruner())
    assert all(f"{field.name}=" in repr(pruner()) for field in dataclasses.fields(VisualTokenPruner))
