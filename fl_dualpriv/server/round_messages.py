"""The requests of a round: one per node, for all of its requested clients."""

from flwr.app import ArrayRecord, Message, MessageType
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.privacy.plan import RoundTerms
from fl_dualpriv.privacy.selection import SelectionTerms
from fl_dualpriv.server.cohort import Asked

SELECTION_GROUP = "select"
"""Group id of select messages; the group ids of other requests are numbers of rounds."""


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
