"""Noise-aware personal prompts: the sums by hand, the mean over clients taken out, and p_L in the local steps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fl_dualpriv.client.node import personalisation
from fl_dualpriv.client.personalisation import (
    NAMES,
    Deviations,
    Personalisation,
    Shrinkage,
    personal_prompt,
    rounds_since,
)
from fl_dualpriv.client.pruning import KEEP_ALL
from fl_dualpriv.client.release_memory import ReleaseMemory
from fl_dualpriv.client.state import ClientFolder, PersonalState, fresh_state
from fl_dualpriv.client.step import LocalTraining
from fl_dualpriv.config.schema import RunConfig, app_defaults
from fl_dualpriv.methods.base import Method
from fl_dualpriv.methods.shrinkage import shrink_by_norm, shrink_singular_values
from tests.guarantees import step_checks
from tests.guarantees.step_checks import CLIP, CTX_DIM, MULTIPLIER, N_CTX, START, as_a_client_draws, records

SCALAR = Personalisation(shrinkage="scalar", memory=1.0, local_learning_rate=1.0, global_learning_rate=1.0)
KINDS = pytest.mark.parametrize("kind", ["scalar", "singular"])
RATE, COUNT = 0.5, 400


def deviations(
    rule: Personalisation, memories: list[ReleaseMemory], p_g: Tensor, tau: float, since: int = 1
) -> Deviations:
    return Deviations(
        rule,
        release_memories=memories,
        global_prompt=p_g,
        rounds_since=[since] * len(memories),
        noise_std=torch.full((len(memories),), tau, dtype=torch.float64),
    )


# --- the sums ---------------------------------------------------------------------------------------------------------


def test_the_sums_by_hand():
    rule = replace(SCALAR, memory=0.5, local_learning_rate=0.5, global_learning_rate=0.25)
    p_g = torch.tensor([[1.0, 1.0]])
    first = deviations(rule, [{}], p_g, tau=2.0)
    first.follow(torch.tensor([[[2.0, 0.0]]]))  # D = −0.5 (2, 0) = (−1, 0); ν = (0.5 · 2)² = 1
    first.follow(torch.tensor([[[0.0, 4.0]]]))  # D = 0.5 (−1, 0) − 0.5 (0, 4) = (−0.5, −2); ν = 0.25 + 1 = 1.25
    # ‖D‖² = 4.25, d·ν = 2.5: the factor is 1.75/4.25
    torch.testing.assert_close(first.personal, torch.tensor([[[-0.5, -2.0]]]) * 1.75 / 4.25)
    (memory,) = first.release_memories()
    assert memory["personal.deviation"].tolist() == [[-0.5, -2.0]]
    assert (float(memory["personal.noise"]), int(memory["personal.steps"])) == (1.25, 2)
    # p_G moves by (0.1, 0.2): w = (1 + 0.5)/2 and η_L/η_G = 2, so D loses 1.5 (0.1, 0.2)
    moved = p_g + torch.tensor([[0.1, 0.2]])
    for since, expected in ((1, [[-0.65, -2.3]]), (2, [[-0.575, -2.15]])):  # over two rounds: half of it a round
        (later,) = deviations(rule, [memory], moved, tau=2.0, since=since).release_memories()
        torch.testing.assert_close(later["personal.deviation"], torch.tensor(expected))
        assert float(later["personal.noise"]) == 1.25
    # the second round's mean is taken out once, and not again before the next step
    (second,) = deviations(rule, [memory], moved, tau=2.0).release_memories()
    (third,) = deviations(rule, [second], moved + 5, tau=2.0).release_memories()
    assert torch.equal(second["personal.deviation"], third["personal.deviation"])


@pytest.mark.parametrize("memory", [0.0, 0.3, 0.9])
def test_the_mean_has_the_mean_weight_of_its_steps(memory: float):
    rule, steps = replace(SCALAR, memory=memory), 4
    assert float(rule._mean_weight(torch.tensor(4.0))) == pytest.approx(sum(memory**j for j in range(steps)) / steps)


def test_without_a_global_prompt_the_deviation_is_the_whole():
    rule = replace(SCALAR, global_learning_rate=0.0)
    first = deviations(rule, [{}], START, tau=0.0)
    first.follow(torch.ones(1, N_CTX, CTX_DIM))
    later = deviations(rule, first.release_memories(), START + 3, tau=0.0)
    assert torch.equal(later.personal[0], -torch.ones(N_CTX, CTX_DIM))


def test_deviations_of_all_clients_add_up_to_nothing_and_have_the_noise_they_state():
    """With the plain mean, rate 1 and sizes alike. The noise of D is then ν (1 − 1/N); ν is the bound."""
    clients, steps, tau, rate = 20, 5, 0.7, 0.3
    rule = replace(SCALAR, local_learning_rate=rate, global_learning_rate=2.0)
    memories: list[ReleaseMemory] = [{}] * clients
    p_g, g = START, torch.Generator().manual_seed(0)
    for _ in range(3):
        round_ = deviations(rule, memories, p_g, tau)
        releases = tau * torch.randn(steps, clients, N_CTX, CTX_DIM, generator=g)
        for release in releases:
            round_.follow(release)
        memories, p_g = round_.release_memories(), p_g - 2.0 * releases.sum(dim=0).mean(dim=0)
    last = deviations(rule, memories, p_g, tau).release_memories()
    centred = torch.stack([memory["personal.deviation"] for memory in last])
    assert float(centred.mean(dim=0).abs().max()) < 1e-4  # float32 sums
    variance = float(last[0]["personal.noise"])
    assert variance == pytest.approx(15 * (rate * tau) ** 2, rel=1e-12)
    # 20 x 256 values: the standard error of the variance is √(2/5120) = 2 %
    assert float(centred.double().square().mean()) == pytest.approx(variance * (1 - 1 / clients), rel=0.1)


# --- in the local steps -----------------------------------------------------------------------------------------------


def local_round(kind: Shrinkage | None, **changes: Any) -> tuple[Tensor, PersonalState]:
    rule = None if kind is None else replace(SCALAR, shrinkage=kind)
    given: dict[str, Any] = {"method": "dpfpl", "rate": RATE, "personalisation": rule}
    (result,) = step_checks.local_round([records(1, COUNT)], as_a_client_draws(), **(given | changes))
    return result


@KINDS
def test_without_privacy_both_shrinkages_are_the_identity(kind: Shrinkage):
    """Then p_L is the sum of the steps, as of a personal prompt that moves freely; bit by bit."""
    rule = replace(SCALAR, shrinkage=kind, global_learning_rate=0.0)
    _, shrunk = local_round(None, method="local-only", steps=3, private=False, personalisation=rule)
    assert float(shrunk.release_memory["personal.noise"]) == 0
    assert torch.equal(shrunk.personal, shrunk.release_memory["personal.deviation"])
    # "full" without its shared part moves p_L by the gradients themselves
    _, free = local_round(None, method="full", steps=1, private=False)
    _, one = local_round(None, method="local-only", steps=1, private=False, personalisation=rule)
    assert torch.equal(one.personal, free.personal)


@KINDS
def test_gradients_are_taken_at_the_shared_prompt_plus_the_shrunk_sum(kind: Shrinkage, monkeypatch: pytest.MonkeyPatch):
    """The third step's prompt is the sum of the two that a round of two steps ends with."""
    upload, state = local_round(kind, steps=2)
    shrink, memory = shrink_by_norm if kind == "scalar" else shrink_singular_values, state.release_memory
    assert torch.equal(state.personal, shrink(memory["personal.deviation"], memory["personal.noise"]))
    assert 0 < float(state.personal.norm()) < float(memory["personal.deviation"].norm())
    assert torch.allclose(memory["personal.deviation"], upload, atol=1e-6)  # η_L = η_G: the copy of p_G moves alike
    assert float(memory["personal.noise"]) == pytest.approx(2 * (MULTIPLIER * CLIP / (RATE * COUNT)) ** 2, rel=1e-12)
    seen: list[tuple[Tensor, Tensor]] = []
    effective = Method.effective

    def watched(self: Method, shared: Tensor, personal: Tensor) -> Tensor:
        seen.append((shared, personal))
        return effective(self, shared, personal)

    monkeypatch.setattr(Method, "effective", watched)
    local_round(kind, steps=3)
    shared, personal = seen[-1]
    assert torch.equal(personal[0], state.personal)
    torch.testing.assert_close(shared[0], START + upload)


@KINDS
def test_two_rounds_are_one_round_of_two_steps_where_the_mean_is_not_known(kind: Shrinkage):
    rule = replace(SCALAR, shrinkage=kind, memory=0.8, global_learning_rate=0.0)
    source = step_checks.without_noise(as_a_client_draws())
    data = [records(1, COUNT)]
    ((_, together),) = step_checks.local_round(data, source, method="local-only", steps=2, personalisation=rule)
    ((_, state),) = step_checks.local_round(data, source, method="local-only", personalisation=rule)
    ((_, last),) = step_checks.local_round(data, source, method="local-only", personalisation=rule, states=[state])
    torch.testing.assert_close(last.personal, together.personal, atol=1e-6, rtol=1e-5)
    assert int(last.release_memory["personal.steps"]) == 1


@KINDS
def test_no_client_gets_numbers_of_another(kind: Shrinkage):
    data, rule = [records(seed, 20 + seed) for seed in range(3)], replace(SCALAR, shrinkage=kind)
    source = as_a_client_draws()
    arguments: dict[str, Any] = {"method": "dpfpl", "steps": 3, "personalisation": rule}
    together = step_checks.local_round(data, source, **arguments)
    for i, (upload, state) in enumerate(together):
        ((own_upload, own),) = step_checks.local_round(
            [data[i]], lambda _, purpose, step, i=i: source(i, purpose, step), **arguments
        )
        assert torch.equal(upload, own_upload)
        assert torch.equal(state.personal, own.personal)
        assert all(torch.equal(own.release_memory[name], state.release_memory[name]) for name in NAMES)


def test_pruning_acts_on_the_shared_prompt_and_not_on_the_sum():
    """Shrinkage takes its place in p_L; D holds the release before it is pruned."""
    upload, state = local_round("scalar", pruning=replace(KEEP_ALL, keep_ratio=0.5))
    assert int(upload.any(dim=1).sum()) == N_CTX // 2
    assert int(state.release_memory["personal.deviation"].any(dim=1).sum()) == N_CTX


@KINDS
def test_a_trusting_client_follows_its_own_noised_copy(kind: Shrinkage):
    """Of √2 times the noise, see `RecordLevelPlan.local_noise_multiplier`."""
    _, state = local_round(kind, trusts_server=True)
    expected = 2 * (MULTIPLIER * CLIP / (RATE * COUNT)) ** 2
    assert float(state.release_memory["personal.noise"]) == pytest.approx(expected, rel=1e-12)


# --- the prompt that is scored ----------------------------------------------------------------------------------------


@KINDS
def test_the_prompt_that_goes_with_the_next_global_prompt(kind: Shrinkage):
    """It is the p_L that the client's next round begins with."""
    rule = replace(SCALAR, shrinkage=kind)
    upload, state = local_round(kind, steps=2)
    state, p_g = replace(state, server_round=4), START + upload / 3
    found = personal_prompt(state, rule, p_g, server_round=4)
    begun = deviations(rule, [state.release_memory], p_g, tau=1.0)
    assert torch.equal(found, begun.personal[0])
    assert not torch.equal(found, state.personal)
    # a client that missed the last of two rounds loses half of the move
    late = personal_prompt(state, rule, p_g, server_round=5)
    assert torch.equal(late, deviations(rule, [state.release_memory], p_g, tau=1.0, since=2).personal[0])


def test_the_prompt_of_a_client_without_a_round_is_zero_and_the_published_one_is_stored():
    fresh = fresh_state(N_CTX, CTX_DIM, 2)
    assert not personal_prompt(fresh, SCALAR, START, 3).any()
    stored = replace(fresh, personal=START)
    assert personal_prompt(stored, None, START, 3) is stored.personal


@pytest.mark.parametrize(("last", "now", "expected"), [(0, 1, 1), (1, 2, 1), (1, 5, 4), (3, 0, 1)])
def test_missed_rounds_are_counted(last: int, now: int, expected: int):
    assert rounds_since(replace(fresh_state(N_CTX, CTX_DIM, 2), server_round=last), now) == expected


@pytest.mark.parametrize("private", [True, False])
def test_the_memory_survives_on_disk(tmp_path: Path, private: bool):
    _, state = local_round("singular", steps=2, private=private)
    folder = ClientFolder(tmp_path)
    folder.save(replace(state, server_round=1), START, "mine")
    shapes = SCALAR.release_memory_shapes(N_CTX, CTX_DIM)
    back = folder.load("mine", N_CTX, CTX_DIM, 2, shapes)
    assert back.release_memory.keys() == set(NAMES)
    assert all(torch.equal(back.release_memory[name], state.release_memory[name]) for name in NAMES)
    fewer = {"personal.noise": shapes["personal.noise"]}
    with pytest.raises(ValueError, match="this run keeps no such tensor"):
        folder.load("mine", N_CTX, CTX_DIM, 2, fewer)
    assert folder.load("mine", N_CTX, CTX_DIM, 2, fewer, partial=True).release_memory.keys() == fewer.keys()


# --- configuration ----------------------------------------------------------------------------------------------------


def test_the_configuration_gives_the_rule():
    defaults = app_defaults(Path(__file__).parents[3])

    def of(changes: dict[str, Any]) -> Personalisation | None:
        rates = {"train.local-learning-rate": 0.2, "train.global-learning-rate": 2.0}
        return personalisation(RunConfig.from_run_config(defaults | rates | changes))

    assert of({}) is None
    found = of({"prompt.personalisation": "singular", "prompt.personal-memory": 0.9})
    assert found == Personalisation(shrinkage="singular", memory=0.9, local_learning_rate=0.2, global_learning_rate=2.0)
    local = of({"prompt.personalisation": "scalar", "method": "local-only"})
    assert local == Personalisation(shrinkage="scalar", memory=1.0, local_learning_rate=0.2, global_learning_rate=0.0)
    assert of({"prompt.personalisation": "scalar", "method": "promptfl"}) is None


@pytest.mark.parametrize("memory", [-0.1, 1.1])
def test_a_memory_out_of_range_is_refused(memory: float):
    with pytest.raises(ValueError, match="must be in"):
        replace(SCALAR, memory=memory)


def test_without_the_key_nothing_is_remembered():
    training = LocalTraining(local_steps=1, sampling_rate=1, global_learning_rate=1, local_learning_rate=1)
    assert training.release_memory_shapes(N_CTX, CTX_DIM) == {}
    assert set(replace(training, personalisation=SCALAR).release_memory_shapes(N_CTX, CTX_DIM)) == set(NAMES)
    _, state = local_round(None)
    assert not state.release_memory
