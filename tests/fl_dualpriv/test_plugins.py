"""A class named by ``module:Class``: found, or one clear error with what there is."""

import pytest

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.plugins import load_class
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
