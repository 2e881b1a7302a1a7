"""The peer "plain Flower + Ray": a FedAvg app in the form of Flower's documentation, on the same task.

`python -m benchmarks.plain_flower TASK OUT ROUNDS` runs it with the same launcher as our own app, with two actors of
one thread each. This file is copied into a separate app folder, because Flower ships whole folders to its clients. The
clients import the task from the installed checkout.
"""

import functools
import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

if TYPE_CHECKING:
    from benchmarks.peer_task import PeerModel, PeerTask

server = ServerApp()
client = ClientApp()

_PYPROJECT = """
[project]
name = "plain-flower"
version = "1.0.0"
description = "FedAvg"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "benchmark"

[tool.flwr.app.components]
serverapp = "plain_flower:server"
clientapp = "plain_flower:client"

[tool.flwr.app.config]
task = ""
out = ""
rounds = 1
"""


@functools.lru_cache(maxsize=1)
def _loaded(path: str) -> "tuple[PeerTask, PeerModel]":
    """Load task and model once per process, because an actor lives for the whole run."""
    import torch

    from benchmarks.peer_task import PeerModel, load_task

    torch.set_num_threads(1)
    task = load_task(Path(path))
    return task, PeerModel(task)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Run the task's SGD steps from the global model."""
    from benchmarks.peer_task import local_steps

    task, model = _loaded(str(context.run_config["task"]))
    content: Any = message.content
    model.load_state_dict(content["arrays"].to_torch_state_dict())
    mine = int(context.node_config["partition-id"])
    local_steps(model, task.features[mine], task.labels[mine], task)
    reply = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": len(task.labels[mine])}),
        }
    )
    return Message(reply, reply_to=message)


class _Counting(FedAvg):
    """FedAvg that counts the failures which Flower only logs."""

    failures = 0

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """Count the failures, then aggregate as FedAvg does."""
        replies = list(replies)
        self.failures += sum(reply.has_error() for reply in replies)
        return super().aggregate_train(server_round, replies)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Wait for all clients, train, and write a line per round and the result."""
    import numpy as np

    task, model = _loaded(str(context.run_config["task"]))
    out, rounds = Path(str(context.run_config["out"])), int(context.run_config["rounds"])
    while len(list(grid.get_node_ids())) < task.clients:
        time.sleep(0.1)

    def note(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round > 0:
            with (out / "rounds.jsonl").open("a") as file:
                file.write(json.dumps({"round": server_round}) + "\n")
        return None

    strategy = _Counting(
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_available_nodes=task.clients,
        min_train_nodes=task.clients,
    )
    result: Any = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=rounds,
        train_config=ConfigRecord(),
        evaluate_fn=note,
    )
    np.save(out / "prompt.npy", result.arrays.to_torch_state_dict()["prompt"].numpy())
    (out / "summary.json").write_text(json.dumps({"failures": strategy.failures}))


def launch(task: Path, out: Path, rounds: int, clients: int) -> None:
    """Run the app on Flower's simulation runtime, and raise an error if it fails."""
    from fl_dualpriv.flower.engine import run_flower

    app = out / "plain-flower"  # Flower refuses folders with an underscore
    app.mkdir(parents=True)
    (app / "pyproject.toml").write_text(_PYPROJECT)
    shutil.copy(__file__, app / "plain_flower.py")
    run_flower(
        app,
        {"task": str(task), "out": str(out), "rounds": rounds},
        num_supernodes=clients,
        cpus_per_client=1,
        gpus_per_client=0.0,
        work_dir=out,
    )


if __name__ == "__main__":
    from benchmarks.peer_task import load_task

    launch(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), load_task(Path(sys.argv[1])).clients)
