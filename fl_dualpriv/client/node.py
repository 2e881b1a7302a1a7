"""A Flower node and the clients it hosts: their public metadata, state folders and scores."""

import contextlib
import functools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.client.node_run import keep_node_run, keep_scored
from fl_dualpriv.client.personalisation import Personalisation, personal_prompt
from fl_dualpriv.client.state import ClientFolder
from fl_dualpriv.config.plans import record_level_plan, start_selection_terms
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.errors import ConfigError, PrivacyError, type_alone
from fl_dualpriv.learners.base import Objective
from fl_dualpriv.learners.row_check import COMPANY, RowPath, checked_objective
from fl_dualpriv.metrics import ScoreTable
from fl_dualpriv.privacy.filters.budget import Budget
from fl_dualpriv.privacy.noise import random_sources
from fl_dualpriv.privacy.plan import round_terms
from fl_dualpriv.privacy.selection import SelectionTerms
from fl_dualpriv.run.peak_memory import report_peak
from fl_dualpriv.tasks.base import Counts, held_groups
from fl_dualpriv.tasks.build import build_task
from fl_dualpriv.tasks.disclosure import held_out_is_given, may_score
from fl_dualpriv.tasks.memory import peak_bytes

_log = logging.getLogger("fl_dualpriv")

# Eight prompts fill the products of a text tower on a CPU core (docs/benchmarks.md); more prompts help only while they
# fit into the caches together.
_CPU_PROMPTS, _CPU_CACHE_BYTES = 8, 8 * 2**20


class RunContext:
    """A configuration and the objects derived from it, built once per process for all messages of a run.

    Args:
        config: Configuration of the run.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.task = build_task(config)
        self.regulariser, self.method = self.task.regulariser(config), config.local_method
        self.plan = record_level_plan(config)
        self.row_path: RowPath | None
        self.objective, self.row_path = self._checked()
        self.sources = random_sources(config.privacy.randomness)
        self.terms = round_terms(self.plan, config.train.sampling_rate, config.train.local_steps)
        self.personalisation = personalisation(config)
        self.personal_is_given = personal_is_given(config)
        self.selection_terms: SelectionTerms | None = None
        if config.selects_start:
            count = len(self.task.candidates(config.prompt))
            self.selection_terms = start_selection_terms(config, self.plan, count)
        self.reproducible = config.privacy.randomness == "seeded"
        self.prompt_shape = self.task.prompt_shape(config)
        self.may_score = may_score(config)
        self.held_out_is_given = held_out_is_given(config.data, config.evaluation)
        self._counts: tuple[tuple[str, bytes], Counts] | None = None

    def _checked(self) -> tuple[Objective[Any], RowPath | None]:
        """Return the form of the objective whose rows depend on no other record or client here, and its path.

        See `row_check`. The path is None for a method that does not train.

        Raises:
            PrivacyError: If records are protected and there is no such form.
        """
        config, task = self.config, self.task
        objective = task.objective(config)
        if not self.method.trains:
            return objective, None
        hosted = -(-config.population // config.num_supernodes)
        shared = task.initial_prompt(config).to(task.backbone.device)
        generator = torch.Generator().manual_seed(0)
        personal_prompts = [
            torch.randn(shared.shape, generator=generator).to(shared) for _ in range(min(hosted, COMPANY))
        ]
        prompts = torch.stack([self.method.effective(shared, 0.02 * personal) for personal in personal_prompts])
        return checked_objective(objective, task.made_up, prompts, private=self.plan is not None)

    @property
    def clients_apart(self) -> bool:
        """True if clients have to step one by one."""
        return self.row_path in ("clients apart", "records and clients apart")

    @property
    def keeps_state(self) -> bool:
        """True if a client keeps state: a personal prompt, or the rounds that its plan may not repeat."""
        return self.method.personal or self.plan is not None or self.config.chooses_start_by_client

    def effective(self, shared: Tensor, personal: Tensor) -> Tensor:
        """Return a client's prompt. A method without training has a personal part if each client chose its start."""
        if self.config.chooses_start_by_client and not self.method.trains:
            return shared + personal
        return self.method.effective(shared, personal)

    @functools.cached_property
    def held(self) -> Tensor:
        """True where a client holds a group, (client, group) bool, new clients last; public metadata.

        A new client that holds a class of no trained client gets no group, so that it has no score: the accuracy on
        new clients is not one on new classes.
        """
        held, population = held_groups(self.task), self.config.population
        classes = held.unflatten(1, (max(1, len(self.task.domain_names)), -1)).any(dim=1)
        is_known = ~(classes & ~classes[:population].any(dim=0)).any(dim=1)
        return held & is_known[:, None]

    @functools.cached_property
    def free_counts(self) -> Counts:
        """Counts of the free rival for every client, new ones included, computed once per process."""
        return self.task.free_counts(self.config)

    def shared_counts(self, kind: messages.PromptKind, prompt: Tensor) -> Counts:
        """Count correct and all held-out records per group for a prompt of all clients; cache the last result.

        Correct are (group,), or (client, group) if clients have class priors; the un-tuned model is scored without.
        """
        key = (kind, b"" if kind == "zero-shot" else prompt.numpy().tobytes())
        if self._counts is None or self._counts[0] != key:
            if kind == "zero-shot":
                counts = self.task.zero_shot_counts(self.config)
            else:
                everyone = range(len(self.held))
                own = self.task.prior_counts(prompt[None], everyone, self.held, self.config)
                counts = self.task.counts(prompt[None], self.config)[0] if own is None else own
            self._counts = key, counts
        return self._counts[1]


def personalisation(config: RunConfig) -> Personalisation | None:
    """Return the numbers of the personal prompts that a client shrinks itself, or None if it does not."""
    method = config.local_method
    if config.prompt.personalisation in ("published", "collective") or not method.personal:
        return None
    return Personalisation(
        shrinkage=config.prompt.personalisation,
        memory=config.prompt.personal_memory,
        local_learning_rate=config.train.local_learning_rate,
        global_learning_rate=config.train.global_learning_rate if method.shared else 0.0,
    )


def personal_is_given(config: RunConfig) -> bool:
    """Return True if the server makes the clients' personal prompts and sends them, see `server.collective`."""
    return config.prompt.personalisation == "collective" and config.local_method.personal


class Sized(Protocol):
    """A tower or an objective that knows the memory of one more prompt."""

    @property
    def bytes_per_prompt(self) -> int:
        """Approximate memory of one prompt in a pass."""
        ...


def prompts_at_once(sized: Sized, workspace_bytes: int, device: torch.device) -> int:
    """Return how many prompts may run together, at least one. It splits the work and never changes a result."""
    fitting = max(1, workspace_bytes // max(1, sized.bytes_per_prompt))
    if device.type == "cuda":
        return fitting
    return min(fitting, max(_CPU_PROMPTS, _CPU_CACHE_BYTES // max(1, sized.bytes_per_prompt)))


def chunks(partitions: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Yield groups of at most ``size`` clients, in order."""
    for start in range(0, len(partitions), size):
        yield partitions[start : start + size]


def check_part(part: Tensor) -> None:
    """Refuse a personal prompt of the server that is not finite.

    Raises:
        PrivacyError: If an entry is not finite.
    """
    if not bool(torch.isfinite(part).all()):
        raise PrivacyError("the request has a personal part that is not finite; it is refused")


class Failures(dict[int, str]):
    """Reason of each failed partition, for the server. The node's log gets each full reason once.

    Args:
        private: True if noise protects the clients' data. Then no other output may depend on them. A refusal, whose
            text is made of public numbers, travels in full; of other errors only the type travels.
    """

    def __init__(self, *, private: bool = False) -> None:
        super().__init__()
        self._private = private
        self._logged: set[str] = set()

    def add(self, partitions: Iterable[int], error: Exception) -> None:
        """Add clients that failed together with one error."""
        reason = f"{type(error).__name__}: {error}"
        if reason not in self._logged:
            self._logged.add(reason)
            ours = isinstance(error, ConfigError | PrivacyError)  # its message explains the problem without a traceback
            _log.warning("a client failed: %s", reason, exc_info=None if ours else error)
        if self._private and not isinstance(error, PrivacyError):
            reason = type_alone(error)
        self |= dict.fromkeys(partitions, reason)


@dataclass(frozen=True, kw_only=True)
class Node:
    """One Flower node of a run. It hosts the clients j, j + nodes, j + 2 nodes and so on.

    Attributes:
        run_context: Objects that all nodes of the process share.
        index: Index j of the node.
        run_folder: Folder of the run, for clients without a folder that the node's owner chose.
        state_dir: Folder that the node's owner chose for its only client, or None.
        budget: Limits that the node's owner set for each client here; None if the plan of the run is the only limit.
    """

    run_context: RunContext
    index: int
    run_folder: Path
    state_dir: Path | None
    budget: Budget | None = None

    def __post_init__(self) -> None:
        nodes = self.run_context.config.num_supernodes
        if not 0 <= self.index < nodes:
            raise ConfigError(
                f"partition-id = {self.index} of this node, but the run has {nodes} nodes; give every node a "
                "different partition-id, counted from 0"
            )
        if self.run_context.config.data.partition == "by-node" and len(self.hosted) > 1:
            raise ConfigError(  # all clients would hold the same records, and each record would count several times
                f'this node has all records of its folder (data.partition = "by-node") and the run would give it '
                f"{len(self.hosted)} clients; set supernodes = 0"
            )
        if self.state_dir is not None and len(self.hosted) > 1:
            # One folder has one budget: another layout of clients in it would start new ledgers for the same records.
            raise ConfigError(
                f"this node keeps its client's state in {self.state_dir} (state-dir), and the run would give it "
                f"{len(self.hosted)} clients; set supernodes = 0"
            )

    @property
    def hosted(self) -> range:
        """The clients of this node that take part in rounds."""
        config = self.run_context.config
        return range(self.index, config.population, config.num_supernodes)

    @property
    def new_clients(self) -> list[int]:
        """The new clients of this node, which are only scored: no card, no round, no state and no ledger."""
        config = self.run_context.config
        everyone = range(config.population + config.evaluation.new_clients)
        return [p for p in everyone[config.population :] if p % config.num_supernodes == self.index]

    def cards(self) -> list[messages.ClientCard]:
        """Return the public metadata of all hosted clients.

        Raises:
            ConfigError: If the run needs class shares that their owners did not declare.
        """
        task, rows = self.run_context.task, self.run_context.row_path
        task.check_clients(self.hosted)
        return [messages.ClientCard(partition=p, num_examples=task.num_examples(p), rows=rows) for p in self.hosted]

    def folder(self, partition: int) -> ClientFolder:
        """Return the folder of one client."""
        return ClientFolder(self.state_dir or self.run_folder / "clients" / f"client-{partition:03d}")

    def keep_run(self, partition: int, run_token: str) -> None:
        """Record on a deployed node the use of its prompt, so that the owner can publish the prompt."""
        if self.state_dir is not None:
            run_context = self.run_context
            keep_node_run(
                self.state_dir, run_context.config, run_context.task, run_token, partition, scored=run_context.may_score
            )

    def asked(self, partitions: Sequence[int], *, new_too: bool = False) -> list[int]:
        """Check the clients that a message names, and return them in order.

        Guarantee:
            Without ``new_too`` a new client is refused like a client of another node. A round asks without it, so no
            record of a new client is used in any round.

        Raises:
            PrivacyError: If a client is not hosted here, or is named twice.
        """
        allowed = {*self.hosted, *(self.new_clients if new_too else ())}
        if len(set(partitions)) != len(partitions) or not allowed.issuperset(partitions):
            raise PrivacyError("a message names a client twice, or one that this node does not host; it is refused")
        return sorted(partitions)

    def parts_of(self, request: messages.TrainRequest | messages.EvaluateRequest) -> dict[int, Tensor]:
        """Check the personal prompts that the server sent, and return them by client; empty if none belong there.

        Raises:
            PrivacyError: If the request has parts that do not belong there, or not one of the prompt's shape and type
                for each named client.
        """
        parts, given = request.personal_parts, self.run_context.personal_is_given
        if isinstance(request, messages.EvaluateRequest):
            given = given and request.prompt == "personal"
        if not given:
            if parts is not None:
                raise PrivacyError("the request has personal parts, and the server makes none here; it is refused")
            return {}
        if parts is None:
            raise PrivacyError("the request has no personal parts, and the server makes them here; it is refused")
        expected = (len(request.partitions), *self.run_context.prompt_shape)
        if tuple(parts.shape) != expected or parts.dtype != torch.float32:
            raise PrivacyError(
                f"the request has personal parts of shape {tuple(parts.shape)}, {parts.dtype}; this run's are "
                f"{expected}, torch.float32"
            )
        return dict(zip(request.partitions, parts, strict=True))

    def score(self, request: messages.EvaluateRequest) -> messages.Scores:
        """Score the zero-shot, the free, the global or the personal prompt of each requested client on held-out images.

        New clients have no personal prompt.

        Raises:
            PrivacyError: If those images are private here, or the owner of the node does not let their scores leave.
        """
        run_context = self.run_context
        partitions = self.asked(request.partitions, new_too=request.prompt != "personal")
        if not run_context.may_score:
            raise PrivacyError("the held-out images are private here: their scores would be an unaccounted release")
        if self.budget is not None and not (self.budget.scores and run_context.held_out_is_given):
            reason = "the owner of this node lets only scores of public test/ or val/ folders leave, or no scores"
            for partition in partitions:
                self.folder(partition).log_refusal(request.run_token, f"evaluate, round {request.server_round}", reason)
            raise PrivacyError(reason)
        parts = self.parts_of(request)
        held = run_context.held[partitions]
        if request.prompt == "free":
            correct, total = run_context.free_counts
            table = ScoreTable.of(correct[partitions], total, held)
            return messages.Scores(partitions=tuple(partitions), values=table)
        if request.prompt != "personal" or not run_context.keeps_state:
            kind = "zero-shot" if request.prompt == "zero-shot" else "global"
            correct, total = run_context.shared_counts(kind, request.global_prompt)
            table = ScoreTable.of(correct if correct.dim() == 1 else correct[partitions], total, held)
            return messages.Scores(partitions=tuple(partitions), values=table)
        return self._score_personal(request, partitions, parts)

    def _score_personal(
        self, request: messages.EvaluateRequest, partitions: list[int], parts: dict[int, Tensor]
    ) -> messages.Scores:
        run_context = self.run_context
        failed = Failures(private=run_context.plan is not None)
        correct: dict[int, Tensor] = {}
        total = torch.zeros(run_context.held.shape[1], dtype=torch.long)
        device = run_context.task.backbone.device
        n_ctx, ctx_dim = request.global_prompt.shape
        personalisation = run_context.personalisation
        shapes = None if personalisation is None else personalisation.release_memory_shapes(n_ctx, ctx_dim)
        size = prompts_at_once(run_context.objective, run_context.config.resources.workspace_mib * 2**20, device)
        for group in chunks(partitions, size):
            prompts: dict[int, Tensor] = {}
            for p in group:
                try:
                    if p in parts:
                        check_part(parts[p])
                        prompts[p] = run_context.method.effective(request.global_prompt, parts[p])
                        self._keep_part(p, parts[p], request)
                        continue
                    rank, terms = run_context.config.prompt.rank, str(run_context.terms)
                    state = self.folder(p).load(
                        request.run_token, n_ctx, ctx_dim, rank, shapes, terms=terms, partial=True
                    )
                    personal = personal_prompt(state, personalisation, request.global_prompt, request.server_round)
                    prompts[p] = run_context.effective(request.global_prompt, personal)
                except Exception as error:
                    failed.add([p], error)
            if not prompts:
                continue
            counts, total = self._own_counts(prompts)
            for p, correct[p] in zip(prompts, counts, strict=True):
                if self.state_dir is not None:  # the last global prompt of a run comes with its last score
                    table = ScoreTable.of(correct[p], total, run_context.held[p : p + 1])
                    with contextlib.suppress(OSError):
                        keep_scored(
                            self.state_dir,
                            prompts[p],
                            table,
                            request.run_token,
                            request.server_round,
                            run_context.config.train.class_prior,
                        )
        rows = torch.stack(list(correct.values())) if correct else total[None][:0]
        table = ScoreTable.of(rows, total, run_context.held[list(correct)])
        return messages.Scores(partitions=tuple(correct), values=table, failed=failed)

    def _own_counts(self, prompts: Mapping[int, Tensor]) -> Counts:
        """Count for one prompt of each client, by partition, (client, group); at home with its class prior, if any."""
        run_context, partitions = self.run_context, list(prompts)
        task, config, stacked = run_context.task, run_context.config, torch.stack(list(prompts.values()))
        counts = task.prior_counts(stacked, partitions, run_context.held[partitions], config)
        if counts is not None:
            return counts
        correct, totals = zip(*task.counts(stacked, config), strict=True)
        return torch.stack(correct), totals[0]

    def _keep_part(self, partition: int, part: Tensor, request: messages.EvaluateRequest) -> None:
        """Keep a part that came with a score, because after the last round nothing else brings it to the client."""
        if request.server_round > 0:
            with contextlib.suppress(OSError):
                self.folder(partition).keep_part(part, request.global_prompt, request.server_round, request.run_token)

    def report_memory(self) -> None:
        """Log the peak memory of the process if it grew; without an owner's state folder, also write it to a file."""
        device = self.run_context.task.backbone.device
        folder = self.run_folder if self.state_dir is None else None
        report_peak(folder, str(device), lambda: peak_bytes(device))
