"""Numbers of the DP-FPL paper's own procedure (arXiv:2501.13904). Their ε is nominal."""

import math

CLIP = 10.0  # C_th of the paper
LOCAL_DIVISOR = 10.0  # hard-coded in the authors' code and not in the paper


def noised_steps(rounds: int, local_steps: int, sampling_rate: float, *, as_code: bool) -> int:
    """Return T of `nominal_sigma`: the steps of the run in the paper, its epochs in the authors' code.

    Example:
        >>> [noised_steps(100, 2, 0.1, as_code=as_code) for as_code in (False, True)]
        [200, 20]
    """
    steps = rounds * local_steps
    return max(1, round(steps * sampling_rate)) if as_code else steps


def nominal_sigma(epsilon: float, delta: float, steps: int) -> float:
    """Return σ = √(T ln 1/δ)/ε, Theorem 3.3 with the constant 1 of the authors' code; T is ``steps`` of the run."""
    return math.sqrt(steps * math.log(1 / delta)) / epsilon
