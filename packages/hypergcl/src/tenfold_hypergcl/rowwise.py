"""The encoder's dense arithmetic - norm, dropout, Linear, ReLU, dropout - as one operation over blocks of rows.

A block fits the processor's cache, so the elementwise steps between two matrix products cost almost nothing there, and only what the
gradient needs is kept: the input, its row statistics, one byte a dropped value, the output. The normalised input is computed again.
"""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tenfold_hypergcl.products import multiply, stored

LEVELS = 1 << 16
CACHED_ROWS = 1024
"""Rows of one block where a cache is to be used."""


def threshold(p: float) -> tuple[int, float]:
    """Of ``LEVELS`` equally likely values how many are dropped, and the scale that keeps the mean exact for that count."""
    dropped = round(p * LEVELS)
    return dropped, LEVELS / (LEVELS - dropped)


def draw_kept(like: Tensor, p: float) -> Bool[Tensor, "..."]:
    """A mask that is False with probability ``round(p * 65536) / 65536``: four values a random 64-bit word, so several times cheaper
    than one Bernoulli draw a value. Drawn from the global generator of ``like``'s device.
    """
    dropped = threshold(p)[0]
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    levels = words.view(torch.int16)[: like.numel()].view(like.shape)
    lowest = dropped - LEVELS // 2
    if like.device.type != "cpu" or not dropped:
        return levels >= lowest
    # A processor compares value by value, but clamps many integers at once: to 0 below and 1 above, the two bytes of a boolean.
    return levels.clamp_(lowest - 1, lowest).sub_(lowest - 1).to(torch.int8).view(torch.bool)


def thinned(x: Tensor, kept: Bool[Tensor, "..."], p: float) -> Tensor:
    """``x`` where ``kept`` and zero elsewhere, scaled so that the mean stays."""
    scale = threshold(p)[1]
    if x.device.type != "cpu":
        return torch.ops.aten.native_dropout_backward(x, kept, scale)
    # The product with a boolean, and the choice by one, go value by value there; integers become numbers many at once.
    return kept.view(torch.int8).to(x.dtype).mul_(x).mul_(scale)


def _row_blocks(x: Tensor) -> list[slice]:
    rows = max(x.shape[0], 1)
    step = CACHED_ROWS if x.device.type == "cpu" else rows
    return [slice(i, i + step) for i in range(0, rows, step)]


def _large(like: Tensor, rows: int) -> Tensor:
    """Memory for ``rows`` rows as those of ``like``. The first touch of a small page of memory costs more than the values in it, and
    NumPy, unlike PyTorch, asks the system for large pages.
    """
    shape = (rows, *like.shape[1:])
    return torch.from_numpy(np.empty(math.prod(shape) * like.element_size(), np.uint8)).view(like.dtype).view(shape)


class _Rows:
    """A result whose rows come block by block; a block that has all of them is taken as it is."""

    def __init__(self, count: int) -> None:
        self.count, self.whole = count, torch.empty(0)

    def put(self, rows: slice, block: Tensor) -> None:
        """The result of ``rows``."""
        if rows.start == 0:
            self.whole = block if rows.stop >= self.count else _large(block, self.count)
        if self.whole is not block:
            self.whole[rows] = block


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


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
        out, kept, mean, rstd = (_Rows(x.shape[0]) for _ in range(4))
        for rows in _row_blocks(x):
            part = x[rows]
            if gain is not None:
                part, own_mean, own_rstd = torch.native_layer_norm(part, part.shape[1:], gain, shift, eps)
                mean.put(rows, own_mean)
                rstd.put(rows, own_rstd)
            if p_in:
                mask = draw_kept(part, p_in)
                part = thinned(part, mask, p_in)
                kept.put(rows, mask)
            result = multiply(part, weight, bias, relu)
            if p_out:
                result = thinned(result, draw_kept(result, p_out), p_out)
            out.put(rows, result)
        ctx.eps, ctx.p_in, ctx.relu, ctx.p_out = eps, p_in, relu, p_out
        whole = out.whole if relu else None
        ctx.save_for_backward(x, gain, shift, weight, mean.whole, rstd.whole, kept.whole, whole)
        return out.whole

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, shift, weight, mean, rstd, kept, out = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        need_x, need_gain, need_shift, need_weight, need_bias = ctx.needs_input_grad[:5]
        # Where the input needs no gradient, those of gain and shift follow from g.T @ normalised, and a product is saved.
        fixed_input = gain is not None and not need_x and not ctx.p_in and need_weight and need_bias
        need_norm = gain is not None and not fixed_input and (need_x or need_gain or need_shift)
        own_gain, own_shift = (None, None) if fixed_input else (gain, shift)
        grad_x = _Rows(x.shape[0])
        grad_gain = grad_shift = grad_weight = grad_bias = None
        transposed = stored(weight.T)
        for rows in _row_blocks(x):
            g = grad[rows]
            if ctx.relu:
                # A value survived the ReLU and the dropout exactly when the output is positive.
                g = torch.ops.aten.threshold_backward(g, out[rows], 0)
                if ctx.p_out:
                    g.mul_(threshold(ctx.p_out)[1])
            if need_bias:
                grad_bias = _add(grad_bias, g.sum(0))
            if need_weight:
                part = x[rows]
                if gain is not None:
                    part = torch.native_layer_norm(part, part.shape[1:], own_gain, own_shift, ctx.eps)[0]
                if ctx.p_in:
                    part = thinned(part, kept[rows], ctx.p_in)
                grad_weight = g.T @ part if grad_weight is None else grad_weight.addmm_(g.T, part)
            if not (need_x or need_norm):
                continue
            g = multiply(g, transposed)
            if ctx.p_in:
                g = thinned(g, kept[rows], ctx.p_in)
            if gain is not None:
                needs = [need_x, need_gain, need_shift]
                g, dgain, dshift = torch.ops.aten.native_layer_norm_backward(
                    g, x[rows], x.shape[1:], mean[rows], rstd[rows], gain, shift, needs
                )
                if need_gain:
                    grad_gain = _add(grad_gain, dgain)
                if need_shift:
                    grad_shift = _add(grad_shift, dshift)
            if need_x:
                grad_x.put(rows, g)
        if fixed_input:
            assert grad_weight is not None
            assert grad_bias is not None
            grad_gain, grad_shift = (weight * grad_weight).sum(0), grad_bias @ weight
            grad_weight = torch.addr(grad_weight * gain, grad_bias, shift)
        return grad_x.whole if need_x else None, grad_gain, grad_shift, grad_weight, grad_bias, None, None, None, None


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
