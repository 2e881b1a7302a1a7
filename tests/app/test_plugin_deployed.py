"""Users' classes on a deployed SuperLink. The server takes a strategy from a folder; nodes run the pinned bundle."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fl_dualpriv.files import read_tensors
from fl_dualpriv.run.file_kinds import read_totals
from tests.app.run_folders import events_of
from tests.app.test_rogue_server import run_config, write_app, write_node_file

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
METHOD, LEARNER = (
    re.findall(r"```python\n(.*?)```", README.split(f"## {section}")[1].split("\n## ")[0], flags=re.DOTALL)[0]
    for section in ("Write a method", "Write a learner")
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]  # a process a message, and each imports torch

COUNTING = '''
"""Moves every number by one a round, whatever clients say: what comes out shows that it ran."""

from dataclasses import dataclass

from torch import Tensor

from fl_dualpriv.server.strategy import RoundStrategy


@dataclass(kw_only=True)
class Counting(RoundStrategy):
    """With an option."""

    stride: float = 1.0

    def server_update(self, prompt: Tensor, diff: Tensor) -> Tensor:
        """The stride further."""
        return prompt + self.stride
'''


def test_a_strategy_in_a_folder_of_the_server_runs_on_a_deployed_superlink(
    deployment: Any, images: Path, tiny_clip_dir: Path, tmp_path: Path
):
    app, plugins, out = write_app(tmp_path / "app", rogue=False), tmp_path / "plugins", tmp_path / "out"
    plugins.mkdir()
    (plugins / "counting.py").write_text(COUNTING)
    superlink = deployment.superlink("superlink-plugin")
    deployment.node("node-plugin", superlink, write_node_file(tmp_path, images, app))
    config = run_config(
        images,
        tiny_clip_dir,
        out,
        [],
        rounds=2,
        population=1,
        **{
            "method": "promptfl",
            "prompt.init": "random",
            "evaluation.every": 1000,
            "strategy.ref": "counting:Counting",
            "strategy.path": str(plugins),
            "strategy.options": json.dumps({"plugin.counting.stride": 0.5}),
        },
    )
    superlink.submit(app, config)
    deployment.wait_until(lambda: (out / "summary.json").exists() or (out / "error.json").exists(), 300)
    assert not (out / "error.json").exists(), (out / "error.json").read_text()
    assert read_totals(out)["failures"] == 0
    prompt = read_tensors(out / "prompts" / "global.safetensors")[0]["global"]
    start = prompt - 1.0  # two strides
    assert float(start.abs().max()) < 0.2  # N(0, 0.02²), as it was drawn
    assert float(start.std()) > 0.01
    assert torch.isfinite(prompt).all()
    assert [event["server_round"] for event in events_of(tmp_path / "state" / "ledger.jsonl")] == [1, 2]


def test_a_method_and_a_learner_in_the_pinned_bundle_run_on_a_deployed_node(
    deployment: Any, images: Path, tiny_clip_dir: Path, tmp_path: Path
):
    app = write_app(tmp_path / "app", rogue=False)
    (app / "clients" / "personal_momentum.py").write_text(METHOD)
    (app / "clients" / "adapter.py").write_text(LEARNER)
    superlink = deployment.superlink("superlink-classes")
    deployment.node("node-classes", superlink, write_node_file(tmp_path, images, app))
    common = {"evaluation.every": 1000, "rounds": 1, "population": 1}  # the node's budget pays for two rounds in all
    runs: dict[str, dict[str, Any]] = {
        "method": {"method": "clients.personal_momentum:PersonalMomentum"},
        "learner": {
            "method": "promptfl",
            "prompt.learner": "clients.adapter:Adapter",
            "prompt.learner-options": json.dumps({"plugin.adapter.width": 4}),
        },
    }
    for name, changes in runs.items():
        out = tmp_path / name
        superlink.submit(app, run_config(images, tiny_clip_dir, out, [], **common, **changes))
        deployment.wait_until(lambda out=out: (out / "summary.json").exists() or (out / "error.json").exists(), 300)
        assert not (out / "error.json").exists(), (out / "error.json").read_text()
        assert read_totals(out)["failures"] == 0
        kept = {key for file in (tmp_path / "state").rglob("prompt.safetensors") for key in read_tensors(file)[0]}
        assert any(key.endswith("velocity") for key in kept) == (name == "method")
    learned = read_tensors(tmp_path / "learner" / "prompts" / "global.safetensors")[0]["global"]
    assert (learned.shape[1] - 4) % 9 == 0  # 4·d + 4 + 4·d + d with d features
    assert learned.any()
    assert len(events_of(tmp_path / "state" / "ledger.jsonl")) == 2
