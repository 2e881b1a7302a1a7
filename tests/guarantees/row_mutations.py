"""Bugs in rows: kernels that round a row by its place or by how many there are, and a run that does not look."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fl_dualpriv.client.node
from fl_dualpriv.learners import classification, row_check
from fl_dualpriv.learners import rows as per_example
from fl_dualpriv.learners.base import Objective, Records
from fl_dualpriv.learners.row_check import RowPath
from fl_dualpriv.learners.rows import Batches
from fl_dualpriv.towers.shared_prefix_vjp import SharedPrefixFeatures
from tests.guarantees import row_checks
from tests.guarantees.mutation import Mutation, Patch


def by_place(pull: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The last bits of a row follow its place in the block, as a kernel for the remainder of a product has it."""

    def pulled(self: SharedPrefixFeatures, cotangents: Tensor, *classes: Tensor) -> Tensor:
        rows = pull(self, cotangents, *classes)
        place = torch.arange(rows.shape[1], dtype=rows.dtype)[:, None, None]
        return rows * (1 + 2.0**-22 * place)

    return pulled


def by_number(pull: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The last bits of all rows follow how many there are, as the choice of a kernel by size has it."""

    def pulled(self: SharedPrefixFeatures, cotangents: Tensor) -> Tensor:
        return pull(self, cotangents) * (1 + 2.0**-22 * (cotangents.shape[1] < 8))

    return pulled


def unpadded_blocks(batches: Batches) -> Iterator[tuple[slice, int]]:
    """As `Batches.blocks`, with a last block of what is left."""
    most = max(batches.counts, default=0)
    for start in range(0, most, 8):
        yield slice(start, min(start + 8, most)), sum(count > start for count in batches.counts)


def rows_by_place_and_nobody_looks(patch: Patch) -> None:
    def unchecked(
        objective: Objective[Any], made_up: Callable[[], Records], prompts: Tensor, *, private: bool
    ) -> tuple[Objective[Any], RowPath]:
        return objective, "together"

    patch.setattr(SharedPrefixFeatures, "vjp", by_place(SharedPrefixFeatures.vjp))
    patch.setattr(row_check, "checked_objective", unchecked)
    patch.setattr(fl_dualpriv.client.node, "checked_objective", unchecked)  # the name that a run looks up


def rows_by_their_number_and_nobody_looks(patch: Patch) -> None:
    own = SharedPrefixFeatures.vjp
    rows_by_place_and_nobody_looks(patch)
    patch.setattr(Batches, "blocks", unpadded_blocks)
    patch.setattr(SharedPrefixFeatures, "vjp", by_number(own))


def rows_by_place_in_every_form(patch: Patch) -> None:
    for name in ("vjp", "vjp_apart", "vjp_some"):
        patch.setattr(SharedPrefixFeatures, name, by_place(getattr(SharedPrefixFeatures, name)))


def feature_rows_by_their_number(patch: Patch) -> None:
    """A product of as many rows as there are in a chunk: small ones get another kernel, and other last bits."""
    make = per_example.feature_blocks

    def blocks(
        classes: Tensor, x: Tensor, y: Tensor, logit_scale: float, log_prior: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for left, own in make(classes, x, y, logit_scale, log_prior):
            yield left * (1 + 2.0**-52 * (len(x) < 4)), own

    for module in (per_example, classification):
        patch.setattr(module, "feature_blocks", blocks)


def clients_by_their_number(patch: Patch) -> None:
    """Sums of clients that step together have other last bits than those of one client, and nobody looks."""
    pull = SharedPrefixFeatures.vjp
    rows_by_place_and_nobody_looks(patch)

    def pulled(self: SharedPrefixFeatures, cotangents: Tensor) -> Tensor:
        return pull(self, cotangents) * (1 + 2.0**-22 * (len(cotangents) > 1))

    patch.setattr(SharedPrefixFeatures, "vjp", pulled)


ROW_MUTATIONS = (
    Mutation(
        name="a kernel rounds rows by their place, and the self-check is skipped",
        where="fl_dualpriv.learners.row_check.checked_objective",
        plant=rows_by_place_and_nobody_looks,
        caught_by=(row_checks.a_record_that_goes_leaves_the_other_rows_bit_by_bit,),
    ),
    Mutation(
        name="a kernel rounds rows by how many there are, blocks are not padded, and the self-check is skipped",
        where="fl_dualpriv.learners.rows.Batches.blocks",
        plant=rows_by_their_number_and_nobody_looks,
        caught_by=(row_checks.a_record_that_goes_leaves_the_other_rows_bit_by_bit,),
    ),
    Mutation(
        name="kernels round rows by their place in every form of the products",
        where="fl_dualpriv.towers.shared_prefix_vjp.SharedPrefixFeatures.vjp, vjp_apart, vjp_some",
        plant=rows_by_place_in_every_form,
        caught_by=(row_checks.a_record_that_goes_leaves_the_other_rows_bit_by_bit,),
        refused=True,
    ),
    Mutation(
        name="rows in noise space feature are rounded by how many there are",
        where="fl_dualpriv.learners.rows.feature_blocks",
        plant=feature_rows_by_their_number,
        caught_by=(row_checks.feature_rows_do_not_depend_on_their_number,),
    ),
    Mutation(
        name="a client's sums are rounded by how many clients step together, and the self-check is skipped",
        where="fl_dualpriv.towers.shared_prefix_vjp.SharedPrefixFeatures.vjp",
        plant=clients_by_their_number,
        caught_by=(row_checks.clients_get_what_each_gets_alone,),
    ),
)
