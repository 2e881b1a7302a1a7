"""The privacy of a run in words: what was released, who is trusted, and what no ε here covers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fl_dualpriv.run.tables import epsilon_text

_UNITS = {"record": "one record of one client", "client": "everything that one client holds"}
_TRUSTS = {
    "nobody": "The noise is added by the client, so this holds against everyone, the server included.",
    "server": "The server sees more than this covers and must be trusted; it holds against everyone else.",
}
NOT_PROTECTED = (
    (
        "Facts about a whole client or group",
        "An ε about a record hides whether one record was there. It does not hide what many records of a client have "
        "in common (property inference), for example which classes or which camera it has.",
    ),
    (
        "What is declared public",
        "Numbers of records, class lists, domains and the configuration are public. So is the frozen model: a record "
        "that it was trained on is not protected by this run.",
    ),
    (
        "The operator's files",
        "Logs, times, ledgers and the clients' own folders are not releases. No ε covers them.",
    ),
    (
        "Other uses of the same data",
        "Every further run on the same records adds its own ε. The node's ledger adds them up where it has one.",
    ),
    (
        "People with several records",
        "If one person has k records in a client, the ε about that person is larger: at most k times for pure ε, more "
        "for (ε, δ).",
    ),
)
"""Title and text of what a proved ε does not protect."""


def in_words(release: Mapping[str, Any]) -> str:
    """Return a sentence or two about one line of the privacy table.

    Example:
        >>> print(in_words({"release": "global prompt", "unit": "record", "relation": "add-or-remove-one",
        ...     "releases": 18, "epsilon": 4.0, "delta": 1e-4, "trusts": "nobody", "guarantee": "theorem"}))
        Global prompt: adding or removing one record of one client changes the probability of any outcome by at most \
a factor of e^4 = 54.6, up to an additional probability of 0.0001. The noise is added by the client, so this holds \
against everyone, the server included.
    """
    names = [str(release["release"])]
    if release["guarantee"] != "theorem":
        nominal = epsilon_text(release["epsilon"])
        return in_words_of(names, f"no guarantee. The ε of {nominal} is nominal: a formula, not a bound.")
    epsilon = float(release["epsilon"])
    unit = _UNITS.get(str(release["unit"]), str(release["unit"]))
    delta = release["delta"]
    more = f", up to an additional probability of {delta:g}" if delta else ""
    value = f" = {math.exp(epsilon):,.3g}" if epsilon < 30 else ""
    factor = f"a factor of e^{epsilon_text(epsilon)}{value}"
    trusts = _TRUSTS.get(str(release["trusts"]), f"Trusted: {release['trusts']}.")
    return in_words_of(
        names, f"adding or removing {unit} changes the probability of any outcome by at most {factor}{more}. {trusts}"
    )


def in_words_of(names: Sequence[str], guarantee: str) -> str:
    """Return one sentence for several releases.

    Example:
        >>> in_words_of(["client upload", "global prompt"], "no guarantee.")
        'Client upload, global prompt: no guarantee.'
    """
    start = ", ".join(names)
    return f"{start[:1].upper()}{start[1:]}: {guarantee}"


def pruning_in_words(config: Mapping[str, Any]) -> list[str]:
    """Return what Dual-Priv Pruning did in a run, one sentence for each part."""
    sentences = []
    keep = config.get("pruning.visual-keep-ratio", 1.0)
    if keep < 1:
        fused, merge = config.get("pruning.visual-fused", 0), config.get("pruning.visual-merge", "")
        rest = f"the others were fused into {fused} by {merge}" if fused else "the others were dropped"
        sentences.append(f"Of the visual tokens {100 * keep:g} % were kept and {rest}. This costs no ε.")
    else:
        sentences.append("All visual tokens were kept.")
    ratio = config.get("pruning.update-keep-ratio", 1.0)
    if ratio < 1:
        rule, block = config.get("pruning.update-rule", ""), config.get("pruning.update-block", "")
        sentences.append(
            f"Of each update {100 * ratio:g} % of the blocks ({block}) were kept, by the rule {rule!r}. The rule reads "
            "noised releases only, so it costs no ε."
        )
    else:
        sentences.append("All blocks of the updates were kept.")
    return sentences
