"""The only file that knows the keys inside Flower messages: kebab-case outside, typed values inside."""

import re
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fl_dualpriv.evaluation import Score

PromptKind = Literal["zero-shot", "global", "personal"]


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """What the server asks of a client in one round."""

    global_prompt: Tensor
    server_round: int
    run_token: str
    noise_multiplier: float


@dataclass(frozen=True, kw_only=True)
class EvaluateTask:
    """Which prompt a client should score."""

    global_prompt: Tensor
    server_round: int
    run_token: str
    prompt: PromptKind


@dataclass(frozen=True, kw_only=True)
class ClientCard:
    """What a client says about itself before round 1: public metadata."""

    partition: int
    num_examples: int


def to_arrays(prompt: Tensor) -> ArrayRecord:
    """Wrap the global prompt, the only tensor the server ever sends."""
    return _pack("global-prompt", prompt)


def from_arrays(arrays: ArrayRecord) -> Tensor:
    """Undo `to_arrays`."""
    return _unpack(arrays, "global-prompt")


def _pack(name: str, tensor: Tensor) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor.detach().cpu().numpy())})


def _unpack(arrays: ArrayRecord, name: str) -> Tensor:
    if list(arrays) != [name]:
        raise ValueError(f"arrays {sorted(arrays)} in a message; expected {name!r} alone")
    # A copy: the record's memory is read-only.
    return torch.from_numpy(np.array(arrays[name].numpy()))


def train_content(task: TrainTask) -> RecordDict:
    """Content of a train message."""
    config = ConfigRecord(
        {"server-round": task.server_round, "run-token": task.run_token, "noise-multiplier": task.noise_multiplier}
    )
    return RecordDict({"arrays": to_arrays(task.global_prompt), "config": config})


def read_train(message: Message) -> TrainTask:
    """Undo `train_content`."""
    config = message.content.config_records["config"]
    return TrainTask(
        global_prompt=from_arrays(message.content.array_records["arrays"]),
        server_round=int(config["server-round"]),  # type: ignore[arg-type]
        run_token=str(config["run-token"]),
        noise_multiplier=float(config["noise-multiplier"]),  # type: ignore[arg-type]
    )


def evaluate_content(task: EvaluateTask) -> RecordDict:
    """Content of an evaluate message."""
    config = ConfigRecord({"server-round": task.server_round, "run-token": task.run_token, "prompt": task.prompt})
    return RecordDict({"arrays": to_arrays(task.global_prompt), "config": config})


def read_evaluate(message: Message) -> EvaluateTask:
    """Undo `evaluate_content`."""
    config = message.content.config_records["config"]
    kind = config["prompt"]
    if kind not in ("zero-shot", "global", "personal"):
        raise ValueError(f"prompt = {kind!r} in an evaluate message; allowed: zero-shot, global, personal")
    return EvaluateTask(
        global_prompt=from_arrays(message.content.array_records["arrays"]),
        server_round=int(config["server-round"]),  # type: ignore[arg-type]
        run_token=str(config["run-token"]),
        prompt=kind,
    )


def upload_content(upload: Tensor) -> RecordDict:
    """Content of a train reply: the upload and nothing else."""
    return RecordDict({"arrays": _pack("upload", upload)})


def read_upload(reply: Message, shape: tuple[int, ...]) -> Tensor:
    """The upload of a train reply, float64.

    Raises:
        ValueError: If it is not one floating-point tensor of ``shape``.
    """
    upload = _unpack(reply.content.array_records["arrays"], "upload")
    if tuple(upload.shape) != shape or not upload.is_floating_point():
        raise ValueError(f"upload of shape {tuple(upload.shape)}, {upload.dtype}; expected {shape}, floating point")
    return upload.to(torch.float64)


def failure_reason(reply: Message) -> str:
    """What a client raised, in its own words: Ray wraps them in two tracebacks and the repr of an actor."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", reply.error.reason or "no reason given").strip()
    _, found, message = text.rpartition("Exception ClientAppException occurred. Message: ")
    if not found:
        return text
    message = message.removesuffix("'>").removesuffix('">').strip()
    kinds = re.findall(r"^(?:\w+\.)*(\w+): ", text, flags=re.MULTILINE)
    return f"{kinds[0]}: {message}" if kinds else message


def card_content(card: ClientCard) -> RecordDict:
    """Content of the reply to a query message."""
    return RecordDict({"card": MetricRecord({"partition-id": card.partition, "num-examples": card.num_examples})})


def read_card(reply: Message) -> ClientCard:
    """Undo `card_content`."""
    record = reply.content.metric_records["card"]
    return ClientCard(partition=int(record["partition-id"]), num_examples=int(record["num-examples"]))  # type: ignore[arg-type]


def score_content(score: Score) -> RecordDict:
    """Content of an evaluate reply."""
    return RecordDict({"score": MetricRecord({name.replace("_", "-"): n for name, n in asdict(score).items()})})


def read_score(reply: Message) -> Score:
    """Undo `score_content`.

    Raises:
        ValueError: If the counts are not counts, or more than all are correct.
    """
    record = reply.content.metric_records["score"]
    score = Score(**{name.replace("-", "_"): int(value) for name, value in record.items()})  # type: ignore[arg-type]
    if not (0 <= score.local_correct <= score.local_total and 0 <= score.neighbour_correct <= score.neighbour_total):
        raise ValueError(f"impossible counts in {score}")
    return score
