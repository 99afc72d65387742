"""Occlusions and colour shifts of the inpainting experiments (section 5)."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor


def occlude(
    image: Float[Tensor, "height width channels"], seed: int, *, size: int = 64, stripes: int = 10
) -> Float[Tensor, "height width channels"]:
    """Paint a square of vertical stripes of random colours at a random place of the 8-bit image.

    Args:
        image: values in [0, 1].
        seed: of place and colours.
        size: side s of the square in pixels; the far ends are inclusive.
        stripes: number of bars, each s / stripes wide.

    Raises:
        ValueError: the square is not smaller than the image.

    """
    pixels = (image.detach().cpu().numpy() * 255).astype(np.uint8)
    top, left = _corner(image, seed, size)
    width = size / stripes
    for i in range(stripes):
        colour = np.random.RandomState(stripes * seed + i).choice(256, pixels.shape[-1])
        start, stop = int(left + i * width), int(left + (i + 1) * width)
        pixels[top : top + size + 1, start : stop + 1] = colour
    return torch.from_numpy(pixels / 255.0).to(image)


def occluded_pixels(
    image: Float[Tensor, "height width channels"], seed: int, *, size: int = 64
) -> Bool[Tensor, "height width"]:
    """Where ``occlude`` paints: the ground truth for an outlier mask."""
    top, left = _corner(image, seed, size)
    mask = torch.zeros(image.shape[:2], dtype=torch.bool, device=image.device)
    mask[top : top + size + 1, left : left + size + 1] = True
    return mask


def _corner(image: Tensor, seed: int, size: int) -> tuple[int, int]:
    height, width = image.shape[:2]
    if size >= min(height, width):
        raise ValueError(f"an occlusion of {size} pixels does not fit into an image of {height}×{width}")
    random = np.random.RandomState(seed)
    left = int(random.randint(0, width - size))
    return int(random.randint(0, height - size)), left


def shift_colours(
    image: Float[Tensor, "height width channels"], seed: int, *, scale: float = 0.2, offset: float = 0.2
) -> Float[Tensor, "height width channels"]:
    """Multiply each channel by U(1 ± scale), add U(± offset), clip to [0, 1]."""
    random = np.random.RandomState(seed)
    channels = image.shape[-1]
    gain = torch.from_numpy(random.uniform(1 - scale, 1 + scale, size=channels)).to(image)
    shift = torch.from_numpy(random.uniform(-offset, offset, size=channels)).to(image)
    return (gain * image + shift).clamp(0, 1)


def observe_fraction(
    count: int, points: int, fraction: float, generator: torch.Generator | None = None
) -> Bool[Tensor, "count points"]:
    """Masks that observe the same number of points, drawn at random for each signal.

    Raises:
        ValueError: not even one point would be observed.

    """
    observed = round(points * fraction)
    if not 1 <= observed <= points:
        raise ValueError(f"a fraction of {fraction} of {points} points observes {observed}; at least one is needed")
    order = torch.rand(count, points, generator=generator).argsort(dim=1)
    return torch.zeros(count, points, dtype=torch.bool).scatter(1, order[:, :observed], True)
