"""The LLFF layout: `poses_bounds.npy` with images, its normalisation, and the camera paths that go with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tenfold_shared.errors import UserError
from tenfold_shared.scenes.cameras import CameraSet, intrinsics_matrix, opencv_from_opengl, opengl_from_opencv, unit
from tenfold_shared.scenes.views import (
    ImageFiles,
    Scene,
    common_size,
    image_size,
    list_images,
    read_array,
    write_image,
)

BOUND_FACTOR = 0.75
PATH_FRAMES = 120


@dataclass(frozen=True)
class LLFFPoses:
    """Normalised cameras of an LLFF capture, with OpenGL axes (x right, y up, z backward) as the layout has them.

    Attributes:
        camera_to_world: [N, 4, 4].
        bounds: [N, 2], near and far of each view.
        focal: [N], in pixels of the images read; that of the first view for all when spherified.

    """

    camera_to_world: np.ndarray
    bounds: np.ndarray
    focal: np.ndarray

    @property
    def middle_view(self) -> int:
        """Index of the view nearest to the mean camera, the one that the layout's video protocol leaves out."""
        mean = average_pose(self.camera_to_world)
        return int(np.square(self.camera_to_world[:, :3, 3] - mean[:3, 3]).sum(1).argmin())


def normalise_llff(
    poses_bounds: np.ndarray,
    factor: float = 1.0,
    *,
    bound_factor: float | None = BOUND_FACTOR,
    recentre: bool = True,
    spherify: bool = False,
) -> LLFFPoses:
    """Poses and bounds of `poses_bounds.npy` in the frame that radiance fields are trained in.

    The columns (down, right, backward) become (right, up, backward); translations and bounds are scaled by
    1 / (min near x `bound_factor`), so that the nearest bound is 1 / 0.75; all cameras are moved by the inverse of the
    average pose. With `spherify` (captures around an object) the point nearest to all optical axes becomes the origin,
    the mean camera offset the z axis, and the root-mean-square radius 1.

    Args:
        poses_bounds: [N, 17]: 3x5 row-major ([R | t | (h, w, f)]), near, far.
        factor: by how much the images are smaller than those of the file; divides the focal length.
        bound_factor: None leaves the scale alone.
        recentre: move to the average pose.
        spherify: for 360-degree captures.

    Raises:
        UserError: another shape, or values that are not finite.

    """
    if poses_bounds.ndim != 2 or poses_bounds.shape[1] != 17 or not np.isfinite(poses_bounds).all():
        raise UserError(f"poses_bounds.npy must be [N, 17] finite numbers, got {poses_bounds.shape}")
    # Single precision is what readers of this layout have always computed in; published networks were trained so.
    matrices = poses_bounds[:, :15].reshape(-1, 3, 5).astype(np.float32)
    bounds = poses_bounds[:, 15:].astype(np.float32)
    down, right, back, position, size = np.moveaxis(matrices, 2, 0)
    poses = np.tile(np.eye(4, dtype=np.float32), (len(matrices), 1, 1))
    poses[:, :3] = np.stack([right, -down, back, position], -1)
    scale = 1.0 if bound_factor is None else 1.0 / (bounds.min() * bound_factor)
    poses[:, :3, 3] *= scale
    bounds = bounds * scale
    if recentre:
        poses = np.linalg.inv(average_pose(poses)) @ poses
    focal = size[:, 2] / factor
    if spherify:
        poses, bounds = spherify_poses(poses, bounds)
        focal = np.full_like(focal, focal[0])  # one camera for the whole circle
    return LLFFPoses(poses, bounds, focal)


def average_pose(poses: np.ndarray) -> np.ndarray:
    """The mean camera [4, 4] of OpenGL poses: mean position, normalised sum of the z axes, up hint from the y axes."""
    back = unit(poses[:, :3, 2].sum(0))
    return _facing(back, poses[:, :3, 1].sum(0), poses[:, :3, 3].mean(0))


def _facing(back: np.ndarray, up: np.ndarray, position: np.ndarray) -> np.ndarray:
    right = unit(np.cross(up, back))
    pose = np.eye(4)
    pose[:3] = np.stack([right, unit(np.cross(back, right)), back, position], -1)
    return pose


def axes_meeting_point(poses: np.ndarray) -> np.ndarray:
    """The point [3] of least squared distance to the optical axes of `poses` [N, 4, 4]."""
    axis = poses[:, :3, 2]
    across = np.eye(3) - axis[:, :, None] * axis[:, None, :]
    return np.linalg.solve(across.sum(0), (across @ poses[:, :3, 3:]).sum(0))[:, 0]


def spherify_poses(poses: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cameras around an object in a frame with the object at the origin, z up and root-mean-square radius 1."""
    centre = axes_meeting_point(poses)
    up = unit((poses[:, :3, 3] - centre).mean(0))
    first = unit(np.cross([0.1, 0.2, 0.3], up))  # any fixed vector would do; the layout's users agree on this one
    frame = np.eye(4)
    frame[:3] = np.stack([first, unit(np.cross(up, first)), up, centre], -1)
    turned = np.linalg.inv(frame) @ poses
    scale = 1.0 / np.sqrt(np.square(turned[:, :3, 3]).sum(1).mean())
    turned[:, :3, 3] *= scale
    return turned, bounds * scale


def spiral_path(poses: LLFFPoses, frames: int = PATH_FRAMES, turns: int = 2) -> np.ndarray:
    """The video path of forward-facing captures: OpenGL poses [frames, 4, 4].

    Positions are offsets (cos a, -sin a, -sin(a/2)) in the mean camera's frame times the 90th percentile of |positions|
    per axis; every camera looks at the point at depth `1 / (.25/close + .75/far)` of the mean camera, with close .9 of
    the smallest and far 5 times the largest bound.
    """
    mean = average_pose(poses.camera_to_world)
    up = unit(poses.camera_to_world[:, :3, 1].sum(0))
    close, distant = 0.9 * poses.bounds.min(), 5.0 * poses.bounds.max()
    focus = 1.0 / (0.25 / close + 0.75 / distant)
    radii = np.percentile(np.abs(poses.camera_to_world[:, :3, 3]), 90, axis=0)
    target = mean[:3] @ np.array([0.0, 0.0, -focus, 1.0])
    path = []
    for angle in np.linspace(0.0, 2 * np.pi * turns, frames + 1)[:-1]:
        offset = np.array([np.cos(angle), -np.sin(angle), -np.sin(0.5 * angle)]) * radii
        position = mean[:3] @ np.append(offset, 1.0)
        path.append(_facing(unit(position - target), up, position))
    return np.stack(path)


def spherical_path(poses: LLFFPoses, frames: int = PATH_FRAMES) -> np.ndarray:
    """The video path of spherified captures: a circle at the cameras' mean height on the unit sphere, [frames, 4, 4].

    First and last frame coincide.
    """
    height = poses.camera_to_world[:, 2, 3].mean()
    mean_square = np.square(poses.camera_to_world[:, :3, 3]).sum(1).mean()
    radius = np.sqrt(mean_square - height**2)
    path = []
    for angle in np.linspace(0.0, 2 * np.pi, frames):
        position = np.array([radius * np.cos(angle), radius * np.sin(angle), height])
        axis = unit(position)
        right = unit(np.cross(axis, [0.0, 0.0, -1.0]))
        pose = np.eye(4)
        pose[:3] = np.stack([right, unit(np.cross(axis, right)), axis, position], -1)
        path.append(pose)
    return np.stack(path)


def llff_cameras(poses: LLFFPoses, height: int, width: int, names: tuple[str, ...] = ()) -> CameraSet:
    """OpenCV cameras of normalised LLFF poses for images of the given size, principal point in the middle."""
    matrices = np.stack([intrinsics_matrix(f, f, width / 2, height / 2) for f in poses.focal])
    near, far = poses.bounds.T
    return CameraSet(matrices, opencv_from_opengl(poses.camera_to_world), height, width, names, near, far)


def read_poses_bounds(folder: Path) -> np.ndarray:
    """`poses_bounds.npy` of a capture.

    Raises:
        UserError: the file is missing or damaged.

    """
    path = folder / "poses_bounds.npy"
    try:
        return read_array(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; LLFF's imgs2poses makes it from COLMAP's output") from None


def llff_images(folder: Path, factor: int) -> tuple[list[Path], tuple[int, int]]:
    """Image files of a capture and the (height, width) to read them at.

    `images_<factor>` is used where it exists; otherwise `images` is read and reduced by area averaging.
    """
    reduced = folder / f"images_{factor}"
    if factor != 1 and reduced.is_dir():
        paths = list_images(reduced)
        return paths, common_size(paths)
    paths = list_images(folder / "images")
    height, width = common_size(paths)
    return paths, (round(height / factor), round(width / factor))


def read_llff(
    folder: Path | str,
    factor: int = 4,
    *,
    bound_factor: float | None = BOUND_FACTOR,
    recentre: bool = True,
    spherify: bool = False,
) -> Scene:
    """A capture in the LLFF layout; images sorted by name, in the order of the poses.

    Args:
        folder: with `poses_bounds.npy` and `images_<factor>` or `images`.
        factor: 1, 2, 4, 8: how much smaller than the originals.
        bound_factor: see `normalise_llff`.
        recentre: see `normalise_llff`.
        spherify: see `normalise_llff`.

    Raises:
        UserError: missing or damaged files, images of different sizes, as many poses as images are not there.

    """
    folder = Path(folder)
    raw = read_poses_bounds(folder)
    paths, (height, width) = llff_images(folder, factor)
    if len(paths) != len(raw):
        raise UserError(
            f"{folder} has {len(raw)} poses and {len(paths)} images in {paths[0].parent.name}; they must match"
        )
    poses = normalise_llff(raw, factor, bound_factor=bound_factor, recentre=recentre, spherify=spherify)
    cameras = llff_cameras(poses, height, width, tuple(path.stem for path in paths))
    return Scene(
        folder.name, cameras, ImageFiles(paths, (height, width), resize=image_size(paths[0]) != (height, width))
    )


def write_llff(folder: Path | str, scene: Scene) -> None:
    """Write `poses_bounds.npy` and `images/` in the LLFF layout.

    Bounds are those of the cameras or, where depth is known, the 1st and 99th percentile of each view's depth.

    Raises:
        UserError: no bounds, pixels that are not square, or a principal point off the middle of the image.

    """
    folder = Path(folder)
    cameras = scene.cameras
    fx, fy, cx, cy = (cameras.intrinsics[:, i, j] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    if not (np.allclose(fx, fy) and np.allclose(cx, cameras.width / 2) and np.allclose(cy, cameras.height / 2)):
        raise UserError("the LLFF layout holds one focal length and a principal point in the middle of the image only")
    right, up, back, position = np.moveaxis(opengl_from_opencv(cameras.camera_to_world)[:, :3], 2, 0)
    size = np.stack([np.full(len(cameras), cameras.height), np.full(len(cameras), cameras.width), fx], -1)
    matrices = np.stack([-up, right, back, position, size], -1).reshape(len(cameras), 15)
    for view in range(len(scene)):
        write_image(folder / "images" / f"{view:04d}.png", scene.rgb(view))
    np.save(folder / "poses_bounds.npy", np.concatenate([matrices, _written_bounds(scene)], 1))


def _written_bounds(scene: Scene) -> np.ndarray:
    cameras = scene.cameras
    if scene.depth is not None and np.isfinite(scene.depth).any((1, 2)).all():
        return np.stack([np.percentile(depth[np.isfinite(depth)], [1, 99]) for depth in scene.depth])
    if cameras.near is None or cameras.far is None:
        raise UserError("the LLFF layout needs near and far depths of every view; give the cameras bounds first")
    return np.stack([cameras.near, cameras.far], 1)
