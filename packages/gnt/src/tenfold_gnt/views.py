"""Which source views a target is rendered from, and the augmentation of a target with its sources (section 5).

Poses are OpenCV camera-to-world matrices as NumPy arrays: selection is a loader's work, done on the CPU.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from tenfold_gnt.cameras import crop_camera, flip_camera

Distance = Literal["dist", "vector", "matrix"]
TARGET_DISTANCE = 1e3
RECTIFY_DEGREES = 40.0


def camera_distances(
    target: Float[np.ndarray, "4 4"],
    poses: Float[np.ndarray, "views 4 4"],
    method: Distance,
    scene_centre: Float[np.ndarray, "3"] | None = None,
) -> Float[np.ndarray, " views"]:
    """How far cameras are from the target's.

    Args:
        target: its pose.
        poses: of the candidates.
        method: "dist": between centres; "vector": angle between the centres seen from the scene's centre, in radians;
            "matrix": angle of the relative rotation, in radians.
        scene_centre: for "vector", by default the origin.

    Raises:
        ValueError: another method.

    """
    if method == "dist":
        return np.linalg.norm(poses[:, :3, 3] - target[:3, 3], axis=1)
    if method == "vector":
        centre = np.zeros(3) if scene_centre is None else scene_centre
        to_target, to_views = target[:3, 3] - centre, poses[:, :3, 3] - centre
        to_target = to_target / (np.linalg.norm(to_target) + 1e-6)
        to_views = to_views / (np.linalg.norm(to_views, axis=1, keepdims=True) + 1e-6)
        return np.arccos(np.clip(to_views @ to_target, -1, 1))
    if method == "matrix":
        trace = np.einsum("vij,ij->v", poses[:, :3, :3], target[:3, :3])
        return np.arccos(np.clip((trace - 1) / 2, -1, 1))
    raise ValueError(f"views are compared by dist, vector or matrix, not by {method!r}")


def nearest_views(
    target: Float[np.ndarray, "4 4"],
    poses: Float[np.ndarray, "views 4 4"],
    count: int,
    method: Distance,
    *,
    target_index: int | None = None,
    scene_centre: Float[np.ndarray, "3"] | None = None,
) -> Int[np.ndarray, " chosen"]:
    """Indices of the nearest views, nearest first; at most all but one are chosen.

    Args:
        target: its pose.
        poses: of the candidates.
        count: how many.
        method: see `camera_distances`.
        target_index: where the target is among the candidates; it is sent to the end by a distance of 1000.
        scene_centre: for "vector".

    """
    distances = camera_distances(target, poses, method, scene_centre)
    if target_index is not None:
        if not 0 <= target_index < len(poses):
            raise ValueError(f"the target's index {target_index} is none of the {len(poses)} views'")
        distances[target_index] = TARGET_DISTANCE
    return np.argsort(distances)[: min(count, len(poses) - 1)]


def views_by_direction(
    target: Float[np.ndarray, "4 4"], poses: Float[np.ndarray, "views 4 4"]
) -> Int[np.ndarray, " views"]:
    """All views by the angle to the target's, nearest first, as the released code measures it for the Spaces data set.

    The directions compared are those of the points one unit in front of the cameras, seen from the world's origin: the
    released code moves the forward axis like a point, so that the camera's position enters.
    """
    ahead, ahead_of_target = poses[:, :3, 2] + poses[:, :3, 3], target[:3, 2] + target[:3, 3]
    lengths = np.linalg.norm(ahead, axis=1) * np.linalg.norm(ahead_of_target)
    return np.argsort(-(ahead @ ahead_of_target) / np.maximum(lengths, 1e-12))


@dataclass(frozen=True)
class SourceRule:
    """How training draws the sources of a target.

    Attributes:
        method: of `nearest_views`.
        factors: the pool is the nearest `N · s` views, s one of these,
        chances: with these probabilities.
        most: bound on the pool.
        spread: the number drawn from the pool is N + U{low..high}, at least one.

    """

    method: Distance
    factors: tuple[int, ...]
    chances: tuple[float, ...]
    most: int | None = None
    spread: tuple[int, int] = (0, 0)

    def draw(
        self,
        generator: np.random.Generator,
        target: Float[np.ndarray, "4 4"],
        poses: Float[np.ndarray, "views 4 4"],
        count: int,
        target_index: int | None,
    ) -> Int[np.ndarray, " chosen"]:
        """Indices of the sources: from the pool without replacement.

        Raises:
            ValueError: fewer views than `count` + 1, target included.

        """
        available = len(poses) - (target_index is not None)
        if available < count:
            raise ValueError(f"{count} source views were asked for, and the scene has {available} besides the target")
        size = count * int(generator.choice(self.factors, p=self.chances))
        size = min(size, self.most or size)
        pool = nearest_views(target, poses, size, self.method, target_index=target_index)
        wanted = max(1, count + int(generator.integers(self.spread[0], self.spread[1] + 1)))
        return generator.choice(pool, size=min(wanted, len(pool)), replace=False)


THREE = ((1, 2, 3), (0.2, 0.45, 0.35))
SOURCE_RULES = {
    "llff": SourceRule("dist", *THREE, most=20, spread=(-2, 2)),
    "llff_test": SourceRule("dist", *THREE, most=28, spread=(-2, 1)),
    "shiny": SourceRule("dist", *THREE, most=28, spread=(-2, 1)),
    "ibrnet_collected": SourceRule("dist", *THREE, most=22, spread=(-2, 2)),
    "nerf_synthetic": SourceRule("vector", (1, 2, 3), (0.3, 0.5, 0.2)),
    "google": SourceRule("vector", (1, 2, 3, 4, 5), (0.3, 0.25, 0.2, 0.2, 0.05)),
}
TARGET_AMONG_SOURCES = 0.005
WINDOW = 32


def with_target_sometimes(
    generator: np.random.Generator, chosen: Int[np.ndarray, " chosen"], target_index: int
) -> Int[np.ndarray, " chosen"]:
    """With probability 0.005 one of the sources becomes the target itself; training only."""
    if generator.random() >= TARGET_AMONG_SOURCES or target_index in chosen:
        return chosen
    replaced = chosen.copy()
    replaced[generator.integers(len(chosen))] = target_index
    return replaced


def window_views(
    generator: np.random.Generator, target_index: int, views: int, count: int
) -> Int[np.ndarray, " chosen"]:
    """Sources of a video frame (RealEstate10K): from the ±32 frames around it, shifted by -1..1.

    The target itself is left out with probability 0.99.

    Raises:
        ValueError: the window holds no other frame.

    """
    middle = target_index + int(generator.integers(-1, 2))
    pool = np.arange(max(0, middle - WINDOW), min(views, middle + WINDOW + 1))
    if generator.random() < 0.99:
        pool = pool[pool != target_index]
    if len(pool) == 0:
        raise ValueError("a video of one frame has no source views")
    return generator.choice(pool, size=min(count, len(pool)), replace=False)


def crop_window(generator: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int] | None:
    """(top, left, h, w) of the random crop for LLFF captures: h even in 250..750, w = the even part of 240000 / h.

    None where the crop is not smaller than the image in both directions.
    """
    crop_height = int(generator.integers(125, 376)) * 2
    return place_window(generator, height, width, crop_height, int(240_000 / crop_height) // 2 * 2)


def place_window(
    generator: np.random.Generator, height: int, width: int, crop_height: int, crop_width: int
) -> tuple[int, int, int, int] | None:
    """A window of the given size at a random place; None if it is not smaller than the image in both directions."""
    if crop_height >= height or crop_width >= width:
        return None
    top = int(generator.integers(0, height - crop_height + 1))
    return top, int(generator.integers(0, width - crop_width + 1)), crop_height, crop_width


def crop(
    images: Float[Tensor, "*views height width 3"],
    cameras: Float[Tensor, "*views 34"],
    window: tuple[int, int, int, int],
) -> tuple[Float[Tensor, "*views h w 3"], Float[Tensor, "*views 34"]]:
    """The same window (top, left, h, w) of every image, and its cameras."""
    top, left, height, width = window
    cropped = images[..., top : top + height, left : left + width, :]
    return cropped, crop_camera(cameras, top, left, height, width)


def flip(
    images: Float[Tensor, "*views height width 3"], cameras: Float[Tensor, "*views 34"]
) -> tuple[Float[Tensor, "*views height width 3"], Float[Tensor, "*views 34"]]:
    """Images mirrored horizontally, and their cameras."""
    return images.flip(-2), flip_camera(cameras)


def rectify(
    target: Float[np.ndarray, "4 4"], sources: Float[np.ndarray, "views 4 4"], degrees: float = RECTIFY_DEGREES
) -> Float[np.ndarray, "views 4 4"]:
    """Source poses turned in their image plane to the target's upright, where they are turned by `degrees` or more.

    The angle is the z part of the relative rotation's intrinsic zxy Euler angles. Images do not turn:
    this is an approximation that the released code offers, off by default.
    """
    relative = np.einsum("vji,jk->vik", sources[:, :3, :3], target[:3, :3])
    angle = in_plane_angle(relative)
    turned = sources.copy()
    for view in np.flatnonzero(np.abs(angle) >= np.deg2rad(degrees)):
        c, s = np.cos(angle[view]), np.sin(angle[view])
        turned[view, :3, :3] = sources[view, :3, :3] @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])
    return turned


def in_plane_angle(rotation: Float[np.ndarray, "*batch 3 3"]) -> Float[np.ndarray, "*batch"]:
    """The angle a of R = Rz(a) Rx(b) Ry(c), in radians."""
    return np.arctan2(-rotation[..., 0, 1], rotation[..., 1, 1])
