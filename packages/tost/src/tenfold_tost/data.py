"""The paper's data sets (section 5) as batches for training, for the dev set and for the test."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tenfold_shared.download import data_root
from tenfold_shared.errors import UserError
from tenfold_shared.images import (
    Batches,
    Flip,
    ImageSet,
    RandomCrop,
    Shift,
    load_images,
    measured_normalisation,
    normalisation,
    split_train_validation,
)
from tenfold_shared.run import Run, derived_seed

DataName = Literal["digits", "cifar10", "cifar100", "tiny-imagenet", "fashion-mnist", "mnist", "folder"]
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # the release's constants, for CIFAR-100 too
EVALUATION_BATCH = 1000  # images at a time in each process: no gradients are kept, so it may be large


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
    dev: int = 0
    """Training images held out; the epoch that is best on them is reported beside the last."""
    dev_split: Literal["first", "random"] = "random"
    """Hold out the first images (as released for CIFAR, whose order is random), or a random choice."""
    judge: Literal["test", "dev"] = "test"
    """Evaluate on the test images, or on the held-out ones in their place; for choosing values."""

    def __post_init__(self) -> None:
        """Refuse what cannot be held out."""
        if self.dev < 0:
            raise UserError(f"--data.dev takes 0 or more images, got {self.dev}")
        if self.judge == "dev" and not self.dev:
            raise UserError("--data.judge dev needs held-out images: add --data.dev 200")


class Data(NamedTuple):
    """The data set as the loops see it. ``scoring`` is the training batches, whole in every process."""

    train: Batches
    scoring: Batches
    dev: Batches | None
    evaluation: Batches
    classes: int
    shape: tuple[int, ...]

    @property
    def example(self) -> Tensor:
        """A batch of the right shape, on the CPU."""
        return torch.zeros(2, *self.shape)


def load_data(
    config: DataConfig, batch_size: int, run: Run, raw: bool = False, evaluation_batch: int | None = None
) -> Data:
    """The data set on the run's device, cut by its processes.

    Augmentation is the release's: random crops with 4 pixels of padding and flips (digits are rolled by at most one
    pixel instead, MNIST is not flipped).

    Args:
        config: which images.
        batch_size: over all processes.
        run: for device, processes and seed.
        raw: leave pixels in [0, 1], for networks that normalise inside.
        evaluation_batch: images at a time in evaluation, over all processes; default: a thousand in each.

    Raises:
        UserError: the data set is not there, or cannot be read; there are fewer than two classes.

    """
    if config.root is not None and not config.root.exists():
        config = dataclasses.replace(config, root=data_root() / config.root)
    seed, name = run.options.seed, config.name
    train = load_images(name, config.root, "train", download=config.download)
    held_out = None
    if config.dev:
        train, held_out = _split(train, config, seed)
    test = held_out if config.judge == "dev" and held_out is not None else load_images(name, config.root, "test")
    if len(train.classes) < 2:
        raise UserError(f"{name} has {len(train.classes)} class: a classifier needs at least 2")
    mean, std = ((0.0,), (1.0,)) if raw else _normalisation(name, train)
    augment: list[Any] = (
        [Shift(1)] if name == "digits" else [RandomCrop(4)] if name == "mnist" else [RandomCrop(4), Flip()]
    )

    def batches(chosen: ImageSet, purpose: str, *, training: bool, whole: bool = False) -> Batches:
        return Batches(
            chosen.images,
            chosen.labels,
            min(batch_size, len(chosen)) if training else evaluation_batch or EVALUATION_BATCH * run.world,
            seed=derived_seed(seed, purpose),
            shuffle=training,
            augment=augment if training else (),
            mean=mean,
            std=std,
            drop_last=training,
            rank=0 if whole else run.rank,
            world=1 if whole else run.world,
            device=run.device,
        )

    return Data(
        train=batches(train, "train", training=True),
        scoring=batches(train, "scoring", training=True, whole=True),
        dev=None if held_out is None else batches(held_out, "dev", training=False),
        evaluation=batches(test, "evaluation", training=False),
        classes=len(train.classes),
        shape=tuple(train.images.shape[1:]),
    )


def _split(train: ImageSet, config: DataConfig, seed: int) -> tuple[ImageSet, ImageSet]:
    if config.dev_split == "random":
        return split_train_validation(train, config.dev, derived_seed(seed, "dev"))
    if config.dev >= len(train):
        raise UserError(f"--data.dev {config.dev}: {config.name} has {len(train)} training images")
    order = torch.arange(len(train))
    held_out = train.subset(order[: config.dev])
    if len(held_out.labels.unique()) < len(train.classes):
        raise UserError(
            f"the first {config.dev} images of {config.name} lack a class, so they are no dev set: --data.dev_split random"
        )
    return train.subset(order[config.dev :]), held_out


def _normalisation(name: str, train: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if name in ("cifar10", "cifar100"):
        return CIFAR
    return measured_normalisation(train) if name == "folder" else normalisation(name)
