"""Client-steps per second on one CUDA device, for text towers of the size of ViT-B/16 and ViT-L/14, random weights.

A step computes the gradient of one client's batch of 16 cached features with respect to 16 context vectors, for 10
classes. Clients step together. Their number doubles until the memory is full or the rate stops rising. Without a CUDA
device the benchmark prints a message and exits with status 0.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

from benchmarks import machine

machine.one_thread()

import torch  # noqa: E402

from benchmarks.harness import Cost, Costs, assert_equal, emit, relative_difference  # noqa: E402
from benchmarks.towers import (  # noqa: E402
    TOY,
    VIT_B_16,
    VIT_L_14,
    Setting,
    coop_gradient,
    make_model,
    make_setting,
    our_gradients,
)

BATCH, N_CLS = 16, 10
_MOST_CLIENTS = 4096
_RISE = 1.02
"""If twice the clients raise the rate by a smaller factor, the rate has stopped rising."""
_ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


def seconds(work: Callable[[], object], device: str, least: float) -> float:
    """Return the synchronised wall seconds of one call, averaged over at least ``least`` seconds."""
    for _ in range(2):
        work()
    _wait(device)
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < least:
        work()
        calls += 1
        _wait(device)
    return (time.perf_counter() - start) / calls


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def product_peak(device: str, dtype: torch.dtype, side: int, least: float) -> float:
    """Return the TFLOP/s of one large matrix product, the peak for "share of peak"."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, device, least) / 1e12


def sweep(model: Any, device: str, precision: torch.dtype, most: int, least: float, repeats: int) -> dict[str, Any]:
    """Check the gradient against the usual step, then measure the rate for 1, 2, 4, … clients."""
    rates: dict[int, float] = {}
    peak_mib, best, samples = 0.0, 0, []
    first = make_setting(model, n_cls=N_CLS, clients=1, batch=BATCH, precision=precision)
    difference, shape = _check(first, precision), first.shape
    clients = 1
    while clients <= most:
        try:
            setting = make_setting(model, n_cls=N_CLS, clients=clients, batch=BATCH, precision=precision)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            taken = [
                seconds(lambda s=setting, n=clients: our_gradients(s, slice(0, n)), device, least) / clients
                for _ in range(repeats)
            ]
        except torch.cuda.OutOfMemoryError:
            break
        rates[clients] = 1 / min(taken)
        if best == 0 or rates[clients] > rates[best]:
            best, samples = clients, taken
            peak_mib = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0
        if clients > 1 and rates[clients] < _RISE * rates[clients // 2]:
            break
        clients *= 2
    step = shape.forward + shape.backward
    return {
        "samples": samples,
        "difference": difference,
        "clients": best,
        "most clients tried": max(rates),
        "rates": {n: round(rate, 1) for n, rate in rates.items()},
        "tflops": step * rates[best] / 1e12,
        "peak_mib": round(peak_mib),
        "FLOP of the usual step over ours": round(shape.padded_step(first.coop.length) / step, 1),
    }


def _check(setting: Setting, precision: torch.dtype) -> float:
    theirs = coop_gradient(setting.coop, setting.prompts[0], setting.images[0], setting.labels[0], setting.scale)
    difference = relative_difference(our_gradients(setting, slice(0, 1))[0], theirs)
    return assert_equal(f"gradient of the context, {precision}", difference, _ALLOWED[precision])


def main(arguments: list[str] | None = None) -> None:
    """Measure both sizes in both precisions and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--self-check", action="store_true", help="toy sizes on the CPU; the figures mean nothing")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    toy = options.self_check
    if not toy and not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return
    device = "cpu" if toy else "cuda"
    least, most, side = (0.01, 4, 128) if toy else (0.5, _MOST_CLIENTS, 8192)
    towers = {"toy": TOY} if toy else {"ViT-B/16": VIT_B_16, "ViT-L/14": VIT_L_14}
    peaks = {p: product_peak(device, p, side, least) for p in (torch.float32, torch.bfloat16)}
    headline: dict[str, float] = {}
    details: dict[str, Any] = {
        "device": "cpu" if toy else torch.cuda.get_device_name(),
        "TFLOP/s of a large product": {str(p).removeprefix("torch."): round(peak, 1) for p, peak in peaks.items()},
    }
    costs: dict[str, Costs] = {}
    for name, config in towers.items():
        model = make_model(config, device)
        for precision, peak in peaks.items():
            result = sweep(model, device, precision, most, least, options.repeats)
            label = f"{name}, {'bf16' if precision is torch.bfloat16 else 'fp32'}"
            costs[label] = Costs(tuple(Cost(wall=s, cpu=s, peak_mib=result["peak_mib"]) for s in result.pop("samples")))
            key = label.lower().replace("/", "").replace("-", "").replace(", ", "_")
            headline[f"{key}_rate"] = result["rates"][result["clients"]]
            headline[f"{key}_peak_share"] = result["tflops"] / peak
            details[label] = result | {
                "tflops": round(result["tflops"], 1),
                "difference": f"{result['difference']:.1e}",
            }
    emit(
        "gpu",
        headline=headline,
        costs=costs,
        unit="client-step (seconds of the device)",
        details=details,
        kind="self-check" if toy else "full",
    )


if __name__ == "__main__":
    main()
