"""A class named by ``module:Class``: found, or one clear error with what there is."""

from dataclasses import dataclass

import pytest

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.plugins import load_class, plugin_options
from fl_dualpriv.server import RoundStrategy
from strategies.dpfpl import DPFPL

KEY = "strategy.ref"


def test_a_subclass_is_found():
    assert load_class(KEY, "strategies.dpfpl:DPFPL", RoundStrategy) is DPFPL


def test_the_base_itself_is_allowed():
    assert load_class(KEY, "fl_dualpriv.server:RoundStrategy", RoundStrategy) is RoundStrategy


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("strategies.dpflp:DPFPL", "cannot import 'strategies.dpflp'"),
        ("strategies.dpfpl:DPFLP", "no subclass of RoundStrategy called 'DPFLP'; it has DPFPL"),
        ("strategies.dpfpl:dataclass", "no subclass of RoundStrategy called 'dataclass'"),
        ("strategies.dpfpl:Tensor", "no subclass of RoundStrategy called 'Tensor'"),
        ("strategies.dpfpl", "called ''; it has DPFPL"),
        ("json:JSONDecoder", "it has none"),
    ],
    ids=["module", "class", "no class", "other class", "no colon", "foreign module"],
)
def test_what_does_not_fit_is_named(reference: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        load_class(KEY, reference, RoundStrategy)
    assert str(caught.value).startswith(f"{KEY} = {reference!r}")


@dataclass(kw_only=True)
class Tunable(DPFPL):
    momentum: float = 0.9
    warm: bool = False


def test_options_fill_the_fields_of_the_named_class():
    flat = {"plugin.tunable.momentum": 1, "plugin.tunable.warm": True, "plugin.fedavg.weight": 3, "rounds": 2}
    assert plugin_options(Tunable, RoundStrategy, flat) == {"momentum": 1.0, "warm": True}
    assert plugin_options(Tunable, RoundStrategy, {"plugin.tunable.server-learning-rate": 0.5}) == {
        "server_learning_rate": 0.5
    }


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"plugin.tunable.momentun": 0.5}, "no such option; it has .*momentum"),
        ({"plugin.tunable.momentum": "high"}, "expected float"),
        ({"plugin.tunable.warm": 1}, "expected bool"),
        ({"plugin.tunable.privacy": "none"}, "no such option"),
        ({"plugin.tunable.tolerates-failures": True}, "no such option"),
    ],
    ids=["unknown", "type", "bool", "privacy", "failures"],
)
def test_options_cannot_reach_past_the_classs_own_fields(flat: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        plugin_options(Tunable, RoundStrategy, flat)
