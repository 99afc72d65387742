"""Codes of new signals: a linear least-squares problem in the coefficients, solved in closed form (sections 2.5 and
11).

For a fixed dictionary the samples of a signal are ``design @ code``; pixels, masked pixels, projections and scattered
points of a distance field differ in the rows of ``design`` only. Rows run over points, channels innermost.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .dictionary import NeuralDictionary
from .gates import CodebookGate

ENTRIES = 1 << 26
"""Numbers held at once, roughly: signals are coded in parts of as many as this allows."""
GATED = 256
"""Signals that a gate looks at at a time."""


class System(NamedTuple):
    """What was observed of a batch of signals, as a linear system in their codes."""

    design: Float[Tensor, "*batch rows code"]
    """[rows, code] shared by all signals, or [batch, rows, code]"""
    targets: Float[Tensor, "batch rows"]
    weights: Float[Tensor, "batch rows"] | None
    """weight of each squared residual; 0 marks padding; None means 1"""
    num_experts: int
    """the first columns are atoms, the rest biases"""

    @property
    def counts(self) -> Float[Tensor, " batch"]:
        """Observed rows of each signal."""
        if self.weights is None:
            return self.targets.new_full((len(self.targets),), float(self.targets.shape[1]))
        return (self.weights > 0).sum(dim=1).to(self.targets.dtype)

    def predict(self, code: Float[Tensor, "batch code"]) -> Float[Tensor, "batch rows"]:
        """``design @ code`` of each signal."""
        if self.design.ndim == 2:
            return code @ self.design.T
        return torch.bmm(self.design, code[..., None]).squeeze(-1)

    def adjoint(self, residual: Float[Tensor, "batch rows"]) -> Float[Tensor, "batch code"]:
        """``designᵀ residual`` of each signal."""
        if self.design.ndim == 2:
            return residual @ self.design
        return torch.bmm(residual[:, None], self.design).squeeze(1)


def system(
    design: Float[Tensor, "rows code"],
    targets: Float[Tensor, "batch points channels"],
    mask: Bool[Tensor, "batch points"] | None = None,
) -> System:
    """The linear system of a batch of signals; only observed samples enter it.

    Args:
        design: ``model.design(coords)`` or ``projection_design``.
        targets: samples of each signal; what lies at masked points is never read.
        mask: True where a sample was observed; None means everywhere.

    Raises:
        ValueError: sizes do not fit, an observed sample is not finite, or a signal has no observed sample.

    """
    batch, points, channels = targets.shape
    if design.shape[0] != points * channels:
        raise ValueError(
            f"the design has {design.shape[0]} rows, the signals have {points} samples of {channels} channels; "
            "evaluate the design at the coordinates of the samples"
        )
    num_experts = design.shape[1] - channels
    if mask is None:
        _check_finite(targets)
        return System(design, targets.flatten(1), None, num_experts)
    if mask.shape != (batch, points):
        raise ValueError(f"a mask marks each of the {batch}×{points} samples, got shape {tuple(mask.shape)}")
    counts = mask.sum(dim=1)
    if not bool(counts.all()):
        empty = int((counts == 0).nonzero()[0])
        raise ValueError(f"signal {empty} has no observed sample: its mask is False everywhere")
    width = int(counts.max())
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    kept = mask.gather(1, order)
    rows = (order[..., None] * channels + torch.arange(channels, device=order.device)).flatten(1)
    weights = kept.repeat_interleave(channels, dim=1).to(targets.dtype)
    observed = torch.where(weights > 0, targets.flatten(1).gather(1, rows), 0)
    _check_finite(observed)
    if bool((rows == rows[0]).all()) and bool(kept.all()):
        return System(design[rows[0]], observed, None, num_experts)
    return System(design[rows], observed, weights, num_experts)


def _check_finite(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError("an observed sample is not a finite number; mask it or repair the file it came from")


def gate_input(
    images: Float[Tensor, "batch *spatial channels"], mask: Bool[Tensor, "batch *spatial"] | None
) -> Float[Tensor, "batch *spatial channels"]:
    """What a gate may see of partly observed images: unobserved samples replaced by the mean of the observed ones.

    A gate that saw the whole image would leak what the experiment hides (section 12).
    """
    if mask is None:
        return images
    seen = torch.where(mask[..., None], images, 0)
    spatial = tuple(range(1, images.ndim - 1))
    mean = seen.sum(dim=spatial, keepdim=True) / mask.sum(dim=spatial)[:, None].clamp(min=1).view(
        -1, *[1] * (len(spatial) + 1)
    )
    return torch.where(mask[..., None], images, mean)


@torch.no_grad()
def gate_code(
    model: NeuralDictionary,
    images: Float[Tensor, "batch *spatial channels"],
    mask: Bool[Tensor, "batch *spatial"] | None = None,
) -> tuple[Float[Tensor, "batch code"], Int[Tensor, "batch active"]]:
    """The gate's code of each image and its support, from the observed samples only.

    Raises:
        ValueError: the gate is a table of training signals, which knows nothing of a new one.

    """
    if isinstance(model.gate_generator, CodebookGate):
        raise ValueError(
            "a codebook gate stores the codes of its training signals and cannot predict one; "
            "fit without the gate (all atoms, or OMP to choose them)"
        )
    code = torch.cat([model.sparse_code(part) for part in gate_input(images, mask).split(GATED)])
    support = code[:, : model.config.num_experts].abs().topk(model.config.num_topk, dim=1).indices
    return code, support


def columns(
    num_experts: int, width: int, support: Int[Tensor, "batch active"] | None, device: torch.device
) -> Int[Tensor, "batch cols"] | Int[Tensor, " cols"]:
    """Columns of the design that take part: the support of each signal, and always the biases."""
    if support is None:
        return torch.arange(width, device=device)
    biases = torch.arange(num_experts, width, device=device).expand(len(support), -1)
    return torch.cat([support, biases], dim=1)


def ridge(
    problem: System,
    support: Int[Tensor, "batch active"] | None = None,
    *,
    penalty: float = 1e-4,
    max_entries: int = ENTRIES,
) -> Float[Tensor, "batch code"]:
    """Codes that minimise ``mean (design @ code - targets)² + penalty · ‖coefficients‖²``, biases free (section 2.5).

    The normal equations are solved in float64. Signals that share their rows share one Gram matrix.

    Args:
        problem: what was observed.
        support: atoms of each signal; None uses all.
        penalty: λ, relative to the mean (not the sum) of the squared residuals.
        max_entries: numbers held at once; bounds the memory when every signal has rows of its own.

    Returns:
        Codes, zeros outside the support.

    Raises:
        ValueError: λ = 0 and the observations do not determine the code.

    """
    design, targets, _, num_experts = problem
    width = design.shape[-1]
    cols = columns(num_experts, width, support, design.device)
    unknowns = cols.shape[-1]
    if penalty == 0 and int(problem.counts.min()) < unknowns:
        raise ValueError(
            f"{int(problem.counts.min())} observed numbers do not determine {unknowns} unknowns; "
            "give a positive penalty, fewer active atoms or more samples"
        )
    diagonal = torch.full((unknowns,), penalty, dtype=torch.float64, device=design.device)
    diagonal[unknowns - (width - num_experts) :] = 0
    if design.ndim == 2 and problem.weights is None:
        rows = design.shape[0]
        gram, moment = (design.T @ design).double() / rows, (targets @ design).double() / rows
        if support is not None:
            gram = gram[cols[:, :, None], cols[:, None, :]]
            moment = moment.gather(1, cols)
        return _scatter(_solve_normal(gram, moment, diagonal), cols, width).to(targets.dtype)
    per_signal = targets.shape[1] * unknowns + unknowns**2
    parts = []
    for signals in torch.arange(len(targets), device=design.device).split(max(1, max_entries // per_signal)):
        cols_here = cols if cols.ndim == 1 else cols[signals]
        matrix = _take(design, signals, cols_here)
        weights = torch.ones_like(targets[signals]) if problem.weights is None else problem.weights[signals]
        weighted = matrix * (weights / problem.counts[signals, None])[..., None]
        gram = (weighted.mT @ matrix).double()
        moment = torch.einsum("brk,br->bk", weighted, targets[signals]).double()
        parts.append(_scatter(_solve_normal(gram, moment, diagonal), cols_here, width))
    return torch.cat(parts).to(targets.dtype)


def _take(design: Tensor, signals: Tensor, cols: Tensor) -> Tensor:
    """Rows and columns of the design that belong to some signals: [signals, rows, cols]."""
    if design.ndim == 2:
        chosen = design.T[cols]
        return chosen.mT if cols.ndim == 2 else chosen.T.expand(len(signals), -1, -1)
    part = design[signals]
    if cols.ndim == 1:
        return part
    return part.gather(2, cols[:, None].expand(-1, part.shape[1], -1))


def _solve_normal(gram: Tensor, moment: Tensor, diagonal: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(gram + torch.diag(diagonal))
    if bool(info.any()):
        raise ValueError(
            "the observations do not determine the code: samples repeat each other or atoms coincide there; "
            "give a positive penalty or fewer active atoms"
        )
    if factor.ndim == 2:
        return torch.cholesky_solve(moment.T, factor).T
    return torch.cholesky_solve(moment[..., None], factor).squeeze(-1)


def _scatter(values: Tensor, cols: Tensor, width: int) -> Tensor:
    index = cols if cols.ndim == 2 else cols.expand(len(values), -1)
    return values.new_zeros(len(values), width).scatter(1, index, values)


class CodePrior(NamedTuple):
    """Gaussian distribution of the codes of the training signals."""

    mean: Float[Tensor, " code"]
    covariance: Float[Tensor, "code code"]


def fit_prior(codes: Float[Tensor, "signals code"], shrinkage: float = 1e-3) -> CodePrior:
    """Mean and covariance of codes, the covariance pulled towards a multiple of the identity so that it can be
    inverted.

    Raises:
        ValueError: fewer than two codes.

    """
    if len(codes) < 2:
        raise ValueError(f"a prior needs the codes of at least two signals, got {len(codes)}")
    covariance = codes.T.cov()
    scale = covariance.diagonal().mean()
    identity = torch.eye(len(covariance), device=codes.device, dtype=codes.dtype)
    return CodePrior(codes.mean(dim=0), (1 - shrinkage) * covariance + shrinkage * scale * identity)


class Posterior(NamedTuple):
    """Gaussian posterior of the codes given the observations."""

    mean: Float[Tensor, "batch code"]
    covariance: Float[Tensor, "#batch code code"]
    """one matrix for all signals when they share their rows"""

    def deviation(self, design: Float[Tensor, "rows code"]) -> Float[Tensor, "#batch rows"]:
        """Standard deviation of every sample of the reconstruction, the noise of an observation not included."""
        return torch.einsum("rp,bpq,rq->br", design, self.covariance, design).clamp(min=0).sqrt()


def posterior(problem: System, prior: CodePrior, noise: float = 1e-4) -> Posterior:
    """Maximum a posteriori codes under a Gaussian prior, with their covariance (sections 11 and 12).

    All atoms take part; the prior replaces the sparsity. Works in the space of rows or of codes, whichever is smaller.

    Args:
        problem: what was observed.
        prior: of the codes.
        noise: variance of an observation.

    Raises:
        ValueError: the noise is not positive.

    """
    if noise <= 0:
        raise ValueError(f"the variance of the noise must be positive, got {noise}")
    mean, covariance = prior.mean.double(), prior.covariance.double()
    matrix = problem.design.double()
    matrix = matrix[None] if matrix.ndim == 2 else matrix
    targets = problem.targets.double()
    if problem.weights is not None:
        root = problem.weights.double().sqrt()
        matrix, targets = matrix * root[..., None], targets * root
    residual = targets - matrix @ mean
    identity = torch.eye(min(matrix.shape[1:]), dtype=torch.float64, device=matrix.device)
    if matrix.shape[1] < matrix.shape[2]:
        spread = matrix @ covariance
        factor = torch.linalg.cholesky(spread @ matrix.mT + noise * identity)
        gain = torch.cholesky_solve(spread, factor)
        spread_after = covariance - spread.mT @ gain
        shift = torch.einsum("brp,br->bp", gain.expand(len(targets), -1, -1), residual)
    else:
        precision = torch.linalg.inv(covariance) + matrix.mT @ matrix / noise
        spread_after = torch.cholesky_inverse(torch.linalg.cholesky(precision))
        moment = torch.einsum("brp,br->bp", matrix.expand(len(targets), -1, -1), residual) / noise
        shift = torch.einsum("bpq,bq->bp", spread_after.expand(len(targets), -1, -1), moment)
    return Posterior((mean + shift).to(problem.targets.dtype), spread_after.to(problem.targets.dtype))


def refine_codes(
    problem: System,
    code: Float[Tensor, "batch code"],
    support: Int[Tensor, "batch active"] | None = None,
    *,
    steps: int = 100,
    lr: float = 1e-2,
    keep: Collection[int] | None = None,
) -> Float[Tensor, "steps batch code"]:
    """Adam on the codes alone, the support fixed: the anytime solver of the miniature (sections 2.5 and 12).

    Gradients are written out (the problem is quadratic), so the dictionary is never run.

    Args:
        problem: what was observed.
        code: where to start: the gate's prediction (warm), or zeros (cold).
        support: atoms that may move; None lets all move.
        steps: number of steps.
        lr: step size.
        keep: numbers of steps after which the codes are wanted, 0 for the start; None: all.

    Returns:
        The codes before the first step and after each, as far as they are wanted.

    """
    keep = range(steps + 1) if keep is None else keep
    cols = columns(problem.num_experts, code.shape[1], support, code.device)
    free = _scatter(torch.ones_like(cols, dtype=code.dtype).expand(len(code), -1), cols, code.shape[1])
    scale = 2 / problem.counts[:, None]
    if problem.weights is not None:
        scale = scale * problem.weights
    first, second = torch.zeros_like(code), torch.zeros_like(code)
    trajectory = [code] if 0 in keep else []
    for t in range(1, steps + 1):
        gradient = problem.adjoint((problem.predict(code) - problem.targets) * scale) * free
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        code = code - lr * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        if t in keep:
            trajectory.append(code)
    return torch.stack(trajectory)
