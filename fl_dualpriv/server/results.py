"""Write the results of a run that has ended: prompt, curve, totals, scores of clients and, last, the summary."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.config.releases import list_releases, notes
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.metrics import Accuracy
from fl_dualpriv.privacy.plan import ClientLevelPlan, RecordLevelPlan
from fl_dualpriv.run.file_kinds import without_kind
from fl_dualpriv.run.recorder import RunRecorder, build_summary, first_and_last_accuracy
from fl_dualpriv.server.closing import ClosingScores
from fl_dualpriv.server.rounds import Rounds
from fl_dualpriv.tasks.base import Task
from fl_dualpriv.tasks.disclosure import held_out_is_public
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
    closing: ClosingScores,
    cards: Mapping[int, messages.ClientCard],
    stopped: str | None,
    seconds: float,
) -> None:
    """Write every file of a finished run. The summary comes last, because its presence shows that the run has ended.

    Guarantee:
        The results (prompt, curve and summary) are functions of releases and public numbers. ``seconds`` and the
        failures go into an operator's file only. Scores of single clients are in the summary only if the held-out
        records are public; otherwise they are in an operator's file.

    Args:
        recorder: Folder of the run.
        config: Parsed configuration.
        run_config: The same configuration, flat, which the summary repeats.
        engine: ``local``, ``ray`` or ``deployment``.
        task: Task of the run.
        rounds: The rounds, which know what was released.
        prompt: p_G after the last round, (n_ctx, ctx_dim).
        plans: Record-level plan and client-level plan, each None without one.
        closing: Scores after the last round.
        cards: Card of each client.
        stopped: Reason why the run ended early, or None.
        seconds: Duration of the run.
    """
    strategy, (record, client) = rounds.strategy, plans
    scored, trains = strategy.evaluate_every > 0, config.local_method.trains
    zero_shot, final = first_and_last_accuracy(recorder, trains=trains)
    lines = notes(config, record, client, scored=scored)
    lines += [f"ended early: {stopped}"] if stopped else []
    facts = metadata_of_global(config, task, strategy.run_token)
    recorder.write_prompt(prompt, task.context_of(prompt, config), facts)
    recorder.write_curve("; ".join(lines))
    recorder.write_totals(strategy.failures, seconds)
    clients = per_client(closing)
    is_public = held_out_is_public(config.data, config.evaluation)
    if clients and not is_public:
        recorder.write_clients(clients)
    recorder.write_summary(
        build_summary(
            method=config.method,
            engine=engine,
            seed=config.seed,
            rounds=strategy.rounds_done if stopped else config.rounds,
            population=config.population,
            new_clients=config.evaluation.new_clients,
            randomness=config.privacy.randomness,
            zero_shot=_of_public_model(zero_shot),
            free=_of_public_model(closing.free.accuracy if closing.free else None),
            rival=task.free_rival(config) if scored else "un-tuned",
            final=_with_general(final, closing) if trains else _of_public_model(final),
            clients=clients if is_public else {},
            split=config.evaluation.split,
            group_names=task.group_names,
            domain_names=task.domain_names,
            releases=rounds.charged(list_releases(config, record, client, scored=scored)),
            rows=Counter(card.rows for card in cards.values() if card.rows),
            notes=lines,
            config={**run_config, "output.resume": False},
        )
    )


def _of_public_model(accuracy: Accuracy | None) -> Accuracy | None:
    """Add the general accuracy of a model without personal parts: it is its local one."""
    return replace(accuracy, general=accuracy.local) if accuracy else None


def _with_general(final: Accuracy | None, closing: ClosingScores) -> Accuracy | None:
    """Add the accuracies of the shared prompt; both stay None if there is no shared prompt."""
    shared = closing.general.accuracy if closing.general else Accuracy(local=None, neighbour=None)
    return replace(final, general=shared.local, new_client=shared.new_client) if final else None


def per_client(closing: ClosingScores) -> dict[str, dict[str, Sequence[float | None]]]:
    """Return the accuracies of single clients, in the order of clients; empty without scores."""
    clients: dict[str, dict[str, Sequence[float | None]]] = {}
    if closing.free:
        free = closing.free.clients
        clients["free"] = {"local": free.local, "neighbour": free.neighbour, "new_client": free.new_client}
    if closing.final:
        final, general = closing.final.clients, closing.general.clients if closing.general else None
        clients["final"] = {
            "local": final.local,
            "neighbour": final.neighbour,
            "general": general.local if general else (),
            "new_client": general.new_client if general else (),
        }
    return clients


def warn_of_strays(recorder: RunRecorder) -> None:
    """Log the files of a run's folder that have no kind, because a plug-in may have written private data into them."""
    if strays := without_kind(recorder.folder):
        _log.warning(
            "%d files in %s are neither results nor operator's files (%s): do not publish them; a plug-in must write "
            "into the folder `plugin_folder`",
            *(len(strays), recorder.folder, ", ".join(strays[:5])),
        )
