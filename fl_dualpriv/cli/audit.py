"""``fl-dualpriv audit``: attack the releases of a configuration, and compare the findings with the claimed ε.

The module imports quickly, as `cli.main` does. The attacks belong to the app: they are loaded from its folder, and the
library knows only their names.
"""

import json
import os
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer
from rich.markup import escape

from fl_dualpriv.cli.console import Output, write_line
from fl_dualpriv.cli.job import describe, fail, prepare
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.flower.app_modules import import_from, put_first

_MODULE = "attacks.report"


class Attack(StrEnum):
    """Name of an attack."""

    EPSILON = "epsilon"
    MEMBERSHIP = "membership"
    INVERSION = "inversion"
    ALL = "all"


def audit(
    config: Annotated[Path, typer.Argument(help="TOML file with the keys that differ from the app's pyproject.toml.")],
    attack: Annotated[
        Attack,
        typer.Option(
            help="epsilon: planted canaries, a lower bound on ε with 95 % confidence; membership: of records, from "
            "published prompts; inversion: of an upload; all."
        ),
    ] = Attack.EPSILON,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the audit. Default: the configuration's.")] = None,
    canaries: Annotated[
        int | None, typer.Option(min=128, help="Canaries of epsilon: m of them prove at most about ln(m / 7).")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results. Default: runs/CONFIG-TIME.")] = None,
    app_dir: Annotated[
        Path | None, typer.Option("--app", help="Folder of the Flower app. Default: the one around CONFIG.")
    ] = None,
) -> None:
    """Attack a configuration with the code that a run uses. Print bound or score beside the claimed ε.

    The last line is one JSON object. The results' folder gets it as audit.json, and a plot as audit.png. Exit status:
    0, 1 if the audit failed or refuted the claim, 2 if it was not started.
    """
    errors = Output(stderr=True)
    changes = [*(assignments or []), *([] if seed is None else [f"seed={seed}"])]
    try:
        job = prepare(config, changes, out, app_dir, overwrite=False)
        if (job.out / "audit.json").exists():
            raise ConfigError(f"{job.out} holds an earlier audit (audit.json): give another --out")
    except (ConfigError, PrivacyError) as error:
        fail(errors, str(error), 2)
    for line in job.data:
        errors.print(escape(line), soft_wrap=True, highlight=False)  # stdout has only the results
    # Set before torch is loaded: many small products run fastest on one thread.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        attacks = load_attacks(job.app_dir)
        wanted = [a.value for a in Attack if attack in (a, Attack.ALL) and a is not Attack.ALL]
        options = {} if canaries is None else {"canaries": canaries}
        findings = attacks.run_attacks(job.config, wanted, write_line, **options)
        attacks.write_report(findings, job.config, job.out)
    except KeyboardInterrupt:
        fail(errors, "stopped by Ctrl-C", 130)
    except (ConfigError, PrivacyError) as error:
        fail(errors, str(error), 2)
    except Exception as error:
        fail(errors, describe(error, job.out), 1)
    write_line(f"results: {job.out}")
    write_line(json.dumps(findings.summary(), allow_nan=False))
    if findings.refuted:
        levels = " and ".join(f"{a.level} level" for a in findings.refuted)
        fail(errors, f"the audit refutes the claimed ε ({levels}): the releases do not keep their guarantee", 1)


def load_attacks(app_dir: Path) -> ModuleType:
    """Import the app's attacks.

    Raises:
        ConfigError: If the app has none: the bundle that Flower sends to nodes leaves them out.
    """
    put_first(app_dir)
    try:
        return import_from(app_dir, _MODULE)
    except ModuleNotFoundError as error:
        if not (error.name and _MODULE.startswith(error.name)):
            raise
        raise ConfigError(
            f"{app_dir} has no {_MODULE.replace('.', '/')}.py: give the folder of a whole checkout with --app"
        ) from error
