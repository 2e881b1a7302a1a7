"""Rules for strategies under server-side privacy; a class that breaks them is refused before any client is asked.

The mechanism (cohort, clip, noise, divisor, accounting) is fixed: a class that overrides a part of it, or whose
`combine` has no proof, would make the run's ε false.
"""

from typing import ClassVar, Protocol

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.clipping import Arithmetic
from fl_dualpriv.privacy.limits import LARGEST_CLIP_NORM, SMALLEST_CLIP_NORM, is_clip_norm
from fl_dualpriv.privacy.plan import ServerUnit

HOOKS = ("weight", "combine", "sensitivity", "server_update", "check_options", "summary")
"""Names that a strategy may override under server-side privacy; all others of the base are part of the mechanism."""
_CLAIMS = ("proved_for", "unproved_because")
_DATACLASS_NAMES = {
    *("__module__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__abstractmethods__", "_abc_impl"),
    *("__dataclass_fields__", "__dataclass_params__", "__match_args__", "__init__", "__repr__", "__eq__", "__hash__"),
}
_OFF = 'privacy.client.mechanism = "none" and privacy.record.trusts-server = false'


class Claims(Protocol):
    """Class attributes in which a strategy's author states what is proved."""

    proved_for: ClassVar[tuple[ServerUnit, ...]]
    unproved_because: ClassVar[str]


def check_class(cls: type[Claims], base: type[Claims], unit: ServerUnit, arithmetic: Arithmetic) -> None:
    """Refuse a class whose rounds the server's noise would not cover.

    Guarantee:
        If this returns, everything but `HOOKS` is the base's own; the author states that the class is proved for
        ``unit`` (a `combine` other than the base's counts as proved only for clients, unless its class or a subclass
        states ``proved_for``); no class below the one that gives `sensitivity` overrides `combine`; and integer sums
        are the base's.

    Args:
        cls: Class of the strategy: ``base`` or a subclass of it.
        base: `RoundStrategy`.
        unit: Unit that the server's noise protects.
        arithmetic: Arithmetic of the server's sums.

    Raises:
        PrivacyError: If the class does not fit. The message says why, and what to do.
    """
    name = cls.__name__
    combine, proof, claim = (
        next(i for i, c in enumerate(cls.__mro__) if attribute in vars(c))
        for attribute in ("combine", "sensitivity", "proved_for")
    )
    # The base's claim for its own sum does not cover another combine(). Most authors think only of neighbours in which
    # a client comes or goes, and not of one record that changes one upload.
    proved_for = cls.proved_for if claim <= combine else ("client",)
    if unit not in proved_for:
        where = f"at {unit} level" if unit != "nominal" else "as in the DP-FPL paper"
        reason = cls.unproved_because or f"its proved_for is {proved_for}"
        raise PrivacyError(f"{name} cannot run with noise of the server {where}: {reason}; set {_OFF}")
    fixed = set(vars(base)) - {*HOOKS, *_CLAIMS} - _DATACLASS_NAMES
    if changed := sorted(n for n in fixed if getattr(cls, n, None) is not getattr(base, n)):
        raise PrivacyError(
            f"{name} overrides {', '.join(changed)}, which clip, noise or account; under "
            f"server-side privacy a strategy may change {', '.join(HOOKS)} only"
        )
    # A sensitivity() proves the combine() of its own class, not that of a subclass which overrides it again.
    if combine < proof:
        raise PrivacyError(
            f"{name} overrides combine() but not sensitivity(), so the server's noise cannot be "
            f"scaled. Override it, or set {_OFF}"
        )
    if arithmetic == "integer":
        for hook in ("combine", "sensitivity"):
            if getattr(cls, hook) is not getattr(base, hook):
                raise PrivacyError(
                    f"{name} overrides {hook}(), but integer arithmetic is proved only for the plain weighted sum; "
                    'set privacy.arithmetic = "float"'
                )


def check_bound(bound: float, unit: ServerUnit) -> None:
    """Refuse a bound on one unit's share of the sum that the server cannot clip to; for records it may be zero.

    Args:
        bound: Bound S, or for records the learning rate times C. With zero, uploads and noise are zero, and nothing is
            learned.
        unit: Unit that the server's noise protects. With ``nominal``, nothing is clipped here and nothing is checked.

    Raises:
        PrivacyError: If the bound is not between 1e-30 and 1e30.
    """
    if unit == "nominal" or is_clip_norm(bound) or (unit == "record" and bound == 0):
        return
    also = ", or train.global-learning-rate, which is a factor of it" if unit == "record" else ""
    raise PrivacyError(
        f"one {unit} may move the sum of uploads by {bound:g}; the server clips to norms from "
        f"{SMALLEST_CLIP_NORM:g} to {LARGEST_CLIP_NORM:g}: change the clip norm{also}"
    )
