"""Detection on COCO and PASCAL VOC with torchvision's detectors (section 6), without mmdet: data, loop, average precision."""

import contextlib
import dataclasses
import io
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset

from tenfold_shared.batches import Stream, StreamedBatches
from tenfold_shared.download import data_root, missing
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, derived_seed, seed_everything
from tenfold_slak.downstream import SLaKBackbone, cascade_mask_rcnn, faster_rcnn, mask_rcnn
from tenfold_slak.models.slak import create
from tenfold_slak.optim import layer_id, parameter_groups
from tenfold_slak.precision import voc_precision
from tenfold_slak.segment import described, load_backbone, refuse_settings

if TYPE_CHECKING:
    from tenfold_slak.train import Recipe

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOC_2007 = (
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/ (VOCtrainval_06-Nov-2007.tar, md5 c52e279531787c972589f7e41ab4ae64, "
    "and VOCtest_06-Nov-2007.tar, md5 b6e924de25625d8de591ea690078ad9f)"
)
Sample = tuple[Tensor, dict[str, Tensor]]


@dataclasses.dataclass
class Detection:
    """A detector's training (section 6); what the paper does not state for VOC is configurable."""

    data: Literal["coco", "voc2007"] = "coco"
    """The data set."""
    root: Path | None = None
    """Folder of ``train2017``, ``val2017`` and ``annotations``, or of ``VOCdevkit``; default: ``coco`` or ``voc`` in
    the data root."""
    heads: Literal["cascade", "mask", "box"] = "cascade"
    """Cascade Mask R-CNN, Mask R-CNN or Faster R-CNN."""
    epochs: int = 12
    """Passes over the training images."""
    milestones: list[int] = dataclasses.field(default_factory=lambda: [8, 11])
    """Epochs after which the learning rate falls to a tenth."""
    batch_size: int = 16
    """Images a step, over all processes."""
    lr: float = 2e-4
    """Learning rate."""
    warmup: int = 500
    """Steps of linear warmup from a thousandth."""
    weight_decay: float = 0.05
    """Of tensors with two and more dimensions."""
    layer_decay: float = 0.7
    """Factor of the learning rate from a layer to the one below it."""
    num_layers: int = 6
    """Of the rule of layers."""
    scales: list[int] = dataclasses.field(default_factory=lambda: list(range(480, 801, 32)))
    """Shorter sides of the training images, one drawn for each; the last is the evaluation's."""
    longest: int = 1333
    """The longer side at most."""
    channels: int = 256
    """Of the feature pyramid."""
    samples: int = 512
    """Regions of an image that the heads are trained on."""
    proposals: int = 1000
    """Regions of an image that the heads judge in evaluation, at most."""
    workers: int = 8
    """Processes that decode images."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before anything is."""
        refuse_settings(
            "detection",
            self,
            ("epochs", "batch_size", "num_layers", "longest", "channels", "samples", "proposals"),
            ("lr", "layer_decay"),
            ("weight_decay", "warmup", "workers"),
        )
        if not self.scales or min(self.scales) < 1:
            raise UserError(f"--detection.scales takes one side or more, each 1 or more, got {self.scales}")


def run_detection(run: Run, recipe: "Recipe") -> str:
    """Train and say what came out."""
    outcome = train_detector(run, recipe)
    return f"{recipe.arch} on {recipe.detection.data}: " + ", ".join(f"{k} {v:.2f}" for k, v in outcome.items())


# -- data --------------------------------------------------------------------------------------------------------------


class Coco(Dataset[Any]):
    """COCO 2017 as published: an image in [0, 1] and its boxes (xyxy), labels from 1 and masks; crowds and what is
    thinner than a pixel are left out.

    Raises:
        UserError: the set is not there, or damaged.

    """

    def __init__(self, root: Path | None, split: str, training: bool) -> None:
        self.folder = data_root() / "coco" if root is None else root
        self.file = self.folder / "annotations" / f"instances_{split}.json"
        if not self.file.is_file() or not (self.folder / split).is_dir():
            layout = f"{self.folder}/{{train2017,val2017}}/*.jpg and {self.folder}/annotations/instances_*.json"
            raise missing("COCO 2017", "https://cocodataset.org/#download", layout)
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
            categories = sorted(entry["id"] for entry in content["categories"])
            self.files = {entry["id"]: self.folder / split / entry["file_name"] for entry in content["images"]}
            by_image: dict[int, list[Any]] = {identity: [] for identity in self.files}
            for entry in content["annotations"]:
                if not entry.get("iscrowd") and min(entry["bbox"][2:]) >= 1:  # thinner ones hold no pixel to learn from
                    by_image[entry["image_id"]].append(entry)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.file} cannot be read ({error!r}): fetch it again") from error
        self.categories = categories
        self.annotations = by_image
        # An image without any object teaches the heads nothing; evaluation needs it.
        self.ids = [identity for identity, found in by_image.items() if found or not training]
        self.training, self.classes = training, len(categories) + 1

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        """An image and its objects."""
        from PIL import Image, ImageDraw  # noqa: PLC0415 - slow to import

        identity = self.ids[index]
        image = read_image(self.files[identity])
        boxes, labels, masks = [], [], []
        for entry in self.annotations[identity]:
            left, top, width, height = entry["bbox"]
            boxes.append([left, top, left + width, top + height])
            labels.append(1 + self.categories.index(entry["category_id"]))
            canvas = Image.new("1", (image.shape[2], image.shape[1]))
            for polygon in entry["segmentation"]:
                ImageDraw.Draw(canvas).polygon(polygon, fill=1)
            masks.append(torch.frombuffer(bytearray(canvas.convert("L").tobytes()), dtype=torch.uint8) // 255)
        stacked = torch.stack(masks) if masks else torch.zeros(0, image[0].numel(), dtype=torch.uint8)
        sample = targets(boxes, labels, identity), stacked.view(-1, *image.shape[1:])
        return augmented(image, {**sample[0], "masks": sample[1]}) if self.training else (image, sample[0])


class Voc(Dataset[Any]):
    """PASCAL VOC 2007 as published: trains on `trainval`, is evaluated on `test`; difficult objects are marked.

    Raises:
        UserError: the set is not there, or damaged.

    """

    categories = list(range(1, 21))
    classes = 21

    def __init__(self, root: Path | None, split: str, training: bool) -> None:
        root = data_root() / "voc" if root is None else root
        self.folder = root / "VOCdevkit" / "VOC2007" if (root / "VOCdevkit").is_dir() else root / "VOC2007"
        names = self.folder / "ImageSets" / "Main" / f"{split}.txt"
        if not names.is_file():
            raise missing("PASCAL VOC 2007", VOC_2007, f"{root}/VOCdevkit/VOC2007")
        self.names, self.training = names.read_text(encoding="utf-8").split(), training

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """An image and its objects."""
        file = self.folder / "Annotations" / f"{self.names[index]}.xml"
        try:
            objects = ElementTree.parse(file).getroot().findall("object")
            boxes = [[float(item.findtext(f"bndbox/{side}", "")) - 1 for side in ("xmin", "ymin")] for item in objects]
            boxes = [
                box + [float(item.findtext(f"bndbox/{side}", "")) for side in ("xmax", "ymax")]
                for box, item in zip(boxes, objects, strict=True)
            ]
            labels = [1 + VOC_CLASSES.index(item.findtext("name", "")) for item in objects]
            difficult = [item.findtext("difficult", "0") == "1" for item in objects]
        except (OSError, ValueError, ElementTree.ParseError) as error:
            raise UserError(f"{file} cannot be read ({error}): fetch PASCAL VOC again") from error
        image = read_image(self.folder / "JPEGImages" / f"{self.names[index]}.jpg")
        target = {**targets(boxes, labels, index), "difficult": torch.tensor(difficult, dtype=torch.bool)}
        if not self.training:
            return image, target
        easy = ~target.pop("difficult")
        return augmented(image, {**target, "boxes": target["boxes"][easy], "labels": target["labels"][easy]})


DATA: dict[str, tuple[type[Any], str, str]] = {
    "coco": (Coco, "train2017", "val2017"),
    "voc2007": (Voc, "trainval", "test"),
}


def read_image(file: Path) -> Float[Tensor, "3 height width"]:
    """An image in [0, 1].

    Raises:
        UserError: it cannot be read.

    """
    from PIL import Image  # noqa: PLC0415 - slow to import
    from torchvision.transforms.functional import to_tensor  # noqa: PLC0415

    try:
        with Image.open(file) as image:
            return to_tensor(image.convert("RGB"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error}): fetch it again") from error


def targets(boxes: Sequence[Sequence[float]], labels: Sequence[int], identity: int) -> dict[str, Tensor]:
    """Objects as torchvision's detectors take them."""
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "image_id": torch.tensor(identity),
    }


def augmented(image: Tensor, target: dict[str, Tensor]) -> Sample:
    """A flip, and for half of the images a crop as DETR makes them: resized to 400-600, then 384 to 600 pixels cut out.

    Resizing to one of the training scales follows inside the detector.
    """
    if random.random() < 0.5:
        image, target = flipped(image, target)
    if random.random() < 0.5:
        image, target = resized(image, target, random.choice((400, 500, 600)))
        height, width = (min(side, random.randint(min(384, side), min(600, side))) for side in image.shape[1:])
        top = random.randint(0, image.shape[1] - height)
        left = random.randint(0, image.shape[2] - width)
        cut = cropped(image, target, top, left, height, width)
        if len(cut[1]["boxes"]):  # a crop without any object is not taken
            return cut
    return image, target


def flipped(image: Tensor, target: Mapping[str, Tensor]) -> Sample:
    """Left and right exchanged."""
    found = dict(target)
    width = image.shape[2]
    left, top, right, bottom = found["boxes"].unbind(1)
    found["boxes"] = torch.stack([width - right, top, width - left, bottom], 1)
    if "masks" in found:
        found["masks"] = found["masks"].flip(2)
    return image.flip(2), found


def resized(image: Tensor, target: Mapping[str, Tensor], shorter: int) -> Sample:
    """The shorter side at `shorter` pixels."""
    found = dict(target)
    scale = shorter / min(image.shape[1:])
    size = [round(side * scale) for side in image.shape[1:]]
    found["boxes"] = found["boxes"] * torch.tensor([size[1] / image.shape[2], size[0] / image.shape[1]] * 2)
    if "masks" in found:
        found["masks"] = nn.functional.interpolate(found["masks"][None].float(), size, mode="nearest")[0].to(
            torch.uint8
        )
    return nn.functional.interpolate(image[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1), found


def cropped(image: Tensor, target: Mapping[str, Tensor], top: int, left: int, height: int, width: int) -> Sample:
    """A window; objects that keep less than a pixel in it are dropped."""
    found = dict(target)
    moved = found["boxes"] - torch.tensor([left, top, left, top])
    moved = torch.minimum(moved.clamp(min=0), torch.tensor([width, height, width, height]))
    kept = ((moved[:, 2:] - moved[:, :2]) >= 1).all(1)
    found["boxes"], found["labels"] = moved[kept], found["labels"][kept]
    if "masks" in found:
        found["masks"] = found["masks"][kept, top : top + height, left : left + width]
    return image[:, top : top + height, left : left + width], found


def collate(samples: list[Sample]) -> tuple["Moved", "Moved"]:
    """A batch: images differ in size, so they stay apart."""
    return Moved([sample[0] for sample in samples]), Moved([sample[1] for sample in samples])


class Moved(list[Any]):
    """A list of tensors or of dictionaries of tensors that goes to a device as a tensor does."""

    def to(self, device: Any, non_blocking: bool = False) -> "Moved":
        """The list on a device."""
        return Moved(
            {key: value.to(device, non_blocking=non_blocking) for key, value in item.items()}
            if isinstance(item, dict)
            else item.to(device, non_blocking=non_blocking)
            for item in self
        )


# -- training ----------------------------------------------------------------------------------------------------------


def detector(recipe: "Recipe", classes: int) -> nn.Module:
    """The recipe's detector, its backbone with the pretrained weights and their zeros where there are some."""
    settings = recipe.detection
    body = create(recipe.arch, drop_path_rate=recipe.drop_path, num_classes=0, **recipe.arguments)
    backbone = SLaKBackbone(body)
    load_backbone(backbone, recipe)
    build = {"cascade": cascade_mask_rcnn, "mask": mask_rcnn, "box": faster_rcnn}[settings.heads]
    return build(
        backbone, classes, settings.channels, box_batch_size_per_image=settings.samples,
        rpn_post_nms_top_n_test=settings.proposals, min_size=tuple(settings.scales), max_size=settings.longest,
    )  # fmt: skip


class Losses(nn.Module):
    """A detector whose forward pass is the sum of its losses, so that processes can share it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Moved, objects: Moved) -> Tensor:
        """The loss of a batch."""
        return torch.stack(list(self.model(list(images), list(objects)).values())).sum()


def step_rate(step: int, per_epoch: int, settings: Detection) -> float:
    """The learning rate of a step: linear warmup, then a tenth of it after each milestone."""
    rate = settings.lr * 0.1 ** sum(step // per_epoch >= epoch for epoch in settings.milestones)
    return rate * min(1.0, 0.001 + 0.999 * step / settings.warmup) if settings.warmup else rate


def train_detector(run: Run, recipe: "Recipe") -> dict[str, float]:
    """Train and evaluate; returns average precisions, per cent.

    Raises:
        UserError: the data set is not there, cannot be read, or does not fit the heads.

    """
    settings = recipe.detection
    if settings.data == "voc2007" and settings.heads != "box":
        raise UserError("PASCAL VOC has no masks to train on: use --detection.heads box")
    test_set = evaluation_images(settings)
    seed_everything(run.options.seed, "init")
    kind, train_split, _ = DATA[settings.data]
    train_set = kind(settings.root, train_split, True)
    check_categories(test_set, train_set.categories)
    batches = StreamedBatches(
        train_set, settings.batch_size, seed=derived_seed(run.options.seed, "train"), drop_last=True, rank=run.rank,
        world=run.world, device=run.device, workers=settings.workers, collate=collate,
    )  # fmt: skip
    model = detector(recipe, train_set.classes)
    depth = settings.num_layers
    groups = parameter_groups(
        model, settings.lr, settings.weight_decay, settings.layer_decay,
        lambda name: layer_id(name.removeprefix("backbone.body."), depth), depth + 1,
    )  # fmt: skip
    network, optimiser = run.prepare(Losses(model), torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True))
    stream, per_epoch = Stream(batches), len(batches)
    for step in run.steps("detect", settings.epochs * per_epoch, model=network, optimiser=optimiser):
        rate = step_rate(step, per_epoch, settings)
        for group in optimiser.param_groups:
            group["lr"] = rate * group["lr_scale"]
        loss = network(*stream[step])
        optimiser.zero_grad()
        run.backward(loss)
        optimiser.step()
        run.log(loss=run.reduce(loss.detach(), "mean"))
    model = run.unwrap(network).model
    model.backbone.body.apply_masks()
    outcome = {} if run.completed("detect") else evaluate_detector(model, test_set, run)
    outcome = run.complete("detect", run.unwrap(network), **outcome)
    about = {**described(recipe, settings), "categories": train_set.categories}
    run.save_weights("last", model, **about, **outcome)
    return outcome


# -- evaluation --------------------------------------------------------------------------------------------------------


def evaluation_images(settings: Detection) -> Any:
    """The images that average precision is measured on; what measures it is asked for first, not after all the rest."""
    if settings.data == "coco":
        _need_pycocotools()
    kind, _, split = DATA[settings.data]
    return kind(settings.root, split, False)


def check_categories(data: Any, trained: Sequence[int]) -> None:
    """Refuse images whose categories are not those that a network was trained on.

    Raises:
        UserError: they differ.

    """
    if data.categories != list(trained):
        raise UserError(
            f"{data.folder} has other categories ({len(data.categories)}, {data.categories[0]} first) than the network "
            f"was trained on ({len(trained)}, {trained[0]} first): choose the data set of its training"
        )


@torch.inference_mode()
def predictions(model: nn.Module, data: Any, run: Run) -> list[tuple[int, dict[str, Any]]]:
    """`(index of the image, what was found)` for all images, in their order, on the CPU; processes share the work.

    Masks are run lengths: a hundred of them as large as their image, of thousands of images, would fit no memory.
    """
    model.eval()
    found = []
    for index in range(run.rank, len(data), run.world):
        image, _ = data[index]
        with run.accelerator.autocast():
            (answer,) = model([image.to(run.device)])
        masks = {"masks": run_lengths(answer.pop("masks"))} if "masks" in answer else {}
        found.append((index, {**{name: value.float().cpu() for name, value in answer.items()}, **masks}))
    if run.world > 1:
        gathered: list[Any] = [None] * run.world
        torch.distributed.all_gather_object(gathered, found)
        found = [item for part in gathered for item in part]
    return sorted(found, key=lambda item: item[0])


def evaluate_detector(model: nn.Module, data: Any, run: Run) -> dict[str, float]:
    """COCO's average precisions of boxes and masks by pycocotools, or VOC's at an overlap of a half; per cent."""
    found = predictions(model, data, run)
    if isinstance(data, Coco):
        return coco_precision(found, data)
    truth = [data[index][1] for index, _ in found]
    found_boxes = [answer for _, answer in found]
    return {
        "map50": 100 * voc_precision(found_boxes, truth, data.classes),
        "map50_11_points": 100 * voc_precision(found_boxes, truth, data.classes, eleven_points=True),
    }


def _need_pycocotools() -> None:
    try:
        import pycocotools.mask  # noqa: F401, PLC0415 - an extra
    except ImportError as error:
        raise UserError("COCO's precision needs pycocotools: install tenfold-slak[coco]") from error


def run_lengths(masks: Float[Tensor, "objects 1 height width"]) -> list[dict[str, Any]]:
    """The masks where they are above a half, as COCO's run lengths."""
    _need_pycocotools()
    from pycocotools import mask as rle  # noqa: PLC0415 - an extra

    return [rle.encode(mask.numpy().T.copy("C").T) for mask in (masks[:, 0] > 0.5).byte().cpu()]


def coco_precision(found: Sequence[tuple[int, Mapping[str, Any]]], data: Coco) -> dict[str, float]:
    """`box_ap`, `box_ap50`, `box_ap75` and, where masks were found (as `run_lengths`), the same of `mask_`."""
    _need_pycocotools()
    from pycocotools.coco import COCO  # noqa: PLC0415 - an extra
    from pycocotools.cocoeval import COCOeval  # noqa: PLC0415 - an extra

    with contextlib.redirect_stdout(io.StringIO()):  # it narrates what it does
        truth = COCO(str(data.file))
    entries = []
    for index, answer in found:
        for i, box in enumerate(answer["boxes"].tolist()):
            entry = {
                "image_id": data.ids[index],
                "category_id": data.categories[int(answer["labels"][i]) - 1],
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                "score": float(answer["scores"][i]),
            }
            if "masks" in answer:
                entry["segmentation"] = answer["masks"][i]
            entries.append(entry)
    kinds = {"box": "bbox", **({"mask": "segm"} if found and "masks" in found[0][1] else {})}
    scores: dict[str, float] = {}
    for name, kind in kinds.items():
        values = [0.0, 0.0, 0.0]
        if entries:
            with contextlib.redirect_stdout(io.StringIO()):
                judge = COCOeval(truth, truth.loadRes(entries), kind)
                judge.evaluate()
                judge.accumulate()
                judge.summarize()
            values = [float(value) for value in judge.stats[:3]]
        scores |= {f"{name}_ap{suffix}": 100 * value for suffix, value in zip(("", "50", "75"), values, strict=True)}
    return scores
