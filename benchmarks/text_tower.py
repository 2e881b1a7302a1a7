"""Text-tower step: 77 tokens for every class (CoOp) against the shared prefix, for one client and several at once.

Both compute the gradient of the mean cross-entropy of 16 cached image features with respect to 16 context vectors, in
fp32 on one thread, through a text tower of ViT-B/16's size with random weights.
"""

import argparse

from benchmarks import machine

machine.one_thread()

from torch import Tensor  # noqa: E402

from benchmarks.harness import Costs, assert_equal, emit, interleaved, relative_difference, timed  # noqa: E402
from benchmarks.towers import (  # noqa: E402
    TOY,
    VIT_B_16,
    Setting,
    coop_gradient,
    make_model,
    make_setting,
    our_gradients,
)

BATCH = 16
TOGETHER = 8
CLASSES = (10, 37, 100)
_TIMES = {10: 4, 37: 2, 100: 1}
"""Calls of our step within one measurement."""


def compare(setting: Setting, repeats: int, times: int) -> tuple[dict[str, Costs], float]:
    """Return the costs per client-step, and the largest relative difference of the gradients."""

    def usual(client: int) -> Tensor:
        data = setting.images[client], setting.labels[client]
        return coop_gradient(setting.coop, setting.prompts[client], *data, setting.scale)

    theirs = [usual(i) for i in range(2)]
    alone, together = our_gradients(setting, slice(0, 1)), our_gradients(setting, slice(0, TOGETHER))
    differences = [relative_difference(alone[0], theirs[0])]
    differences += [relative_difference(together[i], theirs[i]) for i in range(2)]
    difference = assert_equal("gradient of the context", max(differences), 1e-5)
    costs = interleaved(
        {
            "coop": timed(lambda: usual(0)),
            "one client": timed(lambda: our_gradients(setting, slice(0, 1)), 2 * times),
            f"{TOGETHER} clients": timed(lambda: our_gradients(setting, slice(0, TOGETHER)), times),
        },
        repeats,
    )
    costs[f"{TOGETHER} clients"] = costs[f"{TOGETHER} clients"].per(TOGETHER)
    return costs, difference


def main(arguments: list[str] | None = None) -> None:
    """Measure all class counts and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--self-check", action="store_true", help="toy sizes, a few seconds; the ratios mean nothing")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    toy = options.self_check
    model = make_model(TOY if toy else VIT_B_16)
    peak = machine.sgemm_peak(0.1, (128,)) if toy else machine.sgemm_peak()
    headline: dict[str, float] = {}
    all_costs: dict[str, Costs] = {}
    details: dict[str, object] = {"sgemm_peak_gflops": round(peak, 1)}
    differences, shares = [], {}
    for n_cls in CLASSES:
        setting = make_setting(model, n_cls=n_cls, clients=TOGETHER, batch=BATCH)
        costs, difference = compare(setting, options.repeats, 1 if toy else _TIMES[n_cls])
        differences.append(difference)
        step = setting.shape.forward + setting.shape.backward
        for name, taken in costs.items():
            all_costs[f"{name}, C={n_cls}"] = taken
            if name != "coop":
                details[f"ratio, {name}, C={n_cls}"] = round(costs["coop"].best / taken.best, 2)
                shares[f"{name}, C={n_cls}"] = step / taken.best / 1e9 / peak
        ours = min(taken.best for name, taken in costs.items() if name != "coop")
        headline[f"ratio_c{n_cls}"] = costs["coop"].best / ours
        details[f"GFLOP, C={n_cls}"] = {
            "coop": round(setting.shape.padded_step(setting.coop.length) / 1e9, 2),
            "ours": round(step / 1e9, 2),
        }
    headline["peak_share"] = shares[f"{TOGETHER} clients, C=10"]
    headline["grad_diff"] = max(differences)
    details["peak_share"] = {name: round(share, 3) for name, share in shares.items()}
    emit(
        "text_tower",
        headline=headline,
        costs=all_costs,
        unit="client-step",
        details=details,
        kind="self-check" if toy else "full",
    )


if __name__ == "__main__":
    main()
