"""Matching and losses of the detector (section 2.8)."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from tenfold_simple3dformer.detection.boxes import angle_to_bin, bin_to_angle, box_corners, box_giou, pairwise_giou


@dataclass(frozen=True)
class MatchCost:
    """Weights of the matching cost; the defaults are SUN RGB-D's, ScanNet has 1, 0, 0, 2."""

    cls: float = 1.0
    obj: float = 5.0
    center: float = 5.0
    giou: float = 3.0


@dataclass(frozen=True)
class LossWeights:
    """Weights of the loss terms; the defaults are SUN RGB-D's. ``no_object`` is the class weight of emptiness."""

    sem_cls: float = 1.0
    no_object: float = 0.1
    angle_cls: float = 0.1
    angle_reg: float = 0.5
    center: float = 5.0
    size: float = 1.0
    giou: float = 0.0


SCANNET = (MatchCost(1.0, 0.0, 0.0, 2.0), LossWeights(no_object=0.25, giou=1.0))


class Boxes(NamedTuple):
    """Ground truth: padded boxes, of which those with ``present`` count. Sizes are full lengths, angles radians."""

    centre: Float[Tensor, "b g 3"]
    size: Float[Tensor, "b g 3"]
    angle: Float[Tensor, "b g"]
    label: Int[Tensor, "b g"]
    present: Bool[Tensor, "b g"]


class Prediction(NamedTuple):
    """What one decoder layer says; metres and radians. ``logits`` has the no-object class last."""

    logits: Float[Tensor, "b q k"]
    centre: Float[Tensor, "b q 3"]
    size: Float[Tensor, "b q 3"]
    angle_logits: Float[Tensor, "b q a"]
    angle_residual: Float[Tensor, "b q a"]

    @property
    def angle(self) -> Float[Tensor, "b q"]:
        """Decoded angle."""
        return bin_to_angle(self.angle_logits, self.angle_residual)

    @property
    def corners(self) -> Float[Tensor, "b q 8 3"]:
        """Corners in the camera frame."""
        return box_corners(self.centre, self.size, self.angle)

    @property
    def objectness(self) -> Float[Tensor, "b q"]:
        """1 - probability of no object."""
        return 1 - self.logits.softmax(-1)[..., -1]


class Scene(NamedTuple):
    """Bounds of each scene in metres, which normalise centres and sizes."""

    low: Float[Tensor, "b 3"]
    high: Float[Tensor, "b 3"]

    @property
    def extent(self) -> Float[Tensor, "b 3"]:
        """Side lengths, at least 0.1 m."""
        return (self.high - self.low).clamp(min=0.1)

    def normalised(self, centre: Float[Tensor, "b n 3"]) -> Float[Tensor, "b n 3"]:
        """Centres in [0, 1] of the scene."""
        return (centre - self.low[:, None]) / (self.high - self.low)[:, None].clamp(min=1e-6)


class Assignment(NamedTuple):
    """For every query the box it is matched with, and whether it is."""

    box: Int[Tensor, "b q"]
    matched: Bool[Tensor, "b q"]


@torch.no_grad()
def match(
    prediction: Prediction, truth: Boxes, scene: Scene, cost: MatchCost, giou: Float[Tensor, "b q g"]
) -> Assignment:
    """The Hungarian assignment of queries to the boxes present, for one decoder layer."""
    from scipy.optimize import linear_sum_assignment  # noqa: PLC0415 - slow to import

    probabilities = prediction.logits.softmax(-1)
    label = truth.label[:, None].expand(-1, prediction.logits.shape[1], -1)
    total = -cost.cls * probabilities.gather(2, label)
    total = total - cost.obj * prediction.objectness[..., None]
    total = total + cost.center * torch.cdist(scene.normalised(prediction.centre), scene.normalised(truth.centre), p=1)
    costs = (total - cost.giou * giou).float().cpu().numpy()
    box = torch.zeros(prediction.logits.shape[:2], dtype=torch.long)
    matched = torch.zeros(prediction.logits.shape[:2], dtype=torch.bool)
    for i, count in enumerate(truth.present.sum(1).tolist()):
        queries, boxes = linear_sum_assignment(costs[i][:, :count])
        box[i, torch.from_numpy(queries)] = torch.from_numpy(boxes)
        matched[i, torch.from_numpy(queries)] = True
    return Assignment(box.to(truth.label.device), matched.to(truth.label.device))


@dataclass(frozen=True)
class Criterion:
    """Sum of the weighted terms over the decoder layers.

    Box terms are sums over the matched queries divided by ``boxes``, the number of boxes in the batch (averaged over the
    processes by the caller), at least 1. ``released_giou``: overlaps as 3DETR finds them, see `intersection_volume`.
    """

    cost: MatchCost = field(default_factory=MatchCost)
    weights: LossWeights = field(default_factory=LossWeights)
    released_giou: bool = False

    def __call__(
        self, layers: list[Prediction], truth: Boxes, scene: Scene, boxes: Float[Tensor, ""] | None = None
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss, and the terms of the last layer."""
        total = layers[0].logits.new_zeros(())
        terms: dict[str, Tensor] = {}
        for layer in layers:
            terms, _ = self.layer(layer, truth, scene, boxes)
            total = total + sum(value for name, value in terms.items() if name != "cardinality")
        return total, {name: value.detach() for name, value in terms.items()}

    def layer(
        self, prediction: Prediction, truth: Boxes, scene: Scene, boxes: Float[Tensor, ""] | None = None
    ) -> tuple[dict[str, Float[Tensor, ""]], Assignment]:
        """The weighted terms of one decoder layer, and its assignment."""
        weights, bins = self.weights, prediction.angle_logits.shape[-1]
        true_corners = box_corners(truth.centre, truth.size, truth.angle)
        rotated = bool((truth.angle * truth.present > 0).any())
        with torch.no_grad():
            giou = pairwise_giou(prediction.corners, true_corners, rotated=rotated, released=self.released_giou)
        assigned = match(prediction, truth, scene, self.cost, giou)
        count = truth.present.sum() if boxes is None else boxes
        count = count.to(prediction.logits.dtype).clamp(min=1)

        def matched_sum(values: Tensor) -> Tensor:
            return (values * assigned.matched).sum() / count

        def taken(values: Tensor) -> Tensor:
            index = assigned.box
            if values.dim() == 2:
                return values.gather(1, index)
            return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))

        classes = prediction.logits.shape[-1]
        target = torch.where(assigned.matched, taken(truth.label), classes - 1)
        class_weights = prediction.logits.new_ones(classes)
        class_weights[-1] = weights.no_object
        true_bin, true_residual = angle_to_bin(truth.angle, bins)
        bin_target = taken(true_bin)
        residual = prediction.angle_residual.gather(2, bin_target[..., None])[..., 0]
        centre = (scene.normalised(prediction.centre) - scene.normalised(taken(truth.centre))).abs().sum(-1)
        size = ((prediction.size - taken(truth.size)) / scene.extent[:, None]).abs().sum(-1)
        terms = {
            "sem_cls": weights.sem_cls * F.cross_entropy(prediction.logits.transpose(1, 2), target, class_weights),
            "angle_cls": weights.angle_cls
            * matched_sum(F.cross_entropy(prediction.angle_logits.transpose(1, 2), bin_target, reduction="none")),
            "angle_reg": weights.angle_reg
            * matched_sum(F.huber_loss(residual, taken(true_residual) / (math.pi / bins), reduction="none")),
            "center": weights.center * matched_sum(centre),
            "size": weights.size * matched_sum(size),
        }
        if weights.giou:
            pairs = true_corners.gather(1, assigned.box[..., None, None].expand(-1, -1, 8, 3))
            terms["giou"] = weights.giou * matched_sum(
                1 - box_giou(prediction.corners, pairs, rotated=rotated, released=self.released_giou)
            )
        predicted = (prediction.logits.argmax(-1) != classes - 1).sum(1)
        terms["cardinality"] = (predicted - truth.present.sum(1)).abs().to(prediction.logits.dtype).mean()
        return terms, assigned
