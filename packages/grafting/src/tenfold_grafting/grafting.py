"""Grafted activations (section 2.1): on chosen neurons a straight line takes the place of the ReLU."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tenfold_shared.errors import UserError


class _Graft(torch.autograd.Function):
    """The activation with the released gradients: 1 at z = 0 for the ReLU part, none for the mask."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, mask: Tensor, slope: Tensor, bias: Tensor, relu_grad_at_zero: float
    ) -> Float[Tensor, "batch *neurons"]:
        ctx.save_for_backward(z, mask, slope)
        ctx.relu_grad_at_zero = relu_grad_at_zero
        return torch.where(mask != 0, slope * z + bias, z.clamp(min=0))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        return (*_GraftBackward.apply(gradient, *ctx.saved_tensors, ctx.relu_grad_at_zero), None)


class _GraftBackward(torch.autograd.Function):
    """The backward pass as a function of its own, so that GradAlign can differentiate through it."""

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, z: Tensor, mask: Tensor, slope: Tensor, at_zero: float
    ) -> tuple[Tensor, None, Tensor, Tensor]:
        ctx.save_for_backward(gradient, z, mask, slope)
        grafted = mask != 0
        ctx.at_zero = at_zero
        return (
            torch.where(grafted, slope, _step(z, at_zero)) * gradient,
            None,
            torch.where(grafted, gradient * z, 0.0).sum(0),
            torch.where(grafted, gradient, 0.0).sum(0),
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        by_z, _, by_slope, by_bias = gradients
        gradient, z, mask, slope = ctx.saved_tensors
        grafted = mask != 0
        to_gradient, to_z, to_slope = torch.zeros_like(gradient), None, None
        if by_z is not None:
            to_gradient = to_gradient + by_z * torch.where(grafted, slope, _step(z, ctx.at_zero))
            to_slope = torch.where(grafted, by_z * gradient, 0.0).sum(0)
        if by_slope is not None:
            to_gradient = to_gradient + torch.where(grafted, by_slope * z, 0.0)
            to_z = torch.where(grafted, by_slope * gradient, 0.0)
        if by_bias is not None:
            to_gradient = to_gradient + torch.where(grafted, by_bias.expand_as(z), 0.0)
        return to_gradient, to_z, None, to_slope, None


def _step(z: Tensor, at_zero: float) -> Tensor:
    return torch.where(z == 0, at_zero, (z > 0).to(z.dtype))


def graft_activation(
    z: Float[Tensor, "batch *neurons"],
    mask: Float[Tensor, "*neurons"],
    slope: Float[Tensor, "*neurons"],
    bias: Float[Tensor, "*neurons"],
    relu_grad_at_zero: float = 1.0,
) -> Float[Tensor, "batch *neurons"]:
    """f_i(z) = (1 - m_i) max(z, 0) + m_i (a_i z + b_i), as a selection: nothing infinite leaks from the unused branch.

    Args:
        z: pre-activations.
        mask: m, 1 where the line is used.
        slope: a.
        bias: b.
        relu_grad_at_zero: derivative of the ReLU at 0; the released code has 1, torch's own ReLU 0.

    """
    return _Graft.apply(z, mask, slope, bias, relu_grad_at_zero)


class GraftedReLU(nn.Module):
    """One layer's grafted activation; its state is ``mask``, ``slope`` and ``bias``, one number a neuron position.

    Args:
        shape: of the neurons, (C, H, W) or (F,).
        slope: where all slopes start.
        bias: where all intercepts start.
        trainable: whether slope and intercept are parameters; pruning freezes both at 0.

    """

    mask: Tensor

    def __init__(self, shape: Sequence[int], slope: float = 0.4, bias: float = 0.0, trainable: bool = True):
        super().__init__()
        self.register_buffer("mask", torch.zeros(tuple(shape)))
        self.slope = nn.Parameter(torch.full(tuple(shape), slope), requires_grad=trainable)
        self.bias = nn.Parameter(torch.full(tuple(shape), bias), requires_grad=trainable)
        self.relu_grad_at_zero = 1.0

    def forward(self, z: Tensor) -> Tensor:
        """The activation of pre-activations [batch, *shape]."""
        return graft_activation(z, self.mask, self.slope, self.bias, self.relu_grad_at_zero)

    def extra_repr(self) -> str:
        """Shape and share of grafted neurons."""
        return f"{tuple(self.mask.shape)}, {int(self.mask.sum())} grafted"


def activation_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The ReLU and grafted activations of a model by name, in the order in which they are registered."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.ReLU | GraftedReLU)}


def activation_shapes(model: nn.Module, input_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Shape of the neurons of every activation, in the order in which they are called."""
    return {name: tuple(z.shape[1:]) for name, z in pre_activations(model, _example(model, input_shape)).items()}


def _example(model: nn.Module, input_shape: Sequence[int]) -> Tensor:
    weight = next(model.parameters())
    return torch.zeros(1, *input_shape, dtype=weight.dtype, device=weight.device)


def pre_activations(model: nn.Module, x: Float[Tensor, "batch *input"]) -> dict[str, Tensor]:
    """The pre-activation of every ReLU layer, in the order in which the layers are called.

    Raises:
        UserError: one module that is called at two places: its neurons are two layers.

    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor | None:
            if name in found:
                raise UserError(f"the activation {name} is called more than once: give every layer one of its own")
            found[name] = inputs[0]
            return inputs[0].clone() if getattr(module, "inplace", False) else None  # it overwrites its input

        return hook

    handles = [m.register_forward_pre_hook(keep(name)) for name, m in activation_modules(model).items()]
    training = model.training
    try:
        model.eval()
        model(x)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found


def graft(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    *,
    slope: float = 0.4,
    bias: float = 0.0,
    trainable: bool = True,
) -> nn.Module:
    """A copy of a model whose ReLUs are grafted activations with the given masks.

    Args:
        model: any module whose activations are `nn.ReLU` or `GraftedReLU` modules.
        masks: activation's name -> mask of its neurons' shape, 1 on the neurons that become lines.
        slope: initial a.
        bias: initial b.
        trainable: False freezes the lines; with slope 0 that is pruning.

    Raises:
        UserError: a name that is no activation, an activation without a mask, one that stands at two places, or a mask
            that is not 0 or 1.

    """
    grafted = copy.deepcopy(model)
    names = activation_modules(grafted)
    if set(names) != set(masks):
        odd = sorted(set(names) ^ set(masks))
        raise UserError(f"the masks do not fit the model's activations: {', '.join(odd)} is only on one side")
    every = [m for _, m in grafted.named_modules(remove_duplicate=False) if isinstance(m, nn.ReLU | GraftedReLU)]
    if len(every) != len(names):
        raise UserError("one activation stands at several places of the model: give every layer one of its own")
    example = next(model.parameters())
    for name in names:
        mask = torch.as_tensor(masks[name])
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise UserError(f"the mask of {name} has values other than 0 and 1")
        layer = GraftedReLU(mask.shape, slope, bias, trainable).to(example.device, example.dtype)
        layer.mask.copy_(mask)
        parent, _, child = name.rpartition(".")
        setattr(grafted.get_submodule(parent), child, layer)
    return grafted


def graft_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(slopes and intercepts of grafted activations, all other parameters) that are trained."""
    lines = [p for m in model.modules() if isinstance(m, GraftedReLU) for p in (m.slope, m.bias)]
    of_lines = {id(p) for p in lines}
    rest = [p for p in model.parameters() if id(p) not in of_lines and p.requires_grad]
    return [p for p in lines if p.requires_grad], rest


def grafted_masks(model: nn.Module) -> dict[str, Tensor]:
    """The mask of every grafted activation."""
    return {name: m.mask for name, m in model.named_modules() if isinstance(m, GraftedReLU)}
