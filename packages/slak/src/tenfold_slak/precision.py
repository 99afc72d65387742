"""VOC's average precision, which no maintained library computes by its own rules (difficult objects, eleven points)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def voc_precision(
    found: Sequence[Mapping[str, Tensor]],
    truth: Sequence[Mapping[str, Tensor]],
    classes: int,
    overlap: float = 0.5,
    eleven_points: bool = False,
) -> float:
    """Mean over the classes of VOC's average precision at an overlap, in [0, 1].

    Each object is found by the first detection, in the order of falling scores, that overlaps it by at least `overlap`;
    further ones are false, and those of difficult objects count neither way.

    Args:
        found: by image: `boxes` (xyxy), `labels`, `scores`.
        truth: by image: `boxes`, `labels`, `difficult`.
        classes: with the background, class 0.
        overlap: intersection over union.
        eleven_points: the precision at recalls 0, 0.1 ... 1, as in 2007; otherwise the area under the curve.

    """
    values = [_class_precision(found, truth, label, overlap, eleven_points) for label in range(1, classes)]
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else 0.0


def _class_precision(
    found: Sequence[Mapping[str, Tensor]],
    truth: Sequence[Mapping[str, Tensor]],
    label: int,
    overlap: float,
    points: bool,
) -> float | None:
    from torchvision.ops import box_iou  # noqa: PLC0415 - slow to import

    objects = sum(int((entry["labels"][~entry["difficult"]] == label).sum()) for entry in truth)
    if not objects:
        return None
    ranked: list[tuple[float, int, int]] = []
    for image, answer in enumerate(found):
        ranked += [(float(answer["scores"][i]), image, int(i)) for i in (answer["labels"] == label).nonzero().flatten()]
    ranked.sort(key=lambda entry: -entry[0])
    taken: set[tuple[int, int]] = set()
    hits = []
    for _, image, i in ranked:
        mine = truth[image]["labels"] == label
        overlaps = box_iou(found[image]["boxes"][i][None], truth[image]["boxes"])[0] * mine
        best = int(overlaps.argmax()) if len(overlaps) else -1
        if best < 0 or overlaps[best] < overlap:
            hits.append(False)
        elif not truth[image]["difficult"][best]:
            hits.append((image, best) not in taken)
            taken.add((image, best))
    if not hits:
        return 0.0
    correct = torch.tensor(hits, dtype=torch.float64).cumsum(0)
    recall, precision = correct / objects, correct / torch.arange(1, len(hits) + 1)
    best_from_here = precision.flip(0).cummax(0).values.flip(0)
    if points:
        levels = torch.linspace(0, 1, 11, dtype=torch.float64)
        at = [best_from_here[recall >= level] for level in levels]
        return float(sum(float(part.max()) if len(part) else 0.0 for part in at)) / 11
    steps = torch.diff(recall, prepend=recall.new_zeros(1))
    return float((steps * best_from_here).sum())
