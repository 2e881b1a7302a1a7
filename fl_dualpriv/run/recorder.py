"""Writer of the files of a run: one line a round, a summary, the global prompt, a curve, and times for the operator.

`file_kinds` states which of them are results and which are operator's files.
"""

import contextlib
import importlib.metadata
import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.files import append_json_line, write_bytes, write_json, write_tensors
from fl_dualpriv.metrics import Accuracy, harmonic_mean, spread
from fl_dualpriv.privacy.plan import Release
from fl_dualpriv.run.checkpoint import FILES
from fl_dualpriv.run.file_kinds import CLIENTS, CURVE, PROGRESS, PROMPT, ROUNDS, SUMMARY, TOTALS, Kind, path_of
from fl_dualpriv.run.folder_lock import held_alone
from fl_dualpriv.tracking.base import Tracking, check_tracker

PACKAGES = ("fl-dualpriv", "flwr", "ray", "torch", "open_clip_torch", "dp-accounting", "numpy")


class RunRecorder:
    """Writer of the files of one run; it appends whole lines to a file or replaces a file in one step.

    Guarantee:
        Under differential privacy the results (`file_kinds`) are functions of releases and of public numbers. Times and
        failures are given to methods that write operator's files, and to no other method.

    Args:
        folder: Folder of the run.

    Attributes:
        rounds: Lines of ``rounds.jsonl``, a result.
        progress: Lines of ``operator/progress.jsonl``, an operator's file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rounds: list[dict[str, Any]] = []
        self.progress: list[dict[str, Any]] = []
        self._tracking = Tracking("", folder, {})

    @contextlib.contextmanager
    def claimed(self, *, resume: bool, config: Mapping[str, Any] | None = None) -> Iterator[None]:
        """Hold the folder for only this run; write the reason of a failure to ``error.json``.

        A run does not write ``error.json`` if another run holds the folder.

        Args:
            resume: True if the folder holds an interrupted run that continues.
            config: Flat run configuration, for the tracker that ``output.track`` names.

        Raises:
            ConfigError: If the tracker cannot be loaded, if another run writes there, or if the content of the folder
                does not fit ``resume``, because rounds or results of an earlier run would be mixed or lost.
        """
        with held_alone(self.folder):
            try:
                check_tracker(track := str((config or {}).get("output.track", "")))
                self._check_folder(resume=resume)
                self._tracking = Tracking(track, self.folder, config or {})
                yield
            except BaseException as error:
                self.write_error(error)
                raise
            finally:
                self._tracking.close()

    def _check_folder(self, *, resume: bool) -> None:
        if resume and (self.folder / SUMMARY).exists():
            raise ConfigError(
                f"output.dir = {self.folder}: its run has ended (summary.json): there is nothing to resume"
            )
        for name in () if resume else (ROUNDS, SUMMARY, *FILES):
            if (self.folder / name).exists():
                raise ConfigError(f"output.dir = {self.folder}: it holds an earlier run ({name}); give another folder")
        if not resume:  # the folder has no results: an old file remains of a run whose results were removed
            for name in (PROGRESS, CLIENTS):
                (self.folder / name).unlink(missing_ok=True)
        (self.folder / "error.json").unlink(missing_ok=True)

    def check_empty(self) -> None:
        """Refuse a folder that holds parts of a run and no checkpoint.

        A run writes its first checkpoint before its first message, so a run without one cannot have left anything.

        Raises:
            ConfigError: If the folder holds rounds, a ledger or states of clients.
        """
        for name in (ROUNDS, "ledger.jsonl", "clients"):
            if (self.folder / name).exists():
                raise ConfigError(
                    f"{self.folder} holds {name} and no checkpoint ({FILES[0]}): it cannot be resumed; start a new run "
                    "in another folder"
                )

    def resume(self, rounds_done: int) -> None:
        """Read the reported rounds, and remove lines that follow the checkpoint or are incomplete.

        Raises:
            ConfigError: If rounds are missing.
        """
        file = self._file(ROUNDS, "result")
        lines = _lines_until(file, rounds_done)
        first = lines[0]["round"] if lines else 1
        # The line of the last round comes after its checkpoint.
        if (
            first not in (0, 1)
            or [line["round"] for line in lines] != list(range(first, first + len(lines)))
            or (rounds_done > 0 and first + len(lines) < rounds_done)
        ):
            raise ConfigError(
                f"{file} lacks rounds before round {rounds_done}, the last round of the checkpoint: the run cannot be "
                "resumed; start a new one in another folder"
            )
        self.rounds = lines
        # The operator's line of a round is written first, so it may belong to a round that was not reported.
        told = self._file(PROGRESS, "operator")
        self.progress = _lines_until(told, self.last_round) if lines else []
        _cut_after(file, len(self.rounds))
        _cut_after(told, len(self.progress))

    @property
    def last_round(self) -> int:
        """Last reported round; 0 before round 1."""
        return self.rounds[-1]["round"] if self.rounds else 0

    def add_round(
        self,
        server_round: int,
        accuracy: Accuracy | None,
        record_epsilon: float | None,
        client_epsilon: float | None,
        failures: int,
        seconds: float,
    ) -> None:
        """Report a round (round 0: zero-shot): scores and spent ε to the results, the rest to the operator.

        Args:
            server_round: Number of the round.
            accuracy: Accuracy on public images; None if the round was not scored.
            record_epsilon: ε spent at record level; None if that level has no mechanism.
            client_epsilon: ε spent at client level; None if that level has no mechanism.
            failures: Number of client calls that failed in this round.
            seconds: Seconds since the run began or was resumed.
        """
        told = {"round": server_round, "failures": failures, "seconds": round(seconds, 3)}
        self.progress.append(told)
        # Written first, so that it exists whenever the line of rounds.jsonl does.
        append_json_line(self._file(PROGRESS, "operator"), told)
        line = {
            "round": server_round,
            "accuracy": _entry(accuracy) if accuracy else None,
            "epsilon": {"record_level": record_epsilon, "client_level": client_epsilon},
        }
        self.rounds.append(line)
        append_json_line(self._file(ROUNDS, "result"), line, synced=True)  # synced before clients begin the next round
        scores = {f"accuracy/{kind}": (line["accuracy"] or {}).get(kind) for kind in ("local", "neighbour")}
        spent = {"epsilon/record": record_epsilon, "epsilon/client": client_epsilon}
        self._tracking.log(server_round, {**scores, **spent, "failures": float(failures)})

    def write_prompt(self, prompt: Tensor, context: Tensor | None, metadata: Mapping[str, str]) -> None:
        """Write ``prompts/global.safetensors``: the global prompt, and its equivalent context prompt if any."""
        tensors = {"global": prompt} if context is None else {"global": prompt, "context": context}
        write_tensors(self._file(PROMPT, "result"), tensors, metadata)

    def write_error(self, error: BaseException) -> None:
        """Write ``error.json`` for a front that only sees the process end; a full disk must not hide the error."""
        lines = "".join(traceback.format_exception(error))
        content = {"type": type(error).__name__, "message": str(error), "traceback": lines}
        with contextlib.suppress(OSError):
            write_json(self.folder / "error.json", content)

    def write_totals(self, failures: int, seconds: float) -> None:
        """Write ``operator/totals.json``: failed client calls, and seconds since the run began or was resumed."""
        write_json(self._file(TOTALS, "operator"), {"failures": failures, "seconds": round(seconds, 3)})

    def write_clients(self, clients: "ClientAccuracies") -> None:
        """Write ``operator/clients.json``: accuracies of single clients on private records, and their spread."""
        write_json(self._file(CLIENTS, "operator"), {"clients": _lists(clients), "spread": spreads(clients)})

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``. Its presence means that the run ended successfully."""
        write_json(self._file(SUMMARY, "result"), dict(summary))
        free, final = (summary.get("accuracy", {}).get(when, {}).get("local") for when in ("free", "final"))
        if free is not None and final is not None:
            self._tracking.log(int(summary["rounds"]), {"gain over the free rival/local": final - free})

    def write_curve(self, caption: str = "") -> None:
        """Draw ``curve.png``: local and neighbour accuracy, and ε, by round; ``caption`` holds notes for a reader."""
        import io

        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, left = pyplot.subplots(figsize=(6.4, 4.0))
        for name in ("local", "neighbour"):
            points = [
                (line["round"], 100 * line["accuracy"][name])
                for line in self.rounds
                if line["accuracy"] and line["accuracy"][name] is not None
            ]
            if points:
                left.plot(*zip(*points, strict=True), marker=".", label=f"{name} accuracy")
        left.set_xlabel("round")
        left.set_title(caption, fontsize=7, wrap=True)
        left.set_ylabel("accuracy on held-out data [%]")
        right = left.twinx()
        for level in ("record_level", "client_level"):
            spent = [
                (line["round"], line["epsilon"][level]) for line in self.rounds if line["epsilon"][level] is not None
            ]
            if spent:
                right.plot(*zip(*spent, strict=True), linestyle="--", color="gray", label=f"ε spent, {level[:6]} level")
                right.set_ylabel("ε")
        handles = [h for axis in (left, right) for h in axis.get_legend_handles_labels()[0]]
        if handles:
            left.legend(handles=handles, loc="best")
        buffer = io.BytesIO()
        figure.tight_layout()
        figure.savefig(buffer, format="png", dpi=120)
        pyplot.close(figure)
        write_bytes(self._file(CURVE, "result"), buffer.getvalue())

    def _file(self, name: str, kind: Kind) -> Path:
        return path_of(self.folder, name, kind)


def _lines_until(file: Path, last_round: int) -> list[dict[str, Any]]:
    """Return the complete lines at the start of a file, up to a round."""
    content = file.read_bytes() if file.exists() else b""
    lines: list[dict[str, Any]] = []
    with contextlib.suppress(ValueError, TypeError, KeyError):
        for line in content.split(b"\n")[:-1]:
            parsed = json.loads(line)
            if parsed["round"] > last_round:
                break
            lines.append(parsed)
    return lines


def _cut_after(file: Path, lines: int) -> None:
    """Keep only the first lines of a file; write nothing if there are no other lines."""
    content = file.read_bytes() if file.exists() else b""
    head = b"".join(line + b"\n" for line in content.split(b"\n")[:-1][:lines])
    if head != content:
        write_bytes(file, head, synced=True)


def _entry(accuracy: Accuracy) -> dict[str, Any]:
    """Convert an accuracy of a round to JSON, without parts that a round does not report."""
    values = asdict(accuracy).items()
    return {name: value for name, value in values if name in ("local", "neighbour") or value not in ((), [], None)}


ClientAccuracies = Mapping[str, Mapping[str, Sequence[float | None]]]
"""``free`` or ``final`` → name of the accuracy → value of each client, in the order of clients."""


def _lists(clients: ClientAccuracies) -> dict[str, Any]:
    return {when: {name: list(values) for name, values in kinds.items()} for when, kinds in clients.items()}


def spreads(clients: ClientAccuracies) -> dict[str, Any]:
    """Return minimum, quartiles and maximum over clients of each accuracy; None without values."""
    return {when: {name: spread(values) for name, values in kinds.items()} for when, kinds in clients.items()}


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide the numbers."""
    package_versions = {}
    for name in PACKAGES:
        try:
            package_versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            package_versions[name] = "not installed"
    return package_versions


def build_summary(
    *,
    method: str,
    engine: str,
    seed: int,
    rounds: int,
    population: int,
    new_clients: int,
    randomness: str,
    zero_shot: Accuracy | None,
    free: Accuracy | None,
    rival: str,
    final: Accuracy | None,
    clients: ClientAccuracies,
    split: str,
    group_names: Sequence[str],
    domain_names: Sequence[str],
    releases: Sequence[Release],
    rows: Mapping[str, int],
    notes: Sequence[str],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """Build the content of ``summary.json``, a result: each argument is a function of releases and public numbers.

    ``rows`` maps each way to compute gradients (`row_check`) to its number of clients, a function of machine and
    shapes. ``clients`` is empty if the held-out records are private.
    """
    nothing = Accuracy(local=None, neighbour=None)
    before, after = zero_shot or nothing, final or nothing
    accuracy: dict[str, dict[str, Any]] = {
        name: _entry(entry) | {"general": entry.general, "new_client": entry.new_client}
        for name, entry in (("zero_shot", before), ("free", free or nothing), ("final", after))
    }
    for entry in accuracy.values():
        entry["harmonic_mean"] = harmonic_mean(entry["local"], entry["neighbour"])
    accuracy["free"]["rival"] = rival
    # A node may have other groups than the server. The summary then names no groups.
    is_told = len(before.by_group) == len(after.by_group) == len(group_names)
    return {
        "method": method,
        "engine": engine,
        "seed": seed,
        "rounds": rounds,
        "population": population,
        "new_clients": new_clients,
        "randomness": randomness,
        "evaluation_split": split,
        "groups": list(group_names) if is_told else [],
        "domains": list(domain_names) if is_told else [],
        "accuracy": accuracy,
        "clients": _lists(clients),
        "spread": spreads(clients),
        "privacy": [asdict(release) for release in releases],
        "rows": dict(rows),
        "notes": list(notes),
        "versions": versions(),
        "config": dict(config),
    }


def first_and_last_accuracy(recorder: RunRecorder, *, trains: bool) -> tuple[Accuracy | None, Accuracy | None]:
    """Return the zero-shot accuracy and that of the last scored round."""
    scored = {line["round"]: Accuracy(**line["accuracy"]) for line in recorder.rounds if line["accuracy"]}
    zero_shot = scored.pop(0, None)
    return zero_shot, scored[max(scored)] if scored else None if trains else zero_shot
