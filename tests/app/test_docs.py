"""What the documents point at exists: files that they link, and the tests that their claims name."""

import json
import re
from pathlib import Path

import pytest

from fl_dualpriv.run.file_kinds import RUN_FILES

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
_TEST = re.compile(r"`((?:app|clients|fl_dualpriv|guarantees|simulations|strategies)/[\w/]*test_\w+\.py)(?:::(\w+))?`")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_linked_files_exist(document: Path) -> None:
    links = [link for link in _LINK.findall(document.read_text(encoding="utf-8")) if "://" not in link]
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


def test_every_test_that_a_claim_names_exists() -> None:
    text = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    named = set(_TEST.findall(text))
    assert len(named) > 40
    missing = []
    for file, name in sorted(named):
        path = ROOT / "tests" / file
        source = path.read_text(encoding="utf-8") if path.exists() else None
        if source is None or (name and f"def {name}(" not in source):
            missing.append(f"{file}::{name}")
    assert not missing


def test_the_privacy_page_names_every_file_of_a_run_under_its_kind() -> None:
    text = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    section = text.split("## 2. Who sees what")[1].split("\n## ")[0]
    (row,) = [line for line in section.splitlines() if line.startswith("| readers of the *results*")]
    (listed,) = re.findall(r"The\s+\*operator's\s+files\*\s+are\s+(.*?)\. A run", section, flags=re.DOTALL)
    files = [file for file in RUN_FILES if file.place == "run"]
    for file in files:
        folder, _, rest = file.pattern.partition("/")
        name = f"`{folder}/`" if "*" in rest else f"`{file.pattern}`"
        assert name in (row if file.kind == "result" else listed), name
        assert name not in (listed if file.kind == "result" else row), name
    assert "`clients/`" in listed


def test_every_pitfall_names_a_test() -> None:
    text = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    rows = text.split("## 8. Pitfalls")[1].split("\n| ")[3:]
    assert len(rows) > 20
    assert all(_TEST.search(row) for row in rows)


def test_the_demos_numbers_stand_in_one_place_and_are_those_of_the_results() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    printed = re.search(r"this run ([\d.]+) % ([\d.]+) %", text)
    assert printed is not None
    results = json.loads((ROOT / "docs" / "results" / "shelf.json").read_text(encoding="utf-8"))
    (scores,) = (
        line["accuracy, percent"]
        for line in results["lines"]
        if line["row"] == "DP-FPL" and line["axes"]["privacy.record.epsilon"] == 4
    )
    seed_zero = [scores[kind]["values"][results["seeds"].index(0)] for kind in ("local", "neighbour")]
    # The results have two decimals and the table one: rounding twice may differ by half of the last digit.
    assert [float(number) for number in printed.groups()] == pytest.approx(seed_zero, abs=0.0501)
    for file in ("simulations/configs/demo.toml", "Makefile", "docs/prompts.md", "docs/resume.md"):
        assert not re.search(r"seed 0: [\d.]", (ROOT / file).read_text(encoding="utf-8")), file
