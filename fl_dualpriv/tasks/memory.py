"""Memory check before the rounds start: the estimated memory of all actors against the memory of the machine."""

import math
from pathlib import Path
from typing import cast

import numpy as np
import torch

from fl_dualpriv.config.schema import ResourcesConfig, RunConfig
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.features.cache import IN_MEMORY
from fl_dualpriv.features.images import BATCH
from fl_dualpriv.models.base import Backbone
from fl_dualpriv.run import cgroups
from fl_dualpriv.run.cpus import usable_cpus
from fl_dualpriv.run.peak_memory import resident_peak
from fl_dualpriv.tasks.base import Task

_MIB = 2**20
_PROCESS = 480 * _MIB
"""Measured: 470 MiB of private memory in a Ray actor with the demo task, without weights, on the CPU build of torch.
All actors share the files of the libraries, 150 MiB."""
_CUDA_PROCESS = 3000 * _MIB
"""Host memory of an actor with the CUDA libraries and their kernels: a guess, not measured."""
_CUDA_CONTEXT = 700 * _MIB
"""Device memory of a CUDA context with its library workspaces: a guess, not measured."""
_ACTIVATIONS_PER_PIXEL = 32
"""Memory that encoding a batch adds, as a multiple of the size of its pixels. Measured: 6 ViT-B/32, 16 ViT-B/16,
23 ViT-L/14, 24 RN50, 31 ConvNeXt-base."""
_PIXELS = 224 * 224
_PSEUDO_UNLIMITED = 2**60  # cgroup v1 writes "no limit" as a number near 2**63


def actor_bytes(task: Task, config: RunConfig) -> int:
    """Estimate the memory that one actor takes on the device of its model; the estimate is meant to be a little high.

    It is the sum of a process's base, the frozen weights (once per actor), the workspace (`resources.workspace-mib`),
    the features in memory, and the memory that encoding a batch of images adds.
    """
    base = _CUDA_CONTEXT if task.backbone.device.type == "cuda" else _PROCESS
    encoding = _ACTIVATIONS_PER_PIXEL * BATCH * 3 * 4 * _image_pixels(task)
    workspace = config.resources.workspace_mib * _MIB
    return base + task.backbone.weight_bytes + workspace + _feature_bytes(task, config) + encoding


def _feature_bytes(task: Task, config: RunConfig) -> int:
    """Return the bytes of features in memory: all of one held-out split, and training features that are not on disk."""
    row = 4 * task.backbone.embed_dim
    if config.local_method.reads_patches:
        row *= 1 + cast(Backbone, task.backbone).n_patches  # such a method learns only from images
    training, *held_out = (row * len(task.images(split)) for split in ("train", "val", "test"))
    return (training if task.cache_root is None else min(training, IN_MEMORY)) + max(held_out)


def _image_pixels(task: Task) -> int:
    """Return height times width of the image tower's input, from the first image that can be read."""
    images = task.images("test")
    for index in range(len(images)):
        try:
            return math.prod(task.backbone.preprocess(images.image(index)).shape[-2:])
        except Exception:  # a bad record; try the next one
            continue
    return _PIXELS


def actors_per_device(resources: ResourcesConfig, supernodes: int, device: torch.device) -> int:
    """Return the number of actors on one machine or one GPU: as many as Flower's simulation starts."""
    by_cpu = max(1, usable_cpus() // resources.cpus_per_client)
    if device.type == "cuda" and resources.gpus_per_client > 0:
        by_gpu = max(1, math.floor(1 / resources.gpus_per_client + 1e-9))
        return min(by_cpu, by_gpu, supernodes)
    return min(by_cpu, supernodes)


def available_bytes(device: torch.device) -> int:
    """Return the memory that is free now: on a GPU from its driver, else the machine's, or the container's if less."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host_available_bytes(Path("/"))


def host_available_bytes(root: Path) -> int:
    """Return the least of the kernel's available memory and the memory left in each control group of this process.

    Args:
        root: Root of the file system, ``/``; tests pass another tree.
    """
    left = [value * 1024 for value in cgroups.numbers(root / "proc/meminfo", "MemAvailable:")]
    groups, names = root / "sys/fs/cgroup", cgroups.group_names(root / "proc/self/cgroup")
    for path in cgroups.and_above(names.get("")):
        left += _group_left(groups / path, "memory.max", "memory.current", "inactive_file")
    for path in cgroups.and_above(names.get("memory")):
        folder = groups / "memory" / path
        left += _group_left(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    # Without /proc the memory is unknown, and a guess must not stop a run.
    return min(left, default=np.iinfo(np.int64).max)


def _group_left(folder: Path, limit: str, used: str, reclaimable: str) -> list[int]:
    bounds, usage = cgroups.numbers(folder / limit), cgroups.numbers(folder / used)
    if not bounds or not usage or bounds[0] >= _PSEUDO_UNLIMITED:
        return []
    # Cached files count as used, but the kernel drops them when a process needs memory.
    cached = sum(cgroups.numbers(folder / "memory.stat", f"{reclaimable} "))
    return [max(0, bounds[0] - usage[0] + cached)]


def check_fits(per_actor: int, actors: int, device: torch.device, available: int) -> None:
    """Refuse a run whose actors together need more memory than is available.

    Raises:
        ConfigError: If they do. The message has the numbers, and the keys that change them.
    """
    if per_actor * actors <= available:
        return
    where = f"on {device}" if device.type == "cuda" else "of this machine"
    fitting = available // per_actor
    if device.type == "cuda":
        fewer = f"raise resources.gpus-per-client to {int(1e4 / fitting) / 1e4:g}" if fitting else ""
    else:
        cpus = usable_cpus() // (fitting + 1) + 1  # the fewest CPUs per actor that keep the number of actors in bounds
        fewer = f"set resources.cpus-per-client = {cpus} or supernodes = {fitting}"
    advice = f"{fitting} would fit: {fewer}, or" if fitting else "Not one would fit:"
    raise ConfigError(
        f"the run would not fit into the memory {where}: {actors} actors of about {per_actor / _MIB:.0f} MiB need "
        f"{per_actor * actors / _MIB:.0f} MiB, and {available / _MIB:.0f} MiB are available. {advice} lower "
        "resources.workspace-mib or take a smaller backbone"
    )


def check_memory(config: RunConfig, task: Task) -> None:
    """Compare the memory that the simulation's actors will take with the memory that is available now.

    Call it on the machine of the actors, after this process built its own task and before the first message to a
    client. Later the memory of running actors would count twice. The machines of a cluster are not looked at.

    Raises:
        ConfigError: If the actors would not fit.
    """
    device, resources = task.backbone.device, config.resources
    if resources.ray_address:
        return
    if device.type == "cuda":
        actors = actors_per_device(resources, config.num_supernodes, device)
        check_fits(actor_bytes(task, config), actors, device, available_bytes(device))
        host = torch.device("cpu")  # weights are first loaded into host memory
        check_fits(_CUDA_PROCESS + task.backbone.weight_bytes, actors, host, available_bytes(host))
    else:
        actors = actors_per_device(resources, config.num_supernodes, device)
        check_fits(actor_bytes(task, config), actors, device, available_bytes(device))


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: on a GPU the memory allocated by torch, else the resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_peak()
