"""From scenes to what a training step or an evaluation needs: a target view with its source views."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tenfold_gnt.cameras import pack_cameras, rays_through
from tenfold_gnt.objective import RayBatch, choose_pixels, rays_in_step
from tenfold_gnt.render import Sampling
from tenfold_gnt.views import (
    SOURCE_RULES,
    Distance,
    SourceRule,
    crop,
    crop_window,
    flip,
    nearest_views,
    place_window,
    views_by_direction,
    window_views,
    with_target_sometimes,
)
from tenfold_shared.errors import UserError
from tenfold_shared.scenes import Scene

FLIP_CHANCE = 0.5
CROPPED = ("ibrnet_collected", "spaces")
CROP_SIZE = (400, 600)
FLIPPED = ("llff", "ibrnet_collected", "spaces")
CROPPED_FREELY = ("llff", "llff_test")


class TargetViews(NamedTuple):
    """A target view with its sources.

    Attributes:
        rgb: the target picture.
        camera: its camera.
        images: of the sources.
        cameras: of the sources.
        near: smallest depth of the target view.
        far: largest depth.

    """

    rgb: Float[Tensor, "height width 3"]
    camera: Float[Tensor, "34"]
    images: Float[Tensor, "views height2 width2 3"]
    cameras: Float[Tensor, "views 34"]
    near: float
    far: float

    def to(self, device: torch.device | str) -> "TargetViews":
        """The tensors on a device."""
        rgb, camera, images, cameras = (x.to(device) for x in (self.rgb, self.camera, self.images, self.cameras))
        return self._replace(rgb=rgb, camera=camera, images=images, cameras=cameras)

    def sampling(self, samples: int, importance: int = 0, *, inverse: bool = True) -> Sampling:
        """Depths between this target's near and far."""
        return Sampling(self.near, self.far, samples, importance, inverse)

    def rays(
        self, count: int, generator: torch.Generator, *, wanted_views: int = 10, centre: float | None = None
    ) -> RayBatch:
        """`count` rays through distinct pixels (as many more as sources are missing) with their true colours."""
        height, width = self.rgb.shape[:2]
        count = rays_in_step(count, wanted_views, len(self.images))
        pixels = choose_pixels(height, width, count, generator, centre=centre).to(self.rgb.device)
        origins, directions = rays_through(self.camera, pixels)
        return RayBatch(origins, directions, self.rgb[pixels[:, 1], pixels[:, 0]], self.images, self.cameras)


def packed_cameras(scene: Scene) -> Float[Tensor, "views 34"]:
    """A scene's cameras as vectors, single precision."""
    cameras = scene.cameras
    matrices, poses = (torch.from_numpy(x).float() for x in (cameras.intrinsics, cameras.camera_to_world))
    return pack_cameras(matrices, poses, cameras.height, cameras.width)


def target_views(
    scene: Scene, target: int, sources: Sequence[int] | np.ndarray, pool: Scene | None = None
) -> TargetViews:
    """View `target` of a scene with the sources chosen from `pool` (by default the same scene).

    Raises:
        UserError: the scene has no near and far depths.

    """
    pool = scene if pool is None else pool
    near, far = scene.cameras.near, scene.cameras.far
    if near is None or far is None:
        raise UserError(f"the scene {scene.name} has no near and far depths; give them")
    return TargetViews(
        torch.from_numpy(scene.rgb(target)),
        packed_cameras(scene)[target],
        torch.from_numpy(np.stack([pool.rgb(int(i)) for i in sources])),
        packed_cameras(pool)[torch.as_tensor(np.asarray(sources, dtype=np.int64))],
        float(near[target]),
        float(far[target]),
    )


def refuse_few_views(pool: Scene, count: int, besides: int = 0) -> None:
    """Refuse to render from more source views than there are.

    Raises:
        UserError: fewer than `count` views without the `besides` ones that may not be used.

    """
    if len(pool) - besides < count:
        raise UserError(
            f"{count} source views were asked for, and {pool.name} has {len(pool) - besides} besides the target: "
            "lower --data.sources"
        )


def evaluation_views(scene: Scene, target: int, count: int, method: Distance, pool: Scene | None = None) -> TargetViews:
    """A target with its `count` nearest sources; a target of the pool itself is never among them.

    Args:
        scene: of the target.
        target: its index.
        count: number of sources.
        method: "dist" for forward-facing captures, "vector" for cameras around an object.
        pool: the training views; by default the target's own scene.

    Raises:
        UserError: the pool has fewer views than `count`.

    """
    own = pool is None
    pool = scene if pool is None else pool
    refuse_few_views(pool, count, besides=int(own))
    pose = scene.cameras.camera_to_world[target]
    poses = pool.cameras.camera_to_world
    if own:
        return target_views(scene, target, nearest_views(pose, poses, count, method, target_index=target))
    # `nearest_views` leaves at least one view out; with as many as are wanted, the order does not matter.
    chosen = nearest_views(pose, poses, count, method) if len(poses) > count else np.arange(count)
    return target_views(scene, target, chosen, pool)


@dataclass
class TrainingViews:
    """Draws targets with sources from the scenes of one data set, augmented as that data set is.

    Attributes:
        name: of the data set, which decides rule and augmentation; unknown names follow `rule` and are not augmented.
        scenes: to draw from; all their views train.
        sources: N, source views wanted.
        rule: how sources are drawn, where the name does not say.
        augment: crop and flip.

    """

    name: str
    scenes: Sequence[Scene]
    sources: int = 10
    rule: SourceRule | None = None
    augment: bool = True

    def __post_init__(self) -> None:
        if not self.scenes:
            raise UserError(f"the data set {self.name} has no scenes")
        self.lengths = np.array([len(scene) for scene in self.scenes])
        smallest = int(self.lengths.min())
        if smallest < 2:
            raise UserError(
                f"the scene {self.scenes[int(self.lengths.argmin())].name} has {smallest} view; two are needed"
            )

    def __len__(self) -> int:
        return int(self.lengths.sum())

    def draw(self, generator: np.random.Generator) -> TargetViews:
        """A random target of all views with its sources."""
        index = int(generator.integers(len(self)))
        ends = self.lengths.cumsum()
        number = int(np.searchsorted(ends, index, side="right"))
        return self.item(generator, number, index - int(ends[number] - self.lengths[number]))

    def item(self, generator: np.random.Generator, scene: int, target: int) -> TargetViews:
        """View `target` of scene number `scene` with random sources and augmentation."""
        chosen = self.scenes[scene]
        sources = self.choose_sources(generator, chosen.cameras.camera_to_world, target)
        views = target_views(chosen, target, with_target_sometimes(generator, sources, target))
        return self.augmented(generator, views) if self.augment else views

    def choose_sources(self, generator: np.random.Generator, poses: np.ndarray, target: int) -> np.ndarray:
        """Indices of the sources by the data set's rule; fewer where the scene has fewer."""
        count = min(self.sources, len(poses) - 1)
        if self.name == "realestate":
            return window_views(generator, target, len(poses), count)
        if self.name == "spaces":
            order = views_by_direction(poses[target], poses)
            others = order[order != target]
            pool = others[1:] if len(others) > count else others
            return generator.choice(pool, size=min(count, len(pool)), replace=False)
        rule = self.rule or SOURCE_RULES.get(self.name, SOURCE_RULES["llff"])
        return rule.draw(generator, poses[target], poses, count, target)

    def augmented(self, generator: np.random.Generator, views: TargetViews) -> TargetViews:
        """Crop and flip, alike for target and sources."""
        height, width = views.rgb.shape[:2]
        window = None
        if self.name in CROPPED_FREELY:
            window = crop_window(generator, height, width)
        elif self.name in CROPPED:
            window = place_window(generator, height, width, *CROP_SIZE)
        if window is not None:
            rgb, camera = crop(views.rgb, views.camera, window)
            images, cameras = crop(views.images, views.cameras, window)
            views = views._replace(rgb=rgb, camera=camera, images=images, cameras=cameras)
        if self.name in FLIPPED and generator.random() < FLIP_CHANCE:
            rgb, camera = flip(views.rgb, views.camera)
            images, cameras = flip(views.images, views.cameras)
            views = views._replace(rgb=rgb, camera=camera, images=images, cameras=cameras)
        return views


@dataclass
class Mixture:
    """Cross-scene training: a data set is drawn by its weight (with replacement), then a view of it uniformly."""

    sets: Sequence[TrainingViews]
    weights: Sequence[float]

    def draw(self, generator: np.random.Generator) -> TargetViews:
        """A random target of the mixture."""
        share = np.asarray(self.weights, dtype=np.float64)
        return self.sets[int(generator.choice(len(self.sets), p=share / share.sum()))].draw(generator)
