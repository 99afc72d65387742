"""S3DIS, the Aligned Version 1.2 (section 5): rooms out of their annotations, training blocks, the whole-scene grid."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from numpy.random import RandomState

from tenfold_shared.checkpoint import atomic_write
from tenfold_shared.errors import RunFailure, UserError

CLASSES = (
    "ceiling", "floor", "wall", "beam", "column", "window", "door", "table", "chair", "sofa", "bookcase", "board", "clutter",
)  # fmt: skip
URL = "http://buildingparser.stanford.edu/dataset.html"
LAYOUT = "Area_{1..6}/<room>/Annotations/*.txt (Stanford3dDataset_v1.2_Aligned_Version)"
Room = Float[ndarray, "n 7"]
"""Rows x, y, z, r, g, b (0-255), label; the smallest coordinates are 0."""


def read_room(folder: Path) -> Room:
    """Merge a room's ``Annotations/*.txt``; unknown names such as stairs are clutter; bytes that are no text are dropped
    (Area_5/hallway_6 has one).

    Raises:
        UserError: no annotations, or a row that has not six numbers; the file is named.

    """
    files = sorted((folder / "Annotations").glob("*.txt"))
    if not files:
        raise UserError(f"no annotations in {folder / 'Annotations'}")
    parts = []
    for file in files:
        name = file.stem.split("_")[0]
        label = CLASSES.index(name) if name in CLASSES else CLASSES.index("clutter")
        text = re.sub(rb"[^\d.eE+\-\s]", b" ", file.read_bytes())
        try:
            rows = np.array(text.split(), dtype=np.float32).reshape(-1, 6)
        except ValueError as error:
            raise UserError(f"{file} is no table of x y z r g b: {error}") from error
        lines = sum(1 for line in text.split(b"\n") if line.strip())
        if len(rows) != lines:
            raise UserError(f"{file} is no table of x y z r g b: {6 * len(rows)} numbers in {lines} lines")
        parts.append(np.hstack([rows, np.full((len(rows), 1), label, np.float32)]))
    room = np.concatenate(parts)
    room[:, :3] -= room[:, :3].min(0)
    return room


def load_rooms(root: Path, areas: Sequence[int]) -> dict[str, Room]:
    """Rooms of some areas by name; a room once merged is kept beside its annotations as ``room.npy``, if that folder may
    be written to.

    Raises:
        UserError: an area has no rooms, or a kept room is no longer whole.

    """
    rooms = {}
    for area in areas:
        folders = sorted(f.parent for f in (root / f"Area_{area}").glob("*/Annotations"))
        if not folders:
            raise UserError(f"{root} has no rooms of Area_{area}: expected {LAYOUT} from {URL}")
        for folder in folders:
            kept = folder / "room.npy"
            if kept.exists():
                room = _kept_room(kept)
            else:
                room = read_room(folder)
                with contextlib.suppress(RunFailure, UserError), atomic_write(kept) as file:
                    np.save(file, room)
            rooms[f"Area_{area}/{folder.name}"] = room
    return rooms


def _kept_room(file: Path) -> Room:
    try:
        room = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file} is truncated or corrupted ({error}): delete it, it is made anew") from error
    if room.ndim != 2 or room.shape[1] != 7:
        raise UserError(f"{file} has shape {list(room.shape)}, expected rows of 7: delete it, it is made anew")
    return room


def label_weights(rooms: Sequence[Room]) -> Float[ndarray, " k"]:
    """(max f / f)^(1/3) of the classes' frequencies f; a class that never occurs has the weight of one point."""
    counts = np.bincount(np.concatenate([room[:, 6] for room in rooms]).astype(int), minlength=len(CLASSES))
    frequency = np.maximum(counts, 1).astype(np.float32) / counts.sum()
    return np.power(frequency.max() / frequency, 1 / 3.0).astype(np.float32)


def training_rooms(rooms: Sequence[Room], points: int, share: float = 1.0) -> Int[ndarray, " m"]:
    """Which room each training sample of an epoch comes from: rooms in proportion to their points."""
    sizes = np.array([len(room) for room in rooms])
    samples = int(sizes.sum() * share / points)
    return np.concatenate([np.full(round(size / sizes.sum() * samples), i) for i, size in enumerate(sizes)])


def block_features(
    room: Room, selected: Int[ndarray, " m"], centre: Float[ndarray, " 3"], top: Float[ndarray, " 3"]
) -> Float[ndarray, "m 9"]:
    """Channels x - cx, y - cy, z (not centred), rgb / 255, xyz / room maximum."""
    rows = room[selected]
    features = np.zeros((len(rows), 9))
    features[:, :3] = rows[:, :3]
    features[:, :2] -= centre[:2]
    features[:, 3:6] = rows[:, 3:6] / 255.0
    features[:, 6:] = rows[:, :3] / np.maximum(top, np.finfo(np.float32).tiny)
    return features


def training_block(
    room: Room, rng: RandomState, points: int = 4096, block: float = 1.0, least: int = 1024, tries: int = 100
) -> tuple[Float[ndarray, "m 9"], Int[ndarray, " m"]]:
    """A column of ``block`` metres around a random point, and its labels.

    Drawn again until it has more than ``least`` points, at most ``tries`` times, then the densest seen is taken (on a
    sparse room the released loop never ends). Sampled without replacement if there are enough.
    """
    best, best_centre = np.zeros(0, int), np.zeros(3)
    for _ in range(tries):
        centre = room[rng.choice(len(room)), :3]
        inside = np.flatnonzero((np.abs(room[:, :2] - centre[:2]) <= block / 2).all(1))
        if len(inside) > len(best):
            best, best_centre = inside, centre
        if len(inside) > least:
            break
    selected = rng.choice(best, points, replace=len(best) < points)
    return block_features(room, selected, best_centre, room[:, :3].max(0)), room[selected, 6].astype(int)


class SceneGrid(NamedTuple):
    """All blocks of a room: features, labels, label weights, and which point of the room each row is."""

    features: Float[ndarray, "blocks m 9"]
    labels: Int[ndarray, "blocks m"]
    weights: Float[ndarray, "blocks m"]
    rows: Int[ndarray, "blocks m"]


def whole_scene(
    room: Room,
    rng: RandomState,
    points: int = 4096,
    block: float = 1.0,
    stride: float = 0.5,
    padding: float = 0.001,
    weights: Float[ndarray, " k"] | None = None,
) -> SceneGrid:
    """Blocks of ``points`` rows that together cover every point of the room.

    The last block of each row and column is moved to end at the room's largest coordinate; each is shuffled and filled
    up to a multiple of ``points`` by resampling.
    """
    xyz, labels = room[:, :3], room[:, 6].astype(int)
    low, high = xyz.min(0), xyz.max(0)
    steps = np.ceil((high - low - block).clip(min=0) / stride).astype(int) + 1
    order = []
    features = []
    for iy in range(steps[1]):
        for ix in range(steps[0]):
            stop = np.minimum(low[:2] + np.array([ix, iy]) * stride + block, high[:2])
            start = stop - block
            inside = np.flatnonzero(((xyz[:, :2] >= start - padding) & (xyz[:, :2] <= stop + padding)).all(1))
            if not len(inside):
                continue
            missing = -len(inside) % points
            extra = rng.choice(inside, missing, replace=missing > len(inside))
            index = np.concatenate([inside, extra])
            rng.shuffle(index)
            features.append(block_features(room, index, np.array([*(start + block / 2), 0.0]), high))
            order.append(index)
    index = np.concatenate(order).reshape(-1, points)
    of_class = np.ones(len(CLASSES), np.float32) if weights is None else weights
    return SceneGrid(np.concatenate(features).reshape(-1, points, 9), labels[index], of_class[labels[index]], index)
