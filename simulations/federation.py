"""The server's side of a run: configuration → plans → strategy → rounds → results. Read this file first."""

import time
from dataclasses import replace

from flwr.app import Context
from flwr.serverapp import Grid

from fl_dualpriv.config.plans import client_level_plan, noised_unit, record_level_plan
from fl_dualpriv.config.releases import may_repeat, round_of_epsilon
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.flower.expiring_grid import ExpiringGrid
from fl_dualpriv.flower.local import engine_name
from fl_dualpriv.run.checkpoint import CheckpointFolder
from fl_dualpriv.run.recorder import RunRecorder
from fl_dualpriv.server.accounting import BudgetExhausted
from fl_dualpriv.server.build import build_strategy, selected_start
from fl_dualpriv.server.closing import closing_scores
from fl_dualpriv.server.join import begin_to_join, check_engine
from fl_dualpriv.server.results import warn_of_strays, write_results
from fl_dualpriv.server.rounds import Rounds, score_now
from fl_dualpriv.server.rules import check_class
from fl_dualpriv.server.strategy import RoundReport, RoundStrategy
from fl_dualpriv.server.strategy_ref import load_strategy
from fl_dualpriv.tasks.base import run_folder
from fl_dualpriv.tasks.build import build_task
from fl_dualpriv.tasks.memory import check_memory
from fl_dualpriv.tasks.survey import announce


def main(grid: Grid, context: Context) -> None:
    """Run the federation; on any failure write ``error.json`` and raise."""
    recorder = RunRecorder(run_folder(str(context.run_config.get("output.dir", "")), context.run_id))
    with recorder.claimed(resume=context.run_config.get("output.resume") is True, config=context.run_config):
        run(ExpiringGrid(grid) if engine_name(grid) == "deployment" else grid, context, recorder)


def run(grid: Grid, context: Context, recorder: RunRecorder) -> None:
    """Check the configuration, wait for all clients, train, and write the results."""
    config = RunConfig.from_run_config(context.run_config)
    start, engine = time.monotonic(), engine_name(grid)
    strategy_class, options = load_strategy(config.strategy, context.run_config)
    check_engine(config, engine)
    if unit := noised_unit(config):
        check_class(strategy_class, RoundStrategy, unit, config.privacy.arithmetic)
    joined = begin_to_join(grid, config, engine)
    record, client = record_level_plan(config), client_level_plan(config)
    # In a simulation all data belong to the operator, so describing them reveals nothing.
    is_simulated = engine != "deployment"
    if is_simulated:
        announce(config, recorder.folder)
    task = build_task(config)
    if is_simulated:
        task.check_any_fits()
    if engine == "ray":  # Ray's actors are more processes on this machine
        check_memory(config, task)
    cards, hosts = joined()

    def report(done: RoundReport) -> None:
        by_round = round_of_epsilon(done.server_round, config.rounds)
        recorder.add_round(
            done.server_round,
            done.accuracy,
            record.spent(min(by_round * config.train.local_steps, record.releases)) if record else None,
            rounds.epsilon(client.delta) if client and rounds.lost else client.spent(by_round) if client else None,
            strategy.failures - sum(line["failures"] for line in recorder.progress),  # failures of this round only
            time.monotonic() - start,
        )

    # A checkpoint of a run that was cut off is read before any state is built from it.
    records = [card.num_examples for card in cards.values()]
    checkpoints = CheckpointFolder(recorder.folder, context.run_config, records, task.data_identity)
    checkpoint = checkpoints.read(may_go_back=may_repeat(config)) if config.output.resume else None
    token = checkpoint.progress.run_token if checkpoint else None
    strategy = build_strategy(strategy_class, config, record, client, cards, hosts, recorder, report, options, token)
    rounds = Rounds(strategy, checkpoints, stop_at_dead_actor=config.dead_actors == "stop")
    if checkpoint:
        recorder.resume(checkpoint.progress.rounds_done)
        rounds.resume(checkpoint, recorder.progress)
    elif config.output.resume:
        recorder.check_empty()
    # The start of the prompts is public: words, their mean, or the result of an accounted selection.
    prompt = checkpoint.prompt if checkpoint else rounds.begin(task.initial_prompt(config))
    prompt = selected_start(rounds, grid, config, task, record, prompt)
    if strategy.evaluate_every and not recorder.rounds:
        accuracy = score_now(strategy, grid, prompt, "zero-shot", config.reply_timeout)
        report(RoundReport(server_round=0, accuracy=accuracy, failures=strategy.failures))
    stopped = None
    # The rounds. Each spends its ε before the clients answer, so a run that ends early keeps what it has.
    if config.local_method.trains:
        try:
            prompt = rounds.run(grid, prompt, recorder.last_round, config.reply_timeout)
        except BudgetExhausted as exhausted:
            if strategy.rounds_done == 0:
                raise
            # The releases so far are already charged. Keep them; the result tables then cover these rounds only.
            stopped, prompt = str(exhausted), strategy.prompt
            client = replace(client, rounds=strategy.rounds_done) if client else None
    elif config.selects_start and strategy.evaluate_every and not recorder.last_round:
        accuracy = score_now(strategy, grid, prompt, strategy.prompt_kind, config.reply_timeout)  # in place of a round
        report(RoundReport(server_round=1, accuracy=accuracy, failures=strategy.failures))
    if config.local_method.trains or config.selects_start:
        rounds.check_delivered()
    closing = closing_scores(strategy, grid, prompt, config, config.reply_timeout)
    write_results(
        recorder,
        config,
        context.run_config,
        engine=engine,
        task=task,
        rounds=rounds,
        prompt=prompt,
        plans=(record, client),
        closing=closing,
        cards=cards,
        stopped=stopped,
        seconds=time.monotonic() - start,
    )
    checkpoints.remove()
    warn_of_strays(recorder)
