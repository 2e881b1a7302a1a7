"""``fl-dualpriv budget DIR | NODE.toml``: the ε that ledgers hold, and the lifetime budget of a node's owner."""

import functools
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape
from rich.table import Table

from fl_dualpriv.cli.console import Output, write_line
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.node.lifetime import lifetime_of

_DELTA = 1e-5


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Content of one ledger.

    Attributes:
        who: ``server``, or the client's folder.
        unit: ``record`` or ``client``; both if the file is mixed.
        releases: Number of releases, with the charge of damaged lines.
        selections: Number of these releases that selected the start of a run.
        runs: Number of different runs.
        damaged: Number of lines that are not an event.
        refused: Number of attempts that the client refused.
        epsilon: ε at ``delta`` of the whole ledger, for terms that were fixed beforehand.
        delta: δ of ``epsilon``.
        filter: Header of the ledger. None if no owner's budget began it.
        witness: ε by Opacus' PRV accountant. None if it was not asked, or cannot answer.
    """

    who: str
    unit: str
    releases: int
    selections: int
    runs: int
    damaged: int
    refused: int
    epsilon: float
    delta: float
    filter: Mapping[str, Any] | None
    witness: float | None = None


def budget(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR|NODE.toml", help="A run's folder, a node's state folder, or its owner's file."),
    ],
    delta: Annotated[
        float | None, typer.Option(help="δ of ε. Default: that of the run's summary.json, else 1e-5.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Also print ε by Opacus' PRV accountant.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Print ε of each client's ledger (max, median, all of them) and of the server's, for terms fixed beforehand.

    With --check a second accountant, Opacus' PRV, prints its ε beside ours. It knows no choices by the exponential
    mechanism. For an owner's file, print the rule that holds its lifetime budget, the rest, and the runs that each rule
    would admit.
    """
    errors = Output(stderr=True)
    if delta is not None and not 0 < delta < 1:
        _refuse(errors, f"--delta {delta:g}: it must be between 0 and 1, both excluded")
    if folder.suffix == ".toml":
        try:
            lifetime = lifetime_of(folder)
        except (ConfigError, PrivacyError) as error:
            _refuse(errors, str(error))
        write_line(json.dumps(lifetime.jsonable()) if as_json else lifetime.words())
        return
    server, clients = _ledgers(folder)
    if not server and not clients:
        _refuse(errors, f"{folder} holds no ledger.jsonl: give a run's folder or a node's state folder")
    deltas = {} if delta is not None else _deltas_of_run(folder)
    server_ledgers = [_read(path, "server", delta, deltas, check=check) for path in server]
    client_ledgers = [_read(path, path.parent.name, delta, deltas, check=check) for path in clients]
    if as_json:
        content = {"server": [_jsonable(s) for s in server_ledgers], "clients": [_jsonable(s) for s in client_ledgers]}
        write_line(json.dumps(content | _statistics(client_ledgers)))
        return
    console = Output()
    for title, some in (("server", server_ledgers), ("clients", client_ledgers)):
        if some:
            console.print(_table(title, some, check=check))
    if client_ledgers:
        numbers = _statistics(client_ledgers)
        console.print(
            f"ε of {len(client_ledgers)} clients: "
            f"max {numbers['epsilon-max']:.4g}, median {numbers['epsilon-median']:.4g}",
            highlight=False,
        )
    console.print("this ε is for terms fixed beforehand; it admits no release", highlight=False)
    for s in (*server_ledgers, *client_ledgers):
        if s.filter is not None:
            numbers = ", ".join(f"{key} = {value}" for key, value in s.filter.items())
            console.print(escape(f"{s.who}: {numbers}"), highlight=False, soft_wrap=True)
    if not server and any(s.filter is not None for s in client_ledgers):
        console.print("what is left: fl-dualpriv budget NODE.toml", highlight=False)


def _ledgers(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the server's ledger of a run and the clients' ledgers. A node's own folder holds one client's ledger."""
    ledger, clients = folder / "ledger.jsonl", sorted((folder / "clients").glob("*/ledger.jsonl"))
    if not ledger.exists():
        return [], clients
    is_node = not clients and not (folder / "summary.json").exists() and not (folder / "rounds.jsonl").exists()
    return ([], [ledger]) if is_node else ([ledger], clients)


def _deltas_of_run(folder: Path) -> dict[str, float]:
    """Return unit → δ from the run's own table."""
    try:
        rows = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["privacy"]
        return {str(row["unit"]): float(row["delta"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _read(path: Path, who: str, delta: float | None, deltas: dict[str, float], *, check: bool) -> Spent:
    from fl_dualpriv.privacy.ledger import Ledger  # late: the accountant takes a second to load

    content = Ledger(path).read()
    units = sorted({event.unit for event in content.events})
    at = delta if delta is not None else min((deltas[u] for u in units if u in deltas), default=_DELTA)
    refusals = path.parent / "refusals.jsonl"
    can_be_witnessed = bool(content.events) and not content.pure()
    return Spent(
        who=who,
        unit=" and ".join(units) or "-",
        releases=content.releases(),
        selections=len(content.selections()),
        runs=len({event.run for event in content.events}),
        damaged=content.damaged,
        refused=len(refusals.read_text(encoding="utf-8").splitlines()) if refusals.exists() else 0,
        epsilon=content.epsilon(at),
        delta=at,
        filter=content.headers[0] if content.headers else None,
        witness=_witness(tuple(content.opacus_history()), at) if check and can_be_witnessed else None,
    )


@functools.lru_cache
def _witness(history: tuple[tuple[float, float, int], ...], delta: float) -> float | None:
    from fl_dualpriv.run.witness import prv_epsilon  # late: Opacus takes seconds to load

    return prv_epsilon(history, delta)


def _statistics(spent: list[Spent]) -> dict[str, float]:
    values = [s.epsilon for s in spent]
    return {"epsilon-max": max(values), "epsilon-median": statistics.median(values)} if values else {}


def _jsonable(spent: Spent) -> dict[str, Any]:
    """Return a dictionary for JSON, in which None replaces infinity."""
    return asdict(spent) | {"epsilon": spent.epsilon if math.isfinite(spent.epsilon) else None}


def _table(title: str, spent: list[Spent], *, check: bool) -> Table:
    table = Table(title=title, title_justify="left")
    selected = ["selected starts"] if any(s.selections for s in spent) else []
    columns = ("ε (PLD)", "ε (PRV)") if check else ("ε",)
    for name in ("ledger", "unit", "runs", "releases", *selected, "damaged lines", "refused attempts", *columns, "δ"):
        table.add_column(name, justify="left" if name in ("ledger", "unit") else "right", no_wrap=name == "ledger")
    for s in spent:
        numbers = (s.runs, s.releases, *([s.selections] if selected else []), s.damaged, s.refused)
        epsilons = [f"{s.epsilon:.4g}"]
        if check:
            epsilons.append("-" if s.witness is None else f"{s.witness:.4g}")
        table.add_row(escape(s.who), s.unit, *map(str, numbers), *epsilons, f"{s.delta:g}")
    return table


def _refuse(errors: Output, message: str) -> NoReturn:
    errors.print(f"[bold red]error:[/bold red] {escape(message)}", soft_wrap=True, highlight=False)
    raise typer.Exit(2)
