"""Rules of update pruning: what is kept, what is shrunk, and what is remembered of past releases."""

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fl_dualpriv.client.blocks import CoordinateBlocks
from fl_dualpriv.client.pruning import Pruned, Rule, UpdatePruning
from fl_dualpriv.client.release_memory import empty_release_memory, stack_release_memories

# Row norms 3, 1, 2.83, 0.14; and a client whose order is the other way round.
G = torch.tensor([[3.0, 0.0], [0.0, 1.0], [2.0, 2.0], [0.1, 0.1]])
BOTH = torch.stack([G, G.flip(0)])
NOISED = UpdatePruning(rule="noised", keep_ratio=0.5, block="token", frozen=False, warm_up=2, exploration=0.0)
PAST = replace(NOISED, rule="past")
TOKENS = CoordinateBlocks(kind="token", rows=4, cols=2)
QUIET = torch.zeros(2)


class Coins:
    """Uniforms of a fixed seed, the same for each client, and how often they were asked for."""

    def __init__(self, seed: int = 0) -> None:
        self.generator, self.asked = torch.Generator().manual_seed(seed), 0

    def __call__(self, count: int) -> Tensor:
        self.asked += 1
        return torch.rand(2, count, generator=self.generator, dtype=torch.float64)


def no_coins(count: int) -> Tensor:
    raise AssertionError("this rule needs no coins")


def pruned(rule: UpdatePruning, gradient: Tensor = BOTH, std: Tensor = QUIET, coins: Any = no_coins) -> Pruned:
    blocks = rule.cut(*gradient.shape[1:])
    assert blocks is not None
    return rule.prune(gradient, None, std, coins, blocks)


def rows_left(gradient: Tensor) -> list[list[int]]:
    return [torch.nonzero(client.any(dim=1)).flatten().tolist() for client in gradient]


# --- noised -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "kept"), [(0.1, [0]), (0.25, [0]), (0.5, [0, 2]), (0.51, [0, 1, 2])])
def test_noised_keeps_the_largest_rows_of_each_client(ratio: float, kept: list[int]) -> None:
    left, weights = pruned(replace(NOISED, keep_ratio=ratio))
    assert rows_left(left) == [kept, sorted(3 - row for row in kept)]
    assert weights is not None
    assert torch.equal(left, BOTH * weights)


@pytest.mark.parametrize("rule", ["noised", "random", "past", "random-past", "shrink"])
def test_a_keep_ratio_of_one_switches_every_rule_off(rule: Rule) -> None:
    off = replace(NOISED, rule=rule, keep_ratio=1.0)
    left, weights = pruned(off, std=torch.ones(2))
    assert left is BOTH
    assert weights is None
    assert not off.masks_before_clip
    assert off.release_memory_shapes(4, 2) == {}


def test_ties_go_to_the_earlier_block() -> None:
    assert rows_left(pruned(NOISED, torch.ones(2, 4, 2)).gradient) == [[0, 1], [0, 1]]


def test_coordinates_and_matrices_are_blocks_too() -> None:
    left, _ = pruned(replace(NOISED, block="coordinate"))
    assert left[0].tolist() == [[3, 0], [0, 1], [2, 2], [0, 0]]
    # Root mean squares of the columns of client 0: 3.61/2 and 2.24/2; with all in one matrix there is nothing to drop.
    assert pruned(replace(NOISED, block="matrix", segments=(1, 1))).gradient[0, :, 1].tolist() == [0, 0, 0, 0]
    assert torch.equal(pruned(replace(NOISED, block="matrix")).gradient, BOTH)


def test_blocks_of_unequal_size_are_compared_by_root_mean_square() -> None:
    # Norms 2 (four columns of 1) and 1.5 (one column): the single column is the louder one.
    gradient = torch.tensor([[[1.0, 1.0, 1.0, 1.0, 1.5]]]).expand(2, 1, 5)
    left, _ = pruned(replace(NOISED, block="matrix", segments=(4, 1)), gradient)
    assert left[0].tolist() == [[0, 0, 0, 0, 1.5]]


def test_the_count_survives_floating_point() -> None:
    # 0.07 * 100 = 7.000000000000001
    left, _ = pruned(replace(NOISED, keep_ratio=0.07), torch.ones(2, 100, 1))
    assert rows_left(left)[0] == list(range(7))


@pytest.mark.parametrize(
    "change",
    [
        {"keep_ratio": 0.0},
        {"keep_ratio": 1.1},
        {"keep_ratio": float("nan")},
        {"exploration": -0.1},
        {"exploration": 1.5},
        {"floor": 2.0},
        {"decay": 1.0},
        {"warm_up": -1},
        {"rule": "past", "block": "component"},
    ],
)
def test_refuses_other_numbers(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|choose another block"):
        replace(NOISED, **change)


def test_pruning_is_given_the_release_and_no_other_data() -> None:
    """Post-processing by construction: everything else is public or made of past releases."""
    assert list(inspect.signature(UpdatePruning.prune).parameters) == [
        *("self", "release", "opened", "noise_std", "draw", "blocks")
    ]
    assert list(inspect.signature(UpdatePruning.opened).parameters) == [
        "self",
        "release_memory",
        "noise_std",
        "draw",
        "blocks",
    ]


# --- random -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["random", "random-past"])
def test_random_masks_are_fair_and_of_the_same_size(rule: Rule) -> None:
    control, coins = replace(NOISED, rule=rule), Coins()
    counts = torch.zeros(4)
    for _ in range(500):
        if rule == "random":
            kept = pruned(control, torch.ones(2, 4, 2), coins=coins).gradient[:, :, 0]
        else:
            kept = control.opened({}, QUIET, coins, TOKENS)
        assert kept.sum(dim=1).tolist() == [2, 2]
        counts += kept.sum(dim=0)
    # 1000 draws of probability 1/2: standard error 0.016, 5 of them
    assert float((counts / 1000 - 0.5).abs().max()) < 0.08


def test_random_masks_do_not_look_at_the_gradient() -> None:
    one, other = (pruned(replace(NOISED, rule="random"), g, coins=Coins(3)).weights for g in (BOTH, 1 - BOTH))
    assert one is not None
    assert other is not None
    assert torch.equal(one, other)


# --- shrink -----------------------------------------------------------------------------------------------------------

SHRINK = replace(NOISED, rule="shrink")


def test_shrinkage_is_james_and_steins() -> None:
    gradient = torch.zeros(2, 2, 10)
    gradient[0, 0, 0], gradient[0, 1, 0], gradient[1] = 4.0, 2.5, 3.0
    left, weights = pruned(SHRINK, gradient, std=torch.tensor([1.0, 2.0]))
    assert weights is not None
    # 1 - (10 - 2) s²/‖g‖²: 1 - 8/16; 1 - 8/6.25 < 0, so the floor; and for client 1, 1 - 8·4/90
    expected = torch.tensor([[0.5, 0.2], [1 - 32 / 90, 1 - 32 / 90]])
    torch.testing.assert_close(weights[:, :, 0], expected)
    torch.testing.assert_close(left, gradient * weights)


def test_without_noise_nothing_is_shrunk_not_even_a_zero() -> None:
    assert torch.equal(pruned(SHRINK, BOTH).gradient, BOTH)
    assert torch.equal(pruned(SHRINK, torch.zeros(2, 4, 2)).gradient, torch.zeros(2, 4, 2))


def test_a_zero_block_under_noise_gets_the_floor() -> None:
    left, weights = pruned(replace(SHRINK, floor=0.3), torch.zeros(2, 1, 5), std=torch.ones(2))
    assert weights is not None
    assert torch.equal(weights, torch.full((2, 1, 5), 0.3))
    assert not left.any()


@pytest.mark.parametrize("signal", [0.0, 1.0, 3.0])
def test_shrinkage_comes_closer_to_the_true_gradient(signal: float) -> None:
    """James and Stein's theorem: with three dimensions or more, wherever the truth is."""
    truth = torch.full((2, 1, 8), signal / 8**0.5)
    rule, generator = replace(SHRINK, floor=0.0), torch.Generator().manual_seed(0)
    noisy, shrunk = 0.0, 0.0
    for _ in range(2000):
        release = truth + torch.randn(2, 1, 8, generator=generator)
        noisy += float((release - truth).square().sum())
        shrunk += float((pruned(rule, release, std=torch.ones(2)).gradient - truth).square().sum())
    # The gain is (p - 2)² E 1/‖g‖² >= 36/(8 + signal²), so 2.1 of 8 even at the largest; the standard error is 1 %.
    assert shrunk < 0.9 * noisy


# --- past -------------------------------------------------------------------------------------------------------------


def fresh(rule: UpdatePruning = PAST, clients: int = 2, rows: int = 4, cols: int = 2) -> dict[str, Tensor]:
    return stack_release_memories([empty_release_memory(rule.release_memory_shapes(rows, cols))] * clients)


def after(releases: list[Tensor], opened: Tensor | None = None, rule: UpdatePruning = PAST) -> Any:
    release_memory: Any = fresh(rule)
    for release in releases:
        release_memory = rule.remember(release_memory, release, torch.ones(2, 4) if opened is None else opened, TOKENS)
    return release_memory


def test_past_is_dense_while_it_warms_up() -> None:
    for count, expected in ((0, 4), (1, 4), (2, 2)):
        opened = PAST.opened(after([BOTH] * count), QUIET, no_coins, TOKENS)
        assert opened.sum(dim=1).tolist() == [expected] * 2


def test_past_keeps_what_past_releases_say() -> None:
    opened = PAST.opened(after([BOTH, BOTH]), QUIET, no_coins, TOKENS)
    assert opened.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    left, weights = PAST.prune(torch.ones(2, 4, 2), opened, QUIET, no_coins, TOKENS)  # whatever the release now says
    assert rows_left(left) == [[0, 2], [1, 3]]
    assert weights is not None
    assert torch.equal(left, weights)


def test_each_client_warms_up_by_itself() -> None:
    release_memory = after([BOTH, BOTH])
    release_memory["past.seen"][0] = 1
    assert PAST.opened(release_memory, QUIET, no_coins, TOKENS).sum(dim=1).tolist() == [4, 2]


def test_a_closed_block_remembers_nothing_of_the_noise_on_it() -> None:
    before = after([BOTH, BOTH])
    opened = torch.tensor([[1.0, 0.0, 1.0, 0.0]] * 2)
    release_memory = PAST.remember(before, torch.full((2, 4, 2), 9.0), opened, TOKENS)
    assert torch.equal(release_memory["past.average"][:, 1::2], before["past.average"][:, 1::2])
    assert not torch.equal(release_memory["past.average"][:, ::2], before["past.average"][:, ::2])
    assert release_memory["past.seen"].tolist() == [[3, 2, 3, 2]] * 2


def test_exploration_opens_closed_blocks_by_chance() -> None:
    rule, coins = replace(PAST, exploration=0.5), Coins()
    counts = torch.zeros(2, 4)
    for _ in range(500):
        opened = rule.opened(after([BOTH, BOTH]), QUIET, coins, TOKENS)
        assert opened.sum(dim=1).tolist() == [3, 3]  # two kept, and half of the other two
        counts += opened
    assert counts[0, [0, 2]].tolist() == [500, 500]
    # each of the two others with probability 1/2: standard error 0.022, 5 of them
    assert float((counts[0, [1, 3]] / 500 - 0.5).abs().max()) < 0.12


def test_an_unseen_block_comes_first() -> None:
    release_memory = after([BOTH, BOTH], opened=torch.tensor([[1.0, 1.0, 1.0, 0.0]] * 2))
    opened = replace(PAST, warm_up=0).opened(release_memory, QUIET, no_coins, TOKENS)
    assert opened[0].tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_the_debiased_score_of_pure_noise_is_zero_on_average(steps: int) -> None:
    """For blocks that were seen at different times too, as long as coins decide when."""
    rule, cols, clients = PAST, 50, 300
    blocks = CoordinateBlocks(kind="token", rows=4, cols=cols)
    generator = torch.Generator().manual_seed(steps)
    release_memory: Any = fresh(clients=clients, cols=cols)
    std = torch.full((clients,), 0.7)
    for step in range(steps):
        opened = (torch.rand(clients, 4, generator=generator) < (1.0 if step == 0 else 0.6)).float()
        noise = 0.7 * torch.randn(clients, 4, cols, generator=generator)
        release_memory = rule.remember(release_memory, noise, opened, blocks)
    scores = rule.scores(release_memory, std, blocks)
    # Var of energy/p is 2 s⁴ share²/p with share <= 1: over 1200 blocks its standard error is at most 0.49 √(2/60000).
    assert abs(float(scores.mean())) < 5 * 0.49 * (2 / (cols * clients * 4)) ** 0.5
    # Without the correction it would be s² times the noise's share: 0.49 at one step, 0.026 for a long average.
    assert float((scores + 0.49 / 19).mean()) > 0.02


def test_the_debiased_score_of_a_signal_is_its_energy() -> None:
    cols, clients = 50, 300
    blocks = CoordinateBlocks(kind="token", rows=4, cols=cols)
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([0.0, 0.1, 0.2, 0.5])[:, None].expand(4, cols)
    release_memory: Any = fresh(clients=clients, cols=cols)
    for _ in range(20):
        release = truth + torch.randn(clients, 4, cols, generator=generator)
        release_memory = PAST.remember(release_memory, release, torch.ones(clients, 4), blocks)
    scores = PAST.scores(release_memory, torch.ones(clients), blocks).mean(dim=0)
    # The noise's share after 20 steps is 0.067; standard error √((2 · 0.067² + 4 · 0.067 · 0.25)/15000) = 0.0023.
    torch.testing.assert_close(scores.float(), truth[:, 0].square(), atol=0.012, rtol=0)


def test_other_rules_remember_nothing() -> None:
    random_past = replace(PAST, rule="random-past")
    assert random_past.release_memory_shapes(4, 2) == {}
    assert random_past.remember({}, BOTH, torch.ones(2, 4), TOKENS) == {}
