"""Cascade Mask R-CNN's heads for torchvision's detectors: three box heads, each trained on what the one before refined.

The paper's detector (section 6): overlaps of 0.5, 0.6 and 0.7, boxes that do not depend on the class, GIoU loss of
weight 10, heads of four convolutions and one Linear. There is one mask head, on the last boxes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import batched_nms, clip_boxes_to_image, generalized_box_iou_loss, remove_small_boxes

OVERLAPS = (0.5, 0.6, 0.7)  # what counts as an object for each head
LOSS_WEIGHTS = (1.0, 0.5, 0.25)
CODE_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
GIOU_WEIGHT = 10.0


class BoxStage(nn.Module):
    """Four convolutions, a Linear, then scores of the classes and one box."""

    def __init__(self, channels: int, classes: int, pool: int = 7) -> None:
        super().__init__()
        self.head = FastRCNNConvFCHead((channels, pool, pool), [256] * 4, [1024], norm_layer=nn.BatchNorm2d)
        self.classify, self.box = nn.Linear(1024, classes), nn.Linear(1024, 4)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.normal_(self.box.weight, std=0.001)
        for layer in (self.classify, self.box):
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (N, classes) and box codes (N, 4) of pooled regions."""
        x = self.head(pooled)
        return self.classify(x), self.box(x)


class CascadeRoIHeads(RoIHeads):
    """Takes the place of a torchvision detector's `roi_heads`."""

    def __init__(self, heads: RoIHeads, channels: int, classes: int) -> None:
        samples = heads.fg_bg_sampler.batch_size_per_image
        super().__init__(
            heads.box_roi_pool, None, None, 0.5, 0.5, samples, 0.25, None, heads.score_thresh, heads.nms_thresh,
            heads.detections_per_img, heads.mask_roi_pool, heads.mask_head, heads.mask_predictor,
        )  # fmt: skip
        self.stages = nn.ModuleList(BoxStage(channels, classes) for _ in OVERLAPS)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections in eval mode, losses in training, as torchvision's own heads."""
        losses: dict[str, Tensor] = {}
        scores, sampled, matched, labels = [], proposals, [], []
        for number, stage in enumerate(self.stages):
            coder = self.box_coder = BoxCoder(CODE_WEIGHTS[number])
            if self.training:
                assert targets is not None
                overlap = OVERLAPS[number]
                self.proposal_matcher = Matcher(overlap, overlap, allow_low_quality_matches=False)
                proposals, matched, labels, _ = self.select_training_samples(proposals, targets)
            sampled = proposals
            logits, codes = stage(self.box_roi_pool(features, proposals, image_shapes))
            counts = [len(boxes) for boxes in proposals]
            refined = coder.decode(codes, proposals).reshape(-1, 4).split(counts)
            proposals = [
                clip_boxes_to_image(boxes.detach(), shape) for boxes, shape in zip(refined, image_shapes, strict=True)
            ]
            scores.append(logits.softmax(-1))
            if targets is not None and self.training:
                weight = LOSS_WEIGHTS[number]
                # An image without objects has no positive regions; the row of zeros is there to be indexed.
                boxes = [target["boxes"] for target in targets]
                boxes = [own if len(own) else own.new_zeros(1, 4) for own in boxes]
                truth = [own[index] for own, index in zip(boxes, matched, strict=True)]
                classes = torch.cat(labels)
                found = classes > 0
                overlap_loss = generalized_box_iou_loss(torch.cat(refined)[found], torch.cat(truth)[found]).sum()
                losses[f"classify_{number}"] = weight * cross_entropy(logits, classes)
                losses[f"box_{number}"] = weight * GIOU_WEIGHT * overlap_loss / max(1, len(classes))
        if self.training:
            assert targets is not None
            losses["mask"] = self._mask_loss(features, sampled, image_shapes, targets, matched, labels)
            return [], losses
        mean = torch.stack(scores).mean(0).split([len(boxes) for boxes in proposals])
        detections = [
            self._detections(boxes, score, shape)
            for boxes, score, shape in zip(proposals, mean, image_shapes, strict=True)
        ]
        self._add_masks(features, detections, image_shapes)
        return detections, losses

    def _mask_loss(
        self,
        features: dict[str, Tensor],
        proposals: Sequence[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Sequence[dict[str, Tensor]],
        matched: Sequence[Tensor],
        labels: Sequence[Tensor],
    ) -> Tensor:
        positive = [(label > 0).nonzero().flatten() for label in labels]
        boxes = [proposal[index] for proposal, index in zip(proposals, positive, strict=True)]
        objects = [match[index] for match, index in zip(matched, positive, strict=True)]
        logits = self._mask_logits(features, boxes, image_shapes)
        masks, classes = [target["masks"] for target in targets], [target["labels"] for target in targets]
        return maskrcnn_loss(logits, boxes, masks, classes, objects)

    def _mask_logits(self, features: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]) -> Tensor:
        pool: Any = self.mask_roi_pool
        return self.mask_predictor(self.mask_head(pool(features, boxes, shapes)))

    def _detections(self, boxes: Tensor, scores: Tensor, shape: tuple[int, int]) -> dict[str, Tensor]:
        """The best boxes of one image, without those that overlap a better one of their class."""
        index, label = (scores[:, 1:] > self.score_thresh).nonzero(as_tuple=True)
        kept, score, label = boxes[index], scores[index, label + 1], label + 1
        large = remove_small_boxes(kept, 1e-2)
        kept, score, label = kept[large], score[large], label[large]
        best = batched_nms(kept, score, label, self.nms_thresh)[: self.detections_per_img]
        return {"boxes": kept[best], "labels": label[best], "scores": score[best]}

    def _add_masks(
        self, features: dict[str, Tensor], detections: list[dict[str, Tensor]], shapes: list[tuple[int, int]]
    ) -> None:
        logits = self._mask_logits(features, [found["boxes"] for found in detections], shapes)
        masks = maskrcnn_inference(logits, [found["labels"] for found in detections])
        for found, mask in zip(detections, masks, strict=True):
            found["masks"] = mask


def cascade_mask_rcnn(backbone: nn.Module, classes: int, channels: int, **options: Any) -> nn.Module:
    """A `MaskRCNN` whose box heads are a cascade; `options` are MaskRCNN's.

    Args:
        backbone: with `out_channels`, to maps by name (a feature pyramid).
        classes: with the background.
        channels: of the pyramid.
        options: of `torchvision.models.detection.MaskRCNN`.

    """
    model: Any = MaskRCNN(backbone, classes, **options)
    model.roi_heads = CascadeRoIHeads(model.roi_heads, channels, classes)
    return model
