"""A tiny federation's nodes as a server sees them: what it may send, and what comes back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Message, MessageType, RecordDict
from PIL import Image
from torch import Tensor

from clients.app import app
from fl_dualpriv import messages
from fl_dualpriv.config.schema import app_defaults
from fl_dualpriv.flower.local import LocalGrid
from fl_dualpriv.privacy.plan import RoundTerms

DEFAULTS = app_defaults(Path(__file__).parents[2])
PROMPT = torch.zeros(4, 32)
KINDS: tuple[messages.PromptKind, ...] = ("zero-shot", "free", "global", "personal")

Nodes = Callable[..., LocalGrid]
# What the run configuration below promises, and what its honest server asks for.
OFFERED = RoundTerms(
    mechanism="gaussian", trusts_server=False, clip_norm=1.0, noise_multiplier=1.5, sampling_rate=0.15, releases=1
)
NO_PRIVACY = RoundTerms(
    mechanism="none", trusts_server=False, clip_norm=0.0, noise_multiplier=0.0, sampling_rate=0.15, releases=1
)


def tiny_nodes(tiny_clip_dir: Path, tmp_path: Path) -> Nodes:
    """Two classes of eight images; two clients, two rounds of one step."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")

    def start(changes: dict[str, Any] | None = None, num_supernodes: int = 2) -> LocalGrid:
        base: dict[str, Any] = {
            "population": 2,
            "supernodes": num_supernodes,
            "rounds": 2,
            "train.local-steps": 1,
            "privacy.record.calibrate-to": "noise-multiplier",
            "privacy.record.noise-multiplier": 1.5,
            "privacy.record.delta": 1e-3,
            "evaluation.held-out-data": "public",
            "data.ref": "folder",
            "data.path": str(tmp_path / "images"),
            "backbone.name": f"local-dir:{tiny_clip_dir}",
            "resources.device": "cpu",
            "output.dir": str(tmp_path / "out"),
        }
        return LocalGrid(app, num_supernodes, DEFAULTS | base | (changes or {}))

    return start


def ask(grid: LocalGrid, content: RecordDict, kind: str) -> Message:
    (reply,) = grid.send_and_receive([Message(content, 1, kind)])
    return reply


def train(
    grid: LocalGrid,
    server_round: int = 1,
    terms: RoundTerms = OFFERED,
    token: str = "t",
    partitions: tuple[int, ...] = (0,),
    prompt: Tensor = PROMPT,
) -> Message:
    task = messages.TrainRequest(
        partitions=partitions, global_prompt=prompt, server_round=server_round, run_token=token, terms=terms
    )
    return ask(grid, messages.train_content(task), MessageType.TRAIN)


def uploads(reply: Message) -> messages.Uploads:
    assert not reply.has_error(), reply.error.reason
    return messages.read_uploads(reply, (4, 32))


def evaluate(grid: LocalGrid, prompt: messages.PromptKind = "personal", partitions: tuple[int, ...] = (0,)) -> Message:
    task = messages.EvaluateRequest(
        partitions=partitions, global_prompt=PROMPT, server_round=1, run_token="t", prompt=prompt
    )
    return ask(grid, messages.evaluate_content(task), MessageType.EVALUATE)


def ledger_lines(tmp_path: Path, partition: int = 0) -> int:
    path = tmp_path / "out" / "clients" / f"client-{partition:03d}" / "ledger.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0
