"""Runs, exported and used: a published prompt scores what its run reported, exactly; and what is refused on the way."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from fl_dualpriv import load_prompt
from fl_dualpriv.cli import main as cli
from fl_dualpriv.config.methods import METHODS
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.files import read_tensors, write_tensors
from fl_dualpriv.flower.local import run_local
from fl_dualpriv.methods.shrinkage import shrink_by_norm
from fl_dualpriv.privacy.accounting import epsilon
from fl_dualpriv.privacy.ledger import Ledger
from fl_dualpriv.publish.collect import read_material
from fl_dualpriv.publish.file import card_path, write_published
from fl_dualpriv.publish.rules import publish
from fl_dualpriv.run.file_kinds import TOTALS
from tests.app.published_runs import APP_DIR, CLIENTS, exported, scores, settings_for

PRUNED = {"pruning.visual-keep-ratio": 0.5, "pruning.visual-fused": 2, "pruning.visual-merge": "average"}
RUNS: dict[str, dict[str, Any]] = {
    "dpfpl": PRUNED,
    "plain": {"population": 2},
    "collective": {"prompt.personalisation": "collective", "privacy.record.mechanism": "none"},
    "shrunk": {"prompt.personalisation": "scalar", "prompt.personal-memory": 0.9},
    "promptfl": {"method": "promptfl"},
    "head": {"prompt.learner": "head", "method": "promptfl"},
    "linear-probe": {"method": "linear-probe"},
    "prototypes": {"method": "prototypes", "prompt.init": "zeros"},
    "client-level": {
        "method": "promptfl",
        "privacy.record.mechanism": "none",
        "privacy.client.mechanism": "gaussian",
        "privacy.client.calibrate-to": "noise-multiplier",
        "privacy.client.expected-cohort": 2.0,
    },
    "trusting": {"method": "promptfl", "privacy.record.trusts-server": True},
    "open": {"privacy.record.mechanism": "none"},
}
OPEN = ("open", "collective")


@pytest.fixture(scope="module")
def settings(images: Path, tiny_clip_dir: Path) -> dict[str, Any]:
    return settings_for(images, tiny_clip_dir)


@pytest.fixture(scope="module")
def runs(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root, made = tmp_path_factory.mktemp("runs"), set[str]()

    def get(name: str) -> Path:
        if name not in made:
            run_local(APP_DIR, settings | RUNS[name] | {"output.dir": str(root / name)})
            made.add(name)
        return root / name

    return get


@pytest.fixture
def dpfpl(runs: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a run, to be spoilt."""
    return Path(shutil.copytree(runs("dpfpl"), tmp_path / "run"))


def slow_but(*names: str) -> list[Any]:
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]


@pytest.mark.parametrize("name", slow_but("dpfpl", "shrunk", "collective", "promptfl"))
def test_published_prompts_score_what_the_run_reports(
    name: str, runs: Callable[[str], Path], tiny_clip_dir: Path, tmp_path: Path
):
    """Of personal prompts the mean over clients, each with its own; of a global prompt every client uses the one."""
    run = runs(name)
    summary = json.loads((run / "summary.json").read_text())
    options = {"not_private": True} if name in OPEN else {}
    clients = range(summary["population"])
    if not METHODS[summary["method"]].personal:
        prompts = [exported(run, None, tmp_path / "g.safetensors", tiny_clip_dir, **options)] * len(clients)
    else:
        prompts = [exported(run, i, tmp_path / f"{i}.safetensors", tiny_clip_dir, **options) for i in clients]
    final = summary["accuracy"]["final"]
    assert scores(prompts, summary) == (final["local"], final["neighbour"])
    source = prompts[0].facts.source
    assert source.scores is not None
    assert (source.scores.local, source.scores.neighbour) == (final["local"], final["neighbour"])
    plan = [row["epsilon"] for row in summary["privacy"] if "prompt" in row["release"]]
    assert [g.epsilon for g in prompts[0].facts.guarantees] == ([] if name in OPEN else [max(plan)])
    if name not in (*OPEN, "client-level"):
        # two rounds of one step at q = 0.15, z = 1: what the client's ledger says, too
        ledger = Ledger(run / "clients" / "client-000" / "ledger.jsonl").read()
        assert ledger.epsilon(1e-3) == plan[0] == epsilon(0.15, 1.0, 2, 1e-3)


def test_a_noise_aware_prompt_is_published_less_the_mean_of_its_last_round(runs: Callable[[str], Path]):
    """D less (η_L/η_G)·(p_G at the end − p_G before the last round), then shrunk. A round has one step, so w = 1."""
    run = runs("shrunk")
    p_g = read_tensors(run / "prompts" / "global.safetensors")[0]["global"]
    kept = read_tensors(run / "clients" / "client-000" / "prompt.safetensors")[0]
    deviation = kept["personal.deviation"] - (p_g - kept["global"])  # the rates are alike
    expected = shrink_by_norm(deviation, kept["personal.noise"])
    found = read_material(run, 0).prompt - p_g
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(found, kept["personal"], atol=1e-3)


@pytest.mark.slow
def test_other_prompts_score_otherwise(runs: Callable[[str], Path], tiny_clip_dir: Path, tmp_path: Path):
    """The equality above is no accident of prompts that all say the same: exchanging them shows."""
    run = runs("open")
    summary = json.loads((run / "summary.json").read_text())
    told = [
        tuple(p.probabilities.items())
        for i in range(CLIENTS)
        for p in exported(run, i, tmp_path / f"{i}.safetensors", tiny_clip_dir, not_private=True).predict(
            [next(iter(sorted(Path(summary["config"]["data.path"]).glob("*/*.png"))))]
        )
    ]
    assert len(set(told)) == CLIENTS


def test_the_global_prompt_of_a_run_that_scored_personal_ones_has_no_accuracy(dpfpl: Path):
    facts = publish(dpfpl, None).facts
    assert facts.source.scores is None
    assert any("personal prompts, not of this one" in note for note in facts.notes)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dp-lora", "ffa-lora", "fedpgp"])
def test_what_amounts_to_words_scores_as_the_run_said(
    method: str, settings: dict[str, Any], tiny_clip_dir: Path, tmp_path: Path
):
    run = tmp_path / "run"
    run_local(APP_DIR, settings | {"method": method, "output.dir": str(run)})
    owners = range(CLIENTS) if method == "fedpgp" else [None] * CLIENTS  # factors are global alone: the same for all
    prompts = [exported(run, who, tmp_path / f"{i}.safetensors", tiny_clip_dir) for i, who in enumerate(owners)]
    summary = json.loads((run / "summary.json").read_text())
    assert scores(prompts, summary) == tuple(summary["accuracy"]["final"][k] for k in ("local", "neighbour"))


def test_a_pair_that_reads_patches_is_refused(settings: dict[str, Any], tmp_path: Path):
    run_local(APP_DIR, settings | {"method": "fedotp", "output.dir": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match="a prompt of a run of fedotp cannot be used without the run"):
        publish(tmp_path / "run", 0)


# --- what is refused at export ----------------------------------------------------------------------------------------


def remove_summary(run: Path) -> None:
    (run / "summary.json").unlink()


def leave_error(run: Path) -> None:
    (run / "error.json").write_text("{}")


def damage_summary(run: Path) -> None:
    (run / "summary.json").write_text('{"method": "dpfpl"}')


def drop_table(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"privacy": []}))


def drop_ledger(run: Path) -> None:
    (run / "clients" / "client-001" / "ledger.jsonl").unlink()


def drop_ledger_beside_a_failure(run: Path) -> None:
    """Some call of some client failed: that explains no ledger of a client which has answered."""
    totals = json.loads((run / TOTALS).read_text())
    (run / TOTALS).write_text(json.dumps(totals | {"failures": 1}))
    drop_ledger(run)


def empty_ledgers(run: Path) -> None:
    for file in run.glob("clients/*/ledger.jsonl"):
        file.write_text("")


def mix_runs(run: Path) -> None:
    file = run / "clients" / "client-001" / "prompt.safetensors"
    tensors, metadata = read_tensors(file)
    write_tensors(file, tensors, metadata | {"run-token": "another"})


def drop_prompt(run: Path) -> None:
    (run / "clients" / "client-001" / "prompt.safetensors").unlink()


def forget_use(run: Path) -> None:
    file = run / "prompts" / "global.safetensors"
    tensors, metadata = read_tensors(file)
    write_tensors(file, tensors, {name: text for name, text in metadata.items() if name != "use"})


def reseed(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"randomness": "seeded"}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_summary, "did not finish"),
        (leave_error, "did not finish"),
        (damage_summary, "damaged or of another version"),
        (drop_table, "no guarantee: the run was made without"),
        (drop_ledger, "client-001/ledger.jsonl does not exist"),
        (drop_ledger_beside_a_failure, "client-001/ledger.jsonl does not exist"),
        (empty_ledgers, "no line of this run"),
        (mix_runs, "belongs to another run"),
        (drop_prompt, "kept no personal prompt"),
        (forget_use, "does not say how to use the prompt"),
        (reseed, "comes from a seed"),
    ],
)
def test_what_is_not_whole_is_not_published(dpfpl: Path, spoil: Callable[[Path], None], message: str):
    publish(dpfpl, 1)  # as it is, it can be
    spoil(dpfpl)
    with pytest.raises((ConfigError, PrivacyError), match=message):
        publish(dpfpl, 1)


def test_who_is_not_there_is_not_published(dpfpl: Path, runs: Callable[[str], Path], tmp_path: Path):
    with pytest.raises(ConfigError, match="clients 0 to 2"):
        publish(dpfpl, 3)
    with pytest.raises(ConfigError, match="no personal prompts"):
        publish(runs("promptfl"), 0)
    with pytest.raises(ConfigError, match="neither a run's folder nor a node's"):
        publish(tmp_path, 0)


@pytest.mark.slow
def test_a_ledger_that_holds_more_than_the_plan_is_what_counts(dpfpl: Path):
    file = dpfpl / "clients" / "client-002" / "ledger.jsonl"
    file.write_text(file.read_text() * 3)  # six releases instead of two, of a client whose prompt is not even asked for
    (guarantee,) = publish(dpfpl, 1).facts.guarantees
    assert guarantee.epsilon == epsilon(0.15, 1.0, 6, 1e-3)
    assert guarantee.releases == 6


def test_a_seeded_run_is_published_as_a_demonstration_alone(dpfpl: Path):
    reseed(dpfpl)
    facts = publish(dpfpl, 1, allow_reproducible_noise=True).facts
    assert facts.is_reproducible
    assert any("anyone who knows the seed" in note for note in facts.notes)


# --- the model --------------------------------------------------------------------------------------------------------


def test_another_model_is_refused(dpfpl: Path, make_clip_dir: Callable[..., Path], tiny_clip_dir: Path, tmp_path: Path):
    file = tmp_path / "p.safetensors"
    write_published(file, publish(dpfpl, 1))
    with pytest.raises(ConfigError, match="give your copy with backbone"):  # its folder is not in the file
        load_prompt(file)
    assert str(tiny_clip_dir).encode() not in file.read_bytes() + card_path(file).read_bytes()
    other = make_clip_dir({"text_cfg": {"layers": 1}})
    with pytest.raises(ConfigError, match=r"the backbone differs: the prompt is for .* with weights"):
        load_prompt(file, backbone=f"local-dir:{other}")
    with pytest.raises(ConfigError, match="the backbone differs"):  # nor is it published for another one
        publish(dpfpl, 1, backbone=(f"local-dir:{other}", ""))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"quick_gelu": True}, id="activation"),
        pytest.param({"text_cfg": {"heads": 4}}, id="text-heads", marks=pytest.mark.slow),
        pytest.param({"vision_cfg": {"head_width": 8}}, id="image-heads", marks=pytest.mark.slow),
    ],
)
def test_the_same_weights_in_another_model_are_refused(
    dpfpl: Path, tiny_clip_dir: Path, tmp_path: Path, changes: dict[str, Any]
):
    """No weight shows the activation or the number of heads: what becomes of a known image does."""
    file, other = tmp_path / "p.safetensors", Path(shutil.copytree(tiny_clip_dir, tmp_path / "other"))
    write_published(file, publish(dpfpl, 1))
    described = json.loads((other / "open_clip_config.json").read_text())
    for key, value in changes.items():
        own = described["model_cfg"].get(key)
        described["model_cfg"][key] = own | value if isinstance(own, dict) else value
    (other / "open_clip_config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="its output for a known image differs"):
        load_prompt(file, backbone=f"local-dir:{other}")


def test_other_preparation_of_images_is_refused(dpfpl: Path, tiny_clip_dir: Path, tmp_path: Path):
    file, other = tmp_path / "p.safetensors", Path(shutil.copytree(tiny_clip_dir, tmp_path / "other"))
    write_published(file, publish(dpfpl, 1))
    described = json.loads((other / "open_clip_config.json").read_text())
    described["preprocess_cfg"] = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (other / "open_clip_config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="its output for a known image differs"):
        load_prompt(file, backbone=f"local-dir:{other}")


# --- the commands -----------------------------------------------------------------------------------------------------


def call(*words: object) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def test_export_and_predict(dpfpl: Path, images: Path, tiny_clip_dir: Path, tmp_path: Path):
    file = tmp_path / "p.safetensors"
    done = call("export", dpfpl, "--client", "1", "--out", file)
    assert done.exit_code == 0, done.output
    assert "record level: ε = " in done.stdout
    first = file.read_bytes(), card_path(file).read_bytes()
    assert call("export", dpfpl, "--client", "1", "--out", file).exit_code == 2  # it is there already
    assert call("export", dpfpl, "--client", "1", "--out", file, "--overwrite").exit_code == 0
    assert (file.read_bytes(), card_path(file).read_bytes()) == first

    (tmp_path / "bad.png").write_bytes(b"no image")
    some = [images / "cat" / "00.png", tmp_path / "bad.png", tmp_path / "none.png", images / "dog" / "01.png"]
    model = ["--backbone", f"local-dir:{tiny_clip_dir}"]
    done = call("predict", file, *some, *model)
    assert done.exit_code == 1  # two cannot be used, and the others are answered
    assert [line.partition(": ")[0] for line in done.stdout.splitlines()] == [str(some[0]), str(some[3])]
    assert all(text in done.stderr for text in ("ε = ", "bad.png: cannot identify", "none.png: "))
    done = call("predict", file, *some, *model, "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [sorted(line) for line in lines] == [
        ["image", "label", "probabilities"],
        ["error", "image"],
        ["error", "image"],
        ["image", "label", "probabilities"],
    ]
    shares = list(lines[0]["probabilities"].values())
    assert len(shares) == 4
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert call("predict", file, some[0], *model).exit_code == 0
    assert len(json.loads(call("predict", file, some[0], *model, "--json", "--top", 2).stdout)["probabilities"]) == 2
    assert call("predict", file, some[0], *model, "--question", "what is it").exit_code == 2
    assert call("predict", dpfpl / "prompts" / "global.safetensors", some[0], *model).exit_code == 2
    file.write_bytes(first[0][:-1])
    done = call("predict", file, some[0], *model)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "damaged or cut off" in done.stderr


@pytest.mark.parametrize("who", ["-1", "x", "٣", "", "99999999999999999999"])
def test_a_client_is_a_number(dpfpl: Path, who: str):
    assert call("export", dpfpl, f"--client={who}").exit_code == 2
