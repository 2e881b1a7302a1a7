"""Class features from a prompt: the template's words as context, class names after it."""

import torch
from torch import Tensor

from fl_dualpriv.backbones.open_clip import OpenClipBackbone
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.prompts.text_tower import PlainTower, SharedPrefixTower


class PromptedText:
    """Text side of the classifier for one set of class names.

    The class token stands at the end: sequence = SOS, context, class name (and what the template says after it), EOT.

    Args:
        backbone: The frozen model.
        class_names: One per class, in label order.
        template: Text with one ``{}`` for the class name, such as ``"a photo of a {}"``.
    """

    def __init__(self, backbone: OpenClipBackbone, class_names: tuple[str, ...], template: str) -> None:
        self._backbone = backbone
        self._texts = [template.format(name) for name in class_names]
        before, after = template.split("{}")
        self._template_context = _embed(backbone, _words(backbone, before.strip()))
        suffixes = [_words(backbone, (name + after).strip(), with_end=True) for name in class_names]
        lengths = torch.tensor([len(tokens) for tokens in suffixes], device=backbone.device)
        padded = torch.zeros(len(suffixes), int(lengths.max()), dtype=torch.long)
        for row, tokens in enumerate(suffixes):
            padded[row, : len(tokens)] = torch.tensor(tokens)
        self._suffix, self._lengths = _embed(backbone, padded), lengths
        self._sos = _embed(backbone, torch.tensor([_all_tokens(backbone, "")[0]]))
        parts = backbone.text_parts
        self.shares_prefix = parts.causal and parts.eot_pooling and parts.default_blocks
        self.plain_tower = PlainTower(backbone, self._sos, self._suffix, lengths)
        self._tower = (
            SharedPrefixTower(parts, self._sos, self._suffix, lengths) if self.shares_prefix else self.plain_tower
        )

    def template_context(self, n_ctx: int) -> Tensor:
        """Embeddings of the template's words before the class name, (n_ctx, ctx_dim): prompt learning from zero-shot.

        Raises:
            ConfigError: If the template has another number of tokens.
        """
        words = self._template_context.shape[0]
        if words != n_ctx:
            raise ConfigError(
                f"prompt.n-ctx = {n_ctx}, but the template has {words} tokens before the class name; "
                f'set prompt.n-ctx = {words}, or prompt.init = "random"'
            )
        return self._template_context.clone()

    def check_length(self, n_ctx: int) -> None:
        """Raise ConfigError if SOS, context, the longest name and EOT do not fit into the tower."""
        needed, allowed = 1 + n_ctx + int(self._lengths.max()), self._backbone.context_length
        if needed > allowed:
            raise ConfigError(
                f"prompt.n-ctx = {n_ctx} makes sequences of {needed} tokens with these class names; the text tower "
                f"takes {allowed}; set prompt.n-ctx <= {n_ctx - needed + allowed} or shorten the names"
            )

    def class_features(self, context: Tensor) -> Tensor:
        """(n_ctx, ctx_dim) → unit-norm class features (n_cls, embed_dim), differentiable in ``context``."""
        return torch.nn.functional.normalize(self._tower(context), dim=-1)

    @torch.no_grad()
    def zero_shot_features(self) -> Tensor:
        """Unit-norm features of the filled-in template, (n_cls, embed_dim): no learning."""
        tokens = self._backbone.tokenize(self._texts)
        embedded = self._backbone.embed_tokens(tokens)
        # EOT has the largest id in open_clip's vocabulary.
        return torch.nn.functional.normalize(self._backbone.encode_embeddings(embedded, tokens.argmax(dim=-1)), dim=-1)


def _all_tokens(backbone: OpenClipBackbone, text: str) -> list[int]:
    """SOS … EOT, without padding."""
    row = backbone.tokenize([text])[0]
    return row[: int(row.argmax()) + 1].tolist()


def _words(backbone: OpenClipBackbone, text: str, *, with_end: bool = False) -> list[int]:
    tokens = _all_tokens(backbone, text)
    return tokens[1:] if with_end else tokens[1:-1]


@torch.no_grad()
def _embed(backbone: OpenClipBackbone, tokens: list[int] | Tensor) -> Tensor:
    ids = torch.as_tensor(tokens, dtype=torch.long, device=backbone.device)
    return backbone.embed_tokens(ids)
