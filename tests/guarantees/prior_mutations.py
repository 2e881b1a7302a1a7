"""Bugs in class priors: counted from records, another client's, at the wrong place of the loss, or forgotten."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fl_dualpriv.learners import classification, fedotp
from fl_dualpriv.learners import rows as per_example
from fl_dualpriv.learners.base import ClientData, Picked, log_priors
from fl_dualpriv.learners.classification import ClassificationGradients, PooledClassification
from fl_dualpriv.learners.fedotp import TransportGradients
from fl_dualpriv.learners.rows import Batches
from fl_dualpriv.tasks import class_prior
from tests.guarantees import prior_checks
from tests.guarantees.mutation import Mutation, Patch
from tests.guarantees.step_checks import N_CLS


def counted(labels: Tensor) -> Tensor:
    """Logarithm of the shares of these labels, each class counted once more."""
    counts = torch.bincount(labels, minlength=N_CLS) + 1.0
    return (counts / counts.sum()).log()


def prior_of_the_batch(patch: Patch) -> None:
    gather = PooledClassification._gather

    def gathering(self: PooledClassification, picked: Picked) -> tuple[Batches, Tensor | None]:
        batches, order = gather(self, picked)
        return replace(batches, log_prior=torch.stack([counted(batches.labels[i]) for i in batches.rows()])), order

    patch.setattr(PooledClassification, "_gather", gathering)


def prior_of_the_clients_readable_records(patch: Patch) -> None:
    def from_records(data: Sequence[ClientData]) -> Tensor:
        return torch.stack([counted(d.labels[torch.isfinite(d.features).all(dim=1)]) for d in data])

    patch.setattr(classification, "log_priors", from_records)


def transport_with_the_prior_of_the_records(patch: Patch) -> None:
    def from_records(self: TransportGradients, client: int, patches: Tensor, labels: Tensor) -> Tensor:
        own = counted(self._data[client].labels)
        return self._objective.cotangents(patches, labels, self._classes[client], own)

    patch.setattr(fedotp.TransportGradients, "_cotangents", from_records)


def prior_of_another_client(patch: Patch) -> None:
    def rolled(data: Sequence[ClientData]) -> Tensor | None:
        priors = log_priors(data)
        return None if priors is None else priors.roll(1, dims=0)

    patch.setattr(classification, "log_priors", rolled)


def priors_not_in_the_order_of_the_batches(patch: Patch) -> None:
    gather = PooledClassification._gather

    def gathering(self: PooledClassification, picked: Picked) -> tuple[Batches, Tensor | None]:
        batches, order = gather(self, picked)
        return replace(batches, log_prior=self._log_prior), order

    patch.setattr(PooledClassification, "_gather", gathering)


def prior_after_the_residual(patch: Patch) -> None:
    make = per_example._softmax_minus_one_hot

    def after(cosines: Tensor, y: Tensor, logit_scale: float, log_prior: Tensor | None) -> Tensor:
        residual = make(cosines, y, logit_scale, None)
        return residual if log_prior is None else residual + log_prior[:, None]

    patch.setattr(per_example, "_softmax_minus_one_hot", after)


def no_prior_in_feature_space(patch: Patch) -> None:
    patch.setattr(ClassificationGradients, "_log_prior", lambda self, place: None)


def list_by_counts(patch: Patch) -> None:
    patch.setattr(class_prior, "held_shares", class_prior.record_counts)


PRIOR_MUTATIONS = (
    Mutation(
        name="the class prior is counted from the batch",
        where="fl_dualpriv.learners.classification.PooledClassification._gather",
        plant=prior_of_the_batch,
        caught_by=(prior_checks.a_record_takes_only_its_own_row,),
    ),
    Mutation(
        name="the class prior is counted from the client's readable records",
        where="fl_dualpriv.learners.base.log_priors",
        plant=prior_of_the_clients_readable_records,
        caught_by=(prior_checks.a_record_takes_only_its_own_row,),
    ),
    Mutation(
        name="FedOTP's class prior is counted from the client's records",
        where="fl_dualpriv.learners.fedotp.TransportGradients._cotangents",
        plant=transport_with_the_prior_of_the_records,
        caught_by=(prior_checks.a_record_takes_only_its_own_row,),
    ),
    Mutation(
        name="a client steps with another client's class prior",
        where="fl_dualpriv.learners.base.log_priors",
        plant=prior_of_another_client,
        caught_by=(
            prior_checks.a_client_has_its_own_prior,
            prior_checks.every_closed_form_is_autograds_with_the_prior,
        ),
    ),
    Mutation(
        name="class priors are not in the order of the batches",
        where="fl_dualpriv.learners.classification.PooledClassification._gather",
        plant=priors_not_in_the_order_of_the_batches,
        caught_by=(prior_checks.a_client_has_its_own_prior,),
    ),
    Mutation(
        name="the class prior is applied after the residual",
        where="fl_dualpriv.learners.rows._softmax_minus_one_hot",
        plant=prior_after_the_residual,
        caught_by=(prior_checks.every_closed_form_is_autograds_with_the_prior,),
    ),
    Mutation(
        name="noise space feature forgets the class prior",
        where="fl_dualpriv.learners.classification.ClassificationGradients._log_prior",
        plant=no_prior_in_feature_space,
        caught_by=(prior_checks.every_closed_form_is_autograds_with_the_prior,),
    ),
    Mutation(
        name="the prior of a class list follows the counts of its classes",
        where="fl_dualpriv.tasks.class_prior.held_shares",
        plant=list_by_counts,
        caught_by=(prior_checks.a_prior_of_a_list_knows_no_count,),
    ),
)
