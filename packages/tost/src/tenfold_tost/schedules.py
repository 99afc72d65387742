"""How the ghosts fade (sections 2.2, 2.3) and the learning rate falls (section 6).

The ghost clock u is 0 at the first step and 1 where the ghosts vanish, f E epochs later.
"""

import math
from collections.abc import Sequence
from typing import Literal

SkipCurve = Literal["linear", "cosine", "step"]
BetaCurve = Literal["linear", "geometric", "switch"]


def skip_strength(u: float, curve: SkipCurve = "linear") -> float:
    """alpha(u): 1 at the start, exactly 0 from u = 1 on."""
    if u >= 1.0:
        return 0.0
    if curve == "linear":
        return 1.0 - u
    return 1.0 if curve == "step" else 0.5 * (1.0 + math.cos(math.pi * u))


def soft_state(
    u: float, kind: str = "pswish", beta0: float = 1.0, beta_max: float = 10.0, curve: BetaCurve = "linear"
) -> tuple[float, float]:
    """(beta, hardness) of a soft neuron: pswish's slope rises from beta0 to beta_max, other kinds are mixed with ReLU.

    `switch` keeps the soft neuron as it starts; from u = 1 on it is ReLU in every case.
    """
    if u >= 1.0:
        return beta_max, 1.0
    if curve == "switch":
        return beta0, 0.0
    if kind != "pswish":
        return beta0, u
    beta = beta0 + u * (beta_max - beta0) if curve == "linear" else beta0 * (beta_max / beta0) ** u
    return beta, 0.0


def learning_rate(epoch: int, peak: float, milestones: Sequence[int], factor: float = 0.1) -> float:
    """The rate of an epoch (0-based): a factor of 0.1 at every milestone reached. A function of the epoch alone, so that
    resuming after a milestone keeps the decay.
    """
    return peak * factor ** sum(epoch >= milestone for milestone in milestones)
