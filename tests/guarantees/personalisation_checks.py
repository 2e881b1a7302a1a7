"""What must hold of noise-aware personal prompts, checked on clients' local steps; called by tests and on broken code.

Releases are fixed, and so are the global prompts. Then the data and the sizes of the batches must not show.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fl_dualpriv.client.step
import fl_dualpriv.privacy.step
from fl_dualpriv.client.personalisation import Personalisation, Shrinkage, personal_prompt
from fl_dualpriv.client.state import PersonalState, fresh_state
from tests.guarantees import step_checks
from tests.guarantees.step_checks import CLIENTS, CLIP, CTX_DIM, MULTIPLIER, N_CTX, START, as_a_client_draws, records

SHRINKAGES: tuple[Shrinkage, ...] = ("scalar", "singular")
RATE, STEPS, ROUNDS, COUNT = 0.3, 3, 2, 40
RULE = Personalisation(shrinkage="scalar", memory=0.9, local_learning_rate=1.0, global_learning_rate=1.0)


def personal_prompts(seed: int, rule: Personalisation, method: str, *, trusts_server: bool = False) -> list[Tensor]:
    """What a client with these records, and coins of its own, has after some rounds of the same releases."""
    steps = 1 if trusts_server else STEPS
    g = torch.Generator().manual_seed(9)
    released = iter((4 * torch.randn(steps * ROUNDS, N_CTX, CTX_DIM, generator=g)).double().unbind())
    prompts = [START, *(START + torch.randn(N_CTX, CTX_DIM, generator=g) for _ in range(ROUNDS))]
    state = fresh_state(N_CTX, CTX_DIM, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fl_dualpriv.privacy.step, "release", lambda clean, plan, source: next(released))
        for server_round, p_g in enumerate(prompts[:-1], 1):
            ((_, state),) = step_checks.local_round(
                [records(seed, COUNT)],
                as_a_client_draws(server_round, seed),
                method=method,
                rate=RATE,
                steps=steps,
                start=p_g,
                states=[state],
                trusts_server=trusts_server,
                personalisation=rule,
            )
    found = personal_prompt(state, rule, prompts[-1], 0)
    return [found, state.personal, *state.release_memory.values()]


def personal_prompts_see_the_releases_alone() -> None:
    """Two unrelated data sets, other coins, one sequence of releases: one personal prompt, and one memory of it."""
    for shrinkage in SHRINKAGES:
        rule = replace(RULE, shrinkage=shrinkage)
        for method, own_rule, trusts_server in (
            ("dpfpl", rule, False),
            ("dpfpl", rule, True),
            ("local-only", replace(rule, global_learning_rate=0.0), False),
        ):
            one, two = (personal_prompts(seed, own_rule, method, trusts_server=trusts_server) for seed in (1, 2))
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)), "data pass by the release"
            assert bool(one[0].any()), "the personal prompt is zero"


def _after(source: step_checks.Source, rate: float, steps: int) -> list[PersonalState]:
    """Clients with the same records after one round; D is not centred in it."""
    data = [records(1, COUNT)] * CLIENTS
    rule = replace(RULE, memory=1.0)
    results = step_checks.local_round(data, source, method="dpfpl", rate=rate, steps=steps, personalisation=rule)
    return [state for _, state in results]


def the_stated_noise_is_the_public_one() -> None:
    """The sum of (η_L z C / (q n))² over the steps: one number for all clients, also for empty batches."""
    for rate in (RATE, 2.0**-40):
        expected = STEPS * (MULTIPLIER * CLIP / (rate * COUNT)) ** 2
        for state in _after(as_a_client_draws(), rate, STEPS):
            stated = float(state.release_memory["personal.noise"])
            assert math.isclose(stated, expected, rel_tol=1e-9), (
                f"a noise of {stated:.3g} is stated, not {expected:.3g}"
            )


def the_sum_has_the_noise_it_states() -> None:
    """One full batch of the same records: clients differ by nothing but noise."""
    states = _after(as_a_client_draws(), 1.0, 1)
    sums = torch.stack([state.release_memory["personal.deviation"] for state in states]).double().flatten(1).numpy()
    step_checks.has_the_scale(sums - sums.mean(axis=0), float(states[0].release_memory["personal.noise"]) ** 0.5)
