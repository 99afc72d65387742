"""Pinhole cameras: the set type, changes of convention, rays, projection, paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tenfold_shared.errors import UserError

ROTATION_TOLERANCE = 1e-3


@dataclass(frozen=True)
class CameraSet:
    """N pinhole cameras of one image size, in the OpenCV convention with integer pixel centres.

    Attributes:
        intrinsics: [N, 3, 3] float64, in pixels: [[fx, 0, cx], [0, fy, cy], [0, 0, 1]].
        camera_to_world: [N, 4, 4] float64, rigid; its columns are the camera's right, down and forward axes.
        height, width: size of every image, in pixels.
        names: one name a view, by default its index.
        near, far: [N] z-depths between which the view's content lies, or None where the source does not say.

    Raises:
        UserError: shapes that do not fit together, values that are not finite, a focal length that is not positive, a
            rotation that is none, near >= far; the view is named.

    """

    intrinsics: np.ndarray
    camera_to_world: np.ndarray
    height: int
    width: int
    names: tuple[str, ...] = ()
    near: np.ndarray | None = None
    far: np.ndarray | None = None

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        for key in ("intrinsics", "camera_to_world", "near", "far"):
            if getattr(self, key) is not None:
                set_(self, key, np.asarray(getattr(self, key), dtype=np.float64))
        count = len(self.camera_to_world)
        if count == 0:
            raise UserError("a camera set needs at least one view, and got none")
        if self.camera_to_world.shape != (count, 4, 4) or self.intrinsics.shape != (count, 3, 3):
            raise UserError(
                f"cameras need intrinsics [N, 3, 3] and camera_to_world [N, 4, 4], "
                f"got {self.intrinsics.shape} and {self.camera_to_world.shape}"
            )
        set_(self, "names", tuple(self.names) or tuple(f"{i:03d}" for i in range(count)))
        if len(self.names) != count:
            raise UserError(f"{len(self.names)} names were given for {count} cameras")
        if self.height < 1 or self.width < 1:
            raise UserError(f"the image size {self.width}x{self.height} is empty")
        self._check_poses()
        self._check_bounds()

    def _check_poses(self) -> None:
        finite = np.isfinite(self.camera_to_world).all((1, 2)) & np.isfinite(self.intrinsics).all((1, 2))
        self._refuse(~finite, "has a camera with values that are not finite")
        rotation = self.camera_to_world[:, :3, :3]
        error = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max((1, 2))
        rigid = (error < ROTATION_TOLERANCE) & (np.linalg.det(rotation) > 0)
        self._refuse(
            np.asarray(~rigid), "has a pose whose upper-left 3x3 block is not a rotation (orthonormal, determinant +1)"
        )
        tilted = np.abs(self.camera_to_world[:, 3] - [0, 0, 0, 1]).max(1) > ROTATION_TOLERANCE
        self._refuse(np.asarray(tilted), "has a pose whose last row is not 0 0 0 1")
        self._refuse(
            (self.intrinsics[:, [0, 1], [0, 1]] <= 0).any(1), "has a focal length that is not a positive number"
        )

    def _check_bounds(self) -> None:
        if (self.near is None) != (self.far is None):
            raise UserError("near and far depths come together: give both or neither")
        if self.near is None or self.far is None:
            return
        if self.near.shape != (len(self),) or self.far.shape != (len(self),):
            raise UserError(
                f"near and far need one value a view ({len(self)}), got {self.near.shape}, {self.far.shape}"
            )
        good = np.isfinite(self.near) & np.isfinite(self.far) & (self.near > 0) & (self.near < self.far)
        self._refuse(~good, "needs depths 0 < near < far")

    def _refuse(self, bad: np.ndarray | np.bool, what: str) -> None:
        if bad.any():
            raise UserError(f"view {self.names[int(np.flatnonzero(bad)[0])]} {what}")

    def __len__(self) -> int:
        return len(self.camera_to_world)

    def __getitem__(self, views: int | slice | Sequence[int] | np.ndarray) -> CameraSet:
        """The chosen views, always as a set."""
        index = np.atleast_1d(np.arange(len(self))[np.asarray(views, dtype=int) if isinstance(views, list) else views])
        return replace(
            self,
            intrinsics=self.intrinsics[index],
            camera_to_world=self.camera_to_world[index],
            names=tuple(self.names[i] for i in index),
            near=None if self.near is None else self.near[index],
            far=None if self.far is None else self.far[index],
        )

    @property
    def centres(self) -> np.ndarray:
        """Camera centres in the world, [N, 3]."""
        return self.camera_to_world[:, :3, 3]

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The smallest near and the largest far of all views, or None."""
        if self.near is None or self.far is None:
            return None
        return float(self.near.min()), float(self.far.max())

    def with_bounds(self, near: float, far: float) -> CameraSet:
        """The same cameras with one near and far for all."""
        return replace(self, near=np.full(len(self), float(near)), far=np.full(len(self), float(far)))

    def resized(self, height: int, width: int) -> CameraSet:
        """The cameras of the same images resized; the first two rows of K scale with the image (no half-pixel term)."""
        scale = np.array([width / self.width, height / self.height, 1.0])
        return replace(self, intrinsics=self.intrinsics * scale[:, None], height=height, width=width)

    def transformed(self, world: np.ndarray, scale: float = 1.0) -> CameraSet:
        """The cameras after the similarity `p -> scale * (world p)`; `world` [4, 4] is rigid. Bounds scale too."""
        poses = world @ self.camera_to_world
        poses[:, :3, 3] *= scale
        return replace(
            self,
            camera_to_world=poses,
            near=None if self.near is None else self.near * scale,
            far=None if self.far is None else self.far * scale,
        )

    def rays(self, view: int, pixels: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Origins and directions through pixels of one view.

        Args:
            view: index of the camera.
            pixels: [..., 2] positions (u, v), not necessarily integer; by default all integer positions [H, W, 2].

        Returns:
            origins and directions [..., 3]; the direction has z-component 1 in the camera, so parameters are z-depths.

        """
        grid = self.pixel_grid() if pixels is None else np.asarray(pixels, dtype=np.float64)
        homogeneous = np.concatenate([grid, np.ones_like(grid[..., :1])], -1)
        turn = self.camera_to_world[view, :3, :3] @ np.linalg.inv(self.intrinsics[view])
        directions = homogeneous @ turn.T
        return np.broadcast_to(self.centres[view], directions.shape), directions

    def pixel_grid(self) -> np.ndarray:
        """Integer pixel positions (u, v), [H, W, 2]."""
        u, v = np.meshgrid(np.arange(self.width), np.arange(self.height))
        return np.stack([u, v], -1).astype(np.float64)

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """World points [..., 3] to pixel positions [N, ..., 2] and z-depths [N, ...] in every view."""
        flat = np.asarray(points, dtype=np.float64).reshape(-1, 3)
        rotation = self.camera_to_world[:, :3, :3]
        local = np.einsum("nji,npj->npi", rotation, flat[None] - self.centres[:, None])
        image = np.einsum("nij,npj->npi", self.intrinsics, local)
        shape = (len(self), *np.shape(points)[:-1])
        depth = local[..., 2]
        with np.errstate(divide="ignore", invalid="ignore"):
            pixel = image[..., :2] / image[..., 2:]
        return pixel.reshape(*shape, 2), depth.reshape(shape)


def intrinsics_matrix(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    """[[fx, 0, cx], [0, fy, cy], [0, 0, 1]]."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=np.float64)


def opencv_from_opengl(camera_to_world: np.ndarray) -> np.ndarray:
    """Poses [..., 4, 4] with OpenGL axes (x right, y up, z backward) as OpenCV poses: columns 1 and 2 change sign."""
    return np.asarray(camera_to_world, dtype=np.float64) * np.array([1.0, -1.0, -1.0, 1.0])


opengl_from_opencv = opencv_from_opengl  # the change of sign is its own inverse


def look_at(eye: np.ndarray, target: np.ndarray, up: Sequence[float] = (0.0, 0.0, 1.0)) -> np.ndarray:
    """OpenCV poses [..., 4, 4] of cameras at `eye` [..., 3] that look at `target`, image-down away from `up`."""
    eye = np.asarray(eye, dtype=np.float64)
    forward = unit(np.broadcast_to(np.asarray(target, dtype=np.float64), eye.shape) - eye)
    right = unit(np.cross(forward, np.broadcast_to(np.asarray(up, dtype=np.float64), eye.shape)))
    pose = np.zeros((*eye.shape[:-1], 4, 4))
    pose[..., :3, :] = np.stack([right, np.cross(forward, right), forward, eye], -1)
    pose[..., 3, 3] = 1.0
    return pose


def unit(vector: np.ndarray) -> np.ndarray:
    """`vector` [..., k] over its Euclidean length."""
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)


def on_sphere(azimuth: np.ndarray, elevation: np.ndarray, radius: float) -> np.ndarray:
    """Points [..., 3] of a sphere about the origin, z up; angles in radians."""
    return radius * np.stack(
        [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], -1
    )


def circle_path(count: int = 120, radius: float = 4.0, elevation: float = 30.0) -> np.ndarray:
    """Poses [count, 4, 4] around the z axis at `elevation` degrees, looking at the origin."""
    azimuth = 2 * np.pi * np.arange(count) / count
    return look_at(on_sphere(azimuth, np.full(count, np.deg2rad(elevation)), radius), np.zeros(3))
