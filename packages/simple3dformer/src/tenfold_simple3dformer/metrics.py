"""Evaluation (section 9): accuracies, part IoU with the category known, confusion matrices over whole scenes."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SHAPENET_PARTS: dict[str, list[int]] = {
    "Airplane": [0, 1, 2, 3], "Bag": [4, 5], "Cap": [6, 7], "Car": [8, 9, 10, 11], "Chair": [12, 13, 14, 15],
    "Earphone": [16, 17, 18], "Guitar": [19, 20, 21], "Knife": [22, 23], "Lamp": [24, 25, 26, 27], "Laptop": [28, 29],
    "Motorbike": [30, 31, 32, 33, 34, 35], "Mug": [36, 37], "Pistol": [38, 39, 40], "Rocket": [41, 42, 43],
    "Skateboard": [44, 45, 46], "Table": [47, 48, 49],
}  # fmt: skip
"""Category of ShapeNetPart -> its parts."""


def confusion(predicted: Int[Tensor, "*n"], target: Int[Tensor, "*n"], classes: int) -> Int[Tensor, "k k"]:
    """Counts with the true class along rows; labels outside of the classes are left out."""
    predicted, target = predicted.flatten(), target.flatten()
    known = (target >= 0) & (target < classes)
    return torch.bincount(target[known] * classes + predicted[known], minlength=classes**2).view(classes, classes)


def overall_accuracy(matrix: Int[Tensor, "k k"]) -> float:
    """Correct over total."""
    return float(matrix.diagonal().sum().double() / matrix.sum().clamp(min=1))


def mean_class_accuracy(matrix: Int[Tensor, "k k"]) -> float:
    """Mean of the recall over the classes that have samples."""
    total = matrix.sum(1)
    present = total > 0
    return float((matrix.diagonal()[present].double() / total[present]).mean()) if present.any() else 0.0


def mean_iou(matrix: Int[Tensor, "k k"]) -> float:
    """Mean of intersection over union over the classes that occur, in the truth or the prediction."""
    correct = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - correct
    present = union > 0
    return float((correct[present].double() / union[present]).mean()) if present.any() else 0.0


def released_overall_accuracy(correct_by_batch: Sequence[Bool[Tensor, " _"]]) -> float:
    """Mean of the batches' accuracies, as the released point script reports: a short last batch weighs too much."""
    return float(torch.stack([batch.double().mean() for batch in correct_by_batch]).mean())


def restricted_argmax(
    logits: Float[Tensor, "b n k"], categories: Int[Tensor, " b"], parts: Sequence[Sequence[int]]
) -> Int[Tensor, "b n"]:
    """The most likely part among those of each shape's category."""
    allowed = torch.zeros(len(parts), logits.shape[-1], dtype=torch.bool, device=logits.device)
    for row, members in enumerate(parts):
        allowed[row, list(members)] = True
    return logits.masked_fill(~allowed[categories][:, None], -torch.inf).argmax(-1)


def categories_of(labels: Int[Tensor, "b n"], parts: Sequence[Sequence[int]]) -> Int[Tensor, " b"]:
    """The category of each shape, read from the true part of its first point."""
    owner = torch.full((max(max(p) for p in parts) + 1,), -1, device=labels.device)
    for row, members in enumerate(parts):
        owner[list(members)] = row
    return owner[labels[:, 0].long()]


def shape_ious(
    predicted: Int[Tensor, "b n"],
    target: Int[Tensor, "b n"],
    categories: Int[Tensor, " b"],
    parts: Sequence[Sequence[int]],
) -> Float[Tensor, " b"]:
    """Mean over a category's parts of the IoU; a part that is absent and not predicted counts 1."""
    count = max(max(p) for p in parts) + 1
    batch = len(predicted)
    offset = torch.arange(batch, device=predicted.device)[:, None] * count

    def histogram(values: Tensor) -> Tensor:
        return torch.bincount(values.flatten(), minlength=batch * count).view(batch, count).double()

    both = predicted == target
    intersection = histogram((offset + target)[both])
    union = histogram(offset + target) + histogram(offset + predicted) - intersection
    iou = torch.where(union > 0, intersection / union.clamp(min=1), 1.0)
    member = torch.zeros(len(parts), count, dtype=torch.float64, device=predicted.device)
    for row, members in enumerate(parts):
        member[row, list(members)] = 1.0
    weights = member[categories]
    return (iou * weights).sum(1) / weights.sum(1)


def part_segmentation(
    logits: Float[Tensor, "b n k"], target: Int[Tensor, "b n"], parts: Mapping[str, Sequence[int]]
) -> dict[str, float]:
    """Accuracy, class accuracy, instance and class mIoU in [0, 1], and ``iou <category>`` for each category present."""
    target = target.long()
    members = list(parts.values())
    categories = categories_of(target, members)
    predicted = restricted_argmax(logits, categories, members)
    ious = shape_ious(predicted, target, categories, members)
    return summarise_parts(ious, categories, confusion(predicted, target, logits.shape[-1]), list(parts))


def summarise_parts(
    ious: Float[Tensor, " b"], categories: Int[Tensor, " b"], matrix: Int[Tensor, "k k"], names: Sequence[str]
) -> dict[str, float]:
    """The numbers of `part_segmentation` from what can be collected batch by batch."""
    by_category = {
        name: float(ious[categories == i].mean()) for i, name in enumerate(names) if bool((categories == i).any())
    }
    return {
        "accuracy": overall_accuracy(matrix),
        "class accuracy": mean_class_accuracy(matrix),
        "instance mIoU": float(ious.mean()),
        "class mIoU": sum(by_category.values()) / len(by_category),
        **{f"iou {name}": value for name, value in by_category.items()},
    }
