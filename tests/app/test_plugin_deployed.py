"""A user's strategy on a deployed SuperLink, from a folder of the server's machine; nodes run the pinned bundle."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fl_dualpriv.files import read_tensors
from fl_dualpriv.run.file_kinds import read_totals
from tests.app.run_folders import events_of
from tests.app.test_rogue_server import run_config, write_app, write_node_file

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
