"""A user's strategy, as the README gives it, from an empty folder; what is refused, before data are read."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fl_dualpriv.cli import main as cli
from fl_dualpriv.config.schema import app_defaults
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.files import read_tensors
from fl_dualpriv.flower.local import run_local

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "simulations" / "configs" / "client-level.toml"
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("## Write a strategy")[1].split("\n## ")[0]
STRATEGY, VARIANT = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
NO_SEARCH = {f"privacy.{level}.calibrate-to": "noise-multiplier" for level in ("record", "client")}
"""Finding the noise for an epsilon takes seconds."""
CLIENT_LEVEL = {"privacy.record.mechanism": "none", "privacy.client.mechanism": "gaussian"}


def variant(*, proved: bool) -> str:
    """The README's class with the README's combine(), and with its sensitivity() or without."""
    combine, _, proof = VARIANT.partition("    def sensitivity")
    imports = STRATEGY.replace("from dataclasses", "from collections.abc import Sequence\nfrom dataclasses").replace(
        "import RoundStrategy", "import RoundStrategy, Update"
    )
    return imports.rstrip("\n") + "\n\n" + combine + (f"    def sensitivity{proof}" if proved else "")


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs `fl-dualpriv run` from a folder that holds one file."""
    seen: Counter[str] = Counter()
    path = list(sys.path)

    def run(name: str, source: str, *arguments: str) -> tuple[Any, Path]:
        folder, out = tmp_path / f"only-{name}", tmp_path / f"out-{len(seen)}-{sum(seen.values())}"
        seen[name] += 1
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(source)
        monkeypatch.chdir(folder)
        ref = f"strategy.ref={name}:Momentum"
        quick = [word for key, value in NO_SEARCH.items() for word in ("--set", f"{key}={value}")]
        done = CliRunner().invoke(cli.app, ["run", str(CONFIG), "--set", ref, "--out", str(out), *quick, *arguments])
        assert {path.name for path in folder.iterdir()} <= {f"{name}.py", "__pycache__"}
        return done, out

    yield run
    sys.path[:] = path
    for name in seen:
        sys.modules.pop(name, None)


@pytest.mark.slow  # three programs that load torch
def test_the_readmes_commands_work_from_an_empty_folder(tmp_path: Path):
    """Each command of the section as it stands there; CHECKOUT is this checkout, and momentum.py is saved as told."""
    commands = [
        line.partition("  #")[0].strip()
        for block in re.findall(r"```sh\n(.*?)```", SECTION, flags=re.DOTALL)
        for line in block.splitlines()
    ]
    assert [command.split()[0] for command in commands] == ["fl-dualpriv", "python", "fl-dualpriv", "fl-dualpriv"]
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
    }
    for number, command in enumerate(commands):
        if "momentum:Momentum" in command:
            (folder / "momentum.py").write_text(STRATEGY, encoding="utf-8")
            command += " --engine local --set rounds=1"  # Ray takes half a minute to start
        words = [
            str(ROOT) + word.removeprefix("CHECKOUT") if word.startswith("CHECKOUT") else word
            for word in shlex.split(command)
        ]
        if words[:2] == ["fl-dualpriv", "run"]:
            words += ["--out", str(tmp_path / f"out-{number}")]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert {path.name for path in folder.iterdir()} - {"__pycache__", ".pytest_cache"} == {
        *("my_mean.py", "test_my_mean.py", "momentum.py")
    }
    refs = [json.loads((tmp_path / f"out-{n}" / "summary.json").read_text())["config"]["strategy.ref"] for n in (2, 3)]
    assert refs == ["my_mean:MyMean", "momentum:Momentum"]


def test_the_readmes_strategy_is_short():
    assert len(STRATEGY.splitlines()) <= 30
    assert len(variant(proved=True).splitlines()) <= 30


def test_a_combine_without_sensitivity_is_refused_and_says_so(start: Any):
    done, out = start("readme_unproved", variant(proved=False), "--engine", "local")
    assert done.exit_code == 2
    assert "Momentum overrides combine() but not sensitivity()" in " ".join(done.output.split())
    assert json.loads((out / "error.json").read_text())["type"] == "PrivacyError"
    # With it, the class is accepted, and the next thing that is wrong is told.
    done, _ = start("readme_proved", variant(proved=True), "--engine", "local", "--set", "backbone.name=hf:/nowhere")
    assert "/nowhere" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plugin.momentun.momentum=0.5"], "did you mean plugin.momentum.momentum"),
        (["plugin.momentum.momentun=0.5"], "Momentum has no such option; it has momentum"),
        (["plugin.momentum.momentum=high"], "expected float"),
        (["strategy.ref=no_such_module:Momentum"], "cannot import 'no_such_module'"),
    ],
    ids=["class", "field", "type", "module"],
)
def test_wrong_options_are_told(start: Any, arguments: list[str], message: str):
    sets = [word for argument in arguments for word in ("--set", argument)]
    done, _ = start("readme_options", STRATEGY, "--engine", "local", *sets)
    assert done.exit_code in (1, 2)
    assert message in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (CLIENT_LEVEL, PrivacyError, "FedMedian cannot run with noise of the server at client level"),
        (
            {"privacy.record.trusts-server": True},
            PrivacyError,
            "FedMedian cannot run with noise of the server at record",
        ),
        ({"strategy.ref": "flwr.serverapp.strategy:FedProx"}, ConfigError, "proximal"),
        (
            {"strategy.ref": "strategies.krum:Krum", "privacy.record.trusts-server": True},
            PrivacyError,
            "Krum cannot run",
        ),
    ],
    ids=["client level", "trusted server", "FedProx", "Krum on sums"],
)
def test_flowers_strategies_are_refused_before_data_are_read(
    tmp_path: Path, asked: Counter[str], changes: dict[str, Any], error: type[Exception], message: str
):
    base = {"strategy.ref": "flwr.serverapp.strategy:FedMedian", "data.path": "/nowhere", "train.local-steps": 1}
    with pytest.raises(error, match=message):
        run_local(ROOT, app_defaults(ROOT) | base | NO_SEARCH | {"output.dir": str(tmp_path / "out")} | changes)
    assert not asked


@pytest.fixture
def small(images: Path, tiny_clip_dir: Path) -> list[str]:
    """Options of a run of three clients on a tiny model, one step each in two rounds."""
    words = {
        "population": 3,
        "rounds": 2,
        "privacy.client.expected-cohort": 2.0,
        "privacy.randomness": "seeded",
        "train.local-steps": 1,
        "evaluation.held-out-data": "public",
        "data.ref": "folder",
        "data.path": images,
        "backbone.name": f"local-dir:{tiny_clip_dir}",
        "resources.device": "cpu",
    }
    return [word for key, value in words.items() for word in ("--set", f"{key}={value}")]


def prompt_of(out: Path) -> torch.Tensor:
    return read_tensors(out / "prompts" / "global.safetensors")[0]["global"]


@pytest.mark.slow
@pytest.mark.timeout(900)  # Ray and Flower's programs on a busy machine
def test_the_readmes_strategy_runs_from_an_empty_folder_on_both_engines(start: Any, small: list[str]):
    prompts = {}
    for engine, momentum in (("local", "0.5"), ("ray", "0.5"), ("local", "0.0")):
        option = ["--engine", engine, "--set", f"plugin.momentum.momentum={momentum}"]
        done, out = start("readme_momentum", STRATEGY, *small, *option)
        assert done.exit_code == 0, done.output
        summary = json.loads((out / "summary.json").read_text())
        assert {(release["unit"], release["guarantee"]) for release in summary["privacy"]} == {("client", "theorem")}
        assert json.loads(summary["config"]["strategy.options"]) == {"plugin.momentum.momentum": float(momentum)}
        prompts[engine, momentum] = prompt_of(out)
    assert torch.equal(prompts["local", "0.5"], prompts["ray", "0.5"])
    assert not torch.equal(prompts["local", "0.5"], prompts["local", "0.0"])


@pytest.mark.slow
def test_the_proved_variant_runs(start: Any, small: list[str]):
    done, _ = start("readme_variant", variant(proved=True), *small, "--engine", "local")
    assert done.exit_code == 0, done.output


@pytest.mark.slow
@pytest.mark.parametrize("ref", ["flwr.serverapp.strategy:FedAdam", "flwr.serverapp.strategy:FedMedian"])
def test_flowers_strategies_run_over_private_clients(start: Any, small: list[str], ref: str):
    """Record level with noise at the clients: the rule is post-processing."""
    private = ["privacy.client.mechanism=none", "privacy.record.mechanism=gaussian", f"strategy.ref={ref}"]
    private += ["privacy.record.delta=0.001"]
    words = [word for text in private for word in ("--set", text)]
    done, out = start("readme_beside", STRATEGY, *small, *words, "--engine", "local")
    assert done.exit_code == 0, done.output
    assert {r["unit"] for r in json.loads((out / "summary.json").read_text())["privacy"]} == {"record"}
