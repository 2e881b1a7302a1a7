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
"""Number of correct and of all held-out records of each group, both (group,) int64 on the CPU."""


class Task(Protocol):
    """Data, model and objective that all clients of a process share.

    No part of a task grows with the number of clients that used it. A *group* is the category by which records are
    counted: the class of an image, or the type of a question; where clients belong to domains, a pair of domain and
    class. A group's number modulo the number of classes is its class. A client's groups are public metadata, like its
    number of records.
    """

    @property
    def partitions(self) -> list[np.ndarray]:
        """Record indices per client: of the population, then of the new clients, which take part in no round."""
        ...

    @property
    def cache_root(self) -> Path | None:
        """Folder of the cached image features, see `cache_root`; None if they are only in memory."""
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
        """Names of the groups."""
        ...

    @property
    def domain_names(self) -> tuple[str, ...]:
        """Names of the domains; empty if clients belong to none."""
        ...

    def images(self, split: str) -> ImageDataset:
        """Return the images of ``train``, ``val`` or ``test``."""
        ...

    @property
    def data_identity(self) -> dict[str, str]:
        """Identity of the data for the operator, see `data.identity.data_identity`."""
        ...

    def check_any_fits(self) -> None:
        """Refuse a data set of a simulation if the model cannot read any of its training records.

        Raises:
            ConfigError: If the model can read none of them. The message has the first reason.
        """
        ...

    def prompt_shape(self, config: RunConfig) -> tuple[int, int]:
        """Return the shape of the tensor that travels: a prompt, or the tensor that the method learns instead."""
        ...

    def prompt_segments(self, prompt: PromptConfig) -> tuple[int, ...]:
        """Return the widths of the column ranges that each form one matrix of the model; empty without such parts."""
        ...

    def initial_prompt(self, config: RunConfig) -> Tensor:
        """Return p_G before round 1, float32 on the CPU."""
        ...

    def candidates(self, prompt: PromptConfig) -> Tensor:
        """Return the contexts from which a start is selected, (candidate, n_ctx, ctx_dim); public.

        Raises:
            ConfigError: If a candidate does not fit.
        """
        ...

    def answered_rightly(self, data: Any, prompt: PromptConfig) -> Tensor:
        """Return True where the un-tuned model with a candidate answers a record rightly, (record, candidate) bool.

        Guarantee that every implementation must give:
            Row i is a function of only record i and of public numbers, bit by bit. The row of a record that cannot be
            read is False.
        """
        ...

    def context_of(self, learned: Tensor, config: RunConfig) -> Tensor | None:
        """Return the context prompt that is equivalent to learned factors.

        None if the learned tensor is already used directly or has no equivalent context prompt.
        """
        ...

    def objective(self, config: RunConfig) -> Objective[Any]:
        """Return the loss of records under prompts."""
        ...

    def regulariser(self, config: RunConfig) -> Regulariser | None:
        """Return the part of the loss that reads only prompts, or None without one."""
        ...

    def num_examples(self, partition_id: int) -> int:
        """Return the client's number of records n_i, public metadata; reads no image."""
        ...

    def client_data(self, partition_id: int, server_round: int = 0) -> Records:
        """Gather a client's records; each call gathers them again.

        Raises:
            ConfigError: Without DP, if a record cannot be used; the message names the first one.
        """
        ...

    def made_up(self) -> Records:
        """Return made-up records with the shapes of a client's; the same at each call.

        They are for `row_check`: one more than `MADE_UP_BLOCKS` blocks. Features are random and labels are arbitrary.
        """
        ...

    def counts(self, prompts: Tensor, config: RunConfig) -> Sequence[Counts]:
        """Score each prompt on the held-out split of the configuration; prompts (prompt, rows, cols)."""
        ...

    def prior_counts(
        self, prompts: Tensor, partitions: Sequence[int], held: Tensor, config: RunConfig
    ) -> Counts | None:
        """Score the prompt of each client: its own groups with its class prior, the other groups without it.

        Args:
            prompts: One prompt for each client, or a single one for all of them, (prompt, rows, cols).
            partitions: The clients, new ones included; at least one.
            held: True where a client holds a group, (client, group) bool, in the order of ``partitions``.
            config: Configuration of the run.

        Returns:
            Correct records of each client, (client, group), in the order of ``partitions``, and all records (group,).
            None if the clients of the run have no class prior.
        """
        ...

    def check_clients(self, partitions: Sequence[int]) -> None:
        """Refuse clients for which a public value is missing that their owner must declare.

        Raises:
            ConfigError: If the run needs declared class shares, and a client has none.
        """
        ...

    def zero_shot_counts(self, config: RunConfig) -> Counts:
        """Score the model without learning."""
        ...

    def free_rival(self, config: RunConfig) -> str:
        """Return the name of the rival that `free_counts` scores; ``un-tuned`` if public knowledge adds nothing."""
        ...

    def free_counts(self, config: RunConfig) -> Counts:
        """Score the best use of public knowledge without learning: the rival that costs no ε.

        Returns:
            Correct records of each client, (client, group), new clients included, and all records (group,).
        """
        ...

    def use_facts(self, config: RunConfig) -> UseFacts | None:
        """Return the facts for using a prompt of this run; None if it cannot be used without the run."""
        ...


def group_ids(labels: np.ndarray, domains: np.ndarray | None, n_cls: int) -> np.ndarray:
    """Return the group of each record, int64: its class, or domain · n_cls + class."""
    return labels if domains is None else domains.astype(np.int64) * n_cls + labels


def names_of_groups(classes: tuple[str, ...], domains: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the groups in the order of `group_ids`."""
    return tuple(f"{domain}: {name}" for domain in domains for name in classes) if domains else classes


def held_groups(task: Task) -> Tensor:
    """Return True where a client holds a group, (client, group) bool; public metadata."""
    table = np.zeros((len(task.partitions), len(task.group_names)), dtype=bool)
    for partition, indices in enumerate(task.partitions):
        table[partition, task.groups[indices]] = True
    return torch.from_numpy(table)


def random_prompt(rows: int, cols: int, seed: int, purpose: str = "initial-prompt") -> Tensor:
    """Draw from N(0, 0.02²), keyed by the seed: CoOp's random start (Zhou et al. 2022, arXiv:2109.01134)."""
    source = KeyedRandom(StreamKey(seed=seed, purpose=purpose))
    return gaussian_noise(source, (rows, cols), 0.02).float()


def one_thread(device: str) -> None:
    """Limit this process to one thread on a CPU: threads of many clients on few cores only wait for each other."""
    if torch.get_num_threads() != 1 and device in ("auto", "cpu"):
        torch.set_num_threads(1)


def run_folder(output_dir: str, run_id: int) -> Path:
    """Return the folder of a run: ``output.dir``, or a separate folder under the user's home."""
    return Path(output_dir) if output_dir else home() / ".fl-dualpriv" / "runs" / str(run_id)
