"""Ghost soft neurons (section 2.2): smooth activations that stand in for ReLU early in training.

The functions are the paper's and the released code's list; `GhostActivation` is one of them on its way to ReLU.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]
RELEASED_BETA = 2.0  # the released code's constant slope of parametric Swish


def swish(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """X sigmoid(x), also called SiLU."""
    return functional.silu(x)


class ParametricSwish(torch.autograd.Function):
    """x sigmoid(beta x) = silu(beta x) / beta, whose backward pass is one fused kernel: d/dx is silu'(beta x)."""

    @staticmethod
    def forward(x: Tensor, beta: Tensor) -> Tensor:
        """The activation."""
        return functional.silu(x * beta).div_(beta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep x and beta; their product is made again, which costs less than the memory to keep it."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        """The gradient of x; differentiable once more, as the learned scales need it."""
        x, beta = ctx.saved_tensors
        if torch.is_grad_enabled():
            gate = torch.sigmoid(beta * x)
            return grad_outputs[0] * gate * (1 + beta * x * (1 - gate)), None
        return torch.ops.aten.silu_backward(grad_outputs[0], x * beta), None


def pswish(x: Float[Tensor, "*shape"], beta: float | Float[Tensor, ""] = RELEASED_BETA) -> Float[Tensor, "*shape"]:
    """X sigmoid(beta x): half of x at beta = 0, ReLU as it grows. beta is no parameter; a tensor is above 0."""
    if not isinstance(beta, Tensor):
        if beta == 0:  # which the fast form divides by
            return x / 2
        beta = x.new_tensor(beta)
    if torch.compiler.is_compiling():  # the compiler fuses the plain formula
        return functional.silu(x * beta.to(x.dtype)) / beta.to(x.dtype)
    return ParametricSwish.apply(x, beta.to(x.dtype))


def mish(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """X tanh(softplus(x))."""
    return functional.mish(x)


def gelu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """X Phi(x), with the exact normal distribution function."""
    return functional.gelu(x)


def lisht(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """X tanh(x)."""
    return x * x.tanh()


def bent_identity(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """X + (sqrt(x^2 + 1) - 1) / 2."""
    return x + ((x.square() + 1).sqrt() - 1) / 2


def smooth_relu(x: Float[Tensor, "*shape"], a: float = 200.0) -> Float[Tensor, "*shape"]:
    """max(x, 0) - log(a max(x, 0) + 1) / a."""
    positive = x.relu()
    return positive - torch.log1p(a * positive) / a


class SmoothGradReLU(torch.autograd.Function):
    """ReLU whose gradient is taken to be sigmoid(10 x), which is the derivative of neither."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """max(x, 0)."""
        return x.relu()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep x."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        """The upstream gradient times sigmoid(10 x)."""
        (x,) = ctx.saved_tensors
        return grad_outputs[0] * torch.sigmoid(10 * x)


def smooth_grad_relu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """ReLU forward, sigmoid(10 x) backward."""
    return SmoothGradReLU.apply(x)


def softplus(x: Float[Tensor, "*shape"], threshold: float = 1.0) -> Float[Tensor, "*shape"]:
    """log(1 + exp(x)), the identity above the threshold: with a threshold of 1 it jumps there, as released."""
    return functional.softplus(x, threshold=threshold)


def softplus10(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Softplus that is the identity above 10."""
    return softplus(x, 10.0)


ACTIVATIONS: dict[str, Activation] = {
    "relu": torch.relu,
    "swish": swish,
    "pswish": pswish,
    "mish": mish,
    "gelu": gelu,
    "lisht": lisht,
    "bent_identity": bent_identity,
    "smooth_relu": smooth_relu,
    "smooth_grad_relu": smooth_grad_relu,
    "elu": functional.elu,
    "celu": functional.celu,
    "softplus": softplus,
    "softplus10": softplus10,
}

SoftKind = Literal[
    "pswish", "swish", "mish", "gelu", "lisht", "bent_identity", "smooth_relu", "smooth_grad_relu", "elu", "celu",
    "softplus", "softplus10",
]  # fmt: skip
SOFT_KINDS: tuple[str, ...] = get_args(SoftKind)


def activation(name: str) -> nn.Module:
    """A module of the activation of that name, without parameters.

    Raises:
        ValueError: unknown name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"Unknown activation {name!r}: choose one of {', '.join(ACTIVATIONS)}.")
    return nn.ReLU() if name == "relu" else FixedActivation(name)


class FixedActivation(nn.Module):
    """An activation of `ACTIVATIONS` as a module."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The activation of every entry."""
        return ACTIVATIONS[self.name](x)

    def extra_repr(self) -> str:
        """Its name."""
        return self.name


class GhostActivation(nn.Module):
    """A soft neuron on its way to ReLU.

    pswish hardens by its slope beta; every other kind by a mix, (1 - r) soft + r ReLU. Both are buffers, so that a
    compiled graph is not built anew at every step, and neither is in the state dict: the schedule gives them.

    Attributes:
        beta: slope of pswish.
        hardness: r in [0, 1]; at 1 the module is exactly ReLU whatever its kind.

    """

    beta: Tensor
    hardness: Tensor

    def __init__(self, kind: str = "pswish", beta: float = RELEASED_BETA) -> None:
        super().__init__()
        if kind not in SOFT_KINDS:
            raise ValueError(f"Unknown soft neuron {kind!r}: choose one of {', '.join(SOFT_KINDS)}.")
        self.kind = kind
        self.hard = False
        self.register_buffer("beta", torch.tensor(1.0), persistent=False)
        self.register_buffer("hardness", torch.tensor(0.0), persistent=False)
        self.set(beta, 0.0)

    def set(self, beta: float, hardness: float) -> None:
        """Move on along the schedule. Raises ValueError for a slope that is not above 0."""
        if beta <= 0:
            raise ValueError(f"The slope of a soft neuron is above 0, got {beta}.")
        self.hard = hardness >= 1.0
        self.beta.fill_(beta)
        self.hardness.fill_(hardness)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The activation of every entry."""
        if self.hard:
            return x.relu()
        if self.kind == "pswish":
            return pswish(x, self.beta)
        return torch.lerp(ACTIVATIONS[self.kind](x), x.relu(), self.hardness.to(x.dtype))

    def extra_repr(self) -> str:
        """Its kind."""
        return self.kind
