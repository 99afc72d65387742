"""Analytic solids: containment, surface samples with exact normals, and triangles (section 5, embedded default).

Lengths are metres, z is up.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from numpy.random import RandomState

Points = Float[ndarray, "n 3"]
Triangles = tuple[Float[ndarray, "v 3"], Int[ndarray, "f 3"]]


@runtime_checkable
class Solid(Protocol):
    """What a shape is made of."""

    @property
    def area(self) -> float:
        """Surface in square metres."""
        ...

    def contains(self, points: Points) -> Bool[ndarray, " n"]:
        """Whether points lie strictly inside."""
        ...

    def sample(self, count: int, rng: RandomState) -> tuple[Points, Points]:
        """Uniform points on the surface, and outward normals."""
        ...

    def triangles(self) -> Triangles:
        """Vertices and faces; a round surface has 24 sides."""
        ...


@dataclass(frozen=True)
class Box:
    """An axis-parallel box by its centre and full size."""

    centre: tuple[float, float, float]
    size: tuple[float, float, float]

    @property
    def area(self) -> float:
        """Surface."""
        a, b, c = self.size
        return 2 * (a * b + b * c + c * a)

    def contains(self, points: Points) -> Bool[ndarray, " n"]:
        """Strictly inside."""
        inside = np.abs(points - np.array(self.centre)) < np.array(self.size) / 2 - 1e-9
        return np.asarray(inside.all(1))

    def sample(self, count: int, rng: RandomState) -> tuple[Points, Points]:
        """A face in proportion to its area, a place on it uniformly."""
        a, b, c = self.size
        faces = np.array([b * c, b * c, a * c, a * c, a * b, a * b])
        face = rng.choice(6, count, p=faces / faces.sum())
        axis, sign = face // 2, np.where(face % 2, 1.0, -1.0)
        local = rng.uniform(-0.5, 0.5, (count, 3))
        rows = np.arange(count)
        local[rows, axis] = 0.5 * sign
        normals = np.zeros((count, 3))
        normals[rows, axis] = sign
        return local * self.size + np.array(self.centre), normals

    def triangles(self) -> Triangles:
        """Twelve of them."""
        signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) / 2
        quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
        faces = [triangle for a, b, c, d in quads for triangle in ((a, b, c), (a, c, d))]
        return signs * self.size + np.array(self.centre), np.array(faces)


@dataclass(frozen=True)
class Frustum:
    """A cone's section around a vertical axis: radius ``below`` at ``low``, ``above`` at ``high``.

    With ``bore`` > 0, a cylinder of that radius is cut out from ``floor`` to the top.
    """

    axis: tuple[float, float]
    low: float
    high: float
    below: float
    above: float
    bore: float = 0.0
    floor: float = 0.0

    def _pieces(self) -> list[tuple[float, str]]:
        slant = math.hypot(self.high - self.low, self.below - self.above)
        pieces = [(math.pi * (self.below + self.above) * slant, "side"), (math.pi * self.below**2, "bottom")]
        pieces.append((math.pi * (self.above**2 - self.bore**2), "top"))
        if self.bore:
            pieces += [(2 * math.pi * self.bore * (self.high - self.floor), "bore"), (math.pi * self.bore**2, "floor")]
        return pieces

    @property
    def area(self) -> float:
        """Surface."""
        return sum(area for area, _ in self._pieces())

    def contains(self, points: Points) -> Bool[ndarray, " n"]:
        """Strictly inside."""
        radius = np.hypot(points[:, 0] - self.axis[0], points[:, 1] - self.axis[1])
        share = (points[:, 2] - self.low) / (self.high - self.low)
        inside = (share > 1e-9) & (share < 1 - 1e-9) & (radius < self.below + (self.above - self.below) * share - 1e-9)
        if self.bore:
            inside &= ~((radius <= self.bore) & (points[:, 2] >= self.floor))
        return inside

    def sample(self, count: int, rng: RandomState) -> tuple[Points, Points]:
        """A piece in proportion to its area, a place on it uniformly."""
        pieces = self._pieces()
        areas = np.array([area for area, _ in pieces])
        which = rng.choice(len(pieces), count, p=areas / areas.sum())
        turn, u = rng.uniform(0, 2 * math.pi, count), rng.uniform(0, 1, count)
        radius, height = np.zeros(count), np.zeros(count)
        normals = np.zeros((count, 3))
        across = np.stack([np.cos(turn), np.sin(turn)], 1)
        for i, (_, name) in enumerate(pieces):
            at = which == i
            if name == "side":
                # The circumference grows linearly along the side: the share t has density ~ below + (above - below) t.
                a, b = self.below, self.above - self.below
                t = u[at] if abs(b) < 1e-12 else (np.sqrt(a**2 + u[at] * (2 * a * b + b**2)) - a) / b
                radius[at], height[at] = a + b * t, self.low + (self.high - self.low) * t
                slope = np.array([self.high - self.low, self.below - self.above])
                slope = slope / np.linalg.norm(slope)
                normals[at] = np.concatenate([across[at] * slope[0], np.full((int(at.sum()), 1), slope[1])], 1)
            elif name == "bore":
                radius[at], height[at] = self.bore, self.floor + (self.high - self.floor) * u[at]
                normals[at, :2] = -across[at]
            else:
                outer = {"bottom": self.below, "top": self.above, "floor": self.bore}[name]
                inner = self.bore if name == "top" else 0.0
                radius[at] = np.sqrt(inner**2 + u[at] * (outer**2 - inner**2))
                height[at] = {"bottom": self.low, "top": self.high, "floor": self.floor}[name]
                normals[at, 2] = -1.0 if name == "bottom" else 1.0
        places = np.stack([self.axis[0] + radius * across[:, 0], self.axis[1] + radius * across[:, 1], height], 1)
        return places, normals

    def triangles(self, sides: int = 24) -> Triangles:
        """The profile, turned about the axis; its ends lie on the axis."""
        profile = [(0.0, self.low), (self.below, self.low), (self.above, self.high)]
        profile += [(self.bore, self.high), (self.bore, self.floor)] if self.bore else []
        profile += [(0.0, self.floor if self.bore else self.high)]
        turn = np.arange(sides) * 2 * math.pi / sides
        rings = [
            np.stack([self.axis[0] + r * np.cos(turn), self.axis[1] + r * np.sin(turn), np.full(sides, z)], 1)
            for r, z in profile
        ]
        faces = []
        for ring in range(len(profile) - 1):
            for i in range(sides):
                a, b = ring * sides + i, ring * sides + (i + 1) % sides
                if profile[ring][0] > 0:
                    faces.append((a, b, b + sides))
                if profile[ring + 1][0] > 0:
                    faces.append((a, b + sides, a + sides))
        return np.concatenate(rings), np.array(faces)


def cylinder(axis: tuple[float, float], low: float, high: float, radius: float) -> Frustum:
    """A frustum of one radius."""
    return Frustum(axis, low, high, radius, radius)
