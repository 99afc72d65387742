"""Folders laid out as ADE20K, COCO and PASCAL VOC are published, of a few generated images; weights to start from."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tenfold_slak.compat import to_official
from tenfold_slak.models.slak import create


def photograph(size: int, seed: int) -> Image.Image:
    pixels = torch.randint(256, (size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def backbone_with_zeros(file: Path, **arguments: Any) -> Path:
    """A classifier in the released layout, 40 % of whose weights are zero."""
    generator = torch.Generator().manual_seed(0)
    model = create("slak_tiny", **arguments)
    for parameter in model.parameters():
        if parameter.ndim in {2, 4}:
            parameter.data *= torch.rand(parameter.shape, generator=generator) < 0.6
    torch.save(to_official(model), file)
    return file


def generate_ade(folder: Path, classes: int = 150) -> None:
    """Two images a split, each of random labels."""
    root = folder / "ADEChallengeData2016"
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for number in range(2):
            photograph(70, number).save(root / "images" / split / f"{number}.jpg")
            labels = torch.randint(classes + 1, (70, 70), dtype=torch.uint8)
            Image.fromarray(labels.numpy()).save(root / "annotations" / split / f"{number}.png")


def generate_coco(folder: Path) -> None:
    (folder / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (folder / split).mkdir()
        images, found = [], []
        for number in range(2):
            photograph(72, number).save(folder / split / f"{number}.jpg")
            images.append({"id": number, "file_name": f"{number}.jpg", "width": 72, "height": 72})
            polygon = [10, 10, 40, 10, 40, 50, 10, 50]
            common = {"image_id": number, "iscrowd": 0, "area": 1200}
            entry = {"id": number + 1, "category_id": 7, "bbox": [10, 10, 30, 40], "segmentation": [polygon], **common}
            found.append(entry)
        categories = [{"id": 7, "name": "a"}, {"id": 9, "name": "b"}]
        content = {"images": images, "annotations": found, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def generate_voc(folder: Path) -> None:
    root = folder / "VOCdevkit" / "VOC2007"
    for part in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (root / part).mkdir(parents=True)
    for split in ("trainval", "test"):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("000001\n000002\n")
    for number in (1, 2):
        photograph(72, number).save(root / "JPEGImages" / f"00000{number}.jpg")
        box = "<bndbox><xmin>5</xmin><ymin>6</ymin><xmax>30</xmax><ymax>40</ymax></bndbox>"
        thing = f"<object><name>dog</name><difficult>0</difficult>{box}</object>"
        (root / "Annotations" / f"00000{number}.xml").write_text(f"<annotation>{thing}</annotation>")
