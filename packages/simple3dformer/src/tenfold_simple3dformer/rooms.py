"""`procrooms`: rooms with furniture out of `shapes`, with S3DIS labels and SUN RGB-D boxes (section 5)."""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from numpy.random import RandomState

from tenfold_simple3dformer.data.s3dis import CLASSES
from tenfold_simple3dformer.data.sunrgbd import CLASSES as BOX_CLASSES
from tenfold_simple3dformer.shapes import CATEGORIES, Shape, make_shape

HEIGHT = 2.6  # metres
LABEL = {
    "chair": "chair", "stool": "chair", "table": "table", "desk": "table", "bed": "clutter", "sofa": "sofa",
    "bookshelf": "bookcase", "lamp": "clutter", "cup": "clutter", "bottle": "clutter",
}  # fmt: skip
"""Family -> S3DIS class."""
BOX_LABEL = {
    "chair": "chair",
    "stool": "chair",
    "table": "table",
    "desk": "desk",
    "bed": "bed",
    "sofa": "sofa",
    "bookshelf": "bookshelf",
}
"""Family -> SUN RGB-D class; the others have no boxes."""
FURNITURE = {"lamp": 1.5, "cup": 0.4, "bottle": 0.5, "bookshelf": 1.8, "bed": 0.9}
"""Height in metres that a family is scaled to; the others are of furniture size as they are."""


@dataclass(frozen=True)
class Placed:
    """An object in a room: its shape, the middle of its bottom, its scale."""

    shape: Shape
    x: float
    y: float
    scale: float

    @property
    def size(self) -> Float[ndarray, " 3"]:
        """Full size along its own axes."""
        return (self.shape.bounds[1] - self.shape.bounds[0]) * self.scale

    @property
    def centre(self) -> Float[ndarray, " 3"]:
        """Middle of its box."""
        return np.array([self.x, self.y, self.size[2] / 2])

    @property
    def corners(self) -> Float[ndarray, "4 2"]:
        """Of its footprint."""
        half = self.size[:2] / 2
        c, s = math.cos(self.shape.yaw), math.sin(self.shape.yaw)
        local = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * half
        return local @ np.array([[c, s], [-s, c]]) + np.array([self.x, self.y])

    def box_row(self) -> Float[ndarray, " 8"]:
        """cx, cy, cz, l/2, w/2, h/2, angle, class: the row of SUN RGB-D, whose angle runs against the yaw."""
        angle = math.remainder(-self.shape.yaw, 2 * math.pi)
        label = BOX_CLASSES.index(BOX_LABEL[self.shape.category])
        return np.array([*self.centre, *(self.size / 2), angle, label])


class Room(NamedTuple):
    """Rows x, y, z, r, g, b (0-255), label of S3DIS, the smallest coordinates 0; and the boxes of SUN RGB-D."""

    points: Float[ndarray, "n 7"]
    boxes: Float[ndarray, "b 8"]
    objects: list[Placed]


def separated(a: Float[ndarray, "4 2"], b: Float[ndarray, "4 2"]) -> bool:
    """Whether two convex footprints do not touch: some edge's normal separates them."""
    for polygon in (a, b):
        edges = np.roll(polygon, -1, 0) - polygon
        for normal in np.stack([-edges[:, 1], edges[:, 0]], 1):
            first, second = a @ normal, b @ normal
            if first.max() < second.min() or second.max() < first.min():
                return True
    return False


def furnish(width: float, depth: float, rng: RandomState) -> list[Placed]:
    """4 to 10 objects on the floor, inside of the walls and clear of each other; fewer where they do not fit."""
    placed: list[Placed] = []
    for _ in range(rng.randint(4, 11)):
        shape = make_shape(CATEGORIES[rng.randint(len(CATEGORIES))], rng)
        tall = shape.bounds[1][2] - shape.bounds[0][2]
        scale = FURNITURE.get(shape.category, tall) / tall
        for _ in range(20):
            candidate = Placed(shape, rng.uniform(0.1, width - 0.1), rng.uniform(0.1, depth - 0.1), scale)
            corners = candidate.corners
            within = (corners.min(0) > 0.05).all() and (corners.max(0) < np.array([width, depth]) - 0.05).all()
            if within and all(separated(corners, other.corners) for other in placed):
                placed.append(candidate)
                break
    return placed


def _surfaces(
    width: float, depth: float, rng: RandomState
) -> list[tuple[str, Float[ndarray, " 3"], Float[ndarray, " 3"], Float[ndarray, " 3"]]]:
    """Class, corner and the two edges of the rectangles of an empty room."""
    x, y, z = np.eye(3)
    origin, far = np.zeros(3), np.array([width, depth, HEIGHT])
    walls = [(origin, x * width), (far * y, x * width), (origin, y * depth), (far * x, y * depth)]
    found = [("floor", origin, x * width, y * depth), ("ceiling", z * HEIGHT, x * width, y * depth)]
    found += [("wall", corner, along, z * HEIGHT) for corner, along in walls]
    wall_of = rng.permutation(4)
    for (name, wide, low, tall), wall in zip(
        [("door", 0.9, 0.0, 2.0), ("window", 1.4, 0.9, 1.1), ("board", 1.6, 0.9, 1.0)], wall_of, strict=False
    ):
        corner, along = walls[wall]
        length = np.linalg.norm(along)
        start = rng.uniform(0.2, length - wide - 0.2)
        inward = (np.array([width, depth, 0]) / 2 - corner) * (np.abs(along) < 1e-9) * [1, 1, 0]
        offset = 0.01 * inward / np.linalg.norm(inward)
        found.append((name, corner + along / length * start + z * low + offset, along / length * wide, z * tall))
    return found


@functools.lru_cache(maxsize=64)
def make_room(seed: int, points: int = 20_000) -> Room:
    """A room of 4-6 x 4-6 x 2.6 metres; points in proportion to area, colours by class with noise."""
    rng = RandomState(seed)
    width, depth = rng.uniform(4, 6, 2)
    surfaces = _surfaces(width, depth, rng)
    objects = furnish(width, depth, rng)
    areas = [float(np.linalg.norm(np.cross(a, b))) for _, _, a, b in surfaces]
    areas += [sum(solid.area for solid, _ in o.shape.solids) * o.scale**2 for o in objects]
    counts = np.bincount(rng.choice(len(areas), points, p=np.array(areas) / sum(areas)), minlength=len(areas))
    xyz, labels = [], []
    for (name, corner, a, b), count in zip(surfaces, counts, strict=False):
        u = rng.uniform(0, 1, (count, 2))
        xyz.append(corner + u[:, :1] * a + u[:, 1:] * b)
        labels.append(np.full(count, CLASSES.index(name)))
    for placed, count in zip(objects, counts[len(surfaces) :], strict=True):
        if count:
            xyz.append(placed.shape.points(int(count), rng).xyz * placed.scale + placed.centre)
            labels.append(np.full(count, CLASSES.index(LABEL[placed.shape.category])))
    label = np.concatenate(labels)
    palette = RandomState(13).randint(40, 216, (len(CLASSES), 3))
    colour = np.clip(palette[label] + rng.normal(0, 20, (points, 3)), 0, 255)
    rows = np.concatenate([np.concatenate(xyz), colour, label[:, None]], 1).astype(np.float32)
    rows = rows[rng.permutation(points)]
    rows[:, :3] -= rows[:, :3].min(0)
    boxes = [o.box_row() for o in objects if o.shape.category in BOX_LABEL]
    return Room(rows, np.array(boxes).reshape(-1, 8), objects)


def visible(room: Room, seed: int) -> Bool[ndarray, " n"]:
    """Which points one random camera sees (Open3D casts the rays): the depth-view variant.

    The camera stands 1.5 m high near a wall and looks at the middle of the room with a field of view of 90 degrees.
    """
    from tenfold_simple3dformer.geometry import open3d  # noqa: PLC0415 - a heavy library

    o3d = open3d()
    rng = RandomState(seed)
    top = room.points[:, :3].max(0)
    turn = rng.uniform(0, 2 * math.pi)
    camera = np.array([top[0] / 2 + 0.45 * top[0] * math.cos(turn), top[1] / 2 + 0.45 * top[1] * math.sin(turn), 1.5])
    scene = o3d.t.geometry.RaycastingScene()
    for placed in room.objects:
        vertices, faces = placed.shape.triangles()
        scene.add_triangles(
            o3d.core.Tensor((vertices * placed.scale + placed.centre).astype(np.float32)),
            o3d.core.Tensor(faces.astype(np.uint32)),
        )
    offset = room.points[:, :3] - camera
    distance = np.linalg.norm(offset, axis=1)
    direction = offset / distance[:, None]
    rays = np.concatenate([np.broadcast_to(camera, direction.shape), direction], 1).astype(np.float32)
    hit = scene.cast_rays(o3d.core.Tensor(rays))["t_hit"].numpy()
    forward = np.array([top[0] / 2, top[1] / 2, 0.8]) - camera
    ahead = direction @ (forward / np.linalg.norm(forward)) > math.cos(math.pi / 4)
    return ahead & (hit >= distance - 0.02)


def sun_scene(
    seed: int, points: int = 20_000, *, depth_view: bool = False
) -> tuple[Float[ndarray, "n 3"], Float[ndarray, "b 8"]]:
    """Coordinates and box rows of a generated scene; the depth view keeps what one camera sees of four times the points."""
    room = make_room(seed, 4 * points if depth_view else points)
    rows = room.points[visible(room, seed)] if depth_view else room.points
    return rows[:, :3], room.boxes


def label_counts(room: Room) -> Int[ndarray, " k"]:
    """Points of each S3DIS class."""
    return np.bincount(room.points[:, 6].astype(int), minlength=len(CLASSES))
