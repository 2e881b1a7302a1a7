"""Bugs in personal prompts that the server makes of all uploads, each planted in the running code."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import fl_dualpriv.client.round
from fl_dualpriv import messages
from fl_dualpriv.client.node import Node
from fl_dualpriv.run.checkpoint import Checkpoint, CheckpointFolder
from fl_dualpriv.server import build, cohort
from fl_dualpriv.server.collective import Collective, Memory
from tests.guarantees import collective_checks
from tests.guarantees.mutation import Mutation, Patch
from tests.guarantees.step_mutations import keep_clean_sums


def parts_of_clean_sums(patch: Patch) -> None:
    """The server would have one client's sum before its noise."""
    kept, followed = keep_clean_sums(patch), Collective.followed

    def with_clean(self: Collective, memory: Memory, partitions: Sequence[int], uploads: Tensor) -> dict[str, Tensor]:
        if kept.sums.numel():
            uploads = uploads.clone()
            uploads[-1] = kept.sums[-1].double() / kept.expected
        return followed(self, memory, partitions, uploads)

    patch.setattr(Collective, "followed", with_clean)


def noise_over_those_that_answered(patch: Patch) -> None:
    followed = Collective.followed

    def realised(self: Collective, memory: Memory, partitions: Sequence[int], uploads: Tensor) -> dict[str, Tensor]:
        share = len(self.noise_variances) / max(1, len(partitions))
        own = replace(self, noise_variances=self.noise_variances * share**2)
        return followed(own, memory, partitions, uploads)

    patch.setattr(Collective, "followed", realised)


def noise_of_half_its_std(patch: Patch) -> None:
    """Noise then counts as signal."""
    make = build.collective_parts

    def less(*arguments: object) -> Collective | None:
        rule = make(*arguments)  # type: ignore[arg-type]
        return None if rule is None else replace(rule, noise_variances=rule.noise_variances / 4)

    patch.setattr(build, "collective_parts", less)


def parts_in_the_order_of_the_node(patch: Patch) -> None:
    """The first parts of all, and not those of the clients that the node was asked about."""

    def first(partitions: tuple[int, ...], personal_parts: Tensor | None) -> Tensor | None:
        return None if personal_parts is None else personal_parts[: len(partitions)]

    patch.setattr(cohort, "_of", first)


def parts_in_the_order_of_partitions(patch: Patch) -> None:
    """A node steps its clients in sorted order, and takes the parts in that order too."""

    def in_order(self: Node, request: messages.TrainRequest | messages.EvaluateRequest) -> dict[int, Tensor]:
        assert request.personal_parts is not None
        return dict(zip(sorted(request.partitions), request.personal_parts, strict=True))

    patch.setattr(Node, "parts_of", in_order)


def parts_that_are_not_finite_are_taken(patch: Patch) -> None:
    patch.setattr(fl_dualpriv.client.round, "check_part", lambda part: None)


def memory_left_out_of_the_checkpoint(patch: Patch) -> None:
    write = CheckpointFolder.write

    def forgetful(self: CheckpointFolder, checkpoint: Checkpoint) -> None:
        state = {name: tensor for name, tensor in checkpoint.state.items() if "deviation" not in name}
        write(self, replace(checkpoint, state=state))

    patch.setattr(CheckpointFolder, "write", forgetful)


def parts_taken_in_any_run(patch: Patch) -> None:
    """Without the check a server could replace a client's own personal prompt."""

    def of_any(self: Node, request: messages.TrainRequest | messages.EvaluateRequest) -> dict[int, Tensor]:
        parts = request.personal_parts
        return {} if parts is None else dict(zip(request.partitions, torch.unbind(parts), strict=True))

    patch.setattr(Node, "parts_of", of_any)


COLLECTIVE_MUTATIONS = (
    Mutation(
        name="personal parts are made of a sum before its noise",
        where="fl_dualpriv.server.collective.Collective.followed",
        plant=parts_of_clean_sums,
        caught_by=(collective_checks.parts_see_the_releases_alone,),
    ),
    Mutation(
        name="the noise of personal parts is stated for the clients that answered",
        where="fl_dualpriv.server.collective.Collective.followed",
        plant=noise_over_those_that_answered,
        caught_by=(collective_checks.the_stated_noise_is_the_public_one,),
    ),
    Mutation(
        name="the noise of personal parts is stated at half its std",
        where="fl_dualpriv.server.build.collective_parts",
        plant=noise_of_half_its_std,
        caught_by=(
            collective_checks.the_stated_noise_is_the_public_one,
            collective_checks.a_sum_has_the_noise_it_states,
        ),
    ),
    Mutation(
        name="a node is sent the personal parts of other clients",
        where="fl_dualpriv.server.cohort._of",
        plant=parts_in_the_order_of_the_node,
        caught_by=(collective_checks.each_client_is_sent_its_own_part,),
    ),
    Mutation(
        name="a node gives the personal parts to its clients in another order",
        where="fl_dualpriv.client.node.Node.parts_of",
        plant=parts_in_the_order_of_partitions,
        caught_by=(collective_checks.each_client_keeps_its_own_part,),
    ),
    Mutation(
        name="a client pays for a round with a personal part that is not finite",
        where="fl_dualpriv.client.round.check_part",
        plant=parts_that_are_not_finite_are_taken,
        caught_by=(collective_checks.other_parts_are_refused,),
    ),
    Mutation(
        name="a client takes a personal part in a run whose clients make their own",
        where="fl_dualpriv.client.node.Node.parts_of",
        plant=parts_taken_in_any_run,
        caught_by=(collective_checks.a_part_is_refused_where_the_server_makes_none,),
    ),
    Mutation(
        name="a resumed server has forgotten the deviations",
        where="fl_dualpriv.run.checkpoint.CheckpointFolder.write",
        plant=memory_left_out_of_the_checkpoint,
        caught_by=(collective_checks.the_checkpoint_holds_the_memory,),
    ),
)
