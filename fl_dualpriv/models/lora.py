"""LoRA factors beside the language model of a frozen LLaVA, and each example's own gradient. Import site of peft.

Of every adapted layer y = W x + (α/r) B A x (Hu et al. 2021, arXiv:2106.09685), with α = r: scale 1. All factors of a
model are one matrix (rank, cols) whose row j holds A_m[j, :] and B_m[:, j] of each layer m in turn: what is learnt has
the form of a prompt, and clip, noise and aggregation need not know what it is.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
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
    """The language model of a LLaVA with LoRA layers of peft; the LLaVA itself stays as it is.

    The modules are copies that share the frozen weights, and factors are handed to each pass: nothing is written to.

    Args:
        backbone: The frozen model.
        rank: r.
        targets: Names of the linear layers that are adapted, in each block.

    Attributes:
        segments: Widths of A_1, B_1, A_2, B_2, … in the matrix.
        shape: Of the matrix, (rank, sum of the widths).
    """

    def __init__(self, backbone: LlavaBackbone, rank: int, targets: Sequence[str] = TARGETS) -> None:
        self.backbone = backbone
        frozen = backbone.language_model
        shared = {id(tensor): tensor for tensor in (*frozen.parameters(), *frozen.buffers())}
        self._language: nn.Module = copy.deepcopy(frozen, shared)
        config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(targets))
        with torch.random.fork_rng(devices=[]):  # its own start of the factors is not used
            peft.inject_adapter_in_model(config, self._language, adapter_name=_ADAPTER)
        self._language.eval().requires_grad_(False)
        self._linears: dict[str, nn.Linear] = {
            name: module
            for name, module in self._language.named_modules()
            if isinstance(module, nn.Linear) and name.endswith((f"lora_A.{_ADAPTER}", f"lora_B.{_ADAPTER}"))
        }
        self.segments = tuple(
            linear.in_features if _is_a(name) else linear.out_features for name, linear in self._linears.items()
        )
        self.shape = rank, sum(self.segments)

    def initial(self, seed: int) -> Tensor:
        """The start of peft and of the paper's code, keyed by the seed: A ~ U(±1/√in), B = 0, the un-tuned model."""
        source = KeyedRandom(StreamKey(seed=seed, purpose="initial-prompt"))
        start = torch.zeros(self.shape)
        for name, part in zip(self._linears, start.split(self.segments, dim=1), strict=True):
            if _is_a(name):
                uniform = torch.from_numpy(source.uniforms(part.numel())).reshape(part.shape)
                part.copy_((2 * uniform - 1) / part.shape[1] ** 0.5)
        return start

    def weights(self, matrix: Tensor) -> dict[str, Tensor]:
        """Factors under the names that they have in the adapted language model; views of the matrix."""
        parts = zip(self._linears, matrix.split(self.segments, dim=1), strict=True)
        return {f"{name}.weight": part if _is_a(name) else part.mT for name, part in parts}

    def logits(self, matrix: Tensor, visual: Tensor, embeddings: Tensor, first: int) -> Tensor:
        """Scores of the token behind each position; differentiable in the matrix.

        Guarantee:
            As `AnsweringModel.logits`: a row depends on the matrix and on its own image and embeddings alone.

        Args:
            matrix: (rank, cols).
            visual: Visual tokens of n images, (n, embed_dim).
            embeddings: What stands behind them, (n, token, ctx_dim), without positions.
            first: Position in ``embeddings`` of the first score wanted.

        Returns:
            float32 (n, token - first, vocabulary).
        """
        weights = self.weights(matrix)

        def run(**arguments: Any) -> Any:
            return functional_call(self._language, weights, (), arguments)

        return self.backbone.whole_logits(run, visual, embeddings, first)

    def rows(self, matrix: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """Gradient of each example's own loss, from one pass and one backward pass of their sum.

        A factor meets an example at its tokens alone, so the example's gradient is Σ_t (∂loss/∂output_t) input_tᵀ of
        the factor's layer, over its own tokens. Inputs and outputs are kept on the way.

        Guarantee:
            Row i is the gradient of the loss of example i alone, exactly but for float rounding: with `logits`, the sum
            of the losses depends on the outputs of row i through the loss of example i only.

        Args:
            matrix: (rank, cols).
            loss: (matrix) → each example's loss, (n,), made of one call of `logits` with all examples in order.

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
        parts = [
            torch.bmm(back.mT, x) if _is_a(name) else torch.bmm(x.mT, back)  # over the tokens of each example
            for name, x, back in zip(self._linears, inputs, backward, strict=True)
        ]
        return torch.cat(parts, dim=2)


def _is_a(name: str) -> bool:
    return name.endswith(f"lora_A.{_ADAPTER}")


@functools.lru_cache(maxsize=2)
def load_lora(model: AnsweringModel, rank: int) -> LoraModel:
    """`LoraModel` of the usual layers; once a process."""
    assert isinstance(model, LlavaBackbone)  # there is no other kind
    return LoraModel(model, rank)
