"""When a checkpoint may be used, and that nothing of it stays."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fl_dualpriv.config.releases import may_repeat
from fl_dualpriv.config.schema import RunConfig, app_defaults
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.privacy.accounting import SampledGaussians, composed_epsilon, joint_noise_multiplier
from fl_dualpriv.run.checkpoint import FILES, Checkpoint, CheckpointFolder, Progress

DEFAULTS = app_defaults(Path(__file__).parents[3])


def two_rounds(folder: Path) -> CheckpointFolder:
    checkpoints = CheckpointFolder(folder, {}, [5], {})
    for done in (0, 1):
        progress = Progress(run_token="t", rounds_done=done, events=done, deliveries=0, failures=0, last_failure=None)
        state = {"mechanism.secret-noise": torch.ones(2)}
        checkpoints.write(Checkpoint(progress=progress, prompt=torch.zeros(2, 3), state=state))
    return checkpoints


def test_what_a_kill_left_of_a_checkpoint_goes_with_it(tmp_path: Path) -> None:
    """It may hold the memory of correlated noise, and whoever has that can take the noise out of released prompts."""
    checkpoints = two_rounds(tmp_path)
    for name in FILES:  # as `write_bytes` and the link to the one before call them, in a process that is gone
        (tmp_path / f".{name}.999999.tmp").write_bytes((tmp_path / FILES[0]).read_bytes())
    (tmp_path / "summary.json").touch()
    checkpoints.remove()
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("damage", ["damaged", "missing"])
def test_a_round_that_was_seen_is_made_again_only_where_it_may_be(tmp_path: Path, damage: str) -> None:
    checkpoints, last = two_rounds(tmp_path), tmp_path / FILES[0]
    last.write_bytes(b"") if damage == "damaged" else last.unlink()
    with pytest.raises(ConfigError, match=f"checkpoint.bin is {damage}.* must not be made twice"):
        checkpoints.read(may_go_back=False)
    found = checkpoints.read(may_go_back=True)
    assert found is not None
    assert found.progress.rounds_done == 0


@pytest.mark.parametrize(
    ("changes", "may"),
    [
        ({}, True),
        ({"privacy.record.trusts-server": True}, False),
        ({"privacy.record.trusts-server": True, "privacy.randomness": "seeded"}, True),
        ({"privacy.client.mechanism": "gaussian"}, True),
        ({"privacy.client.mechanism": "tree"}, False),
    ],
)
def test_further_noise_on_the_same_sums_is_no_further_sample(changes: dict[str, Any], may: bool) -> None:
    config = {"train.local-steps": 1, "privacy.record.delta": 1e-4, "privacy.client.expected-cohort": 2.0}
    assert may_repeat(RunConfig.from_run_config(DEFAULTS | config | changes)) is may


def test_why_it_is_none() -> None:
    """Two noises of z on one sample of rate q leak more than the two events of (q, z) that a ledger would hold."""
    q, z, delta = 0.05, 1.0, 1e-5
    charged = composed_epsilon((SampledGaussians(q, z, 2),), delta)
    made = composed_epsilon((SampledGaussians(q, joint_noise_multiplier(z, z), 1),), delta)
    assert made > 2 * charged  # 2.59 and 1.18
