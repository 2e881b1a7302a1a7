"""Which prompt may be published, and at what ε: never without a guarantee in silence, never below its ledger."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.accounting import epsilon
from fl_dualpriv.privacy.ledger import LedgerContent, LedgerEvent
from fl_dualpriv.publish.card import Guarantee
from fl_dualpriv.publish.collect import Material
from fl_dualpriv.publish.rules import Level, guarantees_of
from tests.fl_dualpriv.publish.test_file import FACTS

PLANNED = 2.0


def row(release: str, unit: str = "record", **changes: Any) -> dict[str, Any]:
    return {
        "release": release,
        "unit": unit,
        "relation": "add-or-remove-one",
        "sampling": "Poisson",
        "releases": 2,
        "epsilon": PLANNED,
        "delta": 1e-4,
        "trusts": "nobody",
        "guarantee": "theorem",
        "note": "a note",
    } | changes


def ledger(rounds: int, unit: str = "record", run: str = "t", damaged: int = 0) -> LedgerContent:
    events = [
        LedgerEvent(run=run, unit=unit, server_round=i + 1, releases=1, sampling_rate=0.1, noise_multiplier=1.0)
        for i in range(rounds)
    ]
    return LedgerContent(events=tuple(events), damaged=damaged)


MATERIAL = Material(
    prompt=torch.zeros(1, 1),
    use=FACTS.use,
    source=FACTS.source,
    rows=[row("client upload"), row("global prompt"), row("published personal prompt")],
    ledgers={"record": [ledger(2), ledger(1)]},
    run_token="t",
    claims=frozenset({"record"}),
    deployed=False,
    backbone="demo",
    pretrained="",
    notes=(),
)
GLOBAL = replace(MATERIAL, source=replace(FACTS.source, client=None))
BOTH = {
    "rows": [row("global prompt"), row("published personal prompt"), row("global prompt", "client", epsilon=7.0)],
    "ledgers": {"record": [ledger(2)], "client": [ledger(2, "client")]},
    "claims": frozenset({"record", "client"}),
}


def only(material: Material, level: Level | None = None) -> Guarantee:
    (guarantee,), _ = guarantees_of(material, level, not_private=False)
    return guarantee


def test_epsilon_is_the_plans_where_the_ledgers_hold_less():
    # q = 0.1, z = 1, two releases at δ = 1e-4: about 1.6
    assert epsilon(0.1, 1.0, 2, 1e-4) < PLANNED
    for material in (MATERIAL, GLOBAL):
        assert (only(material).epsilon, only(material).releases, only(material).unit) == (PLANNED, 2, "record")


@pytest.mark.parametrize("material", [MATERIAL, GLOBAL], ids=["personal", "global"])
def test_epsilon_is_never_below_the_fullest_ledger(material: Material):
    """A repeated round, another run on the same records or a damaged line: what was released counts, not the plan."""
    fuller: Sequence[LedgerContent]
    many = epsilon(0.1, 1.0, 60, 1e-4)
    assert many > PLANNED
    for fuller in (
        [ledger(2), ledger(60)],
        [ledger(2), LedgerContent(events=(*ledger(2).events, *ledger(58, run="earlier").events), damaged=0)],
        [ledger(2), ledger(30, damaged=30)],  # a damaged line is charged as a whole round
    ):
        found = only(replace(material, ledgers={"record": fuller}))
        assert found.epsilon == pytest.approx(many, rel=1e-9)
        assert found.releases == 60
        assert "whole ledger" in found.note


@pytest.mark.parametrize(
    "ledgers",
    [
        {},
        {"record": [ledger(0)]},
        {"record": [ledger(3, run="other")]},
        {"client": [ledger(2, "client")]},
    ],
    ids=["none", "empty", "of-another-run", "of-another-unit"],
)
def test_no_guarantee_without_a_ledger_of_the_run(ledgers: Any):
    with pytest.raises(PrivacyError, match="no line of this run"):
        only(replace(MATERIAL, ledgers=ledgers))


def test_a_run_in_which_no_sampled_client_took_part_states_its_plan():
    """`run_material` gives an empty list only there; a missing ledger of anybody else is refused before."""
    assert only(replace(MATERIAL, ledgers={"record": []})).epsilon == PLANNED


def test_a_ledger_of_damaged_lines_gives_none():
    bad = {"record": [ledger(1), LedgerContent(events=(), damaged=1)]}
    with pytest.raises(PrivacyError, match="no finite ε"):
        only(replace(MATERIAL, ledgers=bad))


def test_deployed_clients_keep_their_ledgers_and_it_is_said():
    away = replace(GLOBAL, ledgers={}, deployed=True)
    assert "ledger on its node" in only(away).note
    assert only(away).epsilon == PLANNED
    with pytest.raises(PrivacyError, match="no line of this run"):  # a client's own ledger is where its prompt is
        only(replace(MATERIAL, ledgers={}, deployed=True))
    at_server = replace(GLOBAL, rows=[row("global prompt", "client")], claims=frozenset({"client"}), deployed=True)
    with pytest.raises(PrivacyError, match="client-level ledger"):  # and the server's at the server
        only(replace(at_server, ledgers={}))


def test_the_global_prompt_of_both_levels_has_both_lines():
    found, notes = guarantees_of(replace(GLOBAL, **BOTH), None, not_private=False)
    assert [(g.unit, g.epsilon) for g in found] == [("record", PLANNED), ("client", 7.0)]
    assert notes == ()


def test_a_personal_prompt_is_not_covered_at_client_level_and_one_must_say_so():
    both = replace(MATERIAL, **BOTH)
    with pytest.raises(
        PrivacyError, match="ε at client level, and that does not cover the personal prompt of client 3"
    ):
        only(both)
    with pytest.raises(PrivacyError, match="not covered at client level, only at record"):
        only(both, "client")
    found, notes = guarantees_of(both, "record", not_private=False)
    assert [g.unit for g in found] == ["record"]
    assert notes == ("client level: this prompt is not covered",)
    alone = replace(both, rows=[row("global prompt", "client")], claims=frozenset({"client"}))
    with pytest.raises(PrivacyError, match=r"client level does not cover it.*--not-private"):
        only(alone)
    assert guarantees_of(alone, None, not_private=True) == ((), ())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rows": [], "claims": frozenset()}, "without differential privacy"),
        ({"rows": [row("published personal prompt", guarantee="nominal")]}, "nominal, not a bound"),
        ({"rows": [row("client upload")]}, "record level does not cover it"),
    ],
    ids=["no-dp", "nominal", "no-row"],
)
def test_without_a_guarantee_one_must_say_so(changes: Any, reason: str):
    bare = replace(MATERIAL, **changes)
    with pytest.raises(PrivacyError, match=f"{reason}.*--not-private"):
        only(bare)
    assert guarantees_of(bare, None, not_private=True) == ((), ())


def test_a_prompt_with_a_guarantee_is_not_published_as_if_it_had_none():
    with pytest.raises(PrivacyError, match=r"has a guarantee.*omit --not-private"):
        guarantees_of(MATERIAL, None, not_private=True)
