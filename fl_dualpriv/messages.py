"""Conversion between typed values and Flower messages. No other file knows the kebab-case keys of the messages.

A message concerns one or more clients that its node hosts. Each value that several clients have is a list in the order
of ``partitions``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fl_dualpriv.learners.row_check import RowPath
from fl_dualpriv.metrics import ScoreTable
from fl_dualpriv.privacy.plan import RoundTerms
from fl_dualpriv.privacy.selection import SelectionTerms

SELECT = "train.select"
"""Flower's type of a select message."""

PromptKind = Literal["zero-shot", "free", "global", "personal"]
"""Prompt that is scored; ``free`` is the un-tuned model with the best use of public knowledge."""
_SCORE = ("total", "correct", "held")
_GLOBAL, _PARTS = "global-prompt", "personal-parts"
_DEAD_ACTOR = re.compile(r"<class 'ray\.exceptions\.(ActorDied|RayActor)Error'>:")


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """Request of the server to a node in one round: train these of its clients.

    ``personal_parts`` are the clients' personal prompts if the server makes them, (client, n_ctx, ctx_dim), in the
    order of ``partitions``.
    """

    partitions: tuple[int, ...]
    global_prompt: Tensor
    server_round: int
    run_token: str
    terms: RoundTerms
    personal_parts: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SelectRequest:
    """Request of the server to a node before round 1: let these of its clients select the start of the prompts."""

    partitions: tuple[int, ...]
    run_token: str
    terms: SelectionTerms


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """Request of the server to a node: score this prompt for these of its clients; parts as in `TrainRequest`."""

    partitions: tuple[int, ...]
    global_prompt: Tensor
    server_round: int
    run_token: str
    prompt: PromptKind
    personal_parts: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ClientCard:
    """Public metadata that a node reports about a client before round 1: all that it sends of the client's data.

    Counts of classes are never sent. A client's list of classes, and the class shares that its owner declares, are
    public too, but no card holds them: each node reads them from its own data and files.

    Attributes:
        partition: Number of the client.
        num_examples: Number of its records, n_i.
        rows: Way in which the client computes its gradients (see `row_check`), a function of its machine. None if it
            computes none.
    """

    partition: int
    num_examples: int
    rows: RowPath | None = None


@dataclass(frozen=True, kw_only=True)
class Uploads:
    """Reply of a node to a `TrainRequest`: one upload per client that succeeded, a reason for each that failed.

    The reply to a `SelectRequest` has the same form: K votes for each client, or none where each client chooses itself.

    Attributes:
        partitions: Numbers of the clients that sent the uploads.
        values: Uploads (client, n_ctx, ctx_dim) or votes (client, K), in the order of ``partitions``.
        failed: Reason of each failure by the number of the client.
    """

    partitions: tuple[int, ...]
    values: Tensor
    failed: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Reply of a node to an `EvaluateRequest`; see `Uploads`."""

    partitions: tuple[int, ...]
    values: ScoreTable
    failed: dict[int, str] = field(default_factory=dict)


def to_arrays(prompt: Tensor) -> ArrayRecord:
    """Wrap the global prompt, the only tensor that the server sends beside personal parts that it made."""
    return _pack(_GLOBAL, prompt)


def from_arrays(arrays: ArrayRecord) -> Tensor:
    """Return the global prompt that `to_arrays` wrapped."""
    return _unpack(arrays, _GLOBAL)


def _request_arrays(request: TrainRequest | EvaluateRequest, arrays: ArrayRecord | None) -> ArrayRecord:
    """Return the arrays of a request; ``arrays`` is the global prompt if it is packed already."""
    packed = to_arrays(request.global_prompt) if arrays is None else arrays
    if request.personal_parts is None:
        return packed
    return ArrayRecord({**packed, **_pack(_PARTS, request.personal_parts)})


def _read_request_arrays(message: Message) -> tuple[Tensor, Tensor | None]:
    """Return the global prompt, and the personal parts or None; see `_request_arrays`."""
    arrays = message.content.array_records["arrays"]
    if _PARTS not in arrays:
        return from_arrays(arrays), None
    others = ArrayRecord({name: array for name, array in arrays.items() if name != _PARTS})
    return from_arrays(others), _unpack(ArrayRecord({_PARTS: arrays[_PARTS]}), _PARTS)


def _pack(name: str, tensor: Tensor) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor.detach().cpu().numpy())})


def _unpack(arrays: ArrayRecord, name: str) -> Tensor:
    if list(arrays) != [name]:
        raise ValueError(f"arrays {sorted(arrays)} in a message; expected only {name!r}")
    # A copy, because the record's memory is read-only.
    return torch.from_numpy(np.array(arrays[name].numpy()))


def train_content(request: TrainRequest, arrays: ArrayRecord | None = None) -> RecordDict:
    """Build the content of a train message; ``arrays`` is the global prompt if it is packed already, for all nodes."""
    config = ConfigRecord(
        {
            "partitions": list(request.partitions),
            "server-round": request.server_round,
            "run-token": request.run_token,
            "mechanism": request.terms.mechanism,
            "trusts-server": request.terms.trusts_server,
            "clip-norm": request.terms.clip_norm,
            "noise-multiplier": request.terms.noise_multiplier,
            "sampling-rate": request.terms.sampling_rate,
            "local-steps": request.terms.releases,
            "arithmetic": request.terms.arithmetic,
        }
    )
    return RecordDict({"arrays": _request_arrays(request, arrays), "config": config})


def read_train(message: Message) -> TrainRequest:
    """Return the request in a train message (see `train_content`).

    Raises:
        ValueError, KeyError: If a value is missing or of another type. No default replaces it.
    """
    config = message.content.config_records["config"]
    mechanism, trusts_server = config["mechanism"], config["trusts-server"]
    arithmetic = config["arithmetic"]
    if mechanism not in ("none", "gaussian") or not isinstance(trusts_server, bool):
        raise ValueError(f"mechanism = {mechanism!r:.40}, trusts-server = {trusts_server!r:.40} in a train message")
    if arithmetic not in ("float", "integer"):
        raise ValueError(f"arithmetic = {arithmetic!r:.40} in a train message; allowed: float, integer")
    global_prompt, personal_parts = _read_request_arrays(message)
    return TrainRequest(
        partitions=_ids(config["partitions"]),
        global_prompt=global_prompt,
        personal_parts=personal_parts,
        server_round=_whole(config["server-round"]),
        run_token=str(config["run-token"]),
        terms=RoundTerms(
            mechanism=mechanism,
            trusts_server=trusts_server,
            clip_norm=_number(config["clip-norm"]),
            noise_multiplier=_number(config["noise-multiplier"]),
            sampling_rate=_number(config["sampling-rate"]),
            releases=_whole(config["local-steps"]),
            arithmetic=arithmetic,
        ),
    )


def select_content(request: SelectRequest) -> RecordDict:
    """Build the content of a select message."""
    terms = request.terms
    config = ConfigRecord(
        {
            "partitions": list(request.partitions),
            "run-token": request.run_token,
            "form": terms.form,
            "private": terms.private,
            "noise-multiplier": terms.noise_multiplier,
            "epsilon": terms.pure_epsilon,
            "arithmetic": terms.arithmetic,
            "candidates": terms.candidates,
        }
    )
    return RecordDict({"config": config})


def read_select(message: Message) -> SelectRequest:
    """Return the request in a select message (see `select_content`).

    Raises:
        ValueError, KeyError: If a value is missing or of another type. No default replaces it.
    """
    config = message.content.config_records["config"]
    form, private, arithmetic = config["form"], config["private"], config["arithmetic"]
    if form not in ("federated", "client") or not isinstance(private, bool):
        raise ValueError(f"form = {form!r:.40}, private = {private!r:.40} in a select message")
    if arithmetic not in ("float", "integer"):
        raise ValueError(f"arithmetic = {arithmetic!r:.40} in a select message; allowed: float, integer")
    return SelectRequest(
        partitions=_ids(config["partitions"]),
        run_token=str(config["run-token"]),
        terms=SelectionTerms(
            form=form,
            private=private,
            noise_multiplier=_number(config["noise-multiplier"]),
            pure_epsilon=_number(config["epsilon"]),
            arithmetic=arithmetic,
            candidates=_whole(config["candidates"]),
        ),
    )


def evaluate_content(request: EvaluateRequest, arrays: ArrayRecord | None = None) -> RecordDict:
    """Build the content of an evaluate message; ``arrays`` as in `train_content`."""
    config = ConfigRecord(
        {
            "partitions": list(request.partitions),
            "server-round": request.server_round,
            "run-token": request.run_token,
            "prompt": request.prompt,
        }
    )
    return RecordDict({"arrays": _request_arrays(request, arrays), "config": config})


def read_evaluate(message: Message) -> EvaluateRequest:
    """Return the request in an evaluate message (see `evaluate_content`)."""
    config = message.content.config_records["config"]
    kind = config["prompt"]
    if kind not in ("zero-shot", "free", "global", "personal"):
        raise ValueError(f"prompt = {kind!r} in an evaluate message; allowed: zero-shot, free, global, personal")
    global_prompt, personal_parts = _read_request_arrays(message)
    return EvaluateRequest(
        partitions=_ids(config["partitions"]),
        global_prompt=global_prompt,
        personal_parts=personal_parts,
        server_round=_whole(config["server-round"]),
        run_token=str(config["run-token"]),
        prompt=kind,
    )


def uploads_content(uploads: Uploads) -> RecordDict:
    """Build the content of a train reply.

    It holds the uploads, the numbers of their clients, and the failures. It holds no other value of the clients that
    succeeded.
    """
    return RecordDict({"arrays": _pack("upload", uploads.values), "clients": _pack_clients(uploads)})


def read_uploads(reply: Message, shape: tuple[int, ...]) -> Uploads:
    """Return the uploads of a train reply, float64.

    Raises:
        ValueError: If the reply does not hold one floating-point tensor with one upload of ``shape`` for each named
            client.
    """
    partitions, failed = _read_clients(reply)
    stack = _unpack(reply.content.array_records["arrays"], "upload")
    expected = (len(partitions), *shape)
    if tuple(stack.shape) != expected or not stack.is_floating_point():
        raise ValueError(f"upload of shape {tuple(stack.shape)}, {stack.dtype}; expected {expected}, floating point")
    return Uploads(partitions=partitions, values=stack.to(torch.float64), failed=failed)


def scores_content(scores: Scores) -> RecordDict:
    """Build the content of an evaluate reply: counts by group for each client, and the groups that it holds.

    Rows that are equal for all clients are sent once.
    """
    table = scores.values
    counts = {
        "total": table.total.tolist(),
        "correct": _rows(table.correct),
        "held": _rows(table.held.astype(np.int64)),
    }
    return RecordDict({"score": MetricRecord({**counts}), "clients": _pack_clients(scores)})


def _rows(table: np.ndarray) -> list[int]:
    is_shared = len(table) > 1 and bool((table == table[0]).all())
    return (table[:1] if is_shared else table).ravel().tolist()


def read_scores(reply: Message) -> Scores:
    """Return the scores in an evaluate reply (see `scores_content`).

    Raises:
        ValueError: If there is not one count of each kind for each group and each named client, if a value is not a
            count, or if a count of correct records exceeds the total.
    """
    partitions, failed = _read_clients(reply)
    record = reply.content.metric_records["score"]
    if set(record) != set(_SCORE):
        raise ValueError(f"counts {sorted(record)} in a score; expected {sorted(_SCORE)}")
    total, correct, held = (np.array(_ids(record[key]), dtype=np.int64) for key in _SCORE)
    shape = (len(partitions), len(total))
    correct, held = (_table(rows, shape) for rows in (correct, held))
    if (total < 0).any() or (correct < 0).any() or (correct > total).any() or not np.isin(held, (0, 1)).all():
        raise ValueError("impossible counts in a score")
    return Scores(
        partitions=partitions,
        values=ScoreTable(correct=correct, total=total, held=held.astype(bool)),
        failed=failed,
    )


def _table(rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return one row per client, from one row for each or one for all."""
    clients, groups = shape
    if len(rows) == clients * groups:
        return rows.reshape(shape)
    if len(rows) == groups and clients > 1:
        return np.broadcast_to(rows, shape)
    raise ValueError(f"{len(rows)} counts for {clients} clients and {groups} groups")


def cards_content(cards: Sequence[ClientCard]) -> RecordDict:
    """Build the content of the reply to a query message: the clients that the node hosts."""
    record = {"partition-id": [c.partition for c in cards], "num-examples": [c.num_examples for c in cards]}
    rows = ConfigRecord({"rows": [card.rows or "" for card in cards]})
    return RecordDict({"card": MetricRecord({**record}), "machine": rows})


def read_cards(reply: Message) -> list[ClientCard]:
    """Return the cards in the reply to a query message (see `cards_content`)."""
    record = reply.content.metric_records["card"]
    paths: dict[object, RowPath] = {path: path for path in get_args(RowPath)}  # a node may send any text
    row_paths = reply.content.config_records["machine"]["rows"]
    if not isinstance(row_paths, list):
        raise ValueError(f"rows = {row_paths!r:.40} in the reply to a query")
    columns = zip(_ids(record["partition-id"]), _ids(record["num-examples"]), row_paths, strict=True)
    return [ClientCard(partition=p, num_examples=count, rows=paths.get(rows)) for p, count, rows in columns]


def _pack_clients(answer: Uploads | Scores) -> ConfigRecord:
    return ConfigRecord(
        {
            "partitions": list(answer.partitions),
            "failed": list(answer.failed),
            "reasons": list(answer.failed.values()),
        }
    )


def _read_clients(reply: Message) -> tuple[tuple[int, ...], dict[int, str]]:
    record = reply.content.config_records["clients"]
    partitions, failed = _ids(record["partitions"]), _ids(record["failed"])
    reasons: Any = record["reasons"]
    return partitions, {p: str(reason) for p, reason in zip(failed, reasons, strict=True)}


def _ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(number) is not int for number in value):
        raise ValueError(f"{value!r:.80} in a message; expected a list of whole numbers")
    return tuple(value)


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r:.80} in a message; expected a whole number")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{value!r:.80} in a message; expected a number")
    return float(value)


def dead_actor(reply: Message) -> str | None:
    """Return the process id of a dead simulation actor, "?" if the reply does not name it, or None if none died.

    Flower returns dead actors to its pool. Each one fails every task at once, so Flower gives it many tasks.
    """
    reason = (reply.error.reason or "") if reply.has_error() else ""
    if not _DEAD_ACTOR.match(reason):  # Ray wraps an exception of a client in another class
        return None
    match = re.search(r"^\s*pid: (\d+)$", reason, flags=re.MULTILINE)
    return match[1] if match else "?"


def failure_reason(reply: Message) -> str:
    """Return the message of the exception that a client raised.

    Ray wraps that message in two tracebacks and the repr of an actor.
    """
    if (pid := dead_actor(reply)) is not None:
        return (
            f"actor {pid} of the simulation has died, because it crashed or ran out of memory (see flower.log), and "
            "fails every task that Flower gives it; start a new run, or continue from the last round with --resume"
        )
    text = re.sub(r"\x1b\[[0-9;]*m", "", reply.error.reason or "no reason given").strip()
    _, marker, message = text.rpartition("Exception ClientAppException occurred. Message: ")
    if not marker:
        return text
    message = message.removesuffix("'>").removesuffix('">').strip()
    kinds = re.findall(r"^(?:\w+\.)*(\w+): ", text, flags=re.MULTILINE)
    return f"{kinds[0]}: {message}" if kinds else message
