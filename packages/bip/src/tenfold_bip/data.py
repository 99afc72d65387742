"""The paper's data sets (section 5) as batches for the two levels and for evaluation."""

import copy
import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch.utils.data import Subset

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
    split_positions,
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
        """Refuse fractions that are none, and a split that the set does not have."""
        if not 0.0 <= self.validation < 1.0:
            raise UserError(f"--data.validation is a fraction of the training images in [0, 1), got {self.validation}")
        if self.official_split and self.name != "tiny-imagenet":
            raise UserError(f"--data.official_split is a split of tiny-imagenet, which {self.name} does not have")
        if self.workers < 0:
            raise UserError(f"--data.workers takes 0 or more processes, got {self.workers}")


EVALUATION_BATCH = 1000  # images at a time in each process: no gradients are kept, so it may be large
UPPER_PART = 0.1  # of the training images, where the upper level has its own


class Evaluation(NamedTuple):
    """The images that a network is judged on."""

    evaluation: Batches | StreamedBatches
    classes: int
    shape: tuple[int, ...]


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
    if config.name == "imagenet":
        return _imagenet(config, batch_size, run)
    seed, name = run.options.seed, config.name
    train, held_out = _in_memory(config, seed)
    mean, std = _statistics(name, train)
    upper = train
    if config.upper == "heldout":
        train, upper = split_train_validation(train, UPPER_PART, derived_seed(seed, "upper"))
    augment: list[Any] = (
        [Shift(1)] if name == "digits" else [RandomCrop(4)] if name == "mnist" else [RandomCrop(4), Flip()]
    )

    def batches(chosen: ImageSet, purpose: str, *, whole: bool = False) -> Batches:
        return Batches(
            chosen.images,
            chosen.labels,
            min(batch_size, len(chosen)),
            seed=derived_seed(seed, purpose),
            augment=augment,
            mean=mean,
            std=std,
            fill="mean" if name == "tiny-imagenet" else "black",
            drop_last=True,
            rank=0 if whole else run.rank,
            world=1 if whole else run.world,
            device=run.device,
        )

    return Data(
        lower=batches(train, "lower"),
        upper=batches(upper, "upper"),
        scoring=batches(train, "lower", whole=True),
        evaluation=_judged(held_out, mean, std, EVALUATION_BATCH, run),
        classes=len(train.classes),
        shape=tuple(train.images.shape[1:]),
    )


def load_evaluation(config: DataConfig, batch_size: int, run: Run) -> Evaluation:
    """The evaluation images of `load_data`, ``batch_size`` at a time in each process, without reading the others.

    Raises:
        UserError: the data set is not there, or cannot be read.

    """
    seed, name = run.options.seed, config.name
    if name == "imagenet":
        dataset, classes = _stream(config, "test") if not config.validation else _stream_parts(config, seed)[1:]
        return Evaluation(_streamed(dataset, "evaluation", batch_size * run.world, config, run), classes, (3, 224, 224))
    if config.validation or name == "folder":  # held out from the training images, or normalised by their statistics
        train, held_out = _in_memory(config, seed)
    else:
        train = held_out = _images(config, "test")
    batches = _judged(held_out, *_statistics(name, train), batch_size, run)
    return Evaluation(batches, len(held_out.classes), tuple(held_out.images.shape[1:]))


# -- sets in memory -------------------------------------------------------------------------------------------------------


def _root(config: DataConfig) -> Path | None:
    return data_root() / config.root if config.root is not None and not config.root.exists() else config.root


def _images(config: DataConfig, split: str) -> ImageSet:
    options = {"official_split": True} if config.official_split else {}
    return load_images(config.name, _root(config), split, download=config.download, **options)


def _in_memory(config: DataConfig, seed: int) -> tuple[ImageSet, ImageSet]:
    """Images to train on, and those to be judged on."""
    train = _images(config, "train")
    if len(train.classes) < 2:
        raise UserError(f"{config.name} has {len(train.classes)} class: a classifier needs at least 2")
    if config.validation:
        return split_train_validation(train, config.validation, derived_seed(seed, "validation"))
    return train, _images(config, "test")


def _statistics(name: str, train: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return measured_normalisation(train) if name == "folder" else normalisation(name)


def _judged(chosen: ImageSet, mean: tuple[float, ...], std: tuple[float, ...], size: int, run: Run) -> Batches:
    return Batches(
        chosen.images,
        chosen.labels,
        size * run.world,
        shuffle=False,
        mean=mean,
        std=std,
        rank=run.rank,
        world=run.world,
        device=run.device,
    )


# -- ImageNet, decoded by worker processes --------------------------------------------------------------------------------


def _imagenet(config: DataConfig, batch_size: int, run: Run) -> Data:
    seed = run.options.seed
    train, held_out, classes = _stream_parts(config, seed)
    upper = train
    if config.upper == "heldout":
        rest, chosen = split_positions(len(train), UPPER_PART, derived_seed(seed, "upper"))
        train, upper = Subset(train, rest.tolist()), Subset(train, chosen.tolist())
    return Data(
        lower=_streamed(train, "lower", batch_size, config, run, training=True),
        upper=_streamed(upper, "upper", batch_size, config, run, training=True),
        scoring=_streamed(train, "lower", batch_size, config, run, training=True, whole=True),
        evaluation=_streamed(held_out, "evaluation", batch_size, config, run),
        classes=classes,
        shape=(3, 224, 224),
    )


def _stream(config: DataConfig, split: str) -> tuple[Any, int]:
    """The images of a split as they are decoded for it, and how many classes they have."""
    dataset = stream_images("imagenet", _root(config), split, imagenet_transform(split == "train"))
    return dataset, len(dataset.classes)


def _stream_parts(config: DataConfig, seed: int) -> tuple[Any, Any, int]:
    """Images to train on, those to be judged on, and how many classes they have."""
    train, classes = _stream(config, "train")
    if not config.validation:
        return train, _stream(config, "test")[0], classes
    judged = copy.copy(train)
    judged.transform = imagenet_transform(False)
    rest, chosen = split_positions(len(train), config.validation, derived_seed(seed, "validation"))
    return Subset(train, rest.tolist()), Subset(judged, chosen.tolist()), classes


def _streamed(
    dataset: Any, purpose: str, size: int, config: DataConfig, run: Run, *, training: bool = False, whole: bool = False
) -> StreamedBatches:
    return StreamedBatches(
        dataset,
        size,
        seed=derived_seed(run.options.seed, purpose),
        shuffle=training,
        drop_last=training,
        rank=0 if whole else run.rank,
        world=1 if whole else run.world,
        device=run.device,
        workers=config.workers,
    )
