"""The audit of the client level: canary clients, guessed from the global prompts that a server publishes.

**Why the bound holds.** Unit: one client. Relation: add-or-remove-one; a client that is away counts as zero and the
population is public (docs/privacy.md). Every canary client has a fair coin of its own; one that stays out answers with
zeros, which is what an absent client counts as. The mechanism is what the plan accounts for: cohort, clip, noise and
step of all rounds, run by the strategy of the configuration. Its outputs are the global prompts. The audit runs as many
federations as it takes to plant all canaries, each with streams of its own; a client belongs to one of them, whose
prompts the plan bounds, and the others' do not depend on it; so the map from all coins to all prompts is (ε, δ)-DP for
each single coin, and the guesses about all of them count together. The auditor sees global prompts alone, knows what
every canary would send, and does not know the coins, the cohorts or the noise.

A canary's update is a random direction (Andrew et al. 2024, arXiv:2302.03098), far longer than the clip norm. Within a
federation they are made orthogonal, so that canaries do not hide each other; each alone is still uniform on the sphere.
Their statistic, the cosine with the released move (here times the move's length, so that rounds add up), gives their
*estimate* of ε, which rests on the scores being Gaussian. The bound does not: it counts guesses.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from attacks.verdict import CANARIES, AuditResult, coins, judge, silenced
from fl_dualpriv import messages
from fl_dualpriv.config.plans import client_level_plan, record_level_plan
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.flower.local import LocalGrid
from fl_dualpriv.privacy.noise import KeyedRandom, StreamKey
from fl_dualpriv.privacy.plan import ClientLevelPlan
from fl_dualpriv.run.recorder import RunRecorder
from fl_dualpriv.server.build import build_strategy
from fl_dualpriv.server.plugins import load_class, plugin_options
from fl_dualpriv.server.strategy import RoundReport, RoundStrategy
from fl_dualpriv.tasks.build import image_task

_LOUD = 100.0  # canaries send this times the clip norm: a clip that fails is heard


def audit_client_level(config: RunConfig, seed: int, *, canaries: int = CANARIES, noisy: bool = True) -> AuditResult:
    """Plant canary clients in federations of the configured population, run all rounds at the server, and guess.

    Args:
        config: The run; its strategy, population, cohort, rounds and client-level privacy are audited.
        seed: Of coins and directions; with ``privacy.randomness = "seeded"`` of cohorts and noise too.
        canaries: How many at least, over all federations; how many federations that takes follows from it.
        noisy: False: the control. Noise is zero, the claim stays, and the bound shows what the audit would find.

    Raises:
        ConfigError: If there is no client-level ε to audit.
    """
    plan = client_level_plan(config)
    if plan is None:
        raise ConfigError(
            f"privacy.client.mechanism = {config.privacy.client.mechanism!r}: no client-level ε is stated, so there is "
            'none to audit; set it to "gaussian"'
        )
    # One node that hosts everybody: how many nodes there are changes no result.
    config = replace(config, supernodes=1)
    start = image_task(config).initial_prompt(config)
    # As many canaries as there are orthogonal directions; the other clients of a larger population send zeros.
    planted = min(config.population, start.numel())
    directions = _directions(planted, start.numel(), seed)
    federations = -(-canaries // planted)
    present = coins(KeyedRandom(StreamKey(seed=seed, purpose="audit-coins")), (federations, planted))
    by_round = []
    for federation, here in enumerate(present):
        own = replace(config, seed=_own_seed(seed, federation))
        updates = np.zeros((config.population, start.numel()), dtype=np.float32)
        updates[:planted][here] = _LOUD * plan.clip_norm * directions[here]
        moves = _moves(own, plan, start, torch.from_numpy(updates.reshape(-1, *start.shape)), noisy=noisy)
        by_round.append(moves @ directions.T)
    seen = np.concatenate(by_round, axis=1)
    scores = [seen.sum(axis=0), seen.var(axis=0)]
    return judge("client", plan.epsilon(), plan.delta, scores, present.reshape(-1), noisy=noisy)


def _own_seed(seed: int, federation: int) -> int:
    """Streams are keyed by it: two federations that shared one would share their noise."""
    return int(np.random.SeedSequence([seed, federation]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _directions(count: int, dimensions: int, seed: int) -> np.ndarray:
    """Orthonormal rows, each uniform on the sphere: (canary, n_ctx · ctx_dim)."""
    basis, triangle = np.linalg.qr(np.random.default_rng([seed, 2]).standard_normal((dimensions, count)))
    return (basis * np.sign(np.diagonal(triangle))).T  # with the signs of the diagonal QR is unique, and so uniform


def _moves(config: RunConfig, plan: ClientLevelPlan, start: Tensor, updates: Tensor, *, noisy: bool) -> np.ndarray:
    """How the global prompt moved, (round, n_ctx · ctx_dim), as anyone sees who gets every prompt."""
    grid, nothing = LocalGrid(_canary_app(updates), 1, config.to_run_config()), ConfigRecord()
    with tempfile.TemporaryDirectory() as folder:
        strategy = _strategy(config, plan, Path(folder))
        if not noisy:
            strategy.sources = silenced(strategy.sources, frozenset({"server-noise"}))
        arrays, prompts = messages.to_arrays(start), [start]
        for server_round in range(1, config.rounds + 1):
            requests = strategy.configure_train(server_round, arrays, nothing, grid)
            released, _ = strategy.aggregate_train(server_round, grid.send_and_receive(requests))
            assert released is not None
            arrays = released
            prompts.append(messages.from_arrays(arrays))
    if strategy.failures:
        raise RuntimeError(f"the audited rounds failed: {strategy.last_failure}")
    return torch.stack(prompts).to(torch.float64).diff(dim=0).flatten(1).numpy()


def _canary_app(updates: Tensor) -> ClientApp:
    """A ClientApp that sends what the auditor wrote down, whatever the prompt: (client, n_ctx, ctx_dim)."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        asked = messages.read_train(message).partitions
        return Message(
            messages.uploads_content(messages.Uploads(partitions=asked, values=updates[list(asked)])), reply_to=message
        )

    return app


def _strategy(config: RunConfig, plan: ClientLevelPlan, folder: Path) -> RoundStrategy:
    """The strategy of a run, its books included; they are this federation's own and end with it."""
    strategy_class = load_class("strategy.ref", config.strategy.ref, RoundStrategy)
    cards = {p: messages.ClientCard(partition=p, num_examples=1) for p in range(config.population)}
    return build_strategy(
        strategy_class,
        config,
        record_level_plan(config),
        plan,
        cards,
        dict.fromkeys(cards, 1),
        RunRecorder(folder),
        _say_nothing,
        plugin_options(strategy_class, RoundStrategy, config.to_run_config()),
    )


def _say_nothing(report: RoundReport) -> None:
    """Audited rounds report to nobody."""
