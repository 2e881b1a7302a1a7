"""Softmax regression: its gradient by hand and by autograd, its clip, and where it starts."""

import pytest
import torch
from torch import Tensor

import fl_dualpriv.privacy.step
from fl_dualpriv.learners.base import ClientData
from fl_dualpriv.learners.linear_probe import LinearProbe, ProbeObjective, with_bias
from fl_dualpriv.privacy.clipping import Arithmetic, clip_rows
from tests.guarantees import objective_checks

N_CLS, DIM, SCALE = 3, 4, 5.0


def objective(scale: float = SCALE, top_m: int = 0) -> ProbeObjective:
    tower = LinearProbe(N_CLS, DIM)
    return ProbeObjective(tower=tower, logit_scale=scale, top_m=top_m, noise_space="prompt", workspace_bytes=2**20)


def records(count: int, seed: int = 0) -> ClientData:
    g = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(count, DIM, generator=g), dim=1)
    return ClientData(features=features, labels=torch.randint(0, N_CLS, (count,), generator=g))


def weights(seed: int = 1) -> Tensor:
    return 0.3 * torch.randn(N_CLS, DIM + 1, generator=torch.Generator().manual_seed(seed))


def loss(w: Tensor, data: ClientData) -> Tensor:
    logits = SCALE * (data.features @ w[:, :-1].T + w[:, -1])
    return torch.nn.functional.cross_entropy(logits, data.labels, reduction="sum")


def test_by_hand():
    # W = 0: every class has probability 1/3; s (p - y) x^T with s = 6, y = 1, x = (1, 0, 0, 0) and a bias of 1
    data = ClientData(features=torch.eye(DIM)[:1], labels=torch.tensor([1]))
    found = objective_checks.clipped_sum(objective(6.0), torch.zeros(N_CLS, DIM + 1), data, clip=100.0)
    x = torch.tensor([1.0, 0, 0, 0, 1])
    torch.testing.assert_close(found.float(), torch.stack([2 * x, -4 * x, 2 * x]))


def test_gradients_are_those_of_autograd():
    objective_checks.gradients_are_autograds(objective(), weights(), records(5), loss)


def test_a_record_moves_the_sum_by_c_at_most_and_a_bad_one_by_nothing():
    objective_checks.one_record_moves_the_sum_by_at_most_c(objective(), weights(), records(6))
    objective_checks.a_bad_record_is_a_zero(objective(), weights(), records(6), "features")


def test_clipping_each_class_by_itself_is_caught(monkeypatch: pytest.MonkeyPatch):
    def by_class(rows: Tensor, clip_norm: float, arithmetic: Arithmetic) -> Tensor:
        return clip_rows(rows.flatten(0, 1), clip_norm)[0].unflatten(0, rows.shape[:2])

    monkeypatch.setattr(fl_dualpriv.privacy.step, "bounded_rows", by_class)
    with pytest.raises(AssertionError, match="a record moves the sum"):
        objective_checks.one_record_moves_the_sum_by_at_most_c(objective(), weights(), records(6))


def test_clients_do_not_mix():
    prompts = torch.stack([weights(1), weights(2), weights(3)])
    objective_checks.clients_do_not_mix(objective(), prompts, [records(3, 1), records(9, 2), records(5, 3)])


def test_the_largest_residuals_alone():
    # Two residuals of three: the true class keeps its own, the largest other one balances it, the third row is zero.
    data = records(1)
    found = objective_checks.clipped_sum(objective(top_m=2), weights(), data, clip=100.0)
    whole = objective_checks.clipped_sum(objective(), weights(), data, clip=100.0)
    own = int(data.labels[0])
    torch.testing.assert_close(found[own], whole[own])
    assert int((found.norm(dim=1) > 0).sum()) == 2
    torch.testing.assert_close(found.sum(dim=0), torch.zeros(DIM + 1, dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_record_that_is_not_finite_stays_so_with_a_bias():
    data = ClientData(features=torch.full((1, DIM), torch.nan), labels=torch.tensor([0]))
    assert torch.isnan(with_bias(data).features[0, :DIM]).all()
