"""Bugs in accuracies and in the treatment of clients that are held out, each planted in the running code."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

import fl_dualpriv.client.node
import fl_dualpriv.server.results
from fl_dualpriv import messages
from fl_dualpriv.client.node import Node
from fl_dualpriv.metrics import ScoreTable
from fl_dualpriv.server import strategy as server
from fl_dualpriv.server.strategy import RoundStrategy
from fl_dualpriv.tasks.base import Task
from tests.guarantees import score_checks
from tests.guarantees.mutation import Mutation, Patch


def neighbours_counted_as_local(patch: Patch) -> None:
    """A client holds its classes in every domain."""
    held_groups = fl_dualpriv.client.node.held_groups

    def in_every_domain(task: Task) -> Tensor:
        held = held_groups(task).unflatten(1, (len(task.domain_names), -1))
        return held.any(dim=1, keepdim=True).expand_as(held).flatten(1)

    patch.setattr(fl_dualpriv.client.node, "held_groups", in_every_domain)


def classes_weighed_by_their_images(patch: Patch) -> None:
    def pooled(self: ScoreTable, chosen: np.ndarray) -> list[float | None]:
        right, of = ((chosen * counts).sum(axis=1).tolist() for counts in (self.correct, self.total))
        return [a / b if b else None for a, b in zip(right, of, strict=True)]

    patch.setattr(ScoreTable, "_accuracies", pooled)


def general_scored_with_the_personal_part(patch: Patch) -> None:
    score = Node.score

    def personal(self: Node, request: messages.EvaluateRequest) -> messages.Scores:
        own = [p for p in request.partitions if p in self.hosted]
        if request.prompt != "global" or not own:
            return score(self, request)
        return self._score_personal(request, own)

    patch.setattr(Node, "score", personal)


def new_clients_scored_untuned(patch: Patch) -> None:
    """The closing message sends the prompt of the start."""
    shared = fl_dualpriv.client.node.RunContext.shared_counts

    def untuned(self: Any, kind: messages.PromptKind, prompt: Tensor) -> Any:
        return shared(self, "zero-shot" if kind == "global" else kind, prompt)

    patch.setattr(fl_dualpriv.client.node.RunContext, "shared_counts", untuned)


def new_clients_in_the_cohort(patch: Patch) -> None:
    cohort = RoundStrategy._cohort
    by_node = server.by_node
    new: dict[int, int] = {}

    def larger(self: RoundStrategy, server_round: int) -> list[int]:
        new.update(self.new_hosts)
        return [*cohort(self, server_round), *self.new_hosts]

    patch.setattr(RoundStrategy, "_cohort", larger)
    patch.setattr(server, "by_node", lambda partitions, hosts: by_node(partitions, {**hosts, **new}))


def nodes_that_train_new_clients(patch: Patch) -> None:
    asked = Node.asked
    patch.setattr(Node, "asked", lambda self, partitions, new_too=True: asked(self, partitions, new_too=True))


def scores_of_clients_in_the_summary(patch: Patch) -> None:
    patch.setattr(fl_dualpriv.server.results, "held_out_is_public", lambda data, evaluation: True)


_DOMAINS = score_checks.local_and_neighbour_are_of_their_domains
_GENERAL = score_checks.general_is_of_the_shared_prompt
_NEW = score_checks.new_clients_are_scored_with_the_shared_prompt
SCORE_MUTATIONS: Sequence[Mutation] = (
    Mutation(
        name="neighbours' images count as local",
        where="client.node.held_groups",
        plant=neighbours_counted_as_local,
        caught_by=(_DOMAINS, _GENERAL, _NEW),
    ),
    Mutation(
        name="a class weighs by its number of test images",
        where="ScoreTable._accuracies",
        plant=classes_weighed_by_their_images,
        caught_by=(_DOMAINS,),
    ),
    Mutation(
        name="the general accuracy is of personal prompts",
        where="Node.score",
        plant=general_scored_with_the_personal_part,
        caught_by=(_GENERAL,),
    ),
    Mutation(
        name="new clients are scored with the un-tuned model",
        where="RunContext.shared_counts",
        plant=new_clients_scored_untuned,
        caught_by=(_NEW,),
    ),
    Mutation(
        name="the server asks new clients for a round",
        where="RoundStrategy._cohort",
        plant=new_clients_in_the_cohort,
        caught_by=(score_checks.no_train_message_names_a_new_client,),
    ),
    Mutation(
        name="a node trains a new client",
        where="Node.asked",
        plant=nodes_that_train_new_clients,
        caught_by=(score_checks.a_node_trains_no_new_client,),
    ),
    Mutation(
        name="scores of single clients on private records are in the summary",
        where="server.results.held_out_is_public",
        plant=scores_of_clients_in_the_summary,
        caught_by=(score_checks.scores_of_clients_on_private_records_stay_with_the_operator,),
    ),
)
