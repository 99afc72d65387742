"""Position encoding (section 2.4)."""

import torch
from jaxtyping import Float
from torch import Tensor

OCTAVES = 10


def encode(x: Float[Tensor, "*batch axes"], octaves: int = OCTAVES) -> Float[Tensor, "*batch encoded"]:
    """[x, sin(x), cos(x), sin(2x), cos(2x), ..., cos(2^(octaves-1) x)], each a block of all coordinates.

    World coordinates, no factor π. Computed in at least single precision, as 2^9 x needs it, and returned so.
    """
    x = x if x.dtype == torch.float64 else x.float()
    frequency = 2.0 ** torch.arange(octaves, dtype=x.dtype, device=x.device)
    angle = x[..., None, None, :] * frequency[:, None, None]
    waves = torch.cat([angle.sin(), angle.cos()], -2)  # [..., octaves, 2, axes]
    return torch.cat([x, waves.flatten(-3)], -1)
