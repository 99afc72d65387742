"""Exact counts of parameters and multiply-adds, dense and at the masks (sections 3 and 9)."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tenfold_slak.layer import LargeKernel, MergedOne, MergedTwo


class Counts(NamedTuple):
    """A count over all weights, and over the weights that are not zero."""

    stored: int
    nonzero: int


def count_parameters(model: nn.Module) -> Counts:
    """Parameters that are stored and those that are not zero, biases and norms included."""
    parameters = list(model.parameters())
    return Counts(sum(p.numel() for p in parameters), sum(int(torch.count_nonzero(p)) for p in parameters))


def count_macs(model: nn.Module, image_size: int | tuple[int, int] = 224, in_chans: int = 3) -> Counts:
    """Multiply-adds of one image, each counted 1: weights x output positions of every convolution and Linear.

    Norms, activations and biases are not counted, nor is padding excluded, as in the paper's table. Linears inside
    blocks act at every position of the map. Shapes are found on the meta device, so nothing is computed.

    Args:
        model: convolutions, Linears and large-kernel layers are counted, whatever contains them.
        image_size: height and width, pixels.
        in_chans: channels of the image.

    Returns:
        The dense count, and the count over weights that are not zero.

    """
    layers = macs_by_layer(model, image_size, in_chans).values()
    return Counts(sum(layer.stored for layer in layers), sum(layer.nonzero for layer in layers))


def macs_by_layer(model: nn.Module, image_size: int | tuple[int, int] = 224, in_chans: int = 3) -> dict[str, Counts]:
    """`count_macs` for every weight by its parameter name."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    parameters = dict(model.named_parameters())
    positions = _positions(model, (1, in_chans, height, width))
    return {
        name: Counts(parameters[name].numel() * count, int(torch.count_nonzero(parameters[name])) * count)
        for name, count in positions.items()
    }


def _positions(model: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """How often each weight is used for one image, by parameter name."""
    twin = _meta_copy(model)
    positions: dict[str, int] = {}
    hooks = []
    for name, module in twin.named_modules():
        if isinstance(module, LargeKernel | MergedOne | MergedTwo):  # in eval mode its convolutions are not called
            names = [f"{name}.{key}" for key, p in module.named_parameters() if p.ndim == 4]
        elif isinstance(module, nn.Conv2d | nn.Linear):
            names = [f"{name}.weight"]
        else:
            continue

        def record(module: nn.Module, _: tuple[Tensor, ...], output: Tensor, names: list[str] = names) -> None:
            axis = -1 if isinstance(module, nn.Linear) else 1
            for key in names:
                positions[key] = positions.get(key, 0) + output.numel() // output.shape[axis]

        hooks.append(module.register_forward_hook(record))
    with torch.no_grad():
        twin(torch.empty(shape, device="meta"))
    return positions


def _meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model's structure without storage, in eval mode."""
    memo: dict[int, Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo).float().eval()
