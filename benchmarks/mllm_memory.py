"""Memory and time of a private step of a multimodal language model: DP-SGD, zeroth-order and ours.

Every method makes a step on the same model with random weights and the same batch, once with all visual tokens and once
with pruned ones. Peak memory is that of tensors, weights included, and is the same number in every run. The resident
peak of a process that only runs the method is reported beside it. Exact methods must agree on the clipped sum before a
figure counts. LLaVA-1.5-7B needs a GPU, so its memory is counted on tensors without values.
"""

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks import machine

machine.one_thread()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.harness import (  # noqa: E402
    CHECKOUT,
    Cost,
    Costs,
    assert_equal,
    emit,
    interleaved,
    relative_difference,
    timed,
)
from benchmarks.llava_models import LLAVA_7B, TOY, LlavaShape, make_backbone, make_parts, make_records  # noqa: E402
from benchmarks.mllm_methods import METHODS, Task, against_exact  # noqa: E402
from benchmarks.tensor_memory import peak_bytes  # noqa: E402
from fl_dualpriv.models.base import Precision  # noqa: E402
from fl_dualpriv.models.llava import LlavaBackbone  # noqa: E402
from fl_dualpriv.models.pruning.tokens import VisualTokenPruner  # noqa: E402
from fl_dualpriv.run.peak_memory import resident_peak  # noqa: E402

BATCHES = (8, 32)
N_CTX = 8
CPU_SHAPE = LlavaShape(image=128, patch=8, vision=(2, 128, 4), language=(8, 256, 8), hidden=688, vocabulary=2048)
"""256 visual tokens: most of a sequence, as in LLaVA."""
_PUBLISHED = {"Dual-Priv / DP-SGD": 1 - 0.1434, "Dual-Priv / zeroth-order": 1 + 0.0174}
"""Memory ratios from arXiv:2506.07077 for LLaVA on an A100; its baselines probably used all visual tokens."""
_EXACT: dict[str, float] = {"fp32": 1e-5, "bf16": 0.1}
_QUOTIENTS: dict[str, float] = {"fp32": 0.05, "bf16": float("inf")}
"""Allowed differences by precision. A bfloat16 loss is too coarse for difference quotients, so any value passes."""
_WORDS, _MAX_TOKENS = (6, 11), 16
_MIB = 2**20
_HOOKS, _ZEROTH, _LITTLE = "DP-SGD, hooks", "zeroth-order", "ours, little memory"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A model with its device and precision."""

    shape: LlavaShape
    precision: Precision
    device: str

    @property
    def pruner(self) -> VisualTokenPruner:
        """Pruner that keeps one ninth of the visual tokens, as the paper's method keeps 64 of 576."""
        kept_tokens = max(2, round(self.shape.n_patches / 9))
        fused = max(1, round(kept_tokens / 6.4))
        return VisualTokenPruner(layer=-2, dominant=kept_tokens - fused, contextual=fused, merge="average")

    def backbones(self) -> dict[str, LlavaBackbone]:
        """Return backbones of the same weights, one with all visual tokens and one with pruned ones."""
        parts = make_parts(self.shape, self.precision, self.device)
        pruners = {"all tokens": None, "pruned": self.pruner}
        return {name: make_backbone(parts, pruner, self.precision, self.device) for name, pruner in pruners.items()}

    def task(self, backbone: LlavaBackbone, batch: int) -> Task:
        """Return a task with a batch of random records."""
        records = make_records(backbone, self.shape, batch, _WORDS, _MAX_TOKENS)
        prompt = 0.02 * torch.randn(N_CTX, backbone.ctx_dim, generator=torch.Generator().manual_seed(3))
        return Task(backbone=backbone, records=records, prompt=prompt.to(self.device))


PLACES = {
    "cpu": Place(shape=CPU_SHAPE, precision="fp32", device="cpu"),
    "gpu": Place(shape=LLAVA_7B, precision="bf16", device="cuda"),
    "toy": Place(shape=TOY, precision="fp32", device="cpu"),
}


def check(task: Task, allowed: float) -> float:
    """Check the methods against each other, and return the largest difference of the exact clipped sums.

    Exact methods must give the same clipped sum. The zeroth-order quotients must equal the exact gradients' products
    with the direction.
    """
    sums = {name: make(task)().double() for name, make in METHODS.items() if not name.startswith(_ZEROTH)}
    expected = sums[_HOOKS]
    differences = [
        assert_equal(name, relative_difference(clipped_sum, expected), allowed) for name, clipped_sum in sums.items()
    ]
    quotients = relative_difference(*against_exact(task))
    assert_equal("zeroth-order quotients", quotients, _QUOTIENTS[task.backbone._precision])
    return max(differences)


def alone(place: Place, method: str, which: str, batch: int) -> dict[str, float]:
    """Return the resident size in MiB before two steps and at their peak; the process should do nothing else."""
    step = METHODS[method](place.task(place.backbones()[which], batch))
    before = resident_peak() / _MIB
    for _ in range(2):
        step()
    return {"before": before, "peak": resident_peak() / _MIB}


def resident(where: str, method: str, which: str, batch: int) -> float:
    """Return the resident peak of two steps of a method, measured in a separate process, in MiB."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.mllm_memory", "--alone", where, method]
    done = subprocess.run([*command, which, str(batch)], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def table(peaks: dict[tuple[str, str, int], float], costs: dict[str, Costs]) -> str:
    """Return a table for the terminal, with the paper's ratios below it."""
    lines = [f"{'method':>30} {'tokens':>10} {'batch':>5} {'peak MiB':>9} {'CPU-s':>8}  over hooks, zeroth"]
    for (method, which, batch), peak in peaks.items():
        hooks, zeroth = (peak / peaks[name, which, batch] for name in (_HOOKS, _ZEROTH))
        taken = costs[_name(method, which, batch)].best
        lines.append(f"{method:>30} {which:>10} {batch:5} {peak:9.1f} {taken:8.3f}  {hooks:.2f}, {zeroth:.2f}")
    return "\n".join([*lines, f"published: {_PUBLISHED}"])


def counted_7b() -> tuple[dict[str, float], dict[str, float]]:
    """Count the memory of LLaVA-1.5-7B in bfloat16, weights included, on tensors without values.

    Ghost clipping is left out, because it needs values.

    Returns:
        Ratios between methods, and GiB of the weights and of each method.
    """
    place, batch = Place(shape=LLAVA_7B, precision="bf16", device="meta"), BATCHES[0]
    backbones = place.backbones()
    held = _weights(backbones["pruned"])
    peaks: dict[tuple[str, str], float] = {}
    for which, backbone in backbones.items():
        task = place.task(backbone, batch)
        for method in METHODS:
            if method != "DP-SGD, ghost":
                peaks[method, which] = (held + peak_bytes(METHODS[method](task), torch.device("meta"))) / 2**30
    ratios: dict[str, float] = {}
    for which, end in (("all tokens", ""), ("pruned", "_pruned")):
        ratios[f"7b_vs_hooks{end}"] = peaks["ours", which] / peaks[_HOOKS, which]
        ratios[f"7b_little_vs_zeroth{end}"] = peaks[_LITTLE, which] / peaks[_ZEROTH, which]
    ratios["7b_vs_hooks_as_published"] = peaks["ours", "pruned"] / peaks[_HOOKS, "all tokens"]
    return ratios, {"weights": round(held / 2**30, 2)} | {", ".join(key): round(v, 2) for key, v in peaks.items()}


def _weights(backbone: LlavaBackbone) -> int:
    model = backbone._model  # not by storage, because tensors without values share none
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _name(method: str, which: str, batch: int) -> str:
    return f"{method}, {which}, B={batch}"


def clocked(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Cost]:
    """Return a contestant that measures CPU seconds, or on a CUDA device the seconds until its work is done."""
    if device.type != "cuda":
        return timed(step)

    def run() -> Cost:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        torch.cuda.synchronize(device)
        taken = time.perf_counter() - start
        return Cost(wall=taken, cpu=taken)

    return run


Found = tuple[dict[str, float], dict[str, Costs], dict[str, Any]]


def measure(where: str, repeats: int, more: bool) -> Found:
    """Measure all methods at one place and return ratios, costs and details.

    Args:
        where: Key of `PLACES`.
        repeats: Measured runs of each method.
        more: True also counts LLaVA-1.5-7B and measures resident peaks, which takes minutes.
    """
    place, batches = PLACES[where], BATCHES if where == "cpu" else BATCHES[:1]
    backbones, device = place.backbones(), torch.device(place.device)
    weights = _weights(backbones["pruned"])
    peaks: dict[tuple[str, str, int], float] = {}
    costs: dict[str, Costs] = {}
    largest = 0.0
    for batch in batches:
        for which, backbone in backbones.items():
            task = place.task(backbone, batch)
            largest = max(largest, check(task, _EXACT[place.precision]))
            steps = {}
            for method, make in METHODS.items():
                steps[_name(method, which, batch)] = step = make(task)
                step()  # objects that are made only once do not count as memory of a step
                peaks[method, which, batch] = (weights + peak_bytes(step, device)) / _MIB
            costs |= interleaved({name: clocked(step, device) for name, step in steps.items()}, repeats)
    print(table(peaks, costs))

    def memory(method: str, other: str, which: str, against: str | None = None) -> float:
        return max(peaks[method, which, batch] / peaks[other, against or which, batch] for batch in batches)

    def seconds(method: str, other: str, which: str) -> float:
        ours, theirs = (tuple(costs[_name(who, which, batch)].best for batch in batches) for who in (method, other))
        return max(mine / one for mine, one in zip(ours, theirs, strict=True))

    headline: dict[str, float] = {}
    for which, end in (("all tokens", ""), ("pruned", "_pruned")):
        headline |= {
            f"vs_hooks{end}": memory("ours", _HOOKS, which),
            f"little_vs_hooks{end}": memory(_LITTLE, _HOOKS, which),
            f"little_vs_zeroth{end}": memory(_LITTLE, _ZEROTH, which),
            f"time_vs_hooks{end}": seconds("ours", _HOOKS, which),
            f"little_time_vs_zeroth{end}": seconds(_LITTLE, _ZEROTH, which),
        }
    headline["vs_hooks_as_published"] = memory("ours", _HOOKS, "pruned", "all tokens")
    details: dict[str, Any] = {
        "peak MiB of tensors, weights included": {_name(*key): round(value, 1) for key, value in peaks.items()},
        "of it weights": round(weights / _MIB, 1),
        "visual tokens": {which: backbone.n_visual for which, backbone in backbones.items()},
        "largest difference of exact clipped sums": float(f"{largest:.1e}"),
        "published": _PUBLISHED,
    }
    if more:
        ratios, details[f"GiB of LLaVA-1.5-7B in bf16, counted, B={BATCHES[0]}"] = counted_7b()
        headline |= ratios
        batch = max(batches)
        details[f"resident peak MiB of a process, B={batch}"] = {
            f"{method}, {which}": round(resident(where, method, which, batch))
            for method in METHODS
            for which in backbones
        }
    return headline, costs, details


def main(arguments: list[str] | None = None) -> None:
    """Check, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--self-check", action="store_true", help="toy sizes, a few seconds; the ratios mean nothing")
    parser.add_argument("--gpu", action="store_true", help="LLaVA-1.5-7B's shape in bf16 on a CUDA device")
    parser.add_argument("--alone", nargs=4, metavar=("WHERE", "METHOD", "TOKENS", "BATCH"), help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message=".*backward hook.*")
    if options.alone:
        where, method, which, batch = options.alone
        print(json.dumps(alone(PLACES[where], method, which, int(batch))))
        return
    if options.gpu and not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return
    where = "toy" if options.self_check else "gpu" if options.gpu else "cpu"
    headline, costs, details = measure(where, options.repeats, more=where == "cpu")
    name = "mllm_memory_gpu" if options.gpu else "mllm_memory"
    kind = "self-check" if options.self_check else "full"
    unit = "step (seconds of the device)" if options.gpu else "step"
    emit(name, headline=headline, costs=costs, unit=unit, details=details, kind=kind)


if __name__ == "__main__":
    main()
