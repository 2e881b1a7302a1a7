"""Protocol of a task: the objects that all clients of a process share, built once from the configuration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fl_dualpriv.config.schema import PromptConfig, RunConfig
from fl_dualpriv.data.images import ImageDataset
from fl_dualpriv.learners.base import Objective, Records, Regulariser
from fl_dualpriv.models.base import ImageEncoder
from fl_dualpriv.privacy.noise import KeyedRandom, StreamKey, gaussian_noise
from fl_dualpriv.run.user_folders import home
from fl_dualpriv.tasks.use_facts import UseFacts

Counts = tuple[Tensor, Tensor]
"""Right answers and all held-out records of each group, both (group,) int64 on the CPU."""


class Task(Protocol):
    """What all clients of a process share. Nothing in here grows with the number of clients that asked.

    A *group* is what records are counted by: the class of an image, or the type of a question. A client's groups are
    public metadata, like its number of records.
    """

    @property
    def partitions(self) -> list[np.ndarray]:
        """Record indices per client."""
        ...

    @property
    def cache_root(self) -> Path | None:
        """Where image features are kept, see `cache_root`; None: in memory only."""
        ...

    @property
    def backbone(self) -> ImageEncoder:
        """The frozen model."""
        ...

    @property
    def groups(self) -> np.ndarray:
        """Group of each training record, (record,)."""
        ...

    @property
    def group_names(self) -> tuple[str, ...]:
        """Of classes, or of question types."""
        ...

    def images(self, split: str) -> ImageDataset:
        """The images of ``train``, ``val`` or ``test``."""
        ...

    @property
    def data_identity(self) -> dict[str, str]:
        """See `data.identity.data_identity`: an operator's."""
        ...

    def check_any_fits(self) -> None:
        """For the operator of a simulation: refuse a data set none of whose training records the model can read.

        Raises:
            ConfigError: With the first reason.
        """
        ...

    def prompt_shape(self, config: RunConfig) -> tuple[int, int]:
        """Of what travels: a prompt, or what the method learns in place of one."""
        ...

    def prompt_segments(self, prompt: PromptConfig) -> tuple[int, ...]:
        """Neighbouring columns of a prompt that are one matrix of the model each; empty: it has no such parts."""
        ...

    def initial_prompt(self, config: RunConfig) -> Tensor:
        """p_G before round 1, float32 on the CPU."""
        ...

    def context_of(self, learned: Tensor, config: RunConfig) -> Tensor | None:
        """The context prompt that learned factors amount to; None: what is learned is used as it is."""
        ...

    def objective(self, config: RunConfig) -> Objective[Any]:
        """The loss of records under prompts."""
        ...

    def regulariser(self, config: RunConfig) -> Regulariser | None:
        """The part of the loss that reads prompts alone."""
        ...

    def num_examples(self, partition_id: int) -> int:
        """n_i, public metadata; reads no image."""
        ...

    def client_data(self, partition_id: int, server_round: int = 0) -> Records:
        """A client's records, gathered anew at each call.

        Raises:
            ConfigError: Without DP, if a record cannot be used; it names the first.
        """
        ...

    def made_up(self) -> Records:
        """Records that nobody owns, of the shapes of a client's; always the same.

        For `row_check`: one more than `MADE_UP_BLOCKS` blocks. Features are random and labels any.
        """
        ...

    def counts(self, prompts: Tensor, config: RunConfig) -> Sequence[Counts]:
        """Score each prompt on the held-out split of the configuration; prompts (prompt, rows, cols)."""
        ...

    def zero_shot_counts(self, config: RunConfig) -> Counts:
        """Score the model without learning."""
        ...

    def use_facts(self, config: RunConfig) -> UseFacts | None:
        """How a prompt of this run is used; None if it cannot be used without the run."""
        ...


def held_groups(task: Task) -> Tensor:
    """Whether a client holds a group, (population, group) bool; public metadata."""
    table = np.zeros((len(task.partitions), len(task.group_names)), dtype=bool)
    for partition, indices in enumerate(task.partitions):
        table[partition, task.groups[indices]] = True
    return torch.from_numpy(table)


def random_prompt(rows: int, cols: int, seed: int, purpose: str = "initial-prompt") -> Tensor:
    """N(0, 0.02²), keyed by the seed: CoOp's random start (Zhou et al. 2022, arXiv:2109.01134)."""
    source = KeyedRandom(StreamKey(seed=seed, purpose=purpose))
    return gaussian_noise(source, (rows, cols), 0.02).float()


def one_thread(device: str) -> None:
    """Give this process one thread on a CPU: threads of many clients on few cores only wait for each other."""
    if torch.get_num_threads() != 1 and device in ("auto", "cpu"):
        torch.set_num_threads(1)


def run_folder(output_dir: str, run_id: int) -> Path:
    """Where a run writes: ``output.dir``, or a folder of its own under the user's home."""
    return Path(output_dir) if output_dir else home() / ".fl-dualpriv" / "runs" / str(run_id)
