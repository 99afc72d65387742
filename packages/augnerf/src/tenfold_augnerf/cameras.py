"""Rays of pinhole cameras, NDC, and cameras moved by Euler angles and offsets (sections 2.2 and 5.2).

Poses are OpenGL camera-to-world matrices here (x right, y up, the camera looks along -z), as the paper's code has them;
data arrives in `tenfold_shared.scenes`' OpenCV convention, whose rays are the same.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tenfold_shared.scenes import look_at, opengl_from_opencv


class Rays(NamedTuple):
    """A batch of rays.

    Attributes:
        origins: in the world.
        directions: not normalised; the component along the optical axis is 1, so ray parameters are z-depths.
        cameras: index of each ray's camera; needed by the keys `cam_r` and `cam_t`.
        radii: of the cone at unit parameter (a pixel's width times 2/√12), for mip-NeRF.
        near: per-ray bounds, where they differ from the renderer's.
        far: likewise.

    """

    origins: Float[Tensor, "rays 3"]
    directions: Float[Tensor, "rays 3"]
    cameras: Int[Tensor, " rays"] | None = None
    radii: Float[Tensor, "rays 1"] | None = None
    near: Float[Tensor, "rays 1"] | None = None
    far: Float[Tensor, "rays 1"] | None = None

    def chosen(self, index: Tensor | slice) -> "Rays":
        """Some of the rays."""
        held = {name: value for name, value in self._asdict().items() if value is not None}
        return self._replace(**{name: value[index] for name, value in held.items()})


def intrinsics(height: int, width: int, focal: float) -> Float[Tensor, "3 3"]:
    """K = [[f, 0, W/2], [0, f, H/2], [0, 0, 1]], in double precision."""
    return torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], dtype=torch.float64)


def perspective_rays(
    height: int, width: int, matrix: Float[Tensor, "3 3"], pose: Float[Tensor, "3 4"]
) -> Float[Tensor, "2 height width 3"]:
    """Origins and directions through all pixels, without a half-pixel shift: d = R ((i - cx)/fx, -(j - cy)/fy, -1)."""
    j, i = torch.meshgrid(
        torch.arange(height, dtype=pose.dtype, device=pose.device),
        torch.arange(width, dtype=pose.dtype, device=pose.device),
        indexing="ij",
    )
    matrix = matrix.to(pose)
    local = torch.stack(
        [(i - matrix[0, 2]) / matrix[0, 0], -(j - matrix[1, 2]) / matrix[1, 1], -torch.ones_like(i)], -1
    )
    directions = local @ pose[:3, :3].T
    return torch.stack([pose[:3, 3].expand_as(directions), directions])


def orthographic_rays(
    height: int, width: int, matrix: Float[Tensor, "3 3"], pose: Float[Tensor, "3 4"]
) -> Float[Tensor, "2 height width 3"]:
    """Parallel rays along -z that start where the perspective camera's would cross the plane at distance 1."""
    _, directions = perspective_rays(height, width, matrix, pose)
    backward = pose[:3, 2]
    return torch.stack([pose[:3, 3] + directions + backward, (-backward).expand_as(directions)])


def ndc_rays(
    origins: Float[Tensor, "*rays 3"],
    directions: Float[Tensor, "*rays 3"],
    height: int,
    width: int,
    focal: float,
    near: float = 1.0,
) -> tuple[Float[Tensor, "*rays 3"], Float[Tensor, "*rays 3"]]:
    """Rays of forward-facing cameras (world looking along -z) in normalised device coordinates, parameters 0 to 1."""
    shift = -(near + origins[..., 2:]) / directions[..., 2:]
    origins = origins + shift * directions
    x, y, z = origins.unbind(-1)
    dx, dy, dz = directions.unbind(-1)
    across, along = 2 * focal / width, 2 * focal / height
    start = torch.stack([-across * x / z, -along * y / z, 1 + 2 * near / z], -1)
    step = torch.stack([-across * (dx / dz - x / z), -along * (dy / dz - y / z), -2 * near / z], -1)
    return start, step


def euler_rotation(angles: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3 3"]:
    """R_x R_y R_z of angles (x, y, z) in radians about the world's axes; R_z acts first."""
    (sx, sy, sz), (cx, cy, cz) = angles.sin().unbind(-1), angles.cos().unbind(-1)
    one, zero = torch.ones_like(sx), torch.zeros_like(sx)

    def matrix(*entries: Tensor) -> Tensor:
        return torch.stack(entries, -1).unflatten(-1, (3, 3))

    about_x = matrix(one, zero, zero, zero, cx, -sx, zero, sx, cx)
    about_y = matrix(cy, zero, sy, zero, one, zero, -sy, zero, cy)
    about_z = matrix(cz, -sz, zero, sz, cz, zero, zero, zero, one)
    return about_x @ about_y @ about_z


def transform_rays(
    origins: Float[Tensor, "rays 3"],
    directions: Float[Tensor, "rays 3"],
    cameras: Int[Tensor, " rays"],
    angles: Float[Tensor, "cameras 3"],
    offsets: Float[Tensor, "cameras 3"],
) -> tuple[Float[Tensor, "rays 3"], Float[Tensor, "rays 3"]]:
    """Every ray turned and shifted with its camera: d <- R_x R_y R_z d, o <- o + t."""
    with torch.autocast(directions.device.type, enabled=False):  # in half precision rays would miss by many pixels
        turned = euler_rotation(angles)[cameras] @ directions[..., None]
    return origins + offsets[cameras], turned[..., 0]


def corrupt_poses(
    poses: Float[Tensor, "cameras 3 4"], angles: Float[Tensor, "cameras 3"], offsets: Float[Tensor, "cameras 3"]
) -> Float[Tensor, "cameras 3 4"]:
    """Poses with wrong orientation (turned about the world's axes, radians) and position (world units)."""
    rotation = euler_rotation(angles) @ poses[:, :3, :3]
    return torch.cat([rotation, (poses[:, :3, 3] + offsets)[..., None]], -1)


def exhibit_path(frames: int = 40, elevation: float = 30.0, radius: float = 4.0) -> np.ndarray:
    """Poses [frames, 4, 4] of the Blender video: θ in [-180, 180), looking down at the origin by `elevation` degrees."""
    return ring_poses(np.linspace(-180, 180, frames + 1)[:-1], elevation, radius)


def ring_poses(theta: np.ndarray, elevation: float = 30.0, radius: float = 4.0) -> np.ndarray:
    """Poses [n, 4, 4] at angles θ in degrees, clockwise from the y axis."""
    azimuth, height = np.deg2rad(90 - np.asarray(theta)), np.deg2rad(elevation)
    eye = np.stack(
        [np.cos(height) * np.cos(azimuth), np.cos(height) * np.sin(azimuth), np.full(azimuth.shape, np.sin(height))], -1
    )
    return opengl_from_opencv(look_at(radius * eye, np.zeros(3)))
