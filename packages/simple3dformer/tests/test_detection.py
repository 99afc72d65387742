"""Boxes in closed form, matching, average precision, suppression, the detector."""

import math

import numpy as np
import pytest
import torch

from tenfold_shared.errors import UserError
from tenfold_simple3dformer.backbone import create_vit
from tenfold_simple3dformer.data.sunrgbd import SceneSet, boxes_of, flip_and_rotate, random_cuboid
from tenfold_simple3dformer.detection.average_precision import (
    Detections,
    average_precision,
    axis_aligned_nms,
    evaluate_detections,
    mean_average_precision,
    points_inside,
    select,
)
from tenfold_simple3dformer.detection.boxes import (
    angle_to_bin,
    bin_to_angle,
    box_corners,
    box_giou,
    box_iou,
    box_volumes,
    intersect_polygons,
    intersection_volume,
)
from tenfold_simple3dformer.detection.criterion import Criterion, LossWeights, Prediction
from tenfold_simple3dformer.detection.detector import Detector, bounds
from tenfold_simple3dformer.detection.transformer import FourierEmbedding
from tenfold_simple3dformer.rooms import sun_scene


def corners(centre=(0.0, 0.0, 0.0), size=(1.0, 1.0, 1.0), angle=0.0) -> torch.Tensor:
    values = (torch.tensor([centre]), torch.tensor([size]), torch.tensor([angle]))
    return box_corners(*(v.double() for v in values))


def test_overlap_in_closed_form() -> None:
    """A unit square and the same turned by 45 degrees share a regular octagon of area 2 (sqrt 2 - 1)."""
    area = 2 * (math.sqrt(2) - 1)
    turned = corners(angle=math.pi / 4)
    assert float(box_iou(corners(), turned)) == pytest.approx(area / (2 - area))
    assert float(box_iou(corners(), corners())) == pytest.approx(1)
    assert float(box_iou(corners(), corners(centre=(0.5, 0.0, 0.0)))) == pytest.approx(1 / 3)
    assert float(box_iou(corners(), corners(centre=(0.0, 0.0, 0.5)))) == pytest.approx(1 / 3)
    assert float(box_giou(corners(), corners())) == pytest.approx(1)
    assert float(box_giou(corners(), corners(centre=(3.0, 0.0, 0.0)))) == pytest.approx(-0.5)
    assert float(box_volumes(corners(size=(1.0, 2.0, 3.0), angle=1.0))) == pytest.approx(6)


def test_released_overlap_misses_turned_boxes() -> None:
    """3DETR's look at two corners takes a box turned by half a turn as disjoint from itself."""
    box = corners(angle=math.pi)
    assert float(intersection_volume(box, box)) == pytest.approx(1)
    assert float(intersection_volume(box, box, released=True)) == 0


def test_polygons_against_sampling() -> None:
    generator = torch.Generator().manual_seed(0)
    centre = torch.rand(6, 3, generator=generator)
    a = box_corners(centre, 0.5 + torch.rand(6, 3, generator=generator), 6 * torch.rand(6, generator=generator))
    b = box_corners(torch.rand(6, 3, generator=generator), torch.ones(6, 3), 6 * torch.rand(6, generator=generator))
    found = intersect_polygons(a[:, :4, [0, 2]], b[:, :4, [0, 2]])
    ticks = (torch.arange(400) + 0.5) / 400 * 4 - 1.5
    grid = torch.stack(torch.meshgrid(ticks, -ticks, indexing="ij"), -1).reshape(-1, 2)

    def inside(polygon: torch.Tensor) -> torch.Tensor:
        edge = polygon.roll(-1, 0) - polygon
        side = edge[:, 0] * (grid[:, None, 1] - polygon[:, 1]) - edge[:, 1] * (grid[:, None, 0] - polygon[:, 0])
        return (side >= 0).all(1) | (side <= 0).all(1)

    for i in range(6):
        both = inside(a[i, :4, [0, 2]]) & inside(b[i, :4, [0, 2]])
        assert float(found[i]) == pytest.approx(float(both.float().mean()) * 16, abs=0.02)


def test_phases_keep_their_digits_in_half_precision() -> None:
    xyz = torch.rand(1, 50, 3)
    embedding = FourierEmbedding(64)
    exact = embedding(xyz, *bounds(xyz))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embedding(xyz, *bounds(xyz)), exact)


def test_angle_bins() -> None:
    """-eps and 2 pi - eps fall in one bin; the residual's unit is half a bin."""
    bins, residual = angle_to_bin(torch.tensor([-1e-4, 2 * math.pi - 1e-4, 1e-4, math.pi]))
    assert bins.tolist() == [0, 0, 0, 6]
    torch.testing.assert_close(residual[0], residual[1], atol=1e-5, rtol=0)
    angles = torch.linspace(-3.1, 3.1, 50)
    bins, residual = angle_to_bin(angles)
    logits = torch.nn.functional.one_hot(bins, 12).float()
    normalised = logits * (residual / (math.pi / 12))[:, None]
    torch.testing.assert_close(bin_to_angle(logits, normalised), angles, atol=1e-5, rtol=0)


def detections(scene, label, x, score=None) -> Detections:
    n = len(scene)
    centre = torch.tensor([[v, 0.0, 0.0] for v in x])
    score = torch.ones(n) if score is None else torch.tensor(score)
    return Detections(torch.tensor(scene), torch.tensor(label), centre, torch.ones(n, 3), torch.zeros(n), score)


def test_average_precision_by_hand() -> None:
    """A duplicate is wrong; a class never predicted counts 0; a box in another scene matches nothing."""
    truth = detections([0, 0, 1], [0, 0, 3], [0.0, 5.0, 0.0])
    predicted = detections([0, 0, 0, 1], [0, 0, 0, 0], [0.0, 0.1, 5.0, 0.0], [0.9, 0.8, 0.7, 0.95])
    found = evaluate_detections(predicted, truth)[0.5]
    # In order of score: wrong scene, right, duplicate, right: precisions 0, 1/2, 1/3, 1/2 at recalls 0, 1/2, 1/2, 1.
    assert found[0] == (pytest.approx(0.5), 1.0)
    assert found[3] == (0.0, 0.0)
    assert mean_average_precision(found) == pytest.approx(0.25)
    assert average_precision(torch.zeros(0), torch.zeros(0)) == 0.0


def test_average_precision_takes_the_corners_of_a_box_once_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work grows with the boxes, not with the boxes times the scenes."""
    taken: list[int] = []
    corners_of = Detections.corners.fget
    monkeypatch.setattr(Detections, "corners", property(lambda boxes: (taken.append(len(boxes.scene)), corners_of(boxes))[1]))  # fmt: skip
    scenes, labels = list(range(50)) * 2, [0] * 50 + [1] * 50
    boxes = detections(scenes, labels, [0.0] * 100)
    assert mean_average_precision(evaluate_detections(boxes, boxes)[0.5]) == pytest.approx(1)
    assert sum(taken) == 200  # each box of the truth and of the prediction


def test_suppression_and_points_inside() -> None:
    boxes = torch.cat([corners(), corners(centre=(0.1, 0.0, 0.0)), corners(centre=(3.0, 0.0, 0.0))])
    assert axis_aligned_nms(boxes, torch.tensor([0.5, 0.9, 0.1])).tolist() == [1, 2]
    cloud, rows = sun_scene(3, 4000)
    box = torch.from_numpy(rows).float()
    count = points_inside(torch.from_numpy(cloud), box[:, :3], 2 * box[:, 3:6], box[:, 6])
    assert (count > 20).all()


def test_detector_and_its_losses() -> None:
    """Predictions of every layer, gradients to all parameters of the encoder; sizes are doubled once."""
    torch.manual_seed(0)
    scenes = SceneSet([sun_scene(i, 600) for i in range(2)], 300)
    clouds, rows = (torch.stack(parts) for parts in zip(*(scenes[i] for i in range(2)), strict=True))
    truth = boxes_of(rows)
    assert float(truth.size[0, 0, 0]) == pytest.approx(2 * float(rows[0, 0, 3]))
    for vit in (create_vit("mini"), None):
        model = Detector(vit, centres=64, queries=16, layers=2, width=32, masked=vit is None, reduce=32 if vit else 0)
        layers = model(clouds)
        assert len(layers) == 2
        scene = bounds(clouds)
        loss, terms = Criterion(weights=LossWeights(giou=1.0))(layers, truth, scene)
        loss.backward()
        assert torch.isfinite(loss)
        assert set(terms) == {"sem_cls", "angle_cls", "angle_reg", "center", "size", "giou", "cardinality"}
        unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert unused in ([], ["vit.cls_token"])
        found = select(Prediction(*(part.detach() for part in layers[-1])), list(clouds))
        assert len(found.scene) % 10 == 0
        with pytest.raises(UserError, match="64 centres"):
            model(clouds[:, :10])


def test_augmentation_keeps_points_in_their_boxes() -> None:
    cloud, rows = sun_scene(4, 6000)
    before = points_inside(
        *(torch.from_numpy(np.asarray(v)).double() for v in (cloud, rows[:, :3], 2 * rows[:, 3:6], rows[:, 6]))
    )
    for seed in range(4):
        moved, boxes = flip_and_rotate(cloud, rows, np.random.RandomState(seed))
        after = points_inside(*(torch.from_numpy(np.asarray(v)).double() for v in (moved, boxes[:, :3], 2 * boxes[:, 3:6] + 1e-4, boxes[:, 6])))  # fmt: skip
        assert (after - before).abs().max() <= 3
    cut, kept = random_cuboid(cloud, rows, np.random.RandomState(0), least=1000)
    assert len(cut) >= 1000
    assert len(kept) >= 1
    whole, _ = random_cuboid(cloud, rows, np.random.RandomState(0), least=10**9, tries=3)
    assert len(whole) == len(cloud)
