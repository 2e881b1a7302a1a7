"""Write the results of a run that has ended: prompt, curve, totals and, last, the summary."""

import logging
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.config.releases import list_releases, notes
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.methods.base import METHODS
from fl_dualpriv.metrics import Accuracy
from fl_dualpriv.privacy.plan import ClientLevelPlan, RecordLevelPlan
from fl_dualpriv.run.file_kinds import without_kind
from fl_dualpriv.run.recorder import RunRecorder, build_summary, first_and_last_accuracy
from fl_dualpriv.server.rounds import Rounds
from fl_dualpriv.tasks.base import Task
from fl_dualpriv.tasks.use_description import metadata_of_global

_log = logging.getLogger("fl_dualpriv")


def write_results(
    recorder: RunRecorder,
    config: RunConfig,
    run_config: Mapping[str, bool | int | float | str],
    *,
    engine: str,
    task: Task,
    rounds: Rounds,
    prompt: Tensor,
    plans: tuple[RecordLevelPlan | None, ClientLevelPlan | None],
    free: Accuracy | None,
    cards: Mapping[int, messages.ClientCard],
    stopped: str | None,
    seconds: float,
) -> None:
    """Write every file of a finished run. The summary comes last, because its presence shows that the run has ended.

    Guarantee:
        The results (prompt, curve and summary) are functions of releases and public numbers. ``seconds`` and the
        failures go into an operator's file only.

    Args:
        recorder: Folder of the run.
        config: Parsed configuration.
        run_config: The same configuration, flat, which the summary repeats.
        engine: ``local``, ``ray`` or ``deployment``.
        task: Task of the run.
        rounds: The rounds, which know what was released.
        prompt: p_G after the last round, (n_ctx, ctx_dim).
        plans: Record-level plan and client-level plan, each None without one.
        free: Accuracy of the best rival that costs no ε, or None without scores.
        cards: Card of each client.
        stopped: Reason why the run ended early, or None.
        seconds: Duration of the run.
    """
    strategy, (record, client) = rounds.strategy, plans
    scored, trains = strategy.evaluate_every > 0, METHODS[config.method].trains
    zero_shot, final = first_and_last_accuracy(recorder, trains=trains)
    lines = notes(config, record, client, scored=scored)
    lines += [f"ended early: {stopped}"] if stopped else []
    facts = metadata_of_global(config, task, strategy.run_token)
    recorder.write_prompt(prompt, task.context_of(prompt, config), facts)
    recorder.write_curve("; ".join(lines))
    recorder.write_totals(strategy.failures, seconds)
    recorder.write_summary(
        build_summary(
            method=config.method,
            engine=engine,
            seed=config.seed,
            rounds=strategy.rounds_done if stopped else config.rounds,
            population=config.population,
            randomness=config.privacy.randomness,
            zero_shot=zero_shot,
            free=free,
            rival=task.free_rival,
            final=final,
            split=config.evaluation.split,
            group_names=task.group_names,
            releases=rounds.charged(list_releases(config, record, client, scored=scored)),
            rows=Counter(card.rows for card in cards.values() if card.rows),
            notes=lines,
            config={**run_config, "output.resume": False},
        )
    )


def warn_of_strays(recorder: RunRecorder) -> None:
    """Log the files of a run's folder that have no kind, because a plug-in may have written private data into them."""
    if strays := without_kind(recorder.folder):
        _log.warning(
            "%d files in %s are neither results nor operator's files (%s): do not publish them; a plug-in must write "
            "into the folder `plugin_folder`",
            *(len(strays), recorder.folder, ", ".join(strays[:5])),
        )
