"""Segmentation and detection: metrics, schedules and transforms by hand; the figures of a report."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from tenfold_shared.claims import ArmResult, Outcome, load_claims
from tenfold_shared.cli import load_recipe
from tenfold_slak.detect import augmented, cropped, flipped, resized
from tenfold_slak.precision import voc_precision
from tenfold_slak.reproduce import VALUES, figures
from tenfold_slak.segment import IGNORED, confusion, mean_iou, poly_rate, training_transform
from tenfold_slak.train import Recipe


def test_mean_iou_by_hand() -> None:
    labels = torch.tensor([0, 0, 1, 1, IGNORED])
    matrix = confusion(torch.tensor([0, 1, 1, 1, 2]), labels, 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert float(mean_iou(matrix)) == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)


def test_poly_schedule() -> None:
    settings = load_recipe("tenfold_slak", "ade20k-slak-tiny", Recipe).segmentation
    assert poly_rate(0, settings) == pytest.approx(1e-4 * 1e-6)
    assert poly_rate(1500, settings) == pytest.approx(1e-4 * (1 - 1500 / 160_000))


def test_segmentation_crops_keep_labels_on_their_pixels() -> None:
    image = torch.zeros(40, 60, 3, dtype=torch.uint8)
    image[:, 30:] = 255
    labels = torch.ones(40, 60, dtype=torch.uint8)
    labels[:, 30:] = 2
    pixels, classes = training_transform(32)(Image.fromarray(image.numpy()), Image.fromarray(labels.numpy()))
    assert pixels.shape == (3, 32, 32)
    known = classes != IGNORED
    bright, wanted = pixels.mean(0)[known] > pixels.mean(0)[known].mean(), classes[known] == 1
    if wanted.any() and not wanted.all():
        assert (bright == wanted).float().mean() > 0.85  # the edge is blurred


def test_boxes_follow_their_objects() -> None:
    image = torch.zeros(3, 40, 60)
    image[:, 10:20, 5:25] = 1
    mask = image[:1].to(torch.uint8)
    target = {"boxes": torch.tensor([[5.0, 10.0, 25.0, 20.0]]), "labels": torch.tensor([1]), "masks": mask}
    for change in (flipped(image, target), resized(image, target, 80), cropped(image, target, 5, 3, 30, 40)):
        pixels, found = change
        left, top, right, bottom = found["boxes"][0].round().int().tolist()
        inside = pixels[:, top:bottom, left:right]
        assert inside.mean() > 0.95
        assert pixels.sum() == pytest.approx(float(inside.sum()), rel=0.1)
        assert torch.equal(found["masks"][0, top:bottom, left:right], torch.ones(bottom - top, right - left).byte())
    assert len(cropped(image, target, 25, 30, 10, 10)[1]["boxes"]) == 0
    for _ in range(6):
        assert len(augmented(image, target)[1]["boxes"]) == 1


def test_voc_precision_by_hand() -> None:
    """Two objects; right, a repetition, wrong, right: precisions 1 and 1/2 at recalls 1/2 and 1."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    truth = [{"boxes": boxes, "labels": torch.tensor([1, 1]), "difficult": torch.tensor([False, False])}]
    found = [
        {
            "boxes": torch.tensor([[0.0, 0, 10, 9], [0, 0, 10, 10], [50, 50, 60, 60], [20, 20, 30, 31]]),
            "labels": torch.ones(4, dtype=torch.long),
            "scores": torch.tensor([0.9, 0.8, 0.7, 0.6]),
        }
    ]
    assert voc_precision(found, truth, 3) == pytest.approx(0.5 * 1 + 0.5 * 0.5)
    assert voc_precision(found, truth, 3, eleven_points=True) == pytest.approx((6 * 1 + 5 * 0.5) / 11)
    difficult = [{**truth[0], "difficult": torch.tensor([False, True])}]
    assert voc_precision(found, difficult, 3) == pytest.approx(1.0)


def test_every_metric_is_measured() -> None:
    assert {claim.metric.name for claim in load_claims("tenfold_slak").claims} == set(VALUES)


def test_arms_of_one_name_in_two_claims_are_drawn_apart(tmp_path: Path) -> None:
    """SLaK-T's `slak` is not SLaK-B's; the miniature's claims share theirs."""
    names = ("in1k-slak-t", "in1k-slak-b", "mini-decomposed", "mini-depth")
    every = {claim.id: claim for claim in load_claims("tenfold_slak").claims}
    outcomes = []
    for value, name in enumerate(names):
        empty = {"paper": None, "low": None, "high": None, "seconds": (1.0,), "peak_memory_bytes": (1,)}
        arms = {
            arm: ArmResult(
                arm, values=(50.0 + value,), n=1, mean=50.0 + value, std=None, extras=({},), errors=(None,), **empty
            )
            for arm in every[name].arms
        }
        method = every[name].method
        outcomes.append(Outcome("slak", name, "mini", method, (0,), arms, (), "inconclusive", "", "", None, ""))
    drawn = figures([every[name] for name in names], outcomes, tmp_path)
    heights = [[bar.get_height() for bar in figure.figure.axes[0].patches] for figure in drawn]
    assert [len(bars) for bars in heights] == [4, 2, 2]
    assert heights[1:] == [[50.0, 50.0], [51.0, 51.0]]
