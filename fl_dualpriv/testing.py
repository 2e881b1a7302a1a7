"""The contracts of strategies and methods, as tests: they raise `AssertionError` if a class breaks its contract.

``check_strategy(MyStrategy, option=...)`` runs on the class itself, with small made-up clients, in about a second. It
searches for counter-examples of `sensitivity`. It cannot prove `sensitivity`; the author must do that.
``check_method(MyMethod, option=...)`` does the same for a method, whose author owes no proof.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from flwr.app import ConfigRecord, Message
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor, nn

from fl_dualpriv import messages
from fl_dualpriv.config.methods import METHODS
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.learners.module import ModuleLearner, cross_entropy
from fl_dualpriv.methods.base import Method, PromptState, Rates, Released
from fl_dualpriv.privacy.adaptive import AdaptiveClip
from fl_dualpriv.privacy.clipping import clip_rows
from fl_dualpriv.privacy.noise import KeyedRandom
from fl_dualpriv.privacy.plan import ServerUnit, round_terms
from fl_dualpriv.privacy.step import client_rows, clipped_sums
from fl_dualpriv.server.accounting import ServerPrivacy
from fl_dualpriv.server.noise_memory import CLIP_NORM
from fl_dualpriv.server.rules import check_class
from fl_dualpriv.server.strategy import RoundStrategy, Update

Uploads = Mapping[int, Tensor]
"""Partition → update, for the clients that answered."""
Make = Callable[[int], RoundStrategy]
"""Seed of the noise → a new instance of the strategy."""

_SHAPE = (4, 5)
_ENTRIES = math.prod(_SHAPE)
_SIZES = (10, 20, 30, 40, 50, 60, 70, 80)
_BOUND, _RATE, _ROUNDS = 0.7, 0.75, 3
_FAR = 100.0
_ADAPTIVE = AdaptiveClip(start=_BOUND, target_quantile=0.5, learning_rate=0.2, bit_noise=1.0, expected_cohort=6.0)
_SLACK = 1 + 1e-9  # of float64 sums


def check_strategy(cls: type[RoundStrategy], *, server_noise: bool = True, **options: object) -> None:
    """Check the properties of a strategy on which fl-dualpriv relies, for the given options.

    Always checked:

    * Equal inputs give equal bits in any order of replies.
    * A run that is resumed from the prompt and ``state`` gives the bits of a run that never stopped.
    * The prompt keeps its shape and type and stays finite, also if no client answers or with NaN, which counts as zero.
    * Weights are finite numbers that depend only on the number of examples.

    Checked with ``server_noise``:

    * The class is accepted under noise of the server.
    * `combine` moves by at most `sensitivity` when a client comes or goes, also when adaptive clipping has moved the
      bound (and when a record changes an upload, if the class is ``proved_for`` records), over many crafted and random
      uploads.
    * `sensitivity` and the divisor do not depend on the data.
    * A round that no client answers is released with noise.
    * Only the noised result reaches `server_update` and ``state``.

    Args:
        cls: Class of the strategy.
        server_noise: False for a class that must never run with noise of the server.
        options: Values of the class's own fields.

    Raises:
        AssertionError: If a property does not hold; the message names it.
    """
    # Messages cannot be made outside a Flower task.
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 1, 0
    units: list[ServerUnit | None] = [None]
    if server_noise:
        refusal = _refusal(cls, "client")
        _require(refusal is None, f"{cls.__name__} is refused with noise of the server: {refusal}")
        units.append("client")
        if _refusal(cls, "record") is None:
            units.append("record")
    for unit in units:

        def make(seed: int, unit: ServerUnit | None = unit) -> RoundStrategy:
            return _build(cls, options, unit, seed)

        _check_weights(make(0))
        _check_rounds(make)
        if unit is not None:
            _check_sensitivity(make, unit)
            _check_only_the_release_is_seen(make)


def check_method(cls: type[Method], **options: object) -> None:
    """Check the properties of a method on which fl-dualpriv relies, for the given options.

    * Equal inputs give equal bits, and no input changes in place.
    * Clients do not mix: with other numbers of the other clients, a client's result keeps its bits.
    * Prompts and memory keep their shapes and types and stay finite, step after step.
    * p_G moves only if the method shares it, and not if a trusted server moves it. p_L does not if it comes from
      elsewhere.

    Args:
        cls: Class of the method.
        options: Values of the class's own fields.

    Raises:
        AssertionError: If a property does not hold; the message names it.
    """
    method, rates, name = cls(**options), Rates(shared=0.5, personal=0.7), cls.__name__
    _require(method.name in METHODS, f"{name}.name is {method.name!r}, which no method of the library has")
    first, second = _method_state(method, 0), _method_state(method, 1)
    for step in range(3):
        release = _made_release(step)
        before = _tensors(first, release)
        moved, again = method.move(first, release, rates), method.move(first, release, rates)
        _require(_equal(before, _tensors(first, release)), f"{name}.move changes its input")
        _require(_equal(_tensors(moved), _tensors(again)), f"{name}.move gives other bits for the same input")
        for new, old in zip(_tensors(moved), _tensors(first), strict=True):
            _require(new.shape == old.shape and new.dtype == old.dtype, f"{name}.move changes a shape or a type")
            _require(bool(torch.isfinite(new).all()), f"{name}.move makes a number that is not finite")
        mixed = method.move(_joined(first, second), _joined_release(release, _made_release(step + 9)), rates)
        alone = all(torch.equal(new[0], old[0]) for new, old in zip(_tensors(mixed), _tensors(moved), strict=True))
        _require(alone, f"{name}.move lets the numbers of one client depend on another client")
        still = method.move(first, replace(release, moves_global=False), rates)
        _require(torch.equal(still.own_global, first.own_global), f"{name}.move moves p_G of a trusted server")
        given = method.move(first, replace(release, moves_personal=False), rates)
        _require(torch.equal(given.personal, first.personal), f"{name}.move moves p_L that comes from elsewhere")
        shares = not torch.equal(moved.own_global, first.own_global)
        _require(shares == method.shared, f"{name}.shared is {method.shared}, and p_G {'moves' if shares else 'stays'}")
        first = moved


def check_learner(
    module: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    *,
    block: int = 4,
) -> None:
    """Search for a record of a module's batch that another record's row depends on.

    * A record that is removed, or exchanged for another one, does not change the rows of the others, bit by bit.
    * A record of NaN spoils its own row only, and adds nothing to a clipped sum.
    * Rows do not depend on what the module saw before: no buffer, running statistic or random draw.
    * No row changes the module.

    It cannot prove that rows do not mix; the author must do that.

    Args:
        module: The module, at any parameters.
        inputs: At least six different records, (record, …), with gradients that are not zero.
        targets: Their targets, (record, …).
        loss: Loss of each record.
        block: Number of records that run together; smaller than the number of records.

    Raises:
        AssertionError: If a property does not hold; the message names it.
        ConfigError: If `ModuleLearner` refuses the module.
    """
    module = copy.deepcopy(module)
    learner, n = ModuleLearner(module, loss, block=block), len(inputs)
    _require(n >= 6 and block < n, f"give at least six records and a smaller block, not {n} records and {block}")

    def rows(x: Tensor, y: Tensor) -> Tensor:
        return torch.cat(list(client_rows(learner.rows(x, y), 0)))[: len(x)]

    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    whole = rows(inputs, targets)
    _require(bool(whole.flatten(1).any(dim=1).all()), "a record has no gradient, so that nothing would be tested")
    _require(torch.equal(rows(inputs, targets), whole), "a second pass gives other rows: something draws or remembers")
    # Where kernels round by place, records run one by one, and a forward that mixes would go unseen.
    one, all_together = learner.block_rows(inputs[:1], targets[:1])[0], learner.block_rows(inputs, targets)[0]
    far = float((one - all_together).abs().max()) > 1e-3 * float(one.abs().max())
    _require(not far, "the rows of other records change a record's row")
    for gone in (0, n // 2, n - 1):
        kept = [i for i in range(n) if i != gone]
        same = torch.equal(rows(inputs[kept], targets[kept]), whole[kept])
        _require(same, f"without record {gone} the rows of other records change")
        other = inputs.clone()
        other[gone] = inputs[(gone + 1) % n]
        same = torch.equal(rows(other, targets)[kept], whole[kept])
        _require(same, f"with another record in place of record {gone} the rows of other records change")
    if inputs.is_floating_point():
        bad = inputs.clone()
        bad[1] = torch.nan
        kept = [i for i in range(n) if i != 1]
        same = torch.equal(rows(bad, targets)[kept], whole[kept])
        _require(same, "a record of NaN changes the rows of other records")
        moved = clipped_sums(learner.rows(bad, targets), 1.0)[0].value
        _require(bool(torch.isfinite(moved).all()), "a record of NaN spoils the clipped sum")
    unchanged = all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    _require(unchanged, "a pass changes a parameter or a buffer of the module")


def _method_state(method: Method, seed: int) -> PromptState:
    g = torch.Generator().manual_seed(seed)
    memory = {
        key: torch.zeros(3, *shape, dtype=dtype) for key, (shape, dtype) in method.memory_shapes(*_SHAPE, 2).items()
    }
    return PromptState(
        own_global=torch.randn(3, *_SHAPE, generator=g),
        personal=torch.randn(3, *_SHAPE, generator=g),
        row_basis=torch.randn(3, 2, _SHAPE[1], generator=g),
        memory=memory,
    )


def _made_release(seed: int) -> Released:
    direction = torch.randn(3, *_SHAPE, generator=torch.Generator().manual_seed(100 + seed))
    return Released(direction=direction, of_global=direction.clone())


def _joined(first: PromptState, second: PromptState) -> PromptState:
    """Client 0 of the first state beside the other clients of the second."""
    return PromptState(
        own_global=_beside(first.own_global, second.own_global),
        personal=_beside(first.personal, second.personal),
        row_basis=_beside(first.row_basis, second.row_basis),
        memory={key: _beside(first.memory[key], second.memory[key]) for key in first.memory},
    )


def _joined_release(first: Released, second: Released) -> Released:
    return Released(
        direction=_beside(first.direction, second.direction), of_global=_beside(first.of_global, second.of_global)
    )


def _beside(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first[:1], second[1:]])


def _tensors(state: PromptState, *releases: Released) -> list[Tensor]:
    held = [state.own_global, state.personal, state.row_basis, *(state.memory[key] for key in sorted(state.memory))]
    held += [tensor for released in releases for tensor in (released.direction, released.of_global)]
    return [tensor.clone() for tensor in held]


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def make_strategy(cls: type[RoundStrategy], **options: object) -> RoundStrategy:
    """Make a strategy without noise for eight made-up clients with 10, 20, … 80 examples, for hand-computed tests.

    Raises:
        AssertionError: If the strategy refuses its options.
    """
    return _build(cls, options, None, 0)


def _require(holds: bool, message: str) -> None:
    if not holds:  # not an assert, which an optimised interpreter drops
        raise AssertionError(message)


def _refusal(cls: type[RoundStrategy], unit: ServerUnit) -> str | None:
    try:
        check_class(cls, RoundStrategy, unit, "float")
    except PrivacyError as error:
        return str(error)
    return None


def _build(
    cls: type[RoundStrategy], options: Mapping[str, object], unit: ServerUnit | None, seed: int
) -> RoundStrategy:
    privacy = ServerPrivacy(
        unit=unit or "client",
        bound=_BOUND,
        noise_multiplier=1.3,
        sampling_rate=_RATE,
        ledger_multiplier=1.3,
        ledger=None,
    )
    try:
        return cls(
            cards={p: messages.ClientCard(partition=p, num_examples=n) for p, n in enumerate(_SIZES)},
            hosts={p: 100 + p % 2 for p in range(len(_SIZES))},
            masses={p: 0.1 * n if unit == "record" else 1.0 for p, n in enumerate(_SIZES)},
            num_rounds=_ROUNDS,
            evaluate_every=0,
            prompt_kind="global",
            run_token="contract",
            terms=round_terms(None, 1.0, 1),
            tolerates_failures=True,
            privacy=privacy if unit else None,
            sources=KeyedRandom,
            seed=seed,
            report=lambda report: None,
            **options,  # type: ignore[arg-type]
        )
    except (ConfigError, PrivacyError) as error:
        raise AssertionError(f"{cls.__name__} cannot start: {error}") from error


# --- rounds -----------------------------------------------------------------------------------------------------------


def _begin(strategy: RoundStrategy, server_round: int, start: Tensor) -> list[Message]:
    return list(strategy.configure_train(server_round, messages.to_arrays(start), ConfigRecord(), None))  # type: ignore[arg-type]


def _play(
    strategy: RoundStrategy, uploads: Uploads, server_round: int, start: Tensor, *, backwards: bool = False
) -> Tensor:
    """Run one round as the server does; a client that is asked and not in ``uploads`` does not answer."""
    replies, turn = [], -1 if backwards else 1
    for message in _begin(strategy, server_round, start):
        answered = tuple(p for p in messages.read_train(message).partitions if p in uploads)[::turn]
        if answered:
            sent = messages.Uploads(partitions=answered, values=torch.stack([uploads[p] for p in answered]))
            replies.append(Message(messages.uploads_content(sent), reply_to=message))
    arrays, _ = strategy.aggregate_train(server_round, replies[::turn])
    _require(arrays is not None, "a round gave no prompt")
    assert arrays is not None
    return messages.from_arrays(arrays)


def _draw(key: str, count: int = len(_SIZES), size: float = 1.0) -> dict[int, Tensor]:
    rng = np.random.default_rng(list(key.encode()))
    return {p: torch.from_numpy(size * rng.standard_normal(_SHAPE)) for p in range(count)}


def _check_weights(strategy: RoundStrategy) -> None:
    for examples in _SIZES:
        weights = [strategy.weight(examples) for _ in range(3)]
        _require(math.isfinite(weights[0]), f"weight({examples}) = {weights[0]}; it must be a finite number")
        _require(len(set(weights)) == 1, f"weight({examples}) changes from call to call: {weights}")


def _check_rounds(make: Make) -> None:
    start = torch.linspace(-1, 1, _ENTRIES).reshape(_SHAPE)
    uploads = [_draw(f"round {r}") for r in range(1, _ROUNDS + 1)]
    straight, resumed, prompt = make(0), make(0), start
    for r, sent in enumerate(uploads, 1):
        before = prompt.clone()
        again = _play(resumed, sent, r, prompt.clone(), backwards=True)
        prompt = _play(straight, sent, r, prompt)
        what = "a run resumed from its state, or" if r > 1 else ""
        _require(torch.equal(prompt, again), f"round {r}: {what} replies in another order give another prompt")
        _require(prompt.dtype == before.dtype, f"the prompt became {prompt.dtype}")
        _require(bool(torch.isfinite(prompt).all()), f"round {r} gave a prompt that is not finite")
        for name, entry in straight.state.items():
            is_tensor = isinstance(name, str) and isinstance(entry, Tensor)
            _require(is_tensor, f"state[{name!r}] is a {type(entry).__name__}: checkpoints can save only tensors")
        # Like a run that was killed after this round: only its prompt and its state are left.
        resumed = make(0)
        resumed.state, resumed.rounds_done = {n: tensor.clone() for n, tensor in straight.state.items()}, r
    nobody = _play(make(0), {}, 1, start)
    _require(bool(torch.isfinite(nobody).all()), "a round that no client answers gives a prompt that is not finite")
    if straight.privacy is not None:
        _require(not torch.equal(nobody, _play(make(1), {}, 1, start)), "a round that no client answers has no noise")
    broken, zero = (
        {p: torch.full(_SHAPE, value) if p % 3 == 0 else u for p, u in uploads[0].items()} for value in (math.nan, 0.0)
    )
    _require(torch.equal(_play(make(0), broken, 1, start), _play(make(0), zero, 1, start)), "NaN does not count as 0")


# --- what the noise must cover ----------------------------------------------------------------------------------------


def _combined(strategy: RoundStrategy, uploads: Uploads) -> Tensor:
    result = strategy.combine([Update(partition=p, diff=uploads[p].clone()) for p in sorted(uploads)])
    what = f"combine() of {len(uploads)} updates"
    shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
    _require(shape == _SHAPE, f"{what} gives {shape}; expected a tensor of {_SHAPE}")
    _require(bool(torch.isfinite(result).all()), f"{what}, all finite, is not finite")
    return result.to(torch.float64)


def _check_sensitivity(make: Make, unit: ServerUnit) -> None:
    for grown in (1.0, 3.0) if unit == "client" else (1.0,):
        _check_sensitivity_at(make(0), unit, grown)


def _check_sensitivity_at(strategy: RoundStrategy, unit: ServerUnit, grown: float) -> None:
    """Check at the first clip norm, or at a clip norm that adaptive clipping has made ``grown`` times as large."""
    if grown != 1:
        assert strategy.privacy is not None
        strategy.privacy = replace(strategy.privacy, adaptive=_ADAPTIVE)
        strategy.state[CLIP_NORM] = torch.tensor(grown * _BOUND, dtype=torch.float64)
    _begin(strategy, 1, torch.zeros(_SHAPE))
    claim, divisor = strategy.sensitivity(), strategy.divisor()
    for what, unscaled, others in _cohorts() if unit == "client" else _sums():
        uploads, *neighbours = [{p: grown * u for p, u in some.items()} for some in (unscaled, *others)]
        whole = _combined(strategy, uploads)
        for neighbour in neighbours:
            move = float(torch.linalg.vector_norm(whole - _combined(strategy, neighbour)))
            _require(
                move <= claim * _SLACK,
                f"{what}: one {unit} moves combine() by {move:.6g}; sensitivity() claims at most {claim:.6g}",
            )
        public = (strategy.sensitivity(), strategy.divisor()) == (claim, divisor)
        _require(public, "sensitivity() or the divisor changed with the uploads: both must be public")


def _check_only_the_release_is_seen(make: Make) -> None:
    """Check that two rounds with different uploads and, by chance, the same release continue identically."""
    release, start = torch.linspace(0, 1, _ENTRIES).reshape(_SHAPE), torch.ones(_SHAPE)
    seen: list[tuple[Tensor, dict[str, Tensor]]] = []
    for key in ("one", "other"):
        strategy = make(0)
        _begin(strategy, 1, start)
        state_before = dict(strategy.state)
        _combined(strategy, _clipped(_draw(key)))
        untouched = strategy.state.keys() == state_before.keys() and all(
            strategy.state[n] is state_before[n] for n in state_before
        )
        _require(untouched, "combine() writes to state: its input has no noise yet, and state is saved and read")
        seen.append((strategy.server_update(start.clone(), release.clone()), strategy.state))
    (one, state), (other, also) = seen
    _require(torch.equal(one, other), "server_update() depends on uploads that it saw before the noise")
    alike = state.keys() == also.keys() and all(torch.equal(state[n], also[n]) for n in state)
    _require(alike, "state depends on uploads that were seen before the noise")


# --- crafted uploads --------------------------------------------------------------------------------------------------


def _clipped(uploads: Uploads) -> dict[int, Tensor]:
    rows, _ = clip_rows(torch.stack([uploads[p] for p in uploads]), _BOUND)
    return dict(zip(uploads, rows, strict=True))


def _cohorts() -> Iterator[tuple[str, Uploads, list[Uploads]]]:
    """Yield cohorts of updates whose norms are at most the bound, each with the cohorts that lack one client."""
    for what, uploads in _crafted():
        clipped = _clipped(uploads)
        yield what, clipped, [{p: u for p, u in clipped.items() if p != gone} for gone in clipped]


def _crafted() -> Iterator[tuple[str, dict[int, Tensor]]]:
    axis = _FAR * torch.eye(_ENTRIES, dtype=torch.float64).reshape(_ENTRIES, *_SHAPE)
    for n in (1, 2, 4, 7):
        yield f"{n} orthogonal updates", {p: axis[p] for p in range(n)}
        yield f"{n} updates of all sizes", _draw(f"sizes {n}", n, 0.3)
        for split in range(n + 1):
            yield f"{split} of {n} opposite", {p: axis[0] * (1 if p < split else -1) for p in range(n)}
            yield f"{split} of {n} zero", {p: axis[0] * (0 if p < split else 1) for p in range(n)}
        for size in range(1, n + 1):
            # In each entry another choice of clients agrees, and the others are zero: a hard case for rank statistics.
            table = torch.zeros(n, _ENTRIES, dtype=torch.float64)
            for entry, members in zip(range(_ENTRIES), itertools.combinations(range(n), size), strict=False):
                table[list(members), entry] = _FAR
            yield f"{size} of {n} agree in each entry", dict(enumerate(table.reshape(n, *_SHAPE)))
            longer = torch.cat([torch.zeros(1, _ENTRIES, dtype=torch.float64), table])[: len(_SIZES)]
            yield f"{size} of {n} agree, one is zero", dict(enumerate(longer.reshape(-1, *_SHAPE)))
    for trial in range(24):
        yield f"random updates {trial}", _draw(f"random {trial}", 1 + trial % 8, _FAR if trial % 2 else 0.2)


def _sums() -> Iterator[tuple[str, Uploads, list[Uploads]]]:
    """Yield sums over records of all clients, as long as they can be, each with the sums that lack one record."""
    for trial in range(6):
        drawn = _draw(f"sums {trial}")
        alike = trial % 3 == 0
        ways = {p: (drawn[0] if alike else u) / float((drawn[0] if alike else u).norm()) for p, u in drawn.items()}
        sums = {p: way * _BOUND * _SIZES[p] for p, way in ways.items()}
        yield f"sums over records {trial}", sums, [{**sums, p: sums[p] - _BOUND * way} for p, way in ways.items()]
