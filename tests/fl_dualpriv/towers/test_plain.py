"""Autograd towers: batched rows are single backward passes, and no row sees another."""

from pathlib import Path

import pytest
import torch

from fl_dualpriv.learners.context import PromptedText
from fl_dualpriv.models.open_clip import load_backbone
from fl_dualpriv.towers.plain import FunctionTower, PlainTower

NAMES = ("cat", "red fire truck", "dog", "the great wall of china", "tree")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def plain(tiny_clip_dir: Path) -> PlainTower:
    return PromptedText(load_backbone(f"local-dir:{tiny_clip_dir}", "", "cpu"), NAMES, "a photo of a {}").plain_tower


@pytest.mark.filterwarnings("error::UserWarning")  # such as a batched backward that falls back to a loop
def test_rows_are_single_backward_passes(plain: PlainTower):
    prompts, cotangents = 0.1 * normal(2, 4, 32), normal(2, 3, 5, 32, seed=1)
    features = plain(prompts)
    rows = features.vjp(cotangents)
    assert rows.shape == (2, 3, 4, 32)
    assert not rows.requires_grad
    assert not features.values.requires_grad
    torch.testing.assert_close(features.values.norm(dim=-1), torch.ones(2, 5))
    torch.testing.assert_close(features.values, plain.values(prompts))  # another attention kernel, without a graph
    for prompt, cotangent, row in zip(prompts, cotangents, rows, strict=True):
        for one, expected in zip(cotangent, row, strict=True):
            leaf = prompt.clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad((plain.features(leaf) * one).sum(), leaf)
            assert (expected - gradient).abs().max() <= 1e-5 * gradient.abs().max()


def test_some_classes_are_all_classes_with_zeros(plain: PlainTower):
    features = plain(0.1 * normal(2, 4, 32))
    classes = torch.tensor([[[0, 3], [4, 1], [2, 0]], [[1, 2], [3, 4], [0, 1]]])
    some = normal(2, 3, 2, 32, seed=1)
    whole = torch.zeros(2, 3, 5, 32)
    for k in range(2):
        for b in range(3):
            whole[k, b, classes[k, b]] = some[k, b]
    assert torch.equal(features.vjp_some(some, classes), features.vjp(whole))


def test_narrow_is_a_view_of_the_same_pass(plain: PlainTower):
    features, cotangents = plain(0.1 * normal(3, 4, 32)), normal(3, 2, 5, 32, seed=1)
    assert torch.equal(features.narrow(1, 3).values, features.values[1:])
    assert torch.equal(features.narrow(1, 3).vjp(cotangents[1:]), features.vjp(cotangents)[1:])


def test_no_rows_and_bad_rows(plain: PlainTower):
    features, cotangents = plain(0.1 * normal(1, 4, 32)), normal(1, 3, 5, 32, seed=1)
    assert features.vjp(cotangents[:, :0]).shape == (1, 0, 4, 32)
    bad = cotangents.clone()
    bad[0, 1, 2, 3] = float("nan")
    rows, good = features.vjp(bad)[0], features.vjp(cotangents)[0]
    assert rows[1].isnan().all()
    assert torch.equal(rows[0], good[0])
    assert torch.equal(rows[2], good[2])


def test_memory_figures(plain: PlainTower):
    # Hidden values of the MLP alone: 2 layers x 5 classes x 1 + 8 + 6 tokens x 4 x 32 channels x 4 bytes.
    assert plain.bytes_per_prompt > 2 * 5 * 15 * 4 * 32 * 4
    assert plain.bytes_per_prompt < 100 * 2 * 5 * 15 * 4 * 32 * 4  # no weights in it
    row = plain(0.1 * normal(1, 4, 32)).bytes_per_row
    assert 0 < row < plain.bytes_per_prompt


def test_any_function_is_a_tower():
    matrix = normal(3, 4 * 2)
    tower = FunctionTower(lambda prompt: (matrix * prompt.flatten()).reshape(3, 8), bytes_per_prompt=7, bytes_per_row=5)
    prompts = normal(2, 4, 2, seed=1)
    features = tower(prompts)
    assert torch.equal(features.values, matrix * prompts.flatten(1)[:, None])  # as it is, not normalised
    assert torch.equal(tower.values(prompts), features.values)
    assert (tower.bytes_per_prompt, features.bytes_per_row) == (7, 5)
    cotangents = normal(2, 6, 3, 8, seed=2)
    # d sum_cj w_cj m_cj p_j / d p_j = sum_c w_cj m_cj.
    torch.testing.assert_close(features.vjp(cotangents), (cotangents * matrix).sum(2).unflatten(-1, (4, 2)))
