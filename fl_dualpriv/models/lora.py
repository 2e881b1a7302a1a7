"""LoRA factors for the language model of a frozen LLaVA, and per-example gradients. Only this file imports peft.

The rows of one factor are computed by Opacus' rule for a linear layer.

An adapted layer computes y = W x + (α/r) B A x (Hu et al. 2021, arXiv:2106.09685) with α = r, so the scale is 1. All
factors of a model form one matrix (rank, cols). Its row j holds A_m[j, :] and B_m[:, j] of each layer m in turn. The
learned matrix thus has the form of a prompt, and clipping, noise and aggregation treat it like one.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn
from torch.func import functional_call

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.models.answering import AnsweringModel
from fl_dualpriv.models.llava import LlavaBackbone
from fl_dualpriv.privacy.noise import KeyedRandom, StreamKey

try:
    import peft
except ModuleNotFoundError as error:
    raise ConfigError('prompt.learner = "lora" needs the package peft; install fl-dualpriv[lora]') from error

TARGETS = ("q_proj", "v_proj")
_ADAPTER = "default"


class LoraModel:
    """The language model of a LLaVA with LoRA layers of peft; the LLaVA itself does not change.

    The modules are copies that share the frozen weights. Every pass gets the factors as an argument, so no pass writes
    to a module.

    Args:
        backbone: The frozen model.
        rank: Rank r of the factors.
        targets: Names of the adapted linear layers in each block.

    Attributes:
        segments: Widths of A_1, B_1, A_2, B_2, … in the matrix.
        shape: Shape of the matrix, (rank, sum of the widths).
    """

    def __init__(self, backbone: LlavaBackbone, rank: int, targets: Sequence[str] = TARGETS) -> None:
        self.backbone = backbone
        frozen = backbone.language_model
        shared = {id(tensor): tensor for tensor in (*frozen.parameters(), *frozen.buffers())}
        self._language: nn.Module = copy.deepcopy(frozen, shared)
        config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(targets))
        with torch.random.fork_rng(devices=[]):  # peft draws initial factors, which are not used
            peft.inject_adapter_in_model(config, self._language, adapter_name=_ADAPTER)
        self._language.eval().requires_grad_(False)
        self._linears: dict[str, nn.Linear] = {
            name: module
            for name, module in self._language.named_modules()
            if isinstance(module, nn.Linear) and name.endswith((f"lora_A.{_ADAPTER}", f"lora_B.{_ADAPTER}"))
        }
        for linear in self._linears.values():
            linear.requires_grad_(True)  # Opacus computes no row of a frozen weight; every pass replaces the weight
        self.segments = tuple(
            linear.in_features if _is_a(name) else linear.out_features for name, linear in self._linears.items()
        )
        self.shape = rank, sum(self.segments)

    def initial(self, seed: int) -> Tensor:
        """Return the initial factors of peft and of the paper's code: A ~ U(±1/√in) drawn with the seed, and B = 0.

        With B = 0 the adapted model equals the un-tuned model.
        """
        source = KeyedRandom(StreamKey(seed=seed, purpose="initial-prompt"))
        start = torch.zeros(self.shape)
        for name, part in zip(self._linears, start.split(self.segments, dim=1), strict=True):
            if _is_a(name):
                uniform = torch.from_numpy(source.uniforms(part.numel())).reshape(part.shape)
                part.copy_((2 * uniform - 1) / part.shape[1] ** 0.5)
        return start

    def weights(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the factors by their names in the adapted language model; they are views of the matrix."""
        parts = zip(self._linears, matrix.split(self.segments, dim=1), strict=True)
        return {f"{name}.weight": part if _is_a(name) else part.mT for name, part in parts}

    def logits(self, matrix: Tensor, visual: Tensor, embeddings: Tensor, first: int) -> Tensor:
        """Compute the scores of the next token after each position; differentiable in the matrix.

        Guarantee:
            As `AnsweringModel.logits`: a row depends only on the matrix and on its own image and embeddings.

        Args:
            matrix: Factors, (rank, cols).
            visual: Visual tokens of n images, (n, embed_dim).
            embeddings: Embeddings that follow the visual tokens, (n, token, ctx_dim), without positions.
            first: Position in ``embeddings`` of the first score that is returned.

        Returns:
            float32 (n, token - first, vocabulary).
        """
        weights = self.weights(matrix)

        def run(**arguments: Any) -> Any:
            return functional_call(self._language, weights, (), arguments)

        return self.backbone.whole_logits(run, visual, embeddings, first)

    def rows(self, matrix: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """Compute the gradient of each example's loss, with one forward pass and one backward pass of their sum.

        A factor acts on an example only at that example's tokens. The example's gradient is therefore
        Σ_t (∂loss/∂output_t) input_tᵀ of the factor's layer, over the example's own tokens, which is the rule that
        Opacus registers for a linear layer. The forward pass keeps these inputs and outputs.

        Guarantee:
            Row i is the gradient of only the loss of example i, exact up to float rounding: with `logits`, the sum of
            the losses depends on the outputs of row i only through the loss of example i.

        Args:
            matrix: Factors, (rank, cols).
            loss: Function of the matrix that returns each example's loss, (n,). It must call `logits` once, with all
                examples in order.

        Returns:
            (n, rank, cols), float32.
        """
        passes: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(name: str, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            passes[name] = inputs[0].detach(), output

        hooks = [m.register_forward_hook(functools.partial(keep, name)) for name, m in self._linears.items()]
        try:
            with torch.enable_grad():
                total = loss(matrix.detach().requires_grad_(True)).sum()
        finally:
            for hook in hooks:
                hook.remove()
        inputs, outputs = zip(*(passes[name] for name in self._linears), strict=True)
        backward = torch.autograd.grad(total, outputs)
        parts = []
        for (name, linear), x, back in zip(self._linears.items(), inputs, backward, strict=True):
            rows = _factor_rows(linear, x, back)
            parts.append(rows if _is_a(name) else rows.mT)
        return torch.cat(parts, dim=2)


def _factor_rows(linear: nn.Linear, inputs: Tensor, backward: Tensor) -> Tensor:
    """Compute each example's gradient of one factor, (n, out, in), from (n, token, in) and (n, token, out)."""
    return GradSampleModule.GRAD_SAMPLERS[nn.Linear](linear, [inputs], backward)[linear.weight]


def _is_a(name: str) -> bool:
    return name.endswith(f"lora_A.{_ADAPTER}")


@functools.lru_cache(maxsize=2)
def load_lora(model: AnsweringModel, rank: int) -> LoraModel:
    """Return the `LoraModel` of the default layers; it is built once per process."""
    assert isinstance(model, LlavaBackbone)  # the only kind of answering model
    return LoraModel(model, rank)
