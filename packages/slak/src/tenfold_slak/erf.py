"""The effective receptive field: which pixels the centre of the last map listens to (section 9)."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)


class Rectangle(NamedTuple):
    """The smallest centred square that holds more than a share of the contribution."""

    side: int  # pixels, odd; 0 if no square does
    ratio: float  # its area over the map's


class ReceptiveField(NamedTuple):
    """What `effective_receptive_field` returns."""

    mean: Float[Tensor, "size size"]  # mean contribution of each pixel
    scaled: Float[Tensor, "size size"]  # log10(mean + 1) over its maximum
    rectangles: dict[float, Rectangle]  # by share


def contribution_maps(
    features: Callable[[Tensor], Tensor], images: Float[Tensor, "batch channels size size2"]
) -> Float[Tensor, "batch size size2"]:
    """How much each pixel of each image raises the centre of the last map.

    `c = sum over channels of relu(f[:, h//2, w//2])`, `map = sum over input channels of relu(dc/dx)`.

    Args:
        features: maps images to a map (B, C, h, w) *before* pooling, as `SLaK.forward_features` does; in eval mode.
        images: normalised.

    Raises:
        ValueError: the features are not maps.

    """
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        maps = features(images)
        if maps.ndim != 4:
            raise ValueError(
                f"the receptive field needs maps (B, C, h, w) before pooling; the model returned {tuple(maps.shape)}"
            )
        centre = maps[:, :, maps.shape[2] // 2, maps.shape[3] // 2].relu().sum()
        (gradient,) = torch.autograd.grad(centre, images)
    return gradient.relu().sum(1)


def log_scaled(mean: Float[Tensor, "size size"]) -> Float[Tensor, "size size"]:
    """`log10(map + 1)` over its maximum, as the share table is computed from."""
    logarithm = torch.log10(mean + 1)
    return logarithm / logarithm.max()


def rectangle(scaled: Float[Tensor, "size size"], share: float) -> Rectangle:
    """The smallest centred square of odd side whose share of the sum is strictly above `share`; (0, 0) if none is."""
    size = scaled.shape[0]
    centre = size // 2
    integral = torch.nn.functional.pad(scaled.double(), (1, 0, 1, 0)).cumsum(0).cumsum(1)
    radius = torch.arange(size - centre, device=scaled.device)
    low, high = centre - radius, centre + radius + 1
    keep = low >= 0
    low, high = low[keep], high[keep]
    inside = integral[high, high] - integral[low, high] - integral[high, low] + integral[low, low]
    above = (inside / integral[-1, -1] > share).nonzero()
    if not len(above):
        return Rectangle(0, 0.0)
    side = 2 * int(above[0]) + 1
    return Rectangle(side, (side / size) ** 2)


def effective_receptive_field(
    model: nn.Module | Callable[[Tensor], Tensor],
    images: Iterable[Float[Tensor, "batch channels height width"]],
    thresholds: Sequence[float] = THRESHOLDS,
) -> ReceptiveField:
    """Mean contribution map over images, and the squares that hold given shares of it.

    Images whose map is not finite are left out.

    Args:
        model: a network with `forward_features`, or a function to maps; networks are put in eval mode meanwhile.
        images: batches of square, normalised images of one size; the paper uses 50 validation images at 1024 pixels.
        thresholds: shares, in (0, 1).

    Raises:
        ValueError: no image, one that is not square, or none with a finite map.

    """
    training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    features = getattr(model, "forward_features", model)
    total, count = None, 0
    for batch in images:
        if batch.shape[2] != batch.shape[3]:
            raise ValueError(f"the squares are of square images; got {batch.shape[2]} x {batch.shape[3]} pixels")
        maps = contribution_maps(features, batch)
        maps = maps[maps.isfinite().all(2).all(1)]
        total = maps.sum(0) if total is None else total + maps.sum(0)
        count += len(maps)
    if isinstance(model, nn.Module):
        model.train(training)
    if total is None or count == 0:
        raise ValueError("the receptive field needs at least one image with finite gradients")
    mean = total / count
    scaled = log_scaled(mean)
    return ReceptiveField(mean, scaled, {share: rectangle(scaled, share) for share in thresholds})


def plot(fields: dict[str, ReceptiveField], path: Path | str) -> None:
    """Draw the mean maps side by side, each over its own maximum as in the paper's figure; needs matplotlib."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(3 * len(fields), 3.4), layout="constrained")
    for axes, (title, field) in zip(figure.subplots(1, len(fields), squeeze=False)[0], fields.items(), strict=True):
        axes.imshow((field.mean / field.mean.max()).cpu().numpy(), cmap="YlGn", vmin=0, vmax=1)
        sides = ", ".join(f"{share:g}: {area.side}" for share, area in field.rectangles.items())
        axes.set_title(f"{title}\n{sides}", fontsize=9)
        axes.set_axis_off()
    figure.savefig(path)
