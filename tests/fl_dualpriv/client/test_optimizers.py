"""Optimizers on released gradients: against torch's own, and what a closed coordinate does."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from fl_dualpriv.client.optimizers import Name, Optimizer
from fl_dualpriv.client.release_memory import empty_release_memory, stack_release_memories

CLIENTS, ROWS, COLS = 2, 3, 4
GENERATOR = torch.Generator().manual_seed(0)
GRADIENTS = torch.randn(12, CLIENTS, ROWS, COLS, generator=GENERATOR)
NO_NOISE = torch.zeros(CLIENTS, 1, 1)
REMEMBERING: tuple[Name, ...] = ("momentum", "adam", "adam-corrected")


def run(
    optimizer: Optimizer, gradients: Tensor = GRADIENTS, std: Tensor = NO_NOISE, closed: Any = None
) -> tuple[list[Tensor], Any]:
    """UpdateRule of all steps, and the last history."""
    clients, rows, cols = gradients.shape[1:]
    release_memory: Any = stack_release_memories(
        [empty_release_memory(optimizer.release_memory_shapes(rows, cols))] * clients
    )
    update_rule = []
    for gradient in gradients:
        direction, release_memory = optimizer.direction(gradient, release_memory, std, closed=closed)
        update_rule.append(direction)
    return update_rule, release_memory


def torchs_own(make: Any) -> list[Tensor]:
    """Moves of a torch optimizer, as directions at learning rate 1."""
    parameter = torch.zeros(CLIENTS, ROWS, COLS, requires_grad=True)
    optimizer, moves = make([parameter]), []
    for gradient in GRADIENTS:
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        optimizer.step()
        moves.append(before - parameter.detach())
    return moves


def test_sgd_is_the_gradient_itself():
    gradient = GRADIENTS[0]
    direction, release_memory = Optimizer(name="sgd", momentum=0.9).direction(gradient, {}, NO_NOISE)
    assert direction is gradient
    assert release_memory == {}


def test_momentum_is_torchs():
    ours, _ = run(Optimizer(name="momentum", momentum=0.9))
    for one, other in zip(ours, torchs_own(lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "adam-corrected"])
def test_adam_is_torchs_and_the_correction_changes_nothing_without_noise(name: Name):
    ours, _ = run(Optimizer(name=name, momentum=0.9))
    for one, other in zip(ours, torchs_own(lambda p: torch.optim.Adam(p, lr=1.0, betas=(0.9, 0.999))), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_closed_coordinate_stands_still_and_goes_on_where_it_stopped(name: Name):
    optimizer = Optimizer(name=name, momentum=0.9)
    closed = torch.zeros(CLIENTS, ROWS, COLS, dtype=torch.bool)
    closed[:, 1] = True
    _, before = run(optimizer)
    direction, after = optimizer.direction(GRADIENTS[0], before, NO_NOISE, closed=closed)
    assert not direction[:, 1].any()
    assert bool(direction[:, [0, 2]].all())
    assert all(torch.equal(after[key][:, 1], before[key][:, 1]) for key in before)
    assert all(not torch.equal(after[key][:, 0], before[key][:, 0]) for key in before if key != "optimizer.noise")
    # As if the step had never been: the next open one is the same.
    again, _ = optimizer.direction(GRADIENTS[1], after, NO_NOISE)
    straight, _ = optimizer.direction(GRADIENTS[1], before, NO_NOISE)
    assert torch.equal(again[:, 1], straight[:, 1])


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_zero_gradient_is_not_a_closed_coordinate(name: Name):
    """Momentum moves a pruned block on unless it is frozen."""
    optimizer = Optimizer(name=name, momentum=0.9)
    _, release_memory = run(optimizer)
    direction, _ = optimizer.direction(torch.zeros(CLIENTS, ROWS, COLS), release_memory, NO_NOISE)
    assert bool(direction.all())


def noisy_gradients(steps: int, truth: Tensor, std: float) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return truth + std * torch.randn(steps, *truth.shape, generator=generator)


def test_noise_hides_scales_from_adam_and_the_correction_gives_them_back():
    """The point of DP-AdamBC: with s far above the signal, Adam is SGD; corrected it divides by the signal again."""
    truth = torch.tensor([0.1, 0.4]).expand(1, 500, 2)
    gradients, std = noisy_gradients(3000, truth, 1.0), torch.ones(1, 1, 1)

    def last_ratio(name: Name) -> float:
        """Mean directions of the large coordinates over the small ones: 4 for SGD, 1 where scales are divided out."""
        update_rule, _ = run(Optimizer(name=name, momentum=0.99), gradients, std)
        small, large = torch.stack(update_rule[-100:]).mean(dim=(0, 1, 2)).tolist()
        return large / small

    # Adam: 4 √((1 + 0.01)/(1 + 0.16)) = 3.73; the mean of 500 coordinates is good to 5 %.
    assert last_ratio("adam") == pytest.approx(3.73, rel=0.1)
    # Corrected: v̂ − Φ is the signal's square, give or take √(2 · 0.00055) = 0.033 = γ. Large: 0.4/√(0.16 ± 0.04) is
    # 1.02. Small: 0.01 ± 0.033 is under γ in three cases of four, then 0.1/√γ = 0.55; else about 0.44.
    # Together 0.52.
    assert last_ratio("adam-corrected") == pytest.approx(1.96, rel=0.1)


def test_the_correction_follows_noise_that_was_masked_away():
    """A coordinate whose noise was pruned half of the time has half of it in its second moment."""
    optimizer = Optimizer(name="adam-corrected", momentum=0.9)
    release_memory: Any = stack_release_memories([empty_release_memory(optimizer.release_memory_shapes(1, 1))])
    for step in range(1000):
        _, release_memory = optimizer.direction(
            torch.zeros(1, 1, 1), release_memory, torch.full((1, 1, 1), float(step % 2))
        )
    unbiased = float(release_memory["optimizer.noise"]) / (1 - 0.999**1000)
    assert unbiased == pytest.approx(0.5, abs=1e-3)


def test_clients_do_not_mix():
    other = GRADIENTS.clone()
    other[:, 1] = 7.0
    for name in get_args(Name):
        optimizer = Optimizer(name=name, momentum=0.9)
        one, two = run(optimizer)[0], run(optimizer, other)[0]
        assert all(torch.equal(a[0], b[0]) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_refuses_other_momenta(momentum: float):
    with pytest.raises(ValueError, match="momentum"):
        Optimizer(name="momentum", momentum=momentum)
