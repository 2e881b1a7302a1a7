"""Rules of the class prior: the losses that have one, and the shares that may enter it; see ``rules.py``."""

from typing import Literal

from fl_dualpriv.config.rules import QUESTIONS, CrossRule

_PRIOR, _SHARES = "train.class-prior", "data.class-shares"
_RECORD, _CLIENT = "privacy.record.mechanism", "privacy.client.mechanism"
_WITHOUT_SOFTMAX = ("prototypes",)
_WITHOUT_ASKING = ("none", "auto")


def default_prior(method: str, data_ref: str, division: str) -> Literal["none", "list"]:
    """Return the kind of prior that ``train.class-prior = "auto"`` stands for.

    It is ``list`` where the division itself gives clients different class lists, so that no record decides on a list.
    Under other divisions a list is read from a client's records: who wants that prior must say so.

    Example:
        >>> default_prior("dpfpl", "demo", "by-class"), default_prior("dpfpl", "demo", "dirichlet")
        ('list', 'none')
    """
    lists_differ = division == "by-class" and data_ref not in QUESTIONS
    return "list" if lists_differ and method not in ("zero-shot", "dpfpl-paper", *_WITHOUT_SOFTMAX) else "none"


CLASS_PRIOR_RULES: tuple[CrossRule, ...] = (
    CrossRule(
        (_PRIOR, "data.ref"),
        lambda v: v[_PRIOR] in _WITHOUT_ASKING or v["data.ref"] not in QUESTIONS,
        'must be "none" for questions: an answer is not one of a client\'s classes',
        'set it to "none"',
    ),
    CrossRule(
        (_PRIOR, "method"),
        lambda v: v[_PRIOR] in _WITHOUT_ASKING or v["method"] not in _WITHOUT_SOFTMAX,
        'must be "none" for this method: a sum of class features has no softmax, so there is no logit to adjust',
        'set it to "none", or choose another method',
    ),
    CrossRule(
        (_PRIOR, "method"),
        lambda v: v[_PRIOR] in _WITHOUT_ASKING or v["method"] != "dpfpl-paper",
        'must be "none", as in the DP-FPL paper',
        'set it to "none", or set method = "dpfpl"',
    ),
    CrossRule(
        (_PRIOR, _RECORD, _CLIENT),
        lambda v: v[_PRIOR] != "exact" or (v[_RECORD], v[_CLIENT]) == ("none", "none"),
        'must not be "exact" under differential privacy: exact counts reveal the class of a record to anyone who knows '
        "the others, and no ε covers that",
        'set it to "list", or to "declared" with data.class-shares',
    ),
    CrossRule(
        (_SHARES, _PRIOR),
        lambda v: v[_PRIOR] != "declared" or v[_SHARES].strip() != "",
        'must name the TOML file of the owners\' class shares when train.class-prior = "declared"',
        'set it, or set train.class-prior = "list"',
    ),
    CrossRule(
        (_SHARES, _PRIOR),
        lambda v: v[_PRIOR] == "declared" or v[_SHARES] == "",
        'must be empty unless train.class-prior = "declared"',
        'set train.class-prior = "declared", or remove it',
    ),
)
