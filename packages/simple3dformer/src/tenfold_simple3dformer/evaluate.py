"""What a network is worth (section 9), and `eval`: metrics of a checkpoint, ours or of the authors' layout."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tenfold_shared.batches import Batches, StreamedBatches
from tenfold_shared.checkpoint import load_weights
from tenfold_shared.cli import as_trained
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions
from tenfold_simple3dformer import metrics, natural
from tenfold_simple3dformer.baselines import PointTransformer, VoxNet
from tenfold_simple3dformer.compat import load_official_checkpoint
from tenfold_simple3dformer.data import s3dis
from tenfold_simple3dformer.data.sets import Data, DataConfig, Name, Task, load_data
from tenfold_simple3dformer.data.sunrgbd import boxes_of
from tenfold_simple3dformer.detection.average_precision import (
    Detections,
    evaluate_detections,
    mean_average_precision,
    select,
)
from tenfold_simple3dformer.models import ModelConfig, build_model, parameters
from tenfold_simple3dformer.point import PointFormer
from tenfold_simple3dformer.tokenizers import ReleasedTokenizer, TokenizerName

PRIMARY: dict[str, str] = {
    "voxel_cls": "overall accuracy", "point_cls": "overall accuracy", "part_seg": "instance mIoU", "scene_seg": "mIoU",
    "detection": "AP25", "image_cls": "overall accuracy",
}  # fmt: skip
"""Task -> the metric that comes first."""


def evaluate_model(
    model: nn.Module,
    batches: Batches | StreamedBatches,
    data: Data,
    task: Task,
    run: Run,
    *,
    whole_scenes: bool | None = None,
) -> dict[str, float]:
    """Metrics in per cent over all processes, every sample counted once.

    Scenes are evaluated whole where the batches are the test set's: all points of every room, votes summed.
    """
    training = model.training
    model.eval()
    whole = batches is data.test if whole_scenes is None else whole_scenes
    with torch.inference_mode():
        if task == "detection":
            found = _detection(model, batches, data)
        elif task == "part_seg":
            found = _parts(model, batches, data, run)
        elif task == "scene_seg":
            found = _scenes(model, batches, data, run, whole)
        else:
            found = _classification(model, batches, data, task, run)
    model.train(training)
    return {name: 100 * value for name, value in found.items()}


def _logits(model: nn.Module, batches: Batches | StreamedBatches, task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    for inputs, target in batches.epoch(0):
        if len(target):
            if task == "image_cls":
                logits = model(natural.standardised(inputs))
            else:
                logits = model(inputs[:, None] if task == "voxel_cls" else inputs)
            yield logits.float(), target


def _classification(model: nn.Module, batches: Any, data: Data, task: Task, run: Run) -> dict[str, float]:
    classes = len(data.classes)
    matrix = torch.zeros(classes, classes, dtype=torch.long, device=run.device)
    for logits, target in _logits(model, batches, task):
        matrix += metrics.confusion(logits.argmax(1), target, classes)
    matrix = run.reduce(matrix)
    return {
        "overall accuracy": metrics.overall_accuracy(matrix),
        "mean class accuracy": metrics.mean_class_accuracy(matrix),
    }


def _parts(model: nn.Module, batches: Any, data: Data, run: Run) -> dict[str, float]:
    members = list(data.parts.values())
    classes = len(data.classes)
    matrix = torch.zeros(classes, classes, dtype=torch.long, device=run.device)
    total, count = (torch.zeros(len(members), dtype=torch.float64, device=run.device) for _ in range(2))
    for logits, target in _logits(model, batches, "part_seg"):
        categories = metrics.categories_of(target, members)
        predicted = metrics.restricted_argmax(logits, categories, members)
        matrix += metrics.confusion(predicted, target, classes)
        total.index_add_(0, categories, metrics.shape_ious(predicted, target, categories, members))
        count += torch.bincount(categories, minlength=len(members))
    matrix, total, count = run.reduce(matrix), run.reduce(total), run.reduce(count)
    present = count > 0
    by_category = (total / count)[present]
    return {
        "instance mIoU": float(total.sum() / count.sum()),
        "class mIoU": float(by_category.mean()),
        "accuracy": metrics.overall_accuracy(matrix),
        "class accuracy": metrics.mean_class_accuracy(matrix),
    }


def _scenes(model: nn.Module, batches: Any, data: Data, run: Run, whole: bool) -> dict[str, float]:
    classes = len(data.classes)
    matrix = torch.zeros(classes, classes, dtype=torch.long, device=run.device)
    if whole:
        points = next(iter(batches.epoch(0)))[0].shape[1]
        for number, room in enumerate(data.rooms):
            if number % run.world == run.rank:
                votes = scene_votes(model, room, points, classes, run.device, seed=number)
                target = torch.from_numpy(room[:, 6].astype(np.int64)).to(run.device)
                matrix += metrics.confusion(votes.argmax(1), target, classes)
    else:
        for logits, target in _logits(model, batches, "scene_seg"):
            matrix += metrics.confusion(logits.argmax(-1), target, classes)
    matrix = run.reduce(matrix)
    return {
        "mIoU": metrics.mean_iou(matrix),
        "overall accuracy": metrics.overall_accuracy(matrix),
        "mean class accuracy": metrics.mean_class_accuracy(matrix),
    }


@torch.inference_mode()
def scene_votes(
    model: nn.Module,
    room: np.ndarray,
    points: int,
    classes: int,
    device: torch.device,
    *,
    seed: int = 0,
    batch: int = 8,
) -> Float[Tensor, "n k"]:
    """Sum over the blocks of the whole-scene grid of the logits of every point of a room."""
    grid = s3dis.whole_scene(room, np.random.RandomState(seed), points)
    votes = torch.zeros(len(room), classes, device=device)
    for start in range(0, len(grid.features), batch):
        features = torch.from_numpy(grid.features[start : start + batch]).float().to(device)
        index = torch.from_numpy(grid.rows[start : start + batch]).long().to(device)
        votes.index_add_(0, index.flatten(), model(features).float().flatten(0, 1))
    return votes


def _detection(model: nn.Module, batches: Any, data: Data) -> dict[str, float]:
    predicted: list[Detections] = []
    true: list[Detections] = []
    scene = 0
    for clouds, rows in batches.epoch(0):
        found = select(model(clouds)[-1], list(clouds), first_scene=scene)
        predicted.append(Detections(*(part.cpu() for part in found)))
        truth = boxes_of(rows)
        where = truth.present.nonzero()[:, 0].cpu() + scene
        here = truth.present
        label, centre, size, angle = (p[here].cpu() for p in (truth.label, truth.centre, truth.size, truth.angle))
        true.append(Detections(where, label, centre, size, angle, torch.ones(len(where))))
        scene += len(clouds)
    merged = [Detections(*(torch.cat(parts) for parts in zip(*group, strict=True))) for group in (predicted, true)]
    results = evaluate_detections(merged[0], merged[1])
    return {f"AP{round(100 * t)}": mean_average_precision(found) for t, found in results.items()}


@dataclasses.dataclass
class EvalData:
    """What is to differ from the data that a checkpoint was trained on; None: nothing."""

    name: Name | None = None
    """The data set; default: the one of the training, or procshapes for an authors' file."""
    root: Path | None = None
    """Its folder; default: as trained for the same data set, or its published name in the data root."""
    voxels: int | None = None
    """Side of the grid."""
    points: int | None = None
    """Points of a cloud, of a scene's block, or of a scene to detect in."""
    normals: bool | None = None
    """Use normals where the data has them."""
    train_size: int | None = None
    """Generated training samples."""
    test_size: int | None = None
    """Generated test samples."""
    train_seed: int | None = None
    """Seed of the generated training samples."""
    test_seed: int | None = None
    """Seed of the generated test samples."""
    drop: float | None = None
    """Share of the occupied voxels of generated shapes that is deleted."""
    noise: float | None = None
    """Share of all voxels of generated shapes that is occupied at random."""
    depth_view: bool | None = None
    """Generated scenes: only what one camera sees."""
    workers: int | None = None
    """Processes that read files."""


@dataclasses.dataclass
class EvalConfig:
    """What to evaluate."""

    checkpoint: Path
    """A run's folder, a .safetensors file of ours, or a file of the authors' layout."""
    data: EvalData = dataclasses.field(default_factory=EvalData)
    """The data; for a checkpoint of ours, whatever is not given is as it was trained."""
    batch_size: int = 64
    """Samples at a time."""
    heads: int = 0
    """Attention heads of an authors' file; 0: 3 for tiny and base, 6 for small, as released."""
    task: Literal["auto", "cls", "seg"] = "auto"
    """Task of an authors' point file, where its keys do not tell."""
    tokenizer: Literal["", TokenizerName, ReleasedTokenizer] = ""
    """Tokenizer of an authors' voxel file, where two fit; the released names are taken, too."""


def weights_file(checkpoint: Path) -> Path:
    """The weights of a run's folder, or the file itself."""
    return checkpoint / "checkpoints" / "last.safetensors" if checkpoint.is_dir() else checkpoint


def load_model(checkpoint: Path, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a checkpoint, and what the checkpoint says about itself (task, classes, sizes).

    Raises:
        UserError: unreadable, or of no known network; the keys that do not fit are named.

    """
    path = weights_file(checkpoint)
    about: dict[str, Any]
    if path.suffix == ".safetensors":
        state, about = load_weights(path)
        if "task" in about and "network" in about:
            config = ModelConfig(**about["network"])
            model = build_model(config, about["task"], len(about["classes"]), about["inputs"], about["voxels"])
            try:
                model.load_state_dict(state)
            except RuntimeError as error:
                raise UserError(
                    f"{path} does not fit its own description: {' '.join(str(error).split())[:300]}"
                ) from error
            return model, about
    model = load_official_checkpoint(path, **options)
    about = {"task": "voxel_cls", "voxels": getattr(model, "voxels", 32), "inputs": 1, "parts": {}}
    if isinstance(model, PointFormer | PointTransformer):
        about["inputs"] = model.inputs
        about["task"] = "point_cls" if model.task == "cls" else "part_seg"
        if model.task == "seg" and model.classes == len(s3dis.CLASSES):
            about["task"] = "scene_seg"
        if about["task"] == "part_seg" and model.classes == sum(map(len, metrics.SHAPENET_PARTS.values())):
            about["parts"] = metrics.SHAPENET_PARTS
    return model, about


def evaluate(config: EvalConfig, options: RunOptions) -> None:
    """Print the metrics of a checkpoint as one JSON line."""
    official: dict[str, Any] = {"heads": config.heads, "tokenizer": config.tokenizer}
    if config.task != "auto":
        official["task"] = config.task
    model, about = load_model(config.checkpoint, **official)
    data_config = as_trained(DataConfig, about.get("data", {}), config.data)
    with Run.evaluation("simple3dformer", options) as run:
        data = load_data(data_config, about["task"], config.batch_size, run)
        check_fit(model, data, about, data_config)
        model = run.prepare(model)
        found = evaluate_model(model, data.test, data, about["task"], run)
        shown = {"task": about["task"], "data": data_config.name, **found, "parameters": parameters(model)}
        if run.is_main:
            print(json.dumps(shown))


def check_fit(model: nn.Module, data: Data, about: dict[str, Any], config: DataConfig) -> None:
    """Refuse a network for other classes, channels or grids than the data's.

    Raises:
        UserError: naming both.

    """
    classes = len(about["classes"]) if "classes" in about else getattr(model, "classes", len(data.classes))
    if classes != len(data.classes):
        raise UserError(
            f"the network has {classes} classes and {config.name} {len(data.classes)}: choose another --data.name"
        )
    if about["task"] == "voxel_cls" and not isinstance(model, VoxNet) and about["voxels"] != config.voxels:
        raise UserError(
            f"the network takes grids of {about['voxels']} voxels a side: add --data.voxels {about['voxels']}"
        )
    if about["task"] in ("point_cls", "part_seg", "scene_seg") and about["inputs"] != data.inputs:
        raise UserError(
            f"the network takes {about['inputs']} channels a point and {config.name} has {data.inputs}: see --data.normals"
        )
