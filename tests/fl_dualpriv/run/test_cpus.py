"""Affinity and CPU quotas decide how many CPUs are used; the machine's number does not."""

import contextlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fl_dualpriv.config.schema import RunConfig, app_defaults
from fl_dualpriv.flower import hook as flower_hook
from fl_dualpriv.flower.engine import federation_config
from fl_dualpriv.run.cpus import usable_cpus
from fl_dualpriv.tasks import memory

ROOT = Path(__file__).parents[3]
CONFIG = RunConfig.from_run_config(app_defaults(ROOT))
pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")


@contextlib.contextmanager
def one_cpu() -> Iterator[None]:
    """What `taskset -c N` does."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@pytest.fixture
def two_cpus() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU: there is nothing to leave out")


def test_one_cpu_of_two_starts_one_actor(two_cpus: None) -> None:
    assert federation_config(4, 1, 0.0)["init-args-num-cpus"] == min(4, usable_cpus())
    with one_cpu():
        assert usable_cpus() == 1
        assert federation_config(4, 1, 0.0)["init-args-num-cpus"] == 1
        # The estimate of memory counts the actors that are started, and its advice can be followed.
        actors = memory.actors_per_device(CONFIG.resources, 4, torch.device("cpu"))
        assert actors == 1
        with pytest.raises(ValueError, match=r"cpus-per-client = 2: this process may use 1 CPUs; give 1 to 1"):
            federation_config(4, 2, 0.0)


def test_ray_under_plain_flwr_run_is_told(two_cpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "state.json"
    state.write_text(json.dumps({"environment": {"FLWR_HOME": str(tmp_path)}, "scripts": "/venv/bin"}))
    told = {}
    for name, limits in (("none", contextlib.nullcontext()), ("one", one_cpu())):
        monkeypatch.setattr(os, "environ", {"FLWR_HOME": str(tmp_path)})
        monkeypatch.setattr(os, "cpu_count", lambda: 2)
        monkeypatch.chdir(tmp_path)
        with limits:
            flower_hook.apply("flwr-simulation", state)
        told[name] = os.environ.get("RAY_OVERRIDE_RESOURCES")
    assert told == {"none": None, "one": '{"CPU": 1}'}


def test_ray_knows_the_variable() -> None:
    # Read, not imported: Ray takes seconds.
    import importlib.util

    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    assert '"RAY_OVERRIDE_RESOURCES"' in (Path(spec.origin).parent / "_private" / "ray_constants.py").read_text()


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = {"proc/self/cgroup": "0::/a/b\n"}
V1 = {"proc/self/cgroup": "4:cpu,cpuacct:/a\n3:memory:/z\n"}
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, CPUS),
        (V2 | {"sys/fs/cgroup/cpu.max": "max 100000\n"}, CPUS),
        (V2 | {"sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),  # as inside a container
        (V2 | {"sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 1),  # one and a half
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "20000 100000\n"}, 1),  # a fifth: still one
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "6400000 100000\n"}, CPUS),  # more than the machine has
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "max 100000\n", "sys/fs/cgroup/a/cpu.max": "50000 50000"}, 1),
        (V2 | {"sys/fs/cgroup/c/cpu.max": "100000 100000\n"}, CPUS),  # another group's
        (V2 | {"sys/fs/cgroup/unified/a/b/cpu.max": "100000 100000\n"}, 1),
        (V2 | {"sys/fs/cgroup/cpu.max": "garbage"}, CPUS),
        (V2 | {"sys/fs/cgroup/cpu.max": ""}, CPUS),
        (V1 | {f"sys/fs/cgroup/cpu/a/cpu.cfs_{k}_us": v for k, v in (("quota", "100000"), ("period", "100000"))}, 1),
        (V1 | {f"sys/fs/cgroup/cpu/a/cpu.cfs_{k}_us": v for k, v in (("quota", "-1"), ("period", "100000"))}, CPUS),
    ],
    ids=lambda value: (
        " ".join(f"{k.removeprefix('sys/fs/cgroup/')}={v.strip()}" for k, v in value.items())
        if isinstance(value, dict)
        else str(value)
    ),
)
def test_the_tightest_quota_counts(tmp_path: Path, files: dict[str, str], cpus: int) -> None:
    assert usable_cpus(write(tmp_path, files)) == cpus


@pytest.fixture
def limited() -> Iterator[Path]:
    """A control group with the quota of one CPU; its list of processes is given."""
    for top, quota in (("cpu", "cpu.cfs_quota_us"), ("unified", "cpu.max"), (".", "cpu.max")):
        group = Path("/sys/fs/cgroup") / top / f"fl-dualpriv-test-{uuid.uuid4().hex}"
        if not group.parent.is_dir():
            continue
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / quota).write_text("100000" if top == "cpu" else "100000 100000")
        except OSError:
            group.rmdir()
            continue
        yield group / "cgroup.procs"
        group.rmdir()
        return
    pytest.skip("no control group with a CPU quota can be made here")


def test_a_real_quota_counts(limited: Path, two_cpus: None) -> None:
    code = (
        f"import os; open({str(limited)!r}, 'w').write(str(os.getpid()))\n"
        "from fl_dualpriv.run.cpus import usable_cpus; print(usable_cpus())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
