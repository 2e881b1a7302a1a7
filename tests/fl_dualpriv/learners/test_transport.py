"""Transport plans: their marginals, plans by hand, their optimality, and that problems do not mix."""

import pytest
import torch
from torch import Tensor

from fl_dualpriv.learners.fedotp import transport_plan


def cosines(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("mass", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("regularisation", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("iterations", [1, 100])
def test_marginals(mass: float, regularisation: float, iterations: int):
    plan = transport_plan(cosines(20, 49, 2), mass, regularisation, iterations)
    assert bool((plan >= 0).all())
    torch.testing.assert_close(plan.sum(dim=-2), torch.full((20, 2), mass / 2, dtype=torch.float64))
    assert float(plan.sum(dim=-1).max()) <= (1 + 1e-9) / 49


def test_the_last_step_hides_no_lack_of_convergence():
    # What is laid at the end is small after the usual number of iterations: the plan is what scaling leads to.
    similarity = 0.5 * cosines(20, 49, 2)  # still further apart than the patches of an image
    some, many = (transport_plan(similarity, 0.8, 0.1, count) for count in (100, 2000))
    assert float((some - many).abs().sum(dim=(-2, -1)).max()) < 0.01  # of a mass of 0.8


def test_by_hand_with_one_prompt():
    # Two patches of similarities 1 and 0, λ = 1: without bounds T is γ softmax(S) = γ (0.7311, 0.2689).
    similarity = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    share = torch.softmax(similarity[:, 0], dim=0)
    # γ = 0.6: 0.6 · 0.7311 = 0.4386 is below the bound of a half, and so it stays.
    torch.testing.assert_close(transport_plan(similarity, 0.6, 1.0, 50)[:, 0], 0.6 * share)
    # γ = 0.8: 0.585 is over the bound: the first patch is full, and the rest goes to the second.
    expected = torch.tensor([0.5, 0.3], dtype=torch.float64)
    torch.testing.assert_close(transport_plan(similarity, 0.8, 1.0, 200)[:, 0], expected)
    # γ = 1: balanced, whatever the similarities.
    torch.testing.assert_close(
        transport_plan(similarity, 1.0, 1.0, 500)[:, 0], torch.full_like(expected, 0.5), rtol=0.01, atol=0
    )


def test_by_hand_with_two_prompts():
    # Each prompt likes one patch, λ small: at γ = 1 the plan is the permutation, at γ = 1/2 half of it.
    similarity = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)
    for mass in (1.0, 0.5):
        expected = mass / 2 * torch.eye(2, dtype=torch.float64)
        torch.testing.assert_close(transport_plan(similarity, mass, 0.02, 100), expected, rtol=0, atol=1e-6)
    # Two prompts that are one share everything alike.
    plan = transport_plan(cosines(5, 1).expand(5, 2), 0.8, 0.1, 100)
    torch.testing.assert_close(plan[:, 0], plan[:, 1])


def test_no_other_plan_is_better():
    similarity, mass, regularisation = cosines(6, 2, seed=3), 0.7, 0.3
    best = transport_plan(similarity, mass, regularisation, 500)

    def value(plan: Tensor) -> Tensor:
        return (plan * similarity).sum(dim=(-2, -1)) - regularisation * torch.special.xlogy(plan, plan).sum(
            dim=(-2, -1)
        )

    # Feasible directions: towards other plans with the same columns and rows below their bounds.
    others = transport_plan(cosines(200, 6, 2, seed=4), mass, 0.1, 500)
    for step in (0.01, 0.1):
        assert float((value((1 - step) * best + step * others) - value(best)).max()) < 1e-8


def test_a_problem_does_not_see_the_others():
    many = cosines(7, 16, 2).float()
    alone = torch.stack([transport_plan(one, 0.8, 0.1, 100) for one in many])
    torch.testing.assert_close(transport_plan(many, 0.8, 0.1, 100), alone, rtol=1e-5, atol=1e-8)
    spoilt = many.clone()
    spoilt[3, 5] = torch.nan
    plan = transport_plan(spoilt, 0.8, 0.1, 100)
    others = [i for i in range(7) if i != 3]
    assert torch.equal(plan[others], transport_plan(many, 0.8, 0.1, 100)[others])
    assert torch.isnan(plan[3]).all()


def test_a_small_regularisation_does_not_overflow():
    plan = transport_plan(cosines(4, 16, 2).float().sign(), 1.0, 0.01, 300)  # e^200 between best and worst
    assert bool(torch.isfinite(plan).all())
    torch.testing.assert_close(plan.sum(dim=-2), torch.full((4, 2), 0.5))
