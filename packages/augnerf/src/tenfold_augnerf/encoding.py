"""Positional encoding γ (section 2.1), and its expectation under a Gaussian (mip-NeRF)."""

import torch
from jaxtyping import Float
from torch import Tensor


def encoded_size(size: int, octaves: int) -> int:
    """Length of γ: D (1 + 2 L)."""
    return size * (1 + 2 * octaves)


def encode(x: Float[Tensor, "*batch d"], octaves: int) -> Float[Tensor, "*batch encoded"]:
    """γ_L(x) = [x, sin(2⁰x), cos(2⁰x), …, sin(2^(L-1)x), cos(2^(L-1)x)], blocks of D values each, without a factor π.

    One sine and one cosine over all octaves at once; L = 0 is the identity.
    """
    if octaves == 0:
        return x
    scales = torch.exp2(torch.arange(octaves, dtype=x.dtype, device=x.device))
    angles = x[..., None, :] * scales[:, None]
    waves = torch.stack([angles.sin(), angles.cos()], -2)  # [*batch, octave, sin or cos, d]
    return torch.cat([x, waves.flatten(-3)], -1)


def encode_gaussian(
    mean: Float[Tensor, "*batch 3"], variance: Float[Tensor, "*batch 3"], octaves: int
) -> Float[Tensor, "*batch encoded"]:
    """E[sin 2ᵏx], E[cos 2ᵏx] for x ~ N(mean, diag variance): waves of the mean, damped by exp(-½ 4ᵏ variance).

    Order [sin(2⁰), …, sin(2^(L-1)), cos(2⁰), …], 6 L values: mip-NeRF's integrated encoding, which leaves x itself out.
    """
    scales = torch.exp2(torch.arange(octaves, dtype=mean.dtype, device=mean.device))
    angles = mean[..., None, :] * scales[:, None]
    damping = torch.exp(-0.5 * variance[..., None, :] * scales.square()[:, None])
    return torch.cat([(damping * angles.sin()).flatten(-2), (damping * angles.cos()).flatten(-2)], -1)
