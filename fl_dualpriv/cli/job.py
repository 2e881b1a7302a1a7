"""A run or an audit that was checked and may start, shared by the commands. The module imports quickly."""

import json
import os
import time
import tomllib
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NoReturn

import typer
from rich.markup import escape

from fl_dualpriv.cli.console import Output
from fl_dualpriv.config import plugins
from fl_dualpriv.config.candidates import CANDIDATES_KEY, read_candidates
from fl_dualpriv.config.ranges import ConfigValue
from fl_dualpriv.config.schema import RunConfig, app_defaults, merge, parse_assignment, read_toml
from fl_dualpriv.data.formats.hub_names import HUB, absolute_name
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.run.folder_lock import held_alone
from fl_dualpriv.run.out_folder import prepare_folder
from fl_dualpriv.run.user_folders import expanded
from fl_dualpriv.tracking.base import check_tracker

_ENDING_SECONDS = 30.0


class Engine(StrEnum):
    """Engine that carries messages between server and clients. The results do not depend on it."""

    RAY = "ray"
    LOCAL = "local"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Run that was checked and may start."""

    app_dir: Path
    flat: dict[str, ConfigValue]
    config: RunConfig
    out: Path
    name: str
    engine: Engine
    data: tuple[str, ...] = ()  # description of the data, in lines for the operator


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
        ConfigError: If there are problems. The message has every problem of the configuration or of the data, or that
            of the folder.
        PrivacyError: If δ is too large for the number of records.
    """
    job = described(config, assignments, out, app_dir, engine)  # before the folder: a run that does not start
    prepare_folder(job.out, overwrite=overwrite)  # replaces no results
    return job


def described(
    config: Path, assignments: list[str], out: Path | None, app_dir: Path | None, engine: Engine = Engine.RAY
) -> Job:
    """Check configuration and data, and describe the data. Nothing is written.

    Raises:
        ConfigError: As in `prepare`, except for the folder.
        PrivacyError: As in `prepare`.
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
    defaults = app_defaults(app_dir)
    flat = merge(defaults, read_toml(config), sets)
    out = Path(out or str(flat.get("output.dir") or "") or f"runs/{config.stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    out = Path(os.path.abspath(expanded(out)))  # noqa: PTH100 - resolve() would also follow links
    flat |= {"output.dir": str(out)}
    try:
        flat, checked = settled(flat, defaults, app_dir, config)
    except (ConfigError, PrivacyError) as error:
        raise ConfigError("\n".join([*problems, str(error)])) from error
    if problems:
        raise ConfigError("\n".join(problems))
    check_tracker(checked.output.track)
    data = _look_at_data(checked)
    return Job(app_dir=app_dir, flat=flat, config=checked, out=out, name=config.stem, engine=engine, data=data)


def settled(
    flat: Mapping[str, ConfigValue], defaults: Mapping[str, ConfigValue], app_dir: Path, config: Path
) -> tuple[dict[str, ConfigValue], RunConfig]:
    """Complete a flat configuration, whose relative paths are those of the working directory, and check it.

    Args:
        flat: Every key of the app.
        defaults: The app's keys and their defaults.
        app_dir: Folder of the app.
        config: File of the configuration; classes of the user's own may lie beside it.

    Raises:
        ConfigError: If the configuration has problems. The message has all of them.
        PrivacyError: If it would claim a guarantee that it does not have.
    """
    whole = _with_candidates(absolute_paths(flat, Path.cwd()))
    whole = plugins.find_module(whole, app_dir, (Path.cwd(), config.absolute().parent))
    whole = plugins.pack_options(whole, defaults)
    return whole, RunConfig.from_run_config(whole)


def _with_candidates(flat: Mapping[str, ConfigValue]) -> dict[str, ConfigValue]:
    """Replace a file of candidates by its templates, because deployed nodes do not have the file."""
    value = str(flat.get(CANDIDATES_KEY, ""))
    if not Path(value).is_absolute():
        return dict(flat)
    return {**flat, CANDIDATES_KEY: "\n".join(read_candidates(value) or ())}


def _look_at_data(config: RunConfig) -> tuple[str, ...]:
    from fl_dualpriv.tasks.survey import survey  # late: it reads images

    return tuple(survey(config))


def resumed(out: Path, app_dir: Path | None, engine: Engine | None) -> Job:
    """Prepare to resume the run that was cut off in ``out``. The server app checks the content of the folder.

    Raises:
        ConfigError: If there is no run, it has ended, it still goes on, or its data cannot be used.
    """
    out = Path(os.path.abspath(expanded(out)))  # noqa: PTH100 - as in `prepare`
    file = out / "run.json"
    try:
        saved_job = json.loads(file.read_text(encoding="utf-8"))
        flat: dict[str, ConfigValue] = saved_job["config"] | {"output.dir": str(out), "output.resume": True}
        name, app, begun = str(saved_job["name"]), Path(saved_job["app"]), Engine(saved_job["engine"])
    except FileNotFoundError:
        raise ConfigError(f"{out} holds no run of `fl-dualpriv run` (run.json): nothing to resume") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} cannot be read: {type(error).__name__}: {error}; the run cannot be resumed"
        ) from error
    _refuse_ended(out)
    with held_alone(out, _ENDING_SECONDS):  # processes of a killed command end within seconds
        _refuse_ended(out)  # in these seconds they may have finished the run
        (out / "error.json").unlink(missing_ok=True)
    checked = RunConfig.from_run_config(flat)
    data = _look_at_data(checked)
    return Job(app_dir=app_dir or app, flat=flat, config=checked, out=out, name=name, engine=engine or begun, data=data)


def _refuse_ended(out: Path) -> None:
    if (out / "summary.json").exists():
        raise ConfigError(f"{out}: its run has ended (summary.json); nothing to resume")


def find_app(config: Path) -> Path:
    """Return the nearest folder around ``config``, else around the working directory, that holds a Flower app.

    Raises:
        ConfigError: If there is no such folder.
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
    """Make file paths absolute, because the engines do not run in the user's working directory."""
    result = dict(flat)
    for key in (*plugins.CLASS_PATHS, "data.path", "data.classes", "data.class-shares"):
        value = result.get(key)
        if isinstance(value, str) and value.startswith(HUB):  # the hub's name, or a path
            result[key] = HUB + absolute_name(value.removeprefix(HUB), base)
        elif isinstance(value, str) and value:
            result[key] = str(base / expanded(value))
    candidates = result.get(CANDIDATES_KEY)
    if isinstance(candidates, str) and candidates.startswith("~"):
        result[CANDIDATES_KEY] = str(expanded(candidates))
    name, pretrained = result.get("backbone.name"), result.get("backbone.pretrained")
    if isinstance(name, str) and name.startswith("local-dir:"):
        result["backbone.name"] = "local-dir:" + str(base / expanded(name.removeprefix("local-dir:")))
    if isinstance(name, str) and name.startswith("hf:"):  # a folder, or a name on the hub
        folder = base / expanded(name.removeprefix("hf:"))
        result["backbone.name"] = f"hf:{folder}" if folder.is_dir() else name
    # Any other value is a tag.
    if isinstance(pretrained, str) and pretrained.endswith((".safetensors", ".pt", ".pth", ".bin")):
        result["backbone.pretrained"] = str(base / expanded(pretrained))
    return result


def describe(error: Exception, out: Path) -> str:
    """Return one message for the user. If the error is not one of this package's, write its traceback to a file."""
    if isinstance(error, ValueError | RuntimeError) and type(error).__module__.startswith("fl_dualpriv"):
        return str(error)
    file = out / "error.log"
    file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return f"{type(error).__name__}: {error}\n  traceback: {file}"


def how_to_go_on(out: Path) -> str:
    """Return the command that resumes the run once the failure's cause is removed; empty if there is no checkpoint."""
    return f"\n  to go on from there: fl-dualpriv run --resume {out}" if (out / "checkpoint.bin").exists() else ""


def fail(errors: Output, message: str, status: int) -> NoReturn:
    """End the command with one message and this exit status."""
    errors.print(f"[bold red]error:[/bold red] {escape(message)}", soft_wrap=True, highlight=False)
    raise typer.Exit(status)
