"""A user's learner, CLIP-Adapter as the README gives it: one file and its options, through Opacus' rows."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from fl_dualpriv.cli import main as cli
from fl_dualpriv.config.schema import RunConfig, app_defaults
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.files import read_tensors
from fl_dualpriv.learners.base import ClientData
from fl_dualpriv.learners.module import ModuleObjective
from fl_dualpriv.privacy.step import client_rows
from fl_dualpriv.testing import check_learner
from tests.guarantees import objective_checks

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("## Write a learner")[1].split("\n## ")[0]
(SOURCE,) = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
DEFAULTS = app_defaults(ROOT)
QUICK = {
    "rounds": "1",
    "population": "3",
    "train.local-steps": "2",
    "method": "promptfl",
    "prompt.learner": "adapter:Adapter",
    "privacy.record.calibrate-to": "noise-multiplier",
    "privacy.randomness": "seeded",
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path, home = list(sys.path), tmp_path / "mine"
    home.mkdir()
    (home / "adapter.py").write_text(SOURCE)
    (home / "run.toml").write_text("")
    yield home
    sys.path[:] = path
    sys.modules.pop("adapter", None)


def adapter(**options: Any) -> nn.Module:
    space: dict[str, Any] = {"__name__": "adapter"}
    exec(compile(SOURCE, "adapter.py", "exec"), space)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return space["Adapter"](nn.functional.normalize(torch.randn(3, 6), dim=1), **options)


def records(count: int, seed: int = 0) -> ClientData:
    g = torch.Generator().manual_seed(seed)
    features = nn.functional.normalize(torch.randn(count, 6, generator=g), dim=1)
    return ClientData(features=features, labels=torch.arange(count) % 3)


def test_the_module_keeps_the_contract() -> None:
    data = records(9)
    check_learner(adapter(), data.features, data.labels)
    assert len(SOURCE.splitlines()) <= 60


def test_its_rows_are_autograds_and_one_record_moves_a_sum_by_c() -> None:
    module = adapter()
    objective = ModuleObjective(module)
    prompt = objective.learner.vector()[None]
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]

    def loss(vector: Tensor, data: ClientData) -> Tensor:
        parts = vector.flatten().split([p.numel() for p in objective.learner.parameters])
        weights = {n: part.view_as(p) for n, part, p in zip(names, parts, objective.learner.parameters, strict=True)}
        logits = torch.func.functional_call(adapter(), weights, (data.features,))
        return nn.functional.cross_entropy(logits, data.labels, reduction="sum")

    objective_checks.gradients_are_autograds(objective, prompt, records(5), loss)
    objective_checks.one_record_moves_the_sum_by_at_most_c(objective, prompt, records(6))
    objective_checks.a_bad_record_is_a_zero(objective, prompt, records(6), "features")
    objective_checks.clients_do_not_mix(objective, torch.stack([prompt, 2 * prompt]), [records(3, 1), records(9, 2)])


def test_a_class_prior_is_added_to_its_logits() -> None:
    objective, data, prior = ModuleObjective(adapter()), records(5), torch.tensor([0.0, -2.0, 1.0])
    prompt = objective.learner.vector()[None, None]
    with_prior = ClientData(features=data.features, labels=data.labels, log_prior=prior)
    rows = [
        torch.cat(list(client_rows(objective.bind([own]).gradients(prompt, [np.arange(5)]), 0)))[:5]
        for own in (data, with_prior)
    ]
    assert not torch.equal(*rows)


def run(folder: Path, out: Path, *words: str) -> Any:
    sets = [word for key, value in QUICK.items() for word in ("--set", f"{key}={value}")]
    fixed = ["run", str(folder / "run.toml"), "--app", str(ROOT), "--engine", "local", "--out", str(out)]
    return CliRunner().invoke(cli.app, [*fixed, *sets, *words])


def test_it_runs_from_its_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    done = run(folder, tmp_path / "out", "--set", "plugin.adapter.width=4")
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["config"]["prompt.learner-options"] == '{"plugin.adapter.width": 4}'
    assert {row["guarantee"] for row in summary["privacy"]} == {"theorem"}
    learned = read_tensors(tmp_path / "out" / "prompts" / "global.safetensors")[0]["global"]
    size = summary["config"]["backbone.name"] and learned.shape[1]
    assert learned.shape == (1, size)
    assert (size - 4) % 9 == 0  # 4·d + 4 + 4·d + d with d features
    refused = CliRunner().invoke(cli.app, ["export", str(tmp_path / "out"), "--client", "global"])
    assert refused.exit_code != 0
    assert "cannot be used without the run" in refused.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("prompt.learner=adapter:Other",), "has no subclass of Module called 'Other'"),
        (("plugin.adapter.width=wide",), "expected int"),
        (("plugin.adapter.widht=4",), "has no such option; it has share, width"),
        (("train.top-m=3",), "is a module of your own, whose parameters get the noise"),
        (("method=dpfpl",), 'must be "context" for this method'),
    ],
)
def test_what_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(folder)
    done = run(folder, tmp_path / "out", *(word for text in words for word in ("--set", text)))
    assert done.exit_code != 0
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_an_audit_of_it_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    config = str(ROOT / "simulations" / "configs" / "audit-record.toml")
    done = CliRunner().invoke(cli.app, ["audit", config, "--set", "prompt.learner=adapter:Adapter"])
    assert done.exit_code == 2
    assert "has no class features, which attacks and audits need" in " ".join(done.output.split())


def test_an_unknown_learner_is_refused_with_the_names() -> None:
    with pytest.raises(ConfigError, match="must be one of context, head, lora"):
        RunConfig.from_run_config(DEFAULTS | {"prompt.learner": "adaptor"})


@pytest.mark.slow  # Ray
def test_the_readmes_command_works_on_ray(folder: Path, tmp_path: Path) -> None:
    (command,) = re.findall(r"```sh\n(.*?)```", SECTION, flags=re.DOTALL)
    words = command.strip().replace("CHECKOUT", str(ROOT)).split()
    quick = ["--set", "population=2", "--set", "train.local-steps=1", "--out", str(tmp_path / "out")]
    place = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    done = subprocess.run([*words, *quick], cwd=folder, env=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["engine"] != "local"
