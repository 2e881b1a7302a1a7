"""Audit of the record level: plant canary records and guess from their clients' releases which ones are present.

**Why the bound holds.** The unit is one record of one client. The relation is add-or-remove-one, as in the accountant:
a record's term is present or zero, and n_i is public (docs/privacy.md). Every canary has its own fair coin. An absent
canary is replaced by a record of zero features, whose gradient is zero, so only its term is missing. The mechanism is
the one that the plan accounts for: all uploads of all rounds. A record belongs to one client. The plan bounds all
releases of that client jointly, and the later releases of other clients depend on the record only through them. So the
map from all coins of all clients to all uploads is (ε, δ)-DP for each single coin, and the guesses about all coins
count together. The auditor sees uploads, global prompts and personal prompts, all of which are releases. It knows every
canary. It does not know the coins, the batches or the noise. The choice of canaries, scores and tower changes how large
the bound is, but never its validity.

Clients hold only canaries. Other records would blur the scores, and an auditor who knows them could subtract them. DP
holds for any other records, and this choice gives the largest bound.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from attacks.verdict import CANARIES, AuditResult, coins, judge, silenced
from fl_dualpriv import messages
from fl_dualpriv.client.node import chunks, personalisation, prompts_at_once
from fl_dualpriv.client.personalisation import personal_prompt
from fl_dualpriv.client.round import local_training
from fl_dualpriv.client.state import PersonalState, fresh_state
from fl_dualpriv.client.step import Participant, cohort_update
from fl_dualpriv.config.plans import record_level_plan
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.learners.base import ClientData
from fl_dualpriv.learners.rows import Batches, per_example_gradients
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSource, RandomSources, StreamKey, random_sources
from fl_dualpriv.privacy.plan import RecordLevelPlan
from fl_dualpriv.server.build import collective_parts
from fl_dualpriv.server.collective import Collective
from fl_dualpriv.tasks.build import image_task
from fl_dualpriv.tasks.images import ImageTask

_MOST_PER_CLIENT = 96
_OWN_SHARE = 0.6  # least part of a clipped gradient outside the span of earlier canaries, relative to the largest
_RIDGE = 0.1  # relative to a canary's weight; without it, separating two similar canaries would amplify the noise
_ENOUGH_CLIENTS = 8  # from this number on, the mean over clients estimates their common part


def audit_record_level(config: RunConfig, seed: int, *, canaries: int = CANARIES, noisy: bool = True) -> AuditResult:
    """Plant canaries at simulated clients, run all rounds with the code of a real run, and guess.

    Args:
        config: The run; its method, learner, steps, rounds and record-level privacy are audited. ``canaries`` sets
            the number of clients: the plan is that of one client and does not depend on the number.
        seed: Seed of coins and canaries; with ``privacy.randomness = "seeded"`` also of batches and noise.
        canaries: Least number of canaries over all clients.
        noisy: False runs the control: noise is zero, the claim stays, and the bound shows how much the audit can find.

    Raises:
        ConfigError: If no record-level ε is proved, or if clients trust the server, so uploads carry no noise.
    """
    plan = _plan(config)
    task = image_task(config)
    return _Audit(config, plan, task, seed, canaries, noisy=noisy).run()


def _plan(config: RunConfig) -> RecordLevelPlan:
    plan = record_level_plan(config)
    if plan is None:
        raise ConfigError(
            f"method = {config.method!r} with privacy.record.mechanism = {config.privacy.record.mechanism!r}: no "
            'record-level ε is proved, so there is none to audit; set the mechanism to "gaussian" and another method'
        )
    if plan.trusts_server:
        raise ConfigError(
            "privacy.record.trusts-server = true: clients upload clean sums, and what is released is their noised sum "
            "over clients, which this audit does not take apart; set it to false to audit the client's own noise"
        )
    return plan


class _Audit:
    """One audit: clients, canaries and coins."""

    def __init__(
        self, config: RunConfig, plan: RecordLevelPlan, task: ImageTask, seed: int, canaries: int, *, noisy: bool
    ) -> None:
        self._config, self._plan, self._task, self._seed, self._noisy = config, plan, task, seed, noisy
        self._method, self._tower = config.local_method, task.tower(config.prompt)
        self._prompt = task.initial_prompt(config).to(task.backbone.device)
        self._log_prior = task.log_prior(0)  # public; all simulated clients are alike
        self._features, self._labels = self._craft()
        per_client = len(self._labels)
        self._clients = -(-canaries // per_client)
        shape = (self._clients, per_client)
        self._present = coins(KeyedRandom(StreamKey(seed=seed, purpose="audit-coins")), shape)

    def _craft(self) -> tuple[Tensor, Tensor]:
        """Make the canaries of one client, equal for all clients: features, and the least likely class of each.

        An unlikely class gives a large gradient, so clipping brings a canary to the norm C. The features are
        orthonormal. Only those whose gradients add new directions are used: all for a head, about 20 for a text tower.
        """
        width = self._task.backbone.embed_dim
        generator = np.random.default_rng([self._seed, 1])
        basis, _ = np.linalg.qr(generator.standard_normal((width, min(width, _MOST_PER_CLIENT))))
        features = torch.from_numpy(basis.T.copy()).to(self._prompt)
        labels = (features @ self._tower.values(self._prompt[None])[0].T).argmin(dim=1)
        rows = self._gradients(self._prompt, features, labels).cpu().numpy()
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        reached = rows / np.maximum(norms, self._plan.clip_norm)
        # With pivoting, a diagonal entry is the norm that a row adds to the span of the earlier rows, largest first.
        triangle, order = cast("tuple[np.ndarray, np.ndarray]", scipy.linalg.qr(reached.T, mode="r", pivoting=True))
        added_norms = np.abs(np.diagonal(triangle))
        indices = torch.from_numpy(
            order[: max(1, int((added_norms >= _OWN_SHARE * added_norms[0]).sum()))].astype(np.int64)
        )
        return features[indices], labels[indices]

    def run(self) -> AuditResult:
        """Run all rounds, then guess."""
        sources = random_sources(self._config.privacy.randomness)
        if not self._noisy:
            sources = silenced(sources, frozenset({"noise"}))
        fresh = fresh_state(*self._prompt.shape, self._config.prompt.rank).to(self._prompt.device)
        states, seen = [fresh] * self._clients, []
        rule, of_all, memory = personalisation(self._config), self._collective(), dict[str, Tensor]()
        for server_round in range(1, self._config.rounds + 1):
            before, prompt = states, self._prompt
            if of_all is not None:
                parts = of_all.parts(memory, prompt.shape).to(prompt)
                before = [replace(state, personal=part) for state, part in zip(before, parts, strict=True)]
            uploads, states = self._round(before, sources, server_round)
            if self._method.shared:
                moved = uploads
                self._prompt = prompt + uploads.mean(dim=0)
                if of_all is not None:
                    memory = of_all.followed(memory, range(self._clients), uploads.double().cpu())
            else:
                moved = torch.stack([s.personal - b.personal for s, b in zip(states, before, strict=True)])
            of_prompt = [personal_prompt(state, rule, prompt, server_round=0) for state in before]
            personal = of_prompt if self._method.personal else None
            seen.append(_Seen(prompt, personal, moved.to(torch.float64).flatten(1)))
        present = self._present.reshape(-1)
        scores = self._scores(seen)
        return judge("record", self._plan.epsilon(), self._plan.delta, scores, present, noisy=self._noisy)

    def _collective(self) -> Collective | None:
        """Return the rule of personal prompts that the server makes of all uploads, or None."""
        records = len(self._labels)
        cards = {p: messages.ClientCard(partition=p, num_examples=records) for p in range(self._clients)}
        return collective_parts(self._config, self._plan, cards)

    def _round(
        self, states: Sequence[PersonalState], sources: RandomSources, server_round: int
    ) -> tuple[Tensor, list[PersonalState]]:
        """Run the local steps of all clients, in groups of the size that a node uses."""
        workspace = self._config.resources.workspace_mib * 2**19
        uploads, new_states = [], []
        for group in chunks(range(self._clients), prompts_at_once(self._tower, workspace, self._prompt.device)):
            results = cohort_update(
                global_prompt=self._prompt,
                participants=[self._participant(k, states[k], sources, server_round) for k in group],
                objective=self._task.objective(self._config),
                method=self._method,
                training=local_training(self._config),
                plan=self._plan,
            )
            uploads += [upload for upload, _ in results]
            new_states += [state for _, state in results]
        return torch.stack(uploads), new_states

    def _participant(self, client: int, state: PersonalState, sources: RandomSources, server_round: int) -> Participant:
        present = torch.from_numpy(self._present[client]).to(self._prompt.device)
        features = torch.where(present[:, None], self._features, 0.0)
        data = ClientData(features=features, labels=self._labels, log_prior=self._log_prior)
        random = functools.partial(_stream, sources, self._seed, client, server_round)
        event = self._plan.event("audit", server_round, self._config.train.local_steps)
        return Participant(partition=client, state=state, data=data, random=random, event=event)

    def _scores(self, seen: Sequence["_Seen"]) -> list[np.ndarray]:
        """Return two scores of every canary, (canary,) each: the sum of its weights over rounds, and their spread.

        A weight measures how much of a canary's gradient its client released in a round. The mean over clients is
        subtracted first. It holds the mean effect of all canaries, and noise that all clients share. For the spread,
        the mean over rounds is subtracted as well. It holds noise that repeats.
        """
        moved = torch.stack([one.moved for one in seen])
        if self._clients >= _ENOUGH_CLIENTS:
            moved = moved - moved.mean(dim=1, keepdim=True)
        total = spread = torch.zeros(self._present.shape, dtype=torch.float64)
        for one, whole, rest in zip(seen, moved, moved - moved.mean(dim=0), strict=True):
            both = torch.stack([whole, rest], dim=1)  # (client, 2, number)
            if one.personal is None:
                weights = self._weights(self._directions(one.prompt), both)
            else:
                prompts = [one.prompt + personal for personal in one.personal]
                weights = torch.cat(
                    [self._weights(self._directions(p), m[None]) for p, m in zip(prompts, both, strict=True)]
                )
            total, spread = total + weights[:, 0], spread + weights[:, 1].square()
        return [total.reshape(-1).numpy(), spread.reshape(-1).numpy()]

    def _directions(self, prompt: Tensor) -> Tensor:
        """Return the canaries' unit gradients at a released prompt, (canary, n_ctx · ctx_dim)."""
        return torch.nn.functional.normalize(self._gradients(prompt, self._features, self._labels), dim=1)

    def _gradients(self, prompt: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        """Return each record's gradient before any clipping, (record, n_ctx · ctx_dim), float64."""
        rows = per_example_gradients(
            self._tower(prompt[None]),
            Batches.of((features, labels), log_prior=None if self._log_prior is None else self._log_prior[None]),
            self._task.logit_scale,
            workspace_bytes=self._config.resources.workspace_mib * 2**20,
        )
        return rows[0, : len(labels)].flatten(1).to(torch.float64)

    @staticmethod
    def _weights(directions: Tensor, moved: Tensor) -> Tensor:
        """Fit a weight of each canary by least squares over all canaries of a client, (client, 2, canary).

        The joint fit keeps canaries from hiding each other.
        """
        gram = directions @ directions.T
        gram += _RIDGE * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        # A step goes against the gradient.
        return -torch.linalg.solve(gram, directions @ moved.transpose(1, 2)).transpose(1, 2).cpu()


@dataclass(frozen=True)
class _Seen:
    """The auditor's view of a round: its prompts at the start, and each client's move, (client, n_ctx · ctx_dim)."""

    prompt: Tensor
    personal: Sequence[Tensor] | None
    moved: Tensor


def _stream(sources: RandomSources, seed: int, client: int, server_round: int, purpose: str, step: int) -> RandomSource:
    return sources(StreamKey(seed=seed, purpose=purpose, partition=client, server_round=server_round, step=step))
