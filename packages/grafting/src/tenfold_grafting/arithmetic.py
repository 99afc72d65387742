"""How far rounding can carry a bound (section 2.7): an a-priori error for one backward pass, in any arithmetic.

With u the unit roundoff and gamma_n = n u / (1 - n u), a sum of n products, in any order, is off by at most gamma_n times
the sum of the products' magnitudes. Whatever coefficients A a backward pass has computed at a node, they are a correct
statement about that node's value; what has to be bounded is how much each step falsifies it. The step through z = W x + b
makes fl(A W), which differs from A W by at most gamma |A| |W|, so that the statement about x is off by at most
gamma |A| (|W| X + |b|), where X bounds |x| over the box. The step through an activation replaces it by one of its lines:

- the product with the slope, computed as A low + min(A, 0) (up - low), is off by at most 5 u |A| Z;
- the line itself, its slope u/(u - l) and its intercept, misses the activation by at most 6 u max(|l|, |u|), and by 3 u
  more where l and u were rounded to another arithmetic;
- the dot product with the intercepts, of magnitude at most Z, is as long as there are unstable neurons.

|A| is at most the sum over all paths of the products of |weights| and of the slopes of the lines between, which are at
most 1 (or |a| on a grafted neuron, and 0 on one that is never active). Summed over the steps, that is the recursion

    E(W x + b) = |W| E(x) + gamma (|W| X + |b|),      E(f(z)) = slope E(z) + (gamma_8 + 2 gamma_m) Z,

started with E(x) = gamma |x| for the dot product with the box, and a backward pass from rows C at a node is off by at
most |C| E there. Three things make it more than first order. gamma's n is the longer of the forward and of the transposed
dot product, plus a slack of 8 and the number of nodes: each node adds once more to the constant. Every E is multiplied
by 1 + 6 gamma: the computed |A| exceed the exact ones by 1 + gamma, the ranges X are themselves computed, and so is E.
And intervals handed on are those that were widened.

Assumed: rounding to nearest; products summed in some order, not by a transform (`exact_arithmetic` rules Winograd's and
Fourier's out on a GPU; a CPU's convolutions are direct); no underflow. The statement is about the network in the graph:
its batch norms were folded and its weights converted before, in double precision.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from tenfold_grafting.operations import Activation, Add, Affine, Input, Operation, Scale
from tenfold_grafting.relaxation import SMALLEST_WIDTH

SLACK = 8
"""Roundings beside those of a dot product itself, generously."""


def gamma(length: int, dtype: torch.dtype) -> float:
    """N u / (1 - n u), with u = 2^-24 or 2^-53.

    Raises:
        ValueError: the sum is too long for the arithmetic: nothing can be said.

    """
    unit = length * torch.finfo(dtype).eps / 2
    if unit >= 0.05:
        raise ValueError(f"a sum of {length} terms has no useful error bound in {dtype}")
    return unit / (1 - unit)


def node_error(
    node: Operation,
    before: list[Tensor],
    ranges: list[tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    inputs: int,
    nodes: int,
) -> Tensor:
    """E: what a backward pass that starts at a node may be off by, for each of its neurons, [batch, *shape].

    Args:
        node: the operation.
        before: the errors of the nodes it reads, in its order.
        ranges: (lower, upper) of the nodes it reads; of the input itself, the box.
        dtype: the arithmetic of the pass.
        inputs: length of the last dot product, with the box.
        nodes: how many nodes the graph has.

    """
    slack = SLACK + nodes
    size = torch.Size(node.shape).numel()
    magnitudes = [torch.maximum(lower.abs(), upper.abs()) for lower, upper in ranges]
    if isinstance(node, Input):
        return _inflated(gamma(inputs + slack, dtype) * magnitudes[0], slack, dtype)
    if isinstance(node, Add):
        rounding = gamma(slack, dtype) * (magnitudes[0] + magnitudes[1])
        return _inflated(before[0] + before[1] + rounding, slack, dtype)
    magnitude = magnitudes[0]
    if isinstance(node, Activation):
        lower, upper = ranges[0]
        # `relax` widens an interval narrower than this, so that its line may have a slope though u <= 0
        active = (upper > 0) | (lower > -2 * SMALLEST_WIDTH)
        crossing = (lower < 0) & active
        length = int(crossing.flatten(1).sum(1).max())
        share = gamma(slack, dtype) * active + 2 * gamma(length + slack, dtype) * crossing
        error = active * before[0] + share * magnitude
        if node.mask is not None and node.slope is not None and node.intercept is not None:
            steep, constant = node.slope.abs(), node.intercept.abs()
            line = steep * before[0] + 2 * gamma(size + slack, dtype) * (steep * magnitude + constant)
            error = torch.where(node.mask != 0, line, error)
        return _inflated(error, slack, dtype)
    assert isinstance(node, Affine)
    length = node.length + slack
    error = node.absolute(before[0]) + gamma(length, dtype) * node.absolute(magnitude)
    constant_or_none = node.magnitude()
    if constant_or_none is not None:
        error = error + gamma(size + slack, dtype) * constant_or_none
    return _inflated(error, length, dtype)


def _inflated(error: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """An error with room for what its own terms were computed from: see the module's text."""
    return error * (1 + 6 * gamma(length, dtype))


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
        error = gamma(node.length + 2 * SLACK, size.dtype) * (size if constant is None else size + constant)
    elif isinstance(node, Activation):
        if node.mask is None or node.slope is None or node.intercept is None:
            return interval  # a maximum with 0 is exact
        size = node.slope.abs() * magnitudes[0] + node.intercept.abs()
        error = torch.where(node.mask != 0, gamma(SLACK, size.dtype) * size, 0.0)
    else:
        error = gamma(SLACK, magnitudes[0].dtype) * (magnitudes[0] + magnitudes[1])
    return interval[0] - error, interval[1] + error


def normalisation_error(prefix: Scale | None, lower: Tensor, upper: Tensor) -> Tensor:
    """How far the ends of a box of pixels may be off after normalisation, [batch, *shape]."""
    magnitude = torch.maximum(lower.abs(), upper.abs())
    if prefix is None:
        return torch.zeros_like(magnitude)
    constant = prefix.magnitude()
    assert constant is not None
    return gamma(SLACK, magnitude.dtype) * (prefix.absolute(magnitude) + constant)


@contextlib.contextmanager
def exact_arithmetic(*, classical: bool = False) -> Iterator[None]:
    """No TF32, no autocast: bounds hold for the arithmetic they are stated for.

    With ``classical`` no convolution is computed by a transform either, on a GPU: cuDNN is left out.
    """
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    enabled = torch.backends.cudnn.enabled
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.enabled = enabled and not classical
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
        torch.backends.cudnn.enabled = enabled
