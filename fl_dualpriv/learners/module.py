"""Rows of any ``torch.nn.Module``, by Opacus' `GradSampleModule`: adapters, heads, visual prompts.

The trainable parameters of the module are one vector. A record's row is the gradient of its own loss with respect to
that vector. Clip, sum, noise and account are `private_step`, as for every other learner. Only this file imports Opacus
for rows.
"""

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.grad_sample_module import trainable_modules
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.learners.base import ClientData, InPromptSpace, Picked, Pooled
from fl_dualpriv.learners.row_check import rows_hold
from fl_dualpriv.privacy.step import RowBlock

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) → loss of each record, (record,)."""

_BLOCK = 32


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each record, (record,), from logits (record, class) and class ids (record,)."""
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


class ModuleLearner:
    """A module whose trainable parameters take private steps.

    Guarantee:
        The rows are Opacus' per-sample gradients. Opacus refuses layers that mix records, such as batch normalisation,
        and this class refuses dropout and running statistics. A frozen layer uses the statistics that it holds.
        A ``forward`` of your own may still mix records, for example by a mean over the batch: then a row depends on
        other records, and no ε holds. `testing.check_learner` searches for that. The author of a module owes the proof.
        Some matrix kernels round a row by its place among others. So the first rows of a shape try made-up records of
        that shape, as `row_check` does, and where their bits move, or no record can be made up, records run one by one.

    Args:
        module: The module. Parameters that need no gradient do not move. Its first dimension is the record.
        loss: Loss of each record.
        block: Most records that run together. It must be public. The last block is padded with copies of a record,
            whose rows are not added.

    Raises:
        ConfigError: If the module has no trainable parameter, or layers that cannot have rows. The message lists all.

    Example:
        >>> learner = ModuleLearner(nn.Linear(2, 3))
        >>> rows = learner.rows(torch.ones(4, 2), torch.tensor([0, 1, 2, 0]))
        >>> sum(len(block.rows[0, : block.count]) for block in rows.blocks()), learner.size
        (4, 9)
    """

    def __init__(self, module: nn.Module, loss: Loss = cross_entropy, *, block: int = _BLOCK) -> None:
        if hasattr(module, "autograd_grad_sample_hooks"):
            raise ConfigError("the module has a learner already; use that one, or a copy of the module made before")
        problems = [str(error) for error in ModuleValidator.validate(module.train(), strict=False)]
        for layer in module.modules():
            if getattr(layer, "track_running_stats", False) and not any(p.requires_grad for p in layer.parameters()):
                layer.eval()  # a frozen layer with its stored statistics is a function of each record
        problems += [
            f"{name}: {type(layer).__name__} draws or remembers across records; remove it"
            for name, layer in module.named_modules()
            if (isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0)
            or (getattr(layer, "track_running_stats", False) and layer.training)
        ]
        problems += [
            f"{name or 'the module'}: {type(layer).__name__} has buffers beside its own parameters; move the buffers "
            "to another module, or make them in forward"
            for name, layer in trainable_modules(module)
            if any(True for _ in layer.buffers()) and not getattr(layer, "track_running_stats", False)
        ]
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if not self.parameters:
            problems.append("the module has no parameter that needs a gradient; set requires_grad on one")
        if problems:
            raise ConfigError("\n  ".join(["the module cannot take private steps:", *problems]))
        self.module, self.loss, self.block = module, loss, block
        self._sampled = GradSampleModule(module, loss_reduction="sum")
        self._sizes: dict[object, int] = {}

    @property
    def size(self) -> int:
        """Number of trainable parameters, the width of a row."""
        return sum(parameter.numel() for parameter in self.parameters)

    def vector(self) -> Tensor:
        """Return the trainable parameters as one vector, (size,)."""
        return torch.cat([parameter.detach().flatten() for parameter in self.parameters])

    @torch.no_grad()
    def move(self, step: Tensor) -> None:
        """Add a vector (size,) to the trainable parameters, for example −rate × a released mean gradient."""
        for parameter, part in zip(self.parameters, self._split(step), strict=True):
            parameter.add_(part.view_as(parameter))

    def _split(self, vector: Tensor) -> Sequence[Tensor]:
        return vector.to(self.parameters[0]).split([parameter.numel() for parameter in self.parameters])

    @torch.no_grad()
    def place(self, vector: Tensor) -> None:
        """Set the trainable parameters to a vector, (size,)."""
        for parameter, part in zip(self.parameters, self._split(vector), strict=True):
            parameter.copy_(part.view_as(parameter))

    def rows(self, inputs: Tensor, targets: Tensor) -> "ModuleRows":
        """Return the rows of one client's batch, inputs (record, …) and targets (record, …); both may be empty."""
        return ModuleRows(self, [(inputs, targets)])

    def size_of_blocks(self, inputs: Tensor, targets: Tensor) -> int:
        """Return how many records of this shape run together: `block`, or 1 if their rows would move each other's bits.

        What is tried is a function of shapes, the machine and the present parameters, which were released.
        """
        key = (inputs.shape[1:], inputs.dtype, targets.shape[1:], targets.dtype)
        if key not in self._sizes:
            self._sizes[key] = self.block if self.block == 1 or self._holds(inputs, targets) else 1
        return self._sizes[key]

    def _holds(self, inputs: Tensor, targets: Tensor) -> bool:
        if not inputs.is_floating_point():
            return False  # which numbers are allowed, for example token ids, is not known
        count, generator = self.block + self.block // 2, torch.Generator().manual_seed(0)
        x = torch.randn(count, *inputs.shape[1:], generator=generator, dtype=torch.float64).to(inputs)
        y = torch.zeros(count, *targets.shape[1:]).to(targets)
        return rows_hold(lambda kept: torch.cat([r[:n] for r, n in self.blocks(x, y, kept, self.block)]), count)

    def blocks(
        self, inputs: Tensor, targets: Tensor, picked: np.ndarray, size: int, loss: Loss | None = None
    ) -> Iterator[tuple[Tensor, int]]:
        """Yield the rows of the picked records in blocks of one size, and how many of each are not padding."""
        for start in range(0, len(picked), size):
            here = picked[start : start + size]
            index = torch.from_numpy(np.pad(here, (0, size - len(here)), mode="edge")).to(inputs.device)
            yield self.block_rows(inputs[index], targets[index], loss), len(here)

    def block_rows(self, inputs: Tensor, targets: Tensor, loss: Loss | None = None) -> Tensor:
        """Compute the rows of one block, (record, size), at the present parameters."""
        for parameter in self.parameters:
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
        before = [(id(buffer), buffer._version) for buffer in self.module.buffers()]
        with torch.enable_grad():
            losses = (loss or self.loss)(self._sampled(inputs), targets)
            if losses.shape != (len(inputs),):
                raise ConfigError(
                    f"the loss has shape {tuple(losses.shape)} for {len(inputs)} records; it must return one number a "
                    'record, (record,): set reduction="none"'
                )
            with warnings.catch_warnings():  # inputs need no gradient, and PyTorch warns about hooks that see that
                warnings.filterwarnings("ignore", "Full backward hook is firing")
                losses.sum().backward()
        if before != [(id(buffer), buffer._version) for buffer in self.module.buffers()]:
            raise ConfigError("the module changes a buffer in its forward pass: later rows would know earlier records")
        parts = [
            torch.zeros(len(inputs), parameter.numel(), device=losses.device)
            if parameter.grad_sample is None  # type: ignore[attr-defined]
            else parameter.grad_sample.flatten(1)  # type: ignore[attr-defined]
            for parameter in self.parameters
        ]
        for parameter in self.parameters:
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
        return torch.cat(parts, dim=1).detach()


@dataclass(frozen=True)
class ModuleRows:
    """`Rows` of a `ModuleLearner`: one batch per client, each a pair (inputs, targets), all at the present module."""

    learner: ModuleLearner
    batches: Sequence[tuple[Tensor, Tensor]]

    def blocks(self) -> Iterator[RowBlock]:
        """See `Rows`; blocks of one size, the last one padded."""
        for client, (inputs, targets) in enumerate(self.batches):
            size = self.learner.size_of_blocks(inputs, targets)
            for rows, count in self.learner.blocks(inputs, targets, np.arange(len(inputs)), size):
                yield RowBlock(clients=torch.tensor([client], device=rows.device), rows=rows[None], count=count)

    def zeros(self) -> Tensor:
        """See `Rows`."""
        device = self.learner.parameters[0].device
        return torch.zeros(len(self.batches), self.learner.size, dtype=torch.float64, device=device)


class ModuleObjective:
    """`Objective` of a classifier of image features that is a module: (record, embed_dim) → logits (record, class).

    The prompt of a client is the vector of its module's trainable parameters, (1, size). A public class prior is added
    to the logits of the loss, as for every learner of classes.

    Args:
        module: The module, on the device of the features.
        block: Number of records that run together, padded.
    """

    def __init__(self, module: nn.Module, block: int = _BLOCK) -> None:
        self.learner, self._block = ModuleLearner(module, block=block), block

    @property
    def bytes_per_prompt(self) -> int:
        """Approximate memory of one more client: its vector, sum and a working copy."""
        return 4 * 8 * self.learner.size

    def apart(self) -> "ModuleObjective":
        """Return the same objective with one record in each block; see `Objective`."""
        again = copy.copy(self)
        again._block = 1
        return again

    def bind(self, data: Sequence[ClientData]) -> Pooled["ModuleGradients"]:
        """See `Objective`."""
        return Pooled(functools.partial(ModuleGradients, self, data))

    def blocks(self, vector: Tensor, data: ClientData, picked: np.ndarray) -> Iterator[tuple[Tensor, int]]:
        """Yield the rows of some records at a vector, (record, size), and how many of them are not padding."""
        self.learner.place(vector)

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            return cross_entropy(logits if data.log_prior is None else logits + data.log_prior, targets)

        yield from self.learner.blocks(data.features, data.labels, picked, self._block, loss)

    @torch.no_grad()
    def logits(self, prompts: Tensor, images: ClientData) -> Iterator[Tensor]:
        """Yield the logits (image, class) of each of (prompt, 1, size) on all images."""
        for prompt in prompts:
            self.learner.place(prompt.flatten())
            yield self.learner.module(images.features)


class ModuleGradients(InPromptSpace):
    """`StepGradients` of a `ModuleObjective`; clients take their turns in one module."""

    def __init__(self, objective: ModuleObjective, data: Sequence[ClientData], prompts: Tensor, picked: Picked) -> None:
        self._objective, self._data, self._prompts, self._picked = objective, data, prompts, picked

    def blocks(self) -> Iterator[RowBlock]:
        """See `Rows`; the guarantee is that of `ModuleLearner`."""
        for client, (prompt, data, picked) in enumerate(zip(self._prompts, self._data, self._picked, strict=True)):
            for rows, count in self._objective.blocks(prompt.flatten(), data, picked):
                yield RowBlock(
                    clients=torch.tensor([client], device=rows.device), rows=rows[None, :, None], count=count
                )

    def zeros(self) -> Tensor:
        """See `Rows`."""
        return torch.zeros_like(self._prompts, dtype=torch.float64)

    def sums(self) -> Tensor:
        """See `StepGradients`; a record whose row is not finite is left out."""
        totals = torch.zeros_like(self._prompts)
        for block in self.blocks():
            rows = block.rows[0, : block.count]
            usable = torch.isfinite(rows).flatten(1).all(dim=1)[:, None, None]
            totals[block.clients] += torch.where(usable, rows, 0.0).sum(dim=0)
        return totals
