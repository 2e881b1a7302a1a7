"""Row i of the gradients is example i's own gradient, on every tower, whatever the microbatch."""

from pathlib import Path

import pytest
import torch

from fl_dualpriv.backbones.open_clip import load_backbone
from fl_dualpriv.privacy.clipping import clipped_sum
from fl_dualpriv.privacy.per_example import per_example_gradients, summed_gradient
from fl_dualpriv.prompts.learner import PromptedText

NAMES = ("cat", "red fire truck", "dog", "the great wall of china", "tree")
SCALE = 20.0


@pytest.fixture(scope="module")
def text(tiny_clip_dir: Path) -> PromptedText:
    backbone = load_backbone(f"local-dir:{tiny_clip_dir}", "", "cpu", 1.0, 2)
    return PromptedText(backbone, NAMES, "a photo of a {}")


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.nn.functional.normalize(torch.randn(9, 32, generator=generator), dim=1)
    return features, torch.randint(0, len(NAMES), (9,), generator=generator)


def plain_features(text: PromptedText, prompt: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(text.plain_tower(prompt), dim=-1)


def loop_of_one(text: PromptedText, prompt: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The slow, obvious form: one forward and one backward through open_clip's own tower per example."""
    rows = []
    for i in range(len(y)):
        leaf = prompt.clone().requires_grad_(True)
        logits = SCALE * x[i : i + 1] @ plain_features(text, leaf).T
        rows.append(torch.autograd.grad(torch.nn.functional.cross_entropy(logits, y[i : i + 1]), leaf)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("microbatch", [1, 4, 64])
def test_rows_equal_a_loop_of_one(
    text: PromptedText, batch: tuple[torch.Tensor, torch.Tensor], microbatch: int
) -> None:
    x, y = batch
    prompt = text.template_context(4) + 0.05 * torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    rows = per_example_gradients(text.class_features, prompt, x, y, SCALE, microbatch)
    expected = loop_of_one(text, prompt, x, y)
    # float32 through two layers: 1e-5 relative to the largest entry
    assert (rows - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_sum_of_rows_is_the_batch_gradient(text: PromptedText, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = batch
    prompt = text.template_context(4)
    rows = per_example_gradients(text.class_features, prompt, x, y, SCALE, 64)
    summed = summed_gradient(text.class_features, prompt, x, y, SCALE)
    assert (rows.sum(0) - summed).abs().max() <= 1e-5 * summed.abs().max()


def test_changing_one_example_leaves_the_other_rows_bitwise_alone(
    text: PromptedText, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, y = batch
    prompt = text.template_context(4)
    rows = per_example_gradients(text.class_features, prompt, x, y, SCALE, 64)
    changed_x, changed_y = x.clone(), y.clone()
    changed_x[3], changed_y[3] = -x[3], (y[3] + 1) % len(NAMES)
    changed = per_example_gradients(text.class_features, prompt, changed_x, changed_y, SCALE, 64)
    others = [i for i in range(len(y)) if i != 3]
    assert torch.equal(rows[others], changed[others])
    assert not torch.allclose(rows[3], changed[3])


def test_a_nan_example_spoils_its_own_row_and_contributes_zero(
    text: PromptedText, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, y = batch
    prompt = text.template_context(4)
    bad = x.clone()
    bad[5] = float("nan")
    rows = per_example_gradients(text.class_features, prompt, bad, y, SCALE, 64)
    assert torch.isnan(rows[5]).any()
    others = [i for i in range(len(y)) if i != 5]
    good = per_example_gradients(text.class_features, prompt, x, y, SCALE, 64)
    assert torch.equal(rows[others], good[others])
    expected = clipped_sum(good[others], 0.1).value
    assert torch.allclose(clipped_sum(rows, 0.1).value, expected, rtol=0, atol=1e-12)


def test_no_examples_give_no_rows(text: PromptedText) -> None:
    prompt = text.template_context(4)
    rows = per_example_gradients(
        text.class_features, prompt, torch.zeros(0, 32), torch.zeros(0, dtype=torch.long), SCALE, 64
    )
    assert rows.shape == (0, 4, 32)
    assert torch.equal(clipped_sum(rows, 1.0).value, torch.zeros(4, 32, dtype=torch.float64))


def test_vmap_of_grad_agrees(text: PromptedText, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The other exact form: torch.func vmap(grad) of the loss on one example."""
    from torch.func import grad, vmap

    x, y = batch
    prompt = text.template_context(4)

    def loss(p: torch.Tensor, one: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        logits = SCALE * one @ text.class_features(p).T
        return torch.nn.functional.cross_entropy(logits[None], label[None])

    expected = vmap(grad(loss), in_dims=(None, 0, 0))(prompt, x, y)
    rows = per_example_gradients(text.class_features, prompt, x, y, SCALE, 64)
    assert (rows - expected).abs().max() <= 1e-5 * expected.abs().max()
