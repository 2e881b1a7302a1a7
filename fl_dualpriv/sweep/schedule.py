"""Run cells on Ray, one task a cell, on the cores of this machine or of an existing cluster.

Only this file imports ray. A cell writes into its own folder below the folder of the sweep, which every machine of a
cluster must see under the same path. A cell that was cut off is removed and run again; a finished one is never
repeated.
"""

import contextlib
import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_dualpriv.config.ranges import ConfigValue
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.files import write_json
from fl_dualpriv.flower import env as flower_env
from fl_dualpriv.flower import hook as flower_hook
from fl_dualpriv.run.cluster import machine
from fl_dualpriv.run.folder_lock import held_alone
from fl_dualpriv.sweep.cells import FAILED, Cell

_OBJECT_STORE_BYTES = 100 * 2**20  # results are small; Ray would take a third of the memory


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Machines and shares for cells.

    Attributes:
        workers: Cells at once on this machine; without meaning on a cluster, whose cores decide.
        cpus: Cores of one cell.
        gpus: GPUs of one cell; a fraction shares a GPU.
        address: Address of an existing Ray cluster, ``HOST:PORT``; empty starts Ray on this machine.
    """

    workers: int
    cpus: int = 1
    gpus: float = 0.0
    address: str = ""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A cell that has ended.

    Attributes:
        cell: The cell.
        error: Reason of its failure; empty if it succeeded.
        machine: Name of the machine, with the Ray node behind it.
        seconds: Wall-clock time.
    """

    cell: Cell
    error: str
    machine: str
    seconds: float


def run_cell(app_dir: Path, settings: Mapping[str, ConfigValue], out: Path, *, is_trial: bool) -> tuple[str, float]:
    """Run one cell in this process, and return the reason of its failure and its seconds.

    Args:
        app_dir: Folder of the Flower app.
        settings: Complete flat run configuration without its folder.
        out: The run's folder. What an interrupted run left there is removed.
        is_trial: True if a failure is a result, which is noted in the folder.
    """
    import torch

    from fl_dualpriv.flower.local import run_local

    torch.set_num_threads(1)
    start = time.monotonic()
    if not app_dir.is_dir():
        return f"{socket.gethostname()} has no folder {app_dir}: every machine must see the checkout there", 0.0
    shutil.rmtree(out, ignore_errors=True)  # the ledgers of an interrupted run would refuse this one
    try:
        run_local(app_dir, {**settings, "output.dir": str(out)})
    except Exception as error:  # a run can raise any error; others go on
        reason = f"{type(error).__name__}: {error}"
        if is_trial and not isinstance(error, ConfigError | OSError):  # those say nothing about the tuned values
            write_json(out / FAILED, {"type": type(error).__name__, "message": str(error)})
        return reason, time.monotonic() - start
    return "", time.monotonic() - start


def _task(app_dir: str, settings: dict[str, ConfigValue], out: str, is_trial: bool) -> tuple[str, float, str]:
    error, seconds = run_cell(Path(app_dir), settings, Path(out), is_trial=is_trial)
    return error, seconds, machine()


@contextlib.contextmanager
def _ray(resources: Resources) -> Iterator[Any]:
    """Connect to a cluster, or start Ray here with a folder that is removed afterwards.

    Raises:
        ConfigError: If the cluster does not answer.
    """
    for name, value in flower_env.RAY.items():
        os.environ.setdefault(name, value)
    flower_hook.reach_loopback_directly(os.environ)
    import ray

    home, before = None, signal.getsignal(signal.SIGTERM)
    try:
        if resources.address:
            try:
                ray.init(address=resources.address, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"resources.ray-address = {resources.address!r}: no Ray cluster answers there "
                    f"({type(error).__name__}); start one with `ray start --head`, or leave the key empty"
                ) from error
        else:
            home = flower_env.make_home()
            ray.init(
                address="local",
                num_cpus=resources.workers * resources.cpus,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=False,
                _temp_dir=str(home),
            )
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray replaces it by one that ends the process at once
        yield ray
    finally:
        ray.shutdown()
        if home is not None:
            shutil.rmtree(home, ignore_errors=True)


def run_cells(
    cells: Sequence[Cell],
    runs: Path,
    app_dir: Path,
    resources: Resources,
    report: Callable[[Ended, int, float | None], None],
    *,
    are_trials: bool = False,
) -> list[Ended]:
    """Run all cells that are not finished; a cell that fails does not stop the others.

    Args:
        cells: Cells; those with equal folders run once.
        runs: Folder of all runs.
        app_dir: Folder of the Flower app.
        resources: Machines and shares.
        report: Called after each cell with the number of cells that are left, and the seconds left as estimated from
            the cells so far.
        are_trials: True if failures are results.

    Returns:
        The cells that ran now, in the order in which they ended.

    Raises:
        ConfigError: If another sweep runs in ``runs``, or no cluster answers.
    """
    todo = {cell.folder: cell for cell in sorted(cells, key=_kinship) if not cell.is_done(runs)}
    done: list[Ended] = []
    if not todo:
        return done
    with _locked(runs), _ray(resources) as ray:
        _check_resources(resources, ray.cluster_resources())
        start, at_once = time.monotonic(), max(1, int(ray.cluster_resources().get("CPU", 1) // resources.cpus))
        # A worker process keeps data, model and features, so related cells follow each other. A cell that crashes its
        # process (memory) fails by itself; it is not tried again and again.
        task = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=0)(_task)
        waiting = {
            task.remote(str(app_dir), dict(cell.settings), str(runs / cell.folder), are_trials): cell
            for cell in todo.values()
        }
        while waiting:
            (reference,), _ = ray.wait(list(waiting), num_returns=1)
            cell = waiting.pop(reference)
            try:
                error, seconds, where = ray.get(reference)
            except ray.exceptions.RayError as crash:
                error, seconds, where = f"its process ended: {str(crash).splitlines()[0]}", 0.0, "?"
            ended = Ended(cell=cell, error=error, machine=where, seconds=seconds)
            done.append(ended)
            rounds_left = -(-len(waiting) // at_once)
            passed = (time.monotonic() - start) / -(-len(done) // at_once)
            report(ended, len(waiting), rounds_left * passed)
    return done


@contextlib.contextmanager
def _locked(runs: Path) -> Iterator[None]:
    """Hold the lock of the folder of all runs.

    Raises:
        ConfigError: If another sweep holds it, or the folder cannot be used.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held_alone(runs))
        except OSError as error:
            raise ConfigError(f"{runs} cannot be used for runs: {error.strerror or error}; give --runs") from error
        yield


def _check_resources(resources: Resources, offered: Mapping[str, float]) -> None:
    """Refuse shares that no machine can give, for which Ray would wait for ever.

    Raises:
        ConfigError: If a cell needs more than Ray has.
    """
    if not resources.gpus <= offered.get("GPU", 0.0):
        raise ConfigError(
            f"--gpus {resources.gpus:g}: Ray has {offered.get('GPU', 0.0):g} GPUs here; give at most that"
        )
    if resources.cpus > offered.get("CPU", 0.0):
        raise ConfigError(f"a cell needs {resources.cpus} CPUs, and Ray has {offered.get('CPU', 0.0):g}")


def _kinship(cell: Cell) -> tuple[str, ...]:
    """Return a sort key made of the values on which a run's data, model and features depend."""
    shared = ("backbone.", "data.", "pruning.visual")
    return (*(f"{k}={v}" for k, v in sorted(cell.settings.items()) if k.startswith(shared)), str(cell.seed))
