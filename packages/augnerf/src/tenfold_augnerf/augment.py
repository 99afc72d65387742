"""The augmentation as one function on any renderer (section 11), and the check that it reaches what is evaluated."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tenfold_augnerf.attack import attack, steps_of
from tenfold_augnerf.cameras import Rays
from tenfold_augnerf.objective import Objective, random_starts
from tenfold_augnerf.renderer import Renderer


def augment(
    renderer: Renderer,
    rays: Rays,
    truth: Tensor,
    eps: Mapping[str, float],
    *,
    image_size: tuple[int, int],
    cameras: int = 1,
    alpha: float = 1.25,
    iterations: int = 1,
    norm: str = "l_inf",
    seed: int = 0,
) -> dict[str, Tensor]:
    """The worst perturbations of a batch, to be rendered with `renderer(rays, delta)`.

    Args:
        renderer: over any field with `locate`, `encode`, `heads` and `compose`.
        rays: of the batch.
        truth: their colours, [rays, 3].
        eps: radius of each key (`perturbation.KEYS`), in its unit.
        image_size: (height, width) in pixels, in which the radii of points are counted.
        cameras: how many there are, for `cam_r` and `cam_t`.
        alpha: step size as a multiple of the radius.
        iterations: ascent steps.
        norm: l_inf or l_2.
        seed: of the start.

    Raises:
        UserError: unknown keys, negative radii, a level that the field does not expose.

    """
    keys = list(eps)
    renderer.check(keys)
    geometry = renderer.geometry(*image_size, cameras)
    steps = steps_of(
        keys,
        geometry,
        eps=list(eps.values()),
        alpha=[alpha],
        iterations=[iterations],
        norm=[norm],
        relative_alpha=True,
    )
    generator = torch.Generator(truth.device).manual_seed(seed)
    starts = random_starts(steps, geometry, len(truth), generator, truth.dtype, zero=False)
    objective, whole = Objective(renderer.coarse_weight), slice(0, len(truth))
    return attack(lambda delta: objective(renderer(rays, delta), truth), lambda i: starts(i, whole), steps)


def reached(renderer: Renderer, rays: Rays, truth: Tensor, delta: Mapping[str, Tensor]) -> dict[str, bool]:
    """Which parameters the loss of a perturbed rendering has a gradient for.

    With `branch = "auxiliary"`, as released, none of the networks that are evaluated is among them.
    """
    names, parameters = zip(*renderer.named_parameters(), strict=True)
    loss = Objective(renderer.coarse_weight)(renderer(rays, delta), truth).mean()
    gradients: Sequence[Tensor | None] = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: g is not None and bool(g.any()) for name, g in zip(names, gradients, strict=True)}
