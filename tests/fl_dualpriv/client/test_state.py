"""A client's own state, and what it refuses."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fl_dualpriv.client import state as client
from fl_dualpriv.client.release_memory import ReleaseMemoryShapes
from fl_dualpriv.client.state import ClientFolder, PersonalState, check_round, fresh_state
from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.files import read_tensors, write_tensors
from fl_dualpriv.learners.base import ClientData
from fl_dualpriv.privacy.filters.pay import check_single_run
from fl_dualpriv.privacy.ledger import LedgerContent, LedgerEvent
from fl_dualpriv.privacy.plan import RecordLevelPlan

PLAN = RecordLevelPlan(
    clip_norm=1.0, noise_multiplier=1.5, sampling_rate=0.1, releases=4, delta=1e-5, trusts_server=False, personal=True
)


def some_state() -> PersonalState:
    generator = torch.Generator().manual_seed(1)
    return PersonalState(
        personal=torch.randn(4, 6, generator=generator),
        row_basis=torch.randn(2, 6, generator=generator),
        server_round=3,
    )


def test_a_fresh_state_knows_nothing():
    one, two = fresh_state(4, 6, 2), fresh_state(4, 6, 2)
    assert torch.equal(one.personal, torch.zeros(4, 6))
    assert torch.equal(one.row_basis, two.row_basis)
    torch.testing.assert_close(one.row_basis @ one.row_basis.T, torch.eye(2))
    assert one.server_round == 0


def test_a_fresh_state_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    fresh_state(4, 6, 2)
    assert torch.equal(before, torch.random.get_rng_state())


def test_fresh_states_share_no_memory():
    one = fresh_state(4, 6, 2)
    one.personal.add_(1)
    one.row_basis.add_(1)
    other = fresh_state(4, 6, 2)
    assert not other.personal.any()
    assert not torch.equal(one.row_basis, other.row_basis)


def test_the_state_survives_bitwise(tmp_path: Path):
    folder, state = ClientFolder(tmp_path / "client-000"), some_state()
    folder.save(state, torch.ones(4, 6), "mine")
    back = ClientFolder(tmp_path / "client-000").load("mine", 4, 6, 2)
    assert torch.equal(back.personal, state.personal)
    assert torch.equal(back.row_basis, state.row_basis)
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
    ClientFolder(tmp_path).save(some_state(), torch.full((4, 6), 2.0), "mine", "as promised")
    tensors, metadata = read_tensors(tmp_path / "prompt.safetensors")
    assert torch.equal(tensors["global"], torch.full((4, 6), 2.0))
    assert metadata == {"run-token": "mine", "server-round": "3", "terms": "as promised"}


def test_a_state_moves_between_devices_whole():
    moved = some_state().to(torch.device("meta"))
    assert moved.personal.device == moved.row_basis.device == torch.device("meta")
    assert moved.server_round == 3


RELEASE_MEMORY: ReleaseMemoryShapes = {"past.average": ((4, 6), torch.float32), "past.seen": ((4,), torch.int64)}
REMEMBERED = {"past.average": torch.rand(4, 6), "past.seen": torch.arange(4)}


def test_what_is_remembered_of_releases_survives_with_the_state(tmp_path: Path):
    folder = ClientFolder(tmp_path)
    folder.save(replace(some_state(), release_memory=REMEMBERED), torch.ones(4, 6), "mine")
    back = folder.load("mine", 4, 6, 2, RELEASE_MEMORY)
    assert back.release_memory.keys() == REMEMBERED.keys()
    assert all(torch.equal(back.release_memory[name], tensor) for name, tensor in REMEMBERED.items())
    assert back.to(torch.device("meta")).release_memory["past.seen"].device == torch.device("meta")
    assert folder.load("mine", 4, 6, 2).release_memory == {}  # who scores does not look
    assert folder.load("other", 4, 6, 2, RELEASE_MEMORY).release_memory == {}  # a fresh run remembers nothing


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ({}, "holds no past.average"),
        (REMEMBERED | {"past.seen": torch.arange(3)}, r"past.seen \(3,\), torch.int64; expected \(4,\)"),
        (REMEMBERED | {"past.seen": torch.rand(4)}, "torch.float32; expected .* torch.int64"),
        (REMEMBERED | {"optimizer.first": torch.rand(4, 6)}, "holds optimizer.first; this run keeps no such tensor"),
    ],
    ids=["missing", "shape", "type", "unknown"],
)
def test_a_damaged_history_is_an_error(tmp_path: Path, kept: dict[str, torch.Tensor], expected: str):
    folder = ClientFolder(tmp_path)
    folder.save(replace(some_state(), release_memory=kept), torch.ones(4, 6), "mine")
    with pytest.raises(ValueError, match=expected):
        folder.load("mine", 4, 6, 2, RELEASE_MEMORY)


def test_a_state_without_history_writes_what_it_always_did(tmp_path: Path):
    ClientFolder(tmp_path).save(some_state(), torch.ones(4, 6), "mine")
    assert read_tensors(tmp_path / "prompt.safetensors")[0].keys() == {"personal", "carrier", "global"}


def event(run: str, server_round: int, releases: int = 1) -> LedgerEvent:
    return LedgerEvent(
        run=run,
        unit="record",
        server_round=server_round,
        releases=releases,
        sampling_rate=PLAN.sampling_rate,
        noise_multiplier=PLAN.noise_multiplier,
    )


def content(*events: LedgerEvent, damaged: int = 0) -> LedgerContent:
    return LedgerContent(events=events, damaged=damaged)


FRESH = fresh_state(4, 6, 2)


def test_the_plans_releases_and_no_more():
    check_round(PLAN, content(event("a", 1, 2)), FRESH, event("a", 2, 2))  # 4 of 4
    with pytest.raises(PrivacyError, match="2 releases of this run are in the ledger and the round makes 3 more"):
        check_round(PLAN, content(event("a", 1, 2)), FRESH, event("a", 2, 3))
    check_round(PLAN, content(event("b", 1, 4)), FRESH, event("a", 1, 4))  # other runs are the budget's matter


@pytest.mark.parametrize("server_round", [1, 2])
def test_a_round_that_the_ledger_or_the_state_knows_is_a_repetition(server_round: int):
    with pytest.raises(PrivacyError, match=r"was done \(last: 2\)"):
        check_round(PLAN, content(event("a", 1), event("a", 2)), FRESH, event("a", server_round))
    with pytest.raises(PrivacyError, match=r"was done \(last: 2\)"):
        check_round(PLAN, content(), replace(FRESH, server_round=2), event("a", server_round))


def test_without_a_budget_one_plan_is_all_a_folder_ever_spends():
    check_single_run(PLAN, content(event("a", 1, 2)), event("b", 1, 2))
    for made in (content(event("a", 1, 3)), content(event("a", 1, 1), damaged=2), content(damaged=2)):
        with pytest.raises(PrivacyError, match="no budget for more than one run"):
            check_single_run(PLAN, made, event("b", 1, 2))


def test_refusals_are_noted_up_to_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client, "_MOST_REFUSED_BYTES", 1000)
    folder = ClientFolder(tmp_path)
    for _ in range(50):
        folder.log_refusal("t" * 10_000, "train, round 1", "no" * 10_000)
    text = (tmp_path / "refusals.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    # each line is cut, and none is begun once the file has its size: at most 1000 bytes and one line of 2.3 kB
    assert len(text) < 1000 + 2500
    assert lines[0]["reason"].startswith("nono")
    assert lines[0]["asked"] == "train, round 1"


def test_a_full_disk_does_not_turn_a_refusal_into_another_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    ClientFolder(tmp_path / "file").log_refusal("t", "train", "no")  # no folder can be made there


def test_bad_records_stay_counted():
    data = ClientData(
        features=torch.tensor([[1.0, 0.0], [math.nan, math.nan]]),
        labels=torch.tensor([0, 1]),
    )
    assert data.num_examples == 2
