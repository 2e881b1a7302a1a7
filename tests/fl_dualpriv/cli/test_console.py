"""Commands print on outputs that have no ε: ASCII, Latin-1, the code pages of old terminals."""

import ast
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fl_dualpriv.cli import job as run_job
from fl_dualpriv.cli import main as cli
from fl_dualpriv.cli import run as run_command
from fl_dualpriv.cli.console import ERRORS, WORDS, Output, spell_out_what_cannot_be_shown, spelled, write_line
from fl_dualpriv.node import device as node_device
from fl_dualpriv.node.health import HealthLine, Pulse
from fl_dualpriv.privacy.ledger import Ledger, LedgerEvent
from tests.fl_dualpriv.cli.test_run import SUMMARY, good_engine

ROOT = Path(__file__).parents[3]
ENCODINGS = ["ascii", "latin-1", "cp1252", "cp437", "utf-8"]
Call = Callable[..., tuple[int, str]]


@pytest.fixture(params=ENCODINGS)
def encoding(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def call(encoding: str, monkeypatch: pytest.MonkeyPatch) -> Call:
    """The command with both outputs in an encoding, strict as Python's are; gives status and what was written."""

    def start(*words: str) -> tuple[int, str]:
        written = io.BytesIO()
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(written, encoding=encoding, write_through=True))
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["fl-dualpriv", *words])
        with pytest.raises(SystemExit) as ended:
            cli.app()
        status = ended.value.code
        assert isinstance(status, int), status
        return status, written.getvalue().decode(encoding)

    return start


def has(text: str, letter: str, encoding: str) -> None:
    """The letter where the encoding has it, else its word."""
    try:
        letter.encode(encoding)
    except UnicodeEncodeError:
        assert letter not in text
        assert WORDS[letter] in text
    else:
        assert letter in text


def columns(text: str, *starts: str) -> set[int]:
    """Widths of the table's lines that hold these words."""
    return {len(line.rstrip()) for start in starts for line in text.splitlines() if start in line}


def test_a_run(call: Call, encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def engine(chosen: run_job.Engine, job: run_job.Job) -> None:
        good_engine(chosen, job)
        grouped = {
            kind: SUMMARY["accuracy"][kind] | {"by_group": [0.25, 0.5]} for kind in ("zero_shot", "free", "final")
        }
        more = {"accuracy": grouped, "groups": ["Straße", "猫"], "notes": ["ε is nominal ± 1 …"]}
        (job.out / "summary.json").write_text(json.dumps(SUMMARY | more))

    monkeypatch.setattr(run_command, "run_engine", engine)
    monkeypatch.setattr(run_command.signal, "signal", lambda *_: None)
    (tmp_path / "quick.toml").write_text("rounds = 2\n")
    out = tmp_path / "folder with ε"
    status, text = call("run", str(tmp_path / "quick.toml"), "--app", str(ROOT), "--out", str(out))
    assert status == 0, text
    for letter in "ε±…·→δ":
        has(text, letter, encoding)
    assert ("猫" if encoding == "utf-8" else "\\u732b") in text
    if encoding != "utf-8":  # with frames of plain letters every line of a table is as wide as its head
        assert len(columns(text, "| release ", "| client upload")) == 1


def test_errors_and_help(call: Call, encoding: str, tmp_path: Path) -> None:
    status, text = call("run", str(tmp_path / "δ.toml"), "--app", str(ROOT))
    assert status == 2
    has(text, "δ", encoding)
    has(call("audit", "--help")[1], "ε", encoding)
    for words in (["--help"], ["run", "--help"], ["budget", "--help"], ["node", "--help"], ["node", "check", "--help"]):
        assert call(*words)[0] == 0
    for words in (["export", "--help"], ["predict", "--help"], ["node", "start", "--help"], ["env", "--help"]):
        assert call(*words)[0] == 0


NODE = """state-dir = "{0}/state"
data-path = "{0}/images ε"
[budget]
epsilon = 8.0
delta = 1e-5
max-sampling-rate = 0.2
min-noise-multiplier = 0.8
max-clip-norm = 1.0
[app]
allowed = ["{1}"]
"""


def test_budgets_and_checks_of_nodes(call: Call, encoding: str, tmp_path: Path) -> None:
    event = LedgerEvent(run="a", unit="record", server_round=1, releases=2, sampling_rate=0.1, noise_multiplier=1.5)
    (tmp_path / "state").mkdir(mode=0o700)
    file = tmp_path / "node.toml"
    file.write_text(NODE.format(tmp_path, "0a" * 32), encoding="utf-8")
    status, text = call("budget", str(file))
    assert status == 0, text
    has(text, "ε", encoding)
    status, text = call("node", "check", str(file), "--offline")
    assert status == 1
    for letter in "ε…":
        has(text, letter, encoding)
    Ledger(tmp_path / "other" / "ledger.jsonl").record(event)
    status, text = call("budget", str(tmp_path / "other"))
    assert status == 0, text
    has(text, "ε", encoding)
    if encoding != "utf-8":
        assert len(columns(text, "| ledger ", "| other ")) == 1


def test_every_command_prints_through_the_console() -> None:
    """A `print` or `typer.echo` would not know the encoding; Rich's own console would lay out other words."""
    files = sorted((ROOT / "fl_dualpriv" / "cli").glob("*.py"))
    assert len(files) >= 7
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not called & {"print", "typer.echo", "typer.secho", "click.echo", "Console", "rich.print"}, file


def test_what_has_no_word_is_escaped_and_what_can_be_shown_stays() -> None:
    assert spelled("ε ≤ 4 ± 0.5 → 猫 é", "ascii") == "epsilon <= 4 +/- 0.5 -> \\u732b \\xe9"
    assert spelled("ε ± é", "latin-1") == "epsilon ± é"
    assert spelled("ε ± é \udce4", "utf-8") == "ε ± é \\udce4"  # a file's name that is no text in this locale
    assert all(word.isascii() for word in WORDS.values())


def test_letters_that_come_past_the_console_are_words_too(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    spell_out_what_cannot_be_shown()
    assert sys.stdout.errors == ERRORS
    sys.stdout.write("ε → δ\n")  # such as a library's warning
    write_line("±")
    Output(pipe_width=40).print("[bold]×[/bold]")
    assert written.getvalue() == b"epsilon -> delta\n+/-\nx\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_the_real_command_in_a_real_shell(encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fl_dualpriv.cli.main", "audit", "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"epsilon" in done.stdout
    assert done.stdout.isascii() or encoding != "ascii"


@pytest.mark.slow  # the accountant is loaded in a process of its own
def test_programs_of_our_own_answer_in_letters_that_we_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # a child's output would stop at ε
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    file, lines = tmp_path / "node.toml", []
    file.write_text(NODE.format(tmp_path, "0a" * 32), encoding="utf-8")
    HealthLine(file, Pulse(), 1.0, lines.append).look()
    assert "ε" in lines[0], lines
    assert node_device.probe("cuda:99")[0] == "cpu"
