"""Class sums: by hand, against the gradient that they are, and what one record moves."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import fl_dualpriv.privacy.step
from fl_dualpriv.learners.base import ClientData
from fl_dualpriv.learners.prototypes import PrototypeObjective, prototype_directions
from fl_dualpriv.privacy.clipping import Arithmetic, clip_rows
from fl_dualpriv.privacy.step import clipped_sums
from tests.guarantees import objective_checks

N_CLS, DIM = 3, 4
OBJECTIVE = PrototypeObjective(shape=(N_CLS, DIM))


def records(count: int, seed: int = 0) -> ClientData:
    g = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(count, DIM, generator=g), dim=1)
    return ClientData(features=features, labels=torch.randint(0, N_CLS, (count,), generator=g))


def test_by_hand():
    # Class 0 holds (1, 0, ..) and (0, 1, ..): their mean points at 45 degrees. Class 2 holds one, class 1 nothing.
    features = torch.eye(DIM)[[0, 1, 3]]
    data = ClientData(features=features, labels=torch.tensor([0, 0, 2]))
    gradient = objective_checks.clipped_sum(OBJECTIVE, torch.zeros(N_CLS, DIM), data, clip=1.0).float()
    assert torch.equal(-gradient, torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]))
    half = 0.5**0.5
    found = prototype_directions(torch.zeros(N_CLS, DIM) - gradient)
    torch.testing.assert_close(found, torch.tensor([[half, half, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1.0]]))


def test_gradients_are_those_of_autograd():
    def loss(w: Tensor, data: ClientData) -> Tensor:
        return -(w[data.labels] * data.features).sum()

    objective_checks.gradients_are_autograds(OBJECTIVE, torch.randn(N_CLS, DIM), records(5), loss)


def test_a_record_of_unit_norm_moves_the_sum_by_one():
    data = records(5)
    whole = objective_checks.clipped_sum(OBJECTIVE, torch.zeros(N_CLS, DIM), data, clip=1.0)
    rest = objective_checks.clipped_sum(
        OBJECTIVE, torch.zeros(N_CLS, DIM), objective_checks.of(data, [0, 1, 2, 3]), 1.0
    )
    assert float((whole - rest).norm()) == pytest.approx(1.0, abs=1e-6)


def test_a_record_moves_the_sum_by_c_at_most_and_a_bad_one_by_nothing():
    objective_checks.one_record_moves_the_sum_by_at_most_c(OBJECTIVE, torch.zeros(N_CLS, DIM), records(6))
    objective_checks.a_bad_record_is_a_zero(OBJECTIVE, torch.zeros(N_CLS, DIM), records(6), "features")


def clip_the_mean(rows: Tensor, clip_norm: float, arithmetic: Arithmetic) -> Tensor:
    return (clip_rows(rows.mean(dim=0, keepdim=True), clip_norm)[0] * len(rows)).expand_as(rows) / len(rows)


def clip_nothing(rows: Tensor, clip_norm: float, arithmetic: Arithmetic) -> Tensor:
    return rows.double()


@pytest.mark.parametrize("bug", [clip_the_mean, clip_nothing], ids=lambda bug: bug.__name__)
def test_another_clip_is_caught(monkeypatch: pytest.MonkeyPatch, bug: Callable[..., Tensor]):
    monkeypatch.setattr(fl_dualpriv.privacy.step, "bounded_rows", bug)
    with pytest.raises(AssertionError, match="a record moves the sum"):
        objective_checks.one_record_moves_the_sum_by_at_most_c(OBJECTIVE, torch.zeros(N_CLS, DIM), records(6))


def test_clients_do_not_mix_and_masks_come_before_the_clip():
    data = [records(3, 1), records(9, 2)]
    objective_checks.clients_do_not_mix(OBJECTIVE, torch.zeros(2, N_CLS, DIM), data)
    masks = torch.ones(1, N_CLS, DIM)
    masks[:, :, 0] = 0
    gradients = OBJECTIVE.bind(data[:1]).gradients(torch.zeros(1, N_CLS, DIM), [np.arange(3)])
    (found,) = clipped_sums(gradients, 10.0, "float", masks)
    (whole,) = clipped_sums(gradients, 10.0, "float")
    torch.testing.assert_close(found.value, whole.value * masks[0])
