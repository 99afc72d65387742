"""Images as collections of patches, each a signal of its own (sections 2.8 and 5)."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

Blend = Literal["none", "linear"]


def split_patches(
    images: Float[Tensor, "batch height width channels"], patch: tuple[int, int]
) -> Float[Tensor, "patches rows cols channels"]:
    """Non-overlapping patches, those of an image in row-major order, images one after the other.

    Raises:
        ValueError: the image is not a whole number of patches high and wide.

    """
    batch, height, width, channels = images.shape
    if height % patch[0] or width % patch[1]:
        raise ValueError(
            f"an image of {height}×{width} pixels does not divide into {patch[0]}×{patch[1]} patches; "
            "resize or crop it, or use overlapping patches"
        )
    grid = images.reshape(batch, height // patch[0], patch[0], width // patch[1], patch[1], channels)
    return grid.transpose(2, 3).reshape(-1, *patch, channels)


def merge_patches(
    patches: Float[Tensor, "patches points channels"], patch: tuple[int, int], size: tuple[int, int]
) -> Float[Tensor, "batch channels height width"]:
    """Images from complete sets of patches: the inverse of ``split_patches``, channels first (section 9).

    Args:
        patches: samples of every patch in row-major order.
        patch: (height, width) of a patch.
        size: (height, width) of an image.

    Raises:
        ValueError: the patches are not whole images.

    """
    rows, cols = size[0] // patch[0], size[1] // patch[1]
    if rows * patch[0] != size[0] or cols * patch[1] != size[1] or len(patches) % (rows * cols):
        raise ValueError(
            f"{len(patches)} patches of {patch[0]}×{patch[1]} do not make up whole images of {size[0]}×{size[1]}; "
            f"an image takes {rows * cols} consecutive ones"
        )
    grid = patches.reshape(-1, rows, cols, *patch, patches.shape[-1])
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, patches.shape[-1], *size)


def window_starts(length: int, patch: int, stride: int) -> list[int]:
    """Left ends of windows that cover an axis, the last one flush with the border.

    Raises:
        ValueError: the axis is shorter than a window, or the windows would leave gaps.

    """
    if not 1 <= stride <= patch:
        raise ValueError(
            f"a stride of {stride} pixels between patches of {patch}: it lies in 1..{patch}, or gaps are left"
        )
    if length < patch:
        raise ValueError(f"an image of {length} pixels along an axis is smaller than a patch of {patch}")
    starts = list(range(0, length - patch + 1, stride))
    return starts if starts[-1] == length - patch else [*starts, length - patch]


def extract_windows(
    images: Shaped[Tensor, "batch height width channels"], patch: tuple[int, int], stride: int
) -> Shaped[Tensor, "patches rows cols channels"]:
    """Overlapping patches in row-major order that cover the images, whatever their size."""
    rows = window_starts(images.shape[1], patch[0], stride)
    cols = window_starts(images.shape[2], patch[1], stride)
    row_index = torch.tensor(rows, device=images.device)[:, None] + torch.arange(patch[0], device=images.device)
    col_index = torch.tensor(cols, device=images.device)[:, None] + torch.arange(patch[1], device=images.device)
    windows = images[:, row_index[:, None, :, None], col_index[None, :, None, :]]
    return windows.flatten(0, 2)


def blend_windows(
    patches: Float[Tensor, "patches rows cols channels"], size: tuple[int, int], stride: int, blend: Blend = "linear"
) -> Float[Tensor, "batch height width channels"]:
    """Overlap-add of windows cut by ``extract_windows``, weighted by a tent that hides the seams (section 2.8)."""
    _, height, width, channels = patches.shape
    rows, cols = window_starts(size[0], height, stride), window_starts(size[1], width, stride)
    weight = patches.new_ones(height, width)
    if blend == "linear":
        weight = torch.outer(_tent(height, patches), _tent(width, patches))
    top = torch.tensor(rows, device=patches.device)[:, None] + torch.arange(height, device=patches.device)
    left = torch.tensor(cols, device=patches.device)[:, None] + torch.arange(width, device=patches.device)
    place = (top[:, None, :, None] * size[1] + left[None, :, None, :]).reshape(-1)
    weighted = (patches * weight[..., None]).reshape(-1, len(place), channels)
    total = patches.new_zeros(weighted.shape[0], size[0] * size[1], channels).index_add(1, place, weighted)
    norm = patches.new_zeros(size[0] * size[1]).index_add(0, place, weight.repeat(len(rows) * len(cols), 1).reshape(-1))
    return (total / norm[:, None]).view(-1, *size, channels)


def _tent(length: int, like: Tensor) -> Tensor:
    position = torch.arange(length, device=like.device, dtype=like.dtype)
    return torch.minimum(position + 1, length - position)


def resize(
    images: Float[Tensor, "batch height width channels"], size: tuple[int, int]
) -> Float[Tensor, "batch rows cols channels"]:
    """Bicubic resampling with anti-aliasing, values left unclamped."""
    chw = images.movedim(-1, 1)
    return F.interpolate(chw, size=size, mode="bicubic", antialias=True, align_corners=False).movedim(1, -1)
