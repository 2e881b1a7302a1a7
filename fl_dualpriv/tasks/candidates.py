"""Candidates of a start: public templates as contexts of one length."""

import functools
import logging
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_dualpriv.config.candidates import CANDIDATES_KEY, read_candidates
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.learners.base import ClientData
from fl_dualpriv.learners.context import PromptedText
from fl_dualpriv.models.open_clip import published_templates

_log = logging.getLogger("fl_dualpriv")
_NAMED = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """Public templates that fit a run.

    Attributes:
        templates: The templates.
        contexts: Their context embeddings, (candidate, n_ctx, ctx_dim).
    """

    templates: tuple[str, ...]
    contexts: Tensor


def fitting_candidates(text: PromptedText, candidates: str, n_ctx: int) -> Candidates:
    """Return the candidates with their contexts, a function of public numbers.

    A candidate may have after the class name only the text that the run's own template has there; a final full stop
    does not count. A context that is shorter than ``n_ctx`` is filled in front, see `PromptedText.context_of`. A
    template of a published set is left out if it does not fit the run's template or the model's vocabulary. The number
    of those is logged.

    Args:
        text: Class features of the model from prompts.
        candidates: The key ``prompt.candidates``, not empty.
        n_ctx: Number of context tokens.

    Raises:
        ConfigError: If a candidate does not fit, or none is left. The message names the candidates.
    """
    given = read_candidates(candidates)
    templates = published_templates(candidates.strip()) if given is None else given
    problems: dict[str, str] = {}
    lengths: dict[str, int] = {}
    contexts: dict[str, Tensor] = {}
    seen: set[str] = set()
    for template in templates:
        before, after = (part.strip() for part in template.split("{}"))
        try:
            if reason := _misfit(text, before, after, seen):
                problems[template] = reason
            elif (tokens := text.count(before)) > n_ctx:
                lengths[template] = tokens
            else:
                contexts[template] = text.context_of(before, n_ctx)
        except ConfigError as error:
            problems[template] = str(error)
        seen.add(before)
    if lengths:
        shown = ", ".join(f"{template!r} ({tokens} tokens)" for template, tokens in list(lengths.items())[:_NAMED])
        more = f" and {len(lengths) - _NAMED} more" if len(lengths) > _NAMED else ""
        raise ConfigError(
            f"prompt.n-ctx = {n_ctx}, but candidates are longer before the class name: {shown}{more}; set prompt.n-ctx "
            f"= {max(lengths.values())}, or leave them out of {CANDIDATES_KEY}"
        )
    if problems and given is not None:
        shown = "; ".join(f"{template!r} {reason}" for template, reason in problems.items())
        raise ConfigError(f"{CANDIDATES_KEY}: {shown}; correct them, or leave them out")
    if not contexts:
        first = next(iter(problems.items()))
        raise ConfigError(
            f"{CANDIDATES_KEY} = {candidates!r}: none of its {len(templates)} templates fits; the first: {first[0]!r} "
            f"{first[1]}; give templates that fit"
        )
    if problems:
        _say_left_out(candidates, len(templates), tuple(sorted(Counter(problems.values()).items())))
    return Candidates(templates=tuple(contexts), contexts=torch.stack(list(contexts.values())))


def ensemble_features(class_features: Tensor) -> Tensor:
    """Average the class features of several prompts: CLIP's ensemble, a rival that costs no ε.

    Args:
        class_features: Unit-norm class features of each candidate, (candidate, n_cls, embed_dim).

    Returns:
        Unit-norm means, (n_cls, embed_dim).

    Reference:
        Radford et al. 2021, arXiv:2103.00020, section 3.1.4.
    """
    return torch.nn.functional.normalize(class_features.sum(dim=0), dim=-1)


@torch.no_grad()
def answered_rightly(class_features: Tensor, data: ClientData) -> Tensor:
    """Return True where a record's largest cosine is that of its label, for each candidate.

    Guarantee:
        Row i is a function of only record i and of ``class_features``, bit by bit: each record has a matrix product for
        itself, always of the same shape, so no kernel can round a row by its place or by the number of records. The
        row of a record with a non-finite feature is False.

    Args:
        class_features: Class features of each candidate, (candidate, n_cls, embed_dim).
        data: Records of one client.

    Returns:
        (record, candidate) bool, on the CPU.
    """
    candidates, n_cls, _ = class_features.shape
    flat = class_features.flatten(0, 1)
    rows = torch.zeros(data.num_examples, candidates, dtype=torch.bool)
    for row, features, label in zip(rows, data.features, data.labels, strict=True):
        if is_readable(features):
            row[:] = ((flat @ features).unflatten(0, (candidates, n_cls)).argmax(dim=1) == label).cpu()
    return rows


def is_readable(features: Tensor) -> bool:
    """Return True if a record's features are numbers; an unreadable record has a row of NaN."""
    return bool(torch.isfinite(features).all())


def _misfit(text: PromptedText, before: str, after: str, seen: set[str]) -> str:
    """Return the reason why a template cannot be a candidate of this text, or an empty string."""
    if after.removesuffix(".").strip() != text.after.removesuffix(".").strip():
        return f"has {after!r} after the class name, and the run's template has {text.after!r}"
    if not before:
        return "has no word before the class name"
    return "is there twice, but for a full stop" if before in seen else ""


@functools.lru_cache
def _say_left_out(candidates: str, total: int, reasons: tuple[tuple[str, int], ...]) -> None:
    left_out = sum(count for _, count in reasons)
    _log.warning(
        "%s: %d of %d templates are candidates; %d are left out (the first reason: %s)",
        *(candidates, total - left_out, total, left_out, reasons[0][0]),
    )
