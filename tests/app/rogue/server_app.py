"""A server that joins its nodes and then asks client 0 for what it must not get, as well as for two honest rounds.

``acts.json`` in the output folder says what it asks: lists of names, each asked at once, after the answers to the one
before. ``summary.json`` then says what it was answered. It carries the weight of no model, to start quickly.
"""

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from fl_dualpriv import messages
from fl_dualpriv.config.plans import record_level_plan
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.privacy.plan import round_terms

app = ServerApp()


def tasks(honest: messages.TrainRequest) -> dict[str, messages.TrainRequest]:
    """What may be asked, by name; ``honest`` is what our server asks in round 1."""
    second, terms = replace(honest, server_round=2), honest.terms
    changes: dict[str, dict[str, Any]] = {
        "one step too many": {"releases": terms.releases + 1},
        "less noise": {"noise_multiplier": 0.99 * terms.noise_multiplier},
        "a larger clip norm": {"clip_norm": 1.01 * terms.clip_norm},
        "a higher sampling rate": {"sampling_rate": min(1.0, 1.01 * terms.sampling_rate)},
        "a clean sum": {"trusts_server": True},
        "no mechanism": {"mechanism": "none"},
    }
    changes["all of these"] = {name: value for change in changes.values() for name, value in change.items()}
    n_ctx, ctx_dim = honest.global_prompt.shape
    return {
        "round 1": honest,
        "round 2": second,
        **{name: replace(second, terms=replace(terms, **change)) for name, change in changes.items()},
        "a replayed message": honest,
        "another prompt shape": replace(second, global_prompt=torch.zeros(n_ctx + 1, ctx_dim)),
        "a client that is not there": replace(second, partitions=(99,)),
        "a round beyond the budget": replace(honest, server_round=3),
        "a new run": replace(honest, run_token="new"),
    }


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Join, ask, note."""
    config = RunConfig.from_run_config(context.run_config)
    folder = Path(config.output.dir)
    node = join(grid, config)
    model = json.loads((Path(config.backbone.name.removeprefix("local-dir:")) / "open_clip_config.json").read_text())
    known = tasks(
        messages.TrainRequest(
            partitions=(0,),
            global_prompt=torch.zeros(config.prompt.n_ctx, model["model_cfg"]["text_cfg"]["width"]),
            server_round=1,
            run_token=f"run-{context.run_id}",
            terms=round_terms(record_level_plan(config), config.train.sampling_rate, config.train.local_steps),
        )
    )
    answers: dict[str, Any] = {}
    for names in json.loads((folder / "acts.json").read_text()):
        answers |= ask(grid, node, {name: known[name] for name in names}, config.reply_timeout)
    (folder / "part").write_text(json.dumps(answers))
    (folder / "part").replace(folder / "summary.json")


def join(grid: Grid, config: RunConfig) -> int:
    """Wait for all nodes; the one that hosts client 0."""
    while len(nodes := list(grid.get_node_ids())) < config.num_supernodes:
        time.sleep(0.2)
    if len(nodes) == 1:
        return nodes[0]
    requests = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes]
    replies = grid.send_and_receive(requests, timeout=config.reply_timeout)
    (host,) = [r.metadata.src_node_id for r in replies for card in messages.read_cards(r) if card.partition == 0]
    return host


def ask(grid: Grid, node: int, asked: dict[str, messages.TrainRequest], timeout: float) -> dict[str, Any]:
    """Send some requests at once; wait for all answers."""
    requests = [Message(messages.train_content(task), node, MessageType.TRAIN) for task in asked.values()]
    names = dict(zip(grid.push_messages(requests), asked, strict=True))
    answers: dict[str, Any] = {}
    deadline = time.monotonic() + timeout
    while names and time.monotonic() < deadline:
        for reply in grid.pull_messages(list(names)):
            answers[names.pop(reply.metadata.reply_to_message_id)] = noted(reply)
        time.sleep(0.2)
    return answers


def noted(reply: Message) -> dict[str, Any]:
    """What left the node: how many numbers, which, and the words beside them."""
    if reply.has_error():
        return {"numbers": 0, "reason": reply.error.reason}
    arrays = [array.numpy() for record in reply.content.array_records.values() for array in record.values()]
    which = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    (reasons,) = (record["reasons"] for record in reply.content.config_records.values())
    return {"numbers": sum(array.size for array in arrays), "which": which, "reason": "; ".join(map(str, reasons))}
