"""Point data sets (section 5): ModelNet40 resampled, ScanObjectNN, ShapeNetPart, and generated clouds."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from numpy.random import RandomState
from torch import Tensor
from torch.utils.data import Dataset

from tenfold_shared.errors import UserError
from tenfold_simple3dformer.augment import augment_cloud
from tenfold_simple3dformer.metrics import SHAPENET_PARTS

MODELNET_URL = "https://shapenet.cs.stanford.edu/media/modelnet40_normal_resampled.zip"
MODELNET_LAYOUT = (
    "modelnet40_normal_resampled/{modelnet40_shape_names.txt,modelnet40_{train,test}.txt,<class>/<class>_NNNN.txt}"
)
SCANOBJECTNN_URL = (
    "http://103.24.77.34/scanobjectnn/h5_files.zip (the form at https://hkust-vgd.github.io/scanobjectnn)"
)
SCANOBJECTNN_LAYOUT = "h5_files/main_split/{training,test}_objectdataset_augmentedrot_scale75.h5"
SHAPENETPART_URL = "https://shapenet.cs.stanford.edu/media/shapenetcore_partanno_segmentation_benchmark_v0_normal.zip"
SHAPENETPART_LAYOUT = "shapenetcore_partanno_segmentation_benchmark_v0_normal/{synsetoffset2category.txt,train_test_split/*.json,<synset>/*.txt}"
SCANOBJECTNN_CLASSES = (
    "bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed", "pillow", "sink", "sofa",
    "toilet",
)  # fmt: skip


def read_rows(file: Path, columns: int, delimiter: str | None) -> Float[ndarray, "n c"]:
    """A text table of numbers.

    Raises:
        UserError: missing, truncated, not finite, or of other columns; the file is named.

    """
    try:
        rows = np.loadtxt(file, dtype=np.float32, delimiter=delimiter, ndmin=2)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if rows.shape[1] != columns or not len(rows):
        raise UserError(f"{file} has {rows.shape[1] if len(rows) else 0} columns, expected {columns}")
    if not np.isfinite(rows).all():
        raise UserError(f"{file} has a value that is not finite in row {int((~np.isfinite(rows)).any(1).argmax())}")
    return rows


def unit_sphere(xyz: Float[ndarray, "n 3"]) -> Float[ndarray, "n 3"]:
    """Centred on the mean, divided by the largest radius (1 for a cloud of one place)."""
    centred = xyz - xyz.mean(0)
    return centred / (np.linalg.norm(centred, axis=1).max() or 1.0)


class CloudSet(Dataset[tuple[Tensor, Tensor]]):
    """Clouds with a label each, or with a part label for every point.

    Args:
        source: arrays (n, points, channels), or files that ``read`` turns into (rows, point labels or None).
        labels: of the clouds.
        points: to take from each.
        channels: to keep, coordinates first.
        parts: labels of the points (n, points), for segmentation of arrays.
        categories: append the one-hot category of that many to every point, for segmentation.
        augment: the released augmentation; ``dropout`` with random point dropout.
        resample: draw the points with replacement (ShapeNetPart; with a fixed seed where not augmented), else the first.

    """

    def __init__(
        self,
        source: Float[ndarray, "n p c"] | Sequence[Path],
        labels: Int[ndarray, " n"] | Sequence[int],
        points: int,
        channels: int,
        *,
        parts: Int[ndarray, "n p"] | None = None,
        categories: int = 0,
        columns: int = 6,
        delimiter: str | None = ",",
        augment: bool = False,
        dropout: bool = False,
        resample: bool = False,
    ):
        self.source, self.labels = source, np.asarray(labels, dtype=np.int64)
        self.points, self.channels, self.parts, self.categories = points, channels, parts, categories
        self.columns, self.delimiter = columns, delimiter
        self.augment, self.dropout, self.resample = augment, dropout, resample

    def __len__(self) -> int:
        """Clouds."""
        return len(self.source)

    def rows(self, index: int) -> tuple[Float[ndarray, "n c"], Int[ndarray, " n"] | None]:
        """Normalised rows of a cloud, and its part labels."""
        item = self.source[index]
        if not isinstance(item, Path):
            return item[:, : self.channels].copy(), None if self.parts is None else self.parts[index]
        table = read_rows(item, self.columns, self.delimiter)
        part = table[:, -1].astype(np.int64) if self.categories else None
        table = table if self.resample else table[: self.points]
        part = part if part is None or self.resample else part[: self.points]
        table[:, :3] = unit_sphere(table[:, :3])
        return table[:, : self.channels], part

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(points, channels) and a label or labels; random numbers come from torch's generator."""
        cloud, part = self.rows(index)
        rng = RandomState(int(torch.randint(2**31, ())) if self.augment else index)
        if self.resample or len(cloud) < self.points:
            chosen = rng.choice(len(cloud), self.points, replace=True)
        else:
            chosen = np.arange(self.points)
        cloud = cloud[chosen]
        if self.augment:
            cloud = augment_cloud(cloud, rng, dropout=self.dropout)
        if self.categories:
            hot = np.zeros((self.points, self.categories), np.float32)
            hot[:, self.labels[index]] = 1
            cloud = np.concatenate([cloud, hot], 1)
        target = torch.tensor(self.labels[index]) if part is None else torch.from_numpy(part[chosen].astype(np.int64))
        return torch.from_numpy(np.ascontiguousarray(cloud, np.float32)), target


def modelnet_clouds(root: Path, split: str) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Files of a split, their labels, the classes' names.

    Raises:
        UserError: a list is missing, or names a class that is not in the list of names.

    """
    try:
        names = (root / "modelnet40_shape_names.txt").read_text(encoding="utf-8").split()
        stems = (root / f"modelnet40_{split}.txt").read_text(encoding="utf-8").split()
    except OSError as error:
        raise UserError(f"no lists in {root}: expected {MODELNET_LAYOUT} from {MODELNET_URL}") from error
    classes = [stem.rpartition("_")[0] for stem in stems]
    unknown = sorted(set(classes) - set(names))
    if unknown:
        raise UserError(f"{root}/modelnet40_{split}.txt names {unknown[0]}, which modelnet40_shape_names.txt lacks")
    files = [root / name / f"{stem}.txt" for name, stem in zip(classes, stems, strict=True)]
    return files, [names.index(name) for name in classes], tuple(names)


def scanobjectnn(
    root: Path, split: str, points: int, seed: int = 0
) -> tuple[Float[ndarray, "n p 3"], Int[ndarray, " n"]]:
    """PB_T50_RS clouds on the unit sphere and their labels; ``points`` of each, chosen anew for each cloud.

    Raises:
        UserError: the file is missing, truncated, or has a label outside of the 15 classes.

    """
    import h5py  # noqa: PLC0415

    file = root / "main_split" / f"{'training' if split == 'train' else 'test'}_objectdataset_augmentedrot_scale75.h5"
    try:
        with h5py.File(file, "r") as content:
            data, label = content["data"][:], content["label"][:].astype(np.int64).reshape(-1)
    except FileNotFoundError as error:
        raise UserError(f"no {file}: expected {SCANOBJECTNN_LAYOUT} from {SCANOBJECTNN_URL}") from error
    except (OSError, KeyError) as error:
        raise UserError(f"{file} is truncated or corrupted: {error}") from error
    if data.ndim != 3 or data.shape[2] != 3 or len(data) != len(label) or not np.isfinite(data).all():
        raise UserError(
            f"{file} has {len(label)} labels for coordinates of shape {list(data.shape)}, or some not finite"
        )
    if len(label) and not 0 <= label.min() <= label.max() < len(SCANOBJECTNN_CLASSES):
        raise UserError(
            f"{file} has labels {label.min()}..{label.max()}: there are {len(SCANOBJECTNN_CLASSES)} classes"
        )
    rng = RandomState(seed)
    chosen = np.stack([rng.permutation(data.shape[1])[:points] for _ in range(len(data))])
    clouds = np.take_along_axis(data, chosen[:, :, None], 1).astype(np.float32)
    return np.stack([unit_sphere(cloud) for cloud in clouds]), label


def shapenet_parts(root: Path, splits: Sequence[str]) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Files of some of ``train``, ``val``, ``test``, their categories, the categories' names.

    Raises:
        UserError: a list is missing.

    """
    names = tuple(SHAPENET_PARTS)
    try:
        lines = (root / "synsetoffset2category.txt").read_text(encoding="utf-8").splitlines()
        category = {synset: name for name, synset in (line.split() for line in lines if line.strip())}
        listed = [
            entry
            for split in splits
            for entry in json.loads(
                (root / "train_test_split" / f"shuffled_{split}_file_list.json").read_text(encoding="utf-8")
            )
        ]
        paired = [entry.split("/")[-2:] for entry in listed]
        labels = [names.index(category[synset]) for synset, _ in paired]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"no lists in {root} ({error}): expected {SHAPENETPART_LAYOUT} from {SHAPENETPART_URL}"
        ) from error
    return [root / synset / f"{name}.txt" for synset, name in paired], labels, names


def portion(labels: Sequence[int], share: float, seed: int) -> list[int]:
    """Indices of that share of each category, at least one each, chosen at random: the few-label study."""
    rng, kept = RandomState(seed), []
    for label in sorted(set(labels)):
        members = np.flatnonzero(np.asarray(labels) == label)
        kept += rng.permutation(members)[: max(1, round(share * len(members)))].tolist()
    return sorted(kept)
