"""Numbers of the DP-FPL paper's own procedure (arXiv:2501.13904). Their ε is nominal."""

import math

CLIP = 10.0  # C_th of the paper
LOCAL_DIVISOR = 10.0  # hard-coded in the authors' code and not in the paper


def nominal_sigma(epsilon: float, delta: float, steps: int) -> float:
    """Return σ = √(T ln 1/δ)/ε, Theorem 3.3 with the constant 1 of the authors' code; T is ``steps`` of the run."""
    return math.sqrt(steps * math.log(1 / delta)) / epsilon
