"""The report: made of result files under DP, one file without requests, one line for each bad folder."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fl_dualpriv.cli import main as cli
from fl_dualpriv.report.charts import Series, line_chart, nice_ticks
from fl_dualpriv.report.page import page
from fl_dualpriv.report.runs import differences, grouped, read_run
from fl_dualpriv.report.words import in_words, pruning_in_words
from fl_dualpriv.run.folder_lock import held_alone

SECTIONS = {
    "what-was-learned",
    "curves",
    "clients",
    "privacy-in-words",
    "what-pruning-did",
    "cost",
    "what-may-be-published",
    "how-to-repeat-it",
}
RELEASE = {
    "release": "global prompt",
    "unit": "record",
    "relation": "add-or-remove-one",
    "sampling": "Poisson, q = 0.1",
    "releases": 18,
    "epsilon": 3.9,
    "delta": 1e-4,
    "trusts": "nobody",
    "guarantee": "theorem",
    "note": "",
}


def make_run(folder: Path, seed: int = 0, local: float = 0.4, private: bool = True, **config: Any) -> Path:
    """Write a finished run as the recorder does."""
    scores = {"local": local, "neighbour": 0.2, "harmonic_mean": 0.3, "general": 0.25, "new_client": None}
    low = {**scores, "local": 0.1}
    spread = dict.fromkeys(("minimum", "lower_quartile", "median", "upper_quartile", "maximum"), 0.3)
    each = {"local": [0.3, local], "neighbour": [0.2, 0.2]}
    summary = {
        "method": "dpfpl",
        "engine": "local",
        "seed": seed,
        "rounds": 2,
        "population": 2,
        "randomness": "os",
        "groups": [],
        "domains": [],
        "accuracy": {"zero_shot": low, "free": {**low, "rival": "'a <b>left</b> {}'"}, "final": scores},
        "clients": {"free": {"local": [0.1, 0.1]}, "final": each},
        "spread": {"free": {"local": spread}, "final": {"local": spread}},
        "privacy": [RELEASE] if private else [],
        "notes": ["a note"],
        "versions": {"fl-dualpriv": "0.1.0"},
        "config": {
            "rounds": 2,
            "seed": seed,
            "train.local-steps": 3,
            "privacy.record.epsilon": 4.0,
            "privacy.record.calibrate-to": "epsilon",
            "pruning.visual-keep-ratio": 0.75,
            "pruning.visual-fused": 1,
            "pruning.visual-merge": "attention",
            "pruning.update-keep-ratio": 1.0,
            "output.dir": str(folder),
            **config,
        },
    }
    (folder / "operator").mkdir(parents=True)
    (folder / "prompts").mkdir()
    (folder / "summary.json").write_text(json.dumps(summary))
    spent = {"record_level": 1.5 if private else None, "client_level": None}
    lines = [{"round": r, "accuracy": {"local": local * r / 2, "neighbour": 0.2}, "epsilon": spent} for r in (1, 2)]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    header = json.dumps({"global": {"dtype": "F32", "shape": [6, 96], "data_offsets": [0, 2304]}}).encode()
    (folder / "prompts" / "global.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(2304))
    (folder / "operator" / "totals.json").write_text(json.dumps({"failures": 0, "seconds": 77.0}))
    (folder / "operator" / "progress.jsonl").write_text("{}\n")
    (folder / "run.json").write_text("{}")
    return folder


class Reader(HTMLParser):
    """Collects ids, addresses and the nesting of tags."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {str(values["id"])} if "id" in values else set()
        self.addresses += [str(values[name]) for name in ("src", "href", "action") if name in values]
        if tag not in ("meta", "link", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "link", "line", "circle", "polyline"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader


def call(*words: object) -> Any:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def test_the_page_of_one_run_has_every_section_and_asks_no_network(tmp_path: Path) -> None:
    text = page([read_run(make_run(tmp_path / "one"))], governance=True)
    found = read(text)
    assert SECTIONS | {"for-those-who-decide-about-the-data"} == found.ids
    assert set(found.addresses) == {"data:,"}
    assert not re.search(r"https?:|@import|url\(", text)
    assert "<b>left</b>" not in text  # names of users are texts
    assert len(text) < 2 * 2**20
    words = " ".join(found.text)
    for sentence in (
        "+30.0",  # 40 % over the rival's 10 %
        "changes the probability of any outcome by at most a factor of e^3.9",
        "Of the visual tokens 75 % were kept and the others were fused into 1 by attention",
        "Local steps of one client: 6.",
        "2,304 bytes a round",
        "record level: spent ε = 3.9 of a target of 4.",
        "Times are not in this report",
        "summary.json",
        "property inference",
    ):
        assert sentence in words, sentence


def test_under_dp_it_is_the_same_without_the_operators_files(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "one")
    before = page([read_run(folder)])
    assert "77" not in before
    shutil.rmtree(folder / "operator")
    (folder / "run.json").unlink()
    assert page([read_run(folder)]) == before


def test_without_dp_it_has_times_and_warns(tmp_path: Path) -> None:
    text = page([read_run(make_run(tmp_path / "one", private=False))])
    assert "The run took 77 s." in text
    assert "may reveal single records" in text
    assert "No ε covers any file of this run" in text


def test_writing_it_twice_changes_nothing(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "one")
    for _ in range(2):
        assert call("report", folder).exit_code == 0
    first = (folder / "report.html").read_bytes()
    call("report", folder)
    assert (folder / "report.html").read_bytes() == first


def test_several_runs_are_grouped_by_setting_and_paired_by_seed(tmp_path: Path) -> None:
    runs = [
        read_run(make_run(tmp_path / f"{rate}-{seed}", seed, local, **{"train.rate": rate}))
        for rate, locals_ in ((0.1, (0.40, 0.42)), (0.2, (0.50, 0.54)))
        for seed, local in enumerate(locals_)
    ]
    groups = grouped(runs)
    assert [(group.label, len(group.runs)) for group in groups] == [("train.rate = 0.1", 2), ("train.rate = 0.2", 2)]
    assert differences(runs) == {"train.rate": [0.1, 0.1, 0.2, 0.2]}
    text = page(runs)
    found = read(text)
    assert {"what-was-learned", "curves", "differences-of-configuration", "privacy-in-words", "cost"} == found.ids
    # Differences of 10 and 12 points: mean 11, standard deviation √2, t(0.975, 1) = 12.706: half width 12.7.
    assert "+11.0 ± 12.7" in text


def test_a_configuration_with_a_seed_twice_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name)
    done = call("report", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "r.html")
    assert done.exit_code == 2
    assert "the same configuration and seed" in done.output


def spoil_nothing(folder: Path) -> None:
    shutil.rmtree(folder)


def spoil_foreign(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "holiday.png").write_bytes(b"")


def spoil_failed(folder: Path) -> None:
    (folder / "summary.json").unlink()
    (folder / "error.json").write_text("{}")


def spoil_cut_off(folder: Path) -> None:
    (folder / "summary.json").unlink()


def spoil_json(folder: Path) -> None:
    (folder / "summary.json").write_text('{"method": ')


def spoil_fields(folder: Path) -> None:
    (folder / "summary.json").write_text("{}")


def spoil_list(folder: Path) -> None:
    (folder / "summary.json").write_text("[]")


def spoil_rounds(folder: Path) -> None:
    (folder / "rounds.jsonl").write_text('{"round": 1\n')


def spoil_epsilon(folder: Path) -> None:
    change(folder, lambda summary: summary["privacy"][0].update(epsilon=None))


def spoil_config(folder: Path) -> None:
    change(folder, lambda summary: summary.update(config={}))


def spoil_score(folder: Path) -> None:
    change(folder, lambda summary: summary["accuracy"]["final"].update(local="high"))


def spoil_releases(folder: Path) -> None:
    change(folder, lambda summary: summary.update(privacy={"a": 1}))


def spoil_line(folder: Path) -> None:
    (folder / "rounds.jsonl").write_text('{"round": 1}\n')


def spoil_number(folder: Path) -> None:
    (folder / "rounds.jsonl").write_text("3\n")


def change(folder: Path, how: Callable[[dict[str, Any]], object]) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    how(summary)
    (folder / "summary.json").write_text(json.dumps(summary))


def spoil_prompt(folder: Path) -> None:
    (folder / "prompts" / "global.safetensors").write_bytes(b"abc")


SPOILT = {
    spoil_nothing: "no such folder",
    spoil_foreign: "no run",
    spoil_failed: "its run failed",
    spoil_cut_off: "its run was cut off",
    spoil_json: "cannot be read",
    spoil_fields: "cannot be read",
    spoil_list: "cannot be read",
    spoil_rounds: "cannot be read",
    spoil_prompt: "cannot be read",
    spoil_epsilon: "cannot be read",
    spoil_config: "cannot be read",
    spoil_score: "cannot be read",
    spoil_releases: "cannot be read",
    spoil_line: "cannot be read",
    spoil_number: "cannot be read",
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("command", ["report", "compare"])
def test_a_bad_folder_is_one_line_and_status_2(tmp_path: Path, spoil: Any, command: str) -> None:
    good, bad = make_run(tmp_path / "good", seed=1), make_run(tmp_path / "bad")
    spoil(bad)
    done = call(command, good, bad)
    assert done.exit_code == 2
    assert SPOILT[spoil] in done.output
    assert "Traceback" not in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert not Path("report.html").exists()


def test_a_run_that_goes_on_is_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "one")
    (folder / "summary.json").unlink()
    with held_alone(folder):
        done = call("report", folder)
    assert done.exit_code == 2
    assert "still goes on" in done.output


def test_ls_lists_finished_and_other_runs(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    spoil_failed(make_run(tmp_path / "b"))
    (tmp_path / "no-run").mkdir()
    done = call("ls", tmp_path)
    assert done.exit_code == 0
    assert "+30.0 points" in done.output
    assert "failed" in done.output
    assert "no-run" not in done.output
    assert call("ls", tmp_path / "no-run").exit_code == 2


def test_compare_prints_keys_and_points(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", local=0.45, **{"train.rate": 2})
    done = call("compare", a, b)
    assert done.exit_code == 0
    assert "train.rate" in done.output
    assert "+5.0" in done.output
    assert "output.dir" not in done.output


def test_figures_are_pdf_and_svg_of_a_column(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "one")
    done = call("report", folder, "--figures", tmp_path / "figures")
    assert done.exit_code == 0, done.output
    assert sorted(file.name for file in (tmp_path / "figures").iterdir()) == [
        f"{name}.{kind}" for name in ("accuracy", "epsilon") for kind in ("pdf", "svg")
    ]


def test_it_loads_no_torch(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "one")
    code = (
        "import sys; from fl_dualpriv.cli.report import report; from pathlib import Path; "
        f"report([Path({str(folder)!r})], None, None, True); "
        "print(sorted({'torch', 'flwr', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "against everyone, the server included"),
        ({"trusts": "server"}, "must be trusted"),
        ({"unit": "client"}, "everything that one client holds"),
        ({"guarantee": "nominal"}, "no guarantee"),
        ({"delta": None}, "by at most a factor of e^3.9 = 49.4. The noise"),
    ],
)
def test_a_release_in_words(change: dict[str, Any], words: str) -> None:
    assert words in in_words({**RELEASE, **change})


def test_pruning_that_did_nothing_is_said() -> None:
    assert pruning_in_words({}) == ["All visual tokens were kept.", "All blocks of the updates were kept."]


def test_ticks_cover_and_a_chart_marks_every_point() -> None:
    assert nice_ticks(0.0, 3.98) == [0.0, 1.0, 2.0, 3.0, 4.0]
    chart = line_chart(
        [Series(name="a", points=[(0, 1), (1, 2)]), Series(name="b", points=[])], x_name="x", y_name="y", title="t"
    )
    assert chart.count("<circle") == 2
    assert line_chart([Series(name="b", points=[])], x_name="x", y_name="y", title="t") == ""


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.1."""
    if len(colour) == 3:
        colour = "".join(2 * letter for letter in colour)
    parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_colour_of_text_and_lines_has_contrast_on_page_and_fill(tmp_path: Path) -> None:
    text = page([read_run(make_run(tmp_path / "one"))])
    themes = re.findall(r":root\{(?:color-scheme:light dark;)?([^}]*)\}", text)
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--(\w+):#([0-9a-f]{3,6})", theme.replace("\n", "")))
        for name in ("ink", "soft", *(f"c{i}" for i in range(6))):
            for ground in ("page", "fill"):
                light, dark = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground)


def test_a_level_is_compared_with_its_own_target(tmp_path: Path) -> None:
    keys = {"privacy.record.mechanism": "none", "privacy.client.mechanism": "gaussian", "privacy.client.epsilon": 8.0}
    folder = make_run(tmp_path / "one", **keys, **{"privacy.client.calibrate-to": "epsilon"})
    change(folder, lambda summary: summary["privacy"][0].update(unit="client", epsilon=7.9))
    text = page([read_run(folder)])
    assert "client level: spent ε = 7.9 of a target of 8." in text
    assert "record level: spent" not in text


def test_folders_of_a_machine_are_not_in_the_report(tmp_path: Path) -> None:
    places = {"data.path": "/home/alice/patients", "resources.ray-address": "10.0.0.7:6379"}
    model = {"backbone.name": "local-dir:/home/alice/models/vit", "resources.feature-cache": "/home/alice/cache"}
    runs = [make_run(tmp_path / str(n), local=0.4 + n / 10, x=n, **places, **model) for n in (0, 1)]
    for text in (page([read_run(runs[0])]), page([read_run(run) for run in runs])):
        assert "alice" not in text
        assert "10.0.0.7" not in text
    assert '"PATH/patients"' in page([read_run(runs[0])]).replace("&quot;", '"')
    assert "local-dir:PATH/vit" in page([read_run(runs[0])])


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "one")
    file = tmp_path / "file"
    file.write_text("")
    for words in (("--out", file / "x.html"), ("--figures", file / "x"), ("--out", tmp_path)):
        done = call("report", folder, *words)
        assert done.exit_code == 2, words
        assert "cannot be written" in done.output
        assert "Traceback" not in done.output


def test_marks_in_names_are_texts(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "[/red]", **{"odd.[/red]": 1})
    change(folder, lambda summary: summary.update(method="[/red] method"))
    other = make_run(tmp_path / "b")
    assert call("ls", tmp_path).exit_code == 0
    assert call("compare", folder, other).exit_code == 0
