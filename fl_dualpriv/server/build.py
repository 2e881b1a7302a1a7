"""Build the strategy of a run, with its plans, its noise and its ledger, from the configuration."""

import secrets
from collections.abc import Callable, Mapping

import torch
from flwr.serverapp import Grid
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.config.plans import start_selection_terms
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.methods.published import CLIP, nominal_sigma
from fl_dualpriv.privacy.accounting import joint_noise_multiplier
from fl_dualpriv.privacy.ledger import Ledger
from fl_dualpriv.privacy.noise import random_sources
from fl_dualpriv.privacy.plan import ClientLevelPlan, RecordLevelPlan, round_terms
from fl_dualpriv.run.file_kinds import PLUGINS
from fl_dualpriv.run.recorder import RunRecorder
from fl_dualpriv.server.accounting import ServerPrivacy
from fl_dualpriv.server.collective import Collective
from fl_dualpriv.server.rounds import Rounds
from fl_dualpriv.server.selection import select_start
from fl_dualpriv.server.strategy import RoundReport, RoundStrategy
from fl_dualpriv.tasks.base import Task
from fl_dualpriv.tasks.disclosure import may_score


def build_strategy(
    strategy_class: type[RoundStrategy],
    config: RunConfig,
    record: RecordLevelPlan | None,
    client: ClientLevelPlan | None,
    cards: dict[int, messages.ClientCard],
    hosts: dict[int, int],
    recorder: RunRecorder,
    report: Callable[[RoundReport], None],
    options: Mapping[str, object],
    run_token: str | None = None,
) -> RoundStrategy:
    """Build the strategy from the configuration; a new run has no token yet and gets one."""
    trusts_server = record is not None and record.trusts_server
    rate = config.train.sampling_rate
    private = record is not None or client is not None
    has_personal = config.local_method.personal or config.chooses_start_by_client
    personal = has_personal and (record is not None or not private)
    return strategy_class(
        cards=cards,
        hosts=hosts,
        masses={c.partition: rate * c.num_examples if trusts_server else 1.0 for c in cards.values()},
        num_rounds=config.rounds,
        evaluate_every=config.evaluation.every if may_score(config) else 0,
        prompt_kind="personal" if personal else "global",
        run_token=run_token or secrets.token_hex(8),
        terms=round_terms(record, rate, config.train.local_steps),
        tolerates_failures=private,
        privacy=server_privacy(config, record, client, cards, Ledger(recorder.folder / "ledger.jsonl")),
        sources=random_sources(config.privacy.randomness),
        seed=config.seed,
        report=report,
        plugin_folder=recorder.folder / PLUGINS,
        new_hosts=new_hosts(config, hosts),
        reports_groups=config.data.asks_questions or config.data.is_by_domain,
        collective=collective_parts(config, record, cards),
        **options,  # type: ignore[arg-type] - checked against the class's fields
    )


def collective_parts(
    config: RunConfig, record: RecordLevelPlan | None, cards: Mapping[int, messages.ClientCard]
) -> Collective | None:
    """Return the numbers of personal prompts that the server makes, or None if clients make their own or have none.

    An upload is the sum of s releases times η_G. Each release is a clipped sum with noise over the public expected
    batch q·n_i.
    """
    if config.prompt.personalisation != "collective" or not config.local_method.personal:
        return None
    train = config.train
    std = train.global_learning_rate * (record.local_noise_multiplier * record.clip_norm if record else 0.0)
    batches = torch.tensor([train.sampling_rate * max(1, c.num_examples) for c in cards.values()], dtype=torch.float64)
    return Collective(
        memory=config.prompt.personal_memory,
        rate_ratio=train.local_learning_rate / train.global_learning_rate,
        noise_variances=train.local_steps * (std / batches).square(),
    )


def new_hosts(config: RunConfig, hosts: Mapping[int, int]) -> dict[int, int]:
    """Return the id of the node that scores each new client, by partition: that of client p modulo nodes."""
    last = config.population + config.evaluation.new_clients
    return {p: hosts[p % config.num_supernodes] for p in range(config.population, last)}


def selected_start(
    rounds: Rounds, grid: Grid, config: RunConfig, task: Task, record: RecordLevelPlan | None, prompt: Tensor
) -> Tensor:
    """Return p_G before round 1: ``prompt``, or the candidate that the clients select; see `select_start`."""
    if not config.selects_start:
        return prompt
    contexts = task.candidates(config.prompt)
    terms = start_selection_terms(config, record, len(contexts))
    return select_start(rounds, grid, prompt, contexts, terms, config.reply_timeout)


def server_privacy(
    config: RunConfig,
    record: RecordLevelPlan | None,
    client: ClientLevelPlan | None,
    cards: dict[int, messages.ClientCard],
    ledger: Ledger,
) -> ServerPrivacy | None:
    """Return the noise that the server adds, or None.

    The server noises client updates, clipped sums of clients that trust it, or p_G by the DP-FPL paper's formulas.
    """
    if client is not None:
        return ServerPrivacy(
            unit="client",
            bound=client.clip_norm,
            noise_multiplier=client.sum_noise_multiplier,
            sampling_rate=client.sampling_rate,
            ledger_multiplier=client.noise_multiplier,
            ledger=ledger,
            max_epsilon=config.privacy.client.max_epsilon or client.epsilon(),
            delta=client.delta,
            adaptive=client.adaptive,
            correlated=client.correlated,
            arithmetic=client.arithmetic,
            reproducible=config.privacy.randomness == "seeded",
        )
    rate = config.train.global_learning_rate
    if record is not None and record.trusts_server:
        # Clients upload −η · (clipped sum), so one record moves the sum by at most η·C. In integers they upload minus
        # the sum in grid units, and the size of a unit contains η.
        views = [record.server_noise_multiplier] + ([record.local_noise_multiplier] if record.personal else [])
        return ServerPrivacy(
            unit="record",
            bound=rate * record.clip_norm,
            noise_multiplier=record.server_noise_multiplier,
            sampling_rate=record.sampling_rate,
            ledger_multiplier=joint_noise_multiplier(*views),
            ledger=ledger,
            max_epsilon=record.epsilon(),
            delta=record.delta,
            arithmetic=record.arithmetic,
            reproducible=config.privacy.randomness == "seeded",
        )
    nominal = config.privacy.record
    if config.local_method.published_procedure and nominal.mechanism == "gaussian":
        batch = min(max(1, round(config.train.sampling_rate * card.num_examples)) for card in cards.values())
        return ServerPrivacy(
            unit="nominal",
            bound=rate * CLIP / batch,
            noise_multiplier=nominal_sigma(nominal.epsilon, nominal.delta, config.nominal_steps),
            sampling_rate=1.0,
            ledger_multiplier=0.0,
            ledger=None,
        )
    return None
