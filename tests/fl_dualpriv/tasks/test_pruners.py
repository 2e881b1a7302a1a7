"""The pruner of a run: off by default, and its fusion noise in every reading of the paper's text, none with an ε."""

from pathlib import Path
from typing import Any

import pytest

from fl_dualpriv.config.plans import record_level_plan
from fl_dualpriv.config.schema import RunConfig, app_defaults
from fl_dualpriv.tasks.pruners import token_pruner

DEFAULTS = app_defaults(Path(__file__).parents[3])
FUSED = {"pruning.visual-keep-ratio": 0.5, "pruning.visual-fused": 2, "pruning.visual-merge": "average"}


def config(**changes: Any) -> RunConfig:
    given = {"population": 4, "privacy.record.calibrate-to": "noise-multiplier", "privacy.record.noise-multiplier": 3.0}
    return RunConfig.from_run_config(DEFAULTS | given | {"privacy.client.expected-cohort": 4.0} | changes)


def test_no_pruner_by_default():
    assert token_pruner(config(), 100) is None


def test_a_pruner_has_the_configured_numbers():
    found = token_pruner(config(**FUSED | {"pruning.visual-score": "random", "seed": 7}), 100)
    assert found is not None
    assert (found.keep_ratio, found.contextual, found.merge, found.score) == (0.5, 2, "average", "random")
    assert (found.layer, found.seed, found.fusion_noise_std) == (-2, 7, 0.0)


@pytest.mark.parametrize(
    ("kind", "std"),
    [
        ("absolute", 0.5),
        ("sum", 0.75),  # 0.5 z C = 0.5 x 3 x 0.5
        ("mean", 0.75 / 5),  # divided by q n / population = 0.2 x 100 / 4
    ],
)
def test_fusion_noise_is_scaled_as_the_text_may_mean(kind: str, std: float):
    noisy = {
        "pruning.visual-fusion-noise": kind,
        "pruning.visual-fusion-std": 0.5,
        "privacy.record.clip-norm": 0.5,
        "train.sampling-rate": 0.2,
    }
    found = token_pruner(config(**FUSED | noisy), 100)
    assert found is not None
    assert found.fusion_noise_std == pytest.approx(std)


def test_fusion_noise_changes_no_epsilon():
    plain, noisy = (
        record_level_plan(config(**changes))
        for changes in ({}, FUSED | {"pruning.visual-fusion-noise": "sum", "pruning.visual-fusion-std": 100.0})
    )
    assert plain is not None
    assert plain == noisy
    assert plain.epsilon() == noisy.epsilon()  # type: ignore[union-attr]
