"""Codes in the presence of outliers: occlusions, moving objects (sections 2.5 and 11)."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .fitting import System, columns, ridge

Robust = Literal["l1", "huber"]


class RobustFit(NamedTuple):
    """Codes and what does not belong to the signal."""

    code: Float[Tensor, "batch code"]
    residual: Float[Tensor, "batch points"]
    """root mean square over the channels of each point"""
    outliers: Bool[Tensor, "batch points"]


def _point_residual(problem: System, code: Tensor) -> Tensor:
    channels = problem.design.shape[-1] - problem.num_experts
    difference = problem.predict(code) - problem.targets
    return difference.unflatten(1, (-1, channels)).square().mean(dim=-1).sqrt()


def _observed_points(problem: System) -> Tensor:
    channels = problem.design.shape[-1] - problem.num_experts
    if problem.weights is None:
        return torch.ones_like(problem.targets[:, ::channels], dtype=torch.bool)
    return problem.weights[:, ::channels] > 0


def outliers(
    problem: System, code: Float[Tensor, "batch code"], threshold: float = 4.0, floor: float = 0.02
) -> RobustFit:
    """Points whose residual exceeds ``threshold`` robust standard deviations of the signal, and at least ``floor``."""
    residual = _point_residual(problem, code)
    seen = torch.where(_observed_points(problem), residual, torch.nan)
    scale = 1.4826 * seen.nanmedian(dim=1, keepdim=True).values
    return RobustFit(code, residual, residual > (threshold * scale).clamp(min=floor))


def irls(
    problem: System,
    support: Int[Tensor, "batch active"] | None = None,
    *,
    loss: Robust = "l1",
    delta: float = 0.01,
    penalty: float = 1e-4,
    steps: int = 20,
) -> RobustFit:
    """Iteratively reweighted ridge; a point is trusted as a whole, all its channels together.

    Args:
        problem: what was observed.
        support: atoms of each signal; None uses all.
        loss: ``l1`` weighs a point by 1/max(r, δ); ``huber`` by min(1, δ/r).
        delta: δ, a residual regarded as noise.
        penalty: λ of the ridge.
        steps: reweightings.

    """
    channels = problem.design.shape[-1] - problem.num_experts
    base = torch.ones_like(problem.targets) if problem.weights is None else problem.weights
    observed = _observed_points(problem).to(base.dtype)
    share = observed.mean(dim=1, keepdim=True)  # of the rows, which are as many as the signal seen best has
    code = ridge(problem, support, penalty=penalty)
    for _ in range(steps):
        residual = _point_residual(problem, code)
        trust = 1 / residual.clamp(min=delta) if loss == "l1" else (delta / residual.clamp(min=1e-12)).clamp(max=1)
        trust = trust / ((trust * observed).mean(dim=1, keepdim=True) / share)
        weights = base * trust.repeat_interleave(channels, dim=1)
        code = ridge(problem._replace(weights=weights), support, penalty=penalty)
    return outliers(problem, code)


def admm(
    problem: System,
    support: Int[Tensor, "batch active"] | None = None,
    *,
    penalty: float = 1e-4,
    rho: float = 10.0,
    steps: int = 100,
) -> RobustFit:
    """Least absolute deviations by the alternating direction method: ``mean |design @ code - targets|`` and a small
    ridge.

    Every step solves with the same matrix; when all signals share their rows and atoms it is factored once.

    Args:
        problem: what was observed.
        support: atoms of each signal; None uses all.
        penalty: weight of ½‖coefficients‖².
        rho: penalty of the splitting.
        steps: iterations.

    """
    width = problem.design.shape[-1]
    cols = columns(problem.num_experts, width, support, problem.design.device)
    matrix = problem.design if problem.weights is None else problem.design * problem.weights.sqrt()[..., None]
    targets = problem.targets if problem.weights is None else problem.targets * problem.weights.sqrt()
    if matrix.ndim == 2:
        matrix = matrix[None]
    keep = torch.zeros(cols.shape[0] if cols.ndim == 2 else 1, width, device=matrix.device, dtype=matrix.dtype)
    keep = keep.scatter(1, cols if cols.ndim == 2 else cols[None], 1.0)
    matrix = (matrix * keep[:, None]).double()
    rows = problem.counts.double()[: len(matrix), None, None]
    damping = torch.full((width,), float(penalty / rho), dtype=torch.float64, device=matrix.device)
    damping[problem.num_experts :] = 1e-10
    gram = matrix.mT @ matrix / rows + torch.diag(damping)
    factor = torch.linalg.cholesky(gram + torch.diag_embed(1.0 - keep.double()))
    targets = targets.double()
    excess, dual = torch.zeros_like(targets), torch.zeros_like(targets)
    code = targets.new_zeros(len(targets), width)
    for _ in range(steps):
        moment = torch.einsum("brp,br->bp", matrix.expand(len(targets), -1, -1), targets + excess - dual) / rows[..., 0]
        code = torch.cholesky_solve(moment[..., None], factor).squeeze(-1)
        predicted = torch.einsum("brp,bp->br", matrix.expand(len(targets), -1, -1), code)
        moved = predicted - targets + dual
        excess = moved.sign() * (moved.abs() - 1 / rho).clamp(min=0)
        dual = moved - excess
    return outliers(problem, code.to(problem.targets.dtype))
