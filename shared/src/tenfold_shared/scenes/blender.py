"""The NeRF-synthetic layout (`transforms_<split>.json` + RGBA pictures) and its relative, DeepVoxels."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tenfold_shared.errors import UserError
from tenfold_shared.scenes.cameras import CameraSet, intrinsics_matrix, opencv_from_opengl, opengl_from_opencv
from tenfold_shared.scenes.views import (
    IMAGE_SUFFIXES,
    ImageFiles,
    Scene,
    common_size,
    list_images,
    read_array,
    write_image,
)

BLENDER_NEAR, BLENDER_FAR = 2.0, 6.0


def read_json(path: Path) -> Any:
    """The parsed JSON file.

    Raises:
        UserError: the file is missing or no JSON.

    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"the camera file {path} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"the camera file {path} is not valid JSON ({error}); fetch it again") from error


def read_transforms(path: Path) -> dict[str, Any]:
    """The parsed `transforms*.json`: a dictionary whose `frames`, if any, are dictionaries.

    Raises:
        UserError: the file is missing or holds something else.

    """
    meta = read_json(path)
    frames = (meta.get("frames") or []) if isinstance(meta, dict) else None
    if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
        raise UserError(f"the camera file {path} holds no dictionary with a list of frames; fetch it again")
    return meta


@contextlib.contextmanager
def numbers_of(path: Path | str) -> Iterator[None]:
    """Whatever is no number where one belongs is told of with the camera file it stands in."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"the camera file {path} has something else where a number belongs ({error})") from error


def blender_cameras(meta: dict[str, Any], height: int, width: int, source: str = "transforms") -> CameraSet:
    """Cameras of a parsed `transforms_<split>.json` for images of the given size.

    The focal length is `0.5 W / tan(0.5 camera_angle_x)` and the principal point (W/2, H/2) unless `fl_x, fl_y, cx, cy`
    (of images of `w` x `h`, integer pixel centres; per file or per frame) or a frame's `intrinsic_matrix` are given.
    `near` and `far` may be given per file or per frame; without them there are no bounds.

    Raises:
        UserError: frames without a pose, or no focal length.

    """
    frames = meta.get("frames") or []
    if not frames:
        raise UserError(f"{source} lists no frames")
    matrices, poses, near, far = [], [], [], []
    for number, frame in enumerate(frames):
        both = {**meta, **frame}
        if np.shape(frame.get("transform_matrix", ())) != (4, 4):
            raise UserError(f"frame {number} of {source} has no 4x4 transform_matrix")
        poses.append(opencv_from_opengl(np.array(frame["transform_matrix"], dtype=np.float64)))
        matrices.append(_intrinsics(both, height, width, f"frame {number} of {source}"))
        near.append(both.get("near"))
        far.append(both.get("far"))
    bounded = all(value is not None for value in near + far)
    return CameraSet(
        np.stack(matrices),
        np.stack(poses),
        height,
        width,
        names=tuple(str(frame.get("file_path", number)) for number, frame in enumerate(frames)),
        near=np.array(near, dtype=np.float64) if bounded else None,
        far=np.array(far, dtype=np.float64) if bounded else None,
    )


def _intrinsics(entry: dict[str, Any], height: int, width: int, where: str) -> np.ndarray:
    scale_x, scale_y = width / entry.get("w", width), height / entry.get("h", height)
    if "intrinsic_matrix" in entry:
        matrix = np.array(entry["intrinsic_matrix"], dtype=np.float64)[:3, :3]
        return matrix * np.array([scale_x, scale_y, 1.0])[:, None]
    if "fl_x" in entry:
        fx, fy = entry["fl_x"] * scale_x, entry.get("fl_y", entry["fl_x"]) * scale_y
    elif "camera_angle_x" in entry:
        fx = fy = 0.5 * width / np.tan(0.5 * entry["camera_angle_x"])
    else:
        raise UserError(f"{where} has neither camera_angle_x nor fl_x: the focal length is unknown")
    cx = entry["cx"] * scale_x if "cx" in entry else width / 2
    cy = entry["cy"] * scale_y if "cy" in entry else height / 2
    return intrinsics_matrix(fx, fy, cx, cy)


def find_image(base: Path, name: str) -> Path:
    """The picture `base/name`, where the name may lack its extension (`.png` is tried first).

    Raises:
        UserError: no such picture.

    """
    path = base / name
    if path.suffix.lower() in IMAGE_SUFFIXES:
        if path.is_file():
            return path
        raise UserError(f"the image {path} does not exist, though its pose is listed")
    for suffix in IMAGE_SUFFIXES:
        candidate = path.with_name(path.name + suffix)
        if candidate.is_file():
            return candidate
    raise UserError(f"the image {path}.png does not exist, though its pose is listed")


def read_blender(
    folder: Path | str, split: str = "train", *, skip: int = 1, size: tuple[int, int] | None = None
) -> Scene:
    """One split of a scene in the NeRF-synthetic layout.

    Args:
        folder: the scene, with `transforms_<split>.json`.
        split: train, val or test.
        skip: keep every `skip`-th frame.
        size: (height, width) to resize to by area averaging.

    Returns:
        The scene; near 2 and far 6 where the file gives none; depth if every frame has a `depth_*.npy` beside it, as
        `write_blender` makes them.

    Raises:
        UserError: a missing or damaged file, images of different sizes, a pose that is none.

    """
    folder = Path(folder)
    source = folder / f"transforms_{split}.json"
    meta = read_transforms(source)
    meta["frames"] = (meta.get("frames") or [])[::skip]
    paths = [find_image(folder, str(frame.get("file_path", ""))) for frame in meta["frames"]]
    if not paths:
        raise UserError(f"{source} lists no frames")
    native = common_size(paths)
    height, width = size or native
    with numbers_of(source):
        cameras = blender_cameras({"w": native[1], "h": native[0], **meta}, height, width, str(source))
    if cameras.near is None:
        cameras = cameras.with_bounds(BLENDER_NEAR, BLENDER_FAR)
    return Scene(
        folder.name, cameras, ImageFiles(paths, (height, width), resize=True), _read_depth(paths, height, width)
    )


def _read_depth(paths: Sequence[Path], height: int, width: int) -> np.ndarray | None:
    files = [path.with_name(f"depth_{path.stem}.npy") for path in paths]
    if not all(file.is_file() for file in files):
        return None
    depth = [read_array(file) for file in files]
    return np.stack(depth) if all(view.shape == (height, width) for view in depth) else None


def write_blender(folder: Path | str, scene: Scene, split: str = "train") -> None:
    """Write one split in the NeRF-synthetic layout: `transforms_<split>.json`, `<split>/r_<i>.png`, and exact depth.

    The file carries `camera_angle_x` for readers that know nothing else, the full intrinsics, and the bounds.
    """
    folder = Path(folder)
    cameras = scene.cameras
    frames = []
    for view, pose in enumerate(opengl_from_opencv(cameras.camera_to_world)):
        matrix = cameras.intrinsics[view]
        frame: dict[str, Any] = {
            "file_path": f"./{split}/r_{view}",
            "transform_matrix": pose.tolist(),
            "fl_x": matrix[0, 0],
            "fl_y": matrix[1, 1],
            "cx": matrix[0, 2],
            "cy": matrix[1, 2],
        }
        if cameras.near is not None and cameras.far is not None:
            frame |= {"near": float(cameras.near[view]), "far": float(cameras.far[view])}
        frames.append(frame)
        write_image(folder / split / f"r_{view}.png", scene.images[view])
        if scene.depth is not None:
            np.save(folder / split / f"depth_r_{view}.npy", scene.depth[view])
    meta = {
        "camera_angle_x": float(2 * np.arctan(0.5 * cameras.width / cameras.intrinsics[0, 0, 0])),
        "w": cameras.width,
        "h": cameras.height,
        "frames": frames,
    }
    (folder / f"transforms_{split}.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def read_deepvoxels(folder: Path | str, scene: str, split: str = "train", *, skip: int = 1) -> Scene:
    """One split of a DeepVoxels scene: `<split>/<scene>/{rgb/*.png, pose/*.txt}` and `train/<scene>/intrinsics.txt`.

    Poses are camera-to-world with OpenCV axes, 16 numbers; the focal length is given for images of the height in line 5
    of the intrinsics file and scaled to the pictures'. Near and far are the cameras' mean distance from the origin ∓ 1.

    Raises:
        UserError: a missing or damaged file.

    """
    folder = Path(folder)
    base = folder / split / scene
    images = list_images(base / "rgb")[::skip]
    poses = np.stack([read_matrix(base / "pose" / f"{path.stem}.txt") for path in images])
    intrinsics = folder / "train" / scene / "intrinsics.txt"
    try:
        lines = [line.split() for line in intrinsics.read_text(encoding="utf-8").splitlines()]
        focal, native = float(lines[0][0]), float(lines[4][0])
    except FileNotFoundError:
        raise UserError(f"the camera file {intrinsics} does not exist") from None
    except (IndexError, ValueError):
        raise UserError(
            f"the camera file {intrinsics} is damaged: a focal length and, in line 5, a size are needed"
        ) from None
    height, width = common_size(images)
    focal *= height / native
    matrix = intrinsics_matrix(focal, focal, width / 2, height / 2)
    cameras = CameraSet(np.tile(matrix, (len(images), 1, 1)), poses, height, width, tuple(p.stem for p in images))
    distance = float(np.linalg.norm(cameras.centres, axis=1).mean())
    return Scene(scene, cameras.with_bounds(distance - 1, distance + 1), ImageFiles(images, (height, width)))


def read_matrix(path: Path, shape: tuple[int, int] = (4, 4)) -> np.ndarray:
    """A matrix of whitespace-separated numbers.

    Raises:
        UserError: the file is missing or holds another number of values.

    """
    try:
        return np.array(path.read_text(encoding="utf-8").split(), dtype=np.float64).reshape(shape)
    except FileNotFoundError:
        raise UserError(f"the camera file {path} does not exist") from None
    except ValueError as error:
        raise UserError(f"the camera file {path} does not hold a {shape[0]}x{shape[1]} matrix ({error})") from error
