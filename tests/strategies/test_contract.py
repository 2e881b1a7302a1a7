"""Every strategy that is shipped keeps the contract of `fl_dualpriv.testing`, with its defaults and at its edges."""

import importlib
from dataclasses import fields
from pathlib import Path

import pytest
from flwr.serverapp import strategy as flower

from fl_dualpriv.config.plugins import plugin_options
from fl_dualpriv.config.schema import app_defaults
from fl_dualpriv.server.flower_adapter import adapt
from fl_dualpriv.server.strategy import RoundStrategy
from fl_dualpriv.testing import check_strategy

ROOT = Path(__file__).parents[2]
FILES = sorted(path.stem for path in (ROOT / "strategies").glob("*.py") if path.stem != "__init__")


def class_of(file: str) -> type[RoundStrategy]:
    """The one strategy that a file of strategies/ defines."""
    module = importlib.import_module(f"strategies.{file}")
    (found,) = (
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, RoundStrategy) and c.__module__ == module.__name__
    )
    return found


@pytest.mark.parametrize("file", FILES)
def test_shipped_strategies_keep_the_contract(file: str):
    check_strategy(class_of(file))


@pytest.mark.parametrize(
    ("file", "options"),
    [
        # Of 6 expected clients: 1 and 2 are cut on each side.
        ("trimmed_mean", {"trim_ratio": 0.2}),
        ("trimmed_mean", {"trim_ratio": 0.49}),
        ("krum", {"num_byzantine": 2, "num_selected": 3}),
    ],
    ids=["one cut", "two cut", "multi-krum"],
)
def test_the_contract_holds_at_other_options(file: str, options: dict[str, object]):
    check_strategy(class_of(file), **options)


@pytest.mark.parametrize("name", ["FedAvgM", "FedYogi", "FedTrimmedAvg", "MultiKrum"])
def test_flowers_strategies_keep_what_is_asked_without_noise_of_the_server(name: str):
    cls, arguments = adapt(getattr(flower, name), {})
    check_strategy(cls, server_noise=False, **arguments)


@pytest.mark.slow  # Bulyan collects the whole process's garbage for each array
@pytest.mark.parametrize("name", ["FedAvg", "FedAdam", "FedAdagrad", "FedMedian", "Krum", "Bulyan"])
def test_the_others_of_flowers_keep_it_too(name: str):
    cls, arguments = adapt(getattr(flower, name), {})
    check_strategy(cls, server_noise=False, **arguments)


def test_every_option_table_of_the_app_fits_the_class_of_its_name():
    """And every option of a shipped strategy is listed, with its default: a sweep may name it."""
    defaults = app_defaults(ROOT)
    listed = {key for key in defaults if key.startswith("plugin.")}
    known = set()
    for file in FILES:
        cls = class_of(file)
        own = {
            f.name: f.default for f in fields(cls) if f.init and f.name not in {b.name for b in fields(RoundStrategy)}
        }
        assert plugin_options(cls, RoundStrategy, defaults) == own, file
        known |= {f"plugin.{cls.__name__.lower()}.{name.replace('_', '-')}" for name in own}
    assert listed == known
