"""The ServerApp: configuration → plans → strategy → rounds → results. Read this file first."""

import logging
import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.config.plans import client_level_plan, noised_unit, record_level_plan
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.flower.expiring_grid import ExpiringGrid
from fl_dualpriv.flower.local import LocalGrid
from fl_dualpriv.methods.base import METHODS
from fl_dualpriv.metrics import Accuracy
from fl_dualpriv.privacy.accounting import joint_noise_multiplier
from fl_dualpriv.privacy.ledger import Ledger
from fl_dualpriv.privacy.noise import random_sources
from fl_dualpriv.privacy.plan import (
    ClientLevelPlan,
    RecordLevelPlan,
    Release,
    client_level_notes,
    client_level_releases,
    nominal_releases,
    record_level_releases,
    round_terms,
)
from fl_dualpriv.run.checkpoint import CheckpointFolder
from fl_dualpriv.run.file_kinds import PLUGINS, without_kind
from fl_dualpriv.run.recorder import RunRecorder, build_summary
from fl_dualpriv.server.accounting import BudgetExhausted, ServerPrivacy
from fl_dualpriv.server.rounds import Rounds
from fl_dualpriv.server.rules import check_class
from fl_dualpriv.server.strategy import ClientFailure, RoundReport, RoundStrategy
from fl_dualpriv.server.strategy_ref import load_strategy
from fl_dualpriv.tasks.base import run_folder
from fl_dualpriv.tasks.build import build_world
from fl_dualpriv.tasks.disclosure import claims_privacy, may_score
from fl_dualpriv.tasks.memory import check_memory
from fl_dualpriv.tasks.survey import announce
from fl_dualpriv.tasks.use_description import metadata_of_global

app = ServerApp()
_log = logging.getLogger("fl_dualpriv")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation; on any failure leave ``error.json`` and raise."""
    recorder = RunRecorder(run_folder(str(context.run_config.get("output.dir", "")), context.run_id))
    with recorder.claimed(resume=context.run_config.get("output.resume") is True):
        run(ExpiringGrid(grid) if engine_name(grid) == "deployment" else grid, context, recorder)


def run(grid: Grid, context: Context, recorder: RunRecorder) -> None:
    """Check everything, wait for everybody, train, write results."""
    config = RunConfig.from_run_config(context.run_config)
    start = time.monotonic()
    strategy_class, options = load_strategy(config.strategy, context.run_config)
    if config.data.partition == "by-node" and engine_name(grid) != "deployment":
        raise ConfigError(
            'data.partition = "by-node" is for deployed nodes, each with a folder of its own: here all clients would '
            'have the same records; set it to "iid", "by-class" or "dirichlet"'
        )
    if unit := noised_unit(config):
        check_class(strategy_class, RoundStrategy, unit, config.privacy.arithmetic)
    record, client = record_level_plan(config), client_level_plan(config)
    simulated = engine_name(grid) != "deployment"  # then all data are the operator's, who may know what they are
    if simulated:
        announce(config, recorder.folder)
    world = build_world(config)
    if simulated:
        world.check_any_fits()
    if engine_name(grid) == "ray":  # actors are further processes on this machine
        check_memory(config, world)
    cards, hosts = join(grid, config)

    def report(done: RoundReport) -> None:
        by_round = round_of_epsilon(done.server_round, config.rounds)
        recorder.add_round(
            done.server_round,
            done.accuracy,
            record.spent(by_round * config.train.local_steps) if record else None,
            rounds.epsilon(client.delta) if client and rounds.lost else client.spent(by_round) if client else None,
            strategy.failures - sum(line["failures"] for line in recorder.progress),  # those of this round
            time.monotonic() - start,
        )

    records = [card.num_examples for card in cards.values()]
    checkpoints = CheckpointFolder(recorder.folder, context.run_config, records, world.data_identity)
    kept = checkpoints.read(may_go_back=may_repeat(config)) if config.output.resume else None
    token = kept.progress.run_token if kept else None
    strategy = build_strategy(strategy_class, config, record, client, cards, hosts, recorder, report, options, token)
    rounds = Rounds(strategy, checkpoints, stop_at_dead_actor=config.dead_actors == "stop")
    if kept:
        recorder.resume(kept.progress.rounds_done)
        rounds.resume(kept, recorder.progress)
    elif config.output.resume:
        recorder.check_empty()
    prompt = kept.prompt if kept else rounds.begin(world.initial_prompt(config))
    if strategy.evaluate_every and not recorder.rounds:
        accuracy = score_now(strategy, grid, prompt, "zero-shot", config.reply_timeout)
        report(RoundReport(server_round=0, accuracy=accuracy, failures=strategy.failures))
    stopped = None
    if METHODS[config.method].trains:
        try:
            prompt = rounds.run(grid, prompt, recorder.last_round, config.reply_timeout)
        except BudgetExhausted as exhausted:
            if strategy.rounds_done == 0:
                raise
            # What was released is paid for: it is kept, and the tables speak of these rounds alone.
            stopped, prompt = str(exhausted), strategy.prompt
            client = replace(client, rounds=strategy.rounds_done) if client else None
        if strategy.deliveries == 0 and strategy.failures > 0:
            raise ClientFailure(
                f"all {strategy.failures} calls of clients failed; the prompts are noise at best. "
                f"Last reason: {strategy.last_failure}"
            )
    zero_shot, final = first_and_last_accuracy(recorder, trains=METHODS[config.method].trains)
    found = notes(config, record, client, scored=strategy.evaluate_every > 0)
    found += [f"ended early: {stopped}"] if stopped else []
    facts = metadata_of_global(config, world, strategy.run_token)
    recorder.write_prompt(prompt, world.context_of(prompt, config), facts)
    recorder.write_curve("; ".join(found))
    recorder.write_totals(strategy.failures, time.monotonic() - start)  # before the summary, which says: all is there
    recorder.write_summary(
        build_summary(
            method=config.method,
            engine=engine_name(grid),
            seed=config.seed,
            rounds=strategy.rounds_done if stopped else config.rounds,
            population=config.population,
            randomness=config.privacy.randomness,
            zero_shot=zero_shot,
            final=final,
            split=config.evaluation.split,
            group_names=world.group_names,
            releases=rounds.charged(list_releases(config, record, client, scored=strategy.evaluate_every > 0)),
            rows=Counter(card.rows for card in cards.values() if card.rows),
            notes=found,
            config={**context.run_config, "output.resume": False},
        )
    )
    checkpoints.remove()
    if strays := without_kind(recorder.folder):
        _log.warning(
            "%d files in %s are neither results nor operator's files (%s): do not publish them; a plug-in writes into "
            "the folder `plugin_folder`",
            *(len(strays), recorder.folder, ", ".join(strays[:5])),
        )


def round_of_epsilon(server_round: int, rounds: int) -> int:
    """The round whose ε is shown as spent: this one, or in a long run a later one, whose ε is an upper bound.

    Each ε costs about a tenth of a second of CPU, more than a round of a small prompt: a run computes at most 25.
    """
    stride = math.ceil(rounds / 25)
    return min(math.ceil(server_round / stride) * stride, rounds)


def join(grid: Grid, config: RunConfig) -> tuple[dict[int, messages.ClientCard], dict[int, int]]:
    """Wait for all nodes, then ask each for the clients it hosts. Nothing is sampled before that (Flower races).

    Returns:
        Each client's card and the id of its node, both by partition, in order.

    Raises:
        ConfigError: Too few or too many nodes, a node that cannot start, or clients that are not each there once.
    """
    expected, deadline = config.num_supernodes, time.monotonic() + config.join_timeout
    while len(nodes := list(grid.get_node_ids())) < expected and time.monotonic() < deadline:
        time.sleep(0.2)
    if len(nodes) != expected:
        key = "supernodes" if config.supernodes else "population"
        raise ConfigError(
            f"{key} = {expected}, but {len(nodes)} nodes joined within {config.join_timeout:g} s; start the simulation "
            f'with --federation-config "num-supernodes={expected}", or set {key} = {len(nodes)}'
        )
    requests = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes]
    found: list[tuple[messages.ClientCard, int]] = []
    replies = list(grid.send_and_receive(requests, timeout=config.reply_timeout))
    if silent := len(nodes) - len(replies):
        raise ConfigError(
            f"{silent} of {len(nodes)} nodes did not say within {config.reply_timeout:g} s whom they host: look at "
            "their logs, or raise reply-timeout"
        )
    for reply in replies:
        if reply.has_error():
            raise ConfigError(f"a client cannot start: {messages.failure_reason(reply)}")
        found += [(card, reply.metadata.src_node_id) for card in messages.read_cards(reply)]
    found.sort(key=lambda pair: pair[0].partition)
    partitions = [card.partition for card, _ in found]
    if partitions != list(range(config.population)):
        some = ", ".join(map(str, partitions[:10])) + (", …" if len(partitions) > 10 else "")
        raise ConfigError(
            f"the nodes host {len(partitions)} clients ({some}); expected each of 0..{config.population - 1} once"
        )
    # A card comes from outside, and the divisors are made of it.
    if strange := [card for card, _ in found if not 1 <= card.num_examples < 2**53]:
        raise ConfigError(
            f"client {strange[0].partition} says that it holds {strange[0].num_examples} records; a client has at "
            "least one: check its node"
        )
    return {card.partition: card for card, _ in found}, {card.partition: node for card, node in found}


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
    """Unpack the configuration into the strategy's arguments; a new run has no token yet."""
    trusts_server = record is not None and record.trusts_server
    rate = config.train.sampling_rate
    private = record is not None or client is not None
    personal = METHODS[config.method].personal and (record is not None or not private)
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
        **options,  # type: ignore[arg-type] - checked against the class's fields
    )


def server_privacy(
    config: RunConfig,
    record: RecordLevelPlan | None,
    client: ClientLevelPlan | None,
    cards: dict[int, messages.ClientCard],
    ledger: Ledger,
) -> ServerPrivacy | None:
    """What the server noises: client updates, clipped sums of trusting clients, the DP-FPL paper's p_G, or nothing."""
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
        # Clients upload −η · (clipped sum), so one record moves the sum by at most η·C; in integers they upload minus
        # the sum in grid units, and η comes in with the size of a unit.
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
    if METHODS[config.method].published_procedure and nominal.mechanism == "gaussian":
        from clients.dpfpl_paper import CLIP, nominal_sigma

        steps = config.rounds * config.train.local_steps
        batch = min(max(1, round(config.train.sampling_rate * card.num_examples)) for card in cards.values())
        return ServerPrivacy(
            unit="nominal",
            bound=rate * CLIP / batch,
            noise_multiplier=nominal_sigma(nominal.epsilon, nominal.delta, steps),
            sampling_rate=1.0,
            ledger_multiplier=0.0,
            ledger=None,
        )
    return None


def score_now(
    strategy: RoundStrategy, grid: Grid, prompt: Tensor, kind: messages.PromptKind, timeout: float
) -> Accuracy | None:
    """Score one prompt outside the rounds."""
    return strategy.read_scores(
        0, grid.send_and_receive(strategy.evaluation_messages(0, prompt, kind), timeout=timeout)
    )


def first_and_last_accuracy(recorder: RunRecorder, *, trains: bool) -> tuple[Accuracy | None, Accuracy | None]:
    """Zero-shot, and of the last scored round."""
    scored = {line["round"]: Accuracy(**line["accuracy"]) for line in recorder.rounds if line["accuracy"]}
    zero_shot = scored.pop(0, None)
    return zero_shot, scored[max(scored)] if scored else None if trains else zero_shot


def may_repeat(config: RunConfig) -> bool:
    """Whether a round whose result was seen may be made again: as the same release, or as a further one.

    Correlated noise is one release of all rounds: another noise in one of them has no place in it. Clients that trust
    the server send the same sums once more: a second noise on them is a further look at one sample, which costs more
    than a further sample, for which the ledger would charge it. A round of clients draws its cohort anew.
    """
    privacy = config.privacy
    independent = privacy.client.mechanism in ("none", "gaussian") and not privacy.record.trusts_server
    return privacy.randomness == "seeded" or independent


def list_releases(
    config: RunConfig, record: RecordLevelPlan | None, client: ClientLevelPlan | None, *, scored: bool
) -> list[Release]:
    """Everything that leaves, per level. Empty without differential privacy."""
    parts = METHODS[config.method]
    releases = []
    if record is not None:
        releases += record_level_releases(record, shared=parts.shared, scored=scored)
    if client is not None:
        # Scores of personal prompts are functions of un-noised client data, unless the record level is on and pays.
        releases += client_level_releases(client, scored=scored and (record is None or not parts.personal))
    nominal = config.privacy.record
    if parts.published_procedure and nominal.mechanism == "gaussian":
        releases += nominal_releases(nominal.epsilon, nominal.delta, config.rounds * config.train.local_steps)
    return releases


def notes(
    config: RunConfig, record: RecordLevelPlan | None, client: ClientLevelPlan | None, *, scored: bool
) -> list[str]:
    """What a reader must know beside the table."""
    parts = METHODS[config.method]
    found = []
    if config.privacy.randomness == "seeded" and (record or client):
        found.append("reproducible noise: do not publish (privacy.randomness = seeded)")
    if record and record.trusts_server:
        found.append("trusts-server: the server sees each client's clean clipped sums")
    if client:
        found.append("client level: the server sees each client's update; personal prompts are not covered")
        found += client_level_notes(client)
    if client and not record and parts.personal:
        found.append("scores are of the global prompt: scores of personal prompts would not be covered")
    if client and record and parts.personal:
        found.append("scores are of personal prompts: covered at record level, not at client level")
    if parts.published_procedure and config.privacy.record.mechanism == "gaussian":
        found.append("dpfpl-paper: the paper's formulas, not the authors' code; ε is nominal, not a guarantee")
    if record and config.train.top_m:
        found.append(f"top-m = {config.train.top_m}: each record back-propagates its largest residuals only, a bias")
    if record and config.privacy.record.noise_space == "feature":
        found.append("noise-space = feature: gradients of the class features are clipped and noised, not the prompt's")
    if (record or client) and config.privacy.arithmetic == "integer":
        found.append("arithmetic = integer: exact sums, integer noise; low-order bits tell nothing about the data")
    if not scored:
        found.append(
            "no scores: the held-out images are private (evaluation.held-out-data); give a test/ folder, or declare "
            'them with evaluation.held-out-data = "public"'
        )
    if not claims_privacy(config) and parts.trains:
        found.append("no differential privacy")
    return found


def engine_name(grid: Grid) -> str:
    """``local``, ``ray`` (Flower's simulation runtime) or ``deployment``."""
    if isinstance(grid, LocalGrid):
        return "local"
    return "ray" if type(grid).__name__ == "InMemoryGrid" else "deployment"
