"""Files that a deployed client keeps so that its prompt can be published later. No file holds private data."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fl_dualpriv import __version__
from fl_dualpriv.config.methods import find_method
from fl_dualpriv.config.plans import client_level_plan, record_level_plan
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.files import write_json, write_tensors
from fl_dualpriv.methods.base import Method
from fl_dualpriv.metrics import ScoreTable
from fl_dualpriv.privacy.plan import record_level_releases
from fl_dualpriv.tasks.base import Task

NODE_RUN_FILE, SCORED_FILE = "node-run.json", "scored.safetensors"


@dataclass(frozen=True, kw_only=True)
class NodeRun:
    """Facts about the run of a deployed node's prompt, kept in ``node-run.json``.

    Attributes:
        run_token: Token of the run.
        client: Partition of the client.
        method: Method of the run.
        method_path: Folder of the module of a user's method; empty for others, and in files of older versions.
        method_options: Options of that method.
        rounds: Number of rounds of the run.
        population: Number of clients of the run.
        version: Version of fl-dualpriv.
        randomness: Source of the noise.
        split: Split that is scored.
        releases: Entries of the privacy table of one client at record level; empty without record-level DP.
        claims_client_level: True if the run also states a client-level ε, which covers no personal prompt.
        use: Facts about the use of the prompt, see `use_facts`.
        backbone: Name of the model, as configured; it stays on the node.
        pretrained: Name of the weights, as configured; it stays on the node.
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
    method_path: str = ""
    method_options: str = ""

    @property
    def local_method(self) -> Method:
        """The method of the run, one of ours or a user's."""
        return find_method(self.method, self.method_path, self.method_options)


def keep_node_run(folder: Path, config: RunConfig, task: Task, run_token: str, client: int, *, scored: bool) -> None:
    """Write ``node-run.json`` into the folder of a deployed node's client, in the first round of a run.

    In later rounds it only reads the run token of the file. A process of a node answers one message, and reading a line
    costs less than a fingerprint of all weights in each round.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads((folder / NODE_RUN_FILE).read_text(encoding="utf-8"))["run_token"] == run_token:
            return
    plan, method, use = record_level_plan(config), config.local_method, task.use_facts(config)
    rows = []
    if plan is not None:
        is_collective = config.prompt.personalisation == "collective"
        rows = record_level_releases(plan, shared=method.shared, scored=scored, collective=is_collective)
    node_run = NodeRun(
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
        method_path=config.method_path,
        method_options=config.method_options,
    )
    write_json(folder / NODE_RUN_FILE, asdict(node_run))


def keep_scored(
    folder: Path, prompt: Tensor, table: ScoreTable, run_token: str, server_round: int, class_prior: str
) -> None:
    """Keep a scored personal prompt with its accuracies; the last global prompt of a run comes with the last score.

    Args:
        folder: State folder of the node.
        prompt: Effective prompt of the only client.
        table: Counts of that client.
        run_token: Token of the run.
        server_round: Number of the round.
        class_prior: Kind of the prior with which the local accuracy was made.
    """
    (local,), (neighbour,) = table.local(), table.neighbour()
    metadata = {"run-token": run_token, "server-round": str(server_round), "class-prior": class_prior}
    metadata |= {"local": json.dumps(local), "neighbour": json.dumps(neighbour)}
    write_tensors(folder / SCORED_FILE, {"prompt": prompt}, metadata)
