"""Semantic segmentation by UPerNet on ADE20K (section 6), without mmseg: the data set, the loop, the mean IoU."""

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from tenfold_shared.batches import Stream, StreamedBatches
from tenfold_shared.download import data_root, missing
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, derived_seed, seed_everything
from tenfold_slak.compat import CheckpointError, from_convnext
from tenfold_slak.data import IMAGENET_MEAN, IMAGENET_STD
from tenfold_slak.downstream import SLaKBackbone, UPerNet
from tenfold_slak.evaluate import load_model
from tenfold_slak.models.slak import SLaK, create
from tenfold_slak.optim import parameter_groups, stage_id

if TYPE_CHECKING:
    from tenfold_slak.train import Recipe

ADE20K = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
IGNORED = 255


@dataclasses.dataclass
class Segmentation:
    """UPerNet's training (section 6)."""

    root: Path | None = None
    """Folder that holds ``ADEChallengeData2016``; default: the data root."""
    classes: int = 150
    """Classes; label 0 of the files is ignored, label k is class k - 1."""
    iterations: int = 160_000
    """Optimiser steps."""
    batch_size: int = 16
    """Images a step, over all processes."""
    crop: int = 512
    """Side of the training crops, of the evaluation's windows and of the evaluated images' shorter side, pixels."""
    stride: int = 341
    """Of the evaluation's windows, pixels."""
    lr: float = 1e-4
    """Learning rate after the warmup, falling to zero linearly."""
    weight_decay: float = 0.05
    """Of tensors with two and more dimensions."""
    stage_decay: float = 0.9
    """Factor of the learning rate from a stage to the one below it."""
    num_layers: int = 6
    """Of the rule of stages: 6 for SLaK-T, 12 for S and B."""
    warmup: int = 1500
    """Steps of linear warmup from a millionth of the learning rate."""
    channels: int = 512
    """Of the head."""
    workers: int = 8
    """Processes that decode and augment images."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before anything is."""
        refuse_settings(
            "segmentation",
            self,
            ("classes", "iterations", "batch_size", "crop", "stride", "num_layers", "channels"),
            ("lr", "stage_decay"),
            ("weight_decay", "warmup", "workers"),
        )
        if self.stride > self.crop:
            raise UserError(
                f"--segmentation.stride is {self.stride} and --segmentation.crop {self.crop}: windows that lie further "
                "apart than they are wide leave pixels out"
            )


def refuse_settings(
    group: str, settings: Any, counts: Sequence[str], positive: Sequence[str], others: Sequence[str]
) -> None:
    """Raise UserError for counts below 1, for what is not above 0, and for others below 0, by name."""
    for names, least, words in ((counts, 1, "1 or more"), (others, 0, "0 or more")):
        for name in names:
            if not getattr(settings, name) >= least:
                raise UserError(f"--{group}.{name} takes {words}, got {getattr(settings, name)}")
    for name in positive:
        if not 0 < getattr(settings, name) < float("inf"):
            raise UserError(f"--{group}.{name} takes a positive number, got {getattr(settings, name)}")


class ADE(Dataset[Any]):
    """`images/{training,validation}/*.jpg` and `annotations/{training,validation}/*.png`, as published.

    Samples are a normalised image (3, H, W) and its labels (H, W), 255 where nothing is known.

    Args:
        root: the folder `ADEChallengeData2016`, or the one that holds it.
        split: `training` or `validation`.
        transform: of a PIL image and its labels.
        classes: that the labels may tell apart.

    Raises:
        UserError: the set is not there, an image has no labels, or labels go beyond the classes.

    """

    def __init__(
        self, root: Path | None, split: str, transform: Callable[[Any, Any], tuple[Tensor, Tensor]], classes: int
    ) -> None:
        root = data_root() if root is None else root
        folder = root if (root / "images").is_dir() else root / "ADEChallengeData2016"
        if not (folder / "images" / split).is_dir():
            raise missing("ADE20K", ADE20K, f"{folder}/{{images,annotations}}/{{training,validation}}/*")
        self.images = sorted((folder / "images" / split).glob("*.jpg"))
        self.labels = [folder / "annotations" / split / f"{image.stem}.png" for image in self.images]
        for image, label in zip(self.images, self.labels, strict=True):
            if not label.is_file():
                raise UserError(f"{image} has no labels {label}: fetch ADE20K again")
        if not self.images:
            raise UserError(f"{folder / 'images' / split} has no .jpg files: fetch ADE20K again")
        self.transform, self.classes = transform, classes

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """An image and its labels, transformed."""
        from PIL import Image  # noqa: PLC0415 - slow to import

        try:
            with Image.open(self.images[index]) as image, Image.open(self.labels[index]) as label:
                pixels, classes = self.transform(image.convert("RGB"), label.convert("L"))
        except OSError as error:
            raise UserError(f"{self.images[index]} or its labels cannot be read ({error}): fetch it again") from error
        last = int(classes.masked_fill(classes == IGNORED, -1).max())
        if last >= self.classes:
            raise UserError(
                f"{self.labels[index]} has the label {last + 1}, and the network tells {self.classes} classes apart: "
                "the data and --segmentation.classes do not fit"
            )
        return pixels, classes


def _to_tensors(image: Any, label: Any) -> tuple[Tensor, Tensor]:
    from torchvision.transforms import functional  # noqa: PLC0415 - slow to import

    pixels = functional.normalize(functional.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)
    classes = functional.pil_to_tensor(label)[0].long() - 1
    return pixels, classes.masked_fill(classes < 0, IGNORED)


def training_transform(crop: int) -> Callable[[Any, Any], tuple[Tensor, Tensor]]:
    """Scaled by 0.5 to 2, a crop that no class fills by more than 75 % (ten tries), flip, colour jitter."""
    from torchvision.transforms import ColorJitter, InterpolationMode, functional  # noqa: PLC0415 - slow to import

    jitter = ColorJitter(brightness=32 / 255, contrast=0.5, saturation=0.5, hue=18 / 255)

    def transform(image: Any, label: Any) -> tuple[Tensor, Tensor]:
        scale = random.uniform(0.5, 2.0) * crop / min(image.size)
        size = [max(1, round(side * scale)) for side in reversed(image.size)]
        image = functional.resize(image, size)
        label = functional.resize(label, size, InterpolationMode.NEAREST)
        pixels, classes = _to_tensors(jitter(image), label)
        short = [max(0, crop - side) for side in pixels.shape[1:]]
        pixels = nn.functional.pad(pixels, (0, short[1], 0, short[0]))
        classes = nn.functional.pad(classes, (0, short[1], 0, short[0]), value=IGNORED)
        for _ in range(10):
            top, left = (random.randint(0, side - crop) for side in classes.shape)
            part = classes[top : top + crop, left : left + crop]
            counts = part[part != IGNORED].bincount()
            if len(counts) and int((counts > 0).sum()) > 1 and counts.max() < 0.75 * counts.sum():
                break
        pixels = pixels[:, top : top + crop, left : left + crop]
        return (pixels.flip(2), part.flip(1)) if random.random() < 0.5 else (pixels, part)

    return transform


def evaluation_transform(crop: int) -> Callable[[Any, Any], tuple[Tensor, Tensor]]:
    """The shorter side to the crop; the labels stay as large as they are."""
    from torchvision.transforms import functional  # noqa: PLC0415 - slow to import

    def transform(image: Any, label: Any) -> tuple[Tensor, Tensor]:
        pixels, classes = _to_tensors(functional.resize(image, crop), label)
        return pixels, classes

    return transform


def confusion(
    predicted: Int[Tensor, "..."], labels: Int[Tensor, "..."], classes: int
) -> Int[Tensor, "{classes} {classes}"]:
    """Counts `[label, prediction]` over all positions whose label is known."""
    known = labels != IGNORED
    index = labels[known] * classes + predicted[known]
    return index.bincount(minlength=classes * classes).view(classes, classes)


def mean_iou(matrix: Tensor) -> Float[Tensor, ""]:
    """Mean over the classes that occur of intersection over union, from total counts, per cent."""
    matrix = matrix.double()
    intersection = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - intersection
    return 100 * (intersection / union)[union > 0].mean()


def poly_rate(step: int, settings: Segmentation) -> float:
    """The learning rate of a step: linear warmup from a millionth, times a line to zero."""
    rate = settings.lr * (1 - step / settings.iterations)
    if step < settings.warmup:
        rate *= 1 - (1 - step / settings.warmup) * (1 - 1e-6)
    return rate


def segmenter(recipe: "Recipe") -> UPerNet:
    """UPerNet on the recipe's backbone, with the pretrained weights and their zeros where there are some."""
    body = create(recipe.arch, drop_path_rate=recipe.drop_path, num_classes=0, **recipe.arguments)
    backbone = SLaKBackbone(body)
    load_backbone(backbone, recipe)
    return UPerNet(backbone, recipe.segmentation.classes, recipe.segmentation.channels)


def load_backbone(backbone: SLaKBackbone, recipe: "Recipe") -> None:
    """Fill a backbone with the recipe's pretrained weights; their zeros stay zero unless training is dense."""
    if recipe.pretrained is not None:
        trained, _ = load_model(recipe.pretrained)
        try:
            network = trained if isinstance(trained, SLaK) else from_convnext(trained.state_dict())
        except CheckpointError as error:
            raise UserError(f"--pretrained {recipe.pretrained} is neither a SLaK nor a ConvNeXt: {error}") from error
        backbone.load(network.state_dict(), sparse=recipe.sparse.sparsity > 0)


def train_segmenter(run: Run, recipe: "Recipe") -> dict[str, Any]:
    """Train and evaluate; returns the mean IoU and the costs.

    Raises:
        UserError: the data set is not there, or cannot be read.

    """
    settings = recipe.segmentation
    seed_everything(run.options.seed, "init")
    train_set = ADE(settings.root, "training", training_transform(settings.crop), settings.classes)
    test_set = evaluation_images(settings)
    batches = StreamedBatches(
        train_set, settings.batch_size, seed=derived_seed(run.options.seed, "train"), drop_last=True, rank=run.rank,
        world=run.world, device=run.device, workers=settings.workers,
    )  # fmt: skip
    model = segmenter(recipe)
    depth = settings.num_layers
    groups = parameter_groups(
        model, settings.lr, settings.weight_decay, settings.stage_decay, lambda name: stage_id(name, depth), depth + 1
    )
    network, optimiser = run.prepare(Losses(model), torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True))
    stream = Stream(batches)
    for step in run.steps("segment", settings.iterations, model=network, optimiser=optimiser):
        rate = poly_rate(step, settings)
        for group in optimiser.param_groups:
            group["lr"] = rate * group["lr_scale"]
        loss = network(*stream[step])
        optimiser.zero_grad()
        run.backward(loss)
        optimiser.step()
        run.log(loss=run.reduce(loss.detach(), "mean"))
    model = run.unwrap(network).model
    model.backbone.apply_masks()
    outcome = {} if run.completed("segment") else {"miou": evaluate_segmenter(model, test_set, settings, run)}
    outcome = run.complete("segment", run.unwrap(network), **outcome)
    run.save_weights("last", model, **described(recipe, settings), **outcome)
    return outcome


def described(recipe: "Recipe", settings: Any) -> dict[str, Any]:
    """What a checkpoint says of itself: how its network is built again, and what it is evaluated on and how."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()}
    return {"task": recipe.task, "arch": recipe.arch, "arguments": recipe.arguments, "settings": plain}


def evaluation_images(settings: Segmentation) -> ADE:
    """The validation images, as the mean IoU takes them."""
    return ADE(settings.root, "validation", evaluation_transform(settings.crop), settings.classes)


class Losses(nn.Module):
    """A segmenter whose forward pass is its loss, so that processes can share it."""

    def __init__(self, model: UPerNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch."""
        return self.model.loss(images, labels)


@torch.inference_mode()
def evaluate_segmenter(model: UPerNet, data: ADE, settings: Segmentation, run: Run) -> float:
    """Mean IoU over sliding windows, at the size of the labels; every process takes its share of the images."""
    model.eval()
    total = torch.zeros(settings.classes, settings.classes, dtype=torch.int64, device=run.device)
    for image, labels in _share(data, run):
        with run.accelerator.autocast():
            scores = model.slide(image[None].to(run.device), settings.crop, settings.stride).float()
        scores = nn.functional.interpolate(scores, size=labels.shape, mode="bilinear", align_corners=False)
        total += confusion(scores[0].argmax(0), labels.to(run.device), settings.classes)
    return float(mean_iou(run.reduce(total)))


def _share(data: ADE, run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    for index in range(run.rank, len(data), run.world):
        yield data[index]


def run_segmentation(run: Run, recipe: "Recipe") -> str:
    """Train and say what came out."""
    outcome = train_segmenter(run, recipe)
    return f"{recipe.arch} with UPerNet on ADE20K: mIoU {outcome['miou']:.2f} %"
