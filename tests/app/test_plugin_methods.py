"""A user's method, momentum on the personal part only, as the README gives it: one file, its options and this test."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from fl_dualpriv.cli import main as cli
from fl_dualpriv.config.methods import METHODS, find_method
from fl_dualpriv.config.schema import RunConfig, app_defaults
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.files import read_tensors
from fl_dualpriv.methods.base import Method, PromptState, Rates, Released
from fl_dualpriv.methods.dpfpl import DPFPL
from fl_dualpriv.testing import check_method

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("## Write a method")[1].split("\n## ")[0]
(SOURCE,) = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
DEFAULTS = app_defaults(ROOT)
QUICK = {
    "rounds": "2",
    "population": "3",
    "train.local-steps": "2",
    "privacy.record.calibrate-to": "noise-multiplier",
    "privacy.randomness": "seeded",
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path, home = list(sys.path), tmp_path / "mine"
    home.mkdir()
    (home / "personal_momentum.py").write_text(SOURCE)
    find_method.cache_clear()
    yield home
    find_method.cache_clear()
    sys.path[:] = path
    sys.modules.pop("personal_momentum", None)


def config_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return DEFAULTS | {"method": "personal_momentum:PersonalMomentum", "method-path": str(folder)} | changes


def run(folder: Path, out: Path, *words: str, method: str = "personal_momentum:PersonalMomentum") -> dict[str, Any]:
    sets = [word for key, value in (QUICK | {"method": method}).items() for word in ("--set", f"{key}={value}")]
    done = CliRunner().invoke(
        cli.app,
        ["run", str(folder / "run.toml"), "--app", str(ROOT), "--engine", "local", "--out", str(out), *sets, *words],
    )
    assert done.exit_code == 0, done.output
    return json.loads((out / "summary.json").read_text())


def personal(out: Path) -> Tensor:
    return read_tensors(out / "clients" / "client-001" / "prompt.safetensors")[0]["personal"]


def test_the_class_keeps_the_contract(folder: Path) -> None:
    method = type(RunConfig.from_run_config(config_of(folder)).local_method)
    check_method(method)
    check_method(method, momentum=0.0)
    assert len(SOURCE.splitlines()) <= 60


def test_it_runs_from_its_folder_and_momentum_zero_is_dpfpl(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "run.toml").write_text("")
    plain = run(folder, tmp_path / "plain", method="dpfpl")
    still = run(folder, tmp_path / "still", "--set", "plugin.personalmomentum.momentum=0.0")
    fast = run(folder, tmp_path / "fast", "--set", "plugin.personalmomentum.momentum=0.5")
    assert (plain["method"], fast["method"]) == ("dpfpl", "personal_momentum:PersonalMomentum")
    assert plain["privacy"] == still["privacy"] == fast["privacy"]  # a method changes no ε
    assert torch.equal(personal(tmp_path / "plain"), personal(tmp_path / "still"))
    assert not torch.equal(personal(tmp_path / "plain"), personal(tmp_path / "fast"))
    assert fast["config"]["method-options"] == '{"plugin.personalmomentum.momentum": 0.5}'


def test_the_velocity_lasts_from_round_to_round(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "run.toml").write_text("")
    run(folder, tmp_path / "out")
    kept = {
        name: tensor
        for file in (tmp_path / "out" / "clients" / "client-001").rglob("*.safetensors")
        for name, tensor in read_tensors(file)[0].items()
    }
    (velocity,) = [tensor for name, tensor in kept.items() if "velocity" in name]
    assert velocity.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt.personalisation": "collective", "privacy.record.trusts-server": True}, "prompt.personalisation"),
        (
            {"method": "personal_momentum:Other"},
            "has no subclass of Method called 'Other'; it has DPFPL, PersonalMomentum",
        ),
        ({"method": "nowhere:Other"}, "cannot import 'nowhere'"),
        ({"method": "personal_momentum"}, "did you mean|choose one"),
        ({"method-options": '{"plugin.personalmomentum.momentun": 1.0}'}, "has no such option; it has momentum"),
        ({"method-options": '{"plugin.personalmomentum.momentum": "fast"}'}, "expected float"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_data_are_read(folder: Path, changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_run_config(config_of(folder, **changes))


def test_the_rules_of_its_parent_hold(folder: Path) -> None:
    """What DP-FPL may not do, a class that derives from it may not do."""
    collective = {"prompt.personalisation": "collective", "privacy.record.trusts-server": True, "train.local-steps": 1}
    for method in ({}, {"method": "dpfpl", "method-path": ""}):
        with pytest.raises(ConfigError, match="with a trusted server these are clean sums"):
            RunConfig.from_run_config(config_of(folder, **collective) | method)


@pytest.mark.parametrize("fact", ["published_procedure = True", "shared = False", 'learns = "fedotp"'])
def test_a_class_keeps_the_facts_of_its_parent(folder: Path, fact: str) -> None:
    """Its parent's rules of the configuration rest on them: the paper's procedure, for example, has no ε."""
    source = SOURCE.replace("    momentum: float = 0.9", f"    {fact}\n    momentum: float = 0.9")
    (folder / "personal_momentum.py").write_text(source)
    with pytest.raises(ConfigError, match=f"it changes {fact.split()[0]}, on which the rules of 'dpfpl' rest"):
        RunConfig.from_run_config(config_of(folder))


# --- a contract that is broken ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Mixes(DPFPL):
    def move_personal(self, state: PromptState, released: Released, rates: Rates) -> PromptState:
        return replace(state, personal=state.personal - released.direction.mean(dim=0))


@dataclass(frozen=True, kw_only=True)
class InPlace(DPFPL):
    def move_personal(self, state: PromptState, released: Released, rates: Rates) -> PromptState:
        state.personal.sub_(released.direction)
        return state


@dataclass(frozen=True, kw_only=True)
class Random(DPFPL):
    def move_personal(self, state: PromptState, released: Released, rates: Rates) -> PromptState:
        return replace(state, personal=state.personal - torch.rand(()) * released.direction)


@dataclass(frozen=True, kw_only=True)
class Greedy(Method):
    """Moves what it says it does not share."""

    shared = False

    def move(self, state: PromptState, released: Released, rates: Rates) -> PromptState:
        return replace(state, own_global=state.own_global - released.of_global)


@dataclass(frozen=True, kw_only=True)
class Forgets(DPFPL):
    def memory_shapes(self, n_ctx: int, ctx_dim: int, rank: int) -> Any:
        return {"velocity": ((n_ctx, ctx_dim), torch.float32)}

    def move_personal(self, state: PromptState, released: Released, rates: Rates) -> PromptState:
        return replace(state, memory={"velocity": released.direction[:, :1]})


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Mixes, "depend on another client"),
        (InPlace, "changes its input"),
        (Random, "other bits for the same input"),
        (Greedy, "moves p_G of a trusted server"),
        (Forgets, "changes a shape or a type"),
    ],
)
def test_a_broken_method_is_caught(broken: type[Method], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_method(broken)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_ours_keep_the_contract(method: Method) -> None:
    if not method.pairs:  # two prompts, one above the other, have directions of another shape
        check_method(type(method))


@pytest.mark.slow  # Ray
def test_the_readmes_command_works_on_ray(folder: Path, tmp_path: Path) -> None:
    (command,) = re.findall(r"```sh\n(.*?)```", SECTION, flags=re.DOTALL)
    words = command.strip().replace("CHECKOUT", str(ROOT)).split()
    quick = ["--set", "population=2", "--set", "train.local-steps=1", "--out", str(tmp_path / "out")]
    place = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    done = subprocess.run([*words, *quick], cwd=folder, env=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["engine"] != "local"
    assert summary["method"] == "personal_momentum:PersonalMomentum"
