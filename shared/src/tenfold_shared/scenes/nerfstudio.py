"""The nerfstudio layout: one `transforms.json`, OpenGL poses, pixel centres at half-integers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tenfold_shared.errors import UserError
from tenfold_shared.scenes.blender import find_image, numbers_of, read_transforms
from tenfold_shared.scenes.cameras import CameraSet, intrinsics_matrix, opencv_from_opengl, opengl_from_opencv
from tenfold_shared.scenes.views import ImageFiles, Scene, common_size, write_image

DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
PINHOLE_MODELS = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL")


def read_nerfstudio(folder: Path | str, split: str | None = None) -> Scene:
    """A capture in the nerfstudio layout.

    Args:
        folder: with `transforms.json` (or the path of that file).
        split: keep the frames listed under `<split>_filenames`; all by default.

    Returns:
        The scene, without bounds unless the file gives `near` and `far`. `applied_transform` is left applied.

    Raises:
        UserError: missing or damaged files, lens distortion (undistort first), a camera model that is no pinhole.

    """
    source = Path(folder)
    source = source if source.suffix == ".json" else source / "transforms.json"
    meta = read_transforms(source)
    frames = sorted(meta.get("frames") or [], key=lambda frame: str(frame.get("file_path", "")))
    if split is not None:
        listed = meta.get(f"{split}_filenames")
        if not isinstance(listed, list):
            raise UserError(f"{source} has no list {split}_filenames; leave the split out to read all frames")
        frames = [frame for frame in frames if frame.get("file_path") in listed]
    if not frames:
        raise UserError(f"{source} lists no frames")
    paths = [find_image(source.parent, str(frame.get("file_path", ""))) for frame in frames]
    height, width = common_size(paths)
    with numbers_of(source):
        matrices = [
            _intrinsics({**meta, **frame}, height, width, f"{path.name} in {source}")
            for frame, path in zip(frames, paths, strict=True)
        ]
        for frame, path in zip(frames, paths, strict=True):
            if np.shape(frame.get("transform_matrix", ())) != (4, 4):
                raise UserError(f"{path.name} in {source} has no 4x4 transform_matrix")
        poses = np.stack([opencv_from_opengl(np.array(frame["transform_matrix"])) for frame in frames])
        cameras = CameraSet(
            np.stack(matrices), poses, height, width, tuple(str(frame["file_path"]) for frame in frames)
        )
        if "near" in meta and "far" in meta:
            cameras = cameras.with_bounds(meta["near"], meta["far"])
    return Scene(source.parent.name, cameras, ImageFiles(paths, (height, width)))


def _intrinsics(entry: dict[str, Any], height: int, width: int, where: str) -> np.ndarray:
    model = entry.get("camera_model", "OPENCV")
    if model not in PINHOLE_MODELS:
        raise UserError(f"{where} has the camera model {model}; only pinhole cameras are read, so undistort the images")
    if any(abs(entry.get(key, 0.0)) > 0 for key in DISTORTION):
        raise UserError(f"{where} has lens distortion; undistort the images first (colmap image_undistorter)")
    missing = [key for key in ("fl_x", "cx", "cy") if key not in entry]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}")
    scale_x, scale_y = width / entry.get("w", width), height / entry.get("h", height)
    fy = entry.get("fl_y", entry["fl_x"])
    return intrinsics_matrix(
        entry["fl_x"] * scale_x, fy * scale_y, entry["cx"] * scale_x - 0.5, entry["cy"] * scale_y - 0.5
    )


def write_nerfstudio(folder: Path | str, scene: Scene) -> None:
    """Write `transforms.json` and `images/frame_<i>.png` in the nerfstudio layout."""
    folder = Path(folder)
    cameras = scene.cameras
    frames = []
    for view, pose in enumerate(opengl_from_opencv(cameras.camera_to_world)):
        matrix = cameras.intrinsics[view]
        name = f"images/frame_{view:05d}.png"
        write_image(folder / name, scene.images[view])
        frames.append(
            {
                "file_path": name,
                "transform_matrix": pose.tolist(),
                "fl_x": matrix[0, 0],
                "fl_y": matrix[1, 1],
                "cx": matrix[0, 2] + 0.5,
                "cy": matrix[1, 2] + 0.5,
            }
        )
    meta: dict[str, Any] = {"camera_model": "OPENCV", "w": cameras.width, "h": cameras.height, "frames": frames}
    if cameras.bounds is not None:
        meta["near"], meta["far"] = cameras.bounds
    (folder / "transforms.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
