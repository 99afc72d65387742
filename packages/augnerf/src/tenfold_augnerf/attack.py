"""Inner maximisation (section 2.3): projected gradient ascent on perturbations, l_inf and l_2, and its random start."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold_augnerf.perturbation import KEYS, Geometry, broadcast, radius
from tenfold_shared.errors import UserError

Norm = Literal["l_inf", "l_2"]
NORMS = get_args(Norm)
Objective = Callable[[Mapping[str, Tensor]], Tensor]
"""Perturbations -> the loss of every ray [rays]."""


@dataclass(frozen=True)
class Step:
    """How one key is attacked.

    Attributes:
        epsilon: resolved radius.
        alpha: step size, in the perturbation's own unit.
        iterations: ascent steps; the key stays as it is afterwards while others go on.
        norm: of the ball.

    """

    epsilon: float
    alpha: float
    iterations: int = 1
    norm: Norm = "l_inf"

    def __post_init__(self) -> None:
        """Refuse what is no ball or no step."""
        if self.epsilon < 0 or self.alpha < 0 or self.iterations < 0:
            raise UserError(
                f"an attack needs a radius, a step size and a number of steps of 0 or more, got {self.epsilon}, "
                f"{self.alpha} and {self.iterations}"
            )

    def scaled(self, factor: float) -> "Step":
        """The same in a ball and with a step `factor` times as large."""
        return Step(self.epsilon * factor, self.alpha * factor, self.iterations, self.norm)


def steps_of(
    keys: Sequence[str],
    geometry: Geometry,
    *,
    eps: Sequence[float],
    alpha: Sequence[float],
    iterations: Sequence[int] = (1,),
    norm: Sequence[str] = ("l_inf",),
    relative_alpha: bool = False,
) -> dict[str, Step]:
    """The steps of all keys from the lists of the command line, each with one entry for all keys or one for each.

    `alpha` is absolute, as released; with `relative_alpha` it is a multiple of the resolved radius.

    Raises:
        UserError: unknown keys, lists of other lengths, negative values.

    """
    settings = broadcast(keys, eps=eps, alpha=alpha, iterations=iterations, norm=norm)
    steps = {}
    for key, values in settings.items():
        epsilon = radius(key, float(values["eps"]), geometry)
        size = float(values["alpha"]) * (epsilon if relative_alpha else 1.0)
        if values["norm"] not in NORMS:
            raise UserError(f"the norm {values['norm']!r} of {key} is not known: use {' or '.join(NORMS)}")
        steps[key] = Step(epsilon, size, int(values["iterations"]), values["norm"])  # type: ignore[arg-type]
    return steps


def flat_norm(x: Float[Tensor, "leading *rest"]) -> Float[Tensor, "leading *ones"]:
    """l_2 norm of each leading slice, shaped to broadcast over it."""
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


def project(delta: Tensor, step: Step) -> Tensor:
    """The nearest point of the ball: clipped entries, or leading slices scaled down to norm ε."""
    if step.norm == "l_inf":
        return delta.clamp(-step.epsilon, step.epsilon)
    return delta * (step.epsilon / flat_norm(delta).clamp(min=1e-12)).clamp(max=1.0)


def ascend(delta: Tensor, gradient: Tensor, step: Step) -> Tensor:
    """One step: α sign(g) (zero gradients keep the entry) or α g / (‖g‖ + 1e-10), then the projection."""
    if step.norm == "l_inf":
        return project(delta + step.alpha * gradient.sign(), step)
    return project(delta + step.alpha * gradient / (flat_norm(gradient) + 1e-10), step)


def start(shape: Sequence[int], step: Step, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform in [-ε, ε], or for l_2 a Gaussian direction per leading slice with norm r ε, r uniform in [0, 1]."""
    device = generator.device
    if step.norm == "l_inf":
        return (2 * torch.rand(*shape, generator=generator, device=device, dtype=dtype) - 1) * step.epsilon
    direction = torch.randn(*shape, generator=generator, device=device, dtype=dtype)
    length = torch.rand(shape[0], generator=generator, device=device, dtype=dtype).view(-1, *[1] * (len(shape) - 1))
    return direction / flat_norm(direction).clamp(min=1e-12) * length * step.epsilon


def maximise(
    objective: Objective,
    initial: Mapping[str, Tensor],
    steps: Mapping[str, Step],
    *,
    helpful: bool = False,
) -> dict[str, Tensor]:
    """The perturbations after the ascent, detached.

    All keys are differentiated together at every iteration; each stops moving after its own number of them. Gradients
    are taken by the perturbations alone, so the weights' are neither computed nor touched.

    Args:
        objective: evaluated without jitter and noise.
        initial: where the ascent starts, by key.
        steps: how each key moves.
        helpful: descend instead ("unadv").

    """
    delta = {key: value.detach() for key, value in initial.items()}
    sign = -1.0 if helpful else 1.0
    for iteration in range(max((step.iterations for step in steps.values()), default=0)):
        moving = [key for key, step in steps.items() if iteration < step.iterations]
        leaves = {key: value.requires_grad_(key in moving) for key, value in delta.items()}
        with torch.enable_grad():
            loss = sign * objective(leaves).mean()
            gradients = torch.autograd.grad(loss, [leaves[key] for key in moving], allow_unused=True)
        delta = {key: value.detach() for key, value in delta.items()}
        for key, gradient in zip(moving, gradients, strict=True):
            if gradient is not None:
                delta[key] = ascend(delta[key], gradient, steps[key])
    return delta


def attack(
    objective: Objective,
    starts: Callable[[int], Mapping[str, Tensor]],
    steps: Mapping[str, Step],
    *,
    restarts: int = 1,
    helpful: bool = False,
) -> dict[str, Tensor]:
    """`maximise` from one or more starts, keeping the worst: of each ray for per-ray keys, of the batch for the others.

    The losses are only evaluated when there is something to choose from.

    Args:
        objective: the loss of every ray.
        starts: number of the restart -> where it starts.
        steps: how each key moves.
        restarts: how often.
        helpful: keep the best instead.

    """
    best = maximise(objective, starts(0), steps, helpful=helpful)
    if restarts == 1:
        return best
    sign = -1.0 if helpful else 1.0
    with torch.no_grad():
        worst = sign * objective(best)
    highest = worst.mean()
    for number in range(1, restarts):
        found = maximise(objective, starts(number), steps, helpful=helpful)
        with torch.no_grad():
            losses = sign * objective(found)
        better = losses > worst
        whole = losses.mean() > highest
        for key, value in found.items():
            choose = better.view(-1, *[1] * (value.ndim - 1)) if KEYS[key].leading == "rays" else whole
            best[key] = torch.where(choose, value, best[key])
        worst, highest = torch.where(better, losses, worst), torch.maximum(highest, losses.mean())
    return best
