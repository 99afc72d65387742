"""COLMAP sparse models, text and binary: `cameras`, `images`, `points3D`; pixel centres at half-integers."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tenfold_shared.errors import UserError
from tenfold_shared.scenes.cameras import CameraSet, intrinsics_matrix
from tenfold_shared.scenes.views import ImageFiles, Scene, image_size, write_image

# COLMAP's model numbers: name, number of parameters, of which the leading ones are (f | fx, fy), cx, cy.
MODELS = {
    0: ("SIMPLE_PINHOLE", 3),
    1: ("PINHOLE", 4),
    2: ("SIMPLE_RADIAL", 4),
    3: ("RADIAL", 5),
    4: ("OPENCV", 8),
    5: ("OPENCV_FISHEYE", 8),
    6: ("FULL_OPENCV", 12),
    7: ("FOV", 5),
    8: ("SIMPLE_RADIAL_FISHEYE", 4),
    9: ("RADIAL_FISHEYE", 5),
    10: ("THIN_PRISM_FISHEYE", 12),
}
ONE_FOCAL = {"SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL"}
READABLE = ONE_FOCAL | {"PINHOLE", "OPENCV", "FULL_OPENCV"}


@dataclass(frozen=True)
class _Camera:
    model: str
    width: int
    height: int
    params: np.ndarray


@dataclass(frozen=True)
class _Image:
    rotation: np.ndarray  # world to camera, [3, 3]
    translation: np.ndarray
    camera: int
    name: str
    point_ids: np.ndarray


def read_colmap(folder: Path | str, images: Path | str | None = None) -> Scene:
    """A COLMAP sparse model with its pictures, sorted by name.

    Args:
        folder: the project or the model: `cameras.bin` or `.txt` is looked for in it, in `sparse/0` and `sparse`.
        images: the pictures; by default `images` in the project. Pictures smaller than the model's scale the cameras.

    Returns:
        The scene; near and far of a view are the 1st and 99th percentile of the depths of its points, if every
        view has some.

    Raises:
        UserError: missing or damaged files, lens distortion, cameras of different sizes.

    """
    folder = Path(folder)
    model = _model_folder(folder)
    if (model / "cameras.bin").is_file():
        cameras, entries = _guard(_read_cameras_bin, model), _guard(_read_images_bin, model)
        points = _guard(_read_points_bin, model)
    else:
        cameras, entries = _guard(_read_cameras_txt, model), _guard(_read_images_txt, model)
        points = _guard(_read_points_txt, model)
    if not entries:
        raise UserError(f"the COLMAP model {model} has no registered image")
    entries.sort(key=lambda entry: entry.name)
    image_folder = Path(images) if images is not None else folder / "images"
    paths = [image_folder / entry.name for entry in entries]
    for entry, path in zip(entries, paths, strict=True):
        if entry.camera not in cameras:
            raise UserError(f"the image {entry.name} of {model} refers to camera {entry.camera}, which is not there")
        if not path.is_file():
            raise UserError(f"the image {path} does not exist, though its pose is listed in {model}")
    sizes = {(cameras[entry.camera].height, cameras[entry.camera].width) for entry in entries}
    if len(sizes) > 1:
        raise UserError(f"the COLMAP model {model} has images of different sizes (height, width): {sorted(sizes)}")
    height, width = sizes.pop()
    world_to_camera = np.tile(np.eye(4), (len(entries), 1, 1))
    world_to_camera[:, :3, :3] = [entry.rotation for entry in entries]
    world_to_camera[:, :3, 3] = [entry.translation for entry in entries]
    near, far = _bounds(entries, points)
    camera_set = CameraSet(
        np.stack([_matrix(cameras[entry.camera], model) for entry in entries]),
        np.linalg.inv(world_to_camera),
        height,
        width,
        tuple(entry.name for entry in entries),
        near,
        far,
    )
    read_size = image_size(paths[0])
    return Scene(folder.name, camera_set.resized(*read_size), ImageFiles(paths, read_size))


def _model_folder(folder: Path) -> Path:
    for candidate in (folder, folder / "sparse" / "0", folder / "sparse"):
        if (candidate / "cameras.bin").is_file() or (candidate / "cameras.txt").is_file():
            return candidate
    raise UserError(f"no COLMAP model (cameras.bin or cameras.txt) in {folder}, {folder}/sparse/0 or {folder}/sparse")


def _guard(reader, model: Path):
    try:
        return reader(model)
    except FileNotFoundError as error:
        raise UserError(f"the COLMAP file {error.filename} does not exist") from None
    except (struct.error, ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise UserError(f"the COLMAP model {model} is damaged or cut short ({error})") from error


def _matrix(camera: _Camera, model: Path) -> np.ndarray:
    if camera.model not in READABLE:
        raise UserError(f"{model} has a {camera.model} camera; undistort the images (colmap image_undistorter)")
    focal = 1 if camera.model in ONE_FOCAL else 2
    fx, fy = camera.params[0], camera.params[focal - 1]
    cx, cy = camera.params[focal : focal + 2]
    if np.abs(camera.params[focal + 2 :]).max(initial=0.0) > 0:
        raise UserError(f"{model} has a camera with lens distortion; undistort the images (colmap image_undistorter)")
    return intrinsics_matrix(fx, fy, cx - 0.5, cy - 0.5)


def _bounds(entries: list[_Image], points: dict[int, np.ndarray]) -> tuple[np.ndarray | None, np.ndarray | None]:
    bounds = []
    for entry in entries:
        seen = [points[i] for i in entry.point_ids.tolist() if i in points]
        depth = np.array(seen).reshape(-1, 3) @ entry.rotation[2] + entry.translation[2]
        depth = depth[depth > 0]
        if len(depth) < 2 or np.ptp(depth) == 0:
            return None, None
        bounds.append(np.percentile(depth, [1, 99]))
    near, far = np.array(bounds).T
    return near, far


def _rotation(quaternion: np.ndarray) -> np.ndarray:
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _quaternion(rotation: np.ndarray) -> np.ndarray:
    """(w, x, y, z) with w >= 0: the dominant eigenvector of the symmetric matrix of Bar-Itzhack."""
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = rotation
    matrix = np.array(
        [
            [xx + yy + zz, zy - yz, xz - zx, yx - xy],
            [zy - yz, xx - yy - zz, yx + xy, zx + xz],
            [xz - zx, yx + xy, yy - xx - zz, zy + yz],
            [yx - xy, zx + xz, zy + yz, zz - xx - yy],
        ]
    )
    vector = np.linalg.eigh(matrix)[1][:, -1]
    return vector if vector[0] >= 0 else -vector


def _rows(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def _read_cameras_txt(model: Path) -> dict[int, _Camera]:
    cameras = {}
    for row in filter(str.strip, _rows(model / "cameras.txt")):
        number, name, width, height, *params = row.split()
        values = np.array(params, dtype=np.float64)
        if len(values) != dict(MODELS.values()).get(name, len(values)):
            raise ValueError(f"camera {number} of model {name} has {len(values)} parameters")
        cameras[int(number)] = _Camera(name, int(width), int(height), values)
    return cameras


def _read_images_txt(model: Path) -> list[_Image]:
    rows = _rows(model / "images.txt")
    while rows and not rows[0].strip():
        rows.pop(0)
    images = []
    for pose, points in zip(rows[::2], [*rows[1::2], ""], strict=False):  # the second row of an image may be empty
        _, *numbers, camera, name = pose.split(maxsplit=9)
        values = np.array(numbers, dtype=np.float64)
        ids = np.array(points.split()[2::3], dtype=np.int64)
        images.append(_Image(_rotation(values[:4]), values[4:7], int(camera), name.strip(), ids))
    return images


def _read_points_txt(model: Path) -> dict[int, np.ndarray]:
    path = model / "points3D.txt"
    rows = [row.split() for row in _rows(path) if row.strip()] if path.is_file() else []
    return {int(row[0]): np.array(row[1:4], dtype=np.float64).reshape(3) for row in rows}


def _take(file: BinaryIO, layout: str) -> tuple:
    return struct.unpack("<" + layout, file.read(struct.calcsize("<" + layout)))


def _read_cameras_bin(model: Path) -> dict[int, _Camera]:
    cameras = {}
    with (model / "cameras.bin").open("rb") as file:
        for _ in range(_take(file, "Q")[0]):
            number, kind, width, height = _take(file, "iiQQ")
            name, count = MODELS[kind]
            cameras[number] = _Camera(name, width, height, np.array(_take(file, f"{count}d")))
    return cameras


def _read_images_bin(model: Path) -> list[_Image]:
    images = []
    with (model / "images.bin").open("rb") as file:
        for _ in range(_take(file, "Q")[0]):
            _, *values, camera = _take(file, "i7di")
            name = bytearray()
            while (character := _take(file, "c")[0]) != b"\0":
                name += character
            count = _take(file, "Q")[0]
            raw = file.read(24 * count)
            ids = np.frombuffer(raw, dtype=[("xy", "<f8", 2), ("id", "<i8")], count=count)["id"]
            pose = np.array(values)
            images.append(_Image(_rotation(pose[:4]), pose[4:], camera, name.decode("utf-8"), ids))
    return images


def _read_points_bin(model: Path) -> dict[int, np.ndarray]:
    path = model / "points3D.bin"
    points: dict[int, np.ndarray] = {}
    if not path.is_file():
        return points
    with path.open("rb") as file:
        for _ in range(_take(file, "Q")[0]):
            number, x, y, z, *_, track = _take(file, "Q3d3BdQ")
            file.read(8 * track)
            points[number] = np.array([x, y, z])
    return points


def write_colmap(folder: Path | str, scene: Scene, *, binary: bool = True, points: np.ndarray | None = None) -> None:
    """Write `sparse/0/{cameras,images,points3D}` (PINHOLE) and `images/`.

    Args:
        folder: the project.
        scene: one camera a view is written.
        binary: `.bin` files, otherwise `.txt`.
        points: world points [P, 3]; each is entered in every view that has it before it, so that bounds come back.

    """
    folder = Path(folder)
    model = folder / "sparse" / "0"
    model.mkdir(parents=True, exist_ok=True)
    cameras = scene.cameras
    world = np.zeros((0, 3)) if points is None else np.asarray(points, dtype=np.float64)
    pixels, depths = cameras.project(world)
    world_to_camera = np.linalg.inv(cameras.camera_to_world)
    names = [f"{view:05d}.png" for view in range(len(cameras))]
    tracks = [(pixels[v][depths[v] > 0] + 0.5, np.flatnonzero(depths[v] > 0) + 1) for v in range(len(cameras))]
    poses = [np.append(_quaternion(pose[:3, :3]), pose[:3, 3]) for pose in world_to_camera]
    params = [(k[0, 0], k[1, 1], k[0, 2] + 0.5, k[1, 2] + 0.5) for k in cameras.intrinsics]
    for view, name in enumerate(names):
        write_image(folder / "images" / name, scene.images[view])
    write = _write_bin if binary else _write_txt
    write(model, cameras, params, poses, names, tracks, world)


def _write_txt(model: Path, cameras: CameraSet, params, poses, names, tracks, world: np.ndarray) -> None:
    size = f"{cameras.width} {cameras.height}"
    (model / "cameras.txt").write_text(
        "".join(f"{i + 1} PINHOLE {size} {' '.join(map(repr, map(float, p)))}\n" for i, p in enumerate(params)),
        encoding="utf-8",
    )
    rows = []
    for i, (pose, name, (xy, ids)) in enumerate(zip(poses, names, tracks, strict=True)):
        rows.append(f"{i + 1} {' '.join(map(repr, pose.tolist()))} {i + 1} {name}\n")
        rows.append(" ".join(f"{x!r} {y!r} {n}" for (x, y), n in zip(xy.tolist(), ids.tolist(), strict=True)) + "\n")
    (model / "images.txt").write_text("".join(rows), encoding="utf-8")
    (model / "points3D.txt").write_text(
        "".join(f"{i + 1} {x!r} {y!r} {z!r} 128 128 128 0\n" for i, (x, y, z) in enumerate(world.tolist())),
        encoding="utf-8",
    )


def _write_bin(model: Path, cameras: CameraSet, params, poses, names, tracks, world: np.ndarray) -> None:
    with (model / "cameras.bin").open("wb") as file:
        file.write(struct.pack("<Q", len(params)))
        for i, values in enumerate(params):
            file.write(struct.pack("<iiQQ4d", i + 1, 1, cameras.width, cameras.height, *values))
    with (model / "images.bin").open("wb") as file:
        file.write(struct.pack("<Q", len(names)))
        for i, (pose, name, (xy, ids)) in enumerate(zip(poses, names, tracks, strict=True)):
            file.write(struct.pack("<i7di", i + 1, *pose, i + 1) + name.encode() + b"\0" + struct.pack("<Q", len(ids)))
            track = np.empty(len(ids), dtype=[("xy", "<f8", 2), ("id", "<i8")])
            track["xy"], track["id"] = xy, ids
            file.write(track.tobytes())
    with (model / "points3D.bin").open("wb") as file:
        file.write(struct.pack("<Q", len(world)))
        for i, point in enumerate(world):
            file.write(struct.pack("<Q3d3BdQ", i + 1, *point, 128, 128, 128, 0.0, 0))
