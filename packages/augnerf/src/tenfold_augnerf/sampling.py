"""Ray parameters: stratified, and by importance from the coarse weights (section 2.1, items 2 and 5)."""

import torch
from jaxtyping import Float
from torch import Tensor

PDF_FLOOR = 1e-5


def stratified(
    near: Float[Tensor, "#rays 1"],
    far: Float[Tensor, "#rays 1"],
    rays: int,
    samples: int,
    *,
    inverse: bool = False,
    jitter: Float[Tensor, "rays samples"] | None = None,
) -> Float[Tensor, "rays samples"]:
    """z_i = near (1 - t_i) + far t_i for t in equal steps from 0 to 1, or the same in 1/z.

    Args:
        near: of each ray, or one for all.
        far: likewise.
        rays: how many rays.
        samples: N_c, two or more.
        inverse: equal steps in 1/z (`lindisp`).
        jitter: uniform numbers in [0, 1): every z moves within the interval between the midpoints to its neighbours.

    """
    t = torch.linspace(0, 1, samples, dtype=near.dtype, device=near.device)
    z = 1 / ((1 - t) / near + t / far) if inverse else near * (1 - t) + far * t
    z = z.expand(rays, samples)
    if jitter is None:
        return z
    middle = (z[:, 1:] + z[:, :-1]) / 2
    lower, upper = torch.cat([z[:, :1], middle], -1), torch.cat([middle, z[:, -1:]], -1)
    return lower + (upper - lower) * jitter


def invert_cdf(
    bins: Float[Tensor, "rays edges"],
    weights: Float[Tensor, "rays intervals"],
    count: int,
    uniform: Float[Tensor, "rays count"] | None = None,
) -> Float[Tensor, "rays count"]:
    """Samples of the piecewise constant density with the given weights (each raised by 1e-5) between `bins`.

    `uniform` [rays, count] are the numbers at which the distribution function is inverted; None takes equal steps from
    0 to 1. Where the function is flatter than 1e-5 the lower edge's slope 1 stands in.
    """
    weights = weights + PDF_FLOOR
    cdf = torch.cumsum(weights / weights.sum(-1, keepdim=True), -1)
    cdf = torch.cat([torch.zeros_like(cdf[:, :1]), cdf], -1)
    if uniform is None:
        uniform = torch.linspace(0, 1, count, dtype=cdf.dtype, device=cdf.device).expand(len(cdf), count)
    uniform = uniform.contiguous()
    found = torch.searchsorted(cdf.detach(), uniform, right=True)
    below, above = (found - 1).clamp(min=0), found.clamp(max=cdf.shape[-1] - 1)
    low, high = cdf.gather(-1, below), cdf.gather(-1, above)
    width = high - low
    width = torch.where(width < PDF_FLOOR, torch.ones_like(width), width)
    left, right = bins.gather(-1, below), bins.gather(-1, above)
    return left + (uniform - low) / width * (right - left)


def importance(
    z: Float[Tensor, "rays samples"],
    weights: Float[Tensor, "rays samples"],
    count: int,
    uniform: Float[Tensor, "rays count"] | None = None,
) -> tuple[Float[Tensor, "rays total"], Float[Tensor, "rays count"]]:
    """The union of the coarse z and `count` new ones, sorted, and the new ones.

    The new z carry no gradient; the coarse ones keep theirs.
    """
    middle = (z[:, 1:] + z[:, :-1]) / 2
    new = invert_cdf(middle.detach(), weights[:, 1:-1].detach(), count, uniform)
    return torch.cat([z, new], -1).sort(-1).values, new
