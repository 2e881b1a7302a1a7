"""Measuring code of all benchmarks: interleaved peers, at least three repeats, CPU and wall time, equal results.

A ratio is formed only from figures of one run. Ratios use the best CPU seconds of each contestant, because other work
on a shared machine can only add to a time.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks import machine
from benchmarks.process_tree import TreeUse, marked_environment, tree_use

CHECKOUT = Path(__file__).parents[1]
BENCH_DIR = CHECKOUT / ".bench"
"""Folder of downloaded peers, generated images and results; it can be removed at any time."""
RESULTS = BENCH_DIR / "results.jsonl"
_POLL_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One measurement; ``peak_mib`` is 0 if it was not measured."""

    wall: float
    cpu: float
    peak_mib: float = 0.0


@dataclass(frozen=True)
class Costs:
    """All repeats of one contestant, per unit of work."""

    samples: tuple[Cost, ...]

    @property
    def best(self) -> float:
        """Least CPU seconds."""
        return min(cost.cpu for cost in self.samples)

    @property
    def median(self) -> float:
        """Median CPU seconds."""
        return statistics.median(cost.cpu for cost in self.samples)

    @property
    def spread(self) -> float:
        """(Most − least) / median CPU seconds."""
        return (max(cost.cpu for cost in self.samples) - self.best) / self.median

    def per(self, units: float) -> "Costs":
        """Return the costs per unit of work."""
        return Costs(tuple(Cost(wall=c.wall / units, cpu=c.cpu / units, peak_mib=c.peak_mib) for c in self.samples))

    def as_json(self) -> dict[str, float]:
        """Return the figures for a JSON line, rounded to four significant digits, and memory to whole MiB."""
        return {
            "cpu_best": _round(self.best),
            "cpu_median": _round(self.median),
            "spread": _round(self.spread),
            "wall_best": _round(min(cost.wall for cost in self.samples)),
            "peak_mib": round(max(cost.peak_mib for cost in self.samples)),
            "repeats": len(self.samples),
        }


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def interleaved(contestants: Mapping[str, Callable[[], Cost]], repeats: int, *, warm_ups: int = 0) -> dict[str, Costs]:
    """Run all contestants in turn, once per repeat, and in the reverse order in every other repeat.

    Args:
        contestants: Name → one measured run.
        repeats: Measured runs of each contestant.
        warm_ups: Earlier runs of each contestant, whose costs are dropped.
    """
    samples: dict[str, list[Cost]] = {name: [] for name in contestants}
    for turn in range(-warm_ups, repeats):
        names = list(contestants)
        for name in names if turn % 2 == 0 else reversed(names):
            cost = contestants[name]()
            if turn >= 0:
                samples[name].append(cost)
    return {name: Costs(tuple(taken)) for name, taken in samples.items()}


def timed(work: Callable[[], object], times: int = 1) -> Callable[[], Cost]:
    """Return a contestant that runs in this process.

    Its cost is that of one call of ``work``: CPU time of this process and of children that ended and were waited for.
    """

    def run() -> Cost:
        wall, cpu = time.perf_counter(), _own_cpu()
        for _ in range(times):
            work()
        return Cost(wall=(time.perf_counter() - wall) / times, cpu=(_own_cpu() - cpu) / times)

    return run


def _own_cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


@dataclass(frozen=True, kw_only=True)
class RoundsRun:
    """A federation in separate processes, which appends a line to a file after every round.

    Attributes:
        command: Command that starts the federation.
        rounds_file: The file with a line per round; it must not exist before.
        first: Number of lines after which the clock starts, so that warm-up rounds are dropped.
        last: Number of lines after which the clock stops.
        log: File for the federation's output.
        environment: Additional environment variables.
    """

    command: Sequence[str]
    rounds_file: Path
    first: int
    last: int
    log: Path
    environment: Mapping[str, str]

    def measure(self, timeout: float = 600.0) -> Cost:
        """Run to the end; return the cost of the whole process tree between the two lines.

        Raises:
            RuntimeError: If the federation fails, or ends before the last line.
        """
        mark, environment = marked_environment({**os.environ, **self.environment})
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as stream:
            process = subprocess.Popen(
                self.command, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
            )
        try:
            start, _ = self._wait_for(self.first, process, mark, timeout)
            end, use = self._wait_for(self.last, process, mark, timeout)
            status = process.wait(timeout=timeout)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            raise RuntimeError(f"{' '.join(self.command)}: {error}\n{self._tail()}") from error
        finally:
            if process.poll() is None:
                process.terminate()  # the engines end the processes that they started
                process.wait(timeout=60)
        if status != 0:
            raise RuntimeError(f"{' '.join(self.command)}: exit status {status}\n{self._tail()}")
        return Cost(wall=end.wall - start.wall, cpu=end.cpu - start.cpu, peak_mib=use.peak_mib)

    def _wait_for(
        self, lines: int, process: "subprocess.Popen[bytes]", mark: str, timeout: float
    ) -> tuple[Cost, TreeUse]:
        deadline = time.monotonic() + timeout
        while self._lines() < lines:
            if process.poll() is not None and self._lines() < lines:
                raise RuntimeError(f"ended after {self._lines()} of {lines} rounds")
            if time.monotonic() > deadline:
                raise RuntimeError(f"only {self._lines()} of {lines} rounds ended within {timeout:.0f} s")
            time.sleep(_POLL_SECONDS)
        wall, use = time.perf_counter(), tree_use(process.pid, mark)
        return Cost(wall=wall, cpu=use.cpu), use

    def _lines(self) -> int:
        return self.rounds_file.read_bytes().count(b"\n") if self.rounds_file.exists() else 0

    def _tail(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-3000:]


def assert_equal(what: str, difference: float, allowed: float) -> float:
    """Return the difference, or stop the benchmark, because a fast wrong result must not count.

    Raises:
        AssertionError: If the difference exceeds the allowed one or is not a number.
    """
    if not difference <= allowed:
        raise AssertionError(f"{what}: results differ by {difference:.2e}, allowed {allowed:.0e}")
    return difference


def relative_difference(ours: Any, theirs: Any) -> float:
    """Return ‖ours − theirs‖ / ‖theirs‖ of two tensors."""
    return float((ours - theirs).norm() / theirs.norm())


def emit(
    name: str,
    *,
    headline: Mapping[str, float],
    costs: Mapping[str, Costs],
    unit: str,
    details: Mapping[str, Any],
    results: Path = RESULTS,
    kind: Literal["full", "self-check"] = "full",
) -> None:
    """Append one JSON line with everything to ``results`` and print the headline as the last line.

    Args:
        name: Name of the benchmark.
        headline: Name of a figure → its value; most are ratios.
        costs: Costs of each contestant per unit of work.
        unit: Name of the unit of work.
        details: Other results to store.
        results: File of JSON lines; a self-check does not write to it.
        kind: ``self-check`` for toy sizes, whose ratios mean nothing.
    """
    rounded = {key: _round(value) for key, value in headline.items()}
    for contestant, taken in costs.items():
        figures = taken.as_json()
        print(
            f"{contestant:>28}: {figures['cpu_best']:.4g} CPU-s per {unit} (median {figures['cpu_median']:.4g}, spread "
            f"{100 * figures['spread']:.0f} %), wall {figures['wall_best']:.4g} s"
        )
    for key, value in details.items():
        print(f"{key:>28}: {value}")
    if kind == "full":
        line = {
            "benchmark": name,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine.facts(),
            "headline": rounded,
            "unit": unit,
            "costs": {contestant: taken.as_json() for contestant, taken in costs.items()},
            "details": dict(details),
        }
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, allow_nan=False) + "\n")
    print(json.dumps(rounded, allow_nan=False))
    sys.stdout.flush()
