"""Personal prompts that the server makes of all uploads: by hand, with groups in noise, and in whole runs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.config.plans import record_level_plan
from fl_dualpriv.config.schema import RunConfig, app_defaults
from fl_dualpriv.server.build import collective_parts
from fl_dualpriv.server.collective import Collective, take_memory

DEFAULTS = app_defaults(Path(__file__).parents[3])


def numbers(variances: Sequence[float], memory: float = 1.0, ratio: float = 1.0) -> Collective:
    return Collective(memory=memory, rate_ratio=ratio, noise_variances=torch.tensor(variances, dtype=torch.float64))


def uploads(*rows: tuple[float, float]) -> Tensor:
    """Uploads of prompts of one token with two entries."""
    return torch.tensor(rows, dtype=torch.float64)[:, None]


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_without_noise_the_part_is_the_sum_of_deviations():
    """Three clients in two groups; mean of the first round (1, 0), of the second (0, 1)."""
    rule = numbers((0.0, 0.0, 0.0), memory=0.5, ratio=2.0)
    memory = rule.followed({}, (0, 1, 2), uploads((2, 0), (2, 0), (-1, 0)))
    assert rule.parts(memory, (1, 2)).tolist() == [[[2, 0]], [[2, 0]], [[-4, 0]]]
    memory = rule.followed(memory, (0, 1, 2), uploads((0, 2), (0, 1), (0, 0)))
    # half of (1, 0), (1, 0), (-2, 0) plus (0, 1), (0, 0), (0, -1), times two
    assert rule.parts(memory, (1, 2)).tolist() == [[[1, 2]], [[1, 0]], [[-2, -2]]]


def test_two_groups_by_hand():
    """Deviations a·(1, 1, -2) of variance ν in one direction: one singular value, a·√6/√ν, shrunk by the rule."""
    a, variance = 5.0, 0.25
    rule = numbers((variance,) * 3)
    memory = rule.followed({}, (0, 1, 2), uploads((a, 0), (a, 0), (-2 * a, 0)))
    y2 = a**2 * 6 / variance / 3  # squared singular value of the white matrix over the longer side
    beta = 2 / 3
    factor = math.sqrt((y2 - beta - 1) ** 2 - 4 * beta) / y2
    found = rule.parts(memory, (1, 2))
    expected = factor * torch.tensor([[[a, 0]], [[a, 0]], [[-2 * a, 0]]])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    # the same direction below the threshold √3·(1 + √(2/3)) is all noise
    memory = rule.followed({}, (0, 1, 2), uploads((a / 10, 0), (a / 10, 0), (-a / 5, 0)))
    assert not rule.parts(memory, (1, 2)).any()


def test_rows_are_weighted_by_their_own_noise():
    """One client with four times the noise: its row is halved before the decomposition and doubled after it."""
    rule = numbers((1.0, 1.0, 4.0))
    memory = rule.followed({}, (0, 1, 2), uploads((30, 0), (30, 0), (-60, 0)))
    y2 = (30**2 * 2 + 30**2) / 3
    factor = math.sqrt((y2 - 2 / 3 - 1) ** 2 - 8 / 3) / y2
    expected = factor * torch.tensor([[[30.0, 0]], [[30, 0]], [[-60, 0]]])
    torch.testing.assert_close(rule.parts(memory, (1, 2)), expected, atol=1e-5, rtol=1e-6)


def test_noise_is_added_for_clients_that_answered_and_decays_for_all():
    rule = numbers((1.0, 2.0, 4.0), memory=0.5)
    memory = rule.followed({}, (0, 1, 2), uploads((1, 0), (1, 0), (1, 0)))
    memory = rule.followed(memory, (2, 0), uploads((4, 0), (0, 0)))
    assert memory["mechanism.deviation-noise"].tolist() == [1.25, 0.5, 5.0]
    assert memory["mechanism.deviations"][:, 0, 0].tolist() == [-2, 0, 2]  # (0, 4) less their mean 2
    memory = rule.followed(memory, (), torch.zeros(0, 1, 2, dtype=torch.float64))
    assert memory["mechanism.deviation-noise"].tolist() == [0.3125, 0.125, 1.25]
    assert memory["mechanism.deviations"][:, 0, 0].tolist() == [-1, 0, 1]


def test_before_any_round_and_without_any_answer_the_parts_are_zero():
    rule = numbers((1.0, 1.0))
    assert torch.equal(rule.parts({}, (3, 4)), torch.zeros(2, 3, 4))
    memory = rule.followed({}, (1,), 100 * torch.randn(1, 3, 4, dtype=torch.float64))
    assert not rule.parts(memory, (3, 4))[0].any()


# --- groups in noise --------------------------------------------------------------------------------------------------


def grouped(strength: float, clients: int = 40, shape: tuple[int, int] = (4, 32)) -> tuple[Tensor, Tensor]:
    """Two groups whose members share a direction, and uploads with noise of variance 1."""
    g = torch.Generator().manual_seed(0)
    direction = torch.randn(*shape, generator=g, dtype=torch.float64)
    sign = torch.tensor([1.0, -1.0]).repeat(clients // 2)[:, None, None]
    truth = strength * sign * direction
    return truth, truth + torch.randn(clients, *shape, generator=g, dtype=torch.float64)


def test_two_groups_have_rank_one_and_are_closer_to_the_truth_than_each_by_itself():
    truth, noisy = grouped(0.5)
    rule = numbers([1.0] * 40)
    parts = rule.parts(rule.followed({}, range(40), noisy), (4, 32)).double()
    assert int(torch.linalg.matrix_rank(parts.flatten(1), rtol=1e-4)) == 1
    error = (parts - truth).square().sum()
    assert error < 0.15 * truth.square().sum()
    assert error < 0.15 * (noisy - truth).square().sum()


def test_where_noise_hides_all_the_shared_prompt_stays():
    _, noisy = grouped(0.0)
    rule = numbers([1.1] * 40)
    assert not rule.parts(rule.followed({}, range(40), noisy), (4, 32)).any()


# --- any upload -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1e308, 1e200, 1e-300])
def test_no_upload_ends_a_run_or_leaves_a_part_that_is_not_finite(value: float):
    rule = numbers((1.0, 1.0, 1.0), ratio=0.1)
    memory: dict[str, Tensor] = {}
    for _ in range(3):
        memory = rule.followed(memory, (0, 1, 2), uploads((value, -value), (value, value), (1, 0)))
        assert bool(torch.isfinite(rule.parts(memory, (1, 2))).all())
        assert bool(torch.isfinite(memory["mechanism.deviations"]).all())
    later = rule.followed(memory, (0, 1, 2), uploads((20, 0), (20, 0), (-40, 0)))
    assert bool(torch.isfinite(rule.parts(later, (1, 2))).all())


def test_a_client_that_sends_no_finite_variance_gets_no_part():
    rule = numbers((math.inf, 1.0, 1.0))
    memory = rule.followed({}, (0, 1, 2), uploads((90, 0), (90, 0), (-180, 0)))
    found = rule.parts(memory, (1, 2))
    assert not found[0].any()
    assert found[1].any()


def test_a_strategys_own_code_does_not_see_the_memory():
    rule = numbers((1.0, 1.0))
    state = rule.followed({"mine": torch.ones(1)}, (0, 1), uploads((1, 0), (0, 1)))
    assert "mine" not in state
    state["mine"] = torch.ones(1)
    memory = take_memory(state)
    assert list(state) == ["mine"]
    assert torch.equal(rule.parts(memory, (1, 2)), rule.parts(memory | state, (1, 2)))


# --- configuration ----------------------------------------------------------------------------------------------------


def test_the_configuration_gives_the_numbers():
    changes: dict[str, Any] = {
        "prompt.personalisation": "collective",
        "prompt.personal-memory": 0.9,
        "train.global-learning-rate": 2.0,
        "train.local-learning-rate": 0.5,
        "train.local-steps": 3,
        "train.sampling-rate": 0.1,
        "privacy.record.calibrate-to": "noise-multiplier",
        "privacy.record.noise-multiplier": 1.5,
        "privacy.record.clip-norm": 0.5,
    }
    cards = {p: messages.ClientCard(partition=p, num_examples=n) for p, n in enumerate((60, 100))}

    def of(more: dict[str, Any]) -> Collective | None:
        config = RunConfig.from_run_config(DEFAULTS | changes | more)
        return collective_parts(config, record_level_plan(config), cards)

    found = of({})
    assert found is not None
    assert (found.memory, found.rate_ratio) == (0.9, 0.25)
    # 3 releases, each of std 2 · 1.5 · 0.5 over 6 and 10 records
    assert found.noise_variances.tolist() == pytest.approx([3 * (1.5 / 6) ** 2, 3 * (1.5 / 10) ** 2])
    open_run = of({"privacy.record.mechanism": "none"})
    assert open_run is not None
    assert open_run.noise_variances.tolist() == [0, 0]
    assert of({"prompt.personalisation": "singular"}) is None
    assert of({"method": "promptfl"}) is None
