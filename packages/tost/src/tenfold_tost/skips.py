"""Ghost skip connections (section 2.3): an extra path around every convolution and its normalisation, faded out.

    h = BN(conv(x)) + alpha BN_j(jump(x))

jump is a dense 1x1 convolution without bias and with the convolution's stride. Nothing is rewritten: two hooks a unit
add the path to any module, and `detach_skips` takes hooks and path away again.
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

JUMP_INIT = 1e-4  # the constant that all weights of a jump start from, as released
NAME = "ghost_skip"

SkipKind = Literal["conv", "identity"]


class Unit(NamedTuple):
    """A convolution and the module whose output the skip is added to: its batch norm, or itself without one."""

    name: str
    conv: nn.Conv2d
    end: nn.Module


class GhostSkip(nn.Module):
    """The path alpha BN_j(jump(x)) around one unit.

    Args:
        conv: the convolution it bypasses.
        kind: "conv", or "identity" without parameters: average pooling by the stride, channels cut or filled with zeros.
        end: name of the module in the model whose output the path is added to.

    Attributes:
        alpha: strength, a buffer outside of the state dict; the schedule gives it.

    """

    alpha: Tensor

    def __init__(self, conv: nn.Conv2d, kind: SkipKind = "conv", end: str = "") -> None:
        super().__init__()
        self.end = end
        place: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        stride: Any = conv.stride
        self.stride, self.outputs = stride, conv.out_channels
        self.jump: nn.Module | None = None
        self.norm: nn.BatchNorm2d | None = None
        if kind == "conv":
            self.jump = nn.Conv2d(conv.in_channels, conv.out_channels, 1, stride, bias=False, **place)
            nn.init.constant_(self.jump.weight, JUMP_INIT)
            self.norm = nn.BatchNorm2d(conv.out_channels, **place)
        self.register_buffer("alpha", torch.ones((), **place), persistent=False)
        self.held: Tensor | None = None

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs out_h out_w"]:
        """What is added to the unit's output."""
        if self.jump is None or self.norm is None:
            return self.alpha * identity_path(x, self.stride, self.outputs)
        z = self.jump(x)
        if type(self.norm) is not nn.BatchNorm2d:  # one whose statistics run over several processes
            return self.alpha * self.norm(z)
        return scaled_batch_norm(z, self.norm, self.alpha)


def scaled_batch_norm(
    z: Float[Tensor, "batch channels height width"], norm: nn.BatchNorm2d, alpha: Float[Tensor, ""]
) -> Float[Tensor, "batch channels height width"]:
    """Alpha BN(z), with alpha folded into the gain and the shift, which saves two passes over the map."""
    keeps = norm.track_running_stats
    if norm.training and keeps and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    mean, variance = (norm.running_mean, norm.running_var) if keeps or not norm.training else (None, None)
    gain, shift = norm.weight * alpha, norm.bias * alpha
    momentum = norm.momentum
    if momentum is None:  # a plain average over the batches so far, as `update_bn` asks for
        momentum = 1.0 / float(norm.num_batches_tracked) if norm.training and keeps else 0.0  # type: ignore[arg-type]
    return functional.batch_norm(z, mean, variance, gain, shift, norm.training, momentum, norm.eps)


def identity_path(
    x: Float[Tensor, "batch inputs height width"], stride: tuple[int, ...], outputs: int
) -> Float[Tensor, "batch outputs out_h out_w"]:
    """The input pooled by the stride, its channels cut to `outputs` or followed by zeros."""
    if max(stride) > 1:
        x = functional.avg_pool2d(x, stride, ceil_mode=True)
    missing = outputs - x.shape[1]
    return functional.pad(x, (0, 0, 0, 0, 0, missing)) if missing >= 0 else x[:, :outputs]


class _Hold:
    """Before the convolution: keep its input until the unit ends. An object, so that a copied model has its own."""

    def __init__(self, skip: GhostSkip) -> None:
        self.skip = skip

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.skip.held = inputs[0]


class _Add:
    """After the unit: add the skip of the input that was kept."""

    def __init__(self, skip: GhostSkip) -> None:
        self.skip = skip

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        held, self.skip.held = self.skip.held, None
        return output + self.skip(held)


def _in_residual_block(block: nn.Module) -> bool | None:
    """Whether a module is a basic residual block (the only ones with ghost skips), a bottleneck, or neither (None)."""
    children = dict(block.named_children())
    if not {"conv1", "bn1", "conv2", "bn2"} <= children.keys():
        return None
    return "conv3" not in children


def skip_units(model: nn.Module, example: Float[Tensor, "batch channels height width"]) -> list[Unit]:
    """The units that get a ghost skip: both convolutions of every basic residual block; in a network without residual
    blocks every convolution with the batch norm that follows it.

    Found by a forward pass in evaluation mode, which changes nothing in the model.

    Raises:
        ValueError: there is none (a network of bottlenecks or without convolutions), or a convolution changes the size
            of its map in a way that no strided 1x1 convolution follows; named.

    """
    conv_of: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    ends: dict[nn.Module, nn.Module] = {}
    unfit: dict[nn.Module, str] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, nn.Conv2d):
            conv_of[id(output)] = module, output
            ends[module] = module
            expected = tuple(-(-size // step) for size, step in zip(inputs[0].shape[2:], module.stride, strict=True))
            if tuple(output.shape[2:]) != expected:
                unfit[module] = f"{tuple(inputs[0].shape[2:])} -> {tuple(output.shape[2:])}"
        elif isinstance(module, nn.BatchNorm2d) and id(inputs[0]) in conv_of:
            ends[conv_of[id(inputs[0])][0]] = module

    watched = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    handles = [module.register_forward_hook(note) for module in watched]
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    blocks = {name: _in_residual_block(block) for name, block in model.named_modules()}
    residual = any(basic is not None for basic in blocks.values())
    units = [
        Unit(name, module, ends[module])
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module in ends and (not residual or _is_basic(name, blocks))
    ]
    if not units:
        why = "its residual blocks are bottlenecks" if residual else "it has no convolution"
        raise ValueError(f"No ghost skip can be added to {type(model).__name__}: {why}.")
    odd = [f"{unit.name} ({unfit[unit.conv]})" for unit in units if unit.conv in unfit]
    if odd:
        raise ValueError(
            f"No ghost skip can be added to {type(model).__name__}: a strided 1x1 convolution does not give maps of the "
            f"size that {', '.join(odd)} gives; pad the convolution."
        )
    return units


def _is_basic(name: str, blocks: dict[str, bool | None]) -> bool:
    block, _, attribute = name.rpartition(".")
    return bool(blocks.get(block)) and attribute in ("conv1", "conv2")


def attach_skips(
    model: nn.Module, example: Float[Tensor, "batch channels height width"], kind: SkipKind = "conv"
) -> list[GhostSkip]:
    """Give every unit its ghost skip, in place. Raises ValueError like `skip_units`."""
    names = {module: name for name, module in model.named_modules()}
    skips = []
    for unit in skip_units(model, example):
        skip = GhostSkip(unit.conv, kind, names[unit.end])
        skip.train(unit.conv.training)
        unit.conv.add_module(NAME, skip)
        skips.append(skip)
    hook_skips(model)
    return skips


def hook_skips(model: nn.Module) -> None:
    """Put the hooks of all ghost skips in place, anew: converting batch norms for several processes makes new modules,
    which have none.
    """
    _remove_hooks(model)
    for name, skip in ghost_skips(model).items():
        model.get_submodule(name).register_forward_pre_hook(_Hold(skip))
        model.get_submodule(skip.end).register_forward_hook(_Add(skip))


def _remove_hooks(model: nn.Module) -> None:
    for module in model.modules():
        both: list[Any] = [module._forward_pre_hooks, module._forward_hooks]
        for hooks in both:
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Hold | _Add)]:
                del hooks[key]


def has_hooks(model: nn.Module) -> bool:
    """Whether a hook of a ghost skip is on any module."""
    hooks = (
        hook for m in model.modules() for kind in (m._forward_pre_hooks, m._forward_hooks) for hook in kind.values()
    )
    return any(isinstance(hook, _Hold | _Add) for hook in hooks)


def ghost_skips(model: nn.Module) -> dict[str, GhostSkip]:
    """The ghost skips of a model by the name of the convolution they bypass."""
    return {
        name.removesuffix(f".{NAME}"): module for name, module in model.named_modules() if isinstance(module, GhostSkip)
    }


def detach_skips(model: nn.Module) -> None:
    """Take every ghost skip away, hooks included; the modules are then as they were."""
    _remove_hooks(model)
    for module in list(model.modules()):
        if isinstance(getattr(module, NAME, None), GhostSkip):
            delattr(module, NAME)


def set_strength(model: nn.Module, alpha: float) -> None:
    """Set alpha of every ghost skip."""
    for skip in ghost_skips(model).values():
        skip.alpha.fill_(alpha)
