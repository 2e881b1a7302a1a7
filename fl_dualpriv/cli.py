"""``fl-dualpriv``: the thin front. Checks everything first, runs an engine, and its exit status is true.

0: the run ended well and left its results; 1: it failed; 2: it was not started; 130: Ctrl-C. Light on import: Flower,
Ray and torch come with the engine.
"""

import json
import logging
import os
import signal
import sys
import time
import tomllib
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape

from fl_dualpriv import flower_env, flower_hook, node_command, plugins
from fl_dualpriv.audit_command import audit
from fl_dualpriv.budget_command import budget
from fl_dualpriv.config import RunConfig, app_defaults, merge, parse_assignment, read_toml
from fl_dualpriv.config_rules import ConfigValue
from fl_dualpriv.console import Output, spell_out_what_cannot_be_shown
from fl_dualpriv.data.hub_names import HUB, absolute_name
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.export_command import export
from fl_dualpriv.folder_lock import held_alone
from fl_dualpriv.new_strategy_command import new_strategy
from fl_dualpriv.out_folder import is_refusal, prepare_folder, progress_of
from fl_dualpriv.peak_memory import describe_peaks
from fl_dualpriv.predict_command import predict
from fl_dualpriv.progress import shown
from fl_dualpriv.run_files import read_totals, results_in
from fl_dualpriv.tables import headline, privacy_table, results_table
from fl_dualpriv.user_folders import expanded, home, settle_home


class _Front(typer.Typer):
    """The commands, for an output of any encoding; help is printed before any function here is called."""

    def __call__(self, *words: Any, **named: Any) -> Any:
        spell_out_what_cannot_be_shown()
        return super().__call__(*words, **named)


app = _Front(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(node_command.app, name="node")
app.command()(budget)
app.command()(audit)
app.command()(new_strategy)
app.command()(export)
app.command()(predict)

_ENDING_SECONDS = 30.0
_PIPE_WIDTH = 180  # a log has no width of its own; rich would take 80 and break the privacy table's words


class Engine(StrEnum):
    """What carries messages between server and clients; results are the same."""

    RAY = "ray"
    LOCAL = "local"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that has been checked and may start."""

    app_dir: Path
    flat: dict[str, ConfigValue]
    config: RunConfig
    out: Path
    name: str
    engine: Engine
    data: tuple[str, ...] = ()  # what it loads, in lines for its operator


@app.callback()
def _root() -> None:
    """Federated prompt learning with differential privacy that is true."""
    errors = Output(stderr=True)
    try:
        note = settle_home()
    except ConfigError as error:
        fail(errors, str(error), 2)
    if note:
        errors.print(f"note: {escape(note)}", soft_wrap=True, highlight=False)


@app.command()
def run(
    config: Annotated[
        Path | None, typer.Argument(help="TOML file with the keys that differ from the app's pyproject.toml.")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key; may be repeated.")
    ] = None,
    engine: Annotated[
        Engine | None, typer.Option(help="ray: Flower's simulation, the default; local: one process.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; without it runs/CONFIG-TIME.")] = None,
    app_dir: Annotated[
        Path | None, typer.Option("--app", help="Folder of the Flower app; without it the one around CONFIG.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove an earlier run's results from the folder.")
    ] = False,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Go on with the run that was cut off in this folder; no CONFIG.")
    ] = None,
) -> None:
    """Run one federation, show its progress, print its results and its privacy table.

    CONFIG is a TOML file with the keys that differ from the app's pyproject.toml.
    """
    console, errors = Output(pipe_width=_PIPE_WIDTH), Output(stderr=True)
    try:
        if resume is not None:
            if config or assignments or out or overwrite:
                raise ConfigError(
                    "--resume takes its configuration from DIR: leave CONFIG, --set, --out and --overwrite out"
                )
            job = resumed(resume, app_dir, engine)
        elif config is None:
            raise ConfigError("no CONFIG: give a TOML file, or --resume DIR")
        else:
            job = prepare(config, assignments or [], out, app_dir, overwrite=overwrite, engine=engine or Engine.RAY)
            kept = {"name": job.name, "app": str(job.app_dir), "engine": job.engine, "config": job.flat}
            (job.out / "run.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    except (ConfigError, PrivacyError) as error:
        fail(errors, str(error), 2)
    signal.signal(signal.SIGTERM, _terminated)  # so that the engine cleans up
    nodes = job.config.num_supernodes
    hosts = f" on {nodes} nodes" if nodes < job.config.population else ""
    console.print(
        f"{job.name}: {job.config.method}, {job.config.population} clients{hosts}, engine {job.engine}", highlight=False
    )
    for line in job.data:
        console.print(escape(line), soft_wrap=True, highlight=False)
    if job.engine == Engine.RAY:
        console.print(
            f"starting Flower and Ray, half a minute before round 1; their log: {escape(str(job.out / 'flower.log'))}",
            soft_wrap=True,
            highlight=False,
        )
    before = progress_of(job.out)
    try:
        with shown(console, job.out, job.config.rounds):
            run_engine(job.engine, job)
    except KeyboardInterrupt:
        fail(errors, f"stopped by Ctrl-C; what there is lies in {job.out}{how_to_go_on(job.out)}", 130)
    except Exception as error:
        refused = is_refusal(error, job.out) and progress_of(job.out) == before
        fail(errors, describe(error, job.out) + how_to_go_on(job.out), 2 if refused else 1)
    summary_file = job.out / "summary.json"
    if not summary_file.exists():
        fail(errors, f"the run ended without results: {summary_file} was not written", 1)
    summary = json.loads(summary_file.read_text(encoding="utf-8"))
    console.print(headline(summary, read_totals(job.out)), soft_wrap=True, highlight=False)
    console.print(results_table(summary))
    if summary["privacy"]:
        console.print(privacy_table(summary["privacy"]))
    for note in summary.get("notes", []):
        console.print(f"note: {escape(note)}", soft_wrap=True, highlight=False)
    if peaks := describe_peaks(job.out):
        console.print(peaks, soft_wrap=True, highlight=False)
    console.print(f"results: {escape(str(job.out))}", soft_wrap=True, highlight=False)
    if any(release["guarantee"] == "theorem" for release in summary["privacy"]):
        names = ", ".join(results_in(job.out))
        console.print(
            f"made of the releases in the table: {escape(names)}; no ε covers the other files there: they are the "
            "operator's, do not publish them",
            soft_wrap=True,
            highlight=False,
        )


@app.command()
def env() -> None:
    """Print `export` lines for Flower's own commands where `make setup` has not installed its hook.

    Call `flwr run` from an empty folder then: the simulation looks for modules in the working directory first.
    """
    try:
        variables = flower_env.installed()
    except FileNotFoundError:
        folder = home() / ".fl-dualpriv" / "flower"
        try:
            variables = flower_env.for_user(folder)
        except OSError as error:
            fail(
                Output(stderr=True),
                f"{folder} cannot be used: {error.strerror or error}; set HOME to another folder",
                2,
            )
    sys.stdout.write(flower_env.exports(variables | flower_hook.proxy_changes(os.environ)) + "\n")


def prepare(
    config: Path,
    assignments: list[str],
    out: Path | None,
    app_dir: Path | None,
    *,
    overwrite: bool,
    engine: Engine = Engine.RAY,
) -> Job:
    """Check configuration, data and output folder before anything starts.

    Raises:
        ConfigError: With every problem of the configuration or of the data, or the one of the folder.
        PrivacyError: A δ says nothing about data of this size.
    """
    app_dir = find_app(config) if app_dir is None else app_dir.resolve()
    sets: dict[str, ConfigValue] = {}
    problems = []
    for text in assignments:
        try:
            key, value = parse_assignment(text)
            sets[key] = value
        except ConfigError as error:
            problems.append(f"--set: {error}")
    flat = merge(app_defaults(app_dir), read_toml(config), sets)
    out = Path(out or str(flat.get("output.dir") or "") or f"runs/{config.stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    out = Path(os.path.abspath(expanded(out)))  # noqa: PTH100 - resolve() would also follow links
    flat = absolute_paths(flat | {"output.dir": str(out)}, Path.cwd())
    try:
        flat = plugins.find_module(flat, app_dir, (Path.cwd(), config.absolute().parent))
        flat = plugins.pack_options(flat, app_defaults(app_dir))
        checked = RunConfig.from_run_config(flat)
    except (ConfigError, PrivacyError) as error:
        raise ConfigError("\n".join([*problems, str(error)])) from error
    if problems:
        raise ConfigError("\n".join(problems))
    data = _look_at_data(checked)  # before the folder: a run that does not start replaces nothing
    prepare_folder(out, overwrite=overwrite)
    return Job(app_dir=app_dir, flat=flat, config=checked, out=out, name=config.stem, engine=engine, data=data)


def _look_at_data(config: RunConfig) -> tuple[str, ...]:
    from fl_dualpriv.survey import survey  # late: it reads images

    return tuple(survey(config))


def resumed(out: Path, app_dir: Path | None, engine: Engine | None) -> Job:
    """The run that was cut off in ``out``; what the folder holds the server app checks.

    Raises:
        ConfigError: If there is none, it has ended, it is still going on, or its data cannot be used.
    """
    out = Path(os.path.abspath(expanded(out)))  # noqa: PTH100 - as in `prepare`
    file = out / "run.json"
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        flat: dict[str, ConfigValue] = kept["config"] | {"output.dir": str(out), "output.resume": True}
        name, app, begun = str(kept["name"]), Path(kept["app"]), Engine(kept["engine"])
    except FileNotFoundError:
        raise ConfigError(f"{out} holds no run of `fl-dualpriv run` (run.json): nothing to resume") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} cannot be read: {type(error).__name__}: {error}; the run cannot be resumed"
        ) from error
    _refuse_ended(out)
    with held_alone(out, _ENDING_SECONDS):  # processes of a front that was killed are ended within seconds
        _refuse_ended(out)  # in these seconds they may have ended the run
        (out / "error.json").unlink(missing_ok=True)
    checked = RunConfig.from_run_config(flat)
    data = _look_at_data(checked)
    return Job(app_dir=app_dir or app, flat=flat, config=checked, out=out, name=name, engine=engine or begun, data=data)


def _refuse_ended(out: Path) -> None:
    if (out / "summary.json").exists():
        raise ConfigError(f"{out}: its run has ended (summary.json); nothing is to be resumed")


def find_app(config: Path) -> Path:
    """The nearest folder around ``config``, else around the working directory, that holds a Flower app.

    Raises:
        ConfigError: If there is none.
    """
    for start in (config.resolve().parent, Path.cwd()):
        for folder in (start, *start.parents):
            file = folder / "pyproject.toml"
            if file.is_file() and "app" in _table(file).get("tool", {}).get("flwr", {}):
                return folder
    raise ConfigError(f"no Flower app around {config} or {Path.cwd()}: give the folder of the checkout with --app")


def _table(file: Path) -> dict:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def absolute_paths(flat: Mapping[str, ConfigValue], base: Path) -> dict[str, ConfigValue]:
    """Make file paths absolute: the engines run in other folders than the one the user types in."""
    result = dict(flat)
    for key in ("strategy.path", "data.path", "data.classes"):
        value = result.get(key)
        if isinstance(value, str) and value.startswith(HUB):  # the hub's name, or a path
            result[key] = HUB + absolute_name(value.removeprefix(HUB), base)
        elif isinstance(value, str) and value:
            result[key] = str(base / expanded(value))
    name, pretrained = result.get("backbone.name"), result.get("backbone.pretrained")
    if isinstance(name, str) and name.startswith("local-dir:"):
        result["backbone.name"] = "local-dir:" + str(base / expanded(name.removeprefix("local-dir:")))
    if isinstance(name, str) and name.startswith("hf:"):  # a folder, or a name on the hub
        folder = base / expanded(name.removeprefix("hf:"))
        result["backbone.name"] = f"hf:{folder}" if folder.is_dir() else name
    # Else it is a tag.
    if isinstance(pretrained, str) and pretrained.endswith((".safetensors", ".pt", ".pth", ".bin")):
        result["backbone.pretrained"] = str(base / expanded(pretrained))
    return result


def run_engine(engine: Engine, job: Job) -> None:
    """Run ``job`` to its end; raises if it fails."""
    if engine is Engine.LOCAL:
        # Before torch is loaded. One thread, as in Ray's actors: sums then have one order in both engines.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        from fl_dualpriv.local_engine import run_local

        logging.getLogger("flwr").setLevel(logging.WARNING)  # its progress lines would break into ours
        run_local(job.app_dir, job.flat)
    else:
        from fl_dualpriv.flower_engine import run_flower

        run_flower(
            job.app_dir,
            job.flat,
            num_supernodes=job.config.num_supernodes,
            cpus_per_client=job.config.resources.cpus_per_client,
            gpus_per_client=job.config.resources.gpus_per_client,
            work_dir=job.out,
        )


def describe(error: Exception, out: Path) -> str:
    """One message for the user; where the error is not one of ours, the traceback goes to a file."""
    if isinstance(error, ValueError | RuntimeError) and type(error).__module__.startswith("fl_dualpriv"):
        return str(error)
    file = out / "error.log"
    file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return f"{type(error).__name__}: {error}\n  traceback: {file}"


def how_to_go_on(out: Path) -> str:
    """What to call when the cause of a failure is gone; nothing if the run left nothing to go on from."""
    return f"\n  to go on from there: fl-dualpriv run --resume {out}" if (out / "checkpoint.bin").exists() else ""


def _terminated(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def fail(errors: Output, message: str, status: int) -> NoReturn:
    """End the command with one message and this exit status."""
    errors.print(f"[bold red]error:[/bold red] {escape(message)}", soft_wrap=True, highlight=False)
    raise typer.Exit(status)


if __name__ == "__main__":
    app()
