"""Read the keys of ``[budget]`` in a node's file that choose its ledger's filter. See `node.file`, `privacy.filters`.

Standard library only, because a SuperNode reads them before it loads any other package.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from fl_dualpriv.privacy.filters.budget import Budget, FilterChoice
from fl_dualpriv.privacy.limits import (
    LARGEST_BUDGET,
    LARGEST_NOISE_MULTIPLIER,
    MOST_RELEASES,
    SMALLEST_BUDGET,
    SMALLEST_NOISE_MULTIPLIER,
    SMALLEST_SAMPLING_RATE,
)


class _Key(NamedTuple):
    """One key: its allowed values, in words and as a test, and the filters that it belongs to (all if empty)."""

    allowed: str
    test: Callable[[Any], bool]
    filters: tuple[str, ...] = ()


def _count(least: int, most: int, *filters: str) -> _Key:
    return _Key(f"a whole number from {least} to {most}", lambda x: type(x) is int and least <= x <= most, filters)


def _number(least: float, most: float, *filters: str) -> _Key:
    def fits(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most

    return _Key(f"from {least:g} to {most:g}", fits, filters)


_KEYS: Mapping[str, _Key] = {
    "filter": _Key('"reserve", "renyi" or "worst-terms"', ("reserve", "renyi", "worst-terms").__contains__),
    "expected-runs": _count(1, 10_000, "reserve"),
    "composition": _Key('"sum" or "advanced"', ("sum", "advanced").__contains__, ("reserve",)),
    "delta-prime": _number(1e-15, 1, "reserve"),
    "max-run-epsilon": _number(SMALLEST_BUDGET, LARGEST_BUDGET, "reserve"),
    "max-round-releases": _count(1, MOST_RELEASES),
    "expected-sampling-rate": _number(SMALLEST_SAMPLING_RATE, 1, "renyi"),
    "expected-noise-multiplier": _number(SMALLEST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER, "renyi"),
    "max-correlated-releases": _count(0, MOST_RELEASES, "worst-terms"),
    "min-correlated-noise-multiplier": _number(SMALLEST_NOISE_MULTIPLIER, 1e12, "worst-terms"),
}

FILTER_KEYS = frozenset(_KEYS)


def read_filter(table: Mapping[str, Any], problems: list[str]) -> FilterChoice:
    """Return the filter that a ``[budget]`` names, with defaults for absent keys.

    Args:
        table: The ``[budget]`` of a node's file.
        problems: List that receives a line for each value that is not allowed.
    """
    values: dict[str, Any] = {}
    for key, rule in _KEYS.items():
        if key not in table:
            continue
        value = table[key]
        try:
            fits = rule.test(value)
        except TypeError:  # a table or a list has no hash
            fits = False
        if not fits:
            problems.append(f"budget.{key} = {value!r}; it must be {rule.allowed}")
        else:
            values[_FIELDS[key]] = float(value) if isinstance(value, float) else value
    choice = FilterChoice(**values)
    for key, rule in _KEYS.items():
        if key in table and rule.filters and choice.name not in rule.filters:
            problems.append(f'budget.{key} belongs to filter = "{rule.filters[0]}"; remove it, or change filter')
    return choice


def filter_problems(budget: Budget) -> list[str]:
    """Return one line for each combination of keys that no filter can work with."""
    choice, problems = budget.filter, list[str]()
    if choice.composition == "advanced" and not 0 < choice.delta_prime < budget.delta:
        problems.append(
            f'budget.composition = "advanced" needs delta-prime above 0 and below delta = {budget.delta:g}; it is '
            f"{choice.delta_prime:g}"
        )
    if choice.composition == "sum" and choice.delta_prime:
        problems.append(f'budget.delta-prime = {choice.delta_prime:g} belongs to composition = "advanced"; remove it')
    if choice.max_run_epsilon is not None and choice.max_run_epsilon > budget.epsilon:
        problems.append(f"budget.max-run-epsilon = {choice.max_run_epsilon:g} is above epsilon = {budget.epsilon:g}")
    if choice.name == "worst-terms" and not budget.min_noise_multiplier > 0:
        problems.append('budget.filter = "worst-terms" charges min-noise-multiplier, which must be above 0')
    if choice.name == "renyi" and not (choice.expected_noise_multiplier or budget.min_noise_multiplier) > 0:
        problems.append(
            'budget.filter = "renyi" takes its order from the expected terms: set expected-noise-multiplier, or '
            "min-noise-multiplier above 0"
        )
    if bool(choice.max_correlated_releases) != bool(choice.min_correlated_noise_multiplier):
        problems.append(
            "budget.max-correlated-releases and min-correlated-noise-multiplier: set both of them or neither"
        )
    return problems


_FIELDS = {("filter" if f.name == "name" else f.name.replace("_", "-")): f.name for f in fields(FilterChoice)}
assert _FIELDS.keys() == _KEYS.keys()
