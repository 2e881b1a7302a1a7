"""The requests of a round, one per node for all of its requested clients, and the match of replies to them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from flwr.app import ArrayRecord, Message, MessageType
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.privacy.plan import RoundTerms
from fl_dualpriv.privacy.selection import SelectionTerms

Answer = TypeVar("Answer", messages.Uploads, messages.Scores)
Asked = Mapping[int, tuple[int, ...]]
"""Node id → the partitions of the clients that it was asked about."""
SELECTION_GROUP = "select"
"""Group id of select messages; the group ids of other requests are numbers of rounds."""


def by_node(partitions: Iterable[int], hosts: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
    """Group clients by the node that hosts them; nodes in the order of their first client, not of their random ids."""
    groups: dict[int, list[int]] = {}
    for partition in partitions:
        groups.setdefault(hosts[partition], []).append(partition)
    return {node: tuple(members) for node, members in groups.items()}


@dataclass(frozen=True, kw_only=True)
class Collected(Generic[Answer]):
    """Valid answers, and the reasons why the other clients have none.

    Attributes:
        answers: One answer per node that sent a valid reply, in any order.
        failed: Partition → reason, in the order of partitions.
    """

    answers: list[Answer]
    failed: dict[int, str]


def collect(
    asked: Asked, replies: Iterable[Message], read: Callable[[Message], Answer], what: str, group: str
) -> Collected[Answer]:
    """Sort replies into valid answers and failures.

    Guarantee:
        A client counts at most once, and only by the first reply in this round of the node that hosts it and was asked
        about it. A reply that names any other client, or a client twice, or that cannot be read, counts for no client.
        Every client that was asked is in exactly one of the answers or among the failed.

    Args:
        asked: Clients that each node was asked about.
        replies: Untrusted replies, with any content.
        read: Function that unpacks a reply; may raise.
        what: Name of an answer, for messages.
        group: Group id of the round's requests. A reply has the group id of its request.
    """
    answers: list[Answer] = []
    failed: dict[int, str] = {}
    answered: set[int] = set()
    for reply in replies:
        node = reply.metadata.src_node_id
        if node not in asked or node in answered or reply.metadata.group_id != group:
            continue  # an unrequested reply, a second copy or a reply to an earlier round must not count
        answered.add(node)
        members = asked[node]
        if reply.has_error():
            failed |= dict.fromkeys(members, messages.failure_reason(reply))
            continue
        try:
            answer = read(reply)
            named = {*answer.partitions, *answer.failed}
            if not named <= set(members) or len(named) != len(answer.partitions) + len(answer.failed):
                raise ValueError("it names a client twice, or a client that was not asked")
        except Exception as error:  # untrusted bytes: an unreadable reply is a failure of its sender
            failed |= dict.fromkeys(members, f"unreadable {what}: {type(error).__name__}: {error}")
            continue
        answers.append(answer)
        failed |= answer.failed
        if len(named) < len(members):
            failed |= dict.fromkeys(set(members) - named, f"no {what} in the reply of its node")
    for node, members in asked.items():
        if node not in answered:
            failed |= dict.fromkeys(members, "no reply in time")
    return Collected(answers=answers, failed=dict(sorted(failed.items())))


def train_messages(
    asked: Asked,
    arrays: ArrayRecord,
    prompt: Tensor,
    server_round: int,
    run_token: str,
    terms: RoundTerms,
    personal_parts: Tensor | None = None,
) -> list[Message]:
    """Ask each node to train its clients from ``prompt``, which is packed once in ``arrays`` for all nodes.

    Each node gets the rows of ``personal_parts``, (client, n_ctx, ctx_dim) in the order of partitions, that belong to
    the clients that it is asked about.
    """
    requests = []
    for node, partitions in asked.items():
        request = messages.TrainRequest(
            partitions=partitions,
            global_prompt=prompt,
            server_round=server_round,
            run_token=run_token,
            terms=terms,
            personal_parts=_of(partitions, personal_parts),
        )
        content = messages.train_content(request, arrays)
        requests.append(Message(content, node, MessageType.TRAIN, group_id=str(server_round)))
    return requests


def select_messages(asked: Asked, run_token: str, terms: SelectionTerms) -> list[Message]:
    """Ask each node to let its clients select the start of the prompts."""
    requests = []
    for node, partitions in asked.items():
        request = messages.SelectRequest(partitions=partitions, run_token=run_token, terms=terms)
        requests.append(Message(messages.select_content(request), node, messages.SELECT, group_id=SELECTION_GROUP))
    return requests


def score_messages(
    asked: Asked,
    prompt: Tensor,
    server_round: int,
    run_token: str,
    kind: messages.PromptKind,
    personal_parts: Tensor | None = None,
) -> list[Message]:
    """Ask each node for its clients' scores of ``prompt``, or of their personal prompts; parts as in training."""
    arrays, requests = messages.to_arrays(prompt), []
    for node, partitions in asked.items():
        request = messages.EvaluateRequest(
            partitions=partitions,
            global_prompt=prompt,
            server_round=server_round,
            run_token=run_token,
            prompt=kind,
            personal_parts=_of(partitions, personal_parts),
        )
        content = messages.evaluate_content(request, arrays)
        requests.append(Message(content, node, MessageType.EVALUATE, group_id=str(server_round)))
    return requests


def _of(partitions: tuple[int, ...], personal_parts: Tensor | None) -> Tensor | None:
    """Return the parts of these clients, in their order."""
    return None if personal_parts is None else personal_parts[list(partitions)]
