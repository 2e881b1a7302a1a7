"""Text towers of open_clip that are not its own CLIP tower: encoders of transformers, and CoCa's with its CLS token.

This module recognises open_clip's classes by their names, so that it need not import open_clip. Both towers mask the
padding behind the end of text.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.models.text.text_stack import TextStack

_POOLERS = ("MeanPooler", "ClsPooler", "ClsLastHiddenStatePooler")


def _is_word(embeddings: Tensor, end: Tensor) -> Tensor:
    """Return True up to the end of text, (n, token)."""
    return torch.arange(embeddings.shape[1], device=embeddings.device) <= end.to(embeddings.device)[:, None]


class _MaskedText:
    """Attributes that both towers share; see `OpenClipText`."""

    pool_type, eos_id = "none", -1
    stack: TextStack | None = None
    token_embedding: nn.Embedding
    _tower: Any

    @property
    def ctx_dim(self) -> int:
        """Width of a token embedding."""
        return self.token_embedding.embedding_dim

    @property
    def embed_dim(self) -> int:
        """Width of a feature."""
        return self._tower.output_dim


class HuggingFaceText(_MaskedText):
    """An encoder of transformers inside an open_clip model (``HFTextEncoder``), such as BiomedCLIP's BERT.

    Attributes as in `OpenClipText`.

    Args:
        tower: The text module of the model.
        context_length: Length of the tokenizer's rows.

    Raises:
        ConfigError: If it pools its tokens in a way that is not supported.
    """

    causal, reads_end, fills_rows = False, False, False
    plain_reason = "its text tower is not causal"

    def __init__(self, tower: Any, context_length: int) -> None:
        self._tower = tower
        self.token_embedding = tower.transformer.get_input_embeddings()
        self.context_length = context_length
        if type(tower.pooler).__name__ not in _POOLERS:
            raise ConfigError(
                f"its text tower pools by {type(tower.pooler).__name__}; supported are {', '.join(_POOLERS)}"
            )

    def encode(self, embeddings: Tensor, end: Tensor) -> Tensor:
        """Compute text features: (n, token, ctx_dim) → (n, embed_dim); see `Backbone.encode_embeddings`."""
        mask = _is_word(embeddings, end).long()
        out = self._tower.transformer(inputs_embeds=embeddings, attention_mask=mask)
        return self._tower.proj(self._tower.pooler(out, mask))


class CocaText(_MaskedText):
    """The text tower of a CoCa: causal, with a CLS token behind the row, which is read.

    Attributes as in `OpenClipText`. ``pad`` is the token that the tower takes for padding wherever it stands.

    Args:
        tower: The text module of the model.
    """

    causal, reads_end, fills_rows = True, False, True
    plain_reason = "its text feature is read at a CLS token behind the row"

    def __init__(self, tower: Any) -> None:
        self._tower = tower
        self.token_embedding = tower.token_embedding
        self.context_length: int = tower.context_length
        self.pad: int = tower.pad_id

    def encode(self, embeddings: Tensor, end: Tensor) -> Tensor:
        """Compute text features: (n, context_length, ctx_dim) → (n, embed_dim); see `Backbone.encode_embeddings`."""
        tower, count = self._tower, len(embeddings)
        x = torch.cat([embeddings, tower.cls_emb.expand(count, 1, -1)], dim=1) + tower.positional_embedding
        words, cls = _is_word(embeddings, end), torch.ones(count, 1, dtype=torch.bool, device=embeddings.device)
        # Published weights were trained with the mask shifted by one place; open_clip keeps that.
        keys = torch.cat([words, cls] if tower.correct_cls_mask else [cls, words], dim=1)
        hidden = torch.zeros_like(keys, dtype=x.dtype).masked_fill_(~keys, float("-inf"))
        mask = tower.attn_mask[None] + hidden[:, None].expand(-1, x.shape[1], -1)
        x = tower.transformer(x, attn_mask=mask.repeat_interleave(tower.heads, 0))
        pooled = tower.ln_final(x[:, -1])
        projection = tower.text_projection
        if projection is None:
            return pooled
        return projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection
