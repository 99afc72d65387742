"""Readers of the paper's data sets in their published layouts (section 5), each to a `Scene`.

Near and far are what the sampler is given: already widened where the protocol widens the captures' bounds.
"""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from tenfold_shared.errors import UserError
from tenfold_shared.scenes import CameraSet, ImageFiles, Scene, normalise_llff, read_blender, read_deepvoxels, read_llff
from tenfold_shared.scenes.blender import read_json, read_matrix
from tenfold_shared.scenes.llff import llff_cameras
from tenfold_shared.scenes.views import common_size, image_size, list_images, read_image

# Scenes of the LLFF training collection that are test scenes elsewhere.
LLFF_TEST_SCENES = {
    "data2_fernvlsb",
    "data2_hugetrike",
    "data2_trexsanta",
    "data3_orchid",
    "data5_leafscene",
    "data5_lotr",
    "data5_redflower",
}
LLFF_SCENES = ("fern", "flower", "fortress", "horns", "leaves", "orchids", "room", "trex")
BLENDER_SCENES = ("chair", "drums", "ficus", "hotdog", "lego", "materials", "mic", "ship")
LLFF_NEAR, LLFF_FAR, LLFF_VIDEO_FAR = 0.9, 1.6, 1.5  # what the protocol multiplies a capture's bounds by
GOOGLE_RADIUS = 0.5 * np.sqrt(2) * 1.1
GOOGLE_VIEWS = 250
REALESTATE_SIZE = (450, 800)


def widened(scene: Scene, near: float, far: float) -> Scene:
    """The scene with its smallest near times `near` and its largest far times `far` as bounds of all views.

    Raises:
        UserError: the scene has no bounds.

    """
    bounds = scene.cameras.bounds
    if bounds is None:
        raise UserError(f"the scene {scene.name} has no near and far depths; give them")
    cameras = scene.cameras.with_bounds(bounds[0] * near, bounds[1] * far)
    return Scene(scene.name, cameras, scene.images, scene.depth)


def read_llff_scene(folder: Path, factor: int = 4, *, far: float = LLFF_FAR) -> Scene:
    """A forward-facing capture: bounds x 0.9 and x 1.6 (1.5 for videos and the IBRNet collection)."""
    return widened(read_llff(folder, factor), LLFF_NEAR, far)


def read_ibrnet_scene(folder: Path) -> Scene:
    """A capture of ibrnet_collected: `images_2` in part 1, `images_8` in part 2."""
    factor = 2 if (folder / "images_2").is_dir() else 8
    return read_llff_scene(folder, factor, far=1.5)


def read_shiny_scene(folder: Path, factor: int = 8) -> Scene:
    """A Shiny capture: poses of 3x4 numbers with bounds, and intrinsics in `hwf_cxcy.npy` (3 or 6 numbers).

    Raises:
        UserError: missing or damaged files.

    """
    paths = list_images(folder / f"images_{factor}")
    height, width = common_size(paths)
    try:
        raw = np.load(folder / "poses_bounds.npy", allow_pickle=False)
        shape = np.load(folder / "hwf_cxcy.npy", allow_pickle=False).ravel()
    except (FileNotFoundError, ValueError, EOFError) as error:
        raise UserError(f"{folder} needs poses_bounds.npy and hwf_cxcy.npy ({error})") from error
    if raw.ndim != 2 or raw.shape[1] != 14 or len(shape) < 3 or len(raw) != len(paths):
        raise UserError(f"{folder}: poses_bounds.npy must be [N, 14] for the {len(paths)} images, got {raw.shape}")
    # The file's poses have three rows [R | t]; the normalisation expects (h, w, f) as a fifth column.
    focal = np.broadcast_to(shape[:3], (len(raw), 3))
    rows = np.concatenate([raw[:, :12].reshape(-1, 3, 4), focal[..., None]], -1).reshape(len(raw), 15)
    poses = normalise_llff(np.concatenate([rows, raw[:, 12:]], 1), factor)
    cameras = llff_cameras(poses, height, width, tuple(path.stem for path in paths))
    if len(shape) >= 6:
        matrices = cameras.intrinsics.copy()
        matrices[:, [0, 1], [0, 1]] = shape[[2, 3]] / factor
        matrices[:, [0, 1], [2, 2]] = shape[[4, 5]] / factor
        cameras = CameraSet(matrices, cameras.camera_to_world, height, width, cameras.names, cameras.near, cameras.far)
    return widened(Scene(folder.name, cameras, ImageFiles(paths, (height, width))), LLFF_NEAR, LLFF_FAR)


def read_google_scene(folder: Path) -> Scene | None:
    """An object of Google Scanned Objects: `rgb/*.png`, `pose/*.txt` (OpenCV), `intrinsics/*.txt`.

    Near and far follow from where the origin lies: its z-depth ∓ 0.5 √2 · 1.1, near at least a tenth of it.

    Returns:
        The scene, or None where it has fewer than 250 views: such objects are skipped.

    """
    paths = list_images(folder / "rgb")
    if len(paths) < GOOGLE_VIEWS:
        return None
    height, width = common_size(paths)
    poses = np.stack([read_matrix(folder / "pose" / f"{path.stem}.txt") for path in paths])
    matrices = np.stack([read_matrix(folder / "intrinsics" / f"{path.stem}.txt")[:3, :3] for path in paths])
    origin = np.linalg.inv(poses)[:, 2, 3]
    near = np.maximum(origin - GOOGLE_RADIUS, 0.1 * origin)
    cameras = CameraSet(
        matrices, poses, height, width, tuple(path.stem for path in paths), near, origin + GOOGLE_RADIUS
    )
    return Scene(folder.name, cameras, ImageFiles(paths, (height, width)))


def realestate_camera(
    entry: Float[np.ndarray, "19"], height: int, width: int
) -> tuple[Float[np.ndarray, "4 4"], Float[np.ndarray, "4 4"]]:
    """K and OpenCV pose of a line: timestamp, fx, fy, cx, cy (fractions of the image), 0, 0, 3x4 world-to-camera."""
    fx, fy, cx, cy = entry[1:5]
    matrix = np.eye(4)
    matrix[0, [0, 2]], matrix[1, [1, 2]] = (fx * width, cx * width), (fy * height, cy * height)
    world_to_camera = np.eye(4)
    world_to_camera[:3] = entry[7:].reshape(3, 4)
    return matrix, np.linalg.inv(world_to_camera)


def read_realestate_scene(camera_file: Path, frames: Path) -> Scene:
    """A video of RealEstate10K: its camera file and the folder of its frames, named by timestamp; near 1, far 100.

    Lines whose frame is missing (videos disappear) are left out. Frames are resized to 450 x 800 by area averaging.

    Raises:
        UserError: the file is missing or damaged, or no frame is there.

    """
    try:
        lines = camera_file.read_text(encoding="utf-8").splitlines()[1:]
        entries = [np.array(line.split(), dtype=np.float64).reshape(19) for line in lines if line.strip()]
    except FileNotFoundError:
        raise UserError(f"the camera file {camera_file} does not exist") from None
    except ValueError as error:
        raise UserError(f"the camera file {camera_file} is damaged: every line needs 19 numbers ({error})") from error
    by_name = {path.stem: path for path in list_images(frames)}
    kept = [(entry, by_name[str(int(entry[0]))]) for entry in entries if str(int(entry[0])) in by_name]
    if not kept:
        raise UserError(f"no frame of {camera_file} is in {frames}")
    height, width = REALESTATE_SIZE
    matrices, poses = zip(*(realestate_camera(entry, height, width) for entry, _ in kept), strict=True)
    cameras = CameraSet(
        np.stack(matrices)[:, :3, :3], np.stack(poses), height, width, tuple(path.stem for _, path in kept)
    ).with_bounds(1.0, 100.0)
    return Scene(camera_file.stem, cameras, ImageFiles([path for _, path in kept], (height, width), resize=True))


def rotation_from_axis(vector: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3 3"]:
    """The rotation about `vector` by its length in radians (Rodrigues)."""
    angle = np.linalg.norm(vector)
    if angle == 0:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def spaces_camera(view: dict[str, Any]) -> tuple[Float[np.ndarray, "3 3"], Float[np.ndarray, "4 4"]]:
    """K and OpenCV pose of a view of `models.json`; its orientation is the axis-angle of world-to-camera."""
    focal, aspect = view["focal_length"], view["pixel_aspect_ratio"]
    cx, cy = view["principal_point"]
    pose = np.eye(4)
    pose[:3, :3] = rotation_from_axis(-np.asarray(view["orientation"], dtype=np.float64))
    pose[:3, 3] = view["position"]
    return np.array([[focal, 0, cx], [0, focal * aspect, cy], [0, 0, 1.0]]), pose


class CentredImages(ImageFiles):
    """Images on a white canvas of one size, smaller ones in its middle."""

    def decode(self, index: int) -> np.ndarray:
        """Picture `index` on its canvas."""
        image = read_image(self.paths[index])[..., :3]
        canvas = np.full((*self.size, 3), 255, dtype=np.uint8)
        top, left = ((full - part) // 2 for full, part in zip(self.size, image.shape[:2], strict=True))
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
        return canvas


def read_spaces_scene(folder: Path) -> Scene:
    """All views of a scene of the Spaces data set (`models.json`: a list of camera rigs); near 0.7, far 100.

    Raises:
        UserError: missing or damaged files.

    """
    rigs = read_json(folder / "models.json")
    try:
        views = [view for rig in rigs for view in rig]
        paths = [folder / view["relative_path"] for view in views]
        sizes = [image_size(path) for path in paths]
        pairs = [spaces_camera(view) for view in views]
        scales = [(w / view["width"], h / view["height"]) for view, (h, w) in zip(views, sizes, strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/models.json does not hold the views of a Spaces scene ({error})") from error
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    matrices = np.stack([matrix for matrix, _ in pairs])
    for matrix, (x, y), (h, w) in zip(matrices, scales, sizes, strict=True):
        matrix[0] *= x
        matrix[1] *= y
        matrix[:2, 2] += (width - w) // 2, (height - h) // 2
    cameras = CameraSet(matrices, np.stack([pose for _, pose in pairs]), height, width).with_bounds(0.7, 100.0)
    return Scene(folder.name, cameras, CentredImages(paths, (height, width)))


def read_nmr_scene(folder: Path) -> Scene:
    """A ShapeNet object of the NMR renderings: `image/*.png` and `cameras.npz`; near 2, far 4.

    Raises:
        UserError: missing or damaged files.

    """
    paths = list_images(folder / "image")
    height, width = common_size(paths)
    try:
        with np.load(folder / "cameras.npz", allow_pickle=False) as stored:
            world = np.stack([np.vstack([stored[f"world_mat_{i}"][:3], [0, 0, 0, 1]]) for i in range(len(paths))])
            camera = np.stack([stored[f"camera_mat_{i}"] for i in range(len(paths))])
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{folder}/cameras.npz needs world_mat_i and camera_mat_i of every image ({error})") from error
    matrices = np.tile(np.eye(3), (len(paths), 1, 1))
    matrices[:, 0, 0], matrices[:, 1, 1] = camera[:, 0, 0] * width / 2, camera[:, 1, 1] * height / 2
    matrices[:, 0, 2], matrices[:, 1, 2] = width / 2, height / 2
    cameras = CameraSet(matrices, np.linalg.inv(world), height, width, tuple(path.stem for path in paths))
    return Scene(folder.name, cameras.with_bounds(2.0, 4.0), ImageFiles(paths, (height, width)))


def read_deepvoxels_scene(folder: Path, split: str = "train", *, skip: int = 1) -> Scene:
    """A split of an object of DeepVoxels, given the folder of its training views; every `skip`-th view.

    Raises:
        UserError: missing or damaged files.

    """
    return read_deepvoxels(folder.parent.parent, folder.name, split, skip=skip)


def inverse_depth_planes(near: float, far: float, count: int) -> Float[np.ndarray, " planes"]:
    """`count` depths uniform in inverse depth, farthest first, both ends included."""
    return 1.0 / np.linspace(1.0 / far, 1.0 / near, count)


@dataclass(frozen=True)
class Collection:
    """A data set of the paper.

    Attributes:
        folder: under the data root.
        read: one scene from its folder.
        source: where it is published.
        licence: as far as known; never bundled.
        weight: share of the cross-scene training mixture.

    """

    folder: str
    read: Callable[[Path], Scene | None]
    source: str
    licence: str
    weight: float = 0.0


def drive(identifier: str) -> str:
    """Address of a file on Google Drive."""
    return f"https://drive.google.com/file/d/{identifier}/view"


UNKNOWN = "no explicit code licence; research use"
COLLECTIONS = {
    "ibrnet_collected": Collection(
        "ibrnet_collected_1", read_ibrnet_scene, drive("1rkzl3ecL3H0Xxf5WTyc2Swv30RIyr1R_"), UNKNOWN, 0.35
    ),
    "llff": Collection("real_iconic_noface", read_llff_scene, drive("1ThgjloNt58ZdnEuiCeRf9tATJ-HI0b01"), UNKNOWN, 0.3),
    "spaces": Collection(
        "spaces_dataset/data/800",
        read_spaces_scene,
        "https://github.com/augmentedperception/spaces_dataset",
        UNKNOWN,
        0.15,
    ),
    "google": Collection(
        "google_scanned_objects", read_google_scene, drive("1w1Cs0yztH6kE3JIz7mdggvPGCwIKkVi2"), "CC-BY 4.0", 0.05
    ),
    "llff_test": Collection("nerf_llff_data", read_llff_scene, drive("16VnMcF1KJYxN9QId6TClMsZRahHNMW5g"), UNKNOWN),
    "nerf_synthetic": Collection(
        "nerf_synthetic", read_blender, drive("18JxhpWD-4ZmuFKLzKlAw-w5PpzZxXOcG"), "Creative Commons variants"
    ),
    "shiny": Collection("shiny", read_shiny_scene, "https://nex-mpi.github.io", UNKNOWN),
    "deepvoxels": Collection(
        "deepvoxels/train", read_deepvoxels_scene, "https://github.com/vsitzmann/deepvoxels", UNKNOWN
    ),
    "nmr": Collection(
        "nmr", read_nmr_scene, "https://github.com/autonomousvision/differentiable_volumetric_rendering", UNKNOWN
    ),
}
# RealEstate10K has its cameras and its frames in two places: see `realestate_scenes`.
REALESTATE_WEIGHT = 0.15


def scene_folders(root: Path, name: str) -> list[Path]:
    """Folders of a collection's scenes under the data root, sorted; test scenes are left out of `llff`.

    Raises:
        UserError: no such collection, or it is not under the root; the message says where to get it.

    """
    if name not in COLLECTIONS:
        raise UserError(f"there is no data set {name}; there are {', '.join(COLLECTIONS)}")
    collection = COLLECTIONS[name]
    base = root / collection.folder
    if not base.is_dir():
        raise UserError(f"the data set {name} is not in {base}; get it from {collection.source} and unpack it there")
    folders = [path for path in base.iterdir() if path.is_dir()]
    if name == "ibrnet_collected" and (second := root / "ibrnet_collected_2").is_dir():
        folders += [path for path in second.iterdir() if path.is_dir()]
    return sorted(path for path in folders if name != "llff" or path.name not in LLFF_TEST_SCENES)


def realestate_scenes(root: Path) -> list[Scene]:
    """Videos of the RealEstate10K subset: `RealEstate10K-subset/cameras/*.txt` with `frames/<same name>/`.

    Videos of which no frames are there (they disappear) are left out.

    Raises:
        UserError: the folder is missing, no video has frames, or one is damaged.

    """
    base = root / "RealEstate10K-subset"
    files = sorted((base / "cameras").glob("*.txt"))
    if not files:
        source = drive("1IgJIeCPPZ8UZ529rN8dw9ihNi1E9K0hL")
        raise UserError(f"RealEstate10K camera files are not in {base}/cameras; get them from {source}")
    kept = [file for file in files if (base / "frames" / file.stem).is_dir()]
    if not kept:
        raise UserError(f"no video of {base}/cameras has its frames in {base}/frames, in a folder of its name")
    return [read_realestate_scene(file, base / "frames" / file.stem) for file in kept]
