"""The trunk's backward pass, through the points that count.

A sample of zero density has no weight in its ray, and the ReLU passes nothing to its raw density: the gradient by its
features is exactly zero. In a trained scene most samples are of that kind, so the products of the backward pass, two
thirds of a step, are made of the other rows alone. The sums are the same ones, less their zeros.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

DENSE = 0.8  # above this share of rows, copying them together costs more than it saves


def layer(
    weight: Tensor, bias: Tensor, encoded: Float[Tensor, "*batch points"], h: Float[Tensor, "*batch size"] | None
) -> Float[Tensor, "*batch width"]:
    """ReLU(W [γ(x), h] + b), or of γ(x) alone. The product is split instead of copying [γ(x), h] together."""
    if h is None:
        return F.relu(F.linear(encoded, weight, bias), inplace=True)
    if weight.shape[1] == h.shape[-1]:
        return F.relu(F.linear(h, weight, bias), inplace=True)
    points = encoded.shape[-1]
    near, far = weight[:, :points], weight[:, points:]
    return F.relu(F.linear(encoded, near, bias).add_(F.linear(h, far)), inplace=True)


def plain(encoded: Float[Tensor, "*batch points"], parameters: Sequence[Tensor]) -> Float[Tensor, "*batch width"]:
    """All layers, differentiated by autograd; `parameters` are weight and bias in turn."""
    h = None
    for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
        h = layer(weight, bias, encoded, h)
    assert h is not None
    return h


class Sparse(torch.autograd.Function):
    """`plain`, with a backward pass that leaves rows out whose gradient is zero."""

    @staticmethod
    def forward(ctx: Any, encoded: Float[Tensor, "rows points"], *parameters: Tensor) -> Float[Tensor, "rows width"]:
        """The features of rows of encoded points."""
        hidden: list[Tensor] = []
        for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
            hidden.append(layer(weight, bias, encoded, hidden[-1] if hidden else None))
        ctx.save_for_backward(encoded, *parameters, *hidden)
        return hidden[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, "rows width"]) -> tuple[Tensor | None, ...]:
        """Gradients by the encoded points and the parameters, where they are wanted."""
        encoded, *saved = ctx.saved_tensors
        depth = len(saved) // 3
        weights, hidden = saved[: 2 * depth : 2], saved[2 * depth :]
        total, points = encoded.shape
        rows = (gradient.abs().amax(-1) != 0).nonzero()[:, 0]  # several times faster than any(-1)
        chosen = len(rows) < DENSE * total

        def taken(x: Tensor) -> Tensor:
            return x[rows] if chosen else x

        found: list[Tensor | None] = [None] * (2 * depth)
        by_points: Tensor | None = None
        picked, after, gradient = taken(encoded), taken(hidden[-1]), taken(gradient)
        for i in reversed(range(depth)):
            gradient = torch.ops.aten.threshold_backward(gradient, after, 0)
            before = taken(hidden[i - 1]) if i else picked
            joined = weights[i].shape[1] > before.shape[1]
            if ctx.needs_input_grad[1 + 2 * i]:
                inputs = (picked, before) if joined else (before,)
                found[2 * i] = torch.cat([gradient.T @ x for x in inputs], -1)
            if ctx.needs_input_grad[2 + 2 * i]:
                found[2 * i + 1] = gradient.sum(0)
            if ctx.needs_input_grad[0] and (joined or i == 0):
                here = gradient @ weights[i][:, :points]
                by_points = here if by_points is None else by_points.add_(here)
            if i:
                gradient = gradient @ (weights[i][:, points:] if joined else weights[i])
            after = before
        if by_points is not None and chosen:
            by_points = by_points.new_zeros(total, points).index_copy_(0, rows, by_points)
        return by_points, *found


def trunk(encoded: Float[Tensor, "*batch points"], parameters: Sequence[Tensor]) -> Float[Tensor, "*batch width"]:
    """Features of encoded points: on a CPU by `Sparse`, elsewhere, where counting rows would wait for the device, and
    where a compiler or autocast has its own plans, by `plain`.
    """
    differentiated = torch.is_grad_enabled() and (
        encoded.requires_grad or any(parameter.requires_grad for parameter in parameters)
    )
    if (
        not differentiated
        or encoded.device.type != "cpu"
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return plain(encoded, parameters)
    return Sparse.apply(encoded.flatten(0, -2), *parameters).unflatten(0, encoded.shape[:-1])
