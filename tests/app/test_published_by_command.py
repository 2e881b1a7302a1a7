"""Publish and use what `fl-dualpriv run` left: its folder holds more than the folder of a run in this process.

`test_publish.py` makes its runs in this process. The command adds a file (run.json) that must not be taken for
another.
"""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from fl_dualpriv import load_prompt
from fl_dualpriv.cli import main as cli
from fl_dualpriv.publish.use import Prediction, image_files
from fl_dualpriv.run.file_kinds import without_kind
from tests.app.run_folders import APP_DIR, BOTH, CLIENT, NO_DP, TRUSTING, command, find_below, set_words, write_config
from tests.app.test_flwr_run import wait_for

ENGINES = ["local", pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.timeout(400)])]
OS_NOISE = {"privacy.randomness": "os"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_clip_dir: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("own"), tiny_clip_dir, rounds=2)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command takes the signal for itself; the tests take it back."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def call(*words: object, status: int = 0) -> Result:
    """``fl-dualpriv WORDS`` in this process: torch is loaded once."""
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert done.exit_code == status, done.output
    return done


def run(config: Path, out: str, changes: dict[str, object] | None = None, *, engine: str = "local") -> Path:
    words = set_words(
        {key: str(value).lower() if value is True else str(value) for key, value in (changes or {}).items()}
    )
    call("run", config, "--app", APP_DIR, "--engine", engine, "--out", out, *words)
    assert (Path(out) / "run.json").exists()
    assert without_kind(Path(out)) == []
    return Path(out)


def line(found: Prediction, top: int) -> str:
    shares = [f"{name} {100 * share:.1f} %" for name, share in list(found.probabilities.items())[:top]]
    return f"{found.image}: {', '.join(shares)}"


@pytest.mark.parametrize("engine", ENGINES)
def test_run_export_predict_and_python_agree(engine: str, config: Path, tiny_clip_dir: Path):
    run(config, "x", OS_NOISE, engine=engine)
    model, images = f"local-dir:{tiny_clip_dir}", config.parent / "images" / "test"
    some = [images / "cat" / "0.png", images]  # a file, and a folder of sixteen
    epsilon = {row["epsilon"] for row in json.loads(Path("x/summary.json").read_text())["privacy"]}
    for who, file in (("1", "x-client-1.safetensors"), ("global", "x-global.safetensors")):
        assert f"record level: ε = {max(epsilon):.3f}" in call("export", "x", "--client", who).stdout
        said = call("predict", file, *some, "--top", "3", "--backbone", model).stdout.splitlines()
        found = load_prompt(file, backbone=model).predict(some)
        assert len(found) == 17
        assert said == [line(prediction, 3) for prediction in found]
        assert said == [line(p, 3) for p in load_prompt(file, backbone=model).predict(image_files(some))]
    assert Path("x-client-1.safetensors").read_bytes() != Path("x-global.safetensors").read_bytes()
    Path("empty").mkdir()
    done = call("predict", "x-global.safetensors", "empty", "--backbone", model, status=1)
    assert "empty: a folder without an image" in done.stderr
    spent = json.loads(call("budget", "x", "--json").stdout)
    assert [client["runs"] for client in spent["clients"]] == [1] * 4
    assert spent["epsilon-max"] <= max(epsilon)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_seeded_run_is_published_alike_by_both_engines(config: Path):
    exported = []
    for engine in ("local", "ray"):
        run(config, engine, engine=engine)
        call("export", engine, "--client", "1", status=2)  # its noise comes from a seed
        call("export", engine, "--client", "1", "--allow-reproducible-noise", "--out", f"{engine}.safetensors")
        exported.append(Path(f"{engine}.safetensors").read_bytes())
    assert exported[0] == exported[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "personal", "shared"),
    [
        pytest.param({"supernodes": 4}, [], [], id="a-node-for-each"),
        pytest.param(TRUSTING | {"train.local-steps": 1}, [], [], id="trusts-server"),
        pytest.param(CLIENT | {"method": "promptfl"}, None, [], id="client"),
        pytest.param(BOTH, ["--level", "record"], [], id="both"),
        pytest.param(NO_DP, ["--not-private"], ["--not-private"], id="no-dp"),
        pytest.param({"privacy.arithmetic": "integer"}, [], [], id="integer"),
    ],
)
def test_every_level_is_published(
    changes: dict[str, object], personal: list[str] | None, shared: list[str], config: Path
):
    """None: there are no personal prompts."""
    run(config, "x", OS_NOISE | changes)
    clients = sorted(Path("x/clients").glob("client-*/prompt.safetensors"))
    for client in clients if personal is not None else []:
        call("export", "x", "--client", int(client.parent.name[-3:]), *(personal or []))
    call("export", "x", "--client", "global", *shared)
    if changes is not NO_DP:
        call("budget", "x")


def test_clients_that_were_never_sampled_have_released_nothing(config: Path):
    """With one client of four expected in each of two rounds, some are in neither: no ledger, and no prompt."""
    run(config, "x", BOTH | {"privacy.client.expected-cohort": 1.0, "seed": 1})
    seeded = "--allow-reproducible-noise"
    took_part = {int(file.parent.name[-3:]) for file in Path("x").glob("clients/*/ledger.jsonl")}
    assert 0 < len(took_part) < 4
    said = call("export", "x", "--client", "global", seeded).stdout
    assert "record level: ε = " in said
    assert "client level: ε = " in said
    one, other = min(took_part), min(set(range(4)) - took_part)
    call("export", "x", "--client", one, "--level", "record", seeded)
    done = call("export", "x", "--client", other, "--level", "record", seeded, status=2)
    assert "it took part in no round" in done.stderr
    # A client that did take part must have its ledger, also in a run that samples its clients.
    Path(f"x/clients/client-{one:03d}/ledger.jsonl").unlink()
    done = call("export", "x", "--client", "global", seeded, "--overwrite", status=2)
    assert "without the client's ledger it is unknown what was released" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
@pytest.mark.timeout(400)
def test_a_run_that_was_resumed_is_published(engine: str, config: Path):
    front = command(str(config), "--engine", engine, "--out", str(Path("x").absolute()), "--set", "rounds=20")
    rounds: Callable[[], bool] = lambda: len(read(Path("x/rounds.jsonl"))) > 2  # noqa: E731
    try:
        assert wait_for(rounds, 200)
    finally:
        front.kill()
        front.wait(60)
    assert find_below(front.pid, "python") == []
    call("export", "x", "--client", "1", status=2)  # it did not finish
    call("run", "--resume", "x")
    call("export", "x", "--client", "1", "--allow-reproducible-noise")
    call("budget", "x")


def read(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_run_of_questions_is_published(engine: str):
    config = APP_DIR / "simulations" / "configs" / "vqa.toml"
    run(config, "x", OS_NOISE | {"rounds": 1, "train.local-steps": 1}, engine=engine)
    image = Path("red.png")
    Image.new("RGB", (64, 64), "red").save(image)
    for who, file in (("1", "x-client-1.safetensors"), ("global", "x-global.safetensors")):
        call("export", "x", "--client", who)
        question = "what color is the shape?"
        said = call("predict", file, image, "--question", question).stdout
        (found,) = load_prompt(file).predict([image], question)
        assert said == f"{image}: {found.label}\n"
