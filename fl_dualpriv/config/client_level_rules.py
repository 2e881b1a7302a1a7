"""Rules that several keys of client-level privacy must satisfy together; see ``rules.py``."""

from fl_dualpriv.config.rules import CrossRule
from fl_dualpriv.privacy.limits import SMALLEST_SAMPLING_RATE

_MECHANISM, _CLIPPING = "privacy.client.mechanism", "privacy.client.clipping"
_COHORT = "privacy.client.expected-cohort"

_MOST_PATTERN_ROUNDS, _MOST_CORRELATED_ROUNDS = 10**7, 10**5

CLIENT_LEVEL_RULES: tuple[CrossRule, ...] = (
    CrossRule(
        (_COHORT, "population", _MECHANISM),
        lambda v: v[_MECHANISM] == "none" or v[_COHORT] >= SMALLEST_SAMPLING_RATE * v["population"],
        f"must be at least {SMALLEST_SAMPLING_RATE:g} of population, because the coins that draw it are no finer",
        "raise it",
    ),
    CrossRule(
        ("rounds", "population", _COHORT, _MECHANISM),
        lambda v: (
            v[_MECHANISM] in ("none", "gaussian")
            or (
                v["rounds"] <= _MOST_CORRELATED_ROUNDS
                and v["rounds"] * min(v["rounds"], v["population"] / v[_COHORT]) <= _MOST_PATTERN_ROUNDS
            )
        ),
        f"must be at most {_MOST_CORRELATED_ROUNDS} with correlated noise, and at most {_MOST_PATTERN_ROUNDS} over "
        "the number of turns, which is population over the expected cohort, or rounds if those are fewer",
        'lower it, raise the expected cohort, or set the mechanism to "gaussian"',
    ),
    CrossRule(
        (_CLIPPING, _MECHANISM),
        lambda v: v[_CLIPPING] == "fixed" or v[_MECHANISM] == "gaussian",
        'must be "fixed" without independent noise at the client level: there is none to scale, or it spans all rounds',
        'set it to "fixed", or the mechanism to "gaussian"',
    ),
    CrossRule(
        ("privacy.client.bands", _MECHANISM),
        lambda v: v["privacy.client.bands"] == 0 or v[_MECHANISM] == "banded",
        'applies only to mechanism = "banded"',
        'set it to 0, or the mechanism to "banded"',
    ),
    CrossRule(
        ("privacy.arithmetic", _MECHANISM),
        lambda v: v["privacy.arithmetic"] == "float" or v[_MECHANISM] in ("none", "gaussian"),
        'must be "float" for correlated noise: exact integers are proved only for independent draws',
        'set it to "float", or the mechanism to "gaussian"',
    ),
)
