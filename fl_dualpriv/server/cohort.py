"""Match replies to requests. One node may host many clients."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from flwr.app import Message

from fl_dualpriv import messages

Answer = TypeVar("Answer", messages.Uploads, messages.Scores)
Asked = Mapping[int, tuple[int, ...]]
"""Node id → the partitions of the clients that it was asked about."""


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
