"""Posed pictures on the device: rays on the fly, batches of them by step (section 5.3)."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from tenfold_augnerf.cameras import Rays
from tenfold_augnerf.mip import PIXEL_RADIUS
from tenfold_shared.batches import generator
from tenfold_shared.errors import UserError
from tenfold_shared.scenes import Scene
from tenfold_shared.scenes.views import to_uint8

PRECROP = 0.5


class Views:
    """Pictures as uint8 and what makes their rays; 3 bytes a pixel, where stored rays would take 24.

    Args:
        colours: [N, H, W, 3].
        turns: [N, 3, 3], R K⁻¹ with OpenCV axes: directions of homogeneous pixels.
        centres: [N, 3], of the cameras.
        near: smallest ray parameter.
        far: largest one.
        depth: true z-depth [N, H, W], inf where nothing is met, or None.
        stored: rays [N, H, W, 2, 3] that take the place of turns and centres.

    """

    def __init__(
        self,
        colours: UInt8[Tensor, "views height width 3"],
        turns: Float[Tensor, "views 3 3"],
        centres: Float[Tensor, "views 3"],
        near: float,
        far: float,
        depth: Float[Tensor, "views height width"] | None = None,
        stored: Float[Tensor, "views height width 2 3"] | None = None,
    ) -> None:
        self.colours, self.turns, self.centres = colours, turns, centres
        self.near, self.far, self.depth, self.stored = near, far, depth, stored

    @classmethod
    def from_scene(cls, scene: Scene, near: float, far: float, *, white: bool) -> "Views":
        """The views of a scene, transparent ones composited on white or black."""
        cameras = scene.cameras
        colours = np.stack([to_uint8(scene.rgb(i, float(white))) for i in range(len(scene))])
        turns = cameras.camera_to_world[:, :3, :3] @ np.linalg.inv(cameras.intrinsics)
        depth = None if scene.depth is None else torch.from_numpy(np.ascontiguousarray(scene.depth)).float()
        return cls(
            torch.from_numpy(colours),
            torch.from_numpy(turns).float(),
            torch.from_numpy(np.ascontiguousarray(cameras.centres)).float(),
            near,
            far,
            depth,
        )

    def to(self, device: torch.device) -> "Views":
        """The same on a device."""
        return Views(
            self.colours.to(device),
            self.turns.to(device),
            self.centres.to(device),
            self.near,
            self.far,
            None if self.depth is None else self.depth.to(device),
            None if self.stored is None else self.stored.to(device),
        )

    def chosen(self, index: Int[Tensor, " chosen"] | Bool[Tensor, " views"]) -> "Views":
        """Some of the views."""
        depth, stored = (None if x is None else x[index] for x in (self.depth, self.stored))
        return Views(self.colours[index], self.turns[index], self.centres[index], self.near, self.far, depth, stored)

    def __len__(self) -> int:
        """How many views."""
        return len(self.colours)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.colours.shape[1], self.colours.shape[2]

    def rays(self, pixels: Int[Tensor, " rays"]) -> Rays:
        """Rays through pixels, numbered over all views row by row; their cameras are the views."""
        height, width = self.size
        view, row, column = pixels // (height * width), pixels // width % height, pixels % width
        if self.stored is not None:
            origins, directions = self.stored[view, row, column].unbind(1)
            beside = torch.where(column + 1 < width, column + 1, (column - 1).clamp(min=0))
            across = directions - self.stored[view, row, beside, 1]
            radii = across.norm(dim=-1, keepdim=True) * PIXEL_RADIUS
            return Rays(origins, directions, view, radii)
        place = torch.stack([column, row, torch.ones_like(row)], -1).to(self.turns)
        turns = self.turns[view]
        radii = turns[:, :, 0].norm(dim=-1, keepdim=True) * PIXEL_RADIUS
        return Rays(self.centres[view], (turns @ place[..., None])[..., 0], view, radii)

    def truth(self, pixels: Int[Tensor, " rays"]) -> Float[Tensor, "rays 3"]:
        """Colours in [0, 1] of pixels numbered as in `rays`."""
        return self.colours.view(-1, 3)[pixels].float() / 255

    def pixels_of(self, view: int) -> Int[Tensor, " rays"]:
        """Numbers of all pixels of a view."""
        count = self.size[0] * self.size[1]
        return torch.arange(view * count, (view + 1) * count, device=self.colours.device)


class RayBatch(NamedTuple):
    """The share of a batch that falls to a process, and which rows of the whole batch it is."""

    rays: Rays
    truth: Tensor
    rows: slice
    total: int


class RayBatches:
    """Batches of training rays as a function of (seed, step), cut among processes.

    Args:
        views: of the training.
        size: rays a batch, over all processes.
        seed: of the order.
        mode: "pool": all rays, shuffled anew each epoch, without replacement, the last batch possibly smaller (and left
            out if it has not a ray for each process); "view": distinct pixels of one random view a step.
        precrop_steps: in mode view, steps that draw from the central half (per axis) alone.
        rank: of this process.
        world: how many there are.

    Raises:
        UserError: more rays than a view has, or none.

    """

    def __init__(
        self,
        views: Views,
        size: int,
        seed: int,
        *,
        mode: Literal["pool", "view"] = "pool",
        precrop_steps: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        height, width = views.size
        if size < 1:
            raise UserError(f"--batch_rays takes 1 or more, got {size}")
        if size < world:
            raise UserError(f"--batch_rays {size}: {world} processes share a batch and need a ray each")
        tall, wide = (round(side * PRECROP) if precrop_steps else side for side in (height, width))
        least = tall * wide
        if mode == "view" and size > least:
            raise UserError(
                f"--batch_rays {size}: a view (or its central crop) of {width}x{height} has {least} pixels only"
            )
        self.views, self.size, self.seed, self.mode = views, size, seed, mode
        self.precrop_steps, self.rank, self.world = precrop_steps, rank, world
        self.count = len(views) * height * width
        whole, rest = divmod(self.count, size)
        self.steps = whole + (rest >= world or not whole)  # fewer rays than processes would leave one without
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.long))

    def pixels(self, step: int) -> Int[Tensor, " rays"]:
        """The pixels of the whole batch."""
        if self.mode == "pool":
            epoch, position = divmod(step, self.steps)
            if self._order[0] != epoch:
                order = torch.randperm(self.count, generator=generator(self.seed, epoch))
                self._order = epoch, order.to(self.views.colours.device)
            return self._order[1][position * self.size : (position + 1) * self.size]
        draw = generator(self.seed, step)
        height, width = self.views.size
        view = int(torch.randint(len(self.views), (), generator=draw))
        top, left, tall, wide = 0, 0, height, width
        if step < self.precrop_steps:
            tall, wide = round(height * PRECROP), round(width * PRECROP)
            top, left = (height - tall) // 2, (width - wide) // 2
        chosen = torch.randperm(tall * wide, generator=draw)[: self.size]
        pixels = (view * height + top + chosen // wide) * width + left + chosen % wide
        return pixels.to(self.views.colours.device)

    def __getitem__(self, step: int) -> RayBatch:
        """The share of a step's batch that falls to this process."""
        pixels = self.pixels(step)
        total = len(pixels)
        rows = slice(self.rank * total // self.world, (self.rank + 1) * total // self.world)
        return RayBatch(self.views.rays(pixels[rows]), self.views.truth(pixels[rows]), rows, total)
