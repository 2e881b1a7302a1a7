"""Bugs in what noise-aware personal prompts read, each planted in the running code."""

import torch
from torch import Tensor

from fl_dualpriv.client.personalisation import Deviations, Personalisation
from tests.guarantees import personalisation_checks
from tests.guarantees.mutation import Mutation, Patch
from tests.guarantees.step_mutations import keep_clean_sums


def shrinkage_by_the_clean_sum(patch: Patch) -> None:
    """The share of signal would be known exactly from the sum before its noise."""
    kept, shrink = keep_clean_sums(patch), Personalisation.shrink

    def by_clean(self: Personalisation, deviation: Tensor, variance: Tensor) -> Tensor:
        if not kept.sums.numel():
            return shrink(self, deviation, variance)
        signal = (kept.sums / kept.expected).square().sum(dim=(1, 2))
        size = deviation[0].numel()
        return deviation * (signal / (signal + size * variance)).to(deviation.dtype)[:, None, None]

    patch.setattr(Personalisation, "shrink", by_clean)


def clean_sums_accumulated(patch: Patch) -> None:
    kept, follow = keep_clean_sums(patch), Deviations.follow

    def clean(self: Deviations, release: Tensor) -> None:
        follow(self, kept.sums / kept.expected)

    patch.setattr(Deviations, "follow", clean)


def noise_of_the_realised_batch(patch: Patch) -> None:
    """z·C over the number of records that joined, which is private, and not over q·n."""
    kept, follow = keep_clean_sums(patch), Deviations.follow

    def realised(self: Deviations, release: Tensor) -> None:
        public = self._noise_std
        counts = torch.tensor(kept.counts, dtype=public.dtype).clamp_min(1)
        self._noise_std = public * kept.expected / counts
        follow(self, release)
        self._noise_std = public

    patch.setattr(Deviations, "follow", realised)


def noise_of_one_step_only(patch: Patch) -> None:
    """Less noise is stated than was added: noise then counts as signal."""
    follow = Deviations.follow

    def forgetful(self: Deviations, release: Tensor) -> None:
        self._variance = torch.zeros_like(self._variance)
        follow(self, release)

    patch.setattr(Deviations, "follow", forgetful)


PERSONALISATION_MUTATIONS = (
    Mutation(
        name="a personal prompt is shrunk by the share of signal in the clean sum",
        where="fl_dualpriv.client.personalisation.Personalisation.shrink",
        plant=shrinkage_by_the_clean_sum,
        caught_by=(personalisation_checks.personal_prompts_see_the_releases_alone,),
    ),
    Mutation(
        name="a personal prompt adds up clean sums",
        where="fl_dualpriv.client.personalisation.Deviations.follow",
        plant=clean_sums_accumulated,
        caught_by=(
            personalisation_checks.personal_prompts_see_the_releases_alone,
            personalisation_checks.the_sum_has_the_noise_it_states,
        ),
    ),
    Mutation(
        name="the noise of a personal prompt is stated for the batch that joined",
        where="fl_dualpriv.client.personalisation.Deviations.follow",
        plant=noise_of_the_realised_batch,
        caught_by=(
            personalisation_checks.personal_prompts_see_the_releases_alone,
            personalisation_checks.the_stated_noise_is_the_public_one,
        ),
    ),
    Mutation(
        name="the noise of a personal prompt is stated for its last release only",
        where="fl_dualpriv.client.personalisation.Deviations.follow",
        plant=noise_of_one_step_only,
        caught_by=(personalisation_checks.the_stated_noise_is_the_public_one,),
    ),
)
