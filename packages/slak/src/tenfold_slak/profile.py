"""Where the time of a network goes, layer by layer, against the multiply-adds of the layer."""

import time
from typing import NamedTuple

import torch
from torch import nn

from tenfold_slak.layer import LargeKernel, MergedOne, MergedTwo
from tenfold_slak.macs import macs_by_layer


class LayerProfile(NamedTuple):
    """One layer: multiply-adds of an image, seconds of a batch (the least of the repeats)."""

    name: str
    kind: type[nn.Module]
    macs: int
    macs_nonzero: int
    seconds: float


@torch.inference_mode()
def profile_layers(
    model: nn.Module, size: int = 224, batch_size: int = 4, repeats: int = 5, device: torch.device | str | None = None
) -> list[LayerProfile]:
    """Time every large-kernel layer, convolution and Linear inside a network in eval mode, in the order of calls.

    Args:
        model: any module that takes images.
        size: side of the images, pixels.
        batch_size: images.
        repeats: forward passes; the least time of each layer counts.
        device: where to; default: where the model is.

    """
    device = torch.device(device or next(model.parameters()).device)
    model = model.to(device).eval()
    large = (LargeKernel, MergedOne, MergedTwo)
    whole = {name: module for name, module in model.named_modules() if isinstance(module, large)}
    watched = dict(whole)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not any(name.startswith(f"{outer}.") for outer in whole):
            watched[name] = module
    channels = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    counts = macs_by_layer(model, size, channels)
    started: dict[str, float] = {}
    times: dict[str, float] = {}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    hooks = []
    for name, module in watched.items():

        def before(*_: object, name: str = name) -> None:
            started[name] = now()

        def after(*_: object, name: str = name) -> None:
            times[name] = min(times.get(name, float("inf")), now() - started[name])

        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    images = torch.randn(batch_size, channels, size, size, device=device)
    try:
        for _ in range(repeats):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    rows = []
    for name, seconds in times.items():
        own = [counts[key] for key in counts if key.startswith(f"{name}.")]
        macs, nonzero = sum(count.stored for count in own), sum(count.nonzero for count in own)
        kind = LargeKernel if name in whole else type(watched[name])
        rows.append(LayerProfile(name, kind, macs, nonzero, seconds))
    return rows
