"""Sparse codes chosen from the observations: orthogonal matching pursuit and FISTA (sections 2.5 and 11)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .fitting import System, ridge


def omp(
    problem: System, k: int, *, penalty: float = 1e-8
) -> tuple[Float[Tensor, "batch code"], Int[Tensor, "batch active"]]:
    """Orthogonal matching pursuit: k times, take the atom that correlates best with the residual and refit.

    The biases are always fitted. All signals advance together through a pivoted Cholesky factor of the atoms' inner
    products (Batch-OMP, Rubinstein et al. 2008): once these are there, step j costs ``O(j · E)`` a signal.

    Args:
        problem: what was observed.
        k: atoms to choose.
        penalty: λ of the final fit on the support, relative to the mean squared residual.

    Returns:
        Codes, and the atoms in the order in which they were chosen.

    Raises:
        ValueError: k atoms and the biases are more unknowns than observations, or more atoms than there are.

    """
    batch, experts = len(problem.targets), problem.num_experts
    width = problem.design.shape[-1]
    if not 1 <= k <= experts:
        raise ValueError(f"the number of atoms to choose must lie in 1..{experts}, got {k}")
    if k + width - experts > int(problem.counts.min()):
        raise ValueError(
            f"{k} atoms and {width - experts} biases are more unknowns "
            f"than the {int(problem.counts.min())} observed numbers"
        )
    design, targets = problem.design.double(), problem.targets.double()
    if problem.weights is not None:
        root = problem.weights.double().sqrt()
        design, targets = design * root[..., None], targets * root
    norms = design[..., :experts].norm(dim=-2).clamp(min=1e-12)
    biases = torch.linalg.qr(design[..., experts:]).Q
    atoms = design[..., :experts] - biases @ (biases.mT @ design[..., :experts])  # the biases are fitted first
    shared = atoms.ndim == 2
    match = targets @ atoms if shared else torch.bmm(targets[:, None], atoms).squeeze(1)
    gram = atoms.T @ atoms if shared else None
    energy = atoms.square().sum(dim=-2).expand(batch, -1).clone()
    directions = match.new_zeros(batch, k, experts)
    chosen = torch.empty(batch, k, dtype=torch.long, device=design.device)
    free = torch.ones(batch, experts, dtype=torch.bool, device=design.device)
    every = torch.arange(batch, device=design.device)
    for step in range(k):
        atom = torch.where(free, match.abs() / norms, -1.0).argmax(dim=1)
        chosen[:, step], free[every, atom] = atom, False
        row = torch.bmm(atoms[every, :, atom][:, None], atoms).squeeze(1) if gram is None else gram[atom]
        done = directions[:, :step]
        row = row - torch.bmm(done[every, :, atom][:, None], done).squeeze(1)
        length = energy[every, atom].clamp(min=1e-24).sqrt()[:, None]
        direction = row / length
        match = match - match[every, atom][:, None] / length * direction
        energy = energy - direction.square()
        directions[:, step] = direction
    return ridge(problem, chosen, penalty=penalty), chosen


def fista(
    problem: System, penalty: float, *, steps: int = 200, start: Float[Tensor, "batch code"] | None = None
) -> Float[Tensor, "batch code"]:
    """Codes that minimise ``½ mean (design @ code - targets)² + penalty · ‖coefficients‖₁``, biases free.

    Accelerated proximal gradient with the step of the largest eigenvalue (by power iteration, with a margin).

    Args:
        problem: what was observed.
        penalty: λ >= 0.
        steps: iterations.
        start: first iterate; None starts at zero.

    Raises:
        ValueError: the penalty is negative.

    """
    if penalty < 0:
        raise ValueError(f"the l1 penalty must not be negative, got {penalty}")
    weights = 1 / problem.counts[:, None]
    if problem.weights is not None:
        weights = weights * problem.weights
    batch, width = len(problem.targets), problem.design.shape[-1]
    probe = torch.ones(batch, width, device=problem.targets.device, dtype=problem.targets.dtype) / width**0.5
    eigenvalue = probe.new_ones(batch, 1)
    for _ in range(30):
        probe = problem.adjoint(problem.predict(probe) * weights)
        eigenvalue = probe.norm(dim=1, keepdim=True)
        probe = probe / eigenvalue
    size = 1 / (1.1 * eigenvalue)
    threshold = (size * penalty).repeat(1, width)
    threshold[:, problem.num_experts :] = 0
    code = torch.zeros_like(probe) if start is None else start
    ahead, momentum = code, 1.0
    for _ in range(steps):
        gradient = problem.adjoint((problem.predict(ahead) - problem.targets) * weights)
        moved = ahead - size * gradient
        after = moved.sign() * (moved.abs() - threshold).clamp(min=0)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = after + (momentum - 1) / following * (after - code)
        code, momentum = after, following
    return code
