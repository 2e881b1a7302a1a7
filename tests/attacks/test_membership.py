"""Membership inference: its statistics, that it attacks what a run publishes, and that it has power."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attacks import membership
from attacks.federation import Federation
from attacks.membership import audit_membership, likelihood_ratios
from attacks.roc import auc_ceiling, roc
from fl_dualpriv.config.schema import RunConfig, app_defaults, merge, read_toml
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.files import read_tensors
from fl_dualpriv.flower.local import run_local
from fl_dualpriv.publish.collect import read_material

APP_DIR = Path(__file__).parents[2]
DEFAULTS = app_defaults(APP_DIR)
MEMORISING: dict[str, Any] = {
    "method": "full",
    "prompt.learner": "head",
    "prompt.rank": 8,
    "data.partition": "iid",
    "train.sampling-rate": 1.0,
    "train.local-learning-rate": 2.0,
    "train.global-learning-rate": 0.1,
    "rounds": 4,
    "train.local-steps": 25,
}
FEW: dict[str, int] = {"trainings": 8, "records": 16}
NO_DP: dict[str, Any] = {"privacy.record.mechanism": "none"}

CLIENT_LEVEL: dict[str, Any] = NO_DP | {
    "method": "promptfl",
    "privacy.client.mechanism": "gaussian",
    "privacy.client.calibrate-to": "noise-multiplier",
    "privacy.client.delta": 0.1,
    "privacy.client.expected-cohort": 1.0,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_clip_dir: Path) -> dict[str, Any]:
    """Two clients with two classes of 40 blocky images each; what is in an image says nothing about its class."""
    root, rng = tmp_path_factory.mktemp("blocks"), np.random.default_rng(0)
    for name in ("cat", "dog", "bus", "tree"):
        (root / name).mkdir()
        for i in range(40):
            blocks = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
            Image.fromarray(blocks).resize((32, 32)).save(root / name / f"{i:02d}.png")
    return DEFAULTS | {
        "rounds": 2,
        "population": 2,
        "supernodes": 1,  # clients step together, as they do under attack
        "join-timeout": 1.0,
        "train.local-steps": 2,
        "privacy.randomness": "seeded",
        "privacy.record.calibrate-to": "noise-multiplier",  # to calibrate takes seconds
        "privacy.record.delta": 1e-3,
        "evaluation.held-out-data": "public",
        "data.ref": "folder",
        "data.path": str(root),
        "backbone.name": f"local-dir:{tiny_clip_dir}",
        "resources.device": "cpu",
        "resources.feature-cache": "off",
    }


# --- statistics -------------------------------------------------------------------------------------------------------


def test_figures_of_a_small_curve():
    # Pairs (member, other): 3>1, 3>2, 3>0, 2>1, 2=2, 2>0, 0<1, 0<2, 0=0: 5 + 2/2 of 9. No other is above 2, so with
    # no false positive one of three members is found.
    scores = np.array([3.0, 2.0, 0.0, 1.0, 2.0, 0.0])
    found = roc(scores, np.array([True] * 3 + [False] * 3), np.zeros(6, dtype=np.int64))
    assert found.auc == pytest.approx(6 / 9)
    assert found.tpr_at_1_fpr == pytest.approx(1 / 3)
    assert (found.members, found.non_members) == (3, 3)
    assert (found.fpr[0], found.tpr[0], found.fpr[-1], found.tpr[-1]) == (0, 0, 1, 1)
    assert sum(np.diff(found.fpr) * (np.array(found.tpr[1:]) + found.tpr[:-1]) / 2) == pytest.approx(6 / 9)


def test_a_curve_needs_both_kinds():
    with pytest.raises(ValueError, match="both kinds"):
        roc(np.zeros(3), np.ones(3, dtype=bool), np.zeros(3, dtype=np.int64))


def test_ceiling_of_the_area():
    # δ = 0: e^ε/(1 + e^ε), a randomised response of one bit, which reaches it: 3/4 at ε = ln 3.
    assert auc_ceiling(np.log(3), 0.0) == pytest.approx(0.75)
    assert auc_ceiling(0.0, 0.0) == pytest.approx(0.5)
    # ε = 0: total variation δ, and the area below the best curve is 1 − (1 − δ)²/2.
    assert auc_ceiling(0.0, 0.1) == pytest.approx(1 - 0.81 / 2)


@pytest.mark.parametrize("clusters", [1, 20])
def test_intervals_cover(clusters: int):
    """Members N(1, 1) against N(0, 1): AUC = Φ(1/√2) = 0.7602. With clusters, all scores of one share a shift.

    The shift has variance 1 and moves members and others alike, so pairs of two clusters differ by N(1, 4) and the area
    is Φ(1/2) = 0.6915 but for the twentieth of the pairs within a cluster: 0.6915·19/20 + 0.7602/20 = 0.6949.
    """
    rng, covered = np.random.default_rng(0), 0
    truth = 0.7602 if clusters == 1 else 0.6949
    for _ in range(200):
        is_member = rng.random(400) < 0.5
        cluster = np.arange(400) % clusters
        shift = rng.normal(size=clusters) if clusters > 1 else np.zeros(1)
        found = roc(rng.normal(size=400) + is_member + shift[cluster], is_member, cluster)
        covered += found.auc_low <= truth <= found.auc_high
    # 200 draws of 95 %: 190, standard deviation 3.1; the cluster form is approximate for 20 of them.
    assert 180 <= covered <= 200


def test_likelihood_ratios_leave_the_target_out():
    rng = np.random.default_rng(1)
    evidence, is_member = rng.normal(size=(9, 5)), rng.random((9, 5)) < 0.5
    is_member[:2], is_member[2:4] = True, False  # two of each kind for everybody but those nine's own
    found = likelihood_ratios(evidence, is_member)
    for target in range(9):
        for record in range(5):
            others = np.arange(9) != target
            kinds = [evidence[others & (is_member[:, record] == kind), record] for kind in (True, False)]
            if min(map(len, kinds)) < 2:
                assert np.isnan(found[target, record])
                continue
            squares = sum(((kind - kind.mean()) ** 2).sum() for kind in kinds)
            variance = squares / (sum(map(len, kinds)) - 2)
            x = evidence[target, record]
            expected = ((x - kinds[1].mean()) ** 2 - (x - kinds[0].mean()) ** 2) / (2 * variance)
            assert found[target, record] == pytest.approx(expected)
    changed = evidence.copy()
    changed[0] += 100.0  # a target's own evidence must not move the normals it is held against
    again = likelihood_ratios(changed, is_member)[0]
    slope = (again - found[0]) / 100.0
    wanted = (likelihood_ratios(evidence + (np.arange(9) == 0)[:, None], is_member)[0] - found[0]) / 1.0
    np.testing.assert_allclose(slope[np.isfinite(slope)], wanted[np.isfinite(wanted)])


def test_likelihood_ratios_find_a_gaussian_shift():
    """φ ~ N(μ_i + 1 if in, 1) with μ_i ~ N(0, 3²): the ratio knows μ_i, a threshold on φ does not.

    Known normals: Φ(1/√2) = 0.760. A threshold: Φ(1/√(2·10)) = 0.589.
    """
    rng = np.random.default_rng(2)
    is_member = rng.random((64, 300)) < 0.5
    evidence = rng.normal(size=is_member.shape) + is_member + 3 * rng.normal(size=300)
    flat, cluster = is_member.ravel(), np.repeat(np.arange(64), 300)
    ratio = roc(likelihood_ratios(evidence, is_member).ravel(), flat, cluster).auc
    assert ratio == pytest.approx(0.760, abs=0.02)
    assert roc(evidence.ravel(), flat, cluster).auc == pytest.approx(0.589, abs=0.02)


# --- what is attacked -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="record level"),
        pytest.param({"method": "dpfpl-paper"}, id="dpfpl-paper"),
        pytest.param({"privacy.record.trusts-server": True, "train.local-steps": 1}, id="trusted server"),
        pytest.param(CLIENT_LEVEL, id="client level"),
    ],
)
def test_the_federation_under_attack_is_the_run(base: dict[str, Any], tmp_path: Path, changes: dict[str, Any]):
    run_local(APP_DIR, base | {"output.dir": str(tmp_path)} | changes)
    federation = Federation(RunConfig.from_run_config(base | changes))
    found = federation.train([federation.records(p) for p in range(2)], seed=0)
    shared = read_tensors(tmp_path / "prompts" / "global.safetensors")[0]["global"]
    for p, prompt in enumerate(found):
        kept = tmp_path / "clients" / f"client-{p:03d}" / "prompt.safetensors"
        expected = shared + read_tensors(kept)[0]["personal"] if kept.exists() else shared
        torch.testing.assert_close(prompt, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", ["scalar", "collective"])
def test_noise_aware_prompts_under_attack_are_those_that_the_run_publishes(
    rule: str, base: dict[str, Any], tmp_path: Path
):
    """With the mean of the last round taken out, which the stored p_L still holds; or with the server's last part."""
    changes = {"prompt.personalisation": rule}
    run_local(APP_DIR, base | {"output.dir": str(tmp_path)} | changes)
    federation = Federation(RunConfig.from_run_config(base | changes))
    found = federation.train([federation.records(p) for p in range(2)], seed=0)
    for p, prompt in enumerate(found):
        torch.testing.assert_close(prompt, read_material(tmp_path, p).prompt, rtol=0, atol=1e-6)


def test_members_alone_move_the_prompts(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """The planted flaw of DP-FPL's own evaluation: 'members' that were never trained on. The attack then finds none."""
    config = RunConfig.from_run_config(base | MEMORISING | NO_DP)
    true = audit_membership(config, 0, **FEW)
    choose = membership._chosen

    def others(clients: Any, owner: np.ndarray, coins: np.ndarray) -> Any:
        return choose(clients, owner, ~coins)

    monkeypatch.setattr(membership, "_chosen", others)
    void = audit_membership(config, 0, **FEW)
    assert true.loss_threshold.auc > 0.6
    assert void.loss_threshold.auc < 0.4  # the records called members are those that nobody trained on


def test_an_overfitted_prompt_leaks_and_a_private_one_does_not(base: dict[str, Any]):
    config = RunConfig.from_run_config(base | MEMORISING | NO_DP)
    leaking = audit_membership(config, 0, **FEW)
    assert (leaking.epsilon_claimed, leaking.auc_ceiling) == ("none", 1.0)
    assert leaking.stronger.auc_low > 0.600  # more than any test of the private run below can reach
    assert leaking.lira.auc_low > 0.55
    assert leaking.tpr_at_1_fpr > 0.02
    assert leaking.mia_auc == max(leaking.loss_threshold.auc, leaking.lira.auc)
    assert len(leaking.auc_by_training) == leaking.trainings == 8
    assert leaking.loss_threshold.members + leaking.loss_threshold.non_members == 8 * 2 * 16
    # 100 releases of all records with z = 28: a Gaussian of μ = √100/28 = 0.357, of ε = 0.9 at δ = 1e-3.
    private = audit_membership(
        RunConfig.from_run_config(base | MEMORISING | {"privacy.record.noise-multiplier": 28.0}), 0, **FEW
    )
    assert isinstance(private.epsilon_claimed, float)
    assert 0.8 < private.epsilon_claimed < 1.0
    # No test tells N(0, 1) from N(μ, 1) better than Φ(μ/√2) = 0.600; the ceiling of (ε, δ) alone is looser.
    assert private.stronger.auc_low < 0.600 < private.auc_ceiling < 0.74
    assert private.mia_auc < leaking.stronger.auc_low


def test_shuffled_coins_give_a_half(base: dict[str, Any]):
    config = RunConfig.from_run_config(base | MEMORISING | NO_DP)
    federation, rng = Federation(config), np.random.default_rng(3)
    clients = [membership._some(federation.records(p), 16, rng) for p in range(2)]
    owner = np.repeat([0, 1], 16)
    coins = rng.random((8, len(owner))) < 0.5
    evidence = np.stack(
        [
            membership.confidence(federation, clients, federation.train(membership._chosen(clients, owner, row), i))
            for i, row in enumerate(coins)
        ]
    )
    cluster = np.repeat(np.arange(8), len(owner))
    assert roc(evidence.ravel(), coins.ravel(), cluster).auc > 0.6
    shuffled = rng.permuted(coins, axis=1)
    # 128 scores of each kind: variance 257/(12·128²), standard error 0.036 (Mann and Whitney); 3 of them are allowed.
    assert roc(evidence.ravel(), shuffled.ravel(), cluster).auc == pytest.approx(0.5, abs=0.11)


# --- what cannot be attacked ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"trainings": 3}, "trainings = 3"),
        ({}, {"records": 8}, "has 8 records"),
        ({"method": "zero-shot"}, {}, "trains nothing"),
        ({"data.augmentation": "flip"}, {}, "data.augmentation"),
    ],
)
def test_what_cannot_be_attacked_is_said(
    base: dict[str, Any], changes: dict[str, Any], options: dict[str, int], message: str
):
    with pytest.raises(ConfigError, match=message):
        audit_membership(RunConfig.from_run_config(base | changes), 0, **options)


def test_claims(base: dict[str, Any]):
    def claim(**changes: Any) -> Any:
        return membership.claimed(Federation(RunConfig.from_run_config(base | changes)))[0]

    proved = claim()
    assert 0 < proved < 10
    assert claim(**{"privacy.record.noise-multiplier": 2.0}) < proved
    assert claim(method="dpfpl-paper") == "nominal"
    assert claim(**NO_DP) == "none"
    assert claim(**CLIENT_LEVEL | {"method": "dpfpl"}) == "none"  # personal prompts are not under it
    assert 0 < claim(**CLIENT_LEVEL) < 10


@pytest.mark.slow
def test_the_demo_at_epsilon_1_is_below_the_bar():
    """No attack may tell more than 0.55 on the demo at ε = 1 (its ceiling is 0.73)."""
    file = read_toml(APP_DIR / "simulations" / "configs" / "by-class.toml")
    config = RunConfig.from_run_config(merge(DEFAULTS, file, {"privacy.record.epsilon": 1.0}))
    found = audit_membership(config, 0, trainings=8, records=32)
    assert found.mia_auc <= 0.55
