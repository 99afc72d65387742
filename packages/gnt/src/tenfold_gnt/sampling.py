"""Depth samples along rays (section 2.2): uniform in depth or inverse depth, jittered, and by importance."""

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold_shared.errors import UserError

SMALLEST_STEP = 1e-5


def refuse_few_samples(samples: int, importance: int, option: str) -> None:
    """Refuse fewer depths a ray than the passes need; importance samples lie between the midpoints of the others.

    Raises:
        UserError: fewer than two depths, or than three before an importance pass; `option` is named.

    """
    least = 3 if importance else 2
    if samples < least:
        raise UserError(f"{option} takes {least} or more{' with importance samples' * (least > 2)}, got {samples}")


def depth_samples(
    near: float | Tensor,
    far: float | Tensor,
    rays: int,
    samples: int,
    *,
    inverse: bool = True,
    jitter: Float[Tensor, "rays samples"] | None = None,
    like: Tensor,
) -> Float[Tensor, "rays samples"]:
    """Depths from near to far, both included.

    Args:
        near: the nearest depth, one for all rays; a number or a tensor with one element (no synchronisation).
        far: the farthest depth.
        rays: how many rays.
        samples: S, depths a ray.
        inverse: uniform in 1/z (all published configurations) instead of z.
        jitter: uniform numbers in [0, 1): each depth moves within the interval between the midpoints to its neighbours;
            None for the deterministic depths of evaluation.
        like: gives device and dtype.

    Raises:
        ValueError: fewer than two samples, or (for plain numbers) near >= far.

    """
    if samples < 2:
        raise ValueError(f"rays need at least 2 depth samples, got {samples}")
    if not isinstance(near, Tensor) and not isinstance(far, Tensor) and not 0 < near < far:
        raise ValueError(f"depths need 0 < near < far, got near {near} and far {far}")
    near, far = (torch.as_tensor(x, dtype=like.dtype, device=like.device).reshape(()) for x in (near, far))
    fraction = torch.linspace(0, 1, samples, dtype=like.dtype, device=like.device)
    depths = 1 / (1 / near + fraction * (1 / far - 1 / near)) if inverse else near + fraction * (far - near)
    depths = depths.expand(rays, samples)
    if jitter is None:
        return depths
    middle = (depths[:, 1:] + depths[:, :-1]) / 2
    lower = torch.cat([depths[:, :1], middle], -1)
    upper = torch.cat([middle, depths[:, -1:]], -1)
    return lower + (upper - lower) * jitter


def importance_samples(
    depths: Float[Tensor, "rays samples"],
    weights: Float[Tensor, "rays samples"],
    count: int,
    *,
    inverse: bool = True,
    uniform: Float[Tensor, "rays count"] | None = None,
) -> Float[Tensor, "rays total"]:
    """The coarse depths and `count` more, drawn where the coarse weights are, sorted together.

    The piecewise constant density lies on the bins between midpoints of the coarse depths (of their inverses when
    `inverse`), with the inner weights, each raised by 1e-5. Gradients do not pass.

    Args:
        depths: increasing.
        weights: of the coarse pass, e.g. the attention read-out.
        count: M, further depths a ray.
        inverse: as in `depth_samples`.
        uniform: numbers in [0, 1) at which the distribution function is inverted; None takes M equal steps from 0 to 1.

    """
    coarse, weights = depths.detach(), weights.detach()
    axis = 1 / coarse if inverse else coarse
    bins = (axis[:, 1:] + axis[:, :-1]) / 2
    inner = weights[:, 1:-1] + SMALLEST_STEP
    if inverse:  # 1/z decreases
        bins, inner = bins.flip(-1), inner.flip(-1)
    distribution = (inner / inner.sum(-1, keepdim=True)).cumsum(-1)
    distribution = torch.cat([torch.zeros_like(distribution[:, :1]), distribution], -1)
    if uniform is None:
        steps = torch.linspace(0, 1, count, dtype=depths.dtype, device=depths.device)
        uniform = steps.expand(len(depths), count)
    uniform = uniform.contiguous()
    above = torch.searchsorted(distribution[:, :-1].contiguous(), uniform, right=True)
    below = (above - 1).clamp(min=0)
    low, high = distribution.gather(-1, below), distribution.gather(-1, above)
    step = torch.where(high - low < SMALLEST_STEP, torch.ones_like(low), high - low)
    start, end = bins.gather(-1, below), bins.gather(-1, above)
    drawn = start + (uniform - low) / step * (end - start)
    fine = 1 / drawn if inverse else drawn
    return torch.cat([coarse, fine], -1).sort(-1).values


def points_at(
    origins: Float[Tensor, "rays 3"], directions: Float[Tensor, "rays 3"], depths: Float[Tensor, "rays samples"]
) -> Float[Tensor, "rays samples 3"]:
    """P = o + z d."""
    return origins[:, None] + depths[..., None] * directions[:, None]
