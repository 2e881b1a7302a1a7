"""What a run prints about its accuracy and its privacy."""

import io
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from fl_dualpriv.run.tables import SEEDED_NOTE, epsilon_text, headline, percent, privacy_table, results_table

RELEASE: dict[str, Any] = {
    "release": "client upload",
    "unit": "record",
    "relation": "add-remove",
    "sampling": "Poisson q=0.15",
    "releases": 50,
    "epsilon": 3.99951,
    "delta": 1e-4,
    "trusts": "nobody",
    "guarantee": "theorem",
    "note": "",
}
SUMMARY: dict[str, Any] = {
    "method": "dpfpl",
    "engine": "local",
    "seed": 3,
    "rounds": 10,
    "population": 10,
    "randomness": "os",
    "privacy": [RELEASE],
    "accuracy": {
        "zero_shot": {"local": 0.5, "neighbour": 0.456, "harmonic_mean": 0.477, "general": 0.5, "new_client": 0.4},
        "free": {
            **{"local": 0.56, "neighbour": 0.456, "harmonic_mean": 0.5027, "general": 0.56, "new_client": 0.41},
            "rival": "un-tuned, own class list",
        },
        "final": {"local": 0.6123, "neighbour": 0.44, "harmonic_mean": 0.512, "general": 0.53, "new_client": None},
    },
}

TOTALS = {"failures": 2, "seconds": 61.4}


def text(table: Table) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(table: Table, start: str) -> list[str]:
    line = next(line for line in text(table).splitlines() if line.strip().startswith(start))
    return [cell.strip() for cell in line.strip().split("  ") if cell.strip()]


def test_results_in_percent_and_points() -> None:
    table = results_table(SUMMARY)
    columns = ["accuracy", "local", "neighbour", "harmonic mean", "general", "new client"]
    assert [str(column.header) for column in table.columns] == columns
    assert row(table, "un-tuned") == ["un-tuned", "50.0 %", "45.6 %", "47.7 %", "50.0 %", "40.0 %"]
    free = ["free rival: un-tuned, own class list", "56.0 %", "45.6 %", "50.3 %", "56.0 %", "41.0 %"]
    assert row(table, "free") == free
    assert row(table, "this run") == ["this run", "61.2 %", "44.0 %", "51.2 %", "53.0 %", "-"]
    # The gain is over the free rival: 61.2 - 56.0, not 61.2 - 50.0.
    assert row(table, "gain") == ["gain on the free rival, points", "+5.2", "-1.6", "+0.9", "-3.0", "-"]
    assert headline(SUMMARY, TOTALS) == "dpfpl · engine local · seed 3 · 10 rounds · 10 clients · 2 failed · 61 s"


def test_names_of_groups_are_no_markup() -> None:
    told = {
        kind: SUMMARY["accuracy"]["free"] | {"by_group": [0.25], "rival": "un-tuned"}
        for kind in ("zero_shot", "free", "final")
    }
    table = results_table(SUMMARY | {"groups": ["[/red] what"], "accuracy": told})
    assert row(table, "[/red]") == ["[/red] what", "25.0 % → 25.0 %", "-", "-", "-", "-"]


def test_a_domain_has_one_line_over_its_classes() -> None:
    groups = {"groups": ["hall: cup", "hall: pen", "lab: cup", "lab: pen"], "domains": ["hall", "lab"]}
    told = {
        kind: entry | {"by_group": [0.25, None, 0.5, start]}
        for (kind, entry), start in zip(SUMMARY["accuracy"].items(), (0.5, 0.5, 1.0), strict=True)
    }
    table = results_table(SUMMARY | groups | {"accuracy": told})
    assert row(table, "hall")[:2] == ["hall", "25.0 % → 25.0 %"]
    assert row(table, "lab")[:2] == ["lab", "50.0 % → 75.0 %"]
    assert "cup" not in text(table)


def test_where_nothing_public_helps_the_row_of_the_rival_says_so() -> None:
    accuracy = SUMMARY["accuracy"] | {"free": SUMMARY["accuracy"]["zero_shot"] | {"rival": "un-tuned"}}
    table = results_table(SUMMARY | {"accuracy": accuracy})
    assert row(table, "free rival")[0] == "free rival: equals un-tuned"
    assert row(table, "free rival")[1:] == row(table, "un-tuned")[1:]
    assert row(table, "gain")[1] == "+11.2"  # 61.2 - 50.0


@pytest.mark.parametrize(("randomness", "marked"), [("os", False), ("seeded", True)])
def test_seeded_randomness_is_flagged(randomness: str, marked: bool) -> None:
    summary = SUMMARY | {"randomness": randomness}
    assert (SEEDED_NOTE in text(results_table(summary)).replace("\n", " ")) is marked
    assert (SEEDED_NOTE in headline(summary, TOTALS)) is marked


def test_a_run_without_noise_has_none_that_could_be_reproduced() -> None:
    summary = SUMMARY | {"randomness": "seeded", "privacy": []}
    assert SEEDED_NOTE not in text(results_table(summary)).replace("\n", " ")
    assert SEEDED_NOTE not in headline(summary, TOTALS)


def test_a_theorem_has_its_epsilon_rounded_up() -> None:
    cells = row(privacy_table([RELEASE]), "client upload")
    assert cells == [
        *("client upload", "record", "add-remove", "Poisson q=0.15", "50"),
        *("4", "0.0001", "nobody", "theorem"),
    ]


def test_a_nominal_epsilon_never_stands_in_the_epsilon_column() -> None:
    table = privacy_table([RELEASE | {"guarantee": "nominal", "epsilon": 0.4, "note": "batch clipping"}])
    header = [str(column.header) for column in table.columns]
    assert list(table.columns[header.index("ε")].cells) == ["-"]
    assert list(table.columns[header.index("guarantee")].cells) == ["nominal 0.4"]
    assert "client upload: batch clipping" in text(table)


def test_releases_without_privacy() -> None:
    entry = RELEASE | {"epsilon": None, "delta": None, "sampling": None, "guarantee": "none"}
    table = privacy_table([entry])
    assert row(table, "client upload")[3:7] == ["-", "50", "-", "-"]


@pytest.mark.parametrize(
    ("epsilon", "expected"),
    # up to three decimals; a target met to nine digits from above is still that target
    [(None, "-"), (4.0, "4"), (4.0000000005, "4"), (1.2341, "1.235"), (0.0001, "0.001"), (float("inf"), "∞")],
)
def test_epsilon_text(epsilon: float | None, expected: str) -> None:
    assert epsilon_text(epsilon) == expected


def test_percent() -> None:
    assert [percent(None), percent(0.0), percent(0.1234)] == ["-", "0.0 %", "12.3 %"]


def test_large_epsilons_are_not_cut_to_six_digits() -> None:
    assert epsilon_text(1000.0014) == "1000.002"
    assert epsilon_text(1234.5614) == "1234.562"
