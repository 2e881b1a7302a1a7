"""Row i of the gradients is example i's own gradient, on every tower, however the rows are split."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fl_dualpriv.learners.context import PromptedText
from fl_dualpriv.learners.head import LowRankHead
from fl_dualpriv.learners.rows import (
    Batches,
    gradient_blocks,
    largest,
    per_example_gradients,
    summed_gradient,
)
from fl_dualpriv.models.open_clip import load_backbone
from fl_dualpriv.privacy.clipping import clip_rows, clipped_sum
from fl_dualpriv.privacy.step import clipped_sums
from fl_dualpriv.towers.plain import FunctionTower
from tests.guarantees.objective_checks import batch_rows
from tests.guarantees.step_checks import rows_do_not_mix

NAMES = ("cat", "red fire truck", "dog", "the great wall of china", "tree")
SCALE = 20.0
WHOLE = 2**30

Records = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def text(tiny_clip_dir: Path) -> PromptedText:
    return PromptedText(load_backbone(f"local-dir:{tiny_clip_dir}", "", "cpu", None, "fp32"), NAMES, "a photo of a {}")


@pytest.fixture(scope="module")
def batch() -> Records:
    generator = torch.Generator().manual_seed(1)
    features = torch.nn.functional.normalize(torch.randn(9, 32, generator=generator), dim=1)
    return features, torch.randint(0, len(NAMES), (9,), generator=generator)


def near(text: PromptedText, seed: int) -> Tensor:
    """A prompt near the template's."""
    return text.template_context(4) + 0.05 * torch.randn(4, 32, generator=torch.Generator().manual_seed(seed))


def rows_of(
    text: PromptedText,
    prompt: Tensor,
    x: Tensor,
    y: Tensor,
    workspace: int = WHOLE,
    top_m: int = 0,
    *,
    apart: bool = False,
) -> Tensor:
    features, batches = text.tower(prompt[None]), Batches.of((x, y))
    (rows,) = per_example_gradients(features, batches, SCALE, workspace_bytes=workspace, top_m=top_m, apart=apart)
    assert not rows[len(y) :].any()  # padding is exactly zero
    return rows[: len(y)]


def loop_of_one(text: PromptedText, prompt: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The slow, obvious form: one forward and one backward through open_clip's own tower per example."""
    rows = []
    for i in range(len(y)):
        leaf = prompt.clone().requires_grad_(True)
        logits = SCALE * x[i : i + 1] @ text.plain_tower.features(leaf).T
        rows.append(torch.autograd.grad(torch.nn.functional.cross_entropy(logits, y[i : i + 1]), leaf)[0])
    return torch.stack(rows)


def close(found: Tensor, expected: Tensor) -> bool:
    """float32 through two layers: 1e-5 relative to the largest entry."""
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


def test_rows_equal_a_loop_of_one(text: PromptedText, batch: Records) -> None:
    prompt = near(text, 2)
    assert close(rows_of(text, prompt, *batch), loop_of_one(text, prompt, *batch))


def test_prompts_side_by_side_equal_each_alone_with_unequal_batches(text: PromptedText, batch: Records) -> None:
    x, y = batch
    prompts = [near(text, seed) for seed in range(4)]
    sizes = (9, 5, 2, 0)
    side = Batches.of(*[(x[:n], y[:n]) for n in sizes])
    features = text.tower(torch.stack(prompts))
    whole = per_example_gradients(features, side, SCALE, workspace_bytes=WHOLE)
    for workspace in (WHOLE, 16 * features.bytes_per_row, 1):
        together = per_example_gradients(features, side, SCALE, workspace_bytes=workspace)
        assert torch.equal(together, whole)
        for rows, prompt, n in zip(together, prompts, sizes, strict=True):
            assert not rows[n:].any()  # padding is exactly zero
            if n:
                assert close(rows[:n], loop_of_one(text, prompt, x[:n], y[:n]))


def test_clipped_sums_are_those_of_the_rows(text: PromptedText, batch: Records) -> None:
    x, y = batch
    bad = x.clone()
    bad[1] = float("nan")
    side = Batches.of((bad, y), (x[:5], y[:5]), (x[:0], y[:0]))
    features = text.tower(torch.stack([near(text, seed) for seed in range(3)]))
    rows = per_example_gradients(features, side, SCALE, workspace_bytes=WHOLE)
    found = clipped_sums(batch_rows(features, side, SCALE, workspace_bytes=1), 0.3)
    for one, own, n in zip(found, rows, (9, 5, 0), strict=True):
        assert one.sensitivity == 0.3
        assert torch.allclose(one.value, clipped_sum(own[:n], 0.3).value, rtol=0, atol=1e-12)
    assert not found[2].value.any()


def test_what_is_held_does_not_grow_with_a_batch(text: PromptedText, batch: Records) -> None:
    """A batch's size is private: whether a cohort fits into memory must not depend on it."""
    x, y = batch
    features = text.tower(torch.stack([near(text, 0), near(text, 1)]))
    shapes = []
    for times in (1, 20):
        side = Batches.of((x.repeat(times, 1), y.repeat(times)), (x[:2], y[:2]))
        blocks = gradient_blocks(features, side, SCALE, workspace_bytes=WHOLE)
        shapes.append({tuple(rows.shape[1:]) for _, _, rows in blocks})
    assert shapes[0] == shapes[1]


def test_the_summed_gradient_is_the_sum_of_the_rows(text: PromptedText, batch: Records) -> None:
    x, y = batch
    prompts = torch.stack([near(text, 1), near(text, 2)])
    side = Batches.of((x, y), (x[:3], y[:3]))
    features = text.tower(prompts)
    rows = per_example_gradients(features, side, SCALE, workspace_bytes=WHOLE)
    assert close(summed_gradient(features, side, SCALE), rows.sum(dim=1))


@pytest.mark.parametrize("top_m", [0, 2])
def test_changing_one_example_leaves_the_other_rows_bitwise_alone(
    text: PromptedText, batch: Records, top_m: int
) -> None:
    x, y = batch
    rows_do_not_mix(text.tower, near(text, 1), x, y, top_m)


@pytest.mark.parametrize("top_m", [0, 2])
def test_removing_one_example_does_not_move_the_others(text: PromptedText, top_m: int) -> None:
    """Bit by bit on any machine, with each example in products of its own; of the faster form `row_check` decides."""
    generator = torch.Generator().manual_seed(5)
    x = torch.nn.functional.normalize(torch.randn(40, 32, generator=generator), dim=1)
    y = torch.randint(0, len(NAMES), (40,), generator=generator)
    whole = rows_of(text, near(text, 1), x, y, top_m=top_m, apart=True)
    for gone in (0, 7, 8, 39):
        keep = torch.arange(40) != gone
        rest = rows_of(text, near(text, 1), x[keep], y[keep], top_m=top_m, apart=True)
        assert torch.equal(rest, whole[keep])
        assert torch.equal(clip_rows(rest, 0.5)[0], clip_rows(whole, 0.5)[0][keep])


@pytest.mark.parametrize("top_m", [0, 2])
def test_rows_apart_are_the_rows(text: PromptedText, batch: Records, top_m: int) -> None:
    prompt = near(text, 2)
    assert close(rows_of(text, prompt, *batch, top_m=top_m, apart=True), rows_of(text, prompt, *batch, top_m=top_m))


@pytest.mark.parametrize("top_m", [0, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_example_spoils_its_own_row_and_contributes_zero(
    text: PromptedText, batch: Records, value: float, top_m: int
) -> None:
    x, y = batch
    bad = x.clone()
    bad[5] = value
    rows = rows_of(text, near(text, 1), bad, y, top_m=top_m)
    assert not torch.isfinite(rows[5]).all()
    others = [i for i in range(len(y)) if i != 5]
    good = rows_of(text, near(text, 1), x, y, top_m=top_m)
    assert torch.equal(rows[others], good[others])
    expected = clipped_sum(good[others], 0.1).value
    assert torch.allclose(clipped_sum(rows, 0.1).value, expected, rtol=0, atol=1e-12)


def test_no_examples_give_no_rows(text: PromptedText, batch: Records) -> None:
    x, y = batch
    rows = rows_of(text, near(text, 1), x[:0], y[:0])
    assert rows.shape == (0, 4, 32)
    assert torch.equal(clipped_sum(rows, 1.0).value, torch.zeros(4, 32, dtype=torch.float64))


# --- top-m ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_m", [2, 3, 4])
def test_top_m_back_propagates_the_largest_residuals_balanced(text: PromptedText, batch: Records, top_m: int) -> None:
    x, y = batch
    prompt = near(text, 3)
    leaf = prompt.clone().requires_grad_(True)
    classes = text.plain_tower.features(leaf)
    expected = []
    for one, label in zip(x, y.tolist(), strict=True):
        residual = torch.softmax(SCALE * classes.detach() @ one, dim=0)
        residual[label] -= 1.0
        kept = sorted(range(len(NAMES)), key=lambda c: -float(residual[c].abs()))[:top_m]
        assert label in kept
        weights = torch.zeros(len(NAMES))
        for c in kept:
            weights[c] = residual[c]
        positive = weights.clamp_min(0.0)
        weights = torch.where(weights > 0, weights * -residual[label] / positive.sum(), weights)
        assert abs(float(weights.sum())) < 1e-6
        expected.append(torch.autograd.grad(classes, leaf, SCALE * weights[:, None] * one, retain_graph=True)[0])
    assert close(rows_of(text, prompt, x, y, top_m=top_m), torch.stack(expected))


def test_residuals_that_tie_or_vanish_are_balanced_too() -> None:
    certain = torch.zeros(3)  # softmax is one-hot: nothing to learn
    two = torch.tensor([0.0, 0.25, -0.25])  # one rival: equal in absolute value
    lost = torch.tensor([float("nan")] * 3)
    kept, classes = largest(torch.stack([certain, two, lost]), 2)
    assert not kept[0].any()
    assert kept[1].tolist() == [-0.25, 0.25]
    assert classes[1].tolist() == [2, 1]
    assert torch.isnan(kept[2]).all()


def test_top_m_of_all_classes_is_exact(text: PromptedText, batch: Records) -> None:
    exact, all_of_them = (rows_of(text, near(text, 3), *batch, top_m=m) for m in (0, len(NAMES)))
    assert torch.equal(exact, all_of_them)


# --- other exact forms ------------------------------------------------------------------------------------------------


def test_vmap_of_grad_agrees(text: PromptedText, batch: Records) -> None:
    """The other exact form: torch.func vmap(grad) of the loss on one example."""
    from torch.func import grad, vmap

    x, y = batch
    prompt = near(text, 1)

    def loss(p: Tensor, one: Tensor, label: Tensor) -> Tensor:
        logits = SCALE * one @ text.plain_tower.features(p).T
        return torch.nn.functional.cross_entropy(logits[None], label[None])

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = vmap(grad(loss), in_dims=(None, 0, 0))(prompt, x, y)
    assert close(rows_of(text, prompt, x, y), expected)


def test_opacus_agrees(text: PromptedText, batch: Records) -> None:
    """Opacus' per-example gradients of the plain tower, the prompt a parameter of the top module.

    The frozen tower hides in a tuple: Opacus refuses buffers in a child, and would differentiate its parameters.
    """
    from opacus.grad_sample import GradSampleModule

    class Classifier(torch.nn.Module):
        def __init__(self, prompt: Tensor) -> None:
            super().__init__()
            self.prompt = torch.nn.Parameter(prompt.clone())
            self.hidden = (text.plain_tower,)

        def forward(self, x: Tensor) -> Tensor:
            return SCALE * x @ self.hidden[0].features(self.prompt).T

    x, y = batch
    prompt = near(text, 1)
    model = GradSampleModule(Classifier(prompt), loss_reduction="sum")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    expected = model._module.prompt.grad_sample
    assert isinstance(expected, Tensor)
    assert close(rows_of(text, prompt, x, y), expected)


@pytest.mark.parametrize("top_m", [0, 2])
def test_the_head_equals_autograd(top_m: int) -> None:
    generator = torch.Generator().manual_seed(4)
    zero_shot = torch.nn.functional.normalize(torch.randn(5, 8, generator=generator), dim=1)
    head = LowRankHead(zero_shot)
    prompts = torch.randn(3, 2, 13, generator=generator)

    def plain(prompt: Tensor) -> Tensor:
        return torch.nn.functional.normalize(zero_shot + prompt[:, :5].T @ prompt[:, 5:], dim=1)

    oracle = FunctionTower(plain)
    records = [
        (torch.nn.functional.normalize(torch.randn(n, 8, generator=generator), dim=1), torch.arange(n) % 5)
        for n in (6, 4, 1)
    ]
    found, expected = (
        per_example_gradients(t(prompts), Batches.of(*records), SCALE, workspace_bytes=WHOLE, top_m=top_m)
        for t in (head, oracle)
    )
    assert close(found, expected)
    assert close(head.values(prompts), oracle.values(prompts))
    start = head.initial(2, 0)
    assert torch.allclose(head.values(start[None])[0], zero_shot)  # V = 0: the start is zero-shot
    assert start.shape == head.shape(2) == (2, 13)
