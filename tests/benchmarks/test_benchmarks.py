"""The benchmarks' own arithmetic, and that each of them runs and checks its results on toy sizes."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import write_docs
from benchmarks.flops import TowerShape
from benchmarks.harness import Cost, Costs, RoundsRun, assert_equal, emit, interleaved, timed
from benchmarks.images import png
from benchmarks.peer_task import PeerModel, PeerTask, load_task, local_steps, reference, save_task
from benchmarks.process_tree import marked_environment, tree_use
from benchmarks.tensor_memory import peak_bytes

BURN = "import time\nwhile time.process_time() < {seconds}: pass\n"


def test_cpu_of_a_child_that_burns_is_counted():
    program = BURN.format(seconds=0.4) + "print('done', flush=True); input()"
    mark, environment = marked_environment(os.environ)
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        by_root, by_mark = tree_use(child.pid), tree_use(-1, mark)
        child.communicate(b"\n")
    assert 0.35 <= by_root.cpu <= 0.8
    assert by_mark.processes == by_root.processes == 1
    assert by_root.peak_mib > 1


def test_a_daemon_that_left_the_tree_is_found_by_its_mark():
    inner = BURN.format(seconds=0.3) + "time.sleep(60)"
    program = (
        "import subprocess, sys; "
        f"print(subprocess.Popen([sys.executable, '-c', {inner!r}], start_new_session=True, "
        "stdin=-3, stdout=-3, stderr=-3).pid, flush=True)"  # -3: subprocess.DEVNULL
    )
    mark, environment = marked_environment(os.environ)
    # The parent ends at once, so the child belongs to nobody's tree any more.
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    daemon = int(done.stdout)
    try:
        deadline = time.monotonic() + 20
        while tree_use(-1, mark).cpu < 0.25 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert tree_use(-1, mark).cpu >= 0.25
        assert tree_use(-1, "another mark").processes == 0
    finally:
        os.kill(daemon, 9)


def test_children_that_ended_count_for_a_contestant_here():
    burn = [sys.executable, "-c", BURN.format(seconds=0.3)]
    assert timed(lambda: subprocess.run(burn, check=True))().cpu >= 0.3


def test_contestants_take_turns_and_warm_ups_are_dropped():
    order: list[str] = []

    def contestant(name: str):
        def run() -> Cost:
            order.append(name)
            return Cost(wall=1.0, cpu=float(len(order)))

        return run

    costs = interleaved({"a": contestant("a"), "b": contestant("b")}, 3, warm_ups=1)
    # turns -1 … 2; odd ones run backwards
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert [cost.cpu for cost in costs["a"].samples] == [3.0, 6.0, 7.0]
    assert [cost.cpu for cost in costs["b"].samples] == [4.0, 5.0, 8.0]


def test_figures_of_costs():
    costs = Costs(tuple(Cost(wall=2 * x, cpu=x) for x in (4.0, 2.0, 3.0)))
    assert (costs.best, costs.median) == (2.0, 3.0)
    assert costs.spread == pytest.approx(2 / 3)  # (4 - 2) / 3
    assert costs.per(2).best == 1.0
    assert costs.per(2).as_json()["wall_best"] == 2.0


ROUNDS = """
import sys, time
for n in range(4):
    end = time.process_time() + 0.15
    while time.process_time() < end: pass
    with open(sys.argv[1], "a") as file: file.write("{}\\n")
    time.sleep(0.1)
time.sleep(0.2)
"""


def test_a_federation_is_measured_between_two_of_its_lines(tmp_path: Path):
    file = tmp_path / "rounds.jsonl"
    run = RoundsRun(
        command=[sys.executable, "-c", ROUNDS, str(file)],
        rounds_file=file,
        first=1,
        last=3,
        log=tmp_path / "log.txt",
        environment={},
    )
    cost = run.measure()
    assert 0.25 <= cost.cpu <= 0.6  # two rounds of 0.15 s
    assert cost.wall >= 0.4


def test_a_federation_that_ends_early_is_an_error(tmp_path: Path):
    run = RoundsRun(
        command=[sys.executable, "-c", "raise SystemExit('no such task')"],
        rounds_file=tmp_path / "rounds.jsonl",
        first=1,
        last=2,
        log=tmp_path / "log.txt",
        environment={},
    )
    with pytest.raises(RuntimeError, match=r"ended after 0 of 1 rounds[\s\S]*no such task"):
        run.measure()


@pytest.mark.parametrize("difference", [2e-5, float("nan")])
def test_unequal_results_stop_a_benchmark(difference: float):
    with pytest.raises(AssertionError, match="results differ"):
        assert_equal("gradient", difference, 1e-5)


def test_emit_writes_one_line_and_prints_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    costs = {"ours": Costs((Cost(wall=1.0, cpu=0.5),))}
    results = tmp_path / "new" / "results.jsonl"
    emit("x", headline={"ratio": 2.00004}, costs=costs, unit="step", details={"clients": 3}, results=results)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"ratio": 2.0}
    (line,) = map(json.loads, results.read_text().splitlines())
    assert line["headline"] == {"ratio": 2.0}
    assert line["costs"]["ours"]["cpu_best"] == 0.5
    assert {"cpu", "cores", "torch", "flwr", "ray"} <= line["machine"].keys()


def test_operations_of_a_small_tower_by_hand():
    # 2 blocks of width 2, 1 context token, 3 classes of 1 suffix token: 4 tokens; heads do not matter.
    shape = TowerShape(layers=2, width=2, embed_dim=5, n_ctx=1, n_cls=3, n_suffix=1)
    # Attended pairs: context 2; each suffix token SOS, context, itself: 3. First block 2 + 9, last block 9.
    # First: qkv of the context 1·6·4, MLP and output 4·18·4, attention 4·11·2.
    # Last: k and v of 4 tokens, q of 3: (16 + 6)·4; MLP and output 3·18·4, attention 4·9·2.
    first, last = 24 + 288 + 88, 88 + 3 * 18 * 4 + 4 * 9 * 2
    assert shape.forward == first + last + 2 * 3 * 2 * 5
    # Backward: the same products, and twice the attention.
    assert shape.backward == shape.forward + 88 + 72
    assert shape.floor_over_nonprivate(1) == 1.0


def test_png_is_read_back(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    (tmp_path / "x.png").write_bytes(png(pixels))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png").convert("RGB")), pixels)


@pytest.fixture
def head_task() -> PeerTask:
    generator = torch.Generator().manual_seed(0)
    return PeerTask(
        kind="head",
        features=torch.randn(3, 4, 6, generator=generator),
        labels=torch.randint(0, 5, (3, 4), generator=generator),
        start=torch.randn(2, 11, generator=generator),
        frozen={"zero-shot": torch.randn(5, 6, generator=generator)},
        backbone="",
        scale=3.0,
        local_steps=2,
        learning_rate=0.1,
    )


def test_a_task_survives_its_file(head_task: PeerTask, tmp_path: Path):
    save_task(tmp_path / "task.safetensors", head_task)
    read = load_task(tmp_path / "task.safetensors")
    assert torch.equal(PeerModel(read)(read.features[0]), PeerModel(head_task)(head_task.features[0]))
    assert (read.local_steps, read.learning_rate, read.kind) == (2, 0.1, "head")


def test_the_reference_is_the_mean_of_its_clients(head_task: PeerTask):
    moved = []
    for images, labels in zip(head_task.features, head_task.labels, strict=True):
        model = PeerModel(head_task)
        local_steps(model, images, labels, head_task)
        moved.append(model.prompt.detach())
    assert torch.allclose(reference(head_task, [1])[1], torch.stack(moved).mean(dim=0))


def line(name: str, headline: dict[str, float]) -> str:
    machine = {"cpu": "a cpu", "cores": 2, "memory_gib": 8, "load": 0.1, "torch": "2.13.0"}
    cost = {"cpu_best": 1.5, "cpu_median": 2.0, "spread": 0.25, "wall_best": 1.6, "peak_mib": 0, "repeats": 3}
    found = {"benchmark": name, "time": "2026-01-01T00:00:00Z", "machine": machine, "headline": headline}
    return json.dumps(found | {"unit": "step", "costs": {"ours": cost}, "details": {"largest": {"a": 1}}})


def test_the_page_states_figures_targets_and_what_was_not_reached(tmp_path: Path):
    results, page = tmp_path / "results.jsonl", tmp_path / "benchmarks.md"
    old, new = line("growth", {"growth": 9.0}), line("growth", {"growth": 1.1})
    results.write_text("\n".join([old, line("per_example", {"over_nonprivate": 6.1}), new]) + "\n")
    write_docs.main(["--results", str(results), "--document", str(page)])
    text = page.read_text()
    assert "| growth | cost of a client-step, 10,000 / 100 clients (`growth`) | 1.1 | ≤ 1.2 | yes |" in text
    assert "(`over_nonprivate`) | 6.1 | ≤ 4 | **no** |" in text
    assert "(`vs_pfl`) | not measured | ≥ 4 | - |" in text
    assert "| ours | 1.5 | 2 | 25 % | 1.6 | 3 |" in text
    assert "a cpu, 2 cores, 8 GiB" in text
    assert write_docs.NOT_REACHED.strip() in text
    assert [p.name for p in tmp_path.iterdir()] == ["results.jsonl", "benchmarks.md"] or len(
        list(tmp_path.iterdir())
    ) == 2


def test_peak_memory_of_tensors_is_counted():
    def work() -> torch.Tensor:
        x = torch.ones(1_000_000)
        y = x * 2  # both: 8 MB
        del x
        return y + torch.ones(500_000).sum()  # 4 and 2 MB, then 4 and 4

    assert 8_000_000 <= peak_bytes(work, torch.device("cpu")) < 8_010_000


_QUICK, _SLOW = ("text_tower", "soft_prompt", "dpfpl_round", "class_prior", "gpu"), ("per_example", "mllm_memory")


@pytest.mark.parametrize(
    "name",
    [
        "text_tower",
        "soft_prompt",
        "dpfpl_round",
        "class_prior",
        "gpu",
        *(pytest.param(n, marks=pytest.mark.slow) for n in _SLOW),
    ],
)
def test_benchmarks_check_themselves(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    # Their modules keep every later import to one thread; so does this test session.
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr("sys.argv", [name])
    module.main(["--self-check", "--repeats", "1"])
    headline = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert headline
    assert all(value > 0 for value in headline.values())


def test_without_a_cuda_device_the_gpu_benchmark_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    module = importlib.import_module("benchmarks.gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module.main([])
    assert capsys.readouterr().out == "no CUDA device: nothing to measure\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clients", "growth", "startup"])
def test_federations_check_themselves(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(module, "BENCH_DIR", tmp_path)
    module.main(["--self-check", "--repeats", "1"])
    json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.gpu
def test_the_gpu_benchmark_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    module = importlib.import_module("benchmarks.gpu")
    monkeypatch.setattr(module, "_MOST_CLIENTS", 2)
    monkeypatch.setattr(module, "emit", lambda *args, **kinds: print(json.dumps(kinds["headline"])))
    module.main(["--repeats", "1"])
    headline = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert headline["vitb16_bf16_rate"] > 0
