"""`procshapes`: ten families of objects made of analytic solids, with exact labels (section 5, embedded default).

Every shape is a pure function of a random state. Parts: support 0, main surface 1, back or top 2, accessory 3.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray
from numpy.random import RandomState

from tenfold_shared.errors import UserError
from tenfold_simple3dformer.solids import Box, Frustum, Solid, Triangles, cylinder

CATEGORIES = ("chair", "stool", "table", "desk", "bed", "sofa", "bookshelf", "lamp", "cup", "bottle")
VALID_PARTS = {
    "chair": (0, 1, 2, 3), "stool": (0, 1), "table": (0, 1), "desk": (0, 1, 2, 3), "bed": (0, 1, 2, 3),
    "sofa": (1, 2, 3), "bookshelf": (0, 1, 2), "lamp": (0, 1, 2), "cup": (1, 3), "bottle": (1, 2),
}  # fmt: skip
"""Category -> the parts that its members can have."""
PARTS: dict[str, list[int]] = {}
"""Category -> numbers of its parts among those of all categories, as ShapeNetPart numbers them."""
for _name in CATEGORIES:
    _first = sum(map(len, PARTS.values()))
    PARTS[_name] = list(range(_first, _first + len(VALID_PARTS[_name])))


@dataclass(frozen=True)
class Shape:
    """A union of solids with part labels, turned by ``yaw`` about the vertical."""

    category: str
    solids: list[tuple[Solid, int]] = field(default_factory=list)
    yaw: float = 0.0

    @functools.cached_property
    def bounds(self) -> tuple[Float[ndarray, " 3"], Float[ndarray, " 3"]]:
        """Smallest and largest coordinates before the turn."""
        vertices = np.concatenate([solid.triangles()[0] for solid, _ in self.solids])
        return vertices.min(0), vertices.max(0)

    @property
    def centre(self) -> Float[ndarray, " 3"]:
        """Middle of the bounds."""
        return (self.bounds[0] + self.bounds[1]) / 2

    @property
    def radius(self) -> float:
        """From the centre to a corner of the bounds."""
        return float(np.linalg.norm(self.bounds[1] - self.bounds[0]) / 2)

    def part_number(self, part: int) -> int:
        """The number among the parts of all categories."""
        return PARTS[self.category][VALID_PARTS[self.category].index(part)]

    def contains(self, points: Float[ndarray, "n 3"]) -> Bool[ndarray, " n"]:
        """Whether points lie inside any solid, in the frame before the turn."""
        inside = np.zeros(len(points), bool)
        for solid, _ in self.solids:
            inside |= solid.contains(points)
        return inside

    def voxels(self, side: int = 30) -> UInt8[ndarray, "v v v"]:
        """Occupancy at the cell centres of the cube of half-width 1.02 bounding radii around the shape; axes x, y, z."""
        ticks = (np.arange(side) + 0.5) / side * 2 - 1
        grid = np.stack(np.meshgrid(ticks, ticks, ticks, indexing="ij"), -1).reshape(-1, 3)
        points = _turn(grid, -self.yaw) * (1.02 * self.radius) + self.centre
        return self.contains(points).reshape(side, side, side).astype(np.uint8)

    def points(self, count: int, rng: RandomState) -> "Cloud":
        """Area-weighted surface samples; those strictly inside another solid are drawn again."""
        areas = np.array([solid.area for solid, _ in self.solids])
        found: list[Cloud] = []
        have = 0
        while have < count:
            want = np.bincount(rng.choice(len(areas), 2 * (count - have), p=areas / areas.sum()), minlength=len(areas))
            batch = []
            for i, (solid, part) in enumerate(self.solids):
                places, normals = solid.sample(int(want[i]), rng)
                free = np.ones(len(places), bool)
                for j, (other, _) in enumerate(self.solids):
                    if j != i:
                        free &= ~other.contains(places)
                batch.append(Cloud(places[free], normals[free], np.full(int(free.sum()), self.part_number(part))))
            merged = Cloud(*(np.concatenate(arrays) for arrays in zip(*batch, strict=True)))
            order = rng.permutation(len(merged.xyz))
            found.append(Cloud(*(array[order] for array in merged)))
            have += len(order)
        places, across, labels = (np.concatenate(arrays)[:count] for arrays in zip(*found, strict=True))
        return Cloud(_turn(places - self.centre, self.yaw), _turn(across, self.yaw), labels)

    def triangles(self) -> Triangles:
        """A mesh of all solids, centred and turned."""
        vertices, faces, offset = [], [], 0
        for solid, _ in self.solids:
            v, f = solid.triangles()
            vertices.append(v)
            faces.append(f + offset)
            offset += len(v)
        return _turn(np.concatenate(vertices) - self.centre, self.yaw), np.concatenate(faces)


class Cloud(NamedTuple):
    """Points, outward normals, part numbers."""

    xyz: Float[ndarray, "n 3"]
    normals: Float[ndarray, "n 3"]
    part: Int[ndarray, " n"]


def _turn(points: Float[ndarray, "n 3"], yaw: float) -> Float[ndarray, "n 3"]:
    c, s = math.cos(yaw), math.sin(yaw)
    return points @ np.array([[c, s, 0.0], [-s, c, 0.0], [0.0, 0.0, 1.0]])


def make_shape(category: str, rng: RandomState, *, turned: bool = True) -> Shape:
    """A random member of a family.

    Raises:
        UserError: there is no such family.

    """
    if category not in _FAMILIES:
        raise UserError(f"no shape family {category!r}: there are {', '.join(CATEGORIES)}")
    solids = _FAMILIES[category](rng)
    return Shape(category, solids, rng.uniform(0, 2 * math.pi) if turned else 0.0)


def make_shapes(count: int, seed: int) -> list[Shape]:
    """A balanced set, category i mod 10, from one legacy random state."""
    rng = RandomState(seed)
    return [make_shape(CATEGORIES[i % len(CATEGORIES)], rng) for i in range(count)]


def corrupt(
    voxels: UInt8[ndarray, "v v v"], rng: RandomState, drop: float = 0.0, noise: float = 0.0
) -> UInt8[ndarray, "v v v"]:
    """Occupied voxels deleted with probability ``drop``, then any voxel occupied with probability ``noise``."""
    kept = voxels & (rng.random_sample(voxels.shape) >= drop)
    return (kept | (rng.random_sample(voxels.shape) < noise)).astype(np.uint8)


@functools.lru_cache(maxsize=16)
def voxel_set(
    count: int, seed: int, side: int = 30, drop: float = 0.0, noise: float = 0.0
) -> tuple[UInt8[ndarray, "n bytes"], Int[ndarray, " n"]]:
    """Balanced shapes as packed bits (``numpy.unpackbits`` gives side^3), and their categories."""
    shapes = make_shapes(count, seed)
    rng = RandomState((seed + 1_000_003) % 2**32)
    packed = np.stack([np.packbits(corrupt(shape.voxels(side), rng, drop, noise)) for shape in shapes])
    return packed, np.array([CATEGORIES.index(shape.category) for shape in shapes])


@functools.lru_cache(maxsize=16)
def point_set(
    count: int, seed: int, points: int = 1024
) -> tuple[Float[ndarray, "n p 6"], Int[ndarray, " n"], Int[ndarray, "n p"]]:
    """Balanced shapes as clouds (unit-sphere coordinates and normals), their categories, the points' part numbers."""
    shapes = make_shapes(count, seed)
    rng = RandomState((seed + 1_000_003) % 2**32)
    clouds = [shape.points(points, rng) for shape in shapes]
    xyz = np.stack([c.xyz for c in clouds])
    xyz = xyz - xyz.mean(1, keepdims=True)
    xyz = xyz / np.linalg.norm(xyz, axis=2).max(1)[:, None, None]
    rows = np.concatenate([xyz, np.stack([c.normals for c in clouds])], 2).astype(np.float32)
    return rows, np.array([CATEGORIES.index(s.category) for s in shapes]), np.stack([c.part for c in clouds])


# -- the families ---------------------------------------------------------------------------------------------------------

Parts = list[tuple[Solid, int]]


def _legs(w: float, d: float, height: float, thick: float) -> Parts:
    """Four square legs under the corners of a w x d plate."""
    x, y = w - thick, d - thick
    return [(Box((sx * x, sy * y, height / 2), (2 * thick, 2 * thick, height)), 0) for sx in (-1, 1) for sy in (-1, 1)]


def _pedestal(spread: float, height: float) -> Parts:
    return [(cylinder((0, 0), 0, 0.04, spread), 0), (cylinder((0, 0), 0.04, height, 0.05), 0)]


def _plate(w: float, d: float, height: float, thick: float) -> Box:
    """A slab of half sizes w, d on top of a height."""
    return Box((0, 0, height + thick / 2), (2 * w, 2 * d, thick))


def _chair(rng: RandomState) -> Parts:
    thick, w, d = rng.uniform(0.03, 0.06), rng.uniform(0.3, 0.5), rng.uniform(0.3, 0.5)
    height, back = rng.uniform(0.35, 0.55), rng.uniform(0.3, 0.55)
    seat, top = 0.08, height + 0.08
    parts: Parts = [*_legs(w, d, height, thick), (_plate(w, d, height, seat), 1)]
    parts.append((Box((0, thick - d, top + back / 2), (2 * w, 2 * thick, back)), 2))
    if rng.random_sample() < 0.4:
        for side in (-1, 1):
            x = side * (w - thick)
            parts.append((Box((x, thick, top + 0.2), (2 * thick, 2 * (d - thick), 0.06)), 3))
            parts.append((Box((x, d - thick, top + 0.085), (2 * thick, 2 * thick, 0.17)), 3))
    return parts


def _stool(rng: RandomState) -> Parts:
    w, height = rng.uniform(0.2, 0.35), rng.uniform(0.45, 0.8)
    parts = _legs(w, w, height, rng.uniform(0.02, 0.04)) if rng.random_sample() < 0.5 else _pedestal(0.8 * w, height)
    seat: Solid = (
        _plate(w, w, height, 0.06) if rng.random_sample() < 0.5 else cylinder((0, 0), height, height + 0.06, w)
    )
    return [*parts, (seat, 1)]


def _table(rng: RandomState) -> Parts:
    w, d, height = rng.uniform(0.5, 0.9), rng.uniform(0.35, 0.6), rng.uniform(0.45, 0.75)
    legs = _legs(w, d, height, rng.uniform(0.03, 0.06)) if rng.random_sample() < 0.6 else _pedestal(0.6 * d, height)
    return [*legs, (_plate(w, d, height, rng.uniform(0.04, 0.08)), 1)]


def _desk(rng: RandomState) -> Parts:
    w, d, height = rng.uniform(0.55, 0.8), rng.uniform(0.3, 0.45), rng.uniform(0.6, 0.75)
    side = 1 if rng.random_sample() < 0.5 else -1
    block = rng.uniform(0.15, 0.25)
    drawers = Box((side * (w - block), 0, height / 2), (2 * block, 2 * d, height))
    panel = Box((-side * (w - 0.03), 0, height / 2), (0.06, 2 * d, height))
    modesty = Box((0, 0.03 - d, height * 0.65), (2 * w, 0.04, height * 0.7))
    return [(panel, 0), (_plate(w, d, height, 0.05), 1), (modesty, 2), (drawers, 3)]


def _bed(rng: RandomState) -> Parts:
    w, d = rng.uniform(0.7, 0.95), rng.uniform(0.4, 0.6)
    leg, slab, head = rng.uniform(0.08, 0.15), rng.uniform(0.15, 0.25), rng.uniform(0.3, 0.55)
    top = leg + slab
    headboard = Box((0.04 - w, 0, top + head / 2), (0.08, 2 * d, head))
    pillow = Box((0.25 - w, 0, top + 0.05), (0.3, 1.4 * d, 0.1))
    return [*_legs(w, d, leg, 0.05), (_plate(w, d, leg, slab), 1), (headboard, 2), (pillow, 3)]


def _sofa(rng: RandomState) -> Parts:
    w, d = rng.uniform(0.7, 1.0), rng.uniform(0.35, 0.5)
    seat, back, arm = rng.uniform(0.3, 0.42), rng.uniform(0.3, 0.45), rng.uniform(0.08, 0.14)
    parts: Parts = [(Box((0, 0, seat / 2), (2 * w, 2 * d, seat)), 1)]
    parts.append((Box((0, arm - d, seat + back / 2), (2 * w, 2 * arm, back)), 2))
    for side in (-1, 1):
        parts.append((Box((side * (w - arm), arm, seat + 0.1), (2 * arm, 2 * (d - arm), 0.2)), 3))
    return parts


def _bookshelf(rng: RandomState) -> Parts:
    w, d, height, thick = rng.uniform(0.35, 0.6), rng.uniform(0.13, 0.22), rng.uniform(1.0, 1.8), 0.03
    parts: Parts = [(Box((side * (w - thick), 0, height / 2), (2 * thick, 2 * d, height)), 0) for side in (-1, 1)]
    for z in np.linspace(thick, height - thick, rng.randint(3, 7)):
        parts.append((Box((0, 0, float(z)), (2 * (w - 2 * thick), 2 * d, 2 * thick)), 1))
    if rng.random_sample() < 0.5:
        parts.append((Box((0, 0.01 - d, height / 2), (2 * w, 0.02, height)), 2))
    return parts


def _lamp(rng: RandomState) -> Parts:
    pole, shade = rng.uniform(0.6, 1.2), rng.uniform(0.2, 0.35)
    wide = rng.uniform(0.18, 0.3)
    parts: Parts = [(cylinder((0, 0), 0, 0.05, rng.uniform(0.12, 0.22)), 0), (cylinder((0, 0), 0.05, pole, 0.03), 1)]
    return [*parts, (Frustum((0, 0), pole - 0.05, pole - 0.05 + shade, wide, wide * rng.uniform(0.4, 0.8)), 2)]


def _cup(rng: RandomState) -> Parts:
    r, height = rng.uniform(0.3, 0.45), rng.uniform(0.6, 1.0)
    below = r * rng.uniform(0.7, 1.0)
    bore = 0.85 * below
    body = Frustum((0, 0), 0, height, below, r, bore, 0.12 * height)
    reach = r * rng.uniform(0.4, 0.7)
    grip = Box((r + reach, 0, 0.55 * height), (0.1, 0.1, 0.5 * height))
    # The bar reaches into the wall, not into the cup.
    start = bore + 0.02
    bar = Box(((start + r + reach) / 2, 0, 0.75 * height), (r + reach - start, 0.1, 0.1))
    return [(body, 1), (grip, 3), (bar, 3)]


def _bottle(rng: RandomState) -> Parts:
    r, body, shoulder, neck = (
        rng.uniform(0.2, 0.35),
        rng.uniform(0.5, 0.9),
        rng.uniform(0.1, 0.25),
        rng.uniform(0.15, 0.3),
    )
    narrow = r * rng.uniform(0.25, 0.45)
    return [
        (cylinder((0, 0), 0, body, r), 1),
        (Frustum((0, 0), body, body + shoulder, r, narrow), 2),
        (cylinder((0, 0), body + shoulder, body + shoulder + neck, narrow), 2),
    ]


_FAMILIES = {
    "chair": _chair, "stool": _stool, "table": _table, "desk": _desk, "bed": _bed, "sofa": _sofa,
    "bookshelf": _bookshelf, "lamp": _lamp, "cup": _cup, "bottle": _bottle,
}  # fmt: skip
