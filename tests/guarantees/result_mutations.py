"""Bugs in what a run writes into files that may be published, each planted in the running code."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fl_dualpriv.server.results
import strategies.dpfpl
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.files import write_tensors
from fl_dualpriv.publish import file as published
from fl_dualpriv.run import file_kinds as run_files
from fl_dualpriv.run import recorder as results
from fl_dualpriv.run.file_kinds import PROGRESS, ROUNDS
from fl_dualpriv.run.recorder import RunRecorder
from fl_dualpriv.server.strategy import RoundStrategy
from fl_dualpriv.tasks.base import Task
from tests.guarantees import result_checks
from tests.guarantees.mutation import Mutation, Patch


def _add_to_rounds(patch: Patch, more: Callable[[], Mapping[str, Any]]) -> None:
    append = results.append_json_line

    def careless(path: Path, value: Any, *, synced: bool = False) -> None:
        append(path, value | more() if path.name == ROUNDS else value, synced=synced)

    patch.setattr(results, "append_json_line", careless)


def _add_to_summary(patch: Patch, more: Callable[[RunRecorder], Mapping[str, Any]]) -> None:
    write = RunRecorder.write_summary
    patch.setattr(RunRecorder, "write_summary", lambda self, summary: write(self, {**summary, **more(self)}))


def _add_to_prompt(patch: Patch, more: Callable[[Task], Mapping[str, str]]) -> None:
    facts = fl_dualpriv.server.results.metadata_of_global

    def careless(config: RunConfig, task: Task, run_token: str) -> dict[str, str]:
        return {**facts(config, task, run_token), **more(task)}

    patch.setattr(fl_dualpriv.server.results, "metadata_of_global", careless)


def seconds_in_rounds(patch: Patch) -> None:
    _add_to_rounds(patch, lambda: {"seconds": round(time.monotonic(), 3)})


def seconds_in_the_summary(patch: Patch) -> None:
    _add_to_summary(patch, lambda recorder: {"seconds": recorder.progress[-1]["seconds"]})


def failures_in_the_summary(patch: Patch) -> None:
    _add_to_summary(patch, lambda recorder: {"failures": sum(line["failures"] for line in recorder.progress)})


def cohorts_in_rounds(patch: Patch) -> None:
    draw, sizes = RoundStrategy._cohort, [0]

    def counting(self: RoundStrategy, server_round: int) -> list[int]:
        found = draw(self, server_round)
        sizes.append(len(found))
        return found

    patch.setattr(RoundStrategy, "_cohort", counting)
    _add_to_rounds(patch, lambda: {"participants": sizes[-1]})


def a_clock_in_the_prompt(patch: Patch) -> None:
    _add_to_prompt(patch, lambda task: {"written": time.strftime("%Y-%m-%dT%H:%M", time.gmtime(time.time()))})


def a_hash_of_the_data_in_the_prompt(patch: Patch) -> None:
    _add_to_prompt(patch, lambda task: {"data": task.images("train").content_hash})


def class_counts_in_the_prompt(patch: Patch) -> None:
    _add_to_prompt(patch, lambda task: {"labels": " ".join(map(str, np.bincount(task.groups)))})


def unusable_records_in_the_prompt(patch: Patch) -> None:
    def count(task: Task) -> str:
        features = [task.client_data(i).features for i in range(len(task.partitions))]  # type: ignore[attr-defined]
        return str(int(torch.cat(features).isnan().any(dim=1).sum()))

    _add_to_prompt(patch, lambda task: {"unread": count(task)})


def a_time_in_the_curve(patch: Patch) -> None:
    draw = RunRecorder.write_curve

    def careless(self: RunRecorder, caption: str = "") -> None:
        draw(self, f"{caption}; {self.progress[-1]['seconds']} s")

    patch.setattr(RunRecorder, "write_curve", careless)


def a_date_in_the_card(patch: Patch) -> None:
    card = published.model_card
    patch.setattr(published, "model_card", lambda *given: f"{card(*given)}\nWritten {time.time_ns()}.\n")


def metadata_in_an_order_of_chance(patch: Patch) -> None:
    """As safetensors writes them: here every second run has them in reverse."""
    turned = [False]

    def either(
        path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, private: bool = False
    ) -> None:
        write_tensors(path, tensors, metadata, private=private)
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        header["__metadata__"] = dict(sorted(metadata.items(), reverse=turned[0]))
        text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
        path.write_bytes(content[:8] + text + content[8 + size :])
        turned[0] = not turned[0]

    patch.setattr(results, "write_tensors", either)


def times_declared_to_be_results(patch: Patch) -> None:
    table = [
        run_files.RunFile(pattern=f.pattern, kind="result", why=f.why) if f.pattern == PROGRESS else f
        for f in run_files.RUN_FILES
    ]
    patch.setattr(run_files, "RUN_FILES", tuple(table))
    patch.setattr(results, "path_of", lambda folder, name, kind: folder / name)


def a_plugins_file_among_the_results(patch: Patch) -> None:
    update = strategies.dpfpl.DPFPL.server_update

    def writing(self: strategies.dpfpl.DPFPL, prompt: Tensor, diff: Tensor) -> Tensor:
        assert self.plugin_folder is not None
        (self.plugin_folder.parent / "norms.csv").write_text(f"{float(diff.norm())}\n")
        return update(self, prompt, diff)

    patch.setattr(strategies.dpfpl.DPFPL, "server_update", writing)


def _mutation(name: str, where: str, plant: Callable[[Patch], None], *checks: Any) -> Mutation:
    return Mutation(name=name, where=where, plant=plant, caught_by=checks)


_RECORD = result_checks.results_at_record_level_are_functions_of_releases
_CLIENT = result_checks.results_at_client_level_are_functions_of_releases
_NAMES = result_checks.no_result_names_a_secret
_KINDS = result_checks.every_file_has_a_kind
RESULT_MUTATIONS: Sequence[Mutation] = (
    _mutation("rounds.jsonl tells the time", "results.append_json_line", seconds_in_rounds, _RECORD, _CLIENT, _NAMES),
    _mutation("summary.json tells the time", "RunRecorder.write_summary", seconds_in_the_summary, _RECORD, _NAMES),
    _mutation("summary.json counts failures", "RunRecorder.write_summary", failures_in_the_summary, _CLIENT, _NAMES),
    _mutation("rounds.jsonl counts the cohort", "RoundStrategy._cohort", cohorts_in_rounds, _CLIENT),
    _mutation("a prompt's file tells when it was written", "metadata_of_global", a_clock_in_the_prompt, _RECORD),
    _mutation("a prompt's file has the data's hash", "metadata_of_global", a_hash_of_the_data_in_the_prompt, _RECORD),
    _mutation("a prompt's file has class counts", "metadata_of_global", class_counts_in_the_prompt, _RECORD),
    _mutation("a prompt's file counts bad records", "metadata_of_global", unusable_records_in_the_prompt, _RECORD),
    _mutation("the curve tells the time", "RunRecorder.write_curve", a_time_in_the_curve, _RECORD),
    _mutation("the model card tells the time", "publish.file.model_card", a_date_in_the_card, _RECORD),
    _mutation("a prompt's bytes differ by chance", "recorder.write_tensors", metadata_in_an_order_of_chance, _RECORD),
    _mutation(
        "times are declared to be results", "file_kinds.RUN_FILES", times_declared_to_be_results, _RECORD, _KINDS
    ),
    _mutation("a plug-in writes beside the results", "DPFPL.server_update", a_plugins_file_among_the_results, _KINDS),
)
