"""The whole federation in one process: a folder of images, a tiny CLIP, every method and every level."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import fl_dualpriv.client.round
from fl_dualpriv.config.methods import METHODS
from fl_dualpriv.config.schema import app_defaults
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.files import read_tensors
from fl_dualpriv.flower.local import LocalGrid, run_local
from fl_dualpriv.privacy.accounting import epsilon
from fl_dualpriv.run.file_kinds import PROGRESS, read_totals
from fl_dualpriv.server.accounting import BudgetExhausted
from fl_dualpriv.server.strategy import ClientFailure
from strategies.dpfpl import DPFPL

APP_DIR = Path(__file__).parents[2]
DEFAULTS = app_defaults(APP_DIR)
CLIENT_LEVEL: dict[str, Any] = {
    "privacy.record.mechanism": "none",
    "privacy.client.mechanism": "gaussian",
    "privacy.client.calibrate-to": "noise-multiplier",
    "privacy.client.expected-cohort": 2.0,
}
TRUSTING: dict[str, Any] = {"privacy.record.trusts-server": True, "train.local-steps": 1}
NO_DP: dict[str, Any] = {"privacy.record.mechanism": "none"}


Run = Callable[..., Path]


@pytest.fixture
def run(images: Path, tiny_clip_dir: Path, tmp_path: Path) -> Run:
    def start(changes: dict[str, Any] | None = None, name: str = "out") -> Path:
        out = tmp_path / name
        base: dict[str, Any] = {
            "rounds": 2,
            "population": 3,
            "join-timeout": 1.0,
            "train.local-steps": 2,
            "privacy.randomness": "seeded",
            "privacy.record.calibrate-to": "noise-multiplier",
            "privacy.record.delta": 1e-3,
            "evaluation.held-out-data": "public",
            "data.ref": "folder",
            "data.path": str(images),
            "backbone.name": f"local-dir:{tiny_clip_dir}",
            "resources.device": "cpu",
            "output.dir": str(out),
        }
        run_local(APP_DIR, DEFAULTS | base | (changes or {}))
        return out

    return start


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def summary(out: Path) -> dict[str, Any]:
    return strict((out / "summary.json").read_text())


def rounds(out: Path) -> list[dict[str, Any]]:
    """Lines of the rounds that train; a scored run has one of round 0 before them: zero-shot."""
    lines = [strict(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    return [line for line in lines if line["round"] > 0]


def global_prompt(out: Path) -> Tensor:
    return read_tensors(out / "prompts" / "global.safetensors")[0]["global"]


def personal_prompts(out: Path) -> list[Tensor]:
    return [read_tensors(p)[0]["personal"] for p in sorted((out / "clients").glob("*/prompt.safetensors"))]


def ledger(path: Path) -> list[dict[str, Any]]:
    """Events only; a ledger with a limit has a header before them."""
    return [event for line in path.read_text().splitlines() if "header" not in (event := strict(line))]


# --- every method and level -------------------------------------------------------------------------------------------


def check_files(out: Path, method: str) -> dict[str, Any]:
    found = summary(out)
    assert (found["method"], found["engine"], found["rounds"], found["population"]) == (method, "local", 2, 3)
    assert read_totals(out)["failures"] == 0
    assert found["config"]["method"] == method
    trains = METHODS[method].trains
    assert [line["round"] for line in rounds(out)] == ([1, 2] if trains else [])
    assert bool(torch.isfinite(global_prompt(out)).all())
    assert Image.open(out / "curve.png").format == "PNG"
    assert not (out / "error.json").exists()
    for when, entry in found["accuracy"].items():
        scores = {name: value for name, value in entry.items() if name != "rival"}
        assert scores.pop("new_client") is None  # no client is held out
        assert (scores["general"] is None) == (when == "final" and method == "local-only")
        assert all(0 <= value <= 1 for value in scores.values() if value is not None)
        assert all(scores[kind] is not None for kind in ("local", "neighbour", "harmonic_mean"))
    return found


@pytest.mark.parametrize("level", ["record", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(run: Run, method: str, level: str):
    out = run({"method": method} | (NO_DP if level == "none" else {}))
    found = check_files(out, method)
    parts = METHODS[method]
    private = level == "record" and parts.trains
    assert {r["guarantee"] for r in found["privacy"]} == (
        set() if not private else {"nominal"} if parts.published_procedure else {"theorem"}
    )
    names = [r["release"] for r in found["privacy"]]
    assert ("published personal prompt" in names) == (private and parts.personal)
    if private and not parts.published_procedure:
        # three clients, two rounds, two steps; every round of every client stands in its own ledger
        ledgers = [ledger(path) for path in sorted((out / "clients").glob("*/ledger.jsonl"))]
        assert [[(e["server_round"], e["releases"]) for e in events] for events in ledgers] == [[(1, 2), (2, 2)]] * 3
        assert all(r["releases"] == 4 for r in found["privacy"])
        # the rounds count up to the ε of the table; they use a coarser grid, which may only be larger
        spent = [line["epsilon"]["record_level"] for line in rounds(out)]
        assert 0 < spent[0] < spent[1]
        assert found["privacy"][0]["epsilon"] <= spent[1] <= found["privacy"][0]["epsilon"] * 1.05
    else:
        assert list(out.glob("**/ledger.jsonl")) == []


@pytest.mark.parametrize("method", ["dpfpl", "promptfl", "full", "lowrank"])
def test_client_level(run: Run, method: str):
    out = run({"method": method} | CLIENT_LEVEL)
    found = check_files(out, method)
    assert {(r["unit"], r["releases"]) for r in found["privacy"]} == {("client", 2)}
    assert "client upload" not in [r["release"] for r in found["privacy"]]  # the server sees it in the clear
    assert "published personal prompt" not in [r["release"] for r in found["privacy"]]
    assert [(e["unit"], e["server_round"]) for e in ledger(out / "ledger.jsonl")] == [("client", 1), ("client", 2)]
    assert {e["sampling_rate"] for e in ledger(out / "ledger.jsonl")} == {2 / 3}


def test_both_levels(run: Run):
    out = run(CLIENT_LEVEL | {"privacy.record.mechanism": "gaussian"})
    found = check_files(out, "dpfpl")
    assert {r["unit"] for r in found["privacy"]} == {"record", "client"}
    # scores are of personal prompts, which the client level does not cover
    assert [r["unit"] for r in found["privacy"] if r["release"] == "reported metrics"] == ["record"]


@pytest.mark.parametrize("method", ["dpfpl", "promptfl"])
def test_trusted_server(run: Run, method: str):
    out = run({"method": method} | TRUSTING)
    found = check_files(out, method)
    assert {r["trusts"] for r in found["privacy"]} == {"server"}
    assert "client upload" not in [r["release"] for r in found["privacy"]]
    # one joint event a round, of the plan's multiplier: 1.0
    events = ledger(out / "ledger.jsonl")
    assert [(e["unit"], e["server_round"]) for e in events] == [("record", 1), ("record", 2)]
    assert [e["noise_multiplier"] for e in events] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("partition", ["iid", "by-class", "dirichlet"])
@pytest.mark.parametrize("population", [2, 4])
def test_every_partition(run: Run, partition: str, population: int):
    out = run({"data.partition": partition, "population": population, "data.dirichlet-alpha": 1.0})
    assert read_totals(out)["failures"] == 0
    assert len(personal_prompts(out)) == population


def test_every_method_starts_from_the_same_zero_shot(run: Run):
    found = [summary(run({"method": m}, name=m))["accuracy"]["zero_shot"] for m in ("zero-shot", "dpfpl", "promptfl")]
    assert found[0] == found[1] == found[2]
    assert found[0]["local"] is not None


def test_the_free_rival_knows_each_clients_class_list_and_costs_nothing(run: Run):
    accuracy = summary(run())["accuracy"]
    assert accuracy["free"]["rival"] == "un-tuned, own class list"
    assert accuracy["free"]["local"] >= accuracy["zero_shot"]["local"]  # no right answer is lost
    assert accuracy["free"]["neighbour"] == accuracy["zero_shot"]["neighbour"]
    alone = summary(run({"data.partition": "iid"}, name="iid"))["accuracy"]  # each client holds every class
    assert alone["free"] == alone["zero_shot"] | {"rival": "un-tuned"}


def test_round_zero_is_the_zero_shot_score_and_costs_nothing(run: Run):
    out = run()
    first = strict((out / "rounds.jsonl").read_text().splitlines()[0])
    assert first["round"] == 0
    found = dict(summary(out)["accuracy"]["zero_shot"])
    assert {name: found[name] for name in first["accuracy"]} == first["accuracy"]
    assert first["accuracy"].keys() == {"local", "neighbour"}
    assert first["epsilon"] == {"record_level": 0.0, "client_level": None}


def test_zero_shot_sends_no_train_message(run: Run, asked: Counter[str]):
    run({"method": "zero-shot"})
    assert asked == {"query": 3, "evaluate": 6}  # the un-tuned model, and the free rival


@pytest.mark.parametrize("changes", [{}, TRUSTING, CLIENT_LEVEL], ids=["record", "trusting", "client"])
def test_seeded_runs_repeat_bitwise_and_say_so(run: Run, changes: dict[str, Any]):
    one, two = run(changes, "one"), run(changes, "two")
    assert torch.equal(global_prompt(one), global_prompt(two))
    assert all(torch.equal(a, b) for a, b in zip(personal_prompts(one), personal_prompts(two), strict=True))
    assert any("do not publish" in note for note in summary(one)["notes"])
    assert not torch.equal(global_prompt(one), global_prompt(run(changes | {"seed": 1}, "three")))


def test_secret_runs_do_not_repeat(run: Run):
    one, two = (run({"privacy.randomness": "os"}, name) for name in ("one", "two"))
    assert not torch.equal(global_prompt(one), global_prompt(two))
    assert not any("do not publish" in note for note in summary(one)["notes"])


# --- failures ---------------------------------------------------------------------------------------------------------


def break_client(monkeypatch: pytest.MonkeyPatch, upload: Tensor | None, partition: int = 1) -> None:
    """Make one client raise, or upload something of its own; every client has a node of its own."""
    original = fl_dualpriv.client.round.cohort_update

    def broken(**arguments: Any) -> Any:
        (participant,) = arguments["participants"]
        if participant.partition != partition:
            return original(**arguments)
        if upload is None:
            raise RuntimeError("boom")
        return [(upload, participant.state)]

    monkeypatch.setattr(fl_dualpriv.client.round, "cohort_update", broken)


@pytest.mark.parametrize("changes", [{}, TRUSTING], ids=["record", "trusting"])
def test_a_failing_client_is_a_counted_zero_under_dp(
    run: Run, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
):
    with monkeypatch.context() as patch:
        break_client(patch, None)
        failing = run(changes, "failing")
    with monkeypatch.context() as patch:
        break_client(patch, torch.full((4, 32), math.nan))
        nan = run(changes, "nan")
    with monkeypatch.context() as patch:
        break_client(patch, torch.zeros(4, 32))
        zero = run(changes, "zero")
    assert torch.equal(global_prompt(failing), global_prompt(zero))
    assert torch.equal(global_prompt(nan), global_prompt(zero))
    assert [read_totals(out)["failures"] for out in (failing, nan, zero)] == [2, 0, 0]  # a crash: one a round
    assert [line["failures"] for line in ledger(failing / PROGRESS)] == [0, 1, 1]


def test_a_client_that_cannot_write_its_ledger_releases_nothing(run: Run, tmp_path: Path):
    state = tmp_path / "out" / "clients" / "client-001"
    state.parent.mkdir(parents=True)
    state.write_text("in the way")
    out = run()
    # two train calls and two scores of a personal prompt that nobody can read
    assert read_totals(out)["failures"] >= 2
    assert len(personal_prompts(out)) == 2


@pytest.mark.parametrize("changes", [NO_DP, NO_DP | {"method": "promptfl"}], ids=["dpfpl", "promptfl"])
def test_without_dp_a_failing_client_ends_the_run(run: Run, tmp_path: Path, monkeypatch: Any, changes: dict[str, Any]):
    break_client(monkeypatch, None)
    with pytest.raises(ClientFailure, match=r"^client 1 failed in round 1: RuntimeError: boom$"):
        run(changes)
    error = strict((tmp_path / "out" / "error.json").read_text())
    assert error["type"] == "ClientFailure"
    assert "boom" in error["message"]
    assert not (tmp_path / "out" / "summary.json").exists()


def test_all_clients_failing_is_a_failure_at_the_end(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def boom(**arguments: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(fl_dualpriv.client.round, "cohort_update", boom)
    with pytest.raises(ClientFailure, match=r"all 6 calls of clients failed.*RuntimeError; its message is in the log"):
        run()
    assert (tmp_path / "out" / "error.json").exists()
    assert not (tmp_path / "out" / "summary.json").exists()


class Raising(DPFPL):
    """A server that breaks in its second round."""

    def server_update(self, prompt: Tensor, diff: Tensor) -> Tensor:
        if self.state:
            raise RuntimeError("server broke")
        self.state["seen"] = diff
        return prompt + diff


def test_a_server_that_raises_leaves_its_error(run: Run, tmp_path: Path):
    with pytest.raises(RuntimeError, match="server broke"):
        run({"strategy.ref": f"{__name__}:Raising"})
    error = strict((tmp_path / "out" / "error.json").read_text())
    assert (error["type"], error["message"]) == ("RuntimeError", "server broke")
    assert [line["round"] for line in rounds(tmp_path / "out")] == [1]
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_kept(run: Run):
    out = run()
    before = (out / "rounds.jsonl").read_bytes(), (out / "summary.json").read_bytes()
    with pytest.raises(ConfigError, match="holds an earlier run"):
        run()
    assert ((out / "rounds.jsonl").read_bytes(), (out / "summary.json").read_bytes()) == before


def test_a_run_after_one_that_never_started_forgets_its_error(run: Run):
    with pytest.raises(ConfigError):
        run({"data.path": "/no/such/images"})
    assert not (run() / "error.json").exists()


def test_empty_cohorts_are_not_failures(run: Run):
    # expected cohort 1e-6 of 3: nobody is ever asked, and the noised prompt is a valid release
    assert read_totals(run(CLIENT_LEVEL | {"privacy.client.expected-cohort": 1e-6}))["failures"] == 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data.path": "/no/such/images"}, ConfigError, "/no/such/images.* does not exist"),
        ({"strategy.ref": "strategies.dpfpl:Missing"}, ConfigError, "Missing"),
        ({"population": 100}, ConfigError, "there are only 56 training images"),
        ({"privacy.record.delta": 0.5}, PrivacyError, "delta = 0.5"),
        ({"privacy.record.epsilon": -1.0}, ConfigError, "privacy.record.epsilon = -1.0"),
        ({"train.sampling-rte": 0.1}, ConfigError, "did you mean train.sampling-rate"),
    ],
    ids=["no images", "no strategy", "many clients", "delta", "epsilon", "unknown key"],
)
def test_bad_input_ends_before_any_message(
    run: Run, tmp_path: Path, asked: Counter[str], changes: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        run(changes)
    assert asked["train"] == asked["evaluate"] == 0
    assert (tmp_path / "out" / "error.json").exists()


@pytest.mark.parametrize("nodes", [2, 4])
def test_another_number_of_nodes_is_an_error_that_quotes_the_flag(
    run: Run, asked: Counter[str], monkeypatch: pytest.MonkeyPatch, nodes: int
):
    monkeypatch.setattr(LocalGrid, "get_node_ids", lambda self: list(range(1, nodes + 1)))
    with pytest.raises(ConfigError, match=f"population = 3, but {nodes} nodes joined .*num-supernodes=3"):
        run({"join-timeout": 0.3})
    assert asked["train"] == 0


@pytest.mark.parametrize("level", [{}, TRUSTING, CLIENT_LEVEL], ids=["record", "trusting", "client"])
def test_private_held_out_data_is_never_scored_under_dp(run: Run, asked: Counter[str], level: dict[str, Any]):
    out = run(level | {"evaluation.held-out-data": "private"})
    assert asked["evaluate"] == 0
    found = summary(out)
    assert "reported metrics" not in [r["release"] for r in found["privacy"]]
    assert all(scores[kind] is None for scores in found["accuracy"].values() for kind in ("local", "neighbour"))
    assert all(line["accuracy"] is None for line in rounds(out))
    assert any("no scores" in note for note in found["notes"])


def test_what_the_server_writes_holds_no_personal_prompt(run: Run):
    out = run()
    assert set(read_tensors(out / "prompts" / "global.safetensors")[0]) == {"global"}
    server_side = {p.name for p in out.iterdir()} - {"clients"}
    assert server_side == {"run.lock", "summary.json", "rounds.jsonl", "prompts", "curve.png", "actors", "operator"}


def test_a_run_stops_before_the_round_that_would_exceed_the_budget_and_keeps_what_is_paid(run: Run):
    """Five rounds at q = 2/3, z = 1; the limit is set between the ε of two and of three rounds."""
    limit = (epsilon(2 / 3, 1.0, 2, 1e-3) + epsilon(2 / 3, 1.0, 3, 1e-3)) / 2
    changes = CLIENT_LEVEL | {"rounds": 5, "privacy.client.max-epsilon": limit}
    out = run(changes)
    found = summary(out)
    assert found["rounds"] == 2
    assert [line["round"] for line in rounds(out)] == [1, 2]
    assert any(note.startswith("ended early: round 3 would bring client-level ε") for note in found["notes"])
    assert {(row["releases"], row["epsilon"]) for row in found["privacy"]} == {(2, epsilon(2 / 3, 1.0, 2, 1e-3))}
    assert len(ledger(out / "ledger.jsonl")) == 2
    assert global_prompt(out).isfinite().all()


def test_a_budget_for_no_round_at_all_is_an_error_before_anybody_trains(run: Run, asked: Counter[str]):
    with pytest.raises(BudgetExhausted, match="round 1 would bring"):
        run(CLIENT_LEVEL | {"privacy.client.max-epsilon": 0.01})
    assert asked["train"] == 0
