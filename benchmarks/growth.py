"""Cost of a client-step, and memory, when the population grows from 100 to 10,000 and the expected cohort stays at 50.

The runs use client-level DP with Poisson cohorts, the demo's text tower, two records per client, two Flower nodes and a
warm feature cache, and start our app from the command line. The cost leaves out start-up (reading the folder, finding
all clients), which is printed separately. One whole run with 10,000 clients on Ray follows. It must end without a
failure and with the epsilon of dp-accounting.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import machine

machine.one_thread()

from benchmarks.harness import BENCH_DIR, Cost, assert_equal, emit, interleaved  # noqa: E402
from benchmarks.images import sketch_folder  # noqa: E402
from benchmarks.our_runs import Engine, our_run, summary  # noqa: E402
from fl_dualpriv.config.ranges import ConfigValue  # noqa: E402
from fl_dualpriv.privacy.noise import KeyedRandom, StreamKey, poisson_sample  # noqa: E402

POPULATIONS = (100, 1_000, 10_000)
COHORT, STEPS, RECORDS, SUPERNODES = 50, 5, 2, 2
_WARM, _ROUNDS, _WHOLE_ROUNDS = 3, 13, 5
_SEED, _NOISE_MULTIPLIER = 0, 1.0
_CLASSES = 100


def settings(population: int, cohort: int, rounds: int) -> dict[str, ConfigValue]:
    """Return our configuration for a population; the generated images are cached."""
    classes = min(_CLASSES, population)
    data = sketch_folder(
        BENCH_DIR / f"population-{population}", classes, {"train": population * RECORDS // classes + 2}
    )
    return {
        "method": "promptfl",
        "rounds": rounds,
        "population": population,
        "supernodes": SUPERNODES,
        "seed": _SEED,
        "strategy.ref": "strategies.fedavg:FedAvg",
        "train.local-steps": STEPS,
        "train.sampling-rate": 1.0,
        "train.global-learning-rate": 0.05,
        "privacy.randomness": "seeded",
        "privacy.record.mechanism": "none",
        "privacy.client.mechanism": "gaussian",
        "privacy.client.calibrate-to": "noise-multiplier",
        "privacy.client.noise-multiplier": _NOISE_MULTIPLIER,
        "privacy.client.delta": _delta(population),
        "privacy.client.clip-norm": 0.25,
        "privacy.client.expected-cohort": float(cohort),
        "data.path": str(data / "images"),
        "data.classes": str(data / "classes.json"),
        "data.partition": "iid",
        # One image per class is enough for these splits, which are private here and never scored.
        "data.val-fraction": 1e-6,
        "data.test-fraction": 1e-6,
        "resources.device": "cpu",
        "resources.feature-cache": str(BENCH_DIR / "features"),
    }


def _delta(population: int) -> float:
    return 1 / (10 * population)


def client_steps(population: int, cohort: int, after: int, until: int) -> int:
    """Count the client-steps of the rounds after ``after`` up to ``until``, whose Poisson cohorts the seed fixes."""

    def members(server_round: int) -> int:
        source = KeyedRandom(StreamKey(seed=_SEED, purpose="cohort", server_round=server_round))
        return len(poisson_sample(source, population, cohort / population))

    return STEPS * sum(members(server_round) for server_round in range(after + 1, until + 1))


def measured(folder: Path, population: int, cohort: int, rounds: int, started: dict[int, float]) -> Callable[[], Cost]:
    """Return a contestant that runs one population."""

    def run() -> Cost:
        target = folder / f"{population}-{time.monotonic_ns()}"
        start = time.monotonic()
        cost = our_run(target, settings(population, cohort, rounds), "local", first=_WARM, last=rounds - 1).measure()
        started[population] = time.monotonic() - start - cost.wall
        summary(target)
        shutil.rmtree(target)
        steps = client_steps(population, cohort, _WARM, rounds - 1)
        print(f"{population}: {1e3 * cost.cpu / steps:.3f} CPU-ms per client-step", file=sys.stderr, flush=True)
        return Cost(wall=cost.wall / steps, cpu=cost.cpu / steps, peak_mib=cost.peak_mib)

    return run


def whole_run(folder: Path, population: int, cohort: int, rounds: int, engine: Engine) -> dict[str, Any]:
    """Run once to the end and compare the stated epsilon with that of dp-accounting.

    Raises:
        AssertionError: If a client failed, or if the two epsilons differ.
    """
    start = time.monotonic()
    target = folder / "whole"
    cost = our_run(target, settings(population, cohort, rounds), engine, first=1, last=rounds).measure()
    run_summary = summary(target)
    stated = max(release["epsilon"] for release in run_summary["privacy"] if release["unit"] == "client")
    direct = epsilon_by_dp_accounting(cohort / population, rounds, _delta(population))
    # The plan rounds up on a grid, so its epsilon is close to the direct one and never below it.
    assert_equal("stated epsilon against dp-accounting", abs(stated - direct) / direct, 0.01)
    if stated < direct * (1 - 1e-3):
        raise AssertionError(f"stated epsilon {stated} is below dp-accounting's {direct}")
    shutil.rmtree(target)
    return {
        "engine": engine,
        "population": population,
        "rounds": rounds,
        "failures": 0,  # `summary` refuses any other number
        "epsilon, stated": round(stated, 4),
        "epsilon, dp-accounting": round(direct, 4),
        "delta": _delta(population),
        "seconds": round(time.monotonic() - start, 1),
        "peak MiB of the process tree": round(cost.peak_mib),
    }


def epsilon_by_dp_accounting(sampling_rate: float, rounds: int, delta: float) -> float:
    """Compute epsilon by PLD for add-or-remove-one and Poisson cohorts, without any code of this project."""
    import dp_accounting
    from dp_accounting import pld

    event = dp_accounting.PoissonSampledDpEvent(sampling_rate, dp_accounting.GaussianDpEvent(_NOISE_MULTIPLIER))
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    return accountant.compose(dp_accounting.SelfComposedDpEvent(event, rounds)).get_epsilon(delta)


def main(arguments: list[str] | None = None) -> None:
    """Fill the caches, measure, run on Ray and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--self-check", action="store_true", help="8 and 16 clients without Ray; the ratio means nothing"
    )
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    toy = options.self_check
    populations, cohort, rounds = ((8, 16), 4, _WARM + 3) if toy else (POPULATIONS, COHORT, _ROUNDS)
    started: dict[int, float] = {}
    with tempfile.TemporaryDirectory(prefix="fdp-bench-") as name:
        folder = Path(name)
        for population in populations:
            warm_up = folder / f"warm-{population}"
            our_run(warm_up, settings(population, cohort, 2), "local", first=1, last=2).measure()
        costs = interleaved(
            {str(n): measured(folder, n, cohort, rounds, started) for n in populations}, 1 if toy else options.repeats
        )
        whole = whole_run(folder, populations[-1], cohort, 3 if toy else _WHOLE_ROUNDS, "local" if toy else "ray")
    smallest, largest = costs[str(populations[0])], costs[str(populations[-1])]
    emit(
        "growth",
        headline={"growth": largest.best / smallest.best},
        costs=costs,
        unit="client-step",
        details={
            "peak MiB": {name: round(max(cost.peak_mib for cost in taken.samples)) for name, taken in costs.items()},
            "seconds outside the measured rounds": {str(n): round(seconds, 1) for n, seconds in started.items()},
            "whole run": whole,
        },
        kind="self-check" if toy else "full",
    )


if __name__ == "__main__":
    main()
