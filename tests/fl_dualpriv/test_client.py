"""A client's own state, and what it refuses."""

import math
from pathlib import Path

import pytest
import torch

from fl_dualpriv.client import ClientData, ClientFolder, PersonalState, check_noise, fresh_state
from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.files import read_tensors, write_tensors
from fl_dualpriv.privacy.plan import RecordLevelPlan

PLAN = RecordLevelPlan(
    clip_norm=1.0, noise_multiplier=1.5, sampling_rate=0.1, releases=4, delta=1e-5, trusts_server=False, personal=True
)


def some_state() -> PersonalState:
    generator = torch.Generator().manual_seed(1)
    return PersonalState(
        personal=torch.randn(4, 6, generator=generator), carrier=torch.randn(2, 6, generator=generator), server_round=3
    )


def test_a_fresh_state_knows_nothing():
    one, two = fresh_state(4, 6, 2), fresh_state(4, 6, 2)
    assert torch.equal(one.personal, torch.zeros(4, 6))
    assert torch.equal(one.carrier, two.carrier)
    torch.testing.assert_close(one.carrier @ one.carrier.T, torch.eye(2))
    assert one.server_round == 0


def test_a_fresh_state_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    fresh_state(4, 6, 2)
    assert torch.equal(before, torch.random.get_rng_state())


def test_fresh_states_share_no_memory():
    one = fresh_state(4, 6, 2)
    one.personal.add_(1)
    one.carrier.add_(1)
    other = fresh_state(4, 6, 2)
    assert not other.personal.any()
    assert not torch.equal(one.carrier, other.carrier)


def test_the_state_survives_bitwise(tmp_path: Path):
    folder, state = ClientFolder(tmp_path / "client-000"), some_state()
    folder.save(state, torch.ones(4, 6), "mine")
    back = ClientFolder(tmp_path / "client-000").load("mine", 4, 6, 2)
    assert torch.equal(back.personal, state.personal)
    assert torch.equal(back.carrier, state.carrier)
    assert back.server_round == 3


@pytest.mark.parametrize("token", ["other", ""])
def test_another_run_starts_afresh(tmp_path: Path, token: str):
    folder = ClientFolder(tmp_path)
    folder.save(some_state(), torch.ones(4, 6), "mine")
    assert not folder.load(token, 4, 6, 2).personal.any()


def test_a_file_without_a_token_belongs_to_no_run(tmp_path: Path):
    write_tensors(tmp_path / "prompt.safetensors", {"personal": torch.ones(4, 6), "carrier": torch.ones(2, 6)}, {})
    assert not ClientFolder(tmp_path).load("mine", 4, 6, 2).personal.any()


def test_personal_and_global_prompt_lie_side_by_side(tmp_path: Path):
    ClientFolder(tmp_path).save(some_state(), torch.full((4, 6), 2.0), "mine")
    tensors, metadata = read_tensors(tmp_path / "prompt.safetensors")
    assert torch.equal(tensors["global"], torch.full((4, 6), 2.0))
    assert metadata == {"run-token": "mine", "server-round": "3"}


def test_a_state_moves_between_devices_whole():
    moved = some_state().to(torch.device("meta"))
    assert moved.personal.device == moved.carrier.device == torch.device("meta")
    assert moved.server_round == 3


@pytest.mark.parametrize("offered", [1.5, 1.5000001, 1e6, math.inf])
def test_enough_noise_is_accepted(offered: float):
    check_noise(PLAN, offered)


@pytest.mark.parametrize("offered", [0.0, -1.5, 1.4999999, math.nan, -math.inf])
def test_less_noise_is_refused(offered: float):
    with pytest.raises(PrivacyError, match=r"this client's plan needs 1\.5; the step is refused"):
        check_noise(PLAN, offered)


def test_bad_records_stay_counted():
    data = ClientData(
        features=torch.tensor([[1.0, 0.0], [math.nan, math.nan]]),
        labels=torch.tensor([0, 1]),
    )
    assert data.num_examples == 2
