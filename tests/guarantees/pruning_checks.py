"""What must hold of update pruning and optimizers, checked on clients' local steps; called by tests and on broken code.

Releases are fixed where it is asked whether clean gradients can be seen: whatever then differs has passed by them.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fl_dualpriv.privacy.step
from fl_dualpriv.client.optimizers import Optimizer
from fl_dualpriv.client.pruning import Rule, UpdatePruning
from fl_dualpriv.privacy.clipping import ClippedSum
from fl_dualpriv.privacy.plan import RecordLevelPlan
from tests.guarantees import step_checks
from tests.guarantees.step_checks import CLIP, CTX_DIM, MULTIPLIER, N_CTX, START, TOWER, as_a_client_draws, records

STEPS = 6
HALF = UpdatePruning(rule="past", keep_ratio=0.5, block="token", frozen=True, warm_up=2, exploration=0.4)
ADAM = Optimizer(name="adam-corrected", momentum=0.9)
RULES: tuple[Rule, ...] = ("noised", "random", "past", "random-past", "shrink")


def masks_seen(seed: int) -> list[Tensor]:
    """The masks of all steps of a client with these records, where what is released does not depend on them."""
    seen: list[Tensor] = []
    released = iter(torch.randn(STEPS, N_CTX, CTX_DIM, generator=torch.Generator().manual_seed(9)).double().unbind())
    make = fl_dualpriv.privacy.step.clean_sums

    def watched(gradients: object, plan: RecordLevelPlan, masks: Tensor | None) -> list[ClippedSum]:
        assert masks is not None
        seen.append(masks)
        return make(gradients, plan, masks)  # pyright: ignore[reportArgumentType]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fl_dualpriv.privacy.step, "clean_sums", watched)
        patch.setattr(fl_dualpriv.privacy.step, "release", lambda clean, plan, source: next(released))
        step_checks.local_round([records(seed)], as_a_client_draws(), rate=0.5, steps=STEPS, pruning=HALF)
    return seen


def masks_see_past_releases_alone() -> None:
    """Two unrelated data sets, one sequence of releases: one sequence of masks."""
    one, two = masks_seen(1), masks_seen(2)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)), "a mask was chosen on clean gradients"
    # two steps of warm-up, then two tokens of four and one of the two others
    assert [int(mask.any(dim=2).sum()) for mask in one] == [4, 4, 3, 3, 3, 3]
    assert len({mask[0, :, 0].numpy().tobytes() for mask in one}) > 2, "masks never change"


def pruned_updates_see_the_release_alone() -> None:
    """With every rule, and with an optimizer that remembers."""
    for rule in RULES:
        pruning = replace(HALF, rule=rule)
        step_checks.data_enter_through_the_release_alone("dpfpl", pruning, "prompt", ADAM)
        step_checks.data_enter_through_the_release_alone("promptfl", replace(pruning, frozen=False), "prompt")
    step_checks.data_enter_through_the_release_alone("dpfpl", replace(HALF, rule="noised", block="component"), "prompt")


def one_record_moves_a_masked_release_by_at_most_c() -> None:
    pruning = replace(HALF, rule="random-past")
    step_checks.moves_by_at_most_c(records(1), range(0, 40, 5), "prompt", TOWER, START, pruning)


def a_masked_release_has_the_noise_of_its_open_blocks() -> None:
    """An empty batch: z C on each open coordinate, whatever was cut, and nothing on a closed one."""
    rate, data = 2.0**-40, records(1)
    results = step_checks.local_round(
        [data] * 60, as_a_client_draws(), rate=rate, pruning=replace(HALF, rule="random-past", block="coordinate")
    )
    noise = torch.stack([upload for upload, _ in results]).double() * rate * data.num_examples
    is_open = noise != 0
    assert is_open.flatten(1).sum(dim=1).tolist() == [N_CTX * CTX_DIM // 2] * 60, "closed blocks are released"
    # 60 x 128 draws: the standard error of the deviation is 1/sqrt(2 n) = 0.8 %; 5 of them
    assert float(noise[is_open].std()) == pytest.approx(MULTIPLIER * CLIP, rel=0.04), "the noise has another scale"
