"""Which coins a round of directions asks for, and what it hands on."""

import pytest
import torch

from fl_dualpriv.client.optimizers import SGD
from fl_dualpriv.client.pruning import KEEP_ALL, Rule, UpdatePruning
from fl_dualpriv.client.updates import UpdateRule
from fl_dualpriv.methods.lowrank import subspace_bases
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSource, StreamKey

ROWS, COLS = 4, 6
RELEASES = torch.randn(3, 2, ROWS, COLS, generator=torch.Generator().manual_seed(0))


def half(rule: Rule, exploration: float = 0.0) -> UpdatePruning:
    return UpdatePruning(rule=rule, keep_ratio=0.5, block="token", frozen=True, warm_up=1, exploration=exploration)


def round_of(pruning: UpdatePruning, asked: list[tuple[int, str, int]]) -> UpdateRule:
    """Two clients whose streams note who asks for what."""

    def stream(partition: int, purpose: str, step: int) -> RandomSource:
        asked.append((partition, purpose, step))
        return KeyedRandom(StreamKey(seed=0, purpose=purpose, partition=partition, step=step))

    return UpdateRule(
        pruning=pruning,
        optimizer=SGD,
        release_memories=[{}, {}],
        streams=[lambda purpose, step, p=p: stream(p, purpose, step) for p in range(2)],
        noise_std=torch.ones(2, dtype=torch.float64),
        like=RELEASES[0, 0],
    )


@pytest.mark.parametrize(
    ("pruning", "coins"),
    [
        (KEEP_ALL, False),
        (half("noised"), False),
        (half("shrink"), False),
        (half("past"), False),
        (half("past", exploration=0.1), True),
        (half("random"), True),
        (half("random-past"), True),
    ],
    ids=lambda value: value.rule if isinstance(value, UpdatePruning) else "",
)
def test_each_client_tosses_its_own_coins_once_a_step(pruning: UpdatePruning, coins: bool) -> None:
    asked: list[tuple[int, str, int]] = []
    update_rule = round_of(pruning, asked)
    for step, release in enumerate(RELEASES):
        masks = update_rule.masks(step)
        assert (masks is not None) == (pruning.is_on and pruning.rule in ("past", "random-past"))
        update_rule.direction(release)
    assert asked == ([(p, "update-mask", step) for step in range(3) for p in range(2)] if coins else [])


def test_histories_are_each_clients_own() -> None:
    update_rule = round_of(half("past"), [])
    for step, release in enumerate(RELEASES):
        update_rule.masks(step)
        update_rule.direction(release)
    one, two = update_rule.release_memories()
    assert {name: tuple(tensor.shape) for name, tensor in one.items()} == {
        "past.average": (ROWS, COLS),
        "past.seen": (ROWS,),
    }
    assert not torch.equal(one["past.average"], two["past.average"])


def test_components_need_the_bases_of_the_step() -> None:
    pruning = UpdatePruning(rule="noised", keep_ratio=0.6, block="component", frozen=False, warm_up=1, exploration=0.0)
    update_rule = round_of(pruning, [])
    assert update_rule.cuts_components
    assert not round_of(half("noised"), []).cuts_components
    u, v = subspace_bases(RELEASES[0], torch.randn(2, 2, COLS, generator=torch.Generator().manual_seed(1)))
    direction = update_rule.direction(RELEASES[0], (u, v))
    assert update_rule.closed is None
    # Two blocks of three are left, each orthogonal to what was dropped.
    dropped = RELEASES[0] - direction
    torch.testing.assert_close((dropped * direction).sum(dim=(1, 2)), torch.zeros(2), atol=1e-4, rtol=0)
    assert bool((dropped.flatten(1).norm(dim=1) > 0.1).all())
