"""The data sets, and scores that need no training."""

from pathlib import Path

import pytest
import torch
from slak_folders import generate_coco, photograph

import tenfold_slak.data
from tenfold_shared.errors import UserError
from tenfold_shared.images import ImageSet
from tenfold_slak.data import DataConfig, compose_row_cues, embedded_sets, transforms
from tenfold_slak.detect import (
    Coco,
    Voc,
    coco_precision,
    run_lengths,
)


def test_row_cues_are_what_they_say() -> None:
    """The cue's row holds the labelled digit, at least 28 pixels away; each split uses its own glyphs."""
    glyphs = torch.arange(1, 11, dtype=torch.uint8).view(10, 1, 1).expand(10, 16, 16).contiguous()
    images, labels = compose_row_cues(glyphs, torch.arange(10), 200, 3)
    turned = 0
    for image, label in zip(images[:, 0], labels, strict=True):
        upright = image
        rows = (image == 255).nonzero()
        digits = ((image > 0) & (image < 255)).nonzero()
        if int(digits[:, 1].max() - digits[:, 1].min()) > 24:  # the digits lie beside each other
            upright, turned = image.T, turned + 1
            rows, digits = rows.flip(1), digits.flip(1)
        row = int(rows[:, 0].min()) // 16
        assert int(rows[:, 0].max()) // 16 == row
        own = upright[16 * row : 16 * row + 16]
        assert set(own[(own > 0) & (own < 255)].tolist()) == {int(label) + 1}
        gap = max(int(digits[:, 1].min() - rows[:, 1].max()), int(rows[:, 1].min() - digits[:, 1].max())) - 1
        assert gap >= 28
    assert 60 < turned < 140
    train, test = embedded_sets("digits")
    assert (len(train), len(test)) == (1200, 597)


def test_pictures_come_from_disjoint_halves() -> None:
    train, test = embedded_sets("pictures", 32)
    assert train.images.shape == (256, 3, 32, 32)
    assert test.labels.bincount().tolist() == [8] * 8
    with pytest.raises(UserError, match="half of the smallest"):
        embedded_sets("pictures", 400)


def test_transforms_are_the_papers() -> None:
    small, _ = transforms(DataConfig(name="cifar10", size=32))
    assert type(small.transforms[0]).__name__ == "RandomCrop"
    large, evaluated = transforms(DataConfig(name="imagenet", size=224))
    names = [type(step).__name__ for step in large.transforms]
    assert names[0] == "RandomResizedCropAndInterpolation"
    assert {"RandAugment", "RandomErasing"} <= set(names)
    assert evaluated(photograph(300, 0)).shape == (3, 224, 224)
    assert evaluated.transforms[0].size == 256
    assert tuple(transforms(DataConfig(size=384))[1].transforms[0].size) == (384, 384)
    with pytest.raises(UserError, match="auto_augment nonsense is no policy of timm"):
        transforms(DataConfig(auto_augment="nonsense"))


def test_a_validation_part_is_held_out_from_the_training_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 50 training images 10 are judged on, and neither part has one of the test images; without it, those are."""
    values = torch.arange(60, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    labels = torch.arange(60) % 10

    def stored(name: str, root: Path | None, split: str, download: bool) -> ImageSet:
        part = slice(50) if split == "train" else slice(50, 60)
        return ImageSet(values[part], labels[part], tuple(map(str, range(10))))

    monkeypatch.setattr(tenfold_slak.data, "load_images", stored)
    for share, trained in ((0.2, 40), (0.0, 50)):
        config = DataConfig(name="cifar10", root=tmp_path, size=32, validation=share)
        parts = [tenfold_slak.data.chosen_images(config, training, 0) for training in (True, False)]
        seen, held = ({int(image[0, 0, 0]) for image in part.images.images} for part in parts)
        assert (len(parts[0]), len(parts[1])) == (trained, 10)
        assert not seen & held
        assert (max(held) < 50) is bool(share)


def test_coco_masks_cover_their_boxes(tmp_path: Path) -> None:
    generate_coco(tmp_path)
    data = Coco(tmp_path, "val2017", training=False)
    image, target = data[0]
    assert image.shape == (3, 72, 72)
    assert target["boxes"].tolist() == [[10.0, 10.0, 40.0, 50.0]]
    with pytest.raises(UserError, match="COCO"):
        Coco(tmp_path / "nowhere", "val2017", training=False)
    annotations = tmp_path / "annotations" / "instances_val2017.json"
    annotations.write_text(annotations.read_text().replace("[10, 10, 30, 40]", "[10, 10, 0.5, 40]", 1))
    assert Coco(tmp_path, "val2017", training=True).ids == [1]  # nothing to learn from in the first
    assert len(Coco(tmp_path, "val2017", training=False)) == 2
    annotations.write_text("{")
    with pytest.raises(UserError, match="instances_val2017"):
        Coco(tmp_path, "val2017", training=False)


def test_what_voc_is_got_from_is_named_with_its_checksums(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"VOCtest_06-Nov-2007\.tar, md5 b6e924de25625d8de591ea690078ad9f"):
        Voc(tmp_path, "test", training=False)


def test_coco_precision_of_a_perfect_and_of_a_blind_detector(tmp_path: Path) -> None:
    generate_coco(tmp_path)
    data = Coco(tmp_path, "val2017", training=False)
    masks = torch.zeros(1, 1, 72, 72)
    masks[..., 10:51, 10:41] = 1
    objects = [(index, {**data[index][1], "scores": torch.ones(1), "masks": run_lengths(masks)}) for index in range(2)]
    scores = coco_precision(objects, data)
    assert scores["box_ap"] == scores["box_ap75"] == pytest.approx(100)
    assert scores["mask_ap50"] == pytest.approx(100)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
    assert coco_precision([(0, nothing), (1, nothing)], data)["box_ap"] == 0
