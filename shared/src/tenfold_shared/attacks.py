"""Worst cases in the l-infinity ball around images: the projection, projected gradient ascent, Auto-PGD.

Everything is a function of tensors. The loss is a closure over whatever it needs (model, head, targets) that takes the
attacked images; `held` puts its models into the state in which they are attacked::

    with held(model):
        delta = pgd(lambda images: cross_entropy(model(images), labels), x, eps=8 / 255, step_size=2 / 255, steps=10)

All sizes (`eps`, `step_size`, `clip`) are in the units of `x`: pixels, when the model normalises by itself.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Loss = Callable[[Tensor], Tensor]
"""Attacked images [b, ...] to the loss to raise: a scalar, or one value a sample [b]."""
Clip = tuple[float, float] | None
"""The values that an image may have; None leaves them free."""


def check_sizes(eps: float, step_size: float, steps: int, clip: Clip) -> None:
    """Refuse what is no attack. ValueError naming the value."""
    if eps < 0 or step_size < 0 or steps < 0:
        raise ValueError(f"eps {eps}, step_size {step_size} and steps {steps} cannot be negative")
    if clip is not None and not clip[0] < clip[1]:
        raise ValueError(f"clip is {clip}: its first value must lie below its second")


def project(x: Float[Tensor, "b ..."], delta: Float[Tensor, "b ..."], eps: float, clip: Clip = (0.0, 1.0)) -> Tensor:
    """The nearest perturbation with entries in [-eps, eps] that keeps `x + delta` within `clip`."""
    delta = delta.clamp(-eps, eps)
    return delta if clip is None else (x + delta).clamp(*clip) - x


def uniform_start(
    x: Float[Tensor, "b ..."], eps: float, clip: Clip = (0.0, 1.0), generator: torch.Generator | None = None
) -> Tensor:
    """A perturbation drawn uniformly from [-eps, eps], projected. A CPU `generator` serves any device."""
    where = x.device if generator is None else generator.device
    drawn = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=where).to(x.device)
    return project(x, (2 * drawn - 1) * eps, eps, clip)


def pgd(
    loss: Loss,
    x: Float[Tensor, "b ..."],
    *,
    eps: float,
    step_size: float,
    steps: int,
    start: Float[Tensor, "b ..."] | None = None,
    random_start: bool = True,
    clip: Clip = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """A perturbation that raises the loss, by `steps` of delta <- project(delta + step_size * sign(gradient)).

    Args:
        loss: what to raise; values a sample are summed. It is differentiated with respect to the images alone, so no
            gradient is left in any parameter. sign(0) is 0.
        x: images [b, ...], from which no gradient flows.
        eps: radius of the ball.
        step_size: length of a step in every entry.
        steps: how many; with none the start is returned.
        start: the perturbation to begin with, taken as it is; default: `uniform_start`, or 0 without `random_start`.
        random_start: whether the default start is random.
        clip: the values an image may have.
        generator: where the random start is drawn from; default: the global one.

    Returns:
        delta [b, ...], detached, with |delta| <= eps and x + delta within `clip` (up to rounding).

    """
    check_sizes(eps, step_size, steps, clip)
    x = x.detach()
    if start is not None:
        delta = start.detach()
    else:
        delta = uniform_start(x, eps, clip, generator) if random_start else torch.zeros_like(x)
    for _ in range(steps):
        delta = project(x, delta + step_size * input_gradient(loss, x + delta).sign(), eps, clip)
    return delta


def apgd(
    loss: Callable[[Tensor], Float[Tensor, " b"]],
    x: Float[Tensor, "b ..."],
    *,
    eps: float,
    steps: int,
    start: Float[Tensor, "b ..."] | None = None,
    clip: Clip = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Float[Tensor, " b"]]:
    """Auto-PGD (Croce and Hein 2020): ascent with momentum that finds its own step size, each sample by itself.

    The step begins with 2 eps. At checkpoints it is halved, and the ascent goes on from the best point, where the loss
    rose in fewer than three quarters of the steps, or neither step size nor best loss has changed since the last one.

    Args:
        loss: what to raise, one value a sample.
        x: images [b, ...], from which no gradient flows.
        eps: radius of the ball.
        steps: how many; each takes one gradient.
        start: the perturbation to begin with; default: `uniform_start`.
        clip: the values an image may have.
        generator: where the default start is drawn from.

    Returns:
        The image of the greatest loss that each sample met, and that loss.

    """
    check_sizes(eps, 0.0, steps, clip)
    x = x.detach()
    wide = (-1, *(1 for _ in x.shape[1:]))
    now = x + (uniform_start(x, eps, clip, generator) if start is None else start.detach())
    value, gradient = value_and_gradient(loss, now)
    best, best_value, best_gradient = now, value, gradient
    before, size = now, torch.full_like(value, 2 * eps)
    rises, halved, value_then, last = torch.zeros_like(value), torch.ones_like(value, dtype=torch.bool), value, 0
    checkpoints = apgd_checkpoints(steps)
    for step in range(1, steps + 1):
        straight = x + project(x, now + size.view(wide) * gradient.sign() - x, eps, clip)
        mixed = straight if step == 1 else now + 0.75 * (straight - now) + 0.25 * (now - before)
        before, now = now, x + project(x, mixed - x, eps, clip)
        value_before = value
        value, gradient = value_and_gradient(loss, now)
        rises += value > value_before
        better = value > best_value
        best_value = torch.where(better, value, best_value)
        best = torch.where(better.view(wide), now, best)
        best_gradient = torch.where(better.view(wide), gradient, best_gradient)
        if step in checkpoints:
            stalled = ~halved & (best_value <= value_then)
            halved = (rises < 0.75 * (step - last)) | stalled
            size = torch.where(halved, size / 2, size)
            value = torch.where(halved, best_value, value)
            now = torch.where(halved.view(wide), best, now)
            gradient = torch.where(halved.view(wide), best_gradient, gradient)
            rises, value_then, last = torch.zeros_like(rises), best_value, step
    return best, best_value


def apgd_checkpoints(steps: int) -> set[int]:
    """Steps at which Auto-PGD looks back: p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)."""
    found, previous, present = set(), 0.0, 0.22
    while present <= 1.0:
        found.add(max(1, math.ceil(present * steps - 1e-9)))
        previous, present = present, present + max(present - previous - 0.03, 0.06)
    return found


def targeted_dlr(
    logits: Float[Tensor, "b k"], labels: Int[Tensor, " b"], targets: Int[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """The targeted difference of logits ratio -(z_y - z_t) / (z_1st - (z_3rd + z_4th) / 2) of Croce and Hein (2020),
    which no scaling of the logits changes; with fewer than four classes the denominator is z_1st - z_last.
    """
    ordered = logits.sort(dim=1, descending=True).values
    low = (ordered[:, 2] + ordered[:, 3]) / 2 if logits.shape[1] >= 4 else ordered[:, -1]
    own, target = (logits.gather(1, index[:, None]).squeeze(1) for index in (labels, targets))
    return -(own - target) / (ordered[:, 0] - low + 1e-12)


def value_and_gradient(loss: Loss, images: Float[Tensor, "b ..."]) -> tuple[Tensor, Tensor]:
    """The loss as it comes, detached, and `input_gradient` at the price of the gradient alone."""
    images = images.detach().requires_grad_(True)
    with torch.enable_grad():
        value = loss(images)
        return value.detach(), torch.autograd.grad(value.sum(), images)[0]


def input_gradient(loss: Loss, images: Float[Tensor, "b ..."]) -> Tensor:
    """The gradient of the (summed) loss with respect to the images [b, ...]; nothing accumulates in parameters."""
    return value_and_gradient(loss, images)[1]


@contextlib.contextmanager
def held(*models: nn.Module) -> Iterator[None]:
    """Models as an attack needs them: in eval mode (no statistics move) and with constant parameters (no gradient is
    computed for them); every module and parameter is afterwards as it was before.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    try:
        for model in models:
            model.eval()
            model.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)
