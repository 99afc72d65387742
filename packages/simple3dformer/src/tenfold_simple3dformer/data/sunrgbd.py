"""SUN RGB-D v1 as VoteNet prepares it (section 5): ``NNNNNN_pc.npz`` and ``NNNNNN_bbox.npy``; training augmentation."""

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from numpy.random import RandomState
from torch import Tensor
from torch.utils.data import Dataset

from tenfold_shared.errors import UserError
from tenfold_simple3dformer.detection.criterion import Boxes

CLASSES = ("bed", "table", "sofa", "chair", "toilet", "desk", "dresser", "night_stand", "bookshelf", "bathtub")
URL = "https://rgbd.cs.princeton.edu"
LAYOUT = "sunrgbd_pc_bbox_votes_50k_v1_{train,val}/NNNNNN_{pc.npz,bbox.npy}"
MOST_BOXES = 64
Rows = Float[ndarray, "b 8"]
"""cx, cy, cz, l/2, w/2, h/2, angle, class: half sizes, z-up centres."""


def read_scene(folder: Path, name: str) -> tuple[Float[ndarray, "n 3"], Rows]:
    """Coordinates and box rows of a scene.

    Raises:
        UserError: a file is missing, truncated, empty, not finite or of another shape, or a class is out of range; it is named.

    """
    try:
        with np.load(folder / f"{name}_pc.npz", allow_pickle=False) as file:
            cloud = file["pc"][:, :3].astype(np.float32)
        boxes = np.load(folder / f"{name}_bbox.npy", allow_pickle=False).reshape(-1, 8)
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"scene {name} in {folder} cannot be read: {error}") from error
    if not len(cloud) or cloud.shape[1] != 3 or not (np.isfinite(cloud).all() and np.isfinite(boxes).all()):
        raise UserError(f"scene {name} in {folder} has no points, or a value that is not finite")
    if len(boxes) and not ((boxes[:, 7] >= 0) & (boxes[:, 7] < len(CLASSES))).all():
        raise UserError(f"{folder / name}_bbox.npy has a class outside of 0..{len(CLASSES) - 1}")
    return cloud, boxes


def scene_names(folder: Path) -> list[str]:
    """Scenes of a folder, sorted.

    Raises:
        UserError: there are none.

    """
    names = sorted(file.name.removesuffix("_pc.npz") for file in folder.glob("*_pc.npz"))
    if not names:
        raise UserError(f"no SUN RGB-D scene in {folder}: expected {LAYOUT}, prepared as VoteNet does from {URL}")
    return names


def flip_and_rotate(cloud: Float[ndarray, "n 3"], boxes: Rows, rng: RandomState) -> tuple[Float[ndarray, "n 3"], Rows]:
    """Flip along x (p .5; angle -> pi - angle), rotation by U(-30, 30) degrees, scale U(.85, 1.15)."""
    cloud, boxes = cloud.copy(), boxes.copy()
    if rng.random_sample() > 0.5:
        cloud[:, 0] *= -1
        boxes[:, 0] *= -1
        boxes[:, 6] = math.pi - boxes[:, 6]
    turn = rng.uniform(-math.pi / 6, math.pi / 6)
    c, s = math.cos(turn), math.sin(turn)
    rotation = np.array([[c, s, 0.0], [-s, c, 0.0], [0.0, 0.0, 1.0]])
    cloud = cloud @ rotation
    boxes[:, :3] = boxes[:, :3] @ rotation
    boxes[:, 6] -= turn  # a box's angle runs against the scene's
    scale = rng.uniform(0.85, 1.15)
    boxes[:, :6] *= scale
    return (cloud * scale).astype(np.float32), boxes


def random_cuboid(
    cloud: Float[ndarray, "n 3"], boxes: Rows, rng: RandomState, *, least: int = 30_000, tries: int = 100
) -> tuple[Float[ndarray, "m 3"], Float[ndarray, "k 8"]]:
    """A crop with sides of 0.75 to 1 of the scene, horizontal aspect at least .75 and at least ``least`` points.

    Boxes whose centre lies inside stay. The whole scene when no crop of 100 has enough points and a box.
    """
    extent = cloud.max(0) - cloud.min(0)
    for _ in range(tries):
        share = rng.uniform(0.75, 1.0, 3)
        if min(share[:2]) / max(share[:2]) < 0.75:
            continue
        centre, half = cloud[rng.choice(len(cloud))], extent * share / 2
        inside = (np.abs(cloud - centre) <= half).all(1)
        kept = (np.abs(boxes[:, :3] - centre) <= half).all(1)
        if inside.sum() >= least and kept.any():
            return cloud[inside], boxes[kept]
    return cloud, boxes


def sample(cloud: Float[ndarray, "n 3"], count: int, rng: RandomState) -> Float[ndarray, "m 3"]:
    """``count`` points without replacement, with it where there are fewer."""
    return cloud[rng.choice(len(cloud), count, replace=len(cloud) < count)]


class SceneSet(Dataset[tuple[Tensor, Tensor]]):
    """Scenes as (points, 3) and padded box rows (`MOST_BOXES`, 9), whose last column says whether a row is a box."""

    def __init__(
        self,
        scenes: Sequence[tuple[ndarray, ndarray] | tuple[Path, str]],
        points: int,
        *,
        augment: bool = False,
        cuboid: int = 30_000,
    ):
        self.scenes, self.points, self.augment, self.cuboid = scenes, points, augment, cuboid

    def __len__(self) -> int:
        """Scenes."""
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """A scene; random numbers come from torch's generator."""
        first, second = self.scenes[index]
        if isinstance(first, Path):
            cloud, boxes = read_scene(first, str(second))
        else:
            cloud, boxes = first, np.asarray(second)
        seed = int(torch.randint(2**31, ())) if self.augment else index
        rng = RandomState(seed)
        if self.augment:
            cloud, boxes = flip_and_rotate(cloud, boxes, rng)
            cloud, boxes = random_cuboid(cloud, boxes, rng, least=self.cuboid)
        rows = np.zeros((MOST_BOXES, 9), np.float32)
        boxes = boxes[:MOST_BOXES]
        rows[: len(boxes), :8], rows[: len(boxes), 8] = boxes, 1
        return torch.from_numpy(np.ascontiguousarray(sample(cloud, self.points, rng), np.float32)), torch.from_numpy(
            rows
        )


def boxes_of(rows: Float[Tensor, "b m 9"]) -> Boxes:
    """Ground truth out of padded rows: half sizes become full sizes here, and nowhere else."""
    return Boxes(rows[..., :3], 2 * rows[..., 3:6], rows[..., 6], rows[..., 7].long(), rows[..., 8] > 0.5)
