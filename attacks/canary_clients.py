"""Audit of the client level: plant canary clients and guess their presence from the published global prompts.

**Why the bound holds.** The unit is one client. The relation is add-or-remove-one: an absent client counts as zero, and
the population is public (docs/privacy.md). Every canary client has its own fair coin. An absent canary answers with
zeros, which is how an absent client counts. The mechanism is the one that the plan accounts for: cohort, clip, noise
and step of all rounds, run by the configured strategy. Its outputs are the global prompts. The audit runs as many
federations as it needs to plant all canaries, each with its own random streams. A client belongs to one federation. The
plan bounds that federation's prompts, and the prompts of the others do not depend on the client. So the map from all
coins to all prompts is (ε, δ)-DP for each single coin, and the guesses about all coins count together. The auditor sees
only global prompts. It knows the update that every canary would send. It does not know the coins, the cohorts or the
noise.

A canary's update is a random direction (Andrew et al. 2024, arXiv:2302.03098), far longer than the clip norm. The
directions within a federation are orthogonal, so canaries do not hide each other; each single one is still uniform on
the sphere. The statistic of that paper is the cosine with the released move; here it is multiplied by the move's
length, so that rounds add up. It gives the paper's *estimate* of ε, which assumes Gaussian scores. The bound needs no
such assumption, because it counts guesses.
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
from fl_dualpriv.config.plugins import load_class, plugin_options
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.flower.local import LocalGrid
from fl_dualpriv.privacy.noise import KeyedRandom, StreamKey
from fl_dualpriv.privacy.plan import ClientLevelPlan
from fl_dualpriv.run.recorder import RunRecorder
from fl_dualpriv.server.build import build_strategy
from fl_dualpriv.server.strategy import RoundReport, RoundStrategy
from fl_dualpriv.tasks.build import image_task

_LOUD = 100.0  # length of a canary's update in clip norms; without a working clip the audit would find it


def audit_client_level(config: RunConfig, seed: int, *, canaries: int = CANARIES, noisy: bool = True) -> AuditResult:
    """Plant canary clients in federations of the configured population, run all rounds at the server, and guess.

    Args:
        config: The run; its strategy, population, cohort, rounds and client-level privacy are audited.
        seed: Seed of coins and directions; with ``privacy.randomness = "seeded"`` also of cohorts and noise.
        canaries: Least number of canaries over all federations. The number of federations follows from it.
        noisy: False runs the control: noise is zero, the claim stays, and the bound shows how much the audit can find.

    Raises:
        ConfigError: If the configuration states no client-level ε.
    """
    plan = client_level_plan(config)
    if plan is None:
        raise ConfigError(
            f"privacy.client.mechanism = {config.privacy.client.mechanism!r}: no client-level ε is stated, so there is "
            'none to audit; set it to "gaussian"'
        )
    # One node hosts all clients, because the number of nodes changes no result.
    config = replace(config, supernodes=1)
    start = image_task(config).initial_prompt(config)
    # There are at most as many canaries as orthogonal directions; further clients of the population send zeros.
    planted = min(config.population, start.numel())
    directions = _directions(planted, start.numel(), seed)
    federations = -(-canaries // planted)
    present = coins(KeyedRandom(StreamKey(seed=seed, purpose="audit-coins")), (federations, planted))
    by_round = []
    for federation, here in enumerate(present):
        federation_config = replace(config, seed=_own_seed(seed, federation))
        updates = np.zeros((config.population, start.numel()), dtype=np.float32)
        updates[:planted][here] = _LOUD * plan.clip_norm * directions[here]
        moves = _moves(federation_config, plan, start, torch.from_numpy(updates.reshape(-1, *start.shape)), noisy=noisy)
        by_round.append(moves @ directions.T)
    seen = np.concatenate(by_round, axis=1)
    scores = [seen.sum(axis=0), seen.var(axis=0)]
    return judge("client", plan.epsilon(), plan.delta, scores, present.reshape(-1), noisy=noisy)


def _own_seed(seed: int, federation: int) -> int:
    """Return the seed of one federation's random streams; two federations with one seed would share their noise."""
    return int(np.random.SeedSequence([seed, federation]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _directions(count: int, dimensions: int, seed: int) -> np.ndarray:
    """Draw orthonormal rows, each uniform on the sphere, (canary, n_ctx · ctx_dim)."""
    basis, triangle = np.linalg.qr(np.random.default_rng([seed, 2]).standard_normal((dimensions, count)))
    return (basis * np.sign(np.diagonal(triangle))).T  # the signs make the QR unique, and so the rows uniform


def _moves(config: RunConfig, plan: ClientLevelPlan, start: Tensor, updates: Tensor, *, noisy: bool) -> np.ndarray:
    """Run all rounds and return the moves of the global prompt, (round, n_ctx · ctx_dim).

    Every reader of all global prompts can compute these moves.
    """
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
    """Return a ClientApp that sends the auditor's updates, (client, n_ctx, ctx_dim), and ignores the prompt."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        asked = messages.read_train(message).partitions
        return Message(
            messages.uploads_content(messages.Uploads(partitions=asked, values=updates[list(asked)])), reply_to=message
        )

    return app


def _strategy(config: RunConfig, plan: ClientLevelPlan, folder: Path) -> RoundStrategy:
    """Build the strategy of a run with its accountant and ledger, which only this federation uses."""
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
    """Drop the report, because an audit does not record its rounds."""
