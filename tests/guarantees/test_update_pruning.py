"""Update pruning and optimizers cost no ε, see no clean gradient, and hold still what they say is held still."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from fl_dualpriv.client.optimizers import Name, Optimizer
from fl_dualpriv.client.pruning import KEEP_ALL, Rule, UpdatePruning
from fl_dualpriv.client.state import PersonalState, fresh_state
from fl_dualpriv.config.plans import record_level_plan
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.files import read_tensors
from fl_dualpriv.learners.base import ClientData
from fl_dualpriv.learners.rows import Batches, per_example_gradients
from fl_dualpriv.privacy.clipping import clipped_sum
from fl_dualpriv.privacy.ledger import LedgerEvent
from fl_dualpriv.privacy.noise import RandomSource
from fl_dualpriv.privacy.step import clipped_sums
from tests.guarantees import pruning_checks, run_checks, step_checks
from tests.guarantees.objective_checks import batch_rows
from tests.guarantees.pruning_checks import ADAM, HALF, RULES
from tests.guarantees.run_checks import Federation, train, upload_of
from tests.guarantees.step_checks import CLIP, CTX_DIM, N_CTX, SCALE, START, TOWER, as_a_client_draws, records

MOMENTUM = Optimizer(name="momentum", momentum=0.9)


def test_masks_see_past_releases_alone() -> None:
    pruning_checks.masks_see_past_releases_alone()


def test_pruned_updates_see_the_release_alone() -> None:
    pruning_checks.pruned_updates_see_the_release_alone()


def test_one_record_moves_a_masked_release_by_at_most_c() -> None:
    pruning_checks.one_record_moves_a_masked_release_by_at_most_c()


def test_a_masked_release_has_the_noise_of_its_open_blocks() -> None:
    pruning_checks.a_masked_release_has_the_noise_of_its_open_blocks()


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
def test_a_masked_sum_is_of_gradients_masked_before_the_clip(arithmetic: Any) -> None:
    """So a record still counts with its whole norm on what is open, and with nothing on what is closed."""
    data, mask = records(1), torch.zeros(1, N_CTX, CTX_DIM)
    mask[:, [0, 2]] = 1
    batches = Batches.of((data.features, data.labels))
    features = TOWER(START[None])
    (found,) = clipped_sums(batch_rows(features, batches, SCALE, workspace_bytes=2**20), CLIP, arithmetic, mask)
    rows = per_example_gradients(features, batches, SCALE, workspace_bytes=2**30)[0, : data.num_examples]
    expected = clipped_sum(mask * rows, CLIP, arithmetic)
    torch.testing.assert_close(found.value, expected.value, atol=1e-9, rtol=1e-9)
    assert found.sensitivity == expected.sensitivity
    assert not found.value[[1, 3]].any()
    # masking after the clip would lose what the clip has taken for the closed rows
    late = mask[0] * clipped_sum(rows, CLIP, arithmetic).value
    assert float(found.value.norm()) > 1.05 * float(late.norm())


# --- ε ----------------------------------------------------------------------------------------------------------------


def events_and_epsilon(federation: Federation, changes: dict[str, Any]) -> tuple[Sequence[LedgerEvent], float]:
    """What a client's ledger says after two rounds, and ε of the whole run."""
    plan = record_level_plan(RunConfig.from_run_config(federation.config(changes)))
    assert plan is not None
    grid = federation.nodes(**changes)
    for server_round in (1, 2):
        upload = upload_of(train(grid, server_round))
        assert upload is not None
        assert bool(upload.any())
    return federation.ledger.read().events, plan.epsilon()


def test_epsilon_and_ledger_are_the_same_with_every_rule_and_without(tmp_path: Path, tiny_clip_dir: Path) -> None:
    images = run_checks.write_images(tmp_path / "images")

    def run(name: str, changes: dict[str, Any]) -> tuple[Sequence[LedgerEvent], float]:
        return events_and_epsilon(Federation(folder=tmp_path / name, images=images, clip=tiny_clip_dir), changes)

    expected = run("off", {})
    assert len(expected[0]) == 2
    for rule in RULES:
        pruned = {"pruning.update-keep-ratio": 0.5, "pruning.update-rule": rule, "pruning.update-warm-up": 1}
        assert run(rule, pruned) == expected
    assert run("adam", {"train.optimizer": "adam-corrected"}) == expected


# --- what is remembered -----------------------------------------------------------------------------------------------


def test_what_is_remembered_stays_at_the_client_for_the_run(tmp_path: Path, tiny_clip_dir: Path) -> None:
    """Between rounds in the file of its prompt; a method without a personal prompt and without DP keeps it too."""
    images = run_checks.write_images(tmp_path / "images")
    changes = {
        "method": "promptfl",
        "privacy.record.mechanism": "none",
        "pruning.update-keep-ratio": 0.5,
        "pruning.update-rule": "past",
        "train.optimizer": "momentum",
    }
    federation = Federation(folder=tmp_path / "run", images=images, clip=tiny_clip_dir)
    terms = replace(run_checks.TERMS, mechanism="none", clip_norm=0, noise_multiplier=0)
    grid, counts = federation.nodes(**changes), []
    for server_round, token in ((1, "t"), (2, "t"), (1, "new")):
        assert upload_of(train(grid, server_round, terms, token)) is not None
        kept, _ = read_tensors(federation.folder / "clients" / "client-000" / "prompt.safetensors")
        assert kept.keys() == {*("personal", "carrier", "global", "past.average", "past.seen", "optimizer.first")}
        counts.append(kept["past.seen"].tolist())
    assert counts == [[2] * 4, [4] * 4, [2] * 4]  # two steps a round, all of them warm-up; a new run starts anew


def test_rounds_go_on_where_the_last_one_stopped() -> None:
    """Two rounds of one step do what one round of two does, but for their streams: batches and noise are all alike."""
    source = step_checks.without_noise(as_a_client_draws())
    together = step_checks.local_round([records(1)], source, steps=2, pruning=HALF, optimizer=ADAM)[0]
    upload, state = step_checks.local_round([records(1)], source, pruning=HALF, optimizer=ADAM)[0]
    again, last = step_checks.local_round(
        [records(1)], source, pruning=HALF, optimizer=ADAM, start=START + upload, states=[state]
    )[0]
    torch.testing.assert_close(upload + again, together[0], atol=1e-5, rtol=1e-5)
    assert all(torch.equal(last.release_memory[name], tensor) for name, tensor in together[1].release_memory.items())


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=lambda o: o.name)
@pytest.mark.parametrize("rule", ["random", "past"])
def test_no_client_gets_numbers_of_another(rule: Rule, optimizer: Optimizer) -> None:
    pruning, data = replace(HALF, rule=rule), [records(seed, 20 + seed) for seed in range(3)]
    source = as_a_client_draws()

    def run(some: list[ClientData], first: int = 0) -> list[tuple[Tensor, PersonalState]]:
        def streams(partition: int, purpose: str, step: int) -> RandomSource:
            return source(first + partition, purpose, step)

        return step_checks.local_round(some, streams, method="dpfpl", steps=4, pruning=pruning, optimizer=optimizer)

    together, alone = run(data), [result for own in range(3) for result in run([data[own]], own)]
    for (upload, state), (own_upload, own_state) in zip(together, alone, strict=True):
        assert torch.equal(upload, own_upload)
        assert torch.equal(state.personal, own_state.personal)
        assert state.release_memory.keys() == own_state.release_memory.keys()


# --- what moves -------------------------------------------------------------------------------------------------------


Rows = list[int]


def moves(method: str, pruning: UpdatePruning, optimizer: Optimizer, rounds: int = 6) -> list[tuple[Rows, Rows]]:
    """Rows of the global and of the personal prompt that moved in each of some rounds of one step."""
    start, state, found = START, fresh_state(N_CTX, CTX_DIM, 2), []
    for server_round in range(1, rounds + 1):
        ((upload, after),) = step_checks.local_round(
            [records(1)],
            as_a_client_draws(server_round),
            method=method,
            start=start,
            states=[state],
            pruning=pruning,
            optimizer=optimizer,
        )
        found.append((rows_of(upload), rows_of(after.personal - state.personal)))
        start, state = start + upload, after
    return found


def rows_of(matrix: Tensor) -> Rows:
    return torch.nonzero(matrix.any(dim=1)).flatten().tolist()


@pytest.mark.parametrize("name", get_args(Name))
@pytest.mark.parametrize("method", ["dpfpl", "full"])
@pytest.mark.parametrize("rule", ["noised", "random", "past", "random-past"])
def test_a_frozen_block_does_not_move_in_either_prompt(rule: Rule, method: str, name: Name) -> None:
    pruning = replace(HALF, rule=rule, exploration=0.0, warm_up=1)
    found = moves(method, pruning, Optimizer(name=name, momentum=0.9))
    dense = 1 if rule == "past" else 0
    assert all(len(of_global) == (4 if i < dense else 2) for i, (of_global, _) in enumerate(found))
    assert all(of_global == of_personal for of_global, of_personal in found)


@pytest.mark.parametrize("method", ["dpfpl", "full"])
def test_a_pruned_block_that_is_not_frozen_is_moved_on_by_momentum(method: str) -> None:
    pruning = replace(HALF, rule="random", frozen=False)
    assert moves(method, pruning, MOMENTUM)[-1] == ([0, 1, 2, 3], [0, 1, 2, 3])
    assert [len(of_global) for of_global, _ in moves(method, pruning, Optimizer(name="sgd", momentum=0))] == [2] * 6


def test_every_block_is_looked_at_again_where_there_is_exploration() -> None:
    still = moves("promptfl", replace(HALF, exploration=0.0), MOMENTUM, 20)[2:]
    looking = moves("promptfl", replace(HALF, exploration=0.5), MOMENTUM, 20)[2:]
    assert {len(rows) for rows, _ in looking} == {3}
    assert {len(rows) for rows, _ in still} == {2}
    # 18 rounds, and a closed token is the one that is looked at with probability 1/2: missed by all in 4 of a million
    assert {row for rows, _ in looking for row in rows} == {0, 1, 2, 3}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("trusts_server", [False, True])
def test_a_keep_ratio_of_one_is_unpruned_training_bit_by_bit(rule: Rule, trusts_server: bool) -> None:
    def run(pruning: UpdatePruning) -> tuple[Tensor, PersonalState]:
        steps = 1 if trusts_server else 4
        source = as_a_client_draws()
        return step_checks.local_round(
            [records(1)], source, method="dpfpl", steps=steps, trusts_server=trusts_server, pruning=pruning
        )[0]

    (upload, state), (expected, expected_state) = run(replace(HALF, rule=rule, keep_ratio=1.0)), run(KEEP_ALL)
    assert torch.equal(upload, expected)
    assert torch.equal(state.personal, expected_state.personal)
    assert state.release_memory == {}


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
def test_a_trusted_server_gets_the_masked_clipped_sum(arithmetic: Any) -> None:
    """Nothing on closed blocks; rules after the noise cannot reach what has none yet."""
    for rule, rows in (("random-past", 2), ("noised", 4)):
        ((upload, state),) = step_checks.local_round(
            [records(1)],
            as_a_client_draws(),
            method="full",
            trusts_server=True,
            arithmetic=arithmetic,
            pruning=replace(HALF, rule=rule),
        )
        assert len(rows_of(upload)) == rows
        assert len(rows_of(state.personal)) == 2
        if arithmetic == "integer":
            assert torch.equal(upload, upload.round())


def test_component_pruning_moves_the_personal_prompt_within_its_factors() -> None:
    """Of two components and the rest, two are kept: what is dropped is dropped from both moves."""
    pruning = replace(HALF, rule="noised", keep_ratio=0.6, block="component", frozen=False)
    ((upload, state),) = step_checks.local_round([records(1)], as_a_client_draws(), method="dpfpl", pruning=pruning)
    ((dense, _),) = step_checks.local_round([records(1)], as_a_client_draws(), method="dpfpl")
    # the first gradient lends its own subspaces: it is projected orthogonally, so Pythagoras holds
    dropped = float((dense - upload).norm()) ** 2
    assert 0 < dropped < float(dense.norm()) ** 2
    assert float(upload.norm()) ** 2 + dropped == pytest.approx(float(dense.norm()) ** 2, rel=1e-4)
    assert int(np.linalg.matrix_rank(state.personal.numpy(), tol=1e-4)) <= 4


def test_shrinkage_moves_along_the_release_and_not_below_the_floor() -> None:
    ((shrunk, _),) = step_checks.local_round([records(1)], as_a_client_draws(), pruning=replace(HALF, rule="shrink"))
    ((dense, _),) = step_checks.local_round([records(1)], as_a_client_draws())
    # The upload is -Σ/n and z C / n the noise: 1 - (64 - 2) s²/‖g‖², or the floor.
    s = step_checks.MULTIPLIER * CLIP / 40
    weights = (1 - 62 * s**2 / dense.double().square().sum(dim=1)).clamp_min(0.2)
    assert float(weights.min()) == pytest.approx(0.2)
    torch.testing.assert_close(shrunk.double(), dense.double() * weights[:, None], atol=1e-6, rtol=1e-4)
