"""What a strategy owes is asked of its class before any client is: proofs by unit, options, scales, shapes."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.privacy.noise import KeyedRandom
from fl_dualpriv.server.strategy import Update
from strategies.dpfpl import DPFPL
from tests.strategies.rounds import client_level, make, play, record_level

START = torch.zeros(2, 3)
ONES = [torch.ones(2, 3)] * 4


class Half(DPFPL):
    """A combine with a proof."""

    def combine(self, updates: Sequence[Update]) -> Tensor:
        return super().combine(updates) / 2

    def sensitivity(self) -> float:
        return super().sensitivity() / 2


class HalfOfRecords(Half):
    proved_for = ("client", "record")


class EighthOfRecords(HalfOfRecords):
    """Overrides combine again: what its parent was proved for is not said of it."""

    def combine(self, updates: Sequence[Update]) -> Tensor:
        return super().combine(updates) / 4

    def sensitivity(self) -> float:
        return super().sensitivity() / 4


def test_a_proof_for_clients_is_none_for_records():
    make(Half, client_level())
    for cls in (Half, EighthOfRecords):
        with pytest.raises(PrivacyError, match=f"{cls.__name__} cannot run with noise of the server at record level"):
            make(cls, record_level())
    make(HalfOfRecords, record_level())


class Picky(DPFPL):
    def check_options(self) -> None:
        raise ConfigError(f"I want other clients than {len(self.num_examples)}")


def test_a_strategy_checks_its_options_at_the_start():
    with pytest.raises(ConfigError, match="other clients than 4"):
        make(Picky)


@pytest.mark.parametrize("scale", [math.inf, math.nan, -1.0])
def test_a_sensitivity_that_scales_nothing_is_refused(scale: float):
    class Odd(Half):
        def sensitivity(self) -> float:
            return scale

    with pytest.raises(PrivacyError, match=r"sensitivity\(\) = .*finite"):
        make(Odd, client_level())


class OneNumber(Half):
    """A result that is stretched over the prompt: noise must not be."""

    def combine(self, updates: Sequence[Update]) -> Tensor:
        return super().combine(updates).mean()[None, None]


class OneNumberProved(OneNumber):
    def sensitivity(self) -> float:
        return super().sensitivity()


def test_noise_has_the_prompts_shape_whatever_combine_returns():
    strategy = make(OneNumberProved, client_level())
    strategy.sources = KeyedRandom
    assert len(set(play(strategy, [None] * 4, 1, START).flatten().tolist())) == 6


class Flat(DPFPL):
    def server_update(self, prompt: Tensor, diff: Tensor) -> Tensor:
        return (prompt + diff).flatten()


def test_a_prompt_of_another_shape_ends_the_run():
    with pytest.raises(ValueError, match=r"Flat made a prompt of shape \(6,\); expected \(2, 3\)"):
        play(make(Flat), ONES, 1, START)


def test_the_prompt_keeps_its_precision():
    class Double(DPFPL):
        def server_update(self, prompt: Tensor, diff: Tensor) -> Tensor:
            return prompt.double() + diff

    strategy = make(Double)
    play(strategy, ONES, 1, START)
    assert strategy.prompt.dtype == torch.float32
