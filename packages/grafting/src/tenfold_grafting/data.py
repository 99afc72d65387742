"""The paper's data sets (section 5) as pixels in [0, 1]; the networks normalise by themselves."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tenfold_grafting.graph import Normalise
from tenfold_grafting.zoo import load_images as load_arrays
from tenfold_shared.batches import Augmentation, Batches, Flip, RandomCrop
from tenfold_shared.download import data_root, missing
from tenfold_shared.errors import UserError
from tenfold_shared.images import load_images
from tenfold_shared.run import Run, derived_seed

DataName = Literal["digits", "cifar10", "mnist", "svhn", "arrays"]

Normalisation = Literal["", "none", "cifar10", "sdp", "resnet", "oval", "svhn"]
NORMALISATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "none": ((0.0,), (1.0,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "sdp": ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
    "resnet": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "oval": ((0.485, 0.456, 0.406), (0.225, 0.225, 0.225)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1201, 0.1231, 0.1052)),
}
"""Mean and standard deviation by channel: the paper's of CIFAR-10 and SVHN, and those that the released networks of the
SDP-FO ("v2"), residual and OVAL sets were trained with (section 5 and the verification set's own table)."""
OF_RELEASED = {"cnn_a": "sdp", "resnet2b": "resnet", "oval_base": "oval", "oval_wide": "oval", "oval_deep": "oval"}
"""Architectures that were released with statistics of their own; resnet4b was trained with these and with the paper's."""
VALIDATION = {"cifar10": 5000, "mnist": 6000, "svhn": 5000, "digits": 0}
"""Training images at the end of the set that choose the epoch; the digits have none, their last epoch is kept."""
SVHN_URL = "http://ufldl.stanford.edu/housenumbers/"


@dataclasses.dataclass
class DataConfig:
    """Which images."""

    name: DataName = "digits"
    """The data set; ``arrays`` is a file of uint8 images ``x`` and labels ``y``, to evaluate on alone."""
    root: Path | None = None
    """Folder of the data set; default: the data root ($TENFOLD_DATA or the platform's cache)."""
    download: bool = False
    """Fetch the data set when it is not there."""
    file: Path = Path("verification/images_cifar10_sdp200.npz")
    """The file of ``arrays``, looked for here and in the data root."""
    normalisation: Normalisation = ""
    """Statistics that the network normalises its pixels with; default: the checkpoint's own, or those of a released
    architecture, or the data set's."""
    validate: bool = False
    """Evaluate on the validation images in place of the test images; for choosing values."""


class Split(NamedTuple):
    """Images as uint8 with their largest value, and labels."""

    images: Tensor
    labels: Tensor
    top: int

    def pixels(self, count: int | None = None) -> tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]:
        """The first images as float64 pixels in [0, 1], and their labels."""
        chosen = slice(0, count)
        return self.images[chosen].double() / self.top, self.labels[chosen]


class Data(NamedTuple):
    """A data set: what is trained on, what chooses the epoch (None: nothing), what is reported on."""

    train: Split | None
    validation: Split | None
    test: Split
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image."""
        return tuple(self.test.images.shape[1:])


def resolve(path: Path) -> Path:
    """A file given as it is, or below the data root."""
    return path if path.exists() else data_root() / path


def normalisation(config: DataConfig, channels: int, arch: str = "") -> tuple[str, Normalise]:
    """A network's first layer and its name: as asked for, or of a released architecture, or of the data set.

    Raises:
        UserError: what was asked for is of another number of channels.

    """
    of_data = "none" if channels != 3 else "svhn" if config.name == "svhn" else "cifar10"
    name = config.normalisation or OF_RELEASED.get(arch, of_data)
    mean, std = (values * channels if name == "none" else values for values in NORMALISATION[name])
    if len(mean) != channels:
        raise UserError(f"--data.normalisation {name} is of {len(mean)} channels, the network takes {channels}")
    return name, Normalise(mean, std)


def load_data(config: DataConfig) -> Data:
    """The data set in the paper's splits: by index for the published ones, the specified draw for the digits.

    Raises:
        UserError: the data set is not there, or cannot be read.

    """
    if config.name == "digits":
        data = _digits()
    elif config.name == "arrays":
        path = resolve(config.file)
        if not path.is_file():
            raise UserError(f"no images at {path}: give --data.file, or put the verification set into {data_root()}")
        images, labels = load_arrays(path)
        test = Split((images * 255).round().to(torch.uint8), labels, 255)
        return Data(None, None, test, max(10, int(labels.max()) + 1))
    elif config.name == "svhn":
        root = config.root or data_root()
        train, test = (_svhn(root, part, config.download) for part in ("train", "test"))
        data = Data(train, None, test, 10)
    else:
        sets = [load_images(config.name, config.root, part, download=config.download) for part in ("train", "test")]
        train, test = (Split(part.images, part.labels, 255) for part in sets)
        data = Data(train, None, test, len(sets[0].classes))
    assert data.train is not None
    held = VALIDATION[config.name]
    if config.validate and not held:
        held = len(data.train.labels) // 5
    if not held:
        return data
    cut = len(data.train.labels) - held
    train, validation = (
        Split(data.train.images[part], data.train.labels[part], data.train.top)
        for part in (slice(cut), slice(cut, None))
    )
    return Data(train, validation, validation if config.validate else data.test, data.classes)


def _digits() -> Data:
    """The 1797 grey digits of scikit-learn, 1437 to train with and 360 to test; pixels 0..16."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - slow to import
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    content = load_digits()
    x_train, x_test, y_train, y_test = train_test_split(
        content.images, content.target, test_size=360, random_state=0, stratify=content.target
    )
    train, test = (
        Split(torch.from_numpy(x).to(torch.uint8)[:, None], torch.from_numpy(y).long(), 16)
        for x, y in ((x_train, y_train), (x_test, y_test))
    )
    return Data(train, None, test, 10)


def _svhn(root: Path, part: str, download: bool) -> Split:
    from scipy.io import loadmat  # noqa: PLC0415 - slow to import

    name = f"{part}_32x32.mat"
    path = next((folder / name for folder in (root / "svhn", root) if (folder / name).is_file()), root / "svhn" / name)
    if download and not path.is_file():
        from tenfold_shared.download import fetch  # noqa: PLC0415

        fetch(SVHN_URL + name, path)
    if not path.is_file():
        raise missing("SVHN", SVHN_URL, f"{root}/svhn/{{train,test}}_32x32.mat", fetchable=True)
    try:
        content: dict[str, Any] = loadmat(str(path))
        images = torch.from_numpy(content["X"]).permute(3, 2, 0, 1).contiguous()
        labels = torch.from_numpy(content["y"].astype("int64").reshape(-1)) % 10
    except Exception as error:  # scipy raises a different type for each way in which a file can be broken
        raise UserError(f"{path} is truncated or corrupted ({str(error)[:120]}): fetch it again") from error
    if images.dtype != torch.uint8 or images.shape[1:] != (3, 32, 32) or len(labels) != len(images):
        raise UserError(f"{path} holds {images.dtype} {tuple(images.shape)}, not uint8 [n, 3, 32, 32]: fetch it again")
    return Split(images, labels, 255)


def training_batches(data: Data, name: str, batch_size: int, run: Run) -> Batches:
    """Shuffled batches of pixels; CIFAR's are cropped and flipped."""
    assert data.train is not None
    augment: list[Augmentation] = [RandomCrop(4), Flip()] if name == "cifar10" else []
    return Batches(
        data.train.images,
        data.train.labels,
        min(batch_size, len(data.train.labels)),
        seed=derived_seed(run.options.seed, "train"),
        augment=augment,
        std=(data.train.top / 255,),
        drop_last=True,
        rank=run.rank,
        world=run.world,
        device=run.device,
    )
