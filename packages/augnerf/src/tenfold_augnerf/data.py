"""The paper's data sets (section 5) as training, validation and test views."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from tenfold_augnerf.cameras import corrupt_poses
from tenfold_augnerf.corruptions import corrupt_view, denoise, pose_noise, view_generator
from tenfold_augnerf.paths import BLENDER_RADIUS, llff_poses, video_views
from tenfold_augnerf.views import Views
from tenfold_shared.checkpoint import atomic_write
from tenfold_shared.download import data_root, missing
from tenfold_shared.errors import UserError
from tenfold_shared.scenes import LLFFPoses, Scene, blocks_views, read_blender, read_deepvoxels, read_llff
from tenfold_shared.scenes.blender import numbers_of, read_json

DataName = Literal[
    "blocks-mini",
    "blocks-tiny",
    "blocks-small",
    "blocks-medium",
    "blocks-full",
    "blender",
    "llff",
    "deepvoxels",
    "linemod",
    "prepared",
]
Kind = Literal[
    "none", "saltpepper", "saltpepper-bernoulli", "gaussian", "poisson", "blur", "exposure", "jpeg", "occlusion"
]

SOURCE = "https://drive.google.com/drive/folders/128yBriW1IG_3NJ5Rp7APSTZsJqdJdfc1"
LICENCES = {
    "blender": " (models under variants of Creative Commons; not to be redistributed)",
    "llff": " (for research use; not to be redistributed)",
}
LLFF_SCENES = ("fern", "flower", "fortress", "horns", "leaves", "orchids", "room", "trex")
BLENDER_SCENES = ("chair", "drums", "ficus", "hotdog", "lego", "materials", "mic", "ship")
DEEPVOXELS_SCENES = ("armchair", "cube", "greek", "vase")
BLOCKS = {  # size, views for training, validation, test
    "blocks-mini": (32, 30, 4, 6),
    "blocks-tiny": (32, 10, 4, 6),
    "blocks-small": (64, 20, 6, 10),
    "blocks-medium": (200, 60, 10, 20),
    "blocks-full": (400, 100, 13, 25),
}
HELD_OUT = 8
VALIDATION_OFFSET, TEST_OFFSET = 23.0, 68.0  # degrees


@dataclasses.dataclass
class DataConfig:
    """Which pictures, and what is done to the training views."""

    name: DataName = "blocks-tiny"
    """The data set: an exact scene of blocks in several sizes, a published layout, or a folder of prepared rays."""
    scene: str = ""
    """Scene of the data set, a folder's name."""
    root: Path | None = None
    """Folder of the data set, looked for here and in the data root; default: the data set's own name there."""
    factor: int = 8
    """LLFF: how much smaller than the originals the pictures are."""
    half_res: bool = False
    """Blender: halve the pictures by area averaging."""
    white: bool = True
    """Composite transparent pictures on white, and render on it."""
    ndc: bool = False
    """LLFF: sample in normalised device coordinates instead of world space."""
    spherify: bool = False
    """LLFF: a capture around an object."""
    test_skip: int = 8
    """Keep every n-th validation and test view of Blender and DeepVoxels; LLFF tests every n-th view."""
    near: float | None = None
    """Smallest ray parameter, where the data set's own is not wanted."""
    far: float | None = None
    """Largest ray parameter."""
    views: int = 0
    """Train on this many views, spread over all; 0 takes all."""
    corruption: Kind = "none"
    """What is done to the training views; validation and test views stay clean."""
    amount: float = 0.3
    """How much of it: ratio, standard deviation, photons, pixels, gain, quality or share."""
    corruption_seed: int = 0
    """Seed of the corruption; view v is corrupted by a generator seeded with 1000 seed + v."""
    pose_offset: float = 0.0
    """Training cameras are off by up to this much, in world units along each axis."""
    pose_degrees: float = 0.0
    """Training cameras are turned by up to this much about each axis."""
    denoise: bool = False
    """Clean the training views with a 3x3 median first."""

    def __post_init__(self) -> None:
        """Refuse what no data set has."""
        if self.factor < 1 or self.test_skip < 1 or self.views < 0:
            raise UserError("--data.factor and test_skip take 1 or more, --data.views 0 or more")
        if (self.near is None) != (self.far is None):
            raise UserError("--data.near and --data.far come together: give both or neither")
        if self.near is not None and self.far is not None and not -math.inf < self.near < self.far < math.inf:
            raise UserError(f"--data.near {self.near:g} and far {self.far:g}: near < far is needed, both finite")
        if not (0 <= self.pose_offset < math.inf and 0 <= self.pose_degrees < math.inf):
            raise UserError("--data.pose_offset and pose_degrees take 0 or more")
        if self.corruption_seed < 0:
            raise UserError(f"--data.corruption_seed {self.corruption_seed}: take 0 or more")


class Data(NamedTuple):
    """The views of a data set.

    Attributes:
        train: corrupted where the configuration says so.
        clean: the training views as they were, to see whether noise is memorised.
        validation: for choosing values.
        test: for reporting.
        white: background.
        ndc: (height, width, focal) where rays are to be warped.
        scene: the exact scene behind the pictures ("blocks"), or "".
        path: number of frames (0: as many as are usual) -> the cameras of the video; None where there is none.

    """

    train: Views
    clean: Views
    validation: Views
    test: Views
    white: bool
    ndc: tuple[int, int, float] | None = None
    scene: str = ""
    path: Callable[[int], Views] | None = None

    def to(self, device: torch.device) -> "Data":
        """The same on a device."""
        return self._replace(
            train=self.train.to(device),
            clean=self.clean.to(device),
            validation=self.validation.to(device),
            test=self.test.to(device),
        )


class Splits(NamedTuple):
    """Scenes as read, the range of ray parameters, and all cameras where the layout has a video of its own."""

    train: Scene
    validation: Scene
    test: Scene
    near: float
    far: float
    capture: LLFFPoses | None = None


def load_data(config: DataConfig) -> Data:
    """The data set with its corruption, on the CPU.

    Raises:
        UserError: the data set is not there or damaged, or the configuration does not fit it.

    """
    if config.name == "prepared":
        return _prepared(config)
    _check_options(config)
    splits = READERS[config.name.partition("-")[0]](config)
    near, far = (splits.near, splits.far) if config.near is None or config.far is None else (config.near, config.far)
    train = splits.train
    if config.views:
        train = train.subset(spread(config.views, len(train), train.name))
    ndc = None
    if config.ndc:
        cameras = train.cameras
        ndc, near, far = (cameras.height, cameras.width, float(cameras.intrinsics[0, 0, 0])), 0.0, 1.0

    def views(scene: Scene) -> Views:
        return Views.from_scene(scene, near, far, white=config.white)

    clean = views(train)
    exact = "blocks" if config.name.startswith("blocks") else ""
    parts = corrupted(clean, train, config), clean, views(splits.validation), views(splits.test)
    radius = BLENDER_RADIUS if config.name == "blender" else None
    path = functools.partial(video_views, clean, capture=splits.capture, spherified=config.spherify, radius=radius)
    return Data(*parts, config.white, ndc, exact, path)


def load_to_choose(config: DataConfig) -> Data:
    """The data set for choosing values: where its validation views are its test views, as LLFF captures have it, every
    8th training view is a validation view instead, without corruption.

    Raises:
        UserError: see `load_data`; one training view cannot be shared out.

    """
    data = load_data(config)
    if not torch.equal(data.validation.colours, data.test.colours):
        return data
    held = torch.arange(len(data.train)) % HELD_OUT == 0
    if held.all():
        raise UserError(
            f"{config.name} {config.scene} has one training view, of which none can be held out to choose values on"
        )
    return data._replace(
        train=data.train.chosen(~held), clean=data.clean.chosen(~held), validation=data.clean.chosen(held)
    )


def _check_options(config: DataConfig) -> None:
    """Refuse options of another layout than the one that is read.

    Raises:
        UserError: naming the option and what it is for.

    """
    if config.ndc and (config.name != "llff" or config.spherify):
        what = "spherified ones" if config.spherify else config.name
        raise UserError(f"--data.ndc is for forward-facing LLFF captures, not for {what}")
    if config.ndc and config.near is not None:
        raise UserError("--data.near and --data.far are for world space: rays in NDC go from 0 to 1, leave them out")
    if config.spherify and config.name != "llff":
        raise UserError(f"--data.spherify is for LLFF captures, not for {config.name}")
    if config.half_res and config.name != "blender":
        raise UserError(f"--data.half_res is for Blender scenes, not for {config.name}: leave it out")


def spread(count: int, available: int, name: str) -> np.ndarray:
    """Numbers of `count` training views, spread over all.

    Raises:
        UserError: there are fewer.

    """
    if count > available:
        raise UserError(f"--data.views {count}: {name} has {available} training views")
    return np.linspace(0, available - 1, count).round().astype(int)


def corrupted(clean: Views, scene: Scene | None, config: DataConfig) -> Views:
    """The training views with wrong pictures and, where the scene gives cameras, with wrong ones, as configured."""
    views = Views(clean.colours.clone(), clean.turns, clean.centres, clean.near, clean.far, clean.depth, clean.stored)
    for index in range(len(views)):
        image = views.colours[index].numpy().astype(np.float32) / 255
        if config.corruption != "none":
            image = corrupt_view(image, config.corruption, config.amount, config.corruption_seed, index)
        if config.denoise:
            image = denoise(image)
        views.colours[index] = torch.from_numpy((image * 255 + 0.5).astype(np.uint8))
    if scene is not None and (config.pose_offset or config.pose_degrees):
        moved = moved_poses(scene, config)
        inverse = torch.linalg.inv(torch.from_numpy(scene.cameras.intrinsics))
        views.turns, views.centres = (moved[:, :, :3] @ inverse).float(), moved[:, :, 3].float()
    return views


def moved_poses(scene: Scene, config: DataConfig) -> torch.Tensor:
    """Camera-to-world matrices [N, 3, 4], off by up to what is configured."""
    generator = view_generator(config.corruption_seed, len(scene))
    shift, angles = pose_noise(len(scene), config.pose_offset, config.pose_degrees, generator)
    poses = torch.from_numpy(scene.cameras.camera_to_world[:, :3])
    return corrupt_poses(poses, torch.from_numpy(angles), torch.from_numpy(shift))


def corrupted_scene(scene: Scene, config: DataConfig) -> Scene:
    """The scene with the pictures, composited, and the cameras that `corrupted` makes of it, to be written."""
    bounds = scene.cameras.bounds
    assert bounds is not None, "exact scenes have bounds"
    pictures = corrupted(Views.from_scene(scene, *bounds, white=config.white), None, config).colours.numpy()
    poses = scene.cameras.camera_to_world.copy()
    poses[:, :3] = moved_poses(scene, config).numpy()
    cameras = dataclasses.replace(scene.cameras, camera_to_world=poses)
    return dataclasses.replace(scene, images=list(pictures), cameras=cameras)


# -- the layouts ----------------------------------------------------------------------------------------------------------


def dataset_folder(config: DataConfig, default: str, layout: str) -> Path:
    """The scene's folder: under `--data.root`, there or in the data root.

    Raises:
        UserError: it is not there; the message says where to get it and where to put it.

    """
    root = data_root() / default if config.root is None else config.root
    if config.root is not None and not root.exists():
        root = data_root() / config.root
    folder = root / config.scene
    if not folder.is_dir() and config.name == "prepared":
        raise UserError(
            f"no prepared rays at {folder}/{layout}: write them with `prepare`, or name them by --data.root"
        )
    if not folder.is_dir():
        source = SOURCE + LICENCES.get(config.name, "")
        raise missing(f"scene {config.scene or '(--data.scene)'} of {config.name}", source, f"{folder}/{layout}")
    return folder


def _blocks(config: DataConfig) -> Splits:
    size, train, validation, test = BLOCKS[config.name]
    scenes = (
        blocks_views(train, size),
        blocks_views(validation, size, VALIDATION_OFFSET),
        blocks_views(test, size, TEST_OFFSET),
    )
    return Splits(*scenes, 2.0, 6.0)


def _blender(config: DataConfig) -> Splits:
    folder = dataset_folder(config, "nerf_synthetic", "transforms_{train,val,test}.json")
    train = read_blender(folder, "train")
    size = None
    if config.half_res:
        size = train.cameras.height // 2, train.cameras.width // 2
        train = read_blender(folder, "train", size=size)
    validation, test = (read_blender(folder, split, skip=config.test_skip, size=size) for split in ("val", "test"))
    bounds = train.cameras.bounds
    assert bounds is not None, "the reader sets bounds"
    return Splits(train, validation, test, *bounds)


def _linemod(config: DataConfig) -> Splits:
    folder = dataset_folder(config, "linemod", "transforms_{train,val,test}.json with near and far")
    scenes = {split: read_blender(folder, split) for split in ("train", "val", "test")}
    ends = []
    for split in ("train", "test"):
        meta = read_json(folder / f"transforms_{split}.json")
        if "near" not in meta or "far" not in meta:
            raise UserError(f"{folder}/transforms_{split}.json has no near and far, which LINEMOD-style scenes give")
        with numbers_of(folder / f"transforms_{split}.json"):
            ends.append((float(meta["near"]), float(meta["far"])))
    near, far = math.floor(min(end[0] for end in ends)), math.ceil(max(end[1] for end in ends))
    return Splits(scenes["train"], scenes["val"], scenes["test"], near, far)


def _llff(config: DataConfig) -> Splits:
    folder = dataset_folder(config, "nerf_llff_data", "{poses_bounds.npy,images_8/*.png,images/*.JPG}")
    scene = read_llff(folder, config.factor, spherify=config.spherify)
    if config.test_skip == 1 or len(scene) == 1:
        raise UserError(
            f"--data.test_skip {config.test_skip} leaves none of the {len(scene)} views of {folder} for training: take more"
        )
    train, test = scene.split(config.test_skip)
    bounds = scene.cameras.bounds
    assert bounds is not None, "the layout has bounds"
    return Splits(train, test, test, 0.9 * bounds[0], bounds[1], llff_poses(scene.cameras))


def _deepvoxels(config: DataConfig) -> Splits:
    scene = config.scene
    folder = dataset_folder(
        dataclasses.replace(config, scene=""), "deepvoxels", f"{{train,validation,test}}/{scene}/{{rgb,pose}}"
    )
    if not (folder / "train" / scene).is_dir():
        raise missing(
            f"scene {scene or '(--data.scene)'} of deepvoxels", SOURCE, f"{folder}/train/{scene}/{{rgb,pose}}"
        )
    train = read_deepvoxels(folder, scene, "train")
    validation, test = (
        read_deepvoxels(folder, scene, split, skip=config.test_skip) for split in ("validation", "test")
    )
    bounds = train.cameras.bounds
    assert bounds is not None, "the reader sets bounds"
    return Splits(train, validation, test, *bounds)


READERS: dict[str, Callable[[DataConfig], Splits]] = {
    "blocks": _blocks,
    "blender": _blender,
    "linemod": _linemod,
    "llff": _llff,
    "deepvoxels": _deepvoxels,
}

# -- prepared rays --------------------------------------------------------------------------------------------------------


def write_prepared(folder: Path, data: Data) -> None:
    """The released cache: rays_<split>.npy [n, H, W, 2, 3], rgbs_<split>.npy [n, H, W, 3] (float32), meta.json.

    The split `exhibit` is the video's path, whose pictures are black: there are none.

    Raises:
        UserError: rays in normalised device coordinates, which the cache does not have.

    """
    if data.ndc:
        raise UserError("prepared rays are in world space: leave --data.ndc out")
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": data.train, "val": data.validation, "test": data.test}
    if data.path is not None:
        parts["exhibit"] = data.path(0)
    for split, views in parts.items():
        shape = len(views), *views.size
        found = (views.rays(views.pixels_of(view)) for view in range(len(views)))
        stacked = (torch.stack([rays.origins, rays.directions], 1).numpy() for rays in found)
        _write_parts(folder / f"rays_{split}.npy", (*shape, 2, 3), stacked)
        pictures = (colours.numpy().astype(np.float32) / 255 for colours in views.colours)
        _write_parts(folder / f"rgbs_{split}.npy", (*shape, 3), pictures)
    views = data.train
    counts = [len(part) for part in (data.train, data.validation, data.test)]
    first = np.cumsum([0, *counts])
    splits = {
        f"i_{name}": list(range(int(a), int(b)))
        for name, a, b in zip(("train", "val", "test"), first[:-1], first[1:], strict=True)
    }
    across = views.size[1] - 1
    focal = float(across / views.rays(torch.tensor([0, across])).directions.diff(dim=0).norm())
    meta = {"near": views.near, "far": views.far, "H": views.size[0], "W": views.size[1], "focal": focal, **splits}
    (folder / "meta.json").write_text(json.dumps({**meta, "white_bkgd": data.white}, indent=1), encoding="utf-8")


def _write_parts(path: Path, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> None:
    """An array in single precision as .npy, a view at a time: all at once would take many times the pictures' memory."""
    with atomic_write(path) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for part in parts:
            file.write(part.astype("<f4").tobytes())


def _prepared(config: DataConfig) -> Data:
    if config.ndc or config.spherify or config.half_res or config.pose_offset or config.pose_degrees:
        raise UserError(
            "--data.ndc, spherify, half_res, pose_offset and pose_degrees are for data with cameras: prepared rays stay "
            "as they are"
        )
    folder = dataset_folder(config, "prepared", "{meta.json,rays_train.npy,rgbs_train.npy,...}")
    meta = read_json(folder / "meta.json")
    if not isinstance(meta, dict):
        raise UserError(f"{folder}/meta.json holds no dictionary; prepare the rays again")
    try:
        with numbers_of(folder / "meta.json"):
            near, far = (
                (float(meta["near"]), float(meta["far"]))
                if config.near is None or config.far is None
                else (config.near, config.far)
            )
    except KeyError as error:
        raise UserError(f"{folder}/meta.json has no {error}: near and far are needed") from None
    if not near < far:
        raise UserError(f"{folder}/meta.json has near {near:g} and far {far:g}: near < far is needed")

    def array(name: str, shape: tuple[int, ...]) -> Any:
        try:
            found = np.load(folder / name, allow_pickle=False)
        except FileNotFoundError:
            raise UserError(f"{folder / name} does not exist, though meta.json does") from None
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{folder / name} is damaged ({error})") from error
        if found.ndim != 3 + len(shape) or found.shape[3:] != shape or not found.size:
            raise UserError(
                f"{folder / name} has the shape {found.shape}, expected [n, H, W, {', '.join(map(str, shape))}]"
            )
        return torch.from_numpy(np.ascontiguousarray(found, dtype=np.float32))

    def stored(colours: torch.Tensor, rays: torch.Tensor) -> Views:
        empty = torch.zeros(len(rays), 3, 3)
        return Views(colours, empty, rays[:, 0, 0, 0].contiguous(), near, far, None, rays)

    def split(name: str) -> Views:
        rays, colours = array(f"rays_{name}.npy", (2, 3)), array(f"rgbs_{name}.npy", (3,))
        if rays.shape[:3] != colours.shape[:3]:
            raise UserError(f"{folder}: rays_{name}.npy and rgbs_{name}.npy are of different views")
        if not (rays.isfinite().all() and colours.isfinite().all()):
            raise UserError(f"{folder}: rays_{name}.npy or rgbs_{name}.npy has numbers that are not finite")
        return stored((colours * 255 + 0.5).clamp(0, 255).to(torch.uint8), rays)

    def exhibit(frames: int) -> Views:
        rays = array("rays_exhibit.npy", (2, 3))
        if frames not in (0, len(rays)):
            raise UserError(f"--frames {frames}: the path of {folder} has {len(rays)} frames, leave it out")
        return stored(torch.zeros(*rays.shape[:3], 3, dtype=torch.uint8), rays)

    clean, validation, test = (split(name) for name in ("train", "val", "test"))
    if config.views:
        clean = clean.chosen(torch.from_numpy(spread(config.views, len(clean), str(folder))))
    path = exhibit if (folder / "rays_exhibit.npy").exists() else None
    white = bool(meta.get("white_bkgd", config.white))
    return Data(corrupted(clean, None, config), clean, validation, test, white, path=path)
