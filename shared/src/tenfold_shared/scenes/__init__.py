"""Posed-image scenes: one camera-set type, readers and writers of the usual layouts, analytic scenes with exact depth.

Every reader returns a `Scene`, whose cameras follow one convention whatever the file said:

- camera axes are OpenCV's: x right, y down, z forward; `camera_to_world` maps camera to world coordinates;
- pixel (u, v) is column u, row v, and its centre lies at the *integer* position, so that the direction through it is
  `R K^-1 [u, v, 1]` with z-component 1 in the camera frame, and a distance along it is the z-depth;
- images are [H, W, 3] in [0, 1], row 0 at the top.

Layouts that put pixel centres at half-integers (COLMAP, nerfstudio) are shifted by half a pixel on reading and back on
writing. Needs the `scenes` extra (`pip install tenfold-shared[scenes]`): NumPy and Pillow.
"""

from tenfold_shared.scenes.analytic import (
    AnalyticScene,
    Box,
    Disc,
    Hit,
    Sphere,
    blocks,
    blocks_cameras,
    blocks_views,
    render_views,
    tabletop,
    tabletop_cameras,
    tabletop_views,
)
from tenfold_shared.scenes.blender import read_blender, read_deepvoxels, write_blender
from tenfold_shared.scenes.cameras import (
    CameraSet,
    circle_path,
    look_at,
    opencv_from_opengl,
    opengl_from_opencv,
)
from tenfold_shared.scenes.colmap import read_colmap, write_colmap
from tenfold_shared.scenes.llff import (
    LLFFPoses,
    normalise_llff,
    read_llff,
    spherical_path,
    spiral_path,
    write_llff,
)
from tenfold_shared.scenes.nerfstudio import read_nerfstudio, write_nerfstudio
from tenfold_shared.scenes.views import ImageFiles, Scene, read_image, write_image

__all__ = [
    "AnalyticScene",
    "Box",
    "CameraSet",
    "Disc",
    "Hit",
    "ImageFiles",
    "LLFFPoses",
    "Scene",
    "Sphere",
    "blocks",
    "blocks_cameras",
    "blocks_views",
    "circle_path",
    "look_at",
    "normalise_llff",
    "opencv_from_opengl",
    "opengl_from_opencv",
    "read_blender",
    "read_colmap",
    "read_deepvoxels",
    "read_image",
    "read_llff",
    "read_nerfstudio",
    "render_views",
    "spherical_path",
    "spiral_path",
    "tabletop",
    "tabletop_cameras",
    "tabletop_views",
    "write_blender",
    "write_colmap",
    "write_image",
    "write_llff",
    "write_nerfstudio",
]
