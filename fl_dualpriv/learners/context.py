"""Class features from a prompt, which stands before each class name as its context."""

import functools
import logging

import torch
from torch import Tensor

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.models.base import Backbone
from fl_dualpriv.towers.base import PromptTower
from fl_dualpriv.towers.plain import PlainTower
from fl_dualpriv.towers.shared_prefix import SharedPrefixTower

_logger = logging.getLogger("fl_dualpriv")
_CHECKED_CLASSES, _NAMED = 12, 10
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""Largest allowed difference of the shared-prefix tower from the plain one, relative to the largest entry.

The key is the precision of the matrix products.
"""


class PromptedText:
    """Text side of the classifier for one set of class names.

    The class token stands at the end: sequence = start, context, class name (and the template's text after it), end.

    Args:
        backbone: The frozen model.
        class_names: Name of each class, in label order.
        template: Text with one ``{}`` for the class name, such as ``"a photo of a {}"``.

    Attributes:
        n_cls: Number of classes.
        after: Text of the template after the class name, which every prompt shares.

    Raises:
        ConfigError: If a name cannot be tokenized with the model's tokenizer.
    """

    def __init__(self, backbone: Backbone, class_names: tuple[str, ...], template: str) -> None:
        self._backbone, rows, self.n_cls = backbone, backbone.rows, len(class_names)
        self._texts = [template.format(name) for name in class_names]
        before, after = template.split("{}")
        self.after = after.strip()
        self._template_context = _embed(backbone, backbone.words(before.strip()))
        suffixes = [[*tokens, rows.end] for tokens in _words_of_all(backbone, class_names, after)]
        self._lengths = torch.tensor([len(tokens) for tokens in suffixes], device=backbone.device)
        # Models that read full rows need padding for any number of context tokens; others ignore tokens after the end.
        width = max(backbone.context_length, self._longest) if backbone.fills_rows else self._longest
        padded = torch.full((len(suffixes), width), rows.pad)
        for row, tokens in zip(padded, suffixes, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        self._suffix, self._start = _embed(backbone, padded), _embed(backbone, list(rows.start))
        self.plain_tower = PlainTower(backbone, self._start, self._suffix, self._lengths)

    @property
    def _longest(self) -> int:
        return int(self._lengths.max())

    @functools.cached_property
    def tower(self) -> PromptTower:
        """Fastest exact text tower: the shared prefix if the model allows it, else one row per class.

        The shared prefix is first compared with the model's own tower, in values and gradients of a few classes. If
        they differ, the plain form is used.
        """
        stack = self._backbone.text_stack
        if stack is None or self._start.shape[0] != 1:
            reason = self._backbone.plain_reason or "its rows have no start token"
            _say_once(logging.INFO, self._backbone.name, f"{reason}, so every class runs its whole row")
            return self.plain_tower
        difference, allowed = self._difference(), _TOLERANCE[stack.blocks[0].qkv.weight.dtype]
        if not difference <= allowed:  # NaN must count as a difference
            message = (
                f"the shared-prefix text tower differs from the plain one by {difference:.1e} (allowed {allowed:.0e}, "
                "relative), so every class runs its whole row"
            )
            _say_once(logging.WARNING, self._backbone.name, message)
            return self.plain_tower
        return SharedPrefixTower(stack, self._start, self._suffix, self._lengths)

    @property
    def shares_prefix(self) -> bool:
        """True if SOS and context run once for all classes."""
        return self.tower is not self.plain_tower

    def _difference(self) -> float:
        """Return the largest difference of the two forms on classes of all lengths, relative to the largest entry."""
        stack, order = self._backbone.text_stack, torch.argsort(self._lengths)
        picks = torch.linspace(0, len(order) - 1, min(len(order), _CHECKED_CLASSES)).round().long()
        chosen = order[picks.to(order.device)]
        lengths = self._lengths[chosen]
        suffix = self._suffix[chosen, : int(lengths.max())]
        room = self._backbone.context_length - 1 - int(lengths.max())
        assert stack is not None
        if room < 1:  # no prompt fits, and `check_length` reports it
            return 0.0
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(suffix)

        words = self._template_context[:room]
        start = words if len(words) else 0.02 * random(min(4, room), self._backbone.ctx_dim)
        prompts = torch.stack([start, start + 0.02 * random(*start.shape)])
        fast = SharedPrefixTower(stack, self._start, suffix, lengths)(prompts)
        slow = PlainTower(self._backbone, self._start, suffix, lengths)(prompts)
        few = torch.stack([torch.randperm(len(chosen), generator=generator)[:3] for _ in range(4)]).to(chosen.device)
        few = few.unflatten(0, (2, 2))
        whole = random(2, 2, len(chosen), self._backbone.embed_dim)
        some = random(*few.shape, self._backbone.embed_dim)
        pairs = [
            (fast.values, slow.values),
            (fast.vjp(whole), slow.vjp(whole)),
            (fast.vjp_some(some, few), slow.vjp_some(some, few)),
        ]
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)

    def template_context(self, n_ctx: int, *, filled: bool = False) -> Tensor:
        """Return embeddings of the template's words before the class name, (n_ctx, ctx_dim): the zero-shot start.

        Args:
            n_ctx: Number of context tokens.
            filled: Fill a shorter template in front, as `context_of` does.

        Raises:
            ConfigError: If the template does not have ``n_ctx`` tokens before the class name, or with ``filled`` has
                none or more.
        """
        words = self._template_context.shape[0]
        if filled and 0 < words <= n_ctx:
            return _filled(self._template_context, n_ctx)
        if words != n_ctx:
            raise ConfigError(
                f"prompt.n-ctx = {n_ctx}, but the template has {words} tokens before the class name; "
                f'set prompt.n-ctx = {words}, or prompt.init = "random"'
            )
        return self._template_context.clone()

    def count(self, words: str) -> int:
        """Count the tokens of some words.

        Raises:
            ConfigError: If they cannot be written in the model's tokens.
        """
        return len(self._backbone.words(words.strip()))

    def context_of(self, words: str, n_ctx: int) -> Tensor:
        """Return embeddings of words before the class name, filled in front to (n_ctx, ctx_dim).

        A shorter context repeats its first token in front, so that the words stay next to the class name.

        Raises:
            ValueError: If the words are no token, or more than ``n_ctx`` tokens.
        """
        tokens = self._backbone.words(words.strip())
        if not 0 < len(tokens) <= n_ctx:
            raise ValueError(f"{words!r} has {len(tokens)} tokens; allowed: 1 to {n_ctx}")
        return _filled(_embed(self._backbone, tokens), n_ctx)

    def check_length(self, n_ctx: int) -> None:
        """Raise ConfigError if start, context, the longest name and the end do not fit into the tower."""
        needed, allowed = self._start.shape[0] + n_ctx + self._longest, self._backbone.context_length
        if needed > allowed:
            raise ConfigError(
                f"prompt.n-ctx = {n_ctx} makes sequences of {needed} tokens with these class names; the text tower "
                f"takes {allowed}; set prompt.n-ctx <= {n_ctx - needed + allowed} or shorten the names"
            )

    def class_features(self, context: Tensor) -> Tensor:
        """Compute unit-norm class features (n_cls, embed_dim) of one prompt (n_ctx, ctx_dim), without a gradient."""
        return self.tower.values(context[None])[0]

    @torch.no_grad()
    def zero_shot_features(self) -> Tensor:
        """Compute unit-norm features of the filled-in template, (n_cls, embed_dim): no learning."""
        before, last = len(self._backbone.rows.start), self._backbone.context_length - 1
        ends = [min(before + len(self._backbone.words(text)), last) for text in self._texts]  # long texts are cut
        end = torch.tensor(ends, device=self._backbone.device)
        embedded = self._backbone.embed_tokens(self._backbone.tokenize(self._texts))
        return torch.nn.functional.normalize(self._backbone.encode_embeddings(embedded, end), dim=-1)


def _words_of_all(backbone: Backbone, class_names: tuple[str, ...], after: str) -> list[list[int]]:
    """Return the token ids of every name with the text behind it.

    Raises:
        ConfigError: If some names cannot be written in the model's tokens; the message lists them.
    """
    tokens, problems = [], []
    for name in class_names:
        try:
            tokens.append(backbone.words((name + after).strip(), behind=True))
        except ConfigError as error:
            problems.append(f"class {name!r}: {error}")
    if problems:
        more = [f"... and {len(problems) - _NAMED} more classes"] if len(problems) > _NAMED else []
        raise ConfigError("\n  ".join([*problems[:_NAMED], *more]))
    return tokens


def _filled(context: Tensor, n_ctx: int) -> Tensor:
    """Repeat the first token in front until there are ``n_ctx`` tokens, (token, ctx_dim) → (n_ctx, ctx_dim)."""
    return torch.cat([context[:1].expand(n_ctx - len(context), -1), context])


@torch.no_grad()
def _embed(backbone: Backbone, tokens: list[int] | Tensor) -> Tensor:
    ids = torch.as_tensor(tokens, dtype=torch.long, device=backbone.device)
    return backbone.embed_tokens(ids)


@functools.lru_cache
def _say_once(level: int, backbone: str, message: str) -> None:
    _logger.log(level, "backbone %s: %s", backbone, message)
