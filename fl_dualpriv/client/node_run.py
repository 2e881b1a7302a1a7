"""Files that a deployed client keeps so that its prompt can be published later. None of them holds private data."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fl_dualpriv import __version__
from fl_dualpriv.config.plans import client_level_plan, record_level_plan
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.files import write_json, write_tensors
from fl_dualpriv.methods.base import METHODS
from fl_dualpriv.metrics import Score
from fl_dualpriv.privacy.plan import record_level_releases
from fl_dualpriv.tasks.base import Task

NODE_RUN_FILE, SCORED_FILE = "node-run.json", "scored.safetensors"


@dataclass(frozen=True, kw_only=True)
class NodeRun:
    """What a deployed node keeps of the run that its prompt is of, in ``node-run.json``.

    Attributes:
        run_token: Of the run.
        client: Which client the node was.
        method: Of the run.
        rounds: Of the run.
        population: Of the run.
        version: Of fl-dualpriv.
        randomness: Of the noise.
        split: That is scored.
        releases: Entries of the privacy table of one client at record level; empty without it.
        claims_client_level: Whether the run states an ε of clients, too, which covers no personal prompt.
        use: See `use_facts`.
        backbone: Name of the model, as configured; it stays on the node.
        pretrained: Likewise.
    """

    run_token: str
    client: int
    method: str
    rounds: int
    population: int
    version: str
    randomness: Literal["os", "seeded"]
    split: str
    releases: Sequence[Mapping[str, Any]]
    claims_client_level: bool
    use: Mapping[str, Any] | None
    backbone: str
    pretrained: str


def keep_node_run(folder: Path, config: RunConfig, task: Task, run_token: str, client: int, *, scored: bool) -> None:
    """Write ``node-run.json`` into the folder of a deployed node's client, in the first round of a run.

    A process of a node answers one message: reading a line costs less than a fingerprint of all weights in each round.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads((folder / NODE_RUN_FILE).read_text(encoding="utf-8"))["run_token"] == run_token:
            return
    plan, parts, use = record_level_plan(config), METHODS[config.method], task.use_facts(config)
    rows = record_level_releases(plan, shared=parts.shared, scored=scored) if plan is not None else []
    kept = NodeRun(
        run_token=run_token,
        client=client,
        method=config.method,
        rounds=config.rounds,
        population=config.population,
        version=__version__,
        randomness=config.privacy.randomness,
        split=config.evaluation.split,
        releases=[asdict(row) for row in rows],
        claims_client_level=client_level_plan(config) is not None,
        use=None if use is None else asdict(use),
        backbone=config.backbone.name,
        pretrained=config.backbone.pretrained,
    )
    write_json(folder / NODE_RUN_FILE, asdict(kept))


def keep_scored(folder: Path, prompt: Tensor, score: Score, run_token: str, server_round: int) -> None:
    """Keep a personal prompt as it was scored, with its counts: the last global prompt comes with the last score."""
    metadata = {"run-token": run_token, "server-round": str(server_round)}
    for kind in ("local", "neighbour"):
        correct, total = getattr(score, f"{kind}_correct"), getattr(score, f"{kind}_total")
        metadata[kind] = f"{correct}/{total}"
    write_tensors(folder / SCORED_FILE, {"prompt": prompt}, metadata)
