"""Schedules, layer-wise learning rates and parameter groups (section 2.5)."""

import re
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from tenfold_slak.masks import bare_name, by_bare_name

#: Layers of the layer-wise decay for ImageNet fine-tuning; ids run from 0 (stem) to 13 (norm and head).
NUM_LAYERS = 12


def cosine_schedule(
    base: float,
    final: float,
    epochs: int,
    iters_per_epoch: int,
    warmup_epochs: int = 0,
    start_warmup: float = 0.0,
    warmup_steps: int = -1,
) -> Float64[Tensor, " steps"]:
    """One value an optimiser step: a line from `start_warmup` to `base`, both ends included, then a cosine to `final`.

    The cosine's step is i/n over the n steps that remain, so its last value does not quite reach `final`. A positive
    `warmup_steps` replaces `warmup_epochs * iters_per_epoch`.

    Raises:
        ValueError: the warmup is longer than the whole schedule.

    """
    total = epochs * iters_per_epoch
    warmup = warmup_steps if warmup_steps > 0 else warmup_epochs * iters_per_epoch
    if warmup > total:
        raise ValueError(f"the warmup of {warmup} steps is longer than the training of {total}")
    line = torch.linspace(start_warmup, base, warmup, dtype=torch.float64)
    steps = torch.arange(total - warmup, dtype=torch.float64)
    cosine = final + 0.5 * (base - final) * (1 + torch.cos(torch.pi * steps / max(1, total - warmup)))
    return torch.cat([line, cosine])


def layer_id(name: str, num_layers: int = NUM_LAYERS) -> int:
    """Layer of a parameter for layer-wise decay: 0 for the stem, `num_layers` + 1 for the last norm and the head.

    Stages 0, 1 are layers 1, 2 and the downsampling after each is one higher; three blocks of stage 2 share a layer
    from 3 on; stage 3 and the downsampling before it are layer `num_layers`: 12, and 6 for a SLaK-T in detection.
    """
    name = bare_name(name).removeprefix("backbone.").removeprefix("body.")
    if match := re.match(r"downsample_layers\.(\d+)", name):
        return {0: 0, 1: 2, 2: 3}.get(int(match[1]), num_layers)
    if match := re.match(r"stages\.(\d+)\.(\d+)", name):
        stage, block = int(match[1]), int(match[2])
        return {0: 1, 1: 2, 2: 3 + block // 3}.get(stage, num_layers)
    return num_layers + 1


def stage_id(name: str, num_layers: int = 12) -> int:
    """Layer of a backbone's parameter for stage-wise decay downstream: downsampling 0, stage i is i + 1, the rest last.

    The learning rate is `base * decay ** (num_layers + 1 - id)`.
    """
    name = bare_name(name).removeprefix("backbone.")
    if name.startswith("downsample_layers"):
        return 0
    if match := re.match(r"stages\.(\d+)", name):
        return int(match[1]) + 1
    return num_layers + 1


def layer_ids(model: nn.Module) -> dict[str, int]:
    """`layer_id` of every parameter."""
    return by_bare_name((name, layer_id(name)) for name, _ in model.named_parameters())


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.05,
    layer_decay: float = 1.0,
    to_id: Callable[[str], int] = layer_id,
    last_id: int = NUM_LAYERS + 1,
) -> list[dict[str, Any]]:
    """Groups for an optimiser: no decay for 1-D tensors and biases, learning rates falling towards the stem.

    Each group has `lr = lr * layer_decay ** (last_id - id)` and the factor itself as `lr_scale`, so that a schedule can
    be applied as `group["lr"] = value * group["lr_scale"]`.

    Args:
        model: parameters that need no gradient are left out.
        lr: of the head.
        weight_decay: of tensors of two and more dimensions.
        layer_decay: factor from a layer to the one below it; 1 for the same rate everywhere.
        to_id: a parameter's layer, from 0 to `last_id`.
        last_id: the head's layer.

    Raises:
        ValueError: a layer decay that is not positive, one for a network whose names `to_id` does not know, or layers
            beyond the last one, which would learn faster than the head.

    """
    if not layer_decay > 0:
        raise ValueError(f"the layer decay is a factor from a layer to the one below it, above 0; got {layer_decay}")
    if layer_decay != 1.0:
        layers = {name: to_id(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        beyond = next((name for name, layer in layers.items() if layer > last_id), None)
        if beyond is not None:
            raise ValueError(
                f"{beyond} is in layer {layers[beyond]} and the last one is {last_id}: so deep a network needs a larger "
                "num_layers (12 for SLaK-S and SLaK-B)"
            )
        if layers and all(layer == last_id for layer in layers.values()):
            raise ValueError(
                "no parameter is called as in SLaK, so that all would be in the last layer: take layer decay 1 for this network"
            )
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim <= 1 or name.endswith(".bias")
        layer = to_id(name) if layer_decay != 1.0 else last_id
        scale = layer_decay ** (last_id - layer)
        group = groups.setdefault(
            (layer, plain),
            {"params": [], "lr": lr * scale, "lr_scale": scale, "weight_decay": 0.0 if plain else weight_decay},
        )
        group["params"].append(parameter)
    return list(groups.values())
