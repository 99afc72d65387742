"""Dropout of the blocks. A step draws more random numbers than anything else; on CPUs 16 bits each are enough."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

LEVELS = 2**16


def dropout(x: Float[Tensor, "*batch"], p: float, training: bool) -> Float[Tensor, "*batch"]:
    """Zero each value with probability p and scale the others by the inverse of their share, in training.

    On CPUs p is rounded to a multiple of 2^-16 and one 64-bit draw of the global generator decides over four values,
    which takes a tenth of the library's time.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    dropped = min(round(p * LEVELS), LEVELS - 1)
    if not training or dropped == 0:
        return x
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - LEVELS // 2
    return x * kept.to(x.dtype).mul_(LEVELS / (LEVELS - dropped))
