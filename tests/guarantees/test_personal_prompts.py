"""Noise-aware personal prompts are post-processing, cost no ε, and state the noise that was added."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fl_dualpriv.config.plans import record_level_plan
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.files import read_tensors
from tests.guarantees import personalisation_checks, run_checks
from tests.guarantees.run_checks import Federation, train, upload_of


def test_personal_prompts_see_the_releases_alone() -> None:
    personalisation_checks.personal_prompts_see_the_releases_alone()


def test_the_stated_noise_is_the_public_one() -> None:
    personalisation_checks.the_stated_noise_is_the_public_one()


def test_the_sum_has_the_noise_it_states() -> None:
    personalisation_checks.the_sum_has_the_noise_it_states()


@pytest.mark.parametrize("shrinkage", ["scalar", "singular"])
def test_epsilon_and_ledger_are_the_same_and_the_first_release_is_too(
    shrinkage: str, tmp_path: Path, tiny_clip_dir: Path
) -> None:
    images = run_checks.write_images(tmp_path / "images")

    def run(name: str, changes: dict[str, Any]) -> tuple[Any, float, Any]:
        federation = Federation(folder=tmp_path / name, images=images, clip=tiny_clip_dir)
        plan = record_level_plan(RunConfig.from_run_config(federation.config(changes)))
        assert plan is not None
        grid = federation.nodes(**changes)
        for server_round in (1, 2):
            assert upload_of(train(grid, server_round)) is not None
        kept, _ = read_tensors(federation.folder / "clients" / "client-000" / "prompt.safetensors")
        return federation.ledger.read().events, plan.epsilon(), kept

    events, epsilon, before = run("published", {})
    found_events, found_epsilon, kept = run(shrinkage, {"prompt.personalisation": shrinkage})
    assert (found_events, found_epsilon) == (events, epsilon)
    assert kept.keys() - before.keys() == {
        *("personal.deviation", "personal.noise", "personal.global", "personal.steps")
    }
    # two rounds of two steps, each of noise z·C over q·n: 1.5 over 0.15 times seven records
    rate = 0.5
    assert float(kept["personal.noise"]) == pytest.approx(4 * (rate * 1.5 / (0.15 * 7)) ** 2)


def test_without_privacy_the_whole_sum_is_kept(tmp_path: Path, tiny_clip_dir: Path) -> None:
    images = run_checks.write_images(tmp_path / "images")
    federation = Federation(folder=tmp_path / "run", images=images, clip=tiny_clip_dir)
    grid = federation.nodes(**{"prompt.personalisation": "scalar", "privacy.record.mechanism": "none"})
    terms = replace(run_checks.TERMS, mechanism="none", clip_norm=0, noise_multiplier=0)
    for server_round in (1, 2):
        assert upload_of(train(grid, server_round, terms)) is not None
    kept, _ = read_tensors(federation.folder / "clients" / "client-000" / "prompt.safetensors")
    assert float(kept["personal.noise"]) == 0
    assert kept["personal"].any()
    assert kept["personal"].equal(kept["personal.deviation"])
