"""Training objectives (section 2.3)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .gating import Gates

DataTerm = Literal["l2", "l1"]
WEIGHT_CAP = 1e6
"""Largest weight of the exponential L1 penalty; the released form overflows from atom 128 on for a = 0.5."""


def data_loss(
    preds: Float[Tensor, "batch points channels"],
    targets: Float[Tensor, "batch points channels"],
    kind: DataTerm = "l2",
) -> Float[Tensor, ""]:
    """Mean squared or absolute error over signals, coordinates and channels."""
    error = preds - targets
    return error.square().mean() if kind == "l2" else error.abs().mean()


def l1_weights(
    num_experts: int,
    base: float = 1.0,
    *,
    cap: float = WEIGHT_CAP,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, " experts"]:
    """``ω_i = 1 / a^i``, at most ``cap``: a < 1 makes atoms of low index cheap, so that they carry the low-rank part.

    Args:
        num_experts: E.
        base: a, positive.
        cap: bound on the weights; infinity gives the released form.
        device: where the result lies.
        dtype: its floating type.

    Raises:
        ValueError: ``base`` is not positive, or a weight overflows.

    """
    if base <= 0:
        raise ValueError(f"the base of the exponential weights must be positive, got {base}")
    weights = (1 / base ** torch.arange(num_experts, dtype=torch.float64)).clamp(max=cap).to(dtype)
    if not bool(weights.isfinite().all()):
        raise ValueError(f"the weights 1/{base}^i overflow for {num_experts} atoms; give a finite cap or fewer atoms")
    return weights.to(device)


def sparsity_loss(gates: Gates, weights: Float[Tensor, " experts"]) -> Float[Tensor, ""]:
    """Weighted L1 penalty of the warm-up, ``mean_{s,i} ω_i |g_{s,i}|``."""
    return (weights * gates.dense.abs()).mean()
