"""The paper's data sets (section 5) as batches for the two levels and for evaluation."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tenfold_shared.download import data_root
from tenfold_shared.errors import UserError
from tenfold_shared.images import (
    Batches,
    Flip,
    ImageSet,
    RandomCrop,
    Shift,
    StreamedBatches,
    imagenet_transform,
    load_images,
    measured_normalisation,
    normalisation,
    split_train_validation,
    stream_images,
)
from tenfold_shared.run import Run, derived_seed

DataName = Literal["digits", "cifar10", "cifar100", "tiny-imagenet", "imagenet", "fashion-mnist", "mnist", "folder"]


@dataclasses.dataclass
class DataConfig:
    """Which images, and which of them serve which purpose."""

    name: DataName = "digits"
    """The data set; ``folder`` is any folder of ``train/<class>/*`` and ``test/<class>/*`` images of one size."""
    root: Path | None = None
    """Folder of the data set, looked for here and in the data root; default: the data root itself ($TENFOLD_DATA or the
    platform's cache)."""
    download: bool = False
    """Fetch the data set when it is not there."""
    validation: float = 0.0
    """Fraction of the training images held out and evaluated on in place of the test images; for choosing values."""
    upper: Literal["train", "heldout"] = "train"
    """What the upper level sees: the training images in another order (the paper), or a tenth held out from them."""
    official_split: bool = False
    """Tiny-ImageNet: evaluate on half of the validation images, as the released code does."""
    workers: int = 8
    """Processes that decode ImageNet."""

    def __post_init__(self) -> None:
        """Refuse fractions that are none."""
        if not 0.0 <= self.validation < 1.0:
            raise UserError(f"--data.validation is a fraction of the training images in [0, 1), got {self.validation}")


EVALUATION_BATCH = 1000  # images at a time in each process: no gradients are kept, so it may be large


class Data(NamedTuple):
    """The data set as the loops see it. ``scoring`` is the lower level's batches, whole in every process."""

    lower: Batches | StreamedBatches
    upper: Batches | StreamedBatches
    scoring: Batches | StreamedBatches
    evaluation: Batches | StreamedBatches
    classes: int
    shape: tuple[int, ...]


def load_data(config: DataConfig, batch_size: int, run: Run) -> Data:
    """The data set on the run's device, cut by its processes.

    Augmentation is the paper's: random crops with 4 pixels of padding and flips (no flips for digits, which are rolled
    by at most one pixel); ImageNet's random resized crops. Tiny-ImageNet is padded in normalised space, as released.

    Raises:
        UserError: the data set is not there, or cannot be read; there are fewer than two classes.

    """
    if config.root is not None and not config.root.exists():
        config = dataclasses.replace(config, root=data_root() / config.root)
    if config.name == "imagenet":
        return _imagenet(config, batch_size, run)
    seed, name = run.options.seed, config.name
    options = {"official_split": True} if config.official_split else {}
    train = load_images(name, config.root, "train", download=config.download, **options)
    if len(train.classes) < 2:
        raise UserError(f"{name} has {len(train.classes)} class: a classifier needs at least 2")
    if config.validation:
        train, held_out = split_train_validation(train, config.validation, derived_seed(seed, "validation"))
    else:
        held_out = load_images(name, config.root, "test", **options)
    mean, std = measured_normalisation(train) if name == "folder" else normalisation(name)
    upper = train
    if config.upper == "heldout":
        train, upper = split_train_validation(train, 0.1, derived_seed(seed, "upper"))
    augment: list[Any] = (
        [Shift(1)] if name == "digits" else [RandomCrop(4)] if name == "mnist" else [RandomCrop(4), Flip()]
    )

    def batches(chosen: ImageSet, purpose: str, *, training: bool, whole: bool = False) -> Batches:
        return Batches(
            chosen.images,
            chosen.labels,
            min(batch_size, len(chosen)) if training else EVALUATION_BATCH * run.world,
            seed=derived_seed(seed, purpose),
            shuffle=training,
            augment=augment if training else (),
            mean=mean,
            std=std,
            fill="mean" if name == "tiny-imagenet" else "black",
            drop_last=training,
            rank=0 if whole else run.rank,
            world=1 if whole else run.world,
            device=run.device,
        )

    return Data(
        lower=batches(train, "lower", training=True),
        upper=batches(upper, "upper", training=True),
        scoring=batches(train, "lower", training=True, whole=True),
        evaluation=batches(held_out, "evaluation", training=False),
        classes=len(train.classes),
        shape=tuple(train.images.shape[1:]),
    )


def _imagenet(config: DataConfig, batch_size: int, run: Run) -> Data:
    """ImageNet, decoded by worker processes."""
    train, test = (
        stream_images("imagenet", config.root, split, imagenet_transform(split == "train"))
        for split in ("train", "test")
    )

    def batches(dataset: Any, purpose: str, *, training: bool, whole: bool = False) -> StreamedBatches:
        return StreamedBatches(
            dataset,
            batch_size,
            seed=derived_seed(run.options.seed, purpose),
            shuffle=training,
            drop_last=training,
            rank=0 if whole else run.rank,
            world=1 if whole else run.world,
            device=run.device,
            workers=config.workers,
        )

    return Data(
        lower=batches(train, "lower", training=True),
        upper=batches(train, "upper", training=True),
        scoring=batches(train, "lower", training=True, whole=True),
        evaluation=batches(test, "evaluation", training=False),
        classes=len(train.classes),
        shape=(3, 224, 224),
    )
