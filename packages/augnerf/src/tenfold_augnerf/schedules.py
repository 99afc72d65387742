"""Schedules by step: learning rate (section 2.1, item 8), and radii (section 11): warm-up, ramp, anneal, automatic."""

import math
from dataclasses import dataclass

from tenfold_shared.errors import UserError


def learning_rate(step: int, base: float = 5e-4, factor: float = 0.1, every: int = 250_000) -> float:
    """Base · factor^(step / every), set after step `step`, counted from 1; the very first update uses the base."""
    return base * factor ** (step / every)


@dataclass(frozen=True)
class RadiusSchedule:
    """The share of the radii, and of the step sizes, that is in force at a step; fractions are of the whole training.

    Attributes:
        warmup: no perturbation before this fraction.
        ramp: then the share rises linearly to 1 over this fraction.
        anneal: the share falls linearly to 0 over this last fraction.

    """

    warmup: float = 0.0
    ramp: float = 0.0
    anneal: float = 0.0

    def __post_init__(self) -> None:
        """Refuse fractions that do not fit into the training."""
        parts = self.warmup, self.ramp, self.anneal
        if not (min(parts) >= 0 and sum(parts) <= 1):
            raise UserError(f"warmup, ramp and anneal are fractions of the training, together at most 1; got {parts}")

    def share(self, step: int, total: int) -> float:
        """The share at a step, counted from 0."""
        done = step / total
        if done < self.warmup:
            return 0.0
        rising = (done - self.warmup) / self.ramp if self.ramp else 1.0
        falling = (1 - done) / self.anneal if self.anneal else 1.0
        return max(0.0, min(1.0, rising, falling))


class RadiusControl:
    """Radii chosen while training: scaled until the perturbed loss is `target` times the clean one.

    The scale moves by at most `rate` (in logarithm) a step, within [1/64, 64].
    """

    def __init__(self, target: float, rate: float = 0.02) -> None:
        self.target, self.rate, self.log_scale = target, rate, 0.0

    @property
    def scale(self) -> float:
        """The factor in force."""
        return math.exp(self.log_scale)

    def observe(self, clean: float, adversarial: float) -> None:
        """Take note of a step's losses."""
        error = math.log(self.target) - math.log(max(adversarial, 1e-12) / max(clean, 1e-12))
        limit = math.log(64)
        self.log_scale = max(-limit, min(limit, self.log_scale + max(-self.rate, min(self.rate, error))))

    def state_dict(self) -> dict[str, float]:
        """For checkpoints."""
        return {"log_scale": self.log_scale}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """From a checkpoint."""
        self.log_scale = float(state["log_scale"])
