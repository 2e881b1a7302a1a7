"""What a local method is: which prompts exist, and how a released gradient moves them.

A method is a function of noised sums at the client, so it owes no proof: everything it does is post-processing. Your
own method is a subclass in a separate file, named by ``method = "module:Class"``. Light on import: this file
reads no torch, because the check of a run's data needs only the facts of a method.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Learns = Literal["prompt", "linear-probe", "prototypes", "dp-lora", "ffa-lora", "fedotp"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptState:
    """The prompts of some clients that step together; the first dimension is the client.

    Attributes:
        own_global: Each client's copy of p_G, (client, n_ctx, ctx_dim).
        personal: p_L, (client, n_ctx, ctx_dim).
        row_basis: v of the low-rank part, (client, rank, ctx_dim).
        memory: Tensors that the method keeps from step to step and from round to round, see `Method.memory_shapes`.
    """

    own_global: "Tensor"
    personal: "Tensor"
    row_basis: "Tensor"
    memory: "Mapping[str, Tensor]" = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Released:
    """What one private step gives a method; all of it is post-processing of noised sums.

    Attributes:
        direction: Direction of P = p_G + p_L after update pruning and optimizer, (client, n_ctx, ctx_dim).
        of_global: The same for p_G; other numbers only if the loss has a term of p_G, or reads two prompts.
        closed: True for entries that must not move in this step, or None.
        moves_global: False if a trusted server moves p_G itself.
        moves_personal: False if p_L comes from elsewhere: from the server, or from what the client remembers.
    """

    direction: "Tensor"
    of_global: "Tensor"
    closed: "Tensor | None" = None
    moves_global: bool = True
    moves_personal: bool = True


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Learning rates of p_G and p_L."""

    shared: float
    personal: float


@dataclass(frozen=True, kw_only=True)
class Method:
    """A local method. Subclasses set the facts and override what differs; fields of a subclass are its options.

    Guarantee:
        A method sees prompts that were released and noised sums, and no record. So no method can change an ε. It must
        not read clocks or random numbers: a round that is made again after a crash must be the same. Clients must not
        mix, because each client answers for its own records only; `testing.check_method` tests that.

    Attributes:
        name: Name in the configuration. A subclass of your own keeps its parent's, whose rules of the configuration
            then hold for it too.
        shared: True if p_G is trained and aggregated by the server.
        personal: True if p_L is trained and stays with the client.
        published_procedure: True if the clients run the DP-FPL paper's formulas, whose ε is nominal.
        contrast: True if FedPGP's contrastive term is part of the loss.
        learns: Kind of p_G: ``prompt`` for the learner in ``prompt.learner``, or the name of a baseline that replaces
            it.
    """

    name: ClassVar[str] = "full"
    shared: ClassVar[bool] = True
    personal: ClassVar[bool] = True
    published_procedure: ClassVar[bool] = False
    contrast: ClassVar[bool] = False
    learns: ClassVar[Learns] = "prompt"

    @property
    def reads_patches(self) -> bool:
        """True if the loss reads the patches of an image, beside the features of the whole image."""
        return self.learns == "fedotp"

    @property
    def pairs(self) -> bool:
        """True if the loss reads p_G and p_L as two prompts, one above the other, and not their sum."""
        return self.learns == "fedotp"

    @property
    def trains(self) -> bool:
        """True if the method learns any prompt."""
        return self.shared or self.personal

    def effective(self, shared: "Tensor", personal: "Tensor") -> "Tensor":
        """Return the prompt that the loss reads, from p_G and p_L, (…, n_ctx, ctx_dim)."""
        return shared + personal if self.personal else shared

    def memory_shapes(self, n_ctx: int, ctx_dim: int, rank: int) -> "Mapping[str, tuple[tuple[int, ...], torch.dtype]]":
        """Return name → shape and type of what the method keeps of each client; zeros before the first step."""
        return {}

    def move(self, state: PromptState, released: Released, rates: Rates) -> PromptState:
        """Make the step: p_G ← p_G − η_G · direction, then `move_personal`."""
        if self.shared and released.moves_global:
            moved = state.own_global.sub(released.of_global, alpha=rates.shared)
            state = replace(state, own_global=moved)
        return self.move_personal(state, released, rates) if self.personal and released.moves_personal else state

    def move_personal(self, state: PromptState, released: Released, rates: Rates) -> PromptState:
        """Move p_L: p_L ← p_L − η_L · direction."""
        return replace(state, personal=state.personal - rates.personal * released.direction)
