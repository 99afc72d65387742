"""Boxes out of predictions, and their average precision (section 9)."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tenfold_simple3dformer.detection.boxes import box_corners, box_iou
from tenfold_simple3dformer.detection.criterion import Prediction


class Detections(NamedTuple):
    """Boxes of scenes: full sizes, z-up centres. ``score`` of ground truth is ignored."""

    scene: Int[Tensor, " n"]
    label: Int[Tensor, " n"]
    centre: Float[Tensor, "n 3"]
    size: Float[Tensor, "n 3"]
    angle: Float[Tensor, " n"]
    score: Float[Tensor, " n"]

    @property
    def corners(self) -> Float[Tensor, "n 8 3"]:
        """Corners in the camera frame."""
        return box_corners(self.centre, self.size, self.angle)


def average_precision(precision: Float[Tensor, " n"], recall: Float[Tensor, " n"]) -> float:
    """All-point VOC: the area under the precision made non-increasing from the right."""
    if not len(precision):
        return 0.0
    recall = torch.cat([recall.new_zeros(1), recall, recall.new_ones(1)])
    precision = torch.cat([precision, precision.new_zeros(1)]).flip(0).cummax(0).values.flip(0)
    return float(((recall[1:] - recall[:-1]) * precision).sum())


def evaluate_detections(
    predicted: Detections, truth: Detections, thresholds: Sequence[float] = (0.25, 0.5)
) -> dict[float, dict[int, tuple[float, float]]]:
    """Threshold -> class -> (average precision, recall), over the classes that occur in the truth.

    In order of decreasing score, a box is right when its best-overlapping true box of the scene and class overlaps by
    more than the threshold and has not been found before. A class never predicted has 0.
    """
    results: dict[float, dict[int, tuple[float, float]]] = {t: {} for t in thresholds}
    for label in truth.label.unique().tolist():
        true, found = (truth.label == label).nonzero()[:, 0], (predicted.label == label).nonzero()[:, 0]
        found = found[predicted.score[found].argsort(descending=True, stable=True)]
        best, overlap = _best(predicted, truth, found, true)
        for threshold in thresholds:
            taken: set[int] = set()
            right = torch.zeros(len(found), dtype=torch.float64)
            for i, (box, iou) in enumerate(zip(best.tolist(), overlap.tolist(), strict=True)):
                if iou > threshold and box not in taken:
                    taken.add(box)
                    right[i] = 1.0
            hits = right.cumsum(0)
            recall = hits / len(true)
            precision = hits / torch.arange(1, len(found) + 1, dtype=torch.float64)
            last = float(recall[-1]) if len(found) else 0.0
            results[threshold][label] = (average_precision(precision, recall), last)
    return results


def _best(predicted: Detections, truth: Detections, found: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """For each found box the best-overlapping true one of its scene (its index), and the overlap."""
    best = torch.full((len(found),), -1)
    overlap = torch.full((len(found),), -1.0, dtype=torch.float64)
    for scene in truth.scene[true].unique().tolist():
        rows = (predicted.scene[found] == scene).nonzero()[:, 0]
        if not len(rows):
            continue
        columns = true[truth.scene[true] == scene]
        # Of these boxes alone: the corners of all, once a scene and class, would take hours on SUN RGB-D.
        a, b = (_rows(*pair).corners.double() for pair in ((predicted, found[rows]), (truth, columns)))
        shape = (len(rows), len(columns), 8, 3)
        ious = box_iou(a[:, None].expand(shape), b[None].expand(shape))
        overlap[rows], which = ious.max(1)
        best[rows] = columns[which]
    return best, overlap


def _rows(boxes: Detections, index: Tensor) -> Detections:
    return Detections(*(part[index] for part in boxes))


def mean_average_precision(results: Mapping[int, tuple[float, float]]) -> float:
    """Mean over the classes that occur in the truth."""
    return sum(ap for ap, _ in results.values()) / len(results) if results else 0.0


def axis_aligned_nms(
    corners: Float[Tensor, "n 8 3"], score: Float[Tensor, " n"], threshold: float = 0.25
) -> Int[Tensor, " m"]:
    """Indices kept, best first: a box whose hull overlaps a better one's by more than the threshold goes."""
    low, high = corners.amin(1), corners.amax(1)
    inner = (torch.minimum(high[:, None], high[None]) - torch.maximum(low[:, None], low[None])).clamp(min=0).prod(-1)
    volume = (high - low).prod(-1)
    overlaps = inner / (volume[:, None] + volume[None] - inner).clamp(min=1e-12) > threshold
    order = score.argsort(descending=True, stable=True).tolist()
    gone: set[int] = set()
    kept = []
    for i in order:
        if i in gone:
            continue
        kept.append(i)
        gone.update(overlaps[i].nonzero()[:, 0].tolist())
    return torch.tensor(kept, dtype=torch.long)


def points_inside(
    xyz: Float[Tensor, "n 3"], centre: Float[Tensor, "q 3"], size: Float[Tensor, "q 3"], angle: Float[Tensor, " q"]
) -> Int[Tensor, " q"]:
    """How many points lie in each box."""
    offset = xyz[None] - centre[:, None]
    c, s = angle.cos()[:, None], angle.sin()[:, None]
    # Corners turn as x' = c x + s y, y' = -s x + c y (the camera's z is the scene's y); points turn back.
    along, across = c * offset[..., 0] - s * offset[..., 1], s * offset[..., 0] + c * offset[..., 1]
    local = torch.stack([along, across, offset[..., 2]], -1).abs()
    return (local <= size[:, None] / 2 + 1e-6).all(-1).sum(1)


def select(
    prediction: Prediction,
    clouds: Sequence[Float[Tensor, "_n 3"]],
    *,
    first_scene: int = 0,
    least_points: int = 5,
    objectness: float = 0.05,
) -> Detections:
    """The boxes that count: not empty, not suppressed, and scored for every class by objectness x class probability.

    Args:
        prediction: of the last decoder layer.
        clouds: coordinates of each scene.
        first_scene: number of the first scene.
        least_points: boxes with fewer points inside are dropped; the best stays if all are.
        objectness: boxes below it are dropped.

    """
    rows: defaultdict[str, list[Tensor]] = defaultdict(list)
    probabilities = prediction.logits.softmax(-1)[..., :-1]
    angle, corners, score = prediction.angle, prediction.corners, prediction.objectness
    for i, cloud in enumerate(clouds):
        inside = points_inside(cloud, prediction.centre[i], prediction.size[i], angle[i]) >= least_points
        if not inside.any():
            inside[score[i].argmax()] = True
        candidates = inside.nonzero()[:, 0]
        label = probabilities[i, candidates].argmax(-1)
        kept = [
            candidates[label == k][
                axis_aligned_nms(corners[i, candidates[label == k]], score[i, candidates[label == k]])
            ]
            for k in label.unique()
        ]
        chosen = torch.cat(kept)
        chosen = chosen[score[i, chosen] > objectness]
        classes = probabilities.shape[-1]
        n = len(chosen) * classes
        rows["scene"].append(torch.full((n,), first_scene + i))
        rows["label"].append(torch.arange(classes).repeat(len(chosen)))
        for name, value in (("centre", prediction.centre), ("size", prediction.size), ("angle", angle)):
            rows[name].append(value[i, chosen].repeat_interleave(classes, 0).cpu())
        rows["score"].append((score[i, chosen, None] * probabilities[i, chosen]).flatten().cpu())
    return Detections(**{name: torch.cat(values) for name, values in rows.items()})
