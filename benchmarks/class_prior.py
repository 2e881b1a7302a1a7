"""Cost of a local step with a class prior, relative to the same step without one.

Clients of the embedded demo step together through each closed form of the loss, in fp32 on one thread. A prior that is
uniform must leave every clipped sum as it is, bit by bit, before a time counts.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from benchmarks import machine

machine.one_thread()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.harness import BENCH_DIR, assert_equal, emit, interleaved, timed  # noqa: E402
from benchmarks.our_runs import full_config  # noqa: E402
from fl_dualpriv.config.schema import RunConfig  # noqa: E402
from fl_dualpriv.learners.base import ClientData  # noqa: E402
from fl_dualpriv.privacy.step import clipped_sums  # noqa: E402
from fl_dualpriv.tasks.build import image_task  # noqa: E402

CLIENTS, BATCH = 2, 16  # short steps: the best of many is free of other work on the machine
_CLIP = 1.0
_FORMS = {
    "exact rows": {},
    "top-m = 3": {"train.top-m": 3},
    "feature space": {"privacy.record.noise-space": "feature"},
    "head": {"method": "promptfl", "prompt.learner": "head"},
    "no privacy": {"privacy.record.mechanism": "none"},
}


def config_of(form: str) -> RunConfig:
    """Return the demo's configuration with the class prior of lists, for one closed form."""
    machine_keys = {"resources.device": "cpu", "resources.feature-cache": str(BENCH_DIR / "features")}
    return full_config({**machine_keys, "train.class-prior": "list", **_FORMS[form]})


def step(form: str, data: list[ClientData], batch: int) -> Callable[[], Tensor]:
    """Return one step of the clients: forward pass, rows or sums, and clip."""
    config = config_of(form)
    task = image_task(config)
    prompts = task.initial_prompt(config).expand(len(data), -1, -1).clone()
    pooled = task.objective(config).bind(data)

    def run() -> Tensor:
        gradients = pooled.gradients(prompts, [np.arange(batch) for _ in data])
        if config.privacy.record.mechanism == "none":
            return gradients.sums()
        return torch.stack([clean.value for clean in clipped_sums(gradients, _CLIP, "float")])

    return run


def main(arguments: list[str] | None = None) -> None:
    """Check, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--self-check", action="store_true", help="few records; the ratios mean nothing")
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args(arguments)
    batch = 9 if options.self_check else BATCH
    task = image_task(config_of("exact rows"))
    data = [task.client_data(partition, 1) for partition in range(CLIENTS)]
    without = [replace(own, log_prior=None) for own in data]
    uniform = [replace(own, log_prior=torch.zeros(len(task.data.class_names))) for own in data]
    contestants = {}
    for form in _FORMS:
        same = torch.equal(step(form, uniform, batch)(), step(form, without, batch)())
        assert_equal(f"{form} with a uniform prior", 0.0 if same else 1.0, 0.0)
        contestants[f"{form}, prior"] = timed(step(form, data, batch))
        contestants[f"{form}, none"] = timed(step(form, without, batch))
    costs = interleaved(contestants, options.repeats, warm_ups=1)
    emit(
        "class_prior",
        headline={f"{form}: with / without": _ratio(costs, form) for form in _FORMS},
        costs=costs,
        unit=f"step of {CLIENTS} clients",
        details={"clients": CLIENTS, "batch": batch},
        kind="self-check" if options.self_check else "full",
    )


def _ratio(costs: dict, form: str) -> float:
    return costs[f"{form}, prior"].best / costs[f"{form}, none"].best


if __name__ == "__main__":
    main()
