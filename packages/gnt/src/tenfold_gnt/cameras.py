"""Cameras and rays (section 2.1).

A camera is a vector of 34 numbers `[H, W, K (4x4, row-major), c2w (4x4, row-major)]` with OpenCV axes (x right, y down,
z forward) and integer pixel centres. Sets of source views stack them to [views, 34].
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

CAMERA_SIZE = 34


def full_precision(like: Tensor) -> torch.autocast:
    """A context in which products keep their precision: autocast would move pixels by whole ones."""
    return torch.autocast(like.device.type, enabled=False)


def pack_cameras(
    intrinsics: Float[Tensor, "*batch 3 3"], camera_to_world: Float[Tensor, "*batch 4 4"], height: int, width: int
) -> Float[Tensor, "*batch 34"]:
    """Camera vectors from K in pixels, OpenCV poses and the image size."""
    batch = intrinsics.shape[:-2]
    matrix = torch.eye(4, dtype=intrinsics.dtype, device=intrinsics.device).expand(*batch, 4, 4).clone()
    matrix[..., :3, :3] = intrinsics
    size = intrinsics.new_tensor([height, width]).expand(*batch, 2)
    return torch.cat([size, matrix.flatten(-2), camera_to_world.flatten(-2)], -1)


def intrinsics_of(camera: Float[Tensor, "*batch 34"]) -> Float[Tensor, "*batch 4 4"]:
    """K as a 4x4 matrix."""
    return camera[..., 2:18].unflatten(-1, (4, 4))


def pose_of(camera: Float[Tensor, "*batch 34"]) -> Float[Tensor, "*batch 4 4"]:
    """The camera-to-world matrix, OpenCV axes."""
    return camera[..., 18:34].unflatten(-1, (4, 4))


def pixel_grid(height: int, width: int, stride: int = 1) -> Int[Tensor, "pixels 2"]:
    """Positions (u, v) = (column, row) in row-major order; `stride` keeps 0, stride, 2 stride, ... of both."""
    v, u = torch.meshgrid(torch.arange(0, height, stride), torch.arange(0, width, stride), indexing="ij")
    return torch.stack([u.reshape(-1), v.reshape(-1)], -1)


def rays_through(
    camera: Float[Tensor, "34"], pixels: Float[Tensor, "rays 2"] | Int[Tensor, "rays 2"]
) -> tuple[Float[Tensor, "rays 3"], Float[Tensor, "rays 3"]]:
    """Origins and directions `R K^-1 [u, v, 1]` of rays.

    Directions are not normalised: their component along the optical axis is 1, so the ray parameter is the z-depth.
    """
    pixels = pixels.to(camera)
    homogeneous = torch.cat([pixels, torch.ones_like(pixels[:, :1])], -1)
    pose = pose_of(camera)
    with full_precision(camera):
        turn = pose[:3, :3] @ torch.linalg.inv(intrinsics_of(camera)[:3, :3])
        return pose[:3, 3].expand(len(pixels), 3), homogeneous @ turn.T


def resize_camera(camera: Float[Tensor, "*batch 34"], factor: float) -> Float[Tensor, "*batch 34"]:
    """The camera of the same image resized by `factor`: the first two rows of K scale, the size is rounded down."""
    scaled = camera.clone()
    scaled[..., :2] = torch.floor(camera[..., :2] * factor)
    scaled[..., 2:10] *= factor
    return scaled


def resize_nearest(image: Float[Tensor, "height width 3"], height: int, width: int) -> Float[Tensor, "h w 3"]:
    """The image at another size by nearest interpolation, so that ground-truth colours are never mixed."""
    channels_first = image.permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(channels_first, size=(height, width), mode="nearest")[0].permute(1, 2, 0)


def crop_camera(camera: Float[Tensor, "*batch 34"], top: int, left: int, height: int, width: int) -> Tensor:
    """The camera of the window [top, top + height) x [left, left + width): the principal point shifts."""
    cropped = camera.clone()
    cropped[..., 0], cropped[..., 1] = height, width
    cropped[..., 4] -= left
    cropped[..., 8] -= top
    return cropped


def flip_camera(camera: Float[Tensor, "*batch 34"]) -> Float[Tensor, "*batch 34"]:
    """The camera of the horizontally flipped image: fx changes sign, cx becomes W - 1 - cx; the geometry is exact."""
    flipped = camera.clone()
    flipped[..., 2] *= -1
    flipped[..., 4] = camera[..., 1] - 1 - camera[..., 4]
    return flipped
