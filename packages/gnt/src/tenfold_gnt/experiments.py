"""What an experiment trains on and is judged on: the embedded tables, the paper's sets, or a capture of one's own."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from tenfold_gnt.collections import (
    COLLECTIONS,
    REALESTATE_WEIGHT,
    read_deepvoxels_scene,
    read_llff_scene,
    read_nmr_scene,
    read_shiny_scene,
    realestate_scenes,
    scene_folders,
    widened,
)
from tenfold_gnt.data import Mixture, TargetViews, TrainingViews, evaluation_views, refuse_few_views
from tenfold_gnt.views import SOURCE_RULES, Distance
from tenfold_shared.download import data_root
from tenfold_shared.errors import UserError
from tenfold_shared.scenes import (
    Scene,
    read_blender,
    read_colmap,
    read_nerfstudio,
    render_views,
    tabletop,
    tabletop_cameras,
    tabletop_views,
)

DataName = Literal["tabletop", "cross-scene", "llff_test", "nerf_synthetic", "shiny", "nmr", "deepvoxels", "capture"]
Part = Literal["test", "validation"]
# Scene seeds and camera offsets of the embedded tables: training, validation (for choosing values) and test never meet.
UNSEEN = {"validation": (50, 51, 52), "test": (100, 101, 102)}
OFFSETS = {"validation": 0.21, "test": 0.13}
TEST_POSES = 3
OBJECT_RULE = SOURCE_RULES["nerf_synthetic"]
AROUND = ("nmr", "deepvoxels")  # an object with cameras all around, for which the paper gives no rule
CAPTURE_RULE = SOURCE_RULES["llff_test"]
LEAST_SOURCES = 2


@dataclass
class DataConfig:
    """Which scenes, and how many source views a target is rendered from."""

    name: DataName = "tabletop"
    """The data set: tabletop is embedded and exact; cross-scene is the paper's training mixture;
    capture is any folder in the NeRF-synthetic, LLFF, nerfstudio or COLMAP layout."""
    root: Path | None = None
    """Folder of the data set (capture: the capture itself); default: the data root ($TENFOLD_DATA or the platform's
    cache)."""
    scene: str = ""
    """One scene of a data set of several; for cross-scene and evaluation: all when none is named."""
    judged: Literal["llff_test", "nerf_synthetic"] = "llff_test"
    """Cross-scene: the scenes judged on."""
    split: Literal["val", "test"] = "val"
    """NeRF-synthetic: what is judged on; the published numbers are from every 8th view of val."""
    factor: int = 0
    """LLFF captures and Shiny: how much smaller than the photographs the images are; 0 takes 4, for Shiny 8."""
    near: float = 0.0
    """Capture: depth of the first sample; 0 takes what the files say."""
    far: float = 0.0
    """Capture: depth of the last sample; 0 takes what the files say."""
    sources: int = 10
    """Source views of a target."""
    scenes: int = 8
    """Tabletop: scenes trained on."""
    views: int = 20
    """Tabletop: views of a scene."""
    size: int = 48
    """Tabletop: width and height of the pictures."""
    specular: float = 0.3
    """Tabletop: strength of the highlights."""
    unseen: bool = True
    """Tabletop: judge on scenes never trained on; otherwise on new poses of the scenes trained on."""
    judge: Part = "test"
    """Tabletop: judge on the test scenes and poses, or on those kept for choosing values."""

    def __post_init__(self) -> None:
        """Refuse what no data set has."""
        if self.sources < LEAST_SOURCES:
            raise UserError(f"--data.sources takes {LEAST_SOURCES} or more views, got {self.sources}")
        if min(self.scenes, self.views, self.size) < 1:
            raise UserError("--data.scenes, --data.views and --data.size take 1 or more")
        if min(self.factor, self.specular) < 0:
            raise UserError("--data.factor and --data.specular take 0 or more")
        if self.unseen and self.scenes > UNSEEN["validation"][0]:
            raise UserError(
                f"--data.scenes {self.scenes}: the tables from number {UNSEEN['validation'][0]} on are judged on; "
                f"train on {UNSEEN['validation'][0]} or fewer"
            )
        if min(self.near, self.far) < 0 or (self.near and self.far and self.near >= self.far):
            raise UserError(f"--data.near and --data.far need 0 < near < far, got {self.near} and {self.far}")

    @property
    def reduction(self) -> int:
        """The factor, or the published one of the data set."""
        return self.factor or (8 if self.name == "shiny" else 4)

    @property
    def judged_name(self) -> DataName:
        """The data set judged on."""
        return self.judged if self.name == "cross-scene" else self.name

    @property
    def judged_split(self) -> str:
        """What of it is judged on, in words."""
        if self.judged_name == "nerf_synthetic":
            return f"every 8th view of {self.split}" if self.split == "val" else self.split
        return self.judge if self.name == "tabletop" else "held-out views"


class Target(NamedTuple):
    """A view to be judged on: where it is, and the scene whose views it may be rendered from."""

    scene: Scene
    view: int
    pool: Scene
    method: Distance

    def views(self, sources: int) -> TargetViews:
        """The target with its nearest sources.

        Raises:
            UserError: the pool has fewer views.

        """
        return evaluation_views(self.scene, self.view, sources, self.method, self.pool)


def training_set(config: DataConfig) -> TrainingViews | Mixture:
    """What training draws its targets from.

    Raises:
        UserError: the data set is not there or damaged; the message says where to get it.

    """
    if config.name == "tabletop":
        return TrainingViews("tabletop", tables(config), config.sources, OBJECT_RULE, augment=False)
    if config.name == "cross-scene":
        return cross_scene(config)
    if config.name == "capture":
        pool, _ = capture(config)
        return TrainingViews("capture", [pool], config.sources, CAPTURE_RULE, augment=False)
    pools = [pool for pool, _, _ in held_out(config)]
    if config.name != "nerf_synthetic" and len(pools) != 1:
        raise UserError(f"--data.name {config.name} trains on one scene: name it with --data.scene")
    return TrainingViews(config.name, pools, config.sources, OBJECT_RULE if config.name in AROUND else None)


def judged_targets(config: DataConfig) -> list[Target]:
    """The views an experiment is judged on, each with the views it may be rendered from.

    Raises:
        UserError: as `training_set`; or there are fewer views to render one from than sources are asked for.

    """
    if config.name == "tabletop":
        targets = table_targets(config)
    elif config.name == "capture":
        pool, test = capture(config)
        targets = [Target(test, i, pool, "dist") for i in range(len(test))]
    else:
        targets = [
            Target(test, i, pool, method)
            for pool, test, method in held_out(replace(config, name=config.judged_name))
            for i in range(len(test))
        ]
    for target in targets:  # here, and not when the training that they judge is done
        refuse_few_views(target.pool, config.sources)
    return targets


def tables(config: DataConfig) -> list[Scene]:
    """The training tables, seeds 0, 1, ..."""
    return [tabletop_views(seed, config.views, config.size, 0.0, config.specular) for seed in range(config.scenes)]


def table_targets(config: DataConfig) -> list[Target]:
    """Three poses of every table that is judged on; the sources are the table's views from the training poses."""
    seeds = UNSEEN[config.judge] if config.unseen else tuple(range(config.scenes))
    cameras = tabletop_cameras(TEST_POSES, config.size, OFFSETS[config.judge])
    targets = []
    for seed in seeds:
        pool = tabletop_views(seed, config.views, config.size, 0.0, config.specular)
        test = render_views(tabletop(seed, config.specular), cameras, pool.name)
        targets += [Target(test, i, pool, "vector") for i in range(TEST_POSES)]
    return targets


def cross_scene(config: DataConfig) -> Mixture:
    """The paper's mixture: LLFF .3, Spaces .15, IBRNet's collection .35, RealEstate10K .15, scanned objects .05."""
    root, sets, weights = config.root or data_root(), [], []
    for name, collection in COLLECTIONS.items():
        if collection.weight:
            read = (collection.read(folder) for folder in scene_folders(root, name))
            scenes = [scene for scene in read if scene is not None]
            sets.append(TrainingViews(name, scenes, config.sources))
            weights.append(collection.weight)
    sets.append(TrainingViews("realestate", realestate_scenes(root), config.sources))
    return Mixture(sets, [*weights, REALESTATE_WEIGHT])


def chosen_folders(config: DataConfig) -> list[Path]:
    """Folders of the scenes of a test set: the one that is named, or all.

    Raises:
        UserError: the data set or the scene is not there.

    """
    folders = scene_folders(config.root or data_root(), config.name)
    if config.scene:
        known = [folder.name for folder in folders]
        folders = [folder for folder in folders if folder.name == config.scene]
        if not folders:
            raise UserError(f"{config.name} has no scene {config.scene!r}; there are {', '.join(known)}")
    return folders


def held_out(config: DataConfig) -> list[tuple[Scene, Scene, Distance]]:
    """(training views, judged views, view distance) of the scenes of a test set; every 8th view is judged on."""
    folders = chosen_folders(config)
    if config.name == "nerf_synthetic":
        skip = 8 if config.split == "val" else 1
        return [(read_blender(f, "train"), read_blender(f, config.split, skip=skip), "vector") for f in folders]
    if config.name == "deepvoxels":
        return [(read_deepvoxels_scene(f), read_deepvoxels_scene(f, "test", skip=8), "vector") for f in folders]
    if config.name == "nmr":
        return [(*read_nmr_scene(folder).split(), "vector") for folder in folders]
    return [(*read_forward(folder, config).split(), "dist") for folder in folders]


def read_forward(folder: Path, config: DataConfig) -> Scene:
    """All views of a scene of llff_test or shiny."""
    return (read_shiny_scene if config.name == "shiny" else read_llff_scene)(folder, config.reduction)


def whole_capture(config: DataConfig) -> Scene:
    """All views of the scene, those judged among them: what a capture's video is made from.

    Where training and judged views come from different files, the training views.

    Raises:
        UserError: as `training_set`.

    """
    config = replace(config, name=config.judged_name)
    if config.name in ("llff_test", "shiny"):
        return read_forward(chosen_folders(config)[0], config)
    if config.name == "capture" and (scene := undivided(capture_folder(config), config)) is not None:
        return _with_bounds(scene, config)
    return judged_targets(config)[0].pool


def capture(config: DataConfig) -> tuple[Scene, Scene]:
    """Training and judged views of a capture in whatever layout its folder has.

    Raises:
        UserError: no folder, no known layout, no depths, or images of different sizes.

    """
    folder = capture_folder(config)
    scene = undivided(folder, config)
    if scene is None:
        judged = "test" if (folder / "transforms_test.json").is_file() else "val"
        parts = read_blender(folder, "train"), read_blender(folder, judged)
    else:
        parts = scene.split()
    train, judged_views = (_with_bounds(part, config) for part in parts)
    sizes = [f"{part.cameras.width}x{part.cameras.height}" for part in (train, judged_views)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"the images of the capture {folder} need one size: it has {sizes[0]} in its training views and {sizes[1]} "
            "in those judged"
        )
    return train, judged_views


def capture_folder(config: DataConfig) -> Path:
    """The folder of a capture, given as a path or as a place in the data root.

    Raises:
        UserError: none is given, or there is none.

    """
    if config.root is None:
        raise UserError("--data.root: name the capture's folder, here or in the data root")
    folder = config.root if config.root.exists() else data_root() / config.root
    if not folder.is_dir():
        raise UserError(f"the capture {folder} is no folder")
    return folder


def undivided(folder: Path, config: DataConfig) -> Scene | None:
    """All views of a capture; None in the NeRF-synthetic layout, which divides them itself."""
    if (folder / "transforms_train.json").is_file():
        return None
    if (folder / "poses_bounds.npy").is_file():
        return read_llff_scene(folder, config.reduction)
    if (folder / "transforms.json").is_file():
        return read_nerfstudio(folder)
    scene = read_colmap(folder)
    return scene if scene.cameras.bounds is None else widened(scene, 0.9, 1.5)


def _with_bounds(scene: Scene, config: DataConfig) -> Scene:
    """The scene with the depths that the options give; without them with its own, the same for all views."""
    bounds = scene.cameras.bounds
    if bounds is None and not (config.near and config.far):
        raise UserError(f"{scene.name} has no near and far depths in its files: give --data.near and --data.far")
    near, far = bounds if bounds is not None else (0.0, np.inf)
    return replace(scene, cameras=scene.cameras.with_bounds(config.near or near, config.far or far))
