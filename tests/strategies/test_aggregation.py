"""Aggregation rules on hand-worked numbers, and the theorems of those that bound a client's influence otherwise."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from flwr.serverapp import strategy as flower
from torch import Tensor

from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.privacy.clipping import clip_rows
from fl_dualpriv.server.flower_adapter import adapt
from fl_dualpriv.server.strategy import RoundStrategy, Update
from strategies.fedadam import FedAdam
from strategies.fedavgm import FedAvgM
from strategies.krum import Krum
from strategies.trimmed_mean import TrimmedMean
from tests.strategies.rounds import client_level, make, play, record_level


def moves(strategy: RoundStrategy, rounds: Sequence[Sequence[float]]) -> list[float]:
    """The prompt's one number after each round, from 0, of these uploads of clients 0, 1, 2, …"""
    prompt, seen = torch.zeros(1, 1, dtype=torch.float64), []
    for r, uploads in enumerate(rounds, 1):
        prompt = play(strategy, [torch.tensor([[u]], dtype=torch.float64) for u in uploads], r, prompt)
        seen.append(float(prompt))
    return seen


# --- on the mean ------------------------------------------------------------------------------------------------------


def test_fedavgm_adds_up_a_fading_velocity():
    # Weights 10/20 and 1: means (0.5 * 3 + 3) / 1.5 = 3, then (0.5 * 0 + 1.5) / 1.5 = 1. v: 3, 0.5 * 3 + 1 = 2.5.
    strategy = make(FedAvgM, sizes=(10, 20), momentum=0.5, server_learning_rate=2.0)
    assert moves(strategy, [(3, 3), (0, 1.5)]) == pytest.approx([6, 11])
    assert float(strategy.state["velocity"]) == pytest.approx(2.5)


def test_fedadam_is_algorithm_2():
    # m0 = 0, v0 = tau^2 = 0.01. Mean 2: m = 0.5 * 2 = 1, v = 0.9 * 0.01 + 0.1 * 4 = 0.409.
    # Mean -1: m = 0.5 * 1 - 0.5 = 0, so nothing moves; v = 0.9 * 0.409 + 0.1 = 0.4681.
    strategy = make(FedAdam, sizes=(10, 90), server_learning_rate=0.2, beta_1=0.5, beta_2=0.9, tau=0.1)
    first = 0.2 / (math.sqrt(0.409) + 0.1)
    assert moves(strategy, [(1, 3), (-2, 0)]) == pytest.approx([first, first])
    assert float(strategy.state["second"]) == pytest.approx(0.4681)


def test_fedadam_without_bias_correction_is_flowers_up_to_its_rate():
    # Flower corrects the bias and starts at v = 0: with betas 0 both are eta * d / (|d| + tau).
    ours = make(FedAdam, sizes=(10, 10), server_learning_rate=0.1, beta_1=0.0, beta_2=0.0, tau=0.01)
    cls, arguments = adapt(flower.FedAdam, {"plugin.flower.beta-1": 0.0, "plugin.flower.beta-2": 0.0})
    theirs = make(cls, sizes=(10, 10), **{**arguments, "arguments": {**arguments["arguments"], "tau": 0.01}})
    rounds = [(1, 3), (-2, 0.5), (0, 0)]
    assert moves(ours, rounds) == pytest.approx(moves(theirs, rounds), abs=1e-12)


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"momentum": -0.1}])
def test_a_momentum_outside_its_range_is_refused(options: dict[str, float]):
    with pytest.raises(ConfigError, match="momentum"):
        make(FedAvgM, **options)


# --- trimmed mean -----------------------------------------------------------------------------------------------------


def test_the_trimmed_mean_forgets_the_extremes_of_each_entry():
    uploads = [torch.tensor([[a, b]], dtype=torch.float64) for a, b in [(1, 5), (2, 1e9), (3, 7), (-1e9, 6), (9, 9)]]
    # 5 clients, ratio 0.2: one on each side. First entry 1, 2, 3; second 6, 7, 9.
    strategy = make(TrimmedMean, sizes=(1,) * 5, trim_ratio=0.2)
    moved = play(strategy, uploads, 1, torch.zeros(1, 2, dtype=torch.float64))
    torch.testing.assert_close(moved, torch.tensor([[2, 22 / 3]], dtype=torch.float64))


def test_the_trimmed_mean_is_flowers():
    generator = torch.Generator().manual_seed(0)
    uploads = list(torch.randn(9, 3, 4, generator=generator, dtype=torch.float64))
    cls, arguments = adapt(flower.FedTrimmedAvg, {"plugin.flower.beta": 0.3})
    start = torch.zeros(3, 4, dtype=torch.float64)
    ours = play(make(TrimmedMean, sizes=(1,) * 9, trim_ratio=0.3), uploads, 1, start)
    torch.testing.assert_close(ours, play(make(cls, sizes=(1,) * 9, **arguments), uploads, 1, start))


def combined(strategy: RoundStrategy, rows: Tensor) -> Tensor:
    strategy._prompt = torch.zeros(1, rows.shape[1])
    return strategy.combine([Update(partition=i, diff=row[None]) for i, row in enumerate(rows)]).flatten()


def private_trimmed(clients: int, expected: float, ratio: float) -> TrimmedMean:
    privacy = client_level(rate=expected / clients, bound=1.0)
    return make(TrimmedMean, privacy, sizes=(1,) * clients, trim_ratio=ratio)


def test_one_client_moves_a_trimmed_sum_further_than_its_own_norm():
    """The clip norm itself is no bound: six clients agree four by four, in another entry each four, and k = 3."""
    strategy = private_trimmed(8, 7.0, 0.45)
    assert strategy.sensitivity() == pytest.approx(math.sqrt(1 + 6 / 4))  # S = 1, E - 2k = 7 - 6 = 1
    fours = list(itertools.combinations(range(6), 4))
    rows = torch.zeros(6, len(fours), dtype=torch.float64)
    for entry, members in enumerate(fours):
        rows[list(members), entry] = 1 / math.sqrt(10)  # each client is in 10 of the 15
    with_zero = torch.cat([rows, torch.zeros(1, len(fours), dtype=torch.float64)])
    move = float((combined(strategy, with_zero) - combined(strategy, rows)).norm())
    # Of six values, two are 0 and four are 1/sqrt(10): nothing is left of them. Of seven one is: sqrt(15 / 10).
    assert move == pytest.approx(math.sqrt(1.5))
    assert 1 < move <= strategy.sensitivity()


def test_no_search_finds_a_move_beyond_the_theorem():
    """Clients that agree at random, and drawn ones; some get past the clip norm, and none past the bound."""
    best, generator = 0.0, torch.Generator().manual_seed(0)
    strategy = private_trimmed(8, 7.0, 0.45)
    for trial in range(400):
        shape = (6 + trial % 3, 15)
        agree = torch.rand(shape, generator=generator, dtype=torch.float64) < 0.6
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        rows = clip_rows(9 * (agree + (trial % 5) / 20 * drawn), 1.0)[0]
        rows[-1] *= trial % 2  # a client of zeros, or one like the others
        best = max(best, float((combined(strategy, rows) - combined(strategy, rows[:-1])).norm()))
    assert 1.0 < best <= strategy.sensitivity()


def test_without_trimming_it_is_the_mean_with_its_sensitivity():
    assert private_trimmed(8, 4.0, 0.0).sensitivity() == pytest.approx(1 / 4)


def test_a_private_trimmed_mean_has_a_public_divisor():
    strategy = private_trimmed(8, 4.0, 0.25)  # k = 1, divisor 4 - 2, whoever comes
    for n, left in [(2, 0), (3, 1), (5, 3), (8, 6)]:
        rows = torch.full((n, 2), 0.5, dtype=torch.float64)
        torch.testing.assert_close(combined(strategy, rows), torch.full((2,), 0.5 * left / 2, dtype=torch.float64))


# --- Krum -------------------------------------------------------------------------------------------------------------


def test_krum_takes_the_client_with_the_closest_company():
    # n = 5, f = 1: the 2 closest others count. Of 0, 1, 3, 4.5, 100 their squared distances add up to
    # 1 + 9 = 10, 1 + 4 = 5, 4 + 2.25 = 6.25, 2.25 + 12.25 = 14.5 and about 18,500: client 1 wins.
    assert moves(make(Krum, sizes=(1,) * 5, num_byzantine=1), [(0, 1, 3, 4.5, 100)]) == [1.0]


def test_multi_krum_averages_the_best():
    # The three lowest scores above are those of clients 1, 2 and 0: (1 + 3 + 0) / 3.
    strategy = make(Krum, sizes=(1,) * 5, num_byzantine=1, num_selected=3)
    assert moves(strategy, [(0, 1, 3, 4.5, 100)]) == pytest.approx([4 / 3])


def test_of_equal_scores_the_first_client_goes_first():
    assert moves(make(Krum, sizes=(1,) * 4), [(1, -1, 1, -1)]) == [1.0]


@pytest.mark.parametrize("selected", [1, 4])
def test_krum_is_flowers(selected: int):
    generator = torch.Generator().manual_seed(1)
    uploads = list(torch.randn(9, 3, 4, generator=generator, dtype=torch.float64))
    options = {"plugin.flower.num-malicious-nodes": 2, "plugin.flower.num-nodes-to-select": selected}
    cls, arguments = adapt(flower.MultiKrum, options)
    start = torch.zeros(3, 4, dtype=torch.float64)
    ours = play(make(Krum, sizes=(1,) * 9, num_byzantine=2, num_selected=selected), uploads, 1, start)
    torch.testing.assert_close(ours, play(make(cls, sizes=(1,) * 9, **arguments), uploads, 1, start))


def test_one_client_moves_krum_by_the_whole_diameter():
    strategy = make(Krum, client_level(rate=0.5, bound=1.0), sizes=(1,) * 10)
    rows = torch.tensor([[1.0], [1], [1], [-1], [-1], [-1]], dtype=torch.float64)
    more = torch.cat([rows, torch.tensor([[-1.0]], dtype=torch.float64)])
    # n - 2 = 4 closest: the threes tie, and client 0 wins; of 7 the four that agree have the closer company.
    assert float((combined(strategy, rows) - combined(strategy, more)).norm()) == strategy.sensitivity() == 2.0


@pytest.mark.parametrize("options", [{"num_byzantine": 2}, {"num_selected": 6}, {"num_selected": 0}])
def test_krum_needs_enough_clients(options: dict[str, int]):
    with pytest.raises(ConfigError, match=r"plugin\.krum"):
        make(Krum, sizes=(1,) * 5, **options)


# --- what is not proved -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [TrimmedMean, Krum])
def test_robust_rules_are_refused_where_uploads_are_sums_over_records(cls: type[RoundStrategy]):
    with pytest.raises(PrivacyError, match=f"{cls.__name__} cannot run with noise of the server at record level"):
        make(cls, record_level(), sizes=(10,) * 5)
