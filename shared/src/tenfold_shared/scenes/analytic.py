"""Scenes of spheres, boxes and discs whose colour, depth, normals, distances and visibility are exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tenfold_shared.scenes.cameras import CameraSet, intrinsics_matrix, look_at, on_sphere, unit
from tenfold_shared.scenes.views import Scene

EPSILON = 1e-3  # a hit nearer than this is the surface the ray starts on
CAMERA_ANGLE_X = 0.6911112070083618  # horizontal field of view of the NeRF-synthetic cameras, in radians
AMBIENT, DIFFUSE = 0.35, 0.65
GOLDEN = 0.6180339887

Albedo = Callable[[np.ndarray, np.ndarray], np.ndarray]  # world points [P, 3], normals [P, 3] -> colours [P, 3]
Gloss = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # normals, towards light, towards eye -> [P]


@dataclass(frozen=True)
class Sphere:
    """A ball's surface: centre [3], radius, albedo."""

    centre: np.ndarray
    radius: float
    albedo: Albedo

    def intersect(self, origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First crossing along rays [P, 3]: parameter [P] (inf without one) and outward normal [P, 3]."""
        offset = origins - self.centre
        a = (directions**2).sum(-1)
        b = (offset * directions).sum(-1)
        disc = b**2 - a * ((offset**2).sum(-1) - self.radius**2)
        root = np.sqrt(np.maximum(disc, 0))
        first, second = (-b - root) / a, (-b + root) / a
        t = np.where(first > EPSILON, first, second)
        t = np.where((disc >= 0) & (t > EPSILON), t, np.inf)
        point = offset + np.where(np.isfinite(t), t, 0)[:, None] * directions
        return t, point / self.radius

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Signed distance [P], negative inside."""
        return np.linalg.norm(points - self.centre, axis=-1) - self.radius

    def sample(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """`count` points [count, 3], uniform on the surface."""
        return self.centre + self.radius * unit(generator.standard_normal((count, 3)))

    @property
    def area(self) -> float:
        """Of the surface."""
        return float(4 * np.pi * self.radius**2)


@dataclass(frozen=True)
class Box:
    """A box turned about the vertical: centre [3], half-sizes [3], yaw in radians, albedo."""

    centre: np.ndarray
    half: np.ndarray
    yaw: float
    albedo: Albedo

    def intersect(self, origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First crossing along rays [P, 3]: parameter [P] (inf without one) and outward normal [P, 3]."""
        start, step = (origins - self.centre) @ _turn(self.yaw), directions @ _turn(self.yaw)
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = (-self.half - start) / step, (self.half - start) / step
        # A ray along a face divides 0 by 0 there: it is inside that slab everywhere.
        low, high = np.where(np.isnan(low), -np.inf, low), np.where(np.isnan(high), np.inf, high)
        enter, leave = np.minimum(low, high).max(-1), np.maximum(low, high).min(-1)
        t = np.where(enter > EPSILON, enter, leave)
        t = np.where((enter <= leave) & (t > EPSILON), t, np.inf)
        local = (start + np.where(np.isfinite(t), t, 0)[:, None] * step) / self.half
        axis = np.abs(local).argmax(-1)
        normal = np.eye(3)[axis] * np.sign(np.take_along_axis(local, axis[:, None], -1))
        return t, normal @ _turn(self.yaw).T

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Signed distance [P], negative inside."""
        outside = np.abs((points - self.centre) @ _turn(self.yaw)) - self.half
        return np.linalg.norm(np.maximum(outside, 0), axis=-1) + np.minimum(outside.max(-1), 0)

    def sample(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """`count` points [count, 3], uniform on the surface."""
        x, y, z = self.half
        axis = generator.choice(3, size=count, p=np.array([y * z, x * z, x * y]) / (y * z + x * z + x * y))
        local = generator.uniform(-1, 1, (count, 3))
        np.put_along_axis(local, axis[:, None], generator.choice([-1.0, 1.0], (count, 1)), -1)
        return self.centre + (local * self.half) @ _turn(self.yaw).T

    @property
    def area(self) -> float:
        """Of the surface."""
        x, y, z = self.half
        return float(8 * (x * y + y * z + x * z))


@dataclass(frozen=True)
class Disc:
    """A horizontal disc about the vertical axis through the origin, facing up: height, radius, albedo."""

    height: float
    radius: float
    albedo: Albedo

    def intersect(self, origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First crossing along rays [P, 3]: parameter [P] (inf without one) and normal [P, 3]."""
        with np.errstate(divide="ignore", invalid="ignore"):
            t = (self.height - origins[:, 2]) / directions[:, 2]
        hit = np.isfinite(t) & (t > EPSILON)
        point = origins + np.where(hit, t, 0)[:, None] * directions
        inside = np.hypot(point[:, 0], point[:, 1]) <= self.radius
        return np.where(hit & inside, t, np.inf), np.broadcast_to([0.0, 0.0, 1.0], origins.shape)

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Distance [P]; a disc has no inside."""
        beyond = np.maximum(np.hypot(points[:, 0], points[:, 1]) - self.radius, 0)
        return np.hypot(beyond, points[:, 2] - self.height)

    def sample(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """`count` points [count, 3], uniform on the surface."""
        radius = self.radius * np.sqrt(generator.uniform(size=count))
        angle = generator.uniform(0, 2 * np.pi, count)
        return np.stack([radius * np.cos(angle), radius * np.sin(angle), np.full(count, self.height)], -1)

    @property
    def area(self) -> float:
        """Of one side."""
        return float(np.pi * self.radius**2)


def _turn(yaw: float) -> np.ndarray:
    """Rotation about z by `yaw`; right-multiplied, it takes world coordinates to those of a body with that yaw."""
    return np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1.0]])


@dataclass(frozen=True)
class Hit:
    """What rays [P, 3] meet first.

    Attributes:
        depth: ray parameter [P], the z-depth for directions of `CameraSet.rays`; inf for a miss.
        normal: unit outward normal [P, 3], zero for a miss.
        surface: index of the surface [P], -1 for a miss.

    """

    depth: np.ndarray
    normal: np.ndarray
    surface: np.ndarray


@dataclass(frozen=True)
class AnalyticScene:
    """Surfaces under one distant light, on white, without shadows.

    Attributes:
        surfaces: the nearest one met is seen.
        light: unit vector towards the light.
        gloss: highlight of each surface, added to its diffuse colour, or None.

    """

    surfaces: tuple[Sphere | Box | Disc, ...]
    light: np.ndarray
    gloss: tuple[Gloss | None, ...]

    def trace(self, origins: np.ndarray, directions: np.ndarray) -> Hit:
        """The first surface along rays [P, 3]."""
        depth = np.full(len(origins), np.inf)
        normal = np.zeros((len(origins), 3))
        surface = np.full(len(origins), -1)
        for number, body in enumerate(self.surfaces):
            t, n = body.intersect(origins, directions)
            nearer = t < depth
            depth, surface = np.where(nearer, t, depth), np.where(nearer, number, surface)
            normal = np.where(nearer[:, None], n, normal)
        return Hit(depth, normal, surface)

    def colour(self, origins: np.ndarray, directions: np.ndarray, hit: Hit) -> np.ndarray:
        """Colours [P, 3] in [0, 1] of traced rays; white where nothing is met."""
        colour = np.ones((len(origins), 3))
        for number, (body, gloss) in enumerate(zip(self.surfaces, self.gloss, strict=True)):
            chosen = np.flatnonzero(hit.surface == number)
            normal = hit.normal[chosen]
            points = origins[chosen] + hit.depth[chosen, None] * directions[chosen]
            lit = body.albedo(points, normal) * (AMBIENT + DIFFUSE * np.maximum(normal @ self.light, 0))[:, None]
            if gloss is not None:
                lit = lit + gloss(normal, self.light, -unit(directions[chosen]))[:, None]
            colour[chosen] = np.clip(lit, 0, 1)
        return colour

    def visible(self, points: np.ndarray, eye: np.ndarray, tolerance: float = 1e-4) -> np.ndarray:
        """Whether each of the points [P, 3] is seen from `eye` [3]: no surface lies between, up to `tolerance`."""
        directions = points - eye
        hit = self.trace(np.broadcast_to(eye, points.shape), directions)
        return hit.depth >= 1 - tolerance / np.linalg.norm(directions, axis=-1)

    def signed_distance(self, points: np.ndarray) -> np.ndarray:
        """Distance [P] to the union of the surfaces, negative inside; exact outside, a bound of it inside."""
        return np.stack([body.distance(points) for body in self.surfaces]).min(0)

    def sample_surface(self, count: int, seed: int = 0) -> np.ndarray:
        """`count` points [count, 3] spread uniformly over the outer surface of the union."""
        generator = np.random.default_rng(seed)
        areas = np.array([body.area for body in self.surfaces])
        found: list[np.ndarray] = []
        while sum(map(len, found)) < count:
            counts = generator.multinomial(count, areas / areas.sum())
            points = np.concatenate([b.sample(n, generator) for b, n in zip(self.surfaces, counts, strict=True)])
            points = points[self.signed_distance(points) > -1e-9]
            found.append(generator.permutation(points))
        return np.concatenate(found)[:count]


def render_views(scene: AnalyticScene, cameras: CameraSet, name: str, supersample: int = 1) -> Scene:
    """Exact pictures of an analytic scene: RGBA floats with straight alpha, and z-depth of the pixel's centre ray.

    Args:
        scene: what is seen.
        cameras: from where.
        name: of the result.
        supersample: n x n rays a pixel at the centres of its n x n cells, averaged.

    """
    steps = (np.arange(supersample) + 0.5) / supersample - 0.5
    images, depths = [], []
    for view in range(len(cameras)):
        colour = np.zeros((cameras.height * cameras.width, 3))
        cover = np.zeros(cameras.height * cameras.width)
        for v in steps:
            for u in steps:
                origins, directions = (
                    x.reshape(-1, 3) for x in cameras.rays(view, cameras.pixel_grid() + np.array([u, v]))
                )
                hit = scene.trace(origins, directions)
                colour += scene.colour(origins, directions, hit) / supersample**2
                cover += (hit.surface >= 0) / supersample**2
        straight = np.where(cover[:, None] > 0, (colour - 1 + cover[:, None]) / np.maximum(cover, 1e-12)[:, None], 1.0)
        images.append(np.concatenate([straight, cover[:, None]], -1).reshape(cameras.height, cameras.width, 4))
        origins, directions = (x.reshape(-1, 3) for x in cameras.rays(view))
        depths.append(scene.trace(origins, directions).depth.reshape(cameras.height, cameras.width))
    return Scene(name, cameras, images, np.stack(depths))


def _cameras(poses: np.ndarray, size: int, near: float, far: float) -> CameraSet:
    focal = 0.5 * size / np.tan(0.5 * CAMERA_ANGLE_X)
    matrix = intrinsics_matrix(focal, focal, size / 2, size / 2)
    return CameraSet(np.tile(matrix, (len(poses), 1, 1)), poses, size, size).with_bounds(near, far)


def tabletop(seed: int, specular: float = 0.3) -> AnalyticScene:
    """Five textured spheres and cubes on a checkered disc, drawn from `RandomState(seed)`.

    Args:
        seed: of the scene; a set of scenes is several seeds.
        specular: strength of the view-dependent highlight (Blinn, exponent 30).

    """
    draw = np.random.RandomState(seed)

    def gloss(normal: np.ndarray, light: np.ndarray, eye: np.ndarray) -> np.ndarray:
        return specular * np.maximum((normal * unit(eye + light)).sum(-1), 0) ** 30

    bodies: list[Sphere | Box | Disc] = []
    for number in range(5):
        angle = 2 * np.pi * (number + draw.uniform(-0.3, 0.3)) / 5
        radius = 0.0 if number == 0 else draw.uniform(0.25, 0.75)
        size = draw.uniform(0.18, 0.34)
        round_ = draw.rand() < 0.5
        yaw = draw.uniform(0, np.pi)
        base, frequency = draw.uniform(0.15, 0.85, 3), draw.uniform(6, 14, 3)
        phase, amplitude = draw.uniform(0, 6.28, 3), draw.uniform(0.15, 0.35)
        centre = np.array([radius * np.cos(angle), radius * np.sin(angle), -0.45 + size])
        albedo = _waves(centre, yaw, base, frequency, phase, amplitude)
        bodies.append(Sphere(centre, size, albedo) if round_ else Box(centre, np.full(3, size), yaw, albedo))
    ground, frequency_ground = draw.uniform(0.3, 0.7, 3), draw.uniform(4, 8)

    def checks(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        sign = np.sign(np.sin(frequency_ground * points[:, :1]) * np.sin(frequency_ground * points[:, 1:2]))
        return np.clip(ground + 0.2 * sign, 0, 1)

    bodies.append(Disc(-0.45, 1.15, checks))
    return AnalyticScene(tuple(bodies), unit(np.array([0.4, 0.3, 0.86])), (gloss,) * len(bodies))


def _waves(
    centre: np.ndarray, yaw: float, base: np.ndarray, frequency: np.ndarray, phase: np.ndarray, amplitude: float
) -> Albedo:
    def albedo(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        x, y, z = ((points - centre) @ _turn(yaw)).T[:, :, None]
        across = np.sin(frequency[0] * x + phase) * np.cos(frequency[1] * y + phase[::-1])
        return np.clip(base + amplitude * across + 0.5 * amplitude * np.sin(frequency[2] * z + phase), 0, 1)

    return albedo


def tabletop_cameras(count: int = 20, size: int = 48, offset: float = 0.0, radius: float = 3.4) -> CameraSet:
    """Cameras around the table, looking at (0, 0, -0.2); near 2, far 5 (6 for radii of 4 and more).

    Args:
        count: number of views.
        size: width and height of the pictures.
        offset: shifts angles: 0 for training, 0.13 for validation, 0.29 for test views.
        radius: distance from the origin.

    """
    index = np.arange(count) + 0.5
    elevation = np.deg2rad(15 + 55 * np.mod(GOLDEN * index + offset, 1))
    azimuth = 2 * np.pi * np.mod(index / count + offset, 1)
    poses = look_at(on_sphere(azimuth, elevation, radius), np.array([0, 0, -0.2]))
    return _cameras(poses, size, 2.0, 6.0 if radius >= 4 else 5.0)


def tabletop_views(
    seed: int, count: int = 20, size: int = 48, offset: float = 0.0, specular: float = 0.3, supersample: int = 1
) -> Scene:
    """`tabletop(seed)` seen by `tabletop_cameras(count, size, offset)`."""
    cameras = tabletop_cameras(count, size, offset)
    return render_views(tabletop(seed, specular), cameras, f"tabletop{seed:03d}", supersample)


def blocks() -> AnalyticScene:
    """Two spheres and a box on a slab, with checkers and stripes; the blue sphere has a highlight (Phong, power 20)."""
    low, high = np.array([-1.0, -0.75, -0.4]), np.array([-0.45, -0.2, 0.25])
    slab_low, slab_high = np.array([-1.15, -1.15, -0.5]), np.array([1.15, 1.15, -0.4])

    def two(odd: np.ndarray, first: tuple[float, ...], second: tuple[float, ...]) -> np.ndarray:
        return np.where((np.mod(odd, 2) == 1)[:, None], np.array(first), np.array(second))

    def globe(points: np.ndarray, n: np.ndarray) -> np.ndarray:
        longitude = np.floor(6 * np.arctan2(n[:, 1], n[:, 0]) / np.pi)
        latitude = np.floor(6 * np.arcsin(np.clip(n[:, 2], -1, 1)) / np.pi)
        return two(longitude + latitude, (0.9, 0.25, 0.15), (0.95, 0.85, 0.3))

    def blue(points: np.ndarray, n: np.ndarray) -> np.ndarray:
        return np.broadcast_to([0.2, 0.35, 0.9], points.shape)

    def stripes(points: np.ndarray, n: np.ndarray) -> np.ndarray:
        return two(np.floor(10 * points[:, 2]), (0.15, 0.7, 0.35), (0.9, 0.95, 0.9))

    def checker(points: np.ndarray, n: np.ndarray) -> np.ndarray:
        tile = np.floor(4 * points[:, 0]) + np.floor(4 * points[:, 1])
        return two(tile, (0.35, 0.3, 0.3), (0.8, 0.78, 0.72))

    def phong(normal: np.ndarray, light: np.ndarray, eye: np.ndarray) -> np.ndarray:
        mirrored = 2 * (normal @ light)[:, None] * normal - light
        return 0.4 * np.maximum((mirrored * eye).sum(-1), 0) ** 20

    surfaces = (
        Sphere(np.array([0, 0.05, 0.25]), 0.5, globe),
        Sphere(np.array([0.68, 0.5, -0.1]), 0.3, blue),
        Box((low + high) / 2, (high - low) / 2, 0.0, stripes),
        Box((slab_low + slab_high) / 2, (slab_high - slab_low) / 2, 0.0, checker),
    )
    return AnalyticScene(surfaces, unit(np.array([0.4, -0.3, 0.85])), (None, phong, None, None))


def blocks_cameras(count: int = 20, size: int = 64, offset: float = 0.0, *, forward: bool = False) -> CameraSet:
    """Cameras at radius 4 around the blocks, looking at the origin; near 2, far 6.

    Args:
        count: number of views.
        size: width and height of the pictures.
        offset: azimuth shift in degrees: 0 for training, 23 for validation, 68 for test views.
        forward: an arc of 60 degrees in front of the scene instead of the golden spiral, for the LLFF layout.

    """
    index = np.arange(count)
    azimuth = np.mod(offset + 137.50776405 * index, 360)
    elevation = 15 + 60 * (index + 0.5) / count
    if forward:
        azimuth = -90 + 30 * (2 * (index + 0.5) / count - 1)
        elevation = 25 + 15 * (2 * np.mod(GOLDEN * (index + 0.5), 1) - 1)
    poses = look_at(on_sphere(np.deg2rad(azimuth), np.deg2rad(elevation), 4.0), np.zeros(3))
    return _cameras(poses, size, 2.0, 6.0)


def blocks_views(count: int = 20, size: int = 64, offset: float = 0.0, *, forward: bool = False) -> Scene:
    """The blocks seen by `blocks_cameras`, 3 x 3 rays a pixel."""
    return render_views(blocks(), blocks_cameras(count, size, offset, forward=forward), "blocks", supersample=3)
