"""Data that comes with the dependencies or is generated exactly: every task runs without a download (section 5).

These are not the paper's data sets, and a result on them is never one of the paper's.
"""

import functools
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from . import ct, shapes
from .coordinates import lattice
from .patches import extract_windows

PATCH = 16
SIDE = 160
TRAIN_PHOTOGRAPHS = ("astronaut", "coffee", "rocket", "china")
TEST_PHOTOGRAPHS = ("chelsea", "flower")


def photograph(name: str, side: int = SIDE) -> Float[Tensor, "side side 3"]:
    """A colour photograph of scikit-image or scikit-learn, centre-cropped to a square, resized with anti-aliasing, in
    [0, 1].

    Raises:
        ValueError: there is no such photograph.

    """
    if name not in TRAIN_PHOTOGRAPHS + TEST_PHOTOGRAPHS:
        raise ValueError(f"no photograph {name!r}; there are {', '.join(TRAIN_PHOTOGRAPHS + TEST_PHOTOGRAPHS)}")
    return _photograph(name, side).clone()


@functools.lru_cache
def _photograph(name: str, side: int) -> Float[Tensor, "side side 3"]:
    from skimage import data  # noqa: PLC0415
    from skimage.transform import resize  # noqa: PLC0415

    if name in {"china", "flower"}:
        from sklearn.datasets import load_sample_image  # noqa: PLC0415

        image = load_sample_image(f"{name}.jpg")
    else:
        image = getattr(data, name)()
    height, width = image.shape[:2]
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    small = resize(image[top : top + square, left : left + square] / 255.0, (side, side), anti_aliasing=True)
    return torch.from_numpy(small.astype(np.float32))


def photograph_patches(
    split: Literal["train", "test", "fit", "validation"] = "train",
) -> Float[Tensor, "patches 16 16 3"]:
    """16-pixel patches of photographs.

    ``train``: four photographs at stride 4 (5,476 patches). ``test``: 64 patches, drawn once, of two others at stride
    16. For choosing values, ``fit``: three of the training photographs, and ``validation``: 64 patches of the fourth.
    """
    names = {
        "train": TRAIN_PHOTOGRAPHS,
        "fit": TRAIN_PHOTOGRAPHS[:-1],
        "validation": TRAIN_PHOTOGRAPHS[-1:],
        "test": TEST_PHOTOGRAPHS,
    }[split]
    pictures = torch.stack([photograph(name) for name in names])
    if split in {"train", "fit"}:
        return extract_windows(pictures, (PATCH, PATCH), 4)
    patches = extract_windows(pictures, (PATCH, PATCH), PATCH)
    return patches[torch.randperm(len(patches), generator=torch.Generator().manual_seed(1))[:64]]


def faces(split: str = "train") -> Float[Tensor, "faces 25 25 1"]:
    """A hundred grey faces of 25×25 pixels (scikit-image's subset of LFW): 80 to train on, with their mirror images, 20
    to test.
    """
    from skimage.data import lfw_subset  # noqa: PLC0415

    images = torch.from_numpy(lfw_subset()[:100].astype(np.float32))[..., None]
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    if split == "test":
        return images[order[80:]]
    train = images[order[:80]]
    return torch.cat([train, train.flip(2)])


def phantoms(count: int, size: int = 64, seed: int = 0) -> Float[Tensor, "count size size 1"]:
    """Random Shepp-Logan-like ellipse phantoms; their projections are known in closed form."""
    return ct.render_ellipses(ct.random_ellipses(count, seed), (size, size), supersample=2)


def distance_fields(count: int, resolution: int = 32, seed: int = 0) -> Float[Tensor, "count d h w 1"]:
    """Closed-form signed distances of rotated and scaled primitives."""
    return shapes.random_shapes(count, resolution, seed)


class Video(NamedTuple):
    """Frames with their ground truth."""

    frames: Float[Tensor, "frames height width 3"]
    background: Float[Tensor, "height width 3"]
    mask: Bool[Tensor, "frames height width"]
    """True where a disc covers the background"""


def moving_discs(count: int = 60, side: int = 64, discs: int = 3, seed: int = 0) -> Video:
    """A still photograph with textured discs that move across it and bounce off the border."""
    background = photograph("coffee", side)
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(discs, 2, generator=generator)
    speed = (torch.rand(discs, 2, generator=generator) - 0.5) * 0.12
    radius = 0.12 + 0.14 * torch.rand(discs, generator=generator)
    colour = torch.rand(discs, 3, generator=generator)
    phase = 10 + 10 * torch.rand(discs, generator=generator)
    time = torch.arange(count)[:, None, None]
    unit = start + speed * time
    centre = 1 - 2 * (1 - unit % 2).abs()  # a triangle wave: motion reflected at the border
    grid = lattice((side, side))
    offset = grid - centre[:, :, None]
    inside = offset.norm(dim=-1) < radius[:, None]
    texture = 0.5 + 0.5 * torch.sin(phase[:, None] * offset[..., 0]) * torch.sin(phase[:, None] * offset[..., 1])
    painted = background.view(1, -1, 3).expand(count, -1, -1)
    for disc in range(discs):  # the later disc stands in front
        look = 0.5 * colour[disc] + 0.5 * texture[:, disc, :, None]
        painted = torch.where(inside[:, disc, :, None], look, painted)
    mask = inside.any(dim=1).view(count, side, side)
    return Video(painted.view(count, side, side, 3).contiguous(), background, mask)
