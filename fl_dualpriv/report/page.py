"""The HTML page of one run or of several: one file without any request to a network."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from fl_dualpriv.report.charts import Series, line_chart
from fl_dualpriv.report.runs import Group, Run, differences, grouped
from fl_dualpriv.report.words import NOT_PROTECTED, in_words, in_words_of, pruning_in_words
from fl_dualpriv.run.estimates import Estimate, paired
from fl_dualpriv.run.tables import KINDS, SEEDED_NOTE, epsilon_text, percent, points

_WHEN = (("zero_shot", "un-tuned"), ("free", "free rival"), ("final", "this run"))
_FLOAT_BYTES = 4
_STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1b1f24;--soft:#57606a;--line:#d0d7de;--fill:#f6f8fa;
--c0:#0550ae;--c1:#9a3412;--c2:#116329;--c3:#6639ba;--c4:#a40e26;--c5:#4d5c00}
@media (prefers-color-scheme:dark){:root{--page:#0d1117;--ink:#e6edf3;--soft:#9ea7b3;--line:#30363d;--fill:#161b22;
--c0:#79c0ff;--c1:#ffa657;--c2:#7ee787;--c3:#d2a8ff;--c4:#ff9a94;--c5:#d7e06a}}
*{box-sizing:border-box}body{margin:0 auto;padding:1rem;max-width:64rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}h1{font-size:1.5rem;overflow-wrap:anywhere}h2{font-size:1.2rem;margin-top:2rem;
border-bottom:1px solid var(--line)}p,li{max-width:46rem;overflow-wrap:anywhere}.soft{color:var(--soft)}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:.25rem .6rem;
text-align:right;border-bottom:1px solid var(--line)}th:first-child,td:first-child{text-align:left}
td+td{white-space:nowrap}.wide+.wide{margin-top:1rem}.tall{max-height:26rem;overflow:auto}
th{background:var(--fill)}th button{all:unset;cursor:pointer;text-decoration:underline dotted}
th button:focus-visible{outline:2px solid var(--c0)}svg{width:100%;height:auto;max-width:46rem;display:block}
svg text{fill:var(--ink);font:13px system-ui,sans-serif}
@media (max-width:40rem){svg text{font-size:20px}}.grid{stroke:var(--line)}.line{fill:none;stroke-width:2}
.c0{stroke:var(--c0)}.c1{stroke:var(--c1)}.c2{stroke:var(--c2)}.c3{stroke:var(--c3)}.c4{stroke:var(--c4)}
.c5{stroke:var(--c5)}.dot{fill:var(--page);stroke-width:2}pre{overflow-x:auto;background:var(--fill);padding:.6rem;
font-size:.85rem}.warn{border-left:4px solid var(--c4);padding-left:.6rem}.charts{display:grid;gap:1rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr))}
@media print{body{font-size:11px;max-width:none}h2{margin-top:1rem;break-after:avoid}tr,svg{break-inside:avoid}
.tall{max-height:none}.many tbody tr:nth-child(n+21){display:none}details{display:none}}
"""
_SCRIPT = """
document.querySelectorAll("table.sort").forEach(t=>t.querySelectorAll("th button").forEach((b,i)=>b.onclick=()=>{
const up=b.dataset.up!=="1";b.dataset.up=up?"1":"0";const v=r=>{const x=r.cells[i].dataset.v;return x===""?-1e9:+x};
[...t.tBodies[0].rows].sort((p,q)=>up?v(p)-v(q):v(q)-v(p)).forEach(r=>t.tBodies[0].append(r))}));
"""


def page(runs: Sequence[Run], *, governance: bool = False) -> str:
    """Return the HTML page of one or several runs.

    Guarantee:
        Of a run that states an ε the page is a function of its result files only.

    Args:
        runs: The runs; each configuration has a seed once.
        governance: True to add the section for people who decide about data.

    Raises:
        ConfigError: If two runs have the same configuration and seed.
    """
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    sections = list(_of_one(runs[0]) if len(runs) == 1 else _of_many(runs))
    if governance:
        sections.append(_governance(runs))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body><main><h1>{escape(title)}</h1>'
        f"{''.join(sections)}</main><script>{_SCRIPT}</script></body></html>\n"
    )


def _section(name: str, body: str) -> str:
    anchor = name.lower().replace(" ", "-").replace(",", "")
    return f'<section id="{escape(anchor)}"><h2>{escape(name)}</h2>{body}</section>' if body else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _of_one(run: Run) -> Iterator[str]:
    summary = run.summary
    level = "no differential privacy" if run.epsilon is None else f"ε = {epsilon_text(run.epsilon)}"
    facts = f"{summary['method']}, {summary['population']} clients, {summary['rounds']} rounds, seed {summary['seed']}"
    yield f"<p>{escape(f'{facts}, {level}')}</p>"
    if summary["randomness"] == "seeded" and summary["privacy"]:
        yield f'<p class="warn">{escape(SEEDED_NOTE)}: everyone who knows the seed can remove the noise.</p>'
    yield _section("What was learned", _learned(run))
    yield _section("Curves", _curves([(run.name, run)]))
    yield _section("Clients", _clients(summary))
    yield _section("Privacy, in words", _privacy(run))
    yield _section("What pruning did", _list(pruning_in_words(run.config)))
    yield _section("Cost", _cost(run))
    yield _section("What may be published", _published(run))
    yield _section("How to repeat it", _repeat(run))


def _learned(run: Run) -> str:
    accuracy = run.summary["accuracy"]
    rows = []
    for when, name in _WHEN:
        rival = accuracy["free"].get("rival", "un-tuned")
        label = f"free rival: {rival}" if when == "free" else name
        rows.append([label, *(percent(accuracy[when].get(kind)) for kind in KINDS)])
    gains = ["gain over the free rival, points", *map(run.gain, KINDS)]
    note = (
        '<p class="soft">The free rival is the best that public knowledge gives without training. It costs no ε, so '
        "only the gain over it counts. Local: a client's prompt on held-out records like its own. Neighbour: the same "
        "prompt on the records of other clients. General: the shared prompt. New client: the shared prompt on clients "
        "that took part in no round.</p>"
    )
    return _table(["accuracy", *(kind.replace("_", " ") for kind in KINDS)], [*rows, gains]) + note


def _curves(named: Sequence[tuple[str, Run]]) -> str:
    charts = []
    kinds = ("local", "neighbour") if len(named) == 1 else ("local",)
    series = []
    for name, run in named:
        for kind in kinds:
            points = [
                (float(line["round"]), 100 * line["accuracy"][kind])
                for line in run.rounds
                if line["accuracy"] and line["accuracy"].get(kind) is not None
            ]
            series.append(Series(name=kind if len(named) == 1 else name, points=points))
    charts.append(line_chart(series, x_name="round", y_name="accuracy, %", title="accuracy by round"))
    spent = []
    for name, run in named:
        for level in ("record_level", "client_level"):
            points = [
                (float(line["round"]), line["epsilon"][level])
                for line in run.rounds
                if line["epsilon"].get(level) is not None
            ]
            label = level.replace("_", " ")
            spent.append(Series(name=label if len(named) == 1 else f"{name}, {label}", points=points))
    charts.append(line_chart(spent, x_name="round", y_name="ε spent", title="ε spent by round"))
    drawn = [chart for chart in charts if chart]
    return f'<div class="charts">{"".join(f"<div>{chart}</div>" for chart in drawn)}</div>' if drawn else ""


def _clients(summary: Mapping[str, Any]) -> str:
    """Return spread and a sortable table of the clients, where their scores are results."""
    clients, spread = summary.get("clients"), summary.get("spread")
    if not clients or not clients.get("final"):
        return "<p>Scores of single clients are private in this run. Their owners have them.</p>"
    names = ("minimum", "lower_quartile", "median", "upper_quartile", "maximum")
    rows = [
        [f"{label}, {kind}", *(percent(spread[when][kind][name]) for name in names)]
        for when, label in _WHEN[1:]
        for kind in ("local", "neighbour")
        if spread and spread[when].get(kind)
    ]
    body = _table(["spread over clients", *(name.replace("_", " ") for name in names)], rows) if rows else ""
    heads = ("client", "free rival, local", "this run, local", "gain, points", "this run, neighbour")
    head = "".join(f"<th><button type=button>{escape(text)}</button></th>" for text in heads)
    lines = []
    neighbours = clients["final"].get("neighbour") or [None] * len(clients["final"]["local"])
    for number, (free, final, other) in enumerate(
        zip(clients["free"]["local"], clients["final"]["local"], neighbours, strict=True)
    ):
        gain = None if free is None or final is None else 100 * (final - free)
        values = [number, free, final, gain, other]
        texts = [str(number), percent(free), percent(final), points(free, final), percent(other)]
        cells = (
            f'<td data-v="{"" if value is None else f"{value:.6g}"}">{text}</td>'
            for value, text in zip(values, texts, strict=True)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'{body}<div class="wide tall"><table class="sort many"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _list(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in sentences) + "</ul>" if sentences else ""


def _privacy(run: Run) -> str:
    releases = run.summary["privacy"]
    if not releases:
        return "<p>This run has no differential privacy: its results may reveal single records.</p>"
    heads = ["release", "unit", "relation", "sampling", "releases", "ε", "δ", "trusts", "guarantee"]
    rows = [
        [
            *(str(release[key]) for key in ("release", "unit", "relation", "sampling", "releases")),
            epsilon_text(release["epsilon"]) if release["guarantee"] == "theorem" else "-",
            "-" if release["delta"] is None else f"{release['delta']:g}",
            *(str(release[key]) for key in ("trusts", "guarantee")),
        ]
        for release in releases
    ]
    return _budgets(run) + _list(_sentences(releases)) + _table(heads, rows) + _list(list(run.summary["notes"]))


def _budgets(run: Run) -> str:
    """Return what was spent of each level's target."""
    parts = []
    for unit in ("record", "client"):
        spent = [r["epsilon"] for r in run.summary["privacy"] if (r["unit"], r["guarantee"]) == (unit, "theorem")]
        is_target = run.config.get(f"privacy.{unit}.calibrate-to") == "epsilon"
        if spent and is_target and run.config.get(f"privacy.{unit}.mechanism", "gaussian") != "none":
            target = run.config[f"privacy.{unit}.epsilon"]
            parts.append(f"<p>{unit} level: spent ε = {epsilon_text(max(spent))} of a target of {target:g}.</p>")
    return "".join(parts)


def _sentences(releases: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the releases in words; those with the same guarantee share a sentence."""
    names: dict[str, list[str]] = {}
    for release in releases:
        guarantee = in_words({**release, "release": ""}).removeprefix(": ")
        names.setdefault(guarantee, []).append(str(release["release"]))
    return [in_words_of(own, guarantee) for guarantee, own in names.items()]


def _cost(run: Run) -> str:
    config = run.config
    steps = int(config["rounds"]) * int(config["train.local-steps"])
    sentences = [f"Local steps of one client: {steps:,}."]
    if run.shape is not None:
        size = _FLOAT_BYTES
        for length in run.shape:
            size *= length
        shape = " x ".join(map(str, run.shape))
        whole = 2 * size * int(config["rounds"])
        sentences.append(
            f"A client receives and sends {size:,} bytes a round (a prompt of {shape} float32 numbers), "
            f"{whole:,} bytes in all, without the overhead of messages."
        )
    if run.seconds is not None:
        sentences.append(f"The run took {run.seconds:.0f} s.")
    elif run.summary["privacy"]:
        sentences.append("Times are not in this report, because they can depend on private data.")
    return _list(sentences)


def _published(run: Run) -> str:
    if not run.summary["privacy"]:
        return "<p>No ε covers any file of this run. Publish it only if the data are public.</p>"
    files = "".join(f"<li><code>{escape(name)}</code></li>" for name in run.results)
    return (
        f"<p>These files, and this report, are made of the releases in the table only:</p><ul>{files}</ul>"
        "<p>Every other file of the folder is the operator's. No ε covers it: do not publish it.</p>"
    )


def _repeat(run: Run) -> str:
    shown = {key: _without_place(value) for key, value in sorted(run.config.items())}
    keys = {key: value for key, value in shown.items() if not key.startswith(("output.", "resources."))}
    lines = "\n".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in keys.items())
    versions = ", ".join(f"{name} {version}" for name, version in run.summary["versions"].items())
    return (
        "<p>Save this configuration as <code>again.toml</code> in the checkout and run "
        "<code>fl-dualpriv run again.toml</code>, with your own folders in the place of PATH. Seeded noise repeats bit "
        "by bit on one kind of machine.</p>"
        f"<details><summary>configuration, {len(keys)} keys</summary><pre>{escape(lines)}</pre></details>"
        f'<p class="soft">{escape(versions)}</p>'
    )


def _without_place(value: object) -> object:
    """Return a value without the folders of a machine: of an absolute path only the last name stays."""
    if not isinstance(value, str):
        return value
    return re.sub(r"(^|:)/(?:[^/\n]*/)*([^/\n]*)", r"\1PATH/\2", value)


def _of_many(runs: Sequence[Run]) -> Iterator[str]:
    groups = grouped(runs)
    yield f"<p>{len(groups)} settings, {len(runs)} runs. Differences are paired by seed.</p>"
    yield _section("What was learned", _compared(groups))
    yield _section("Curves", _curves([(group.label, group.runs[0]) for group in groups]))
    firsts = [group.runs[0] for group in groups]
    changed = differences(firsts)
    rows = [[key, *(str(_without_place(value)) for value in values)] for key, values in changed.items()]
    yield _section("Differences of configuration", _table(["key", *(g.label for g in groups)], rows) if rows else "")
    words = []
    for group in groups:
        sentences = _sentences(group.runs[0].summary["privacy"])
        words.append(f"<h3>{escape(group.label)}</h3>{_list(sentences) or '<p>No differential privacy.</p>'}")
    yield _section("Privacy, in words", "".join(words))
    yield _section("Cost", "".join(f"<h3>{escape(g.label)}</h3>{_cost(g.runs[0])}" for g in groups))


def comparison_rows(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of the comparison of settings: means, gains over the free rival and over the first one."""
    heads = ["setting", "seeds", "ε", *(kind.replace("_", " ") for kind in KINDS), "gain over the free rival"]
    heads.append(f"difference to {groups[0].label}")
    rows = []
    for group in groups:
        largest = max((run.epsilon for run in group.runs if run.epsilon is not None), default=None)
        row = [group.label, str(len(group.runs)), epsilon_text(largest)]
        for kind in KINDS:
            values = [100 * value for value in group.scores("final", kind).values()]
            row.append(Estimate.of(values).text() if len(values) == len(group.runs) else "-")
        own = group.scores("final", "local")
        for rival in (group.scores("free", "local"), groups[0].scores("final", "local")):
            gap = paired(own, rival)
            row.append("-" if gap is None else gap.text(sign=True))
        if group is groups[0]:
            row[-1] = ""
        rows.append(row)
    return heads, rows


def _compared(groups: Sequence[Group]) -> str:
    heads, rows = comparison_rows(groups)
    note = (
        '<p class="soft">Percent and points; mean ± half width of the 95 % interval where there are several seeds.</p>'
    )
    return _table(heads, rows) + note


def _governance(runs: Sequence[Run]) -> str:
    """Return the section for an ethics board: who is protected against whom, and what is not protected."""
    items = "".join(f"<li><b>{escape(name)}.</b> {escape(text)}</li>" for name, text in NOT_PROTECTED)
    parts = []
    for run in runs:
        releases = [release for release in run.summary["privacy"] if release["guarantee"] == "theorem"]
        if not releases:
            parts.append(f"<p>{escape(run.name)}: no proved guarantee.</p>")
            continue
        rows = [
            [str(r["release"]), str(r["unit"]), epsilon_text(r["epsilon"]), f"{r['delta'] or 0:g}", str(r["trusts"])]
            for r in releases
        ]
        table = _table(["release", "who is protected (unit)", "ε", "δ", "who is trusted"], rows)
        parts.append(f"<h3>{escape(run.name)}</h3>{table}")
    return _section(
        "For those who decide about the data", f"{''.join(parts)}<h3>What is not protected</h3><ul>{items}</ul>"
    )
