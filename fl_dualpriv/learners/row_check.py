"""Check on made-up records that a record's gradient keeps all its bits when other records or clients come or go.

The sensitivity of a clipped sum requires that the term of a record is a function of that record (docs/privacy.md §4.1).
In exact arithmetic it is. In floats a matrix kernel may round a row by its place, or by the number of rows.
The machine and the shapes decide which kernels run. Each process therefore tests its kernels before the first private
step, on made-up records, with the same code that computes the rows of the run.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.learners.base import Objective, Picked, Records, StepGradients
from fl_dualpriv.privacy.step import client_rows

RowPath = Literal["together", "records apart", "clients apart", "records and clients apart"]
"""Form of the matrix products.

With ``together``, records and clients share products. With ``records apart``, only clients share products. With
``clients apart``, only records do. With ``records and clients apart``, neither do.
"""

COMPANY = 3
"""Most clients that step together in a check; fewer if a node hosts fewer."""
MADE_UP_BLOCKS = 3
"""Full blocks of made-up records; one record is added, so that each row stands at several places of a block."""


def checked_objective(
    objective: Objective[Any], made_up: Callable[[], Records], prompts: Tensor, *, private: bool
) -> tuple[Objective[Any], RowPath]:
    """Choose the fastest form of an objective whose rows depend on no other record or client on this machine.

    Guarantee:
        With the returned form, on the shapes that were tried, removing a record from a batch changes no bit of another
        row, and neither does adding or removing a client in the same step. The choice is a function of the machine and
        of public shapes. No record of a client is read.

    Args:
        objective: Objective of the run.
        made_up: Function that makes records of the run's shapes: full blocks and one more record. Each call returns
            the same records as new objects, so that an objective cannot use cached results instead of computing.
        prompts: Prompts to test, (prompt, rows, cols): as many as step together, up to `COMPANY`.
        private: True if single records are protected. Otherwise only the clients' sums must not depend on others.

    Returns:
        The objective to use, and its path. With "clients apart" in the path, its clients must step one by one.

    Raises:
        PrivacyError: If single records are protected and no form passes, because then no sensitivity can be stated on
            this machine.
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
        "on this machine a record's gradient changes with the other records of its batch, even if each record is "
        "computed separately: the sensitivity of a step cannot be stated, and nothing is released; use other hardware "
        "or another build of torch"
    )


def _rows_do_not_mix(objective: Objective[Any], made_up: Callable[[], Records], prompt: Tensor) -> bool:
    """Compare a client's rows with the rows without one of its records, and with the row of a single record."""
    return rows_hold(lambda picked: _rows(objective, made_up, prompt, [picked]), made_up().num_examples)


def rows_hold(rows_of: Callable[[np.ndarray], Tensor], count: int) -> bool:
    """Return True if rows keep their bits when records leave.

    Args:
        rows_of: Indices of made-up records, (record,) → their rows, (record, …).
        count: Number of made-up records.
    """
    everything = np.arange(count)
    whole = rows_of(everything)
    if not bool(torch.isfinite(whole).all() and whole.any()):
        return False  # NaN or all-zero rows prove nothing
    middle = len(everything) // 2
    subsets = [np.delete(everything, 0), np.delete(everything, middle), everything[-1:]]
    return all(torch.equal(rows_of(kept), whole[kept]) for kept in subsets)


def _clients_do_not_mix(
    objective: Objective[Any], made_up: Callable[[], Records], prompts: Tensor, *, private: bool
) -> bool:
    """Compare clients that step together with each client on its own, with batches of several sizes, in two orders."""
    everything = np.arange(made_up().num_examples)
    falling = [everything[: len(everything) // (1 + 2 * place)] for place in range(len(prompts))]
    for picked in (falling, falling[::-1]):
        together = _at(objective, made_up, prompts, picked)
        sums = together.sums()
        for client, batch in enumerate(picked):
            here = slice(client, client + 1)
            alone = _at(objective, made_up, prompts[here], [batch])
            if not torch.equal(sums[client], alone.sums()[0]):
                return False
            if private and not torch.equal(_of(together, client, batch), _of(alone, 0, batch)):
                return False
    return True


def _at(objective: Objective[Any], made_up: Callable[[], Records], prompts: Tensor, picked: Picked) -> StepGradients:
    return objective.bind([made_up() for _ in picked]).gradients(prompts, picked)


def _of(gradients: StepGradients, client: int, picked: np.ndarray) -> Tensor:
    return torch.cat(list(client_rows(gradients, client)))[: len(picked)]


def _rows(objective: Objective[Any], made_up: Callable[[], Records], prompt: Tensor, picked: Picked) -> Tensor:
    return _of(_at(objective, made_up, prompt, picked), 0, picked[0])
