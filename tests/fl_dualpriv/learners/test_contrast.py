"""FedPGP's contrastive term: by hand, and its gradients at both prompts."""

import math

import pytest
import torch
from torch import Tensor

from fl_dualpriv.learners.contrast import PromptContrast, contrastive_loss
from fl_dualpriv.towers.plain import FunctionTower

WEIGHT, TEMPERATURE = 0.7, 0.5


def features(prompt: Tensor) -> Tensor:
    return torch.nn.functional.normalize(prompt.sin(), dim=-1)


def test_by_hand():
    # Class 0: z_G = z_C, z_P at a right angle: log(1 + e^(0 - 2)). Class 1: z_G = -z_C, z_P = z_G: log(1 + e^(2 + 2)).
    words, shared = torch.eye(2), torch.tensor([[[1.0, 0], [0, -1]]])
    personal = torch.tensor([[[0.0, 1], [0, -1]]])
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(4))) / 2
    assert float(contrastive_loss(shared, personal, words, 0.5)) == pytest.approx(expected, rel=1e-6)
    # Where global and personal prompt are one, and one with the words, it says nothing: log 2.
    assert float(contrastive_loss(words[None], words[None], words, 0.5)) == pytest.approx(math.log(2))


def test_gradients_at_both_prompts():
    g = torch.Generator().manual_seed(0)
    words = torch.nn.functional.normalize(torch.randn(3, 5, generator=g), dim=-1)
    shared, effective = torch.randn(2, 2, 3, 5, generator=g).unbind()
    contrast = PromptContrast(tower=FunctionTower(features), words=words, weight=WEIGHT, temperature=TEMPERATURE)
    found = contrast.gradients(shared, effective)
    for client in range(2):
        leaves = [p[client].clone().requires_grad_(True) for p in (shared, effective)]
        near, away = (features(leaf)[None] for leaf in leaves)
        loss = WEIGHT * contrastive_loss(near, away, words, TEMPERATURE)
        for own, expected in zip(found, torch.autograd.grad(loss.sum(), leaves), strict=True):
            torch.testing.assert_close(own[client], expected)
