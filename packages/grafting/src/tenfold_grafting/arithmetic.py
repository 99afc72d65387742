"""How far rounding can carry a bound (section 2.7): an a-priori error for one backward pass, in any arithmetic.

With u the unit roundoff and gamma_n = n u / (1 - n u), a sum of n products is off by at most gamma_n times the sum of
the products' magnitudes. In a backward pass, one step from a node to the one before it errs by gamma |A| (|W| Z + |b|),
where Z bounds the node's values over the box, and |A| is at most the sum over all paths of the products of |weights| and
of the slopes of the lines between, which are at most 1 (or |a| on a grafted neuron, and 0 on one that is never active).
Summed over the steps, that is the forward recursion

    E(W z + b) = |W| E(z) + gamma (|W| Z + |b|),      E(f(z)) = slope E(z) + gamma Z,

started with E(x) = gamma |x|. The dot products with biases and intercepts are as long as a layer. Every count below is
rounded up generously: the errors are far below the bounds they are subtracted from.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from tenfold_grafting.operations import Activation, Add, Affine, Input, Operation


def gamma(length: int, dtype: torch.dtype) -> float:
    """N u / (1 - n u), with u = 2^-24 or 2^-53.

    Raises:
        ValueError: the sum is too long for the arithmetic: nothing can be said.

    """
    unit = length * torch.finfo(dtype).eps / 2
    if unit >= 0.5:
        raise ValueError(f"a sum of {length} terms has no error bound in {dtype}")
    return unit / (1 - unit)


def node_error(
    node: Operation, before: list[Tensor], ranges: list[tuple[Tensor, Tensor]], dtype: torch.dtype, inputs: int
) -> Tensor:
    """What a backward pass that starts at a node may be off by, for each of its neurons, [batch, *shape].

    Args:
        node: the operation.
        before: the errors of the nodes it reads, in its order.
        ranges: (lower, upper) of the nodes it reads; of the input itself, the box.
        dtype: the arithmetic of the pass.
        inputs: length of the last dot product, with the box.

    """
    size = torch.Size(node.shape).numel()
    if isinstance(node, Input):
        (lower, upper), *_ = ranges
        return gamma(inputs + 8, dtype) * torch.maximum(lower.abs(), upper.abs())
    if isinstance(node, Add):
        magnitude = sum(torch.maximum(lower.abs(), upper.abs()) for lower, upper in ranges)
        return before[0] + before[1] + gamma(8, dtype) * magnitude
    (lower, upper), *_ = ranges
    magnitude = torch.maximum(lower.abs(), upper.abs())
    if isinstance(node, Activation):
        gain = (upper > 0).to(magnitude)
        share = gamma(8, dtype) * gain
        crossing = (lower < 0) & (upper > 0)
        length = min(size, int(crossing.flatten(1).sum(1).max()))
        share = share + 2 * gamma(length + 8, dtype) * crossing
        if node.mask is None or node.slope is None or node.intercept is None:
            return gain * before[0] + share * magnitude
        steep, constant = node.slope.abs(), node.intercept.abs()
        line = steep * before[0] + gamma(size + 8, dtype) * (2 * steep * magnitude + 2 * constant)
        return torch.where(node.mask != 0, line, gain * before[0] + share * magnitude)
    assert isinstance(node, Affine)
    error = node.absolute(before[0]) + gamma(node.length + 8, dtype) * node.absolute(magnitude)
    constant_or_none = node.magnitude()
    return error if constant_or_none is None else error + gamma(size + 8, dtype) * constant_or_none


def rounded_out(
    node: Operation, interval: tuple[Tensor, Tensor], ranges: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """An interval of interval arithmetic, widened by the rounding errors of the one operation that gave it."""
    if isinstance(node, Input):
        return interval
    magnitudes = [torch.maximum(lower.abs(), upper.abs()) for lower, upper in ranges]
    if isinstance(node, Affine):
        size = node.absolute(magnitudes[0])
        constant = node.magnitude()
        error = gamma(node.length + 8, size.dtype) * (size if constant is None else size + constant)
    else:
        error = gamma(8, magnitudes[0].dtype) * torch.maximum(interval[0].abs(), interval[1].abs())
        error = error + gamma(8, error.dtype) * torch.stack(magnitudes).sum(0)
    return interval[0] - error, interval[1] + error


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """No TF32, no autocast: bounds hold for the arithmetic they are stated for."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
