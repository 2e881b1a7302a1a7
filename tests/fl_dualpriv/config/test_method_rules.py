"""Each rule of the baselines: what breaks it is refused with a message that says what to do, and nothing else is."""

from pathlib import Path
from typing import Any

import pytest

from fl_dualpriv.config.schema import RunConfig, app_defaults
from fl_dualpriv.errors import ConfigError

DEFAULTS = app_defaults(Path(__file__).parents[3])
SHRUNK = {"prompt.personalisation": "scalar"}
COLLECTIVE = {"prompt.personalisation": "collective"}
PRUNED = {"pruning.update-keep-ratio": 0.5}
QUESTIONS = {"data.ref": "demo-vqa", "backbone.name": "demo-vqa"}
CLIENT_LEVEL = {"privacy.record.mechanism": "none", "privacy.client.mechanism": "gaussian"}


@pytest.mark.parametrize(
    ("method", "changes", "key"),
    [
        ("linear-probe", QUESTIONS, "method"),
        ("prototypes", QUESTIONS, "method"),
        ("fedpgp", QUESTIONS, "method"),
        ("fedotp", QUESTIONS, "method"),
        ("fedotp", {"train.top-m": 2}, "train.top-m"),
        ("fedotp", {"privacy.record.noise-space": "feature"}, "privacy.record.noise-space"),
        ("fedotp", {"pruning.visual-keep-ratio": 0.5}, "pruning.visual-keep-ratio"),
        ("fedotp", {"fedotp.mass": 1.5}, "fedotp.mass"),
        ("fedotp", {"fedotp.regularisation": 0.001}, "fedotp.regularisation"),
        ("dp-lora", QUESTIONS, "method"),
        ("ffa-lora", QUESTIONS, "method"),
        ("fedpgp", {"pruning.update-keep-ratio": 0.8}, "pruning.update-keep-ratio"),
        ("fedpgp", {"privacy.record.trusts-server": True, "train.local-steps": 1}, "privacy.record.trusts-server"),
        ("fedpgp", {"fedpgp.contrastive-weight": -1.0}, "fedpgp.contrastive-weight"),
        ("fedpgp", {"fedpgp.contrastive-temperature": 0.0}, "fedpgp.contrastive-temperature"),
        ("promptfl", {"prompt.init": "zeros"}, "prompt.init"),
        ("linear-probe", {"prompt.init": "random"}, "prompt.init"),
        ("prototypes", {"train.optimizer": "adam"}, "train.optimizer"),
        ("prototypes", {"train.top-m": 2}, "train.top-m"),
        ("prototypes", {"privacy.record.noise-space": "feature"}, "privacy.record.noise-space"),
        ("prototypes", {"pruning.update-keep-ratio": 0.8}, "pruning.update-keep-ratio"),
        ("lowrank", SHRUNK, "prompt.personalisation"),
        ("full", SHRUNK, "prompt.personalisation"),
        ("dpfpl-paper", SHRUNK, "prompt.personalisation"),
        ("fedpgp", SHRUNK, "prompt.personalisation"),
        ("fedotp", SHRUNK, "prompt.personalisation"),
        ("dpfpl", SHRUNK | {"train.optimizer": "momentum"}, "prompt.personalisation"),
        ("local-only", SHRUNK | {"privacy.record.noise-space": "feature"}, "prompt.personalisation"),
        ("dpfpl", SHRUNK | PRUNED | {"pruning.update-block": "component"}, "prompt.personalisation"),
        ("dpfpl", SHRUNK | PRUNED | {"pruning.update-frozen": True}, "prompt.personalisation"),
        ("dpfpl", {"prompt.personal-memory": 1.1}, "prompt.personal-memory"),
        ("prototypes", {"train.class-prior": "list"}, "train.class-prior"),
        ("dpfpl-paper", {"train.class-prior": "list"}, "train.class-prior"),
        ("dpfpl", QUESTIONS | {"train.class-prior": "list"}, "train.class-prior"),
        ("dpfpl", {"train.class-prior": "lists"}, "train.class-prior"),
        ("dpfpl", {"train.class-prior": "exact"}, "train.class-prior"),
        ("dpfpl", {"train.class-prior": "exact"} | CLIENT_LEVEL, "train.class-prior"),
        ("dpfpl", {"train.class-prior": "declared"}, "data.class-shares"),
        ("dpfpl", {"train.class-prior": "list", "data.class-shares": "/s.toml"}, "data.class-shares"),
        ("dpfpl", {"train.class-prior": "list", "train.class-prior-outside": 0.0}, "train.class-prior-outside"),
        ("dpfpl", {"train.class-prior": "list", "train.class-prior-outside": 0.6}, "train.class-prior-outside"),
        *(
            (method, COLLECTIVE, "prompt.personalisation")
            for method in ("local-only", "lowrank", "full", "dpfpl-paper")
        ),
        *((method, COLLECTIVE, "prompt.personalisation") for method in ("fedpgp", "fedotp")),
        ("dpfpl", COLLECTIVE | {"train.global-learning-rate": 0.0}, "prompt.personalisation"),
        ("dpfpl", COLLECTIVE | {"train.optimizer": "adam"}, "prompt.personalisation"),
        ("dpfpl", COLLECTIVE | {"privacy.record.noise-space": "feature"}, "prompt.personalisation"),
        ("dpfpl", COLLECTIVE | {"privacy.client.mechanism": "gaussian"}, "prompt.personalisation"),
        (
            "dpfpl",
            COLLECTIVE | {"privacy.record.trusts-server": True, "train.local-steps": 1},
            "prompt.personalisation",
        ),
    ],
)
def test_what_a_method_cannot_read_is_refused(method: str, changes: dict[str, Any], key: str):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_run_config(DEFAULTS | {"method": method} | changes)
    problems = str(caught.value).splitlines()[1:]
    assert [line.split(" = ")[0].strip() for line in problems] == [key]
    assert "; " in problems[0]  # what to do


@pytest.mark.parametrize("method", ["linear-probe", "prototypes"])
@pytest.mark.parametrize("init", ["zeros", "template"])
def test_heads_start_from_class_features_or_from_nothing(method: str, init: str):
    config = RunConfig.from_run_config(DEFAULTS | {"method": method, "prompt.init": init})
    assert config.prompt.init == init


@pytest.mark.parametrize("method", ["dpfpl", "promptfl", "zero-shot"])
def test_collective_parts_go_with_update_pruning_and_are_unread_without_a_personal_prompt(method: str):
    config = RunConfig.from_run_config(DEFAULTS | {"method": method} | COLLECTIVE | PRUNED)
    assert config.prompt.personalisation == "collective"


@pytest.mark.parametrize("shrinkage", ["scalar", "singular"])
@pytest.mark.parametrize("method", ["dpfpl", "local-only", "promptfl", "zero-shot"])
def test_shrinkage_is_for_dpfpl_and_local_only_and_unread_without_a_personal_prompt(method: str, shrinkage: str):
    changes = {"method": method, "prompt.personalisation": shrinkage, **PRUNED}
    assert RunConfig.from_run_config(DEFAULTS | changes).prompt.personalisation == shrinkage


@pytest.mark.parametrize("method", ["dpfpl", "promptfl", "linear-probe", "fedpgp", "dp-lora", "ffa-lora", "fedotp"])
def test_a_loss_with_a_softmax_takes_a_class_prior(method: str):
    config = RunConfig.from_run_config(DEFAULTS | {"method": method, "train.class-prior": "list"})
    assert config.train.class_prior == "list"


def test_exact_counts_are_refused_with_the_reason_and_taken_without_privacy():
    with pytest.raises(ConfigError, match="exact counts reveal the class of a record to anyone who knows the others"):
        RunConfig.from_run_config(DEFAULTS | {"train.class-prior": "exact"})
    public = {"train.class-prior": "exact", "privacy.record.mechanism": "none"}
    assert RunConfig.from_run_config(DEFAULTS | public).train.class_prior == "exact"
