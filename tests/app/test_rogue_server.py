"""A server that asks for more than it may get gets nothing, is told why, and leaves its attempt in the client's folder.

The same server, messages and client code on three ways to run them: the local engine, Ray, and a SuperLink with
SuperNodes that `fl-dualpriv node start` started.
"""

import importlib.util
import json
import re
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from flwr.serverapp import ServerApp

from clients.app import app as client_app
from fl_dualpriv.config.schema import app_defaults
from fl_dualpriv.flower.app_bundle import build_bundle, digest_of, read_bundle
from fl_dualpriv.flower.engine import run_flower
from fl_dualpriv.flower.local import LocalGrid
from fl_dualpriv.node.file import ENVIRONMENT
from fl_dualpriv.privacy.accounting import epsilon
from tests.app.run_folders import events_of

pytestmark = pytest.mark.timeout(400)  # a process a message, and each imports torch

ROOT = Path(__file__).parents[2]
ROGUE = Path(__file__).parent / "rogue" / "server_app.py"
DEFAULTS = app_defaults(ROOT)

STEPS, RATE, NOISE, CLIP, DELTA = 2, 0.25, 1.5, 1.0, 1e-3
# Two rounds of two steps fit, three do not: the worst terms are the run's.
EPSILON = (epsilon(RATE, NOISE, 2 * STEPS, DELTA) + epsilon(RATE, NOISE, 3 * STEPS, DELTA)) / 2
BUDGET = f"""
[budget]
epsilon = {EPSILON}
delta = {DELTA}
max-sampling-rate = {RATE}
min-noise-multiplier = {NOISE}
max-clip-norm = {CLIP}
filter = "worst-terms"
"""

NUMBERS = 4 * 32  # in one upload: n_ctx x ctx_dim
REFUSED = {
    "one step too many": "3 local steps, here at most 2",
    "less noise": "noise multiplier 1.485, here at least 1.5",
    "a larger clip norm": "clip norm 1.01, here at most 1",
    "a higher sampling rate": "sampling rate 0.2525, here at most 0.25",
    "no mechanism": "mechanism 'none', here 'gaussian'",
    "a clean sum": "an upload without noise",
    "another prompt shape": r"shape \(5, 32\)",
    "a client that is not there": "one that this node does not host",
    "a round beyond the budget": "the budget of this node's data is",
    "a new run": "the budget of this node's data is",
}
"""What is asked, and what is answered."""
ACTS = [["round 1"], [*list(REFUSED)[:8], "a replayed message"], ["round 2"], list(REFUSED)[8:]]
WEAKER = {
    "noise from a seed": ({"privacy.randomness": "seeded"}, "noise from a seed"),
    "no record level": ({"privacy.record.mechanism": "none"}, "without record-level differential privacy"),
    "a larger epsilon": (
        {"privacy.record.calibrate-to": "epsilon", "privacy.record.epsilon": 3.0},
        r"noise multiplier (0|1)\.\d+, at least 1.5",
    ),
    "a larger clip norm": ({"privacy.record.clip-norm": 2.0}, "clip norm 2, at most 1"),
    "a higher sampling rate": ({"train.sampling-rate": 0.5}, "sampling rate 0.5, at most 0.25"),
    "a clean sum": ({"privacy.record.trusts-server": True, "train.local-steps": 1}, "an upload without noise"),
}
"""Configurations of a whole run that are weaker than the owner's file, and what is answered to its first round."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the server was answered, and the folder of the client it asked: its owner's own, or one of the run's."""

    answers: dict[str, Any]
    folder: Path
    owned: bool = True

    def refusals(self) -> list[str]:
        return [line["reason"] for line in self._lines("refusals.jsonl")]

    def events(self) -> list[tuple[int, int]]:
        return [(line["server_round"], line["releases"]) for line in events_of(self.folder / "ledger.jsonl")]

    def _lines(self, name: str) -> list[dict[str, Any]]:
        file = self.folder / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run_config(images: Path, clip: Path, out: Path, acts: list[list[str]], **changes: Any) -> dict[str, Any]:
    """Of a run whose server asks ``acts`` and notes the answers in ``out``."""
    out.mkdir(parents=True)
    (out / "acts.json").write_text(json.dumps(acts))
    return DEFAULTS | {
        "rounds": 4,
        "population": 2,
        "reply-timeout": 300.0,
        "train.local-steps": STEPS,
        "train.sampling-rate": RATE,
        "privacy.record.calibrate-to": "noise-multiplier",
        "privacy.record.noise-multiplier": NOISE,
        "privacy.record.clip-norm": CLIP,
        "privacy.record.delta": DELTA,
        "data.ref": "folder",
        "data.path": str(images),
        "backbone.name": f"local-dir:{clip}",
        "resources.device": "cpu",
        "resources.feature-cache": "off",
        "output.dir": str(out),
        **changes,
    }


def rogue_app() -> ServerApp:
    spec = importlib.util.spec_from_file_location("rogue_server_app", ROGUE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.app


def play_locally(config: dict[str, Any], scratch: Path) -> Outcome:
    """One process; a node for each client, with an owner's file and folder of its own."""
    grid = LocalGrid(client_app, config["population"], config)
    for node, context in grid.contexts.items():
        file = scratch / f"node-{node}.toml"
        folders = f'state-dir = "{scratch / f"state-{node}"}"\ndata-path = "{config["data.path"]}"\n'
        file.write_text(folders + BUDGET)
        context.node_config["node-file"] = str(file)
    context = Context(run_id=grid.run_id, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    rogue_app()(grid, context)
    summary = Path(config["output.dir"]) / "summary.json"
    return Outcome(answers=json.loads(summary.read_text()), folder=scratch / "state-1")


def play_on_ray(config: dict[str, Any], scratch: Path) -> Outcome:
    """Flower's simulation; a node for each client, and one owner's file for all of them."""
    out, node_file = Path(config["output.dir"]), scratch / "node.toml"
    node_file.write_text(BUDGET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT, str(node_file))
        run_flower(
            write_app(scratch / "app", rogue=True),
            config,
            num_supernodes=config["population"],
            cpus_per_client=1,
            gpus_per_client=0.0,
            work_dir=out,
            timeout=300,
        )
    folder = out / "clients" / "client-000"
    return Outcome(answers=json.loads((out / "summary.json").read_text()), folder=folder, owned=False)


def write_app(folder: Path, *, rogue: bool) -> Path:
    """Our app, or our app with the rogue server: the code of the clients is ours, file by file."""
    for name in ("clients", "strategies", "simulations"):
        ignored = shutil.ignore_patterns("__pycache__", "benchmarks", "attacks")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    text = (ROOT / "pyproject.toml").read_text()
    # The list names files that are not here, and each pattern has to match something.
    text, removed = re.subn(r"^fab-include = .*\n", "", text, flags=re.MULTILINE)
    assert removed == 1
    if rogue:
        (folder / "rogue").mkdir()
        shutil.copy(ROGUE, folder / "rogue" / "server_app.py")
        ours = tomllib.loads(text)["tool"]["flwr"]["app"]["components"]["serverapp"]
        text = text.replace(ours, "rogue.server_app:app")
    (folder / "pyproject.toml").write_text(text)
    return folder


@pytest.fixture(scope="module", params=["local", pytest.param("ray", marks=pytest.mark.slow)])
def outcome(
    request: pytest.FixtureRequest, images: Path, tiny_clip_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    scratch = tmp_path_factory.mktemp(request.param)
    config = run_config(images, tiny_clip_dir, scratch / "out", ACTS)
    return play_locally(config, scratch) if request.param == "local" else play_on_ray(config, scratch)


@pytest.mark.parametrize("act", REFUSED)
def test_what_a_server_must_not_get_is_refused_with_a_reason_and_noted(outcome: Outcome, act: str) -> None:
    answer = outcome.answers[act]
    assert answer["numbers"] == 0
    assert re.search(REFUSED[act], answer["reason"])
    if outcome.owned or act != "a client that is not there":  # whose folder would it be?
        (noted,) = {reason for reason in outcome.refusals() if re.search(REFUSED[act], reason)}
        assert noted in answer["reason"]


def test_honest_rounds_in_between_are_answered_and_nothing_else_was_released(outcome: Outcome) -> None:
    assert [outcome.answers[act]["numbers"] for act in ("round 1", "round 2")] == [NUMBERS, NUMBERS]
    assert outcome.answers["a replayed message"] == outcome.answers["round 1"]  # bit by bit
    assert outcome.events() == [(1, STEPS), (2, STEPS)]
    assert len(outcome.refusals()) == len(REFUSED) - (not outcome.owned)
    assert len(list(outcome.folder.parent.glob("*/ledger.jsonl"))) == 1  # nobody asked the other client


@pytest.mark.parametrize("weaker", WEAKER)
def test_a_run_that_is_weaker_than_the_owners_budget_gets_nothing(
    images: Path, tiny_clip_dir: Path, tmp_path: Path, weaker: str
) -> None:
    changes, reason = WEAKER[weaker]
    config = run_config(images, tiny_clip_dir, tmp_path / "out", [["round 1"]], population=1, **changes)
    outcome = play_locally(config, tmp_path)
    answer = outcome.answers["round 1"]
    assert answer["numbers"] == 0
    assert re.search(reason, answer["reason"])
    (noted,) = outcome.refusals()
    assert noted in answer["reason"]
    assert outcome.events() == []


# --- real SuperLinks, and nodes that `fl-dualpriv node start` started -------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Site:
    """A SuperLink that sends nodes our app and runs the rogue server, and what the owner of the data keeps."""

    deployment: Any
    superlink: Any
    node: Any
    node_file: Path
    state: Path
    app: Path
    rogue: Path

    def ask(self, superlink: Any, app: Path, config: dict[str, Any]) -> None:
        """Hand ``app`` to a SuperLink whose operator has put the rogue server in place of what it will unpack."""
        bundle = read_bundle(build_bundle(app))
        unpacked = superlink.home / "apps" / f"{bundle.app_id.replace('/', '.')}.{bundle.version}.{bundle.digest[:8]}"
        if not unpacked.exists():
            shutil.copytree(self.rogue, unpacked)
        superlink.submit(app, config)

    def outcome(self, config: dict[str, Any]) -> Outcome:
        summary = Path(config["output.dir"]) / "summary.json"
        self.deployment.wait_until(summary.exists, 300)
        return Outcome(answers=json.loads(summary.read_text()), folder=self.state)


DEPLOYED_ACTS = [["round 1"], ["all of these", "a replayed message"]]


def write_node_file(scratch: Path, images: Path, app: Path) -> Path:
    """An owner's file beside the node's state: the budget above, and this app alone."""
    node_file = scratch / "node.toml"
    folders = f'state-dir = "{scratch / "state"}"\ndata-path = "{images}"\n'
    node_file.write_text(f'{folders}{BUDGET}\n[app]\nallowed = ["{digest_of(build_bundle(app))}"]\n')
    return node_file


@pytest.fixture(scope="module")
def site(deployment: Any, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    scratch = tmp_path_factory.mktemp("site")
    app, rogue = write_app(scratch / "app", rogue=False), write_app(scratch / "rogue", rogue=True)
    node_file = write_node_file(scratch, images, app)
    superlink = deployment.superlink("superlink")
    return Site(
        deployment=deployment,
        superlink=superlink,
        node=deployment.node("node", superlink, node_file),
        node_file=node_file,
        state=scratch / "state",
        app=app,
        rogue=rogue,
    )


@pytest.fixture(scope="module")
def deployed(site: Site, images: Path, tiny_clip_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One of the two rounds of the budget is answered, the rest refused."""
    out = tmp_path_factory.mktemp("deployed") / "out"
    config = run_config(images, tiny_clip_dir, out, DEPLOYED_ACTS, population=1)
    site.ask(site.superlink, site.app, config)
    return site.outcome(config)


@pytest.mark.slow
def test_a_deployed_node_answers_one_honest_round_and_refuses_the_rest(deployed: Outcome) -> None:
    answers = deployed.answers
    assert {act: answer["numbers"] for act, answer in answers.items()} == {
        "round 1": NUMBERS,
        "all of these": 0,
        "a replayed message": NUMBERS,
    }
    assert answers["a replayed message"] == answers["round 1"]
    assert any(reason in answers["all of these"]["reason"] for reason in deployed.refusals())
    for act in list(REFUSED)[:6]:
        assert re.search(REFUSED[act], answers["all of these"]["reason"])
    assert deployed.events()[0] == (1, STEPS)
    assert len(deployed.refusals()) >= 1


@pytest.mark.slow
def test_a_deployed_node_refuses_an_app_with_one_other_byte(
    site: Site, images: Path, tiny_clip_dir: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(site.app, tmp_path / "changed")
    file = changed / "clients" / "app.py"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"The ClientApp:", b"The ClientApp;", 1))
    assert sum(a != b for a, b in zip(content, file.read_bytes(), strict=True)) == 1
    before = Outcome(answers={}, folder=site.state).events()
    config = run_config(images, tiny_clip_dir, tmp_path / "out", [["round 1"]], population=1)
    site.ask(site.superlink, changed, config)
    outcome = site.outcome(config)
    digest = digest_of(build_bundle(changed))
    refusal = f"this node runs only apps that its owner allowed, and the bundle with SHA-256 {digest}"
    assert outcome.answers["round 1"]["numbers"] == 0
    assert refusal in outcome.answers["round 1"]["reason"]
    assert site.node.said(f"app refused: {refusal}")
    assert outcome.events() == before
    # Flower imports what it has unpacked, and it unpacks into a folder of this node's alone.
    (home,) = (site.deployment.root / "node" / ".fl-dualpriv" / "nodes").iterdir()
    assert home.stat().st_mode & 0o077 == 0
    assert not [path for path in home.glob("apps/*") if path.name.endswith(digest[:8])]


@pytest.mark.slow
def test_neither_a_restart_nor_a_second_server_gives_a_deployed_node_more_budget(
    site: Site, deployed: Outcome, images: Path, tiny_clip_dir: Path, tmp_path: Path
) -> None:
    """One of the two rounds of the budget is left; two servers ask two processes of the node for it at once."""
    before = deployed.events()
    assert before == [(1, STEPS)]
    site.node.stop()
    links = [site.superlink, site.deployment.superlink("superlink-2")]
    for number, link in enumerate(links):
        site.deployment.node(f"node-again-{number}", link, site.node_file)
    configs = [
        run_config(images, tiny_clip_dir, tmp_path / f"out-{number}", [["round 1"]], population=1) for number in (0, 1)
    ]
    for link, config in zip(links, configs, strict=True):
        site.ask(link, site.app, config)
    answers = [site.outcome(config).answers["round 1"] for config in configs]
    assert sorted(answer["numbers"] for answer in answers) == [0, NUMBERS]
    (refused,) = [answer["reason"] for answer in answers if not answer["numbers"]]
    assert "the budget of this node's data is" in refused
    assert deployed.events() == [*before, (1, STEPS)]
    assert deployed.refusals()[-1] in refused
