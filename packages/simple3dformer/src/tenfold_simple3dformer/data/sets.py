"""A recipe's data set as batches for training, selection and testing, on the run's device and cut by its processes."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from tenfold_shared.batches import Batches, StreamedBatches
from tenfold_shared.download import data_root, missing
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, derived_seed
from tenfold_simple3dformer import natural, rooms, shapes
from tenfold_simple3dformer.data import clouds, s3dis, sunrgbd, volumes
from tenfold_simple3dformer.metrics import SHAPENET_PARTS

Name = Literal[
    "procshapes", "procrooms", "natural2d", "modelnet10", "modelnet40", "shapenet", "modelnet40-points", "scanobjectnn",
    "shapenetpart", "s3dis", "sunrgbd",
]  # fmt: skip
Task = Literal["voxel_cls", "point_cls", "part_seg", "scene_seg", "detection", "image_cls"]


@dataclasses.dataclass
class DataConfig:
    """Which data, and which of it serves which purpose."""

    name: Name = "procshapes"
    """The data set; procshapes, procrooms and natural2d are generated or come with scikit-image."""
    root: Path | None = None
    """Its folder; default: its published name in the data root ($TENFOLD_DATA or the platform's cache)."""
    voxels: int = 30
    """Side of the grid."""
    points: int = 1024
    """Points of a cloud, of a scene's block, or of a scene to detect in."""
    normals: bool = True
    """Use normals where the data has them."""
    train_size: int = 50
    """Generated training samples."""
    test_size: int = 300
    """Generated test samples."""
    train_seed: int = 1
    """Seed of the generated training samples."""
    test_seed: int = 99
    """Seed of the generated test samples."""
    drop: float = 0.1
    """Share of the occupied voxels of generated shapes that is deleted."""
    noise: float = 0.005
    """Share of all voxels of generated shapes that is occupied at random."""
    depth_view: bool = False
    """Generated scenes: only what one camera sees."""
    augment: bool = True
    """The released augmentation of points and scenes."""
    select: Literal["none", "heldout", "test"] = "none"
    """Where the best epoch is chosen: nowhere (the last counts), on a tenth of the training samples (of scenes: of the
    rooms), or, as the release does, on the test samples themselves."""
    portion: float = 1.0
    """Share of each category's training samples to keep."""
    workers: int = 4
    """Processes that read files."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for name in ("voxels", "points", "train_size", "test_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--data.{name} takes 1 or more, got {getattr(self, name)}")
        for name in ("drop", "noise"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--data.{name} is a share in [0, 1), got {getattr(self, name)}")
        if not 0 < self.portion <= 1:
            raise UserError(f"--data.portion is a share in (0, 1], got {self.portion}")
        for name in ("train_seed", "test_seed"):
            if not 0 <= getattr(self, name) < 2**20:
                raise UserError(f"--data.{name} takes 0 to {2**20 - 1}, got {getattr(self, name)}")
        if self.workers < 0:
            raise UserError(f"--data.workers takes 0 or more, got {self.workers}")


class Data(NamedTuple):
    """What the loops see. ``selection`` is None where the last epoch counts."""

    train: Batches | StreamedBatches
    selection: Batches | StreamedBatches | None
    test: Batches | StreamedBatches
    classes: tuple[str, ...]
    inputs: int
    parts: Mapping[str, Sequence[int]]
    rooms: Sequence[np.ndarray]
    train_labels: Sequence[int]


class _Blocks(Dataset[tuple[Tensor, Tensor]]):
    """Training blocks of rooms."""

    def __init__(self, rooms: Sequence[np.ndarray], points: int, augment: bool):
        self.rooms, self.points, self.augment = rooms, points, augment
        self.which = s3dis.training_rooms(rooms, points)

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.RandomState(int(torch.randint(2**31, ())) if self.augment else index)
        features, labels = s3dis.training_block(
            self.rooms[self.which[index]], rng, self.points, least=min(1024, self.points)
        )
        if self.augment:  # of the three local coordinates only
            features[:, :3] = features[:, :3] * rng.uniform(0.8, 1.25) + rng.uniform(-0.1, 0.1, 3)
        return torch.from_numpy(features).float(), torch.from_numpy(labels)


class _Checked(Dataset[tuple[Tensor, Tensor]]):
    """A data set whose labels are looked at on the CPU, where it costs nothing, before a device chokes on them."""

    def __init__(self, dataset: Dataset[Any], classes: int, name: str):
        self.dataset, self.classes, self.name = dataset, classes, name

    def __len__(self) -> int:
        return _size(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, target = self.dataset[index]
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= self.classes:
            raise UserError(
                f"sample {index} of {self.name} has labels {low}..{high}, outside of the {self.classes} classes"
            )
        return inputs, target


class _Source(NamedTuple):
    train: Dataset[Any]
    plain: Dataset[Any]  # the training samples without augmentation, for selection
    test: Dataset[Any]
    classes: tuple[str, ...]
    inputs: int
    parts: Mapping[str, Sequence[int]] = {}
    rooms: Sequence[np.ndarray] = ()
    labels: Sequence[int] = ()
    groups: Sequence[int] = ()  # of the training samples, where they are not held out one by one


FOLDERS = {
    "modelnet10": "ModelNet10", "modelnet40": "ModelNet40", "shapenet": "ShapeNetCore.v2",
    "modelnet40-points": "modelnet40_normal_resampled", "scanobjectnn": "h5_files",
    "shapenetpart": "shapenetcore_partanno_segmentation_benchmark_v0_normal",
    "s3dis": "Stanford3dDataset_v1.2_Aligned_Version", "sunrgbd": "sunrgbd",
}  # fmt: skip
WHERE = {
    "modelnet10": (volumes.MODELNET10_URL, volumes.MODELNET_LAYOUT),
    "modelnet40": (volumes.MODELNET_URL, volumes.MODELNET_LAYOUT),
    "shapenet": (volumes.SHAPENET_URL, volumes.SHAPENET_LAYOUT),
    "modelnet40-points": (clouds.MODELNET_URL, clouds.MODELNET_LAYOUT),
    "scanobjectnn": (clouds.SCANOBJECTNN_URL, clouds.SCANOBJECTNN_LAYOUT),
    "shapenetpart": (clouds.SHAPENETPART_URL, clouds.SHAPENETPART_LAYOUT),
    "s3dis": (s3dis.URL, s3dis.LAYOUT),
    "sunrgbd": (sunrgbd.URL, sunrgbd.LAYOUT),
}
TASKS: dict[str, tuple[str, ...]] = {
    "procshapes": ("voxel_cls", "point_cls", "part_seg"), "procrooms": ("scene_seg", "detection"),
    "natural2d": ("image_cls",), "modelnet10": ("voxel_cls",), "modelnet40": ("voxel_cls",), "shapenet": ("voxel_cls",),
    "modelnet40-points": ("point_cls",), "scanobjectnn": ("point_cls",), "shapenetpart": ("part_seg",),
    "s3dis": ("scene_seg",), "sunrgbd": ("detection",),
}  # fmt: skip
"""Data set -> the tasks it has labels for."""


def folder_of(config: DataConfig) -> Path:
    """Where a data set lies.

    Raises:
        UserError: it is not there: where to get it and where to put it.

    """
    folder = config.root or data_root() / FOLDERS[config.name]
    if not folder.is_dir():
        url, layout = WHERE[config.name]
        raise missing(config.name, url, f"{folder}, laid out as {layout}")
    return folder


def _source(config: DataConfig, task: Task) -> _Source:
    if task not in TASKS[config.name]:
        raise UserError(f"{config.name} has no labels for {task}: it is for {' and '.join(TASKS[config.name])}")
    if task == "part_seg" and not config.normals:
        raise UserError("--data.normals false: part segmentation takes coordinates, normals and the category")
    if config.name == "procshapes":
        return _procshapes(config, task)
    if config.name == "natural2d":
        train, test = (
            natural.crops(config.train_size, config.train_seed),
            natural.crops(config.test_size, config.test_seed),
        )
        pictures = [torch.utils.data.TensorDataset(part.images.float(), part.labels) for part in (train, test)]
        return _Source(pictures[0], pictures[0], pictures[1], train.classes, 1, labels=train.labels.tolist())
    if config.name == "procrooms" and task == "detection":
        made = [
            [rooms.sun_scene(seed + i, max(config.points, 4096), depth_view=config.depth_view) for i in range(count)]
            for seed, count in (
                (config.train_seed * 1000, config.train_size),
                (config.test_seed * 1000, config.test_size),
            )
        ]
        sets = [
            sunrgbd.SceneSet(made[0], config.points, augment=a, cuboid=config.points // 2)
            for a in (config.augment, False)
        ]
        return _Source(sets[0], sets[1], sunrgbd.SceneSet(made[1], config.points), sunrgbd.CLASSES, 3)
    if config.name == "procrooms":
        made_rooms = [
            [_room_points(seed * 1000 + i, config.depth_view) for i in range(count)]
            for seed, count in ((config.train_seed, config.train_size), (config.test_seed, config.test_size))
        ]
        return _scene_source(config, *made_rooms)
    folder = folder_of(config)
    if config.name in ("modelnet10", "modelnet40", "shapenet"):
        listing = volumes.shapenet_files if config.name == "shapenet" else volumes.modelnet_files
        (files, labels, classes), (test_files, test_labels, _) = listing(folder, "train"), listing(folder, "test")
        voxel = volumes.VoxelSet(files, labels, config.voxels)
        return _Source(
            voxel, voxel, volumes.VoxelSet(test_files, test_labels, config.voxels), classes, 1, labels=labels
        )
    if config.name == "modelnet40-points":
        (files, labels, classes), (test_files, test_labels, _) = (
            clouds.modelnet_clouds(folder, s) for s in ("train", "test")
        )
        channels = 6 if config.normals else 3
        cloud = [
            clouds.CloudSet(files, labels, config.points, channels, augment=a, dropout=True)
            for a in (config.augment, False)
        ]
        test_set = clouds.CloudSet(test_files, test_labels, config.points, channels)
        return _Source(cloud[0], cloud[1], test_set, classes, channels, labels=labels)
    if config.name == "scanobjectnn":
        (data, label), (test_data, test_label) = (
            clouds.scanobjectnn(folder, s, config.points) for s in ("train", "test")
        )
        cloud = [
            clouds.CloudSet(data, label, config.points, 3, augment=a, dropout=True) for a in (config.augment, False)
        ]
        test_set = clouds.CloudSet(test_data, test_label, config.points, 3)
        return _Source(cloud[0], cloud[1], test_set, clouds.SCANOBJECTNN_CLASSES, 3, labels=label.tolist())
    if config.name == "shapenetpart":
        (files, labels, _), (test_files, test_labels, names) = (
            clouds.shapenet_parts(folder, splits) for splits in (("train", "val"), ("test",))
        )
        common: dict[str, Any] = {"categories": len(names), "columns": 7, "delimiter": None, "resample": True}
        cloud = [clouds.CloudSet(files, labels, config.points, 6, augment=a, **common) for a in (config.augment, False)]
        test_set = clouds.CloudSet(test_files, test_labels, config.points, 6, **common)
        parts_of = tuple(f"{name} {i}" for name, members in SHAPENET_PARTS.items() for i in range(len(members)))
        return _Source(cloud[0], cloud[1], test_set, parts_of, 6 + len(names), SHAPENET_PARTS, labels=labels)
    if config.name == "s3dis":
        areas = [list(s3dis.load_rooms(folder, numbers).values()) for numbers in ((1, 2, 3, 4, 6), (5,))]
        return _scene_source(config, *areas)
    found = [folder / f"sunrgbd_pc_bbox_votes_50k_v1_{split}" for split in ("train", "val")]
    lists = [[(place, name) for name in sunrgbd.scene_names(place)] for place in found]
    sets = [sunrgbd.SceneSet(lists[0], config.points, augment=a) for a in (config.augment, False)]
    return _Source(sets[0], sets[1], sunrgbd.SceneSet(lists[1], config.points), sunrgbd.CLASSES, 3)


def _room_points(seed: int, depth_view: bool) -> np.ndarray:
    """A generated room's rows; the depth view keeps what one camera sees of four times the points, as for detection."""
    if not depth_view:
        return rooms.make_room(seed).points
    room = rooms.make_room(seed, 80_000)
    rows = room.points[rooms.visible(room, seed)]
    rows[:, :3] -= rows[:, :3].min(0)
    return rows


def _scene_source(config: DataConfig, train: Sequence[np.ndarray], test: Sequence[np.ndarray]) -> _Source:
    sets = [_Blocks(train, config.points, augment) for augment in (config.augment, False)]
    test_set = _Blocks(test, config.points, False)
    return _Source(sets[0], sets[1], test_set, s3dis.CLASSES, 9, rooms=test, groups=sets[0].which.tolist())


def _procshapes(config: DataConfig, task: Task) -> _Source:
    names = shapes.CATEGORIES
    if task == "voxel_cls":
        made = [
            shapes.voxel_set(count, seed, config.voxels, config.drop, config.noise)
            for count, seed in ((config.train_size, config.train_seed), (config.test_size, config.test_seed))
        ]
        train, test = (volumes.VoxelSet(packed, labels, config.voxels) for packed, labels in made)
        return _Source(train, train, test, names, 1, labels=made[0][1].tolist())
    channels = 6 if config.normals else 3
    rows, labels, parts = shapes.point_set(config.train_size, config.train_seed, config.points)
    test_rows, test_labels, test_parts = shapes.point_set(config.test_size, config.test_seed, config.points)
    common: dict[str, Any] = {}
    if task == "part_seg":
        channels, common = 6, {"categories": len(names)}
    cloud = [
        clouds.CloudSet(
            rows,
            labels,
            config.points,
            channels,
            parts=parts if common else None,
            augment=a,
            dropout=not common,
            **common,
        )
        for a in (config.augment, False)
    ]
    test_set = clouds.CloudSet(
        test_rows, test_labels, config.points, channels, parts=test_parts if common else None, **common
    )
    if not common:
        return _Source(cloud[0], cloud[1], test_set, names, channels, labels=labels.tolist())
    part_names = tuple(f"{name} {part}" for name, members in shapes.VALID_PARTS.items() for part in members)
    return _Source(
        cloud[0], cloud[1], test_set, part_names, channels + len(names), shapes.PARTS, labels=labels.tolist()
    )


def load_data(config: DataConfig, task: Task, batch_size: int, run: Run, seed: int | None = None) -> Data:
    """The data set of a recipe.

    Raises:
        UserError: it is not there, cannot be read, has no labels for the task, or is too small for a batch.

    """
    source = _source(config, task)
    train, plain = source.train, source.plain
    labels = list(source.labels)
    if config.portion < 1 and not labels:
        raise UserError(f"--data.portion keeps a share of each category, and the samples of {config.name} have none")
    if config.portion < 1:
        kept = clouds.portion(labels, config.portion, config.train_seed)
        train, plain, labels = Subset(train, kept), Subset(plain, kept), [labels[i] for i in kept]
    selection: Dataset[Any] | None = source.test if config.select == "test" else None
    if config.select == "heldout":
        held, kept = held_out(source.groups or range(_size(train)), config.train_seed)
        selection, train = Subset(plain, held), Subset(train, kept)
        labels = [labels[i] for i in kept] if labels else labels
    seed = run.options.seed if seed is None else seed
    in_files = config.name in FOLDERS
    workers = config.workers if in_files else 0

    def batches(dataset: Dataset[Any], purpose: str, *, training: bool) -> StreamedBatches:
        count = _size(dataset)
        checked = dataset if task == "detection" else _Checked(dataset, len(source.classes), config.name)
        whole = task == "detection" and not training  # average precision is no sum over processes
        world = 1 if whole else run.world
        size = (
            min(batch_size, count // run.world * run.world) if training else evaluation_batch(count, batch_size, world)
        )
        if size < 1:
            raise UserError(f"{config.name} has {count} samples: fewer than the {run.world} processes")
        return StreamedBatches(
            checked,
            size,
            seed=derived_seed(seed, purpose),
            shuffle=training,
            drop_last=training,
            rank=0 if whole else run.rank,
            world=world,
            device=run.device,
            workers=workers,
        )

    return Data(
        train=batches(train, "train", training=True),
        selection=None if selection is None else batches(selection, "selection", training=False),
        test=batches(source.test, "test", training=False),
        classes=source.classes,
        inputs=source.inputs,
        parts=source.parts,
        rooms=source.rooms,
        train_labels=labels,
    )


def held_out(groups: Iterable[int], seed: int) -> tuple[list[int], list[int]]:
    """The samples of a random tenth of the groups, at least one, and all the others.

    Args:
        groups: each sample's; samples of one group are not independent, such as blocks of a room.
        seed: of the choice.

    Raises:
        UserError: there are fewer than two groups.

    """
    members = collections.defaultdict(list)
    for sample, group in enumerate(groups):
        members[group].append(sample)
    if len(members) < 2:
        raise UserError("--data.select heldout needs two or more training samples, or rooms")
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist()
    samples, cut = list(members.values()), max(1, len(order) // 10)
    held, kept = ([sample for i in part for sample in samples[i]] for part in (order[:cut], order[cut:]))
    return held, kept


def evaluation_batch(count: int, wanted: int, world: int) -> int:
    """A multiple of the processes, at most ``wanted`` if possible, that leaves no last batch of fewer samples than they are.

    Raises:
        UserError: there are fewer samples than processes.

    """
    if count < world:
        raise UserError(f"{count} samples cannot be shared among {world} processes")
    for size in range(max(world, min(wanted, count) // world * world), 0, -world):
        if count % size == 0 or count % size >= world:
            return size
    return -(-count // world) * world


def _size(dataset: Dataset[Any]) -> int:
    return len(dataset)  # type: ignore[arg-type]
