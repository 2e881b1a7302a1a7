"""A class named by ``module:Class``: found, or one clear error with what there is."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fl_dualpriv.config.plugins import find_module, load_class, pack_options, plugin_options, unpack_options
from fl_dualpriv.config.schema import StrategyConfig
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.server.flower_adapter import FlowerStrategy
from fl_dualpriv.server.strategy import RoundStrategy
from fl_dualpriv.server.strategy_ref import load_strategy
from strategies.dpfpl import DPFPL

KEY = "strategy.ref"


def test_a_subclass_is_found():
    assert load_class(KEY, "strategies.dpfpl:DPFPL", RoundStrategy) is DPFPL


def test_the_base_itself_is_allowed():
    assert load_class(KEY, "fl_dualpriv.server.strategy:RoundStrategy", RoundStrategy) is RoundStrategy


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


# --- modules in a folder ----------------------------------------------------------------------------------------------

SOURCE = """
from dataclasses import dataclass
from fl_dualpriv.server.strategy import RoundStrategy

@dataclass(kw_only=True)
class Mine(RoundStrategy):
    rate: float = 1.0
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    before = list(sys.path), set(sys.modules)
    yield tmp_path
    sys.path[:] = before[0]
    for name in set(sys.modules) - before[1]:
        if name.startswith("plug_"):
            del sys.modules[name]


def test_a_file_in_a_named_folder_is_found(folder: Path):
    (folder / "plug_in_folder.py").write_text(SOURCE)
    with pytest.raises(ConfigError, match="cannot import 'plug_in_folder'"):
        load_class(KEY, "plug_in_folder:Mine", RoundStrategy)
    found = load_class(KEY, "plug_in_folder:Mine", RoundStrategy, str(folder))
    assert found.__module__ == "plug_in_folder"
    assert sys.path[-1] == str(folder)  # at the end: it hides nothing


def test_a_module_of_a_package_in_a_folder_is_found(folder: Path):
    (folder / "plug_package").mkdir()
    (folder / "plug_package" / "mine.py").write_text(SOURCE)
    assert load_class(KEY, "plug_package.mine:Mine", RoundStrategy, str(folder)).__name__ == "Mine"


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("statistics", SOURCE, r"statistics.py has that name already, so the file in .* cannot be used: rename it"),
        ("plug_broken", "class Mine(:", "fails when imported: SyntaxError"),
        ("plug_raising", "1 / 0", "fails when imported: ZeroDivisionError"),
        (
            "plug_needing",
            "import no_such_module",
            r"cannot import 'plug_needing' \(No module named 'no_such_module'\)$",
        ),
        ("plug_other", "", "has no subclass of RoundStrategy called 'Mine'; it has none"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(folder: Path, name: str, source: str, message: str):
    (folder / f"{name}.py").write_text(source)
    with pytest.raises(ConfigError, match=message):
        load_class(KEY, f"{name}:Mine", RoundStrategy, str(folder))


def test_the_folder_is_found_for_a_user_who_stands_in_it(tmp_path: Path):
    app, here, there = (tmp_path / name for name in ("app", "here", "there"))
    for place in (app / "strategies", here / "strategies", there / "package"):
        place.mkdir(parents=True)
    for file in (app / "strategies/known.py", here / "strategies/known.py", here / "mine.py", there / "mine.py"):
        file.write_text("")
    (there / "package" / "__init__.py").write_text("")
    (app / "pyproject.toml").write_text('[tool.flwr.app]\nfab-include = ["/strategies/**/*.py"]\n')

    def path(reference: str, **more: str) -> str:
        flat = {"strategy.ref": reference, "strategy.path": "", **more}
        return str(find_module(flat, app, (here, there))["strategy.path"])

    assert path("mine:Mine") == str(here)
    assert path("package:Mine") == str(there)
    assert path("strategies.known:Known") == ""  # the app's own goes first
    assert path("json:JSONDecoder") == ""  # installed, or nowhere: the server says
    assert path("mine:Mine", **{"strategy.path": "/given"}) == "/given"
    assert path("not a module:X") == ""


@pytest.mark.parametrize(("listed", "travels"), [('fab-include = ["/strategies/**/*.py"]', False), ("", True)])
def test_a_file_beside_the_apps_packages_needs_a_path_unless_it_is_bundled(tmp_path: Path, listed: str, travels: bool):
    """A user who stands in a checkout saves a strategy there; the bundle of the app does not have it."""
    (tmp_path / "pyproject.toml").write_text(f"[tool.flwr.app]\n{listed}\n")
    (tmp_path / "momentum.py").write_text("")
    flat = {"strategy.ref": "momentum:Momentum", "strategy.path": ""}
    assert find_module(flat, tmp_path, (tmp_path,))["strategy.path"] == ("" if travels else str(tmp_path))


# --- options that the app does not list -------------------------------------------------------------------------------

LISTED = {"rounds": 1, "plugin.dpfpl.server-learning-rate": 1.0, "strategy.options": ""}


def test_options_travel_in_one_key():
    flat = {**LISTED, "strategy.ref": "m:Tunable", "plugin.tunable.momentum": 0.5, "plugin.tunable.warm": True}
    packed = pack_options(flat, LISTED)
    assert {key for key in packed if key not in LISTED} == {"strategy.ref"}
    assert {key: unpack_options(packed)[key] for key in flat if key != "strategy.options"} == {
        key: value for key, value in flat.items() if key != "strategy.options"
    }
    assert pack_options(packed, LISTED) == packed
    more = pack_options({**packed, "plugin.tunable.momentum": 0.7}, LISTED)
    assert plugin_options(Tunable, RoundStrategy, unpack_options(more)) == {"momentum": 0.7, "warm": True}


def test_options_of_nobody_are_refused():
    flat = {**LISTED, "strategy.ref": "m:Tunable", "plugin.tunabel.momentum": 0.5}
    with pytest.raises(ConfigError, match=r"plugin.tunabel.momentum: .*did you mean plugin.tunable.momentum\?"):
        pack_options(flat, LISTED)


def test_options_of_flowers_are_for_flowers_alone():
    config = StrategyConfig(ref="strategies.dpfpl:DPFPL", path="", options="")
    with pytest.raises(ConfigError, match=r"plugin.flower.eta: is for Flower's strategies"):
        load_strategy(config, {"plugin.flower.eta": 0.1})
    found, arguments = load_strategy(replace(config, ref="flwr.serverapp.strategy:FedAdam"), {"plugin.flower.eta": 0.2})
    assert issubclass(found, FlowerStrategy)
    assert arguments["arguments"]["eta"] == 0.2  # type: ignore[index]
