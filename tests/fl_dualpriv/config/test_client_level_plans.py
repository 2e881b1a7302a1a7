"""From configuration keys to plans of adaptive clipping and of correlated noise, and what is said of them."""

from pathlib import Path

import dp_accounting
import pytest
from dp_accounting import pld

from fl_dualpriv.config import plans
from fl_dualpriv.config.plans import client_level_plan
from fl_dualpriv.config.schema import RunConfig, app_defaults, merge
from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.accounting import COARSE_GRID
from fl_dualpriv.privacy.correlated import BandedNoise, TreeNoise
from fl_dualpriv.privacy.plan import ClientLevelPlan, client_level_notes, client_level_releases

DEFAULTS = app_defaults(Path(__file__).parents[3])


def plan(**client: object) -> ClientLevelPlan:
    given = {"mechanism": "gaussian", "expected-cohort": 20.0, "calibrate-to": "noise-multiplier"}
    keys = {f"privacy.client.{key.replace('_', '-')}": value for key, value in (given | client).items()}
    config = RunConfig.from_run_config(merge(DEFAULTS, {"population": 100, "rounds": 20}, keys))  # type: ignore[dict-item]
    assert config.claims_privacy
    found = client_level_plan(config)
    assert found is not None
    return found


def test_adaptive_clipping_splits_the_noise_and_changes_no_epsilon() -> None:
    fixed, adaptive = plan(noise_multiplier=1.2), plan(noise_multiplier=1.2, clipping="adaptive")
    # sigma_b = 0.05 · 20 = 1: the bits' multiplier is 2, and 1.2⁻² = 1.5⁻² + 2⁻².
    assert adaptive.sum_noise_multiplier == pytest.approx(1.5)
    assert (fixed.sum_noise_multiplier, adaptive.epsilon()) == (1.2, fixed.epsilon())
    (row, _) = client_level_releases(adaptive, scored=True)
    assert (row.releases, row.sampling) == (20, "Poisson cohort, q = 0.2 per round")
    assert "with the noised shares of small updates" in row.note
    (note,) = client_level_notes(adaptive)
    assert "0.5 quantile" in note
    assert "multiplier 1.5, counts 2, together 1.2" in note
    assert client_level_notes(fixed) == []


def test_bits_with_too_little_noise_are_refused_with_the_least_share() -> None:
    # 2 · 0.05 · 20 = 2 <= 2.4: the least share is 2.4 / 2 / 20.
    with pytest.raises(PrivacyError, match=r"bit-noise-share = 0\.05: .*; raise it above 0\.06"):
        plan(noise_multiplier=2.4, clipping="adaptive")


@pytest.mark.parametrize(("mechanism", "kind"), [("tree", TreeNoise), ("banded", BandedNoise)])
def test_a_run_with_correlated_noise_is_one_gaussian_release(mechanism: str, kind: type) -> None:
    found = plan(mechanism=mechanism, noise_multiplier=1.7)
    assert found.correlated is not None
    assert type(found.correlated) is kind
    assert (found.correlated.schedule.separation, found.correlated.schedule.most_rounds) == (5, 4)
    accountant = pld.PLDAccountant(value_discretization_interval=COARSE_GRID)
    one = accountant.compose(dp_accounting.GaussianDpEvent(1.7)).get_epsilon(found.delta)
    assert found.spent(20) == pytest.approx(one, abs=1e-6)
    assert 0 < found.spent(1) < found.spent(10) < found.spent(20)
    (row,) = client_level_releases(found, scored=False)
    assert (row.releases, row.relation) == (1, "add-or-remove-one (zero-out)")
    assert row.sampling == "none: every 5. round, at most 4 times"
    (note,) = client_level_notes(found)
    assert "no client is sampled" in note


def test_correlated_noise_is_calibrated_for_one_release_of_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(plans, "noise_multiplier_for", lambda *given: asked.append(given) or 2.0)
    found = plan(mechanism="banded", calibrate_to="epsilon", epsilon=4.0, bands=3)
    assert asked == [("epsilon", 4.0, 1.0, found.delta, 1.0, 1)]
    assert isinstance(found.correlated, BandedNoise)
    assert found.correlated.bands == 3
