"""The paper's image sets (section 5) and the embedded ones, as batches for training, for SNIP and for evaluation."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from tenfold_shared.batches import generator
from tenfold_shared.download import data_root
from tenfold_shared.errors import UserError
from tenfold_shared.images import (
    Batches,
    ImageSet,
    StreamedBatches,
    load_images,
    split_train_validation,
    stream_images,
)
from tenfold_shared.run import Run, derived_seed

DataName = Literal["row-cue", "digits", "pictures", "cifar10", "cifar100", "imagenet", "folder"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EMBEDDED = frozenset({"row-cue", "digits", "pictures"})
EVALUATION_BATCH = 256  # images at a time in each process

#: Colour photographs inside scikit-image.
PICTURES = (
    "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
    "retina.jpg", "rocket.jpg",
)  # fmt: skip


@dataclasses.dataclass
class DataConfig:
    """Which images, and how they are augmented."""

    name: DataName = "row-cue"
    """The set. Embedded: ``row-cue`` (which of four digits does a far-away cue point at), ``digits`` enlarged to 32
    pixels, ``pictures`` (crops of eight photographs); ``folder`` is ``train/<class>/*`` and ``test/<class>/*``."""
    root: Path | None = None
    """Folder of the data set, looked for here and in the data root; default: the data root itself ($TENFOLD_DATA or the
    platform's cache)."""
    download: bool = False
    """Fetch the data set when it is not there (CIFAR)."""
    validation: float = 0.0
    """Fraction of the training images held out and evaluated on in place of the test images; for choosing values."""
    size: int = 224
    """Side of the images, pixels; row-cue has 64 and digits 32."""
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    """timm's policy for images that are streamed; empty: colour jitter of 0.4 in its place."""
    random_erasing: float = 0.25
    """Probability that a rectangle is replaced by noise, pixel by pixel."""
    workers: int = 8
    """Processes that decode and augment images."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for name, value in (("validation", self.validation), ("random_erasing", self.random_erasing)):
            if not 0.0 <= value < 1.0:
                raise UserError(f"--data.{name} is a fraction in [0, 1), got {value}")
        if self.size < 1 or self.workers < 0:
            raise UserError(f"--data.size and --data.workers take sizes, got {self.size} and {self.workers}")


class Evaluation(NamedTuple):
    """The images that a network is evaluated on."""

    batches: Batches | StreamedBatches
    classes: int
    shape: tuple[int, int, int]


class Data(NamedTuple):
    """The data set as the loops see it. ``scoring`` gives the training batches whole in every process, for SNIP."""

    train: Batches | StreamedBatches
    scoring: Batches | StreamedBatches
    evaluation: Batches | StreamedBatches
    classes: int
    shape: tuple[int, int, int]


def load_data(config: DataConfig, batch_size: int, run: Run) -> Data:
    """The data set on the run's device, cut by its processes.

    The embedded sets are not augmented. The others are, as in the paper: timm's random resized crop (up to 32 pixels a
    crop of the image padded by 4), flip, RandAugment and random erasing; they are evaluated on the central 87.5 %.

    Raises:
        UserError: the data set is not there, or cannot be read.

    """
    train, evaluation = chosen_images(config, True, run.options.seed), load_evaluation(config, run)
    return Data(
        train=_batches(train, config, "train", batch_size, run),
        scoring=_batches(train, config, "train", batch_size, run, whole=True),
        evaluation=evaluation.batches,
        classes=evaluation.classes,
        shape=evaluation.shape,
    )


def load_evaluation(config: DataConfig, run: Run, batch_size: int = EVALUATION_BATCH) -> Evaluation:
    """The evaluation images alone: the training images of ImageNet and of a folder need not be there.

    Args:
        config: which images.
        run: its device holds the batches, its processes share them.
        batch_size: images at a time in each process.

    Raises:
        UserError: the data set is not there, or cannot be read.

    """
    images = chosen_images(config, False, run.options.seed)
    size = (config.size, config.size)
    channels, height, width = images.images.shape[1:] if isinstance(images, ImageSet) else (3, *size)
    batches = _batches(images, config, "evaluation", batch_size * run.world, run)
    return Evaluation(batches, len(images.classes), (channels, height, width))


def chosen_images(config: DataConfig, training: bool, seed: int) -> Any:
    """The images to train or to evaluate on, with `classes`: an `ImageSet` of an embedded set, others transformed.

    Args:
        config: which.
        training: the training images and their transform.
        seed: of the part that ``config.validation`` holds out.

    Raises:
        UserError: the data set is not there, or cannot be read.

    """
    part = 0 if training else 1
    if config.name in EMBEDDED:
        return embedded_sets(config.name, config.size, config.validation)[part]
    root, transform = found_folder(config.root), transforms(config)[part]
    if config.name in {"imagenet", "folder"}:
        if config.validation:
            raise UserError(f"--data.validation is not there for {config.name}: hold out a folder of your own")
        return stream_images(config.name, root, "train" if training else "test", transform)
    split = "train" if training or config.validation else "test"
    images = load_images(config.name, root, split, download=config.download)
    if config.validation:
        images = split_train_validation(images, config.validation, derived_seed(seed, "validation"))[part]
    return Transformed(images, transform)


def _batches(images: Any, config: DataConfig, purpose: str, size: int, run: Run, *, whole: bool = False) -> Any:
    """Batches of images in memory or of a data set that is streamed, cut by the processes unless each has them whole."""
    training = purpose != "evaluation"
    common: dict[str, Any] = {
        "seed": derived_seed(run.options.seed, purpose), "shuffle": training, "drop_last": training,
        "rank": 0 if whole else run.rank, "world": 1 if whole else run.world, "device": run.device,
    }  # fmt: skip
    if isinstance(images, ImageSet):
        # Black stays zero in grey images, so that empty places of a map say nothing.
        mean, std = ((0.0,), (1.0,)) if images.images.shape[1] == 1 else (IMAGENET_MEAN, IMAGENET_STD)
        size = min(size, len(images)) if training else size
        return Batches(images.images, images.labels, size, mean=mean, std=std, **common)
    # One batch is read of what SNIP scores: workers would go on to hold batches of gigabytes while the network is trained.
    return StreamedBatches(images, size, workers=0 if whole else config.workers, **common)


def found_folder(root: Path | None) -> Path | None:
    """A data set's folder as it is given, or of that name in the data root where there is none here."""
    return data_root() / root if root is not None and not root.exists() else root


# -- streamed sets -----------------------------------------------------------------------------------------------------


class Transformed(Dataset[Any]):
    """Images in memory, each given as a picture to a transform."""

    def __init__(self, images: ImageSet, transform: Any) -> None:
        self.images, self.transform, self.classes = images, transform, images.classes

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """A transformed image and its label."""
        from torchvision.transforms.functional import to_pil_image  # noqa: PLC0415 - slow to import

        return self.transform(to_pil_image(self.images.images[index])), int(self.images.labels[index])


def transforms(config: DataConfig) -> tuple[Any, Any]:
    """The paper's transforms of a picture, to train and to evaluate with, both timm's.

    Raises:
        UserError: a policy of augmentation that timm does not have.

    """
    from timm.data import create_transform  # noqa: PLC0415 - slow to import
    from torchvision.transforms import InterpolationMode, RandomCrop, Resize  # noqa: PLC0415

    size = config.size
    common: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bicubic"}
    try:
        training: Any = create_transform(
            size, is_training=True, color_jitter=0.4, auto_augment=config.auto_augment or None,
            re_prob=config.random_erasing, re_mode="pixel", re_count=1, **common,
        )  # fmt: skip
    except (AssertionError, ValueError) as error:  # how timm refuses a policy
        raise UserError(f"--data.auto_augment {config.auto_augment} is no policy of timm: {error}") from error
    if size <= 32:
        training.transforms[0] = RandomCrop(size, padding=4)
    evaluating: Any = create_transform(size, is_training=False, crop_pct=0.875, **common)
    if size >= 384:  # straight to the size, without a crop
        evaluating.transforms[0] = Resize((size, size), InterpolationMode.BICUBIC)
    return training, evaluating


# -- embedded sets -----------------------------------------------------------------------------------------------------


@functools.cache
def embedded_sets(name: str, size: int = 224, validation: float = 0.0) -> tuple[ImageSet, ImageSet]:
    """Training and test images of an embedded set; with ``validation``, that part of the training glyphs for the test.

    The content is fixed: seeds of runs do not change it.

    Raises:
        UserError: pictures of a size that does not fit into half of the smallest of them.

    """
    if name == "pictures":
        train, test = _picture_crops(size)
        return split_train_validation(train, validation, 0) if validation else (train, test)
    glyphs, labels = _glyphs()
    order = torch.randperm(len(glyphs), generator=generator(0))
    train_part, test_part = order[:1200], order[1200:]
    if validation:
        held_out = round(1200 * validation)
        train_part, test_part = train_part[held_out:], train_part[:held_out]
    parts = (train_part, 8192), (test_part, 1024)
    classes = tuple(str(digit) for digit in range(10))
    if name == "digits":
        enlarged = _enlarged(glyphs, 32)
        return tuple(ImageSet(enlarged[part], labels[part], classes) for part, _ in parts)  # type: ignore[return-value]
    enlarged = _enlarged(glyphs, 16)[:, 0]
    sets = []
    for seed, (part, count) in enumerate(parts):
        images, wanted = compose_row_cues(enlarged[part], labels[part], count, seed)
        sets.append(ImageSet(images, wanted, classes))
    return sets[0], sets[1]


def compose_row_cues(
    glyphs: UInt8[Tensor, "glyphs 16 16"], labels: Int[Tensor, " glyphs"], count: int, seed: int
) -> tuple[UInt8[Tensor, "count 1 64 64"], Int[Tensor, " count"]]:
    """Images whose label can only be read by linking two far-apart places.

    Four rows hold a digit each, all on one side. On the other side a bright 8 x 8 square lies in one of the rows, at
    least 28 pixels away from the digits; the label is that row's digit. Half of the images are transposed, so that the
    link runs along columns.

    Args:
        glyphs: pictures of digits.
        labels: of the glyphs.
        count: images to make.
        seed: of everything random.

    """
    draws = generator(seed, 1)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=draws)

    chosen, cued = integers(0, len(glyphs) - 1, count, 4), integers(0, 3, count)
    # Everything lies on a grid of 4 pixels; 48 - (4 + 16) = 28 pixels apart at least.
    margin, start = 4 * integers(0, 1, count, 4), 4 * integers(12, 14, count)
    mirrored, turned = integers(0, 1, count).bool(), integers(0, 1, count).bool()
    # Only the sides change places: the digits themselves are not mirrored.
    left, start = torch.where(mirrored[:, None], 48 - margin, margin), torch.where(mirrored, 56 - start, start)
    canvas = torch.zeros(count, 64, 64, dtype=torch.uint8)
    image = torch.arange(count)[:, None, None]
    for row in range(4):
        columns = left[:, row, None] + torch.arange(16)
        canvas[image, (16 * row + torch.arange(16))[:, None], columns[:, None]] = glyphs[chosen[:, row]]
    top, square = 16 * cued + 4 * integers(0, 2, count), torch.arange(8)
    canvas[image, (top[:, None] + square)[:, :, None], (start[:, None] + square)[:, None]] = 255
    canvas = torch.where(turned[:, None, None], canvas.transpose(1, 2), canvas)
    return canvas[:, None].contiguous(), labels[chosen.gather(1, cued[:, None])[:, 0]]


def _glyphs() -> tuple[Float[Tensor, "1797 1 8 8"], Int[Tensor, "1797"]]:
    """scikit-learn's digits, in [0, 255]."""
    parts = [load_images("digits", None, split) for split in ("train", "test")]
    images = torch.cat([part.images for part in parts]).float() * (255 / 16)
    return images, torch.cat([part.labels for part in parts])


def _enlarged(glyphs: Tensor, side: int) -> UInt8[Tensor, "n 1 {side} {side}"]:
    return functional.interpolate(glyphs, (side, side), mode="bilinear").round().to(torch.uint8)


def pictures() -> list[UInt8[Tensor, "3 height width"]]:
    """The photographs inside scikit-image (public domain or CC0, see its data folder), as they are."""
    try:
        import skimage.io  # noqa: PLC0415 - slow to import
    except ImportError as error:
        raise UserError("the pictures come with scikit-image: install scikit-image") from error
    folder = Path(skimage.__file__).parent / "data"
    return [torch.from_numpy(skimage.io.imread(folder / name)[..., :3].copy()).permute(2, 0, 1) for name in PICTURES]


def _picture_crops(size: int) -> tuple[ImageSet, ImageSet]:
    """Crops to be told apart by the photograph they come from: 32 each of its left half, 8 each of its right half."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for number, picture in enumerate(pictures()):
        half = picture.shape[2] // 2
        if size > min(picture.shape[1], half):
            raise UserError(f"--data.size {size}: half of the smallest picture has {half} x {picture.shape[1]} pixels")
        draws = generator(2, number)
        for side, (part, count) in enumerate(((picture[..., :half], 32), (picture[..., half:], 8))):
            for _ in range(count):
                top = int(torch.randint(part.shape[1] - size + 1, (), generator=draws))
                left = int(torch.randint(part.shape[2] - size + 1, (), generator=draws))
                found[side].append(part[:, top : top + size, left : left + size])
    classes = tuple(name.split(".")[0] for name in PICTURES)
    counts = [len(part) // len(PICTURES) for part in found]
    return tuple(
        ImageSet(torch.stack(part), torch.arange(len(PICTURES)).repeat_interleave(count), classes)
        for part, count in zip(found, counts, strict=True)
    )  # type: ignore[return-value]
