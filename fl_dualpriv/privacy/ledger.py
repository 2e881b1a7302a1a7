"""An append-only, human-readable record of releases: each line is written and synced *before* its release is made.

A line is an event, a plan that is reserved for a run, or the header that names the ledger's filter
(`privacy.filters`). The header comes before the first event that the filter admits.
"""

import contextlib
import fcntl
import functools
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeGuard

from fl_dualpriv.privacy.accounting import (
    FINE_GRID,
    SampledGaussians,
    composed_epsilon,
    gathered,
    mixed_epsilon,
    multiplier_of_pure,
)

_LOCK_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class LedgerEvent:
    """Releases of one round, each on its own Poisson sample, or the release that selects a start before round 1.

    Attributes:
        run: Token of the run to which the releases belong.
        unit: Protected unit, ``record`` or ``client``.
        server_round: Number of the round, from 1; 0 for the selection of a start, which is one release of all records.
        releases: Number of releases; a client's round makes one per local step.
        sampling_rate: q, in (0, 1].
        noise_multiplier: Effective multiplier of everything released at once, > 0.
        kind: Kind of the noise. ``gaussian``: independent Gaussian noise. ``correlated``: the part that one round adds
            to a run of correlated noise (see `CorrelatedNoise.charge`). ``exponential``: a choice by the exponential
            mechanism. Its ``noise_multiplier`` is that of a Gaussian release that dominates it, see
            `multiplier_of_pure`, so code that reads only this multiplier charges too much and never too little.
        pure_epsilon: ε of an ``exponential`` choice; 0 for other kinds.
    """

    run: str
    unit: str
    server_round: int
    releases: int
    sampling_rate: float
    noise_multiplier: float
    kind: Literal["gaussian", "correlated", "exponential"] = "gaussian"
    pure_epsilon: float = 0.0

    @property
    def is_selection(self) -> bool:
        """True if the event is the selection of a start."""
        return self.server_round == 0

    @property
    def is_sound(self) -> bool:
        """True if the accountant can compute an ε from this event; a line from a damaged disk may hold any values."""
        return (
            isinstance(self.run, str)
            and (_is_count(self.server_round) or self._is_sound_selection)
            and _is_count(self.releases)
            and self.unit in ("record", "client")
            and _are_terms(self.sampling_rate, self.noise_multiplier)
            and self.kind in ("gaussian", "correlated", "exponential")
            and _is_number(self.pure_epsilon)
            and (self.pure_epsilon == 0 if self.kind != "exponential" else self._is_sound_choice)
        )

    @property
    def _is_sound_selection(self) -> bool:
        whole = type(self.server_round) is int and self.server_round == 0 and self.releases == 1
        return whole and self.sampling_rate == 1 and self.kind in ("gaussian", "exponential")

    @property
    def _is_sound_choice(self) -> bool:
        return self.is_selection and _is_dominated(self.pure_epsilon, self.noise_multiplier)


@dataclass(frozen=True, kw_only=True)
class ReservedPlan:
    """All releases that a run may make of one unit's data, on fixed terms, charged before the first of them.

    Attributes:
        run: Token of the run.
        releases: Largest number of releases over all rounds.
        sampling_rate: q of each release, in (0, 1].
        noise_multiplier: z of each release, > 0.
        selection_multiplier: z of the selection of a start, which comes before all of them; 0 if there is none.
        selection_epsilon: ε of that selection if it is a choice by the exponential mechanism, else 0.
    """

    run: str
    releases: int
    sampling_rate: float
    noise_multiplier: float
    selection_multiplier: float = 0.0
    selection_epsilon: float = 0.0

    @property
    def is_sound(self) -> bool:
        """True if the accountant can compute an ε from this plan."""
        if not (_is_number(self.selection_multiplier) and _is_number(self.selection_epsilon)):
            return False
        selects = self.selection_multiplier != 0
        return (
            isinstance(self.run, str)
            and (_is_count(self.releases) or (selects and type(self.releases) is int and self.releases == 0))
            and _are_terms(self.sampling_rate, self.noise_multiplier)
            and (_are_terms(1.0, self.selection_multiplier) if selects else self.selection_epsilon == 0)
            and (self.selection_epsilon == 0 or _is_dominated(self.selection_epsilon, self.selection_multiplier))
        )

    def charges(self) -> tuple[SampledGaussians, ...]:
        """Return the Gaussian releases of the whole plan."""
        steps = [SampledGaussians(self.sampling_rate, self.noise_multiplier, self.releases)] if self.releases else []
        if self.selection_multiplier and not self.selection_epsilon:
            steps.append(SampledGaussians(1.0, self.selection_multiplier, 1))
        return tuple(steps) if len(steps) == 1 else gathered(steps)

    @property
    def pure(self) -> tuple[float, ...]:
        """ε of the plan's releases of pure DP."""
        return (self.selection_epsilon,) if self.selection_epsilon else ()

    def events(self) -> tuple[LedgerEvent, ...]:
        """Return the events of the whole plan, all steps in one round."""
        found = []
        if self.selection_multiplier:
            found.append(
                LedgerEvent(
                    run=self.run,
                    unit="record",
                    server_round=0,
                    releases=1,
                    sampling_rate=1.0,
                    noise_multiplier=self.selection_multiplier,
                    kind="exponential" if self.selection_epsilon else "gaussian",
                    pure_epsilon=self.selection_epsilon,
                )
            )
        if self.releases:
            found.append(
                LedgerEvent(
                    run=self.run,
                    unit="record",
                    server_round=1,
                    releases=self.releases,
                    sampling_rate=self.sampling_rate,
                    noise_multiplier=self.noise_multiplier,
                )
            )
        return tuple(found)

    def covers_selection(self, event: LedgerEvent) -> bool:
        """Return True if an event is the selection that this plan has."""
        terms = (self.selection_multiplier, self.selection_epsilon)
        return event.is_selection and (event.noise_multiplier, event.pure_epsilon) == terms


@dataclass(frozen=True, kw_only=True)
class LedgerContent:
    """Content of a ledger.

    Attributes:
        events: All whole events, in the order written.
        damaged: Number of lines that cannot be read as an event, a plan or a header. A torn line is a write that a
            crash cut off, before its releases were made. It looks like a line that a disk damaged later, so both are
            charged.
        plans: All reserved plans, in the order written.
        headers: All header lines, in the order written: none before a filter admits the first event, then one.
    """

    events: tuple[LedgerEvent, ...]
    damaged: int
    plans: tuple[ReservedPlan, ...] = ()
    headers: tuple[Mapping[str, Any], ...] = ()

    def releases(self, run: str | None = None, *, damaged_as: int = 1) -> int:
        """Return the number of releases of one run, or of all runs with the damaged lines.

        A damaged line counts as the largest round in the ledger, and as ``damaged_as`` at least.
        """
        if run is not None:
            return sum(event.releases for event in self.events if event.run == run)
        largest = max((event.releases for event in self.events), default=1)
        largest = max(largest, damaged_as)
        return sum(event.releases for event in self.events) + self.damaged * largest

    def steps(self, run: str | None = None, *, damaged_as: int = 1) -> int:
        """Return the number of releases as `releases` does, without the selections of starts."""
        rounds = tuple(event for event in self.events if not event.is_selection)
        return replace(self, events=rounds).releases(run, damaged_as=damaged_as)

    def selections(self, run: str | None = None) -> tuple[LedgerEvent, ...]:
        """Return the selections of starts of one run, or of all runs."""
        return tuple(event for event in self.events if event.is_selection and run in (None, event.run))

    def last_round(self, run: str) -> int:
        """Return the last round of a run that has an event in the ledger; 0 if there is none."""
        return max((event.server_round for event in self.events if event.run == run), default=0)

    def epsilon(self, delta: float, further: Iterable[LedgerEvent] = (), grid: float = FINE_GRID) -> float:
        """Return ε at ``delta`` of everything in the ledger and of ``further`` events together, of all runs.

        Guarantee:
            The result is an upper bound under add-or-remove-one, for one unit, only if the terms were fixed beforehand.
            Every event is charged as if the same record (client) had been there in all of them. A damaged line is
            charged as a round of the most releases, the highest rate and the least noise that appear anywhere in the
            composition. The result is infinite if there are only damaged lines. If the terms of a run were chosen after
            an earlier run, this number is only information and must not admit a release: use `privacy.filters` for
            that.
        """
        further = tuple(further)
        if self.damaged and not (self.events or further):
            return math.inf
        if pure := self.pure(further):
            return mixed_epsilon(self.charges(further), pure, delta, grid)
        return composed_epsilon(self.charges(further), delta, grid)

    def pure(self, further: Iterable[LedgerEvent] = ()) -> tuple[float, ...]:
        """Return ε of each choice by the exponential mechanism, sorted."""
        return tuple(sorted(event.pure_epsilon for event in (*self.events, *further) if event.pure_epsilon))

    def opacus_history(self) -> list[tuple[float, float, int]]:
        """Return the Gaussian releases as Opacus' accountants read them: noise multiplier, sampling rate and number.

        Damaged lines are charged as in `epsilon`. Choices by the exponential mechanism are left out, because Opacus has
        no such release.
        """
        return [(c.noise_multiplier, c.sampling_rate, c.releases) for c in self.charges()]

    def charges(self, further: Iterable[LedgerEvent] = ()) -> tuple[SampledGaussians, ...]:
        """Return the Gaussian releases that `epsilon` composes, with equal releases grouped."""
        events = [*self.events, *further]
        if self.damaged and not events:
            raise ValueError(f"the ledger holds {self.damaged} damaged lines and no event: its ε has no bound")
        if self.damaged:
            worst = replace(
                events[0],
                releases=max(event.releases for event in events),
                sampling_rate=max(event.sampling_rate for event in events),
                noise_multiplier=min(event.noise_multiplier for event in events),
                pure_epsilon=0.0,  # a Gaussian release of the least multiplier dominates each choice, too
            )
            events += [worst] * self.damaged
        return gathered(
            SampledGaussians(e.sampling_rate, e.noise_multiplier, e.releases) for e in events if not e.pure_epsilon
        )


class Ledger:
    """A JSON-lines file of `LedgerEvent`s, each on one line with the time of writing.

    Example:
        >>> import tempfile
        >>> ledger = Ledger(Path(tempfile.mkdtemp()) / "ledger.jsonl")
        >>> event = LedgerEvent(
        ...     run="mine", unit="record", server_round=1, releases=10, sampling_rate=0.1, noise_multiplier=1.0
        ... )
        >>> with ledger.exclusive():
        ...     ledger.record(event)
        >>> ledger.read().releases(), round(ledger.read().epsilon(1e-5), 1)
        (10, 2.9)

    Args:
        path: The file; the first event creates its folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def record(self, event: LedgerEvent) -> None:
        """Append an event and sync it to disk, before its releases.

        Guarantee:
            When this returns, the line is on disk, in a file whose name is on disk: the line survives a crash at any
            later moment. An earlier crash can leave a part of a line, and then nothing was released. So the ledger may
            count too much, never too little.

        Raises:
            ValueError: If no accountant can charge the event.
            OSError: If the line cannot be written. The caller must then release nothing.
        """
        if not event.is_sound:
            raise ValueError(f"{event}: not a release that can be accounted for")
        fields = asdict(event)
        if event.kind == "gaussian":
            del fields["kind"]
        if not event.pure_epsilon:
            del fields["pure_epsilon"]
        self._append(fields)

    def reserve(self, plan: ReservedPlan) -> None:
        """Append the plan of a run and sync it to disk, before the run's first event, as `record` does.

        Raises:
            ValueError: If no accountant can charge the plan.
            OSError: If the line cannot be written. The caller must then release nothing.
        """
        if not plan.is_sound:
            raise ValueError(f"{plan}: not a plan that can be accounted for")
        fields = asdict(plan)
        for name in ("selection_multiplier", "selection_epsilon"):
            if not fields[name]:
                del fields[name]
        self._append({"plan": fields})

    def begin(self, header: Mapping[str, Any]) -> None:
        """Append the header and sync it to disk, before the first event that its filter admits, as `record` does.

        Raises:
            OSError: If the line cannot be written. The caller must then release nothing.
        """
        self._append({"header": dict(header)})

    def _append(self, fields: Mapping[str, Any]) -> None:
        """Write one whole line with its time, and sync it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = {"time": utc_now(), **fields}
        with self.path.open("a+b") as file:
            if file.tell() == 0:  # sync the name first: a power cut can then never remove a file with lines
                _sync_names(self.path.parent.resolve())
            # A crash can leave half a line. It stays as a separate line, which still counts.
            torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            file.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the exclusive lock of this ledger across processes.

        Between a read of the content and an append no other process may write.

        Raises:
            TimeoutError: If another process holds the lock for `_LOCK_SECONDS`. The other clients of this process must
                not wait for it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as file:
            deadline = time.monotonic() + _LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released with the file, also by a crash
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"{self.path.name} is held by another process") from None
                    time.sleep(0.05)
            yield

    def read(self) -> LedgerContent:
        """Return the whole content of the ledger; an absent file is an empty ledger."""
        events: list[LedgerEvent] = []
        plans: list[ReservedPlan] = []
        headers: list[Mapping[str, Any]] = []
        damaged = 0
        for line in self._lines():
            match _parsed(line):
                case LedgerEvent() as event:
                    events.append(event)
                case ReservedPlan() as plan:
                    plans.append(plan)
                case None:
                    damaged += 1
                case header:
                    headers.append(header)
        return LedgerContent(events=tuple(events), damaged=damaged, plans=tuple(plans), headers=tuple(headers))

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        return [line for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def utc_now() -> str:
    """Return the current time in UTC, to the second, for a line in the files that a client keeps."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _parsed(line: str) -> LedgerEvent | ReservedPlan | Mapping[str, Any] | None:
    """Parse a line as an event, a plan or a header; return None for a damaged line."""
    try:
        fields: dict[str, Any] = json.loads(line)
        fields.pop("time", None)
        if fields.keys() == {"header"}:
            return fields["header"] if isinstance(fields["header"], dict) else None
        if fields.keys() == {"plan"}:
            plan = ReservedPlan(**fields["plan"])
            return plan if plan.is_sound else None
        if fields.pop("step", None) is not None:  # version 0.1 wrote one line per release
            fields["releases"] = 1
        event = LedgerEvent(**fields)
    except (ValueError, TypeError, AttributeError):
        return None
    return event if event.is_sound else None


def _are_terms(sampling_rate: object, noise_multiplier: object) -> bool:
    return (
        _is_number(sampling_rate)
        and 0 < sampling_rate <= 1
        and _is_number(noise_multiplier)
        and 0 < noise_multiplier < math.inf
    )


def _is_dominated(pure_epsilon: object, noise_multiplier: float) -> bool:
    """Return True if a Gaussian release of this multiplier dominates pure DP of this ε."""
    return _is_number(pure_epsilon) and pure_epsilon > 0 and noise_multiplier <= multiplier_of_pure(pure_epsilon)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sync_names(folder: Path) -> None:
    """Sync a folder and all folders above it, because a new file is on disk only with the entries of all of them."""
    _sync_folder(folder)
    _sync_folder(folder.parent)
    _sync_above(folder.parent, folder.parent.stat().st_ino)


@functools.lru_cache(maxsize=64)  # the clients of a run share these folders
def _sync_above(folder: Path, inode: int) -> None:
    """Sync the folders above, except those in which this process could not have created an entry."""
    device = folder.stat().st_dev
    for above in folder.parents:
        if above.stat().st_dev != device or not os.access(above, os.R_OK | os.W_OK):
            break
        _sync_folder(above)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
