"""``fl-dualpriv run``: check everything, run an engine, show progress, print results and privacy table.

The exit status is 0 if the run ended well and left its results, 1 if it failed, 2 if it was not started, and 130 after
Ctrl-C. The module imports quickly: only the engine loads Flower, Ray and torch.
"""

import json
import logging
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich.markup import escape

from fl_dualpriv.cli.console import Output
from fl_dualpriv.cli.job import Engine, Job, describe, fail, how_to_go_on, prepare, resumed
from fl_dualpriv.cli.progress import shown
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.files import write_bytes
from fl_dualpriv.report.page import page
from fl_dualpriv.report.runs import read_run
from fl_dualpriv.run.cluster import cluster_address
from fl_dualpriv.run.file_kinds import REPORT, path_of, read_totals, results_in
from fl_dualpriv.run.out_folder import is_refusal, progress_of
from fl_dualpriv.run.peak_memory import describe_peaks
from fl_dualpriv.run.tables import headline, privacy_table, results_table

_PIPE_WIDTH = 180  # a log has no width; rich would assume 80 and break words of the privacy table


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
    out: Annotated[Path | None, typer.Option(help="Folder for the results. Default: runs/CONFIG-TIME.")] = None,
    app_dir: Annotated[
        Path | None, typer.Option("--app", help="Folder of the Flower app. Default: the one around CONFIG.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove an earlier run's results from the folder.")
    ] = False,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Resume the run that was cut off in this folder; no CONFIG.")
    ] = None,
) -> None:
    """Run one federation, show its progress, print its results and its privacy table.

    CONFIG is a TOML file with the keys that differ from the app's pyproject.toml.
    """
    # Problems of the configuration, the data and the folder are told before any process starts.
    console, errors = Output(pipe_width=_PIPE_WIDTH), Output(stderr=True)
    try:
        if resume is not None:
            if config or assignments or out or overwrite:
                raise ConfigError(
                    "--resume takes its configuration from DIR: omit CONFIG, --set, --out and --overwrite"
                )
            job = resumed(resume, app_dir, engine)
        elif config is None:
            raise ConfigError("no CONFIG: give a TOML file, or --resume DIR")
        else:
            job = prepare(config, assignments or [], out, app_dir, overwrite=overwrite, engine=engine or Engine.RAY)
            saved_job = {"name": job.name, "app": str(job.app_dir), "engine": job.engine, "config": job.flat}
            (job.out / "run.json").write_text(json.dumps(saved_job, indent=2) + "\n", encoding="utf-8")
    except (ConfigError, PrivacyError) as error:
        fail(errors, str(error), 2)
    signal.signal(signal.SIGTERM, _terminated)  # so that the engine cleans up
    # Facts that a user wants to read before the wait.
    nodes = job.config.num_supernodes
    hosts = f" on {nodes} nodes" if nodes < job.config.population else ""
    console.print(
        f"{job.name}: {job.config.method}, {job.config.population} clients{hosts}, engine {job.engine}", highlight=False
    )
    for line in job.data:
        console.print(escape(line), soft_wrap=True, highlight=False)
    if job.engine == Engine.RAY:
        console.print(
            f"starting Flower and Ray, about half a minute until round 1; log: {escape(str(job.out / 'flower.log'))}",
            soft_wrap=True,
            highlight=False,
        )
    # The engine writes its progress into files of the folder. `shown` reads them while it runs.
    before = progress_of(job.out)
    try:
        with shown(console, job.out, job.config.rounds):
            run_engine(job.engine, job)
    except KeyboardInterrupt:
        fail(errors, f"stopped by Ctrl-C; the files so far are in {job.out}{how_to_go_on(job.out)}", 130)
    except Exception as error:
        refused = is_refusal(error, job.out) and progress_of(job.out) == before
        fail(errors, describe(error, job.out) + how_to_go_on(job.out), 2 if refused else 1)
    # Results are read from the files, as any later reader would.
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
    try:
        write_bytes(path_of(job.out, REPORT, "result"), page([read_run(job.out)]).encode())
        console.print(f"report: {escape(str(job.out / REPORT))}", soft_wrap=True, highlight=False)
    except (OSError, ConfigError) as error:  # the results are there, and `fl-dualpriv report` can come later
        console.print(f"no report was written: {escape(str(error))}", soft_wrap=True, highlight=False)
    console.print(f"results: {escape(str(job.out))}", soft_wrap=True, highlight=False)
    if any(release["guarantee"] == "theorem" for release in summary["privacy"]):
        names = ", ".join(results_in(job.out))
        console.print(
            f"made of the releases in the table: {escape(names)}; no ε covers the other files there: they are the "
            "operator's, do not publish them",
            soft_wrap=True,
            highlight=False,
        )


def run_engine(engine: Engine, job: Job) -> None:
    """Run ``job`` to its end; raise an error if it fails."""
    if engine is Engine.LOCAL:
        # Set before torch is loaded. One thread, as in Ray's actors, so that sums have the same order in both engines.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        from fl_dualpriv.flower.local import run_local

        logging.getLogger("flwr").setLevel(logging.WARNING)  # its progress lines would mix with ours
        run_local(job.app_dir, job.flat)
    else:
        from fl_dualpriv.flower.engine import run_flower

        run_flower(
            job.app_dir,
            job.flat,
            num_supernodes=job.config.num_supernodes,
            cpus_per_client=job.config.resources.cpus_per_client,
            gpus_per_client=job.config.resources.gpus_per_client,
            work_dir=job.out,
            ray_address=cluster_address(job.config.resources.ray_address),
        )


def _terminated(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
