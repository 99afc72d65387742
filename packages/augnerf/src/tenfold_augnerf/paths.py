"""Cameras of a data set's video (section 5.2): the LLFF layout's own paths, a circle around the origin for the others."""

import numpy as np
import torch

from tenfold_augnerf.cameras import exhibit_path
from tenfold_augnerf.views import Views
from tenfold_shared.errors import UserError
from tenfold_shared.scenes import (
    CameraSet,
    LLFFPoses,
    opencv_from_opengl,
    opengl_from_opencv,
    spherical_path,
    spiral_path,
)
from tenfold_shared.scenes.llff import PATH_FRAMES

CIRCLE_FRAMES = 40
BLENDER_RADIUS = 4.0  # of the Blender video's circle, in world units


def video_views(
    views: Views,
    frames: int = 0,
    capture: LLFFPoses | None = None,
    *,
    spherified: bool = False,
    radius: float | None = None,
) -> Views:
    """The video's cameras, with black pictures.

    Args:
        views: whose bounds, size and focal length the video has.
        frames: how many; 0: 120 for captures in the LLFF layout, else 40.
        capture: all cameras of a capture in the LLFF layout: two turns of a spiral, or for a spherified one a circle.
            Without it, the Blender video's circle.
        spherified: see capture.
        radius: of that circle; None: the views' mean distance from the origin.

    Raises:
        UserError: a negative number of frames.

    """
    if frames < 0:
        raise UserError(f"--frames takes 0 or more, got {frames}")
    if capture is None:
        own = float(views.centres.norm(dim=-1).mean()) if radius is None else radius
        poses = exhibit_path(frames or CIRCLE_FRAMES, radius=own)
    else:
        poses = (spherical_path if spherified else spiral_path)(capture, frames or PATH_FRAMES)
    poses = opencv_from_opengl(poses)
    turns = torch.from_numpy(poses[:, :3, :3]).float() @ pixel_matrix(views)
    black = torch.zeros(len(poses), *views.size, 3, dtype=torch.uint8)
    return Views(black, turns, torch.from_numpy(poses[:, :3, 3]).float(), views.near, views.far)


def pixel_matrix(views: Views) -> torch.Tensor:
    """K⁻¹ [3, 3] of the first view from its R K⁻¹: the columns' lengths are 1 / fx and 1 / fy, the centre is the middle."""
    height, width = views.size
    across, down = (float(views.turns[0, :, i].norm()) for i in (0, 1))
    return torch.tensor([[across, 0, -across * width / 2], [0, down, -down * height / 2], [0, 0, 1]])


def llff_poses(cameras: CameraSet) -> LLFFPoses:
    """The cameras of a capture as the layout's paths take them."""
    assert cameras.near is not None, "the layout has bounds"
    assert cameras.far is not None
    bounds = np.stack([cameras.near, cameras.far], -1)
    return LLFFPoses(opengl_from_opencv(cameras.camera_to_world), bounds, cameras.intrinsics[:, 0, 0])
