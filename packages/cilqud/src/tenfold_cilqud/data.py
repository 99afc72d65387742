"""The data sets as classes (section 5): labelled, validation and test images of each, and what is held back for a pool.

Images are uint8 [n, c, h, w] of pixels 0..255, or float32 in [0, 1] (the digits); `pixels` makes either [0, 1].
"""

import dataclasses
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tenfold_cilqud.anchors import AnchorRule, random_anchors
from tenfold_cilqud.protocol import ByClass, class_order, draws
from tenfold_shared.checkpoint import atomic_write
from tenfold_shared.download import data_root, missing, restricted_pickle_load
from tenfold_shared.errors import UserError
from tenfold_shared.images import (
    Flip,
    ImageSet,
    RandomCrop,
    load_images,
    measured_normalisation,
    normalisation,
)

DataName = Literal[
    "digits", "fashion-mnist", "mnist", "cifar10", "cifar100", "tiny-imagenet", "folder", "official10", "official100"
]
NORMALISATION = {  # those of the released code; its CIFAR deviations are means over images, smaller than over pixels
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2009, 0.1984, 0.2023)),
}
BUNDLE_VALIDATION = {"cifar10": 500, "cifar100": 50}  # images of a class, section 5
OFFICIAL_URL = "https://www.dropbox.com/sh/hrugy5qb7y80tyl/AAB9THdb7-Kk_I-RIFsL_ywxa?dl=0"


@dataclasses.dataclass
class DataConfig:
    """Which images, in which tasks, and which of them are remembered."""

    name: DataName = "digits"
    """The data set; ``folder`` is any folder of ``train/<class>/*`` and ``test/<class>/*`` images of one size,
    ``official10`` and ``official100`` the released bundle of CIFAR in pickles."""
    root: Path | None = None
    """Folder of the data set, looked for here and in the data root; default: the data root itself ($TENFOLD_DATA or the
    platform's cache)."""
    download: bool = False
    """Fetch the data set, and CIFAR as a pool, when it is not there."""
    tasks: int = 5
    """Tasks n; every task gets the same number of classes."""
    class_order: str = "default"
    """default, natural, random (by the seed), numbers such as 3,1,0,2, or a file with one number a line."""
    per_class: int = 0
    """Labelled training images of a class; 0 takes all that are left (60 of the digits)."""
    validation: int = 0
    """Training images of a class held out for validation."""
    held_back: float = 0.0
    """Training images of a class, or below 1 their fraction, that lose their label and go to the pool called split."""
    anchors: int = 100
    """Images of a class that are remembered after its task."""
    anchors_total: int = 0
    """Images remembered in all, shared by the classes seen so far; 0 for no such limit."""
    anchor_rule: AnchorRule | None = None
    """How the remembered images are chosen: random, herding (the class mean's best approximation), kcenter; default: as
    the method does, herding for iCaRL and random for all others."""
    evaluate_on: Literal["test", "validation"] = "test"
    """The images that accuracies are about; validation for choosing values."""

    def __post_init__(self) -> None:
        """Refuse what no protocol can have."""
        for name in ("per_class", "validation", "anchors_total"):
            if getattr(self, name) < 0:
                raise UserError(f"--data.{name} takes 0 or more, got {getattr(self, name)}")
        if self.tasks < 1 or self.held_back < 0:
            raise UserError(f"--data.tasks takes 1 or more and held_back 0 or more, got {self.tasks}, {self.held_back}")
        if self.anchors < 1 and not self.anchors_total:
            raise UserError(f"--data.anchors is {self.anchors}: fewer anchors than classes; keep 1 or more of each")
        if self.name.startswith("official"):
            own = [name for name in ("per_class", "validation", "held_back", "anchors_total") if getattr(self, name)]
            own += ["anchor_rule"] * (self.anchor_rule not in (None, "random"))
            if own:
                raise UserError(f"--data.{own[0]}: the released bundle comes with its splits and anchors; leave it out")
        elif self.evaluate_on == "validation" and not self.validation:
            raise UserError("--data.evaluate_on validation needs --data.validation images of each class")


@dataclasses.dataclass
class ClassData:
    """The data set by original class, and how its images are seen."""

    train: ByClass
    validation: ByClass
    test: ByClass
    held_back: ByClass
    order: tuple[int, ...]
    names: tuple[str, ...]
    tasks: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: tuple[Any, ...] = ()
    anchors: ByClass | None = None
    """Remembered images that come with the data, where they do."""

    @property
    def classes_per_task(self) -> int:
        """C."""
        return len(self.order) // self.tasks

    @property
    def shape(self) -> tuple[int, ...]:
        """(c, h, w) of an image."""
        return tuple(self.train[0].shape[1:])


def pixels(images: Tensor) -> Float[Tensor, "..."]:
    """Images in [0, 1], float32."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def load_data(config: DataConfig, seed: int) -> ClassData:
    """The data set in classes, with its class order.

    Raises:
        UserError: it is not there or cannot be read, its classes make no such tasks, or the order is no permutation.

    """
    if config.root is not None and not config.root.exists():
        config = dataclasses.replace(config, root=data_root() / config.root)
    if config.name == "digits":
        data = _digits(config, seed)
    elif config.name.startswith("official"):
        data = _official(config, seed)
    else:
        data = _images(config, seed)
    classes = len(data.names)
    if classes % config.tasks:
        raise UserError(f"--data.tasks {config.tasks}: {classes} classes make no tasks of equal size")
    if config.anchors_total and config.anchors_total < classes:
        raise UserError(
            f"--data.anchors_total {config.anchors_total}: fewer anchors than the {classes} classes; keep 1 or more of each"
        )
    splits = {
        "training": data.train,
        config.evaluate_on: data.test if config.evaluate_on == "test" else data.validation,
    }
    splits |= {"remembered": data.anchors} if data.anchors is not None else {}
    for what, split in splits.items():
        empty = [label for label in range(classes) if label >= len(split) or not len(split[label])]
        if empty:
            few = "fewer anchors than classes, " if what == "remembered" else ""
            raise UserError(
                f"{few}class {empty[0]} ({data.names[empty[0]]}) has no {what} images, its task would lack a class: check "
                "--data.per_class, --data.validation, --data.held_back and the data set"
            )
    return data


# --- the embedded digits -----------------------------------------------------------------------------------------------


def _digits(config: DataConfig, seed: int) -> ClassData:
    """The miniature's exact split (section 12): by seed, 50 test images a class, then the labelled, then the pool's."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - slow to import

    content = load_digits()
    images = torch.from_numpy(content.images / 16).float()[:, None]
    draw = draws(seed)
    order = tuple(int(k) for k in draw.permutation(10))
    if config.class_order != "default":
        order = class_order(config.class_order, "digits", 10, seed)
    labelled = config.per_class or 60
    parts: dict[str, list[Tensor]] = {"test": [], "train": [], "held_back": [], "validation": []}
    for label in range(10):
        own = np.flatnonzero(content.target == label)
        draw.shuffle(own)
        back = round(config.held_back * (len(own) - 50)) if config.held_back < 1 else int(config.held_back)
        cuts = np.cumsum([50, labelled, back, config.validation])
        if cuts[-1] > len(own):
            raise UserError(
                f"digit {label} has {len(own)} images, {cuts[-1]} are asked for: lower --data.per_class, --data.held_back or "
                "--data.validation"
            )
        for name, chosen in zip(parts, np.split(own, cuts)[:4], strict=True):
            parts[name].append(images[torch.from_numpy(chosen)])
    return ClassData(**parts, order=order, names=tuple("0123456789"), tasks=config.tasks, mean=(0.0,), std=(1.0,))  # type: ignore[arg-type]  # the parts are those of ClassData


# --- sets in memory ------------------------------------------------------------------------------------------------------


def by_class(data: ImageSet) -> list[Tensor]:
    """The images of every class, in file order."""
    return [data.images[data.labels == label] for label in range(len(data.classes))]


def _images(config: DataConfig, seed: int) -> ClassData:
    train = load_images(config.name, config.root, "train", download=config.download)
    test = load_images(config.name, config.root, "test")
    mean, std = (
        measured_normalisation(train) if config.name == "folder" else NORMALISATION.get(config.name)
    ) or normalisation(config.name)
    grey = train.images.shape[1] == 1
    return _split(
        config,
        seed,
        train=by_class(train),
        test=by_class(test),
        order=class_order(config.class_order, config.name, len(train.classes), seed),
        names=train.classes,
        tasks=config.tasks,
        mean=mean,
        std=std,
        # The released order: flip, then crop (section 5). Written digits have no mirror image.
        augment=(RandomCrop(4),) if config.name == "mnist" else (RandomCrop(2),) if grey else (Flip(), RandomCrop(4)),
    )


def _split(config: DataConfig, seed: int, *, train: ByClass, **rest: Any) -> ClassData:
    """Validation, held-back and labelled images of each class, by a permutation of its own."""
    parts: dict[str, list[Tensor]] = {"validation": [], "held_back": [], "train": []}
    for label, images in enumerate(train):
        order = torch.from_numpy(draws(seed * 10007 + label).permutation(len(images)))
        back = round(config.held_back * len(images)) if config.held_back < 1 else int(config.held_back)
        cuts = (config.validation, config.validation + back)
        end = cuts[1] + config.per_class if config.per_class else len(images)
        if end > len(images) or cuts[1] >= len(images):
            raise UserError(
                f"class {rest['names'][label]} has {len(images)} training images, {max(end, cuts[1] + 1)} are asked for: "
                "lower --data.per_class, --data.validation or --data.held_back"
            )
        parts["validation"].append(images[order[: cuts[0]]])
        parts["held_back"].append(images[order[cuts[0] : cuts[1]]])
        parts["train"].append(images[order[cuts[1] : end].sort().values])
    return ClassData(**parts, **rest)  # type: ignore[arg-type]  # the parts are those of ClassData


# --- the released bundle -------------------------------------------------------------------------------------------------


def read_classes(path: Path) -> list[Tensor]:
    """A pickled {class: uint8 (n, 32, 32, 3)} of the released bundle as [n, 3, 32, 32] a class.

    Raises:
        UserError: missing, corrupted, holding anything but arrays, or not of that form.

    """
    content = restricted_pickle_load(path, encoding="latin1")
    if not isinstance(content, dict) or sorted(content) != list(range(len(content))):
        raise UserError(f"{path} is no dictionary from classes 0..n-1 to images: get it from {OFFICIAL_URL} again")
    images = []
    for label in range(len(content)):
        array = np.asarray(content[label])
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            raise UserError(f"{path}: class {label} is {array.dtype} {list(array.shape)}, not uint8 [n, h, w, 3]")
        images.append(torch.from_numpy(array).permute(0, 3, 1, 2).contiguous())
    return images


def _official(config: DataConfig, seed: int) -> ClassData:
    name = f"cifar{config.name.removeprefix('official')}"
    folder = config.root or data_root() / "cil-qud"
    files = {part: folder / f"{name}_{part}.pkl" for part in ("train", "val", "test", "save_100")}
    absent = [path.name for path in files.values() if not path.is_file()]
    if absent:
        raise missing(f"the released bundle ({', '.join(absent)})", OFFICIAL_URL, f"{folder}/{name}_*.pkl")
    parts = {part: read_classes(path) for part, path in files.items()}
    classes = len(parts["train"])
    mean, std = NORMALISATION[name]
    return ClassData(
        train=parts["train"],
        validation=parts["val"],
        test=parts["test"],
        held_back=[images[:0] for images in parts["train"]],
        order=class_order(config.class_order, name, classes, seed),
        names=tuple(str(k) for k in range(classes)),
        tasks=config.tasks,
        mean=mean,
        std=std,
        augment=(Flip(), RandomCrop(4)),
        anchors=[images[: config.anchors] for images in parts["save_100"]],
    )


def write_bundle(data: ClassData, folder: Path, name: str, anchors: int, seed: int) -> list[Path]:
    """The released bundle's files from a data set in memory: train, val, test, the anchors, and the class order."""

    def plain(split: Sequence[Tensor]) -> dict[int, Any]:
        return {label: images.permute(0, 2, 3, 1).contiguous().numpy() for label, images in enumerate(split)}

    kept = [images[random_anchors(len(images), anchors, seed, label)] for label, images in enumerate(data.train)]
    written = []
    for part, split in (("train", data.train), ("val", data.validation), ("test", data.test), ("save_100", kept)):
        path = folder / f"{name}_{part}.pkl"
        with atomic_write(path) as file:
            pickle.dump(plain(split), file, protocol=4)
        written.append(path)
    order = folder / f"{name}_order.txt"
    with atomic_write(order) as file:
        file.write("".join(f"{float(label):.1f}\n" for label in data.order).encode())
    return [*written, order]


def prepare(data: DataConfig, folder: Path, seed: int = 0) -> None:
    """Write a data set in the layout of the released bundle; of CIFAR, 500 images of each class (50 of CIFAR-100's) are for
    validation unless --validation takes another number.

    Args:
        folder: where to.
        seed: which images of each class are for validation.

    Raises:
        UserError: the data set is not there, or its images are not of three channels.

    """
    if data.anchor_rule not in (None, "random") or data.anchors_total:
        raise UserError("the bundle's anchors are --anchors random images of each class: leave the other options out")
    data = dataclasses.replace(data, validation=data.validation or BUNDLE_VALIDATION.get(data.name, 0))
    loaded = load_data(data, seed)
    if loaded.shape[0] != 3 or loaded.train[0].dtype != torch.uint8:
        raise UserError(f"the bundle holds colour images of 8 bits; {data.name} has {loaded.shape[0]} channel")
    for path in write_bundle(loaded, folder, data.name, data.anchors, seed):
        print(path)
