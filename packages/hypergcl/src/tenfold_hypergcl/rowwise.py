"""The encoder's dense arithmetic - norm, dropout, Linear, ReLU, dropout - as one operation over blocks of rows.

A block fits the processor's cache, so the elementwise steps between two matrix products cost almost nothing there, and only what the
gradient needs is kept: the input, its row statistics, one byte a dropped value, the output. The normalised input is computed again.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tenfold_hypergcl.products import multiply

LEVELS = 1 << 16
CACHED_ROWS = 1024
"""Rows of one block where a cache is to be used."""


def threshold(p: float) -> tuple[int, float]:
    """Of ``LEVELS`` equally likely values how many are dropped, and the scale that keeps the mean exact for that count."""
    dropped = round(p * LEVELS)
    return dropped, LEVELS / (LEVELS - dropped)


def random_drop_mask(like: Tensor, p: float) -> Bool[Tensor, "..."]:
    """A mask that is True with probability ``round(p * 65536) / 65536``: four values a random 64-bit word, so several times cheaper
    than one Bernoulli draw a value. Drawn from the global generator of ``like``'s device.
    """
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    levels = words.view(torch.int16)[: like.numel()]
    return (levels < threshold(p)[0] - LEVELS // 2).view(like.shape)


def _row_blocks(x: Tensor) -> list[slice]:
    step = CACHED_ROWS if x.device.type == "cpu" else max(x.shape[0], 1)
    return [slice(i, i + step) for i in range(0, x.shape[0], step)]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor | None,
        shift: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        p_in: float,
        relu: bool,
        p_out: float,
    ) -> Tensor:
        x = x.contiguous()
        out = x.new_empty(x.shape[0], weight.shape[0])
        mask = torch.empty(x.shape if p_in else 0, dtype=torch.bool, device=x.device)
        stats = x.new_empty(2, 0 if gain is None else x.shape[0], 1)
        for rows in _row_blocks(x):
            part = x[rows]
            if gain is not None:
                part, mean, rstd = torch.native_layer_norm(part, part.shape[1:], gain, shift, eps)
                stats[0, rows], stats[1, rows] = mean, rstd
            if p_in:
                mask[rows] = random_drop_mask(part, p_in)
                part = part.masked_fill(mask[rows], 0).mul_(threshold(p_in)[1])
            result = multiply(part, weight, bias, relu)
            if p_out:
                result.masked_fill_(random_drop_mask(result, p_out), 0).mul_(threshold(p_out)[1])
            out[rows] = result
        ctx.eps, ctx.p_in, ctx.relu, ctx.p_out = eps, p_in, relu, p_out
        ctx.save_for_backward(x, gain, shift, weight, stats, mask, out if relu else None)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, shift, weight, stats, mask, out = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        need_x, need_gain, need_shift, need_weight, need_bias = ctx.needs_input_grad[:5]
        need_norm = gain is not None and (need_x or need_gain or need_shift)
        grad_x = torch.empty_like(x) if need_x else None
        grad_gain = torch.zeros_like(gain) if need_gain else None
        grad_shift = torch.zeros_like(shift) if need_shift else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = x.new_zeros(weight.shape[0]) if need_bias else None
        transposed = weight.T.contiguous()
        for rows in _row_blocks(x):
            g = grad[rows]
            if ctx.relu:
                # A value survived the ReLU and the dropout exactly when the output is positive.
                g = torch.ops.aten.threshold_backward(g, out[rows], 0)
                if ctx.p_out:
                    g.mul_(threshold(ctx.p_out)[1])
            if grad_bias is not None:
                grad_bias += g.sum(0)
            if grad_weight is not None:
                part = x[rows]
                if gain is not None:
                    part = torch.native_layer_norm(part, part.shape[1:], gain, shift, ctx.eps)[0]
                if ctx.p_in:
                    part = part.masked_fill(mask[rows], 0).mul_(threshold(ctx.p_in)[1])
                grad_weight.addmm_(g.T, part)
            if not (need_x or need_norm):
                continue
            g = multiply(g, transposed)
            if ctx.p_in:
                g.masked_fill_(mask[rows], 0).mul_(threshold(ctx.p_in)[1])
            if gain is not None:
                g, dgain, dshift = torch.ops.aten.native_layer_norm_backward(
                    g,
                    x[rows],
                    x.shape[1:],
                    stats[0, rows],
                    stats[1, rows],
                    gain,
                    shift,
                    [need_x, need_gain, need_shift],
                )
                if grad_gain is not None:
                    grad_gain += dgain
                if grad_shift is not None:
                    grad_shift += dshift
            if grad_x is not None:
                grad_x[rows] = g
        return grad_x, grad_gain, grad_shift, grad_weight, grad_bias, None, None, None, None


def layer(
    x: Float[Tensor, "rows in"],
    norm: torch.nn.LayerNorm | None,
    linear: torch.nn.Linear,
    p_in: float = 0.0,
    relu: bool = False,
    p_out: float = 0.0,
) -> Float[Tensor, "rows out"]:
    """``dropout(relu(Linear(dropout(norm(x), p_in))), p_out)``, each step but the Linear optional (``p_out`` needs ``relu``)."""
    gain, shift = (None, None) if norm is None else (norm.weight, norm.bias)
    eps = 0.0 if norm is None else norm.eps
    return _Layer.apply(x, gain, shift, linear.weight, linear.bias, eps, p_in, relu, p_out)
