"""FedPGP: its local steps against autograd, and that its contrastive term costs nothing: no record enters it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fl_dualpriv.privacy.step
from fl_dualpriv.client.state import PersonalState, fresh_state
from fl_dualpriv.client.step import LocalTraining, Participant, cohort_update
from fl_dualpriv.config.methods import METHODS
from fl_dualpriv.config.plans import record_level_plan
from fl_dualpriv.config.schema import RunConfig, app_defaults
from fl_dualpriv.learners.base import ClientData
from fl_dualpriv.learners.classification import Classification
from fl_dualpriv.learners.contrast import PromptContrast, contrastive_loss
from fl_dualpriv.privacy.plan import RecordLevelPlan
from tests.guarantees import step_checks
from tests.guarantees.step_checks import CLIP, EMBED, N_CLS, SCALE, START, TOWER, as_a_client_draws, records

RANK, STEP, WEIGHT, TEMPERATURE = 2, 0.05, 0.8, 0.5
WORDS = torch.nn.functional.normalize(torch.randn(N_CLS, EMBED, generator=torch.Generator().manual_seed(9)), dim=1)
PLAN = RecordLevelPlan(
    clip_norm=CLIP, noise_multiplier=1.0, sampling_rate=1.0, releases=1, delta=1e-4, trusts_server=False, personal=True
)


def local_round(
    data: ClientData, steps: int, plan: RecordLevelPlan | None, weight: float, state: PersonalState | None = None
) -> tuple[Tensor, PersonalState]:
    draw = as_a_client_draws()
    one = Participant(
        partition=0,
        state=state or fresh_state(*START.shape, RANK),
        data=data,
        random=lambda purpose, step: draw(0, purpose, step),
        event=plan and plan.event("run", 1, steps),
    )
    training = LocalTraining(
        local_steps=steps,
        sampling_rate=1.0,
        global_learning_rate=STEP,
        local_learning_rate=2 * STEP,
    )
    contrast = PromptContrast(tower=TOWER, words=WORDS, weight=weight, temperature=TEMPERATURE)
    (found,) = cohort_update(
        global_prompt=START,
        participants=[one],
        objective=Classification(tower=TOWER, logit_scale=SCALE, top_m=0, noise_space="prompt", workspace_bytes=2**20),
        method=METHODS["fedpgp"],
        training=training,
        plan=plan,
        regulariser=contrast if weight else None,
    )
    return found


def by_autograd(data: ClientData, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient steps of p_G, u and v on L_ce + μ L_con, from u = 0."""
    leaves = [START.clone(), torch.zeros(len(START), RANK), fresh_state(*START.shape, RANK).row_basis.clone()]
    for _ in range(steps):
        p, u, v = (leaf.detach().requires_grad_(True) for leaf in leaves)
        near, away = step_checks.class_features(p), step_checks.class_features(p + u @ v)
        loss = torch.nn.functional.cross_entropy(SCALE * data.features @ away.T, data.labels)
        loss = loss + WEIGHT * contrastive_loss(near[None], away[None], WORDS, TEMPERATURE).sum()
        of_p, of_u, of_v = torch.autograd.grad(loss, (p, u, v))
        leaves = [p - STEP * of_p, u - 2 * STEP * of_u, v - 2 * STEP * of_v]
    p, u, v = (leaf.detach() for leaf in leaves)
    return p, u, v


def test_local_steps_are_gradient_steps_of_the_published_loss():
    data = records(1, 12)
    upload, state = local_round(data, 3, None, WEIGHT)
    p, u, v = by_autograd(data, 3)
    torch.testing.assert_close(upload, p - START, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state.personal, u @ v, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state.row_basis, v, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state.release_memory["left-factor"], u, rtol=1e-4, atol=1e-6)
    assert float(u.norm()) > 0.01  # it did move


def test_a_round_goes_on_where_the_last_one_ended():
    data = records(1, 12)
    _, one = local_round(data, 1, None, 0.0)
    assert local_round(data, 1, None, 0.0, one)[1].release_memory["left-factor"].abs().sum() > 0
    _, again = local_round(data, 1, None, 0.0, replace(one, release_memory={}))  # u forgotten
    _, kept = local_round(data, 1, None, 0.0, one)
    assert not torch.allclose(again.personal, kept.personal)


def pull(data: ClientData) -> Tensor:
    """What the contrastive term adds to an upload of one noised step."""
    with_term, without = (local_round(data, 1, PLAN, weight)[0] for weight in (WEIGHT, 0.0))
    return with_term - without


def the_term_reads_no_record() -> None:
    """It adds the same to the uploads of clients with other records, and of one whose records are all bad."""
    data = records(1, 12)
    spoilt = replace(data, features=torch.full_like(data.features, torch.nan))
    first, *others = (pull(own) for own in (data, records(2, 12), spoilt))
    assert float(first.norm()) > 1e-3
    for other in others:
        torch.testing.assert_close(first, other, rtol=0, atol=1e-6)


def test_the_contrastive_term_is_added_after_the_noise_and_reads_no_record():
    the_term_reads_no_record()


def test_the_plan_does_not_know_the_term():
    defaults = app_defaults(Path(__file__).parents[3]) | {
        "method": "fedpgp",
        "privacy.record.calibrate-to": "noise-multiplier",
    }
    plans = [
        record_level_plan(RunConfig.from_run_config(defaults | {"fedpgp.contrastive-weight": weight}))
        for weight in (0.0, 3.0)
    ]
    assert plans[0] == plans[1] is not None


def test_a_term_that_reads_records_is_caught(monkeypatch: pytest.MonkeyPatch):
    honest, clean = PromptContrast.gradients, fl_dualpriv.privacy.step.clean_sums
    kept: list[Tensor] = []

    def keep(*args: object) -> object:
        found = clean(*args)  # type: ignore[arg-type]
        kept[:] = [found[0].value.float()]
        return found

    def scaled(self: PromptContrast, shared: Tensor, effective: Tensor) -> tuple[Tensor, Tensor]:
        """A weight that balances the two terms of the loss by the clean gradient: a leak that looks like tuning."""
        near, away = honest(self, shared, effective)
        return near * kept[0].norm(), away * kept[0].norm()

    monkeypatch.setattr(fl_dualpriv.privacy.step, "clean_sums", keep)
    monkeypatch.setattr(PromptContrast, "gradients", scaled)
    with pytest.raises(AssertionError):
        the_term_reads_no_record()


def test_a_record_moves_the_upload_by_its_share_of_c_with_the_term(monkeypatch: pytest.MonkeyPatch):
    data = records(1, 12)
    gone = replace(data, features=data.features.clone())
    gone.features[3] = torch.nan  # counted, and zero
    whole, rest = (local_round(own, 1, PLAN, WEIGHT)[0] for own in (data, gone))  # the same noise
    assert 0 < float((whole - rest).norm()) <= STEP * CLIP / data.num_examples * (1 + 1e-4)
