"""Whole runs with a selected start: what is chosen, what is stated, and that a cut-off run asks nobody twice."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attacks.federation import Federation as Attacked
from fl_dualpriv.client.selection import SelectionRound
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.files import read_tensors
from fl_dualpriv.privacy.ledger import Ledger
from fl_dualpriv.server.rounds import Rounds
from fl_dualpriv.tasks.build import build_task
from tests.guarantees import run_checks
from tests.guarantees.run_checks import DELTA, Federation

CANDIDATES = "a photo of a {} | a drawing of a {} | art {} | a bad {}"
SELECT: dict[str, Any] = {
    "prompt.init": "select",
    "prompt.candidates": CANDIDATES,
    "evaluation.held-out-data": "public",
    "rounds": 2,
    "privacy.randomness": "seeded",
    "privacy.record.calibrate-to": "epsilon",
}
EXACT: dict[str, Any] = {"method": "zero-shot", "privacy.record.mechanism": "none"}


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_checks.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def federation(tmp_path: Path, image_folder: Path, tiny_clip_dir: Path) -> Federation:
    return Federation(folder=tmp_path, images=image_folder, clip=tiny_clip_dir)


def counts_and_contexts(federation: Federation) -> tuple[list[Tensor], Tensor]:
    config = RunConfig.from_run_config(federation.config(SELECT))
    task = build_task(config)
    counts = [task.answered_rightly(task.client_data(p), config.prompt).sum(dim=0) for p in range(2)]
    return counts, task.candidates(config.prompt)


def prompt_of(out: Path) -> Tensor:
    return read_tensors(out / "prompts" / "global.safetensors")[0]["global"]


def client_file(out: Path, client: int, name: str) -> Path:
    return out / "clients" / f"client-{client:03d}" / name


def test_without_noise_the_candidate_with_the_most_right_answers_is_the_start(federation: Federation) -> None:
    counts, contexts = counts_and_contexts(federation)
    total = counts[0] + counts[1]
    assert len(set(total.tolist())) > 1
    out = federation.run("exact", SELECT | EXACT)
    torch.testing.assert_close(prompt_of(out), contexts[int(total.argmax())])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["privacy"] == []
    assert "no differential privacy" in summary["notes"]


def test_without_noise_each_client_takes_its_own_best(federation: Federation) -> None:
    counts, contexts = counts_and_contexts(federation)
    out = federation.run("exact", SELECT | EXACT | {"prompt.select": "client"})
    for client, own in enumerate(counts):
        personal = read_tensors(client_file(out, client, "prompt.safetensors"))[0]["personal"]
        best = contexts[own.tolist().index(max(own.tolist()))]
        torch.testing.assert_close(prompt_of(out) + personal, best)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["accuracy"]["final"]["local"] is not None


@pytest.mark.parametrize("form", ["federated", "client"])
@pytest.mark.parametrize("arithmetic", ["float", "integer"])
def test_a_run_states_what_the_selection_spends(federation: Federation, form: str, arithmetic: str) -> None:
    changes = SELECT | {"prompt.select": form, "privacy.arithmetic": arithmetic, "privacy.record.epsilon": 2.0}
    out = federation.run("run", changes)
    summary = json.loads((out / "summary.json").read_text())
    first, *others = summary["privacy"]
    assert (first["release"], first["releases"], first["trusts"]) == ("selected start", 1, "nobody")
    assert 0.49 <= first["epsilon"] <= 0.5  # a quarter by itself
    assert {row["release"] for row in others} >= {"global prompt", "published personal prompt"}
    assert all(1.96 <= row["epsilon"] <= 2.0 and row["releases"] == 1 + 2 * 2 for row in others)
    assert any(note.startswith("selected start, by") for note in summary["notes"])
    rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    spent = [line["epsilon"]["record_level"] for line in rounds]
    assert spent[0] == pytest.approx(first["epsilon"], abs=1e-3)  # another grid
    assert spent == sorted(spent)
    for client in range(2):
        ledger = Ledger(client_file(out, client, "ledger.jsonl")).read()
        assert len(ledger.selections()) == 1
        assert ledger.epsilon(DELTA) <= others[0]["epsilon"] + 1e-6
        assert client_file(out, client, "sent.safetensors").exists()


@pytest.mark.parametrize("form", ["federated", "client"])
def test_picking_only_is_a_rival_with_its_own_epsilon(federation: Federation, form: str) -> None:
    out = federation.run("rival", SELECT | {"method": "zero-shot", "prompt.select": form})
    summary = json.loads((out / "summary.json").read_text())
    assert {row["releases"] for row in summary["privacy"]} == {1}
    assert all(3.96 <= row["epsilon"] <= 4.0 for row in summary["privacy"])  # all of ε
    assert summary["accuracy"]["final"]["local"] is not None
    (event,) = Ledger(client_file(out, 0, "ledger.jsonl")).read().events
    assert event.is_selection
    assert event.kind == ("gaussian" if form == "federated" else "exponential")


@pytest.mark.parametrize("form", ["federated", "client"])
def test_a_run_that_was_cut_off_asks_for_no_second_selection(
    federation: Federation, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = SELECT | {"prompt.select": form}
    whole = federation.run("whole", changes)

    def cut_off(*given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Rounds, "run", cut_off)
        with pytest.raises(KeyboardInterrupt):
            federation.run("cut", changes)
    selected: list[int] = []
    release = SelectionRound._release
    monkeypatch.setattr(
        SelectionRound, "_release", lambda self, partition, terms: selected.append(1) or release(self, partition, terms)
    )
    cut = federation.run("cut", changes | {"output.resume": True})
    assert selected == []
    assert torch.equal(prompt_of(cut), prompt_of(whole))
    for client in range(2):
        assert len(Ledger(client_file(cut, client, "ledger.jsonl")).read().selections()) == 1


def test_a_server_that_died_before_its_checkpoint_gets_the_saved_votes(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = federation.run("whole", SELECT)
    keep = Rounds.keep

    def cut_off(self: Rounds, prompt: Tensor) -> None:
        if "selected-start" in self.strategy.state:
            raise KeyboardInterrupt
        keep(self, prompt)

    with monkeypatch.context() as patch:
        patch.setattr(Rounds, "keep", cut_off)
        with pytest.raises(KeyboardInterrupt):
            federation.run("cut", SELECT)
    cut = federation.run("cut", SELECT | {"output.resume": True})
    assert torch.equal(prompt_of(cut), prompt_of(whole))
    assert len(Ledger(client_file(cut, 0, "ledger.jsonl")).read().selections()) == 1


def test_a_client_that_fails_counts_as_zero_under_dp(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    release = SelectionRound._release

    def one_fails(self: SelectionRound, partition: int, terms: Any) -> Tensor:
        if partition == 1:
            raise RuntimeError("a private reason")
        return release(self, partition, terms)

    monkeypatch.setattr(SelectionRound, "_release", one_fails)
    out = federation.run("one fails", SELECT)
    votes = read_tensors(client_file(out, 0, "sent.safetensors"))[0]
    assert json.loads((out / "operator" / "totals.json").read_text())["failures"] == 1
    assert votes.keys() == {"1", "2"}  # the last two uploads: the votes are needed no more
    assert len(Ledger(client_file(out, 1, "ledger.jsonl")).read().selections()) == 1  # paid for, and not released


@pytest.mark.parametrize("form", ["federated", "client"])
def test_the_number_of_nodes_changes_nothing(federation: Federation, form: str) -> None:
    changes = SELECT | {"prompt.select": form}
    two, one = federation.run("two", changes), federation.run("one", changes | {"supernodes": 1})
    assert torch.equal(prompt_of(two), prompt_of(one))
    for client in range(2):
        states = [read_tensors(client_file(out, client, "prompt.safetensors"))[0]["personal"] for out in (two, one)]
        assert torch.equal(*states)


def test_attacks_refuse_a_selected_start(federation: Federation) -> None:
    with pytest.raises(ConfigError, match="a selected start is a release before them"):
        Attacked(RunConfig.from_run_config(federation.config(SELECT)))
