"""The choice of the free rival, by hand: which forms there are, and what decides."""

from collections.abc import Callable

import torch
from torch import Tensor

from fl_dualpriv.tasks.free_rival import PublicModel, choose_free_form

# Validation records of the classes 0, 0, 1, 2, 2. Client 0 holds 0 and 1, client 1 holds 2; client 2 is new.
LABELS = torch.tensor([0, 0, 1, 2, 2])
HELD = torch.tensor([[True, True, False], [False, False, True], [True, True, True]])
# Among 0 and 1, class 1 is the answer to every record of class 0 by a little.
LOGITS = torch.tensor([[1.0, 1.2, 0.0], [1.0, 1.2, 0.0], [0.0, 1.0, 2.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
LIST = torch.tensor([[0.0, 0.0, -4.0], [-4.0, -4.0, 0.0], [0.0, 0.0, 0.0]])
DECLARED = torch.tensor([[0.0, -0.5, -4.0], [-4.0, -4.0, 0.0], [0.0, 0.0, 0.0]])


def model(seen: list[str]) -> PublicModel:
    def logits(split: str) -> Tensor:
        seen.append(split)
        return LOGITS

    return PublicModel(name="un-tuned", logits=logits)


def validation() -> tuple[Tensor, Tensor]:
    return LABELS, LABELS


def chosen(prior: Tensor | None, asked: Callable[[], tuple[Tensor, Tensor]] | None, held: Tensor = HELD) -> str:
    seen: list[str] = []
    form = choose_free_form([model(seen)], asked, held, 3, 2, prior)
    return f"{form.name}, read {seen}"


def test_a_prior_that_prefers_a_class_of_a_list_may_win() -> None:
    assert chosen(DECLARED, validation) == "un-tuned, own class prior, read ['val', 'val']"
    # Toward the wrong class it loses nothing that the list has, so the tie goes to the list.
    assert chosen(DECLARED.flip(0)[[2, 1, 0]] * -1, validation).startswith("un-tuned, own class list")


def test_a_prior_that_is_even_on_every_list_is_no_form_and_reads_no_validation_record() -> None:
    assert chosen(LIST, validation) == "un-tuned, own class list, read []"
    assert chosen(None, validation) == "un-tuned, own class list, read []"
    everything = torch.ones_like(HELD)
    assert chosen(torch.zeros(3, 3), validation, everything) == "un-tuned, read []"


def test_where_validation_records_are_private_the_list_is_fixed() -> None:
    assert chosen(DECLARED, None) == "un-tuned, own class list, read []"


def test_a_new_client_does_not_decide() -> None:
    only_new = torch.stack([LIST[0], LIST[1], torch.tensor([0.0, 3.0, 0.0])])
    assert chosen(only_new, validation) == "un-tuned, own class list, read ['val', 'val']"
