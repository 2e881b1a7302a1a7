"""Try on made-up records that a record's gradient keeps all its bits when other records or clients come or go.

The sensitivity of a clipped sum needs each term to be a function of its own record (docs/privacy.md §4.1). In exact
arithmetic it is. In floats a matrix kernel may round a row by its place, or by how many rows there are. The machine and
the shapes decide which kernels run. So each process tries its kernels before the first private step, with the code that
makes the rows of the run, on records that are made up.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.learners.base import Objective, Picked, Records, StepGradients

RowPath = Literal["together", "records apart", "clients apart", "records and clients apart"]
"""The products that are shared: those of records and of clients, of clients only, of records only, or none."""

COMPANY = 3
"""Clients that step together in a check, where that many can."""
MADE_UP_BLOCKS = 3
"""Full blocks of made-up records, and one record more: each row stands at several places of a block."""


def checked_objective(
    objective: Objective[Any], made_up: Callable[[], Records], prompts: Tensor, *, private: bool
) -> tuple[Objective[Any], RowPath]:
    """Choose the fastest form of an objective whose rows depend on no other record or client on this machine.

    Guarantee:
        With the returned form, on the shapes that were tried, a record that is removed from a batch changes no bit of
        another row, and neither does a client that steps along or not. The choice is a function of the machine and of
        public shapes. No record of a client is read.

    Args:
        objective: Of the run.
        made_up: Makes records of the run's shapes, the same ones at each call, as new objects: what an objective keeps
            of records must not stand in for the work. One more than full blocks.
        prompts: Some, (prompt, rows, cols): as many as step together, up to `COMPANY`.
        private: Single records are protected. Otherwise only the clients' sums must not depend on others.

    Returns:
        The objective to use, and its path. With "clients apart" its clients must step one by one.

    Raises:
        PrivacyError: If single records are protected and no form passes: then no sensitivity can be stated here.
    """
    if not private:
        holds = len(prompts) == 1 or _clients_do_not_mix(objective, made_up, prompts, private=False)
        return objective, "together" if holds else "clients apart"
    paths: Sequence[tuple[bool, bool, RowPath]] = (
        (False, False, "together"),
        (True, False, "records apart"),
        (False, True, "clients apart"),
        (True, True, "records and clients apart"),
    )
    for records_apart, clients_apart, path in paths:
        form = objective.apart() if records_apart else objective
        if not _rows_do_not_mix(form, made_up, prompts[:1]):
            continue
        if clients_apart or len(prompts) == 1 or _clients_do_not_mix(form, made_up, prompts, private=True):
            return form, path
    raise PrivacyError(
        "on this machine a record's gradient changes with who else is in its batch, even one record at a time: the "
        "sensitivity of a step cannot be stated, and nothing is released; use other hardware or another build of torch"
    )


def _rows_do_not_mix(objective: Objective[Any], made_up: Callable[[], Records], prompt: Tensor) -> bool:
    """Compare a client's rows with those without one of its records, and without all others."""
    everything = np.arange(made_up().num_examples)
    whole = _rows(objective, made_up, prompt, [everything])
    if not bool(torch.isfinite(whole).all() and whole.any()):
        return False  # there is nothing to compare
    middle = len(everything) // 2
    kept = [np.delete(everything, 0), np.delete(everything, middle), everything[-1:]]
    return all(torch.equal(_rows(objective, made_up, prompt, [rows]), whole[rows]) for rows in kept)


def _clients_do_not_mix(
    objective: Objective[Any], made_up: Callable[[], Records], prompts: Tensor, *, private: bool
) -> bool:
    """Compare clients that step together with each by itself, with batches of several sizes, in two orders."""
    everything = np.arange(made_up().num_examples)
    falling = [everything[: len(everything) // (1 + 2 * place)] for place in range(len(prompts))]
    for picked in (falling, falling[::-1]):
        together = _at(objective, made_up, prompts, picked)
        sums = together.sums()
        for client, own in enumerate(picked):
            here = slice(client, client + 1)
            alone = _at(objective, made_up, prompts[here], [own])
            if not torch.equal(sums[client], alone.sums()[0]):
                return False
            if private and not torch.equal(_of(together, client, own), _of(alone, 0, own)):
                return False
    return True


def _at(objective: Objective[Any], made_up: Callable[[], Records], prompts: Tensor, picked: Picked) -> StepGradients:
    return objective.bind([made_up() for _ in picked]).gradients(prompts, picked)


def _of(gradients: StepGradients, client: int, picked: np.ndarray) -> Tensor:
    return torch.cat(list(gradients.rows(client)))[: len(picked)]


def _rows(objective: Objective[Any], made_up: Callable[[], Records], prompt: Tensor, picked: Picked) -> Tensor:
    return _of(_at(objective, made_up, prompt, picked), 0, picked[0])
