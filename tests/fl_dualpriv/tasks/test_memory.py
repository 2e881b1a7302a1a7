"""A run that would not fit says so before it starts: the numbers, for a machine, a container and a GPU."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fl_dualpriv.config.schema import RunConfig, app_defaults
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.tasks import memory
from fl_dualpriv.tasks.memory import (
    actor_bytes,
    actors_per_device,
    available_bytes,
    check_fits,
    check_memory,
    host_available_bytes,
    peak_bytes,
)

MIB = 2**20
CONFIG = RunConfig.from_run_config(app_defaults(Path(__file__).parents[3]))
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@dataclass
class Sized:
    """Stands for a split: so many images of a size, the first of which cannot be read."""

    size: int

    def __len__(self) -> int:
        return self.size

    def image(self, index: int) -> Image.Image:
        if index == 0:
            raise ValueError("no picture")
        return Image.new("RGB", (10, 20))


class Model:
    embed_dim, n_patches, weight_bytes = 512, 49, 600 * MIB

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        return torch.zeros(3, 224, 224)


@dataclass
class FakeData:
    train: Sized
    val: Sized
    test: Sized


@dataclass
class FakeTask:
    backbone: Model
    data: FakeData
    cache_root: Path | None

    def images(self, split: str) -> Any:
        return getattr(self.data, split)


def task(device: torch.device, cache_root: Path | None = Path("/somewhere"), train: int = 1_000_000) -> Any:
    return FakeTask(Model(device), FakeData(Sized(train), Sized(10), Sized(1024)), cache_root)


def resources(**changes: Any) -> Any:
    return dataclasses.replace(CONFIG.resources, **changes)


# --- what an actor takes ----------------------------------------------------------------------------------------------


def test_an_actor_is_the_sum_of_its_parts():
    # base 480, weights 600, workspace 512; features: 64 of the training images (mapped), 1024 x 512 x 4 = 2 held out;
    # encoding: 32 images x 3 x 224 x 224 x 4 bytes = 18.375 MiB of pixels, times 32.
    assert actor_bytes(task(CPU), CONFIG) == (480 + 600 + 512 + 64 + 2 + 588) * MIB


def test_without_a_cache_all_features_count():
    held = 1000 * 512 * 4
    some, none = (actor_bytes(task(CPU, None, train=n), CONFIG) for n in (1_001_000, 1_000_000))
    assert some - none == held
    assert none > actor_bytes(task(CPU), CONFIG)


def test_patches_are_held_beside_the_features_of_whole_images():
    config = dataclasses.replace(CONFIG, method="fedotp")
    # 49 patches of 512 x 4 bytes for each of 1024 held-out and 100 training images
    held, more = 49 * 512 * 4 * 1024, 49 * 512 * 4 * 100
    small = task(CPU, train=100)
    assert actor_bytes(small, config) - actor_bytes(small, CONFIG) == held + more
    # Of more training images than are kept in memory, 64 MiB, with or without patches.
    assert actor_bytes(task(CPU), config) - actor_bytes(task(CPU), CONFIG) == held


def test_on_a_gpu_the_context_stands_for_the_process():
    assert actor_bytes(task(CPU), CONFIG) - actor_bytes(task(CUDA), CONFIG) == (480 - 700) * MIB


def test_the_workspace_is_counted():
    config = dataclasses.replace(CONFIG, resources=resources(workspace_mib=100))
    assert actor_bytes(task(CPU), CONFIG) - actor_bytes(task(CPU), config) == 412 * MIB


@pytest.mark.parametrize(
    ("changes", "supernodes", "device", "actors"),
    [
        ({}, 100, CPU, 8),
        ({}, 3, CPU, 3),
        ({"cpus_per_client": 3}, 100, CPU, 2),
        ({"cpus_per_client": 100}, 100, CPU, 1),
        ({"gpus_per_client": 0.25}, 100, CUDA, 4),
        ({"gpus_per_client": 0.1}, 100, CUDA, 8),  # 10 by GPU, 8 by CPU
        ({"gpus_per_client": 1 / 3}, 100, CUDA, 3),
        ({"gpus_per_client": 0.25}, 2, CUDA, 2),
        ({"gpus_per_client": 2.0}, 100, CUDA, 1),
        ({"gpus_per_client": 0.0}, 100, CUDA, 8),  # nothing holds them back: all share the GPU
    ],
)
def test_actors_are_as_many_as_flower_starts(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], supernodes: int, device: torch.device, actors: int
):
    monkeypatch.setattr(memory, "usable_cpus", lambda: 8)
    assert actors_per_device(resources(**changes), supernodes, device) == actors


# --- what there is ----------------------------------------------------------------------------------------------------


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


MEMINFO = "MemTotal:  8388608 kB\nMemFree:  100 kB\nMemAvailable:  4194304 kB\n"  # 4096 MiB available


@pytest.mark.parametrize(
    ("files", "mib"),
    [
        ({}, 4096),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 4096),
        (
            {  # 1000 of 1500 used, but 300 of them are cached files
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": f"{1500 * MIB}\n",
                "sys/fs/cgroup/memory.current": f"{1000 * MIB}\n",
                "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {300 * MIB}\nactive_file 7\n",
            },
            800,
        ),
        (
            {  # the tighter limit is that of the group above
                "proc/self/cgroup": "0::/user/job\n",
                "sys/fs/cgroup/user/job/memory.max": "max\n",
                "sys/fs/cgroup/user/job/memory.current": "1\n",
                "sys/fs/cgroup/user/memory.max": f"{700 * MIB}\n",
                "sys/fs/cgroup/user/memory.current": f"{100 * MIB}\n",
            },
            600,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/docker/abc\n",
                "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": f"{512 * MIB}\n",
                "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes": f"{112 * MIB}\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
            },
            400,
        ),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": f"{100 * MIB}\n",
                "sys/fs/cgroup/memory.current": f"{200 * MIB}\n",
            },
            0,
        ),
    ],
    ids=["no group", "no limit", "version 2", "a group above", "version 1", "over the limit"],
)
def test_the_tightest_bound_counts(tmp_path: Path, files: dict[str, str], mib: int):
    assert host_available_bytes(write(tmp_path, {"proc/meminfo": MEMINFO} | files)) == mib * MIB


def test_an_unknown_machine_is_no_reason_to_stop(tmp_path: Path):
    assert host_available_bytes(tmp_path) == np.iinfo(np.int64).max


def test_this_machine_has_some():
    assert 0 < available_bytes(CPU) < 2**50


# --- the comparison ---------------------------------------------------------------------------------------------------


def test_what_fits_is_silent():
    check_fits(1000 * MIB, 4, CPU, 4000 * MIB)


def test_what_does_not_fit_is_said_with_numbers_and_advice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "usable_cpus", lambda: 8)
    with pytest.raises(ConfigError) as caught:
        check_fits(1000 * MIB, 4, CPU, 3999 * MIB)
    message = str(caught.value)
    assert "4 actors of about 1000 MiB need 4000 MiB, and 3999 MiB are available" in message
    assert "3 would fit: set resources.cpus-per-client = 3 or supernodes = 3" in message  # 8 // 3 = 2 of 3 CPUs each
    assert "resources.workspace-mib" in message


@pytest.mark.parametrize("cpus", [2, 3, 5, 8, 16, 61])
@pytest.mark.parametrize("fitting", [1, 2, 3, 7])
def test_the_advice_on_cpus_is_right(monkeypatch: pytest.MonkeyPatch, cpus: int, fitting: int):
    monkeypatch.setattr(memory, "usable_cpus", lambda: cpus)
    with pytest.raises(ConfigError) as caught:
        check_fits(10, 100, CPU, 10 * fitting + 5)
    advised = int(str(caught.value).split("cpus-per-client = ")[1].split()[0])
    assert 1 <= actors_per_device(resources(cpus_per_client=advised), 100, CPU) <= fitting


@pytest.mark.parametrize("fitting", [1, 2, 3, 6, 7, 9])
def test_the_advice_on_gpus_is_right(monkeypatch: pytest.MonkeyPatch, fitting: int):
    monkeypatch.setattr(memory, "usable_cpus", lambda: 64)
    with pytest.raises(ConfigError) as caught:
        check_fits(10, 40, CUDA, 10 * fitting)
    advised = float(str(caught.value).split("gpus-per-client to ")[1].split(",")[0])
    assert actors_per_device(resources(gpus_per_client=advised), 100, CUDA) == fitting


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_where_not_even_one_fits_fewer_are_no_advice(device: torch.device):
    with pytest.raises(ConfigError, match=r"Not one would fit: lower resources\.workspace-mib or take a smaller"):
        check_fits(1000, 1, device, 999)


def test_a_run_is_checked_with_the_machines_numbers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "usable_cpus", lambda: 4)
    need = 4 * actor_bytes(task(CPU), CONFIG)
    monkeypatch.setattr(memory, "available_bytes", lambda device: need)
    check_memory(CONFIG, task(CPU))
    monkeypatch.setattr(memory, "available_bytes", lambda device: need - 1)
    with pytest.raises(ConfigError, match="the run would not fit into the memory of this machine: 4 actors"):
        check_memory(CONFIG, task(CPU))


def test_on_a_gpu_device_and_host_are_checked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "usable_cpus", lambda: 4)
    config = dataclasses.replace(CONFIG, resources=resources(gpus_per_client=0.5))
    free = {"cuda": 2 * actor_bytes(task(CUDA), CONFIG), "cpu": 2 * 3600 * MIB}  # host: libraries 3000, weights 600
    monkeypatch.setattr(memory, "available_bytes", lambda device: free[device.type])
    check_memory(config, task(CUDA))
    for device, where in (("cuda", "on cuda:0: 2 actors"), ("cpu", "of this machine: 2 actors of about 3600 MiB")):
        free[device] -= 1
        with pytest.raises(ConfigError, match=where):
            check_memory(config, task(CUDA))
        free[device] += 1


def test_the_peak_is_this_processs():
    before = peak_bytes(CPU)
    held = np.ones(100 * MIB // 8)
    assert peak_bytes(CPU) >= max(before, 100 * MIB)
    assert held.all()
