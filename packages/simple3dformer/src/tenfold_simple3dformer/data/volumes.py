"""Voxel data sets: ModelNet10/40 meshes, voxelised once, and ShapeNetCore v2 binvox files (section 5)."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from numpy import ndarray
from torch import Tensor
from torch.utils.data import Dataset

from tenfold_shared.checkpoint import atomic_write
from tenfold_shared.errors import RunFailure, UserError
from tenfold_simple3dformer.data.binvox import Binvox, binvox_bytes, read_binvox
from tenfold_simple3dformer.geometry import read_geometry, voxelise

MODELNET10_URL = "http://3dvision.princeton.edu/projects/2014/3DShapeNets/ModelNet10.zip"
MODELNET_URL = "https://modelnet.cs.princeton.edu/ModelNet40.zip"
MODELNET_LAYOUT = "<class>/{train,test}/<class>_NNNN.off (or .binvox)"
SHAPENET_URL = "https://shapenet.org (account needed): ShapeNetCore.v2.zip"
SHAPENET_LAYOUT = "ShapeNetCore.v2/<synset>/<id>/models/model_normalized.solid.binvox"
SHAPENET_SEED = 9


def modelnet_files(root: Path, split: str) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Meshes or grids of a split, sorted, their labels and the classes' names.

    Raises:
        UserError: there is none.

    """
    folders = root.iterdir() if root.is_dir() else ()
    # Both splits count: a class that lacks one must not move the labels of those after it.
    classes = tuple(sorted(f.name for f in folders if (f / "train").is_dir() or (f / "test").is_dir()))
    files, labels = [], []
    for label, name in enumerate(classes):
        if not (root / name / split).is_dir():
            continue
        stems = {f.with_suffix("") for f in (root / name / split).iterdir() if f.suffix in (".off", ".binvox")}
        for stem in sorted(stems):
            ready = stem.with_suffix(".binvox")
            files.append(ready if ready.exists() else stem.with_suffix(".off"))
            labels.append(label)
    if not files:
        raise UserError(f"no mesh in {root} for {split}: expected {MODELNET_LAYOUT}")
    return files, labels, classes


def modelnet_grid(file: Path, side: int) -> UInt8[ndarray, "v v v"]:
    """A grid, read or voxelised (in the frame of ``binvox -cb -pb -e``) and kept beside the mesh as ``.binvox``.

    Raises:
        UserError: the grid that is there has another side.

    """
    if file.suffix == ".binvox":
        grid = read_binvox(file).grid
    else:
        grid = voxelise(read_geometry(file), side)
        # Whole or not at all: several processes may make it at once. Where the folder may not be written to, it is not kept.
        with contextlib.suppress(RunFailure, UserError), atomic_write(file.with_suffix(".binvox")) as kept:
            kept.write(binvox_bytes(Binvox(grid)))
    if len(grid) != side:
        raise UserError(f"{file} has {len(grid)} voxels a side, expected {side}: set --data.voxels or delete the file")
    return grid


def shapenet_files(root: Path, split: str) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Grids of the random 80/20 split (generator seed 9 over the sorted files), labels by ascending synset.

    Raises:
        UserError: there is none.

    """
    found = sorted(root.glob("*/*/models/model_normalized.solid.binvox"))
    if not found:
        raise UserError(f"no grid in {root}: expected {SHAPENET_LAYOUT} from {SHAPENET_URL}")
    classes = tuple(sorted({file.parents[2].name for file in found}))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(SHAPENET_SEED)).tolist()
    cut = int(0.8 * len(found))
    chosen = sorted(order[:cut] if split == "train" else order[cut:])
    return [found[i] for i in chosen], [classes.index(found[i].parents[2].name) for i in chosen], classes


class VoxelSet(Dataset[tuple[Tensor, Tensor]]):
    """Grids as float (V, V, V) with labels; from packed bits, or from files read one at a time."""

    def __init__(
        self, source: UInt8[ndarray, "n bytes"] | Sequence[Path], labels: Int[ndarray, " n"] | Sequence[int], side: int
    ):
        self.source, self.labels, self.side = source, torch.as_tensor(np.asarray(labels)).long(), side

    def __len__(self) -> int:
        """Grids."""
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """A grid and its label."""
        item = self.source[index]
        if isinstance(item, Path):
            grid = modelnet_grid(item, self.side)
        else:
            grid = np.unpackbits(item, count=self.side**3).reshape((self.side,) * 3)
        return torch.from_numpy(grid).float(), self.labels[index]
