"""Image classification sets that several papers read, in the layouts in which they are published.

Sets that fit into memory are uint8 tensors (`load_images`); ImageNet and large folders are streamed (`stream_images`).
"""

import gzip
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from tenfold_shared.batches import Batches, Flip, RandomCrop, Shift, StreamedBatches, generator
from tenfold_shared.download import data_root, fetch, missing, restricted_pickle_load, unpack
from tenfold_shared.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image
    from torchvision.datasets import ImageFolder

__all__ = [
    "Batches", "Flip", "ImageSet", "RandomCrop", "Shift", "StreamedBatches", "imagenet_transform", "load_images",
    "measured_normalisation", "normalisation", "split_positions", "split_train_validation",
    "stream_images",
]  # fmt: skip

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class ImageSet:
    """Images and labels in memory: uint8 [n, c, h, w], int64 [n] below `len(classes)`, and the classes' names.

    Pixels range over 0..255, but over 0..16 for `digits`.
    """

    images: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.labels.dtype != torch.int64:
            raise TypeError(f"images are {self.images.dtype} {list(self.images.shape)}, labels {self.labels.dtype}")
        if self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"{len(self.images)} images have labels of shape {list(self.labels.shape)}")
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise ValueError(f"labels lie outside of 0..{len(self.classes) - 1}")

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: Int[Tensor, " m"]) -> "ImageSet":
        """The samples at `indices`, in their order."""
        return ImageSet(self.images[indices], self.labels[indices], self.classes)


def split_train_validation(data: ImageSet, held_out: float | int, seed: int) -> tuple[ImageSet, ImageSet]:
    """A random split into training and validation; `held_out` is a fraction in (0, 1) or a number of samples."""
    rest, chosen = split_positions(len(data), held_out, seed)
    return data.subset(rest), data.subset(chosen)


def split_positions(n: int, held_out: float | int, seed: int) -> tuple[Int[Tensor, " rest"], Int[Tensor, " chosen"]]:
    """Positions of n samples that stay, and those held out, by the rule of `split_train_validation`."""
    count = round(held_out * n) if isinstance(held_out, float) else held_out
    if not 0 < count < n:
        raise UserError(f"{held_out} of {n} samples cannot be held out: both parts need at least one")
    order = torch.randperm(n, generator=generator(seed))
    return order[count:], order[:count]


def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by channel that papers use with a set, of pixels divided by 255.

    `digits` has 8/255 and 16/255, so that a pixel x in 0..16 becomes x/16 - 0.5.
    """
    if name == "folder":
        raise UserError("a folder has no published normalisation: use that of a named set, or measured_normalisation")
    return _source(name).normalisation


def measured_normalisation(data: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by channel of this set's pixels divided by 255."""
    counts = torch.stack([torch.bincount(channel.flatten().int(), minlength=256) for channel in data.images.unbind(1)])
    values = torch.arange(256, dtype=torch.float64) / 255
    weights = counts.double() / counts.sum(1, keepdim=True)
    mean = weights @ values
    std = ((weights @ values.square()) - mean.square()).clamp(min=0).sqrt()
    if not bool((std > 0).all()):
        raise UserError("a channel of these images is constant, so it has no normalisation: check the images")
    return tuple(mean.tolist()), tuple(std.tolist())


def load_images(
    name: str, root: str | Path | None = None, split: str = "train", download: bool = False, **options: Any
) -> ImageSet:
    """One split ("train" or "test") of a named set, read from `root` (default: the data root).

    `digits` (inside scikit-learn), `cifar10`, `cifar100`, `mnist`, `fashion-mnist`, `tiny-imagenet`; `folder` reads
    `<root>/<split>/<class>/*` of images of one size. The labelled validation images of Tiny-ImageNet are its "test"
    split, as is common; with `official_split=True` the first 25 of each class, by name, are "val" and the others
    "test".

    Raises UserError for an unknown name or split, a set that is not there (and is not fetched by `download`), and a
    missing, truncated or unreadable file, which it names.
    """
    source = _source(name)
    root = data_root() if root is None else Path(root)
    if source.load is None:
        raise UserError(f"{name} does not fit into memory: read it with stream_images")
    if download and source.fetch is not None:
        source.fetch(root)
    try:
        return source.load(root, split, **options)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} in {root} cannot be read ({error}): check its files, or fetch it again") from error


# --- files ------------------------------------------------------------------------------------------------------------


def _pil() -> Any:
    try:
        import PIL.Image  # noqa: PLC0415  - part of the extra
    except ImportError as error:
        raise UserError("reading image files needs pillow: install tenfold-shared[images]") from error
    return PIL.Image


def _read_image(file: Path, mode: str) -> "Image":
    try:
        with _pil().open(file) as image:
            return image.convert(mode)
    except UserError:
        raise
    except Exception as error:  # Pillow raises many types on damaged files
        raise UserError(f"{file} is no readable image ({error}): remove it or fetch its data set again") from error


def _read_images(files: Sequence[Path], mode: str = "RGB") -> UInt8[Tensor, "n c h w"]:
    """All files decoded, which must agree in size."""
    first = _read_image(files[0], mode)
    width, height = first.size
    images = torch.empty(len(files), height, width, len(first.getbands()), dtype=torch.uint8)
    for position, file in enumerate(files):
        image = _read_image(file, mode)
        if image.size != first.size:
            size = f"{image.width} x {image.height} pixels, not {width} x {height} as {files[0].name}"
            raise UserError(f"{file} has {size}: resize the images, or stream the folder with a transform")
        images[position] = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(images.shape[1:])
    return images.permute(0, 3, 1, 2).contiguous()


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)


def _split_name(name: str, split: str, splits: Iterable[str]) -> str:
    if split not in splits:
        raise UserError(f"{name} has no split {split!r}: it has {', '.join(splits)}")
    return split


# --- the sets ---------------------------------------------------------------------------------------------------------


def _digits(root: Path, split: str) -> ImageSet:
    """The 8 x 8 grey digits inside scikit-learn, pixels 0..16: 1000 to train with and 797 to test, fixed."""
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415  - slow to import, part of the extra
    except ImportError as error:
        raise UserError("digits come with scikit-learn: install tenfold-shared[images]") from error
    _split_name("digits", split, ("train", "test"))
    content = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(123))
    chosen = order[:1000] if split == "train" else order[1000:]
    images = torch.from_numpy(content.images).to(torch.uint8)[:, None]
    labels = torch.from_numpy(content.target).to(torch.int64)
    return ImageSet(images, labels, tuple(str(digit) for digit in range(10))).subset(chosen)


@dataclass(frozen=True)
class _Cifar:
    """CIFAR in its Python pickles."""

    title: str
    archive: str
    md5: str
    folder: str
    parts: dict[str, tuple[str, ...]]
    meta: str
    labels: str
    names: str

    @property
    def url(self) -> str:
        return f"https://www.cs.toronto.edu/~kriz/{self.archive}"

    def fetch(self, root: Path) -> None:
        files = [self.meta, *(part for parts in self.parts.values() for part in parts)]
        if not all((root / self.folder / file).exists() for file in files):
            unpack(fetch(self.url, root / self.archive, md5=self.md5), root)

    def load(self, root: Path, split: str) -> ImageSet:
        parts = self.parts[_split_name(self.title, split, self.parts)]
        folder = root / self.folder
        if not folder.is_dir():
            raise missing(self.title, self.url, f"{folder}/{{{','.join(parts)}}}", fetchable=True)
        classes = self._entry(folder / self.meta, self.names)
        images, labels = [], []
        for part in parts:
            pixels = torch.as_tensor(self._entry(folder / part, "data"))
            wanted = torch.as_tensor(self._entry(folder / part, self.labels), dtype=torch.int64)
            if pixels.dtype != torch.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072 or len(wanted) != len(pixels):
                shape = f"{pixels.dtype} {list(pixels.shape)} with {len(wanted)} labels"
                raise UserError(f"{folder / part} holds {shape}, not uint8 [n, 3072] with n: fetch the set again")
            images.append(pixels.view(-1, 3, 32, 32))
            labels.append(wanted)
        return ImageSet(torch.cat(images), torch.cat(labels), tuple(classes))

    def _entry(self, file: Path, key: str) -> Any:
        content = restricted_pickle_load(file, encoding="latin1")
        if not isinstance(content, dict) or key not in content:
            raise UserError(f"{file} has no entry {key!r}: it is no file of {self.title}, fetch the set again")
        return content[key]


_CIFAR10 = _Cifar(
    title="CIFAR-10",
    archive="cifar-10-python.tar.gz",
    md5="c58f30108f718f92721af3b95e74349a",
    folder="cifar-10-batches-py",
    parts={"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
    meta="batches.meta",
    labels="labels",
    names="label_names",
)
_CIFAR100 = _Cifar(
    title="CIFAR-100",
    archive="cifar-100-python.tar.gz",
    md5="eb9058c3a382ffc7106e4002c42a8d85",
    folder="cifar-100-python",
    parts={"train": ("train",), "test": ("test",)},
    meta="meta",
    labels="fine_labels",
    names="fine_label_names",
)


@dataclass(frozen=True)
class _Idx:
    """MNIST and its likes: IDX files, compressed or not, in `<folder>/raw/` or in the root itself."""

    title: str
    url: str
    folder: str
    md5: dict[str, str]
    classes: tuple[str, ...]

    def fetch(self, root: Path) -> None:
        for file, md5 in self.md5.items():
            target = root / self.folder / "raw" / f"{file}.gz"
            if not target.with_suffix("").exists():
                fetch(f"{self.url}{file}.gz", target, md5=md5)

    def load(self, root: Path, split: str) -> ImageSet:
        prefix = {"train": "train", "test": "t10k"}[_split_name(self.title, split, ("train", "test"))]
        images = _read_idx(self._file(root, f"{prefix}-images-idx3-ubyte"), 3)
        labels = _read_idx(self._file(root, f"{prefix}-labels-idx1-ubyte"), 1)
        return ImageSet(images[:, None], labels.to(torch.int64), self.classes)

    def _file(self, root: Path, name: str) -> Path:
        for folder in (root / self.folder / "raw", root):
            for file in (folder / name, folder / f"{name}.gz"):
                if file.is_file():
                    return file
        raise missing(self.title, self.url, f"{root / self.folder}/raw/{name}[.gz]", fetchable=True)


def _read_idx(file: Path, dimensions: int) -> UInt8[Tensor, "..."]:
    again = "delete it and fetch it again"
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} is truncated or corrupted ({error}): {again}") from error
    start = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) < start:
        raise UserError(f"{file} is no IDX file of unsigned bytes in {dimensions} dimensions: {again}")
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) - start != math.prod(shape):
        raise UserError(f"{file} has {len(content) - start} values, not {math.prod(shape)} as its header says: {again}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].view(shape)


_MNIST = _Idx(
    title="MNIST",
    url="https://ossci-datasets.s3.amazonaws.com/mnist/",
    folder="MNIST",
    md5={
        "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    classes=tuple(str(digit) for digit in range(10)),
)
_FASHION = _Idx(
    title="Fashion-MNIST",
    url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    folder="FashionMNIST",
    md5={
        "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    classes=(
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
)  # fmt: skip

_TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


def _fetch_tiny(root: Path) -> None:
    if not (root / "tiny-imagenet-200" / "val" / "val_annotations.txt").exists():
        unpack(fetch(_TINY_URL, root / "tiny-imagenet-200.zip"), root)


def _tiny(root: Path, split: str, official_split: bool = False) -> ImageSet:
    """Tiny-ImageNet in its published layout; 500 images of 64 x 64 a class to train with, 50 to test."""
    _split_name("tiny-imagenet", split, ("train", "val", "test") if official_split else ("train", "test"))
    folder = root / "tiny-imagenet-200"
    if not folder.is_dir():
        raise missing("Tiny-ImageNet", _TINY_URL, f"{folder}/{{train,val}}", fetchable=True)
    train = folder / "train"
    classes = _classes(train)
    if split == "train":
        by_class = [_image_files(train / name / "images") for name in classes]
    else:
        by_class = _tiny_validation(folder / "val", classes)
        if official_split:
            by_class = [files[:25] if split == "val" else files[25:] for files in by_class]
    return _labelled(by_class, classes, folder)


def _tiny_validation(folder: Path, classes: Sequence[str]) -> list[list[Path]]:
    annotations = folder / "val_annotations.txt"
    by_class: dict[str, list[Path]] = {name: [] for name in classes}
    try:
        for line in annotations.read_text(encoding="utf-8").splitlines():
            file, name = line.split("\t")[:2]
            by_class[name].append(folder / "images" / file)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{annotations} is missing or damaged ({error}): fetch Tiny-ImageNet again") from error
    return [sorted(files) for files in by_class.values()]


def _folder(root: Path, split: str, mode: str = "RGB") -> ImageSet:
    """`<root>/<split>/<class>/*`, decoded to `mode` (a pillow mode of 8-bit channels)."""
    classes = _folder_classes(root, split)
    by_class = [_image_files(root / split / name) for name in classes]
    return _labelled(by_class, classes, root / split, mode)


def _folder_classes(root: Path, split: str) -> tuple[str, ...]:
    """The classes of the training folder where there is one, so that a label means the same in every split."""
    if not (root / split).is_dir():
        layout = f"{root}/{split}/<class>/<image files>"
        raise UserError(f"the image folder {root / split} does not exist: lay the images out as {layout}")
    classes = _classes(root / "train" if (root / "train").is_dir() else root / split)
    for name in _classes(root / split):
        if name not in classes:
            raise UserError(f"{root / split / name} is a class that {root / 'train'} does not have: add or remove it")
    return classes


def _classes(folder: Path) -> tuple[str, ...]:
    names = (
        sorted(e.name for e in folder.iterdir() if e.is_dir() and not e.name.startswith(".")) if folder.is_dir() else []
    )
    if len(names) < 2:
        raise UserError(
            f"{folder} has {len(names)} class folder(s): two or more are needed, one folder of images a class"
        )
    return tuple(names)


def _labelled(by_class: Sequence[Sequence[Path]], classes: tuple[str, ...], where: Path, mode: str = "RGB") -> ImageSet:
    for name, files in zip(classes, by_class, strict=True):
        if not files:
            raise UserError(f"the class {name} has no images in {where}: add some, or remove the class")
    images = _read_images([file for files in by_class for file in files], mode)
    counts = torch.tensor([len(files) for files in by_class])
    return ImageSet(images, torch.arange(len(classes)).repeat_interleave(counts), classes)


# --- streamed ---------------------------------------------------------------------------------------------------------


def stream_images(
    name: str, root: str | Path | None = None, split: str = "train", transform: Callable[["Image"], Any] | None = None
) -> "ImageFolder":
    """A data set of (transformed RGB image, label) for `StreamedBatches`: `imagenet`, or any `folder`.

    ImageNet is read from `<root>/imagenet/{train,val}/<wnid>/*` or `<root>/{train,val}/...`; its "test" split is `val`.
    Without a transform, ImageNet's usual one is used (see `imagenet_transform`). Raises UserError like `load_images`.
    """
    if name not in ("imagenet", "folder"):
        raise UserError(f"{name} is not streamed: read it with load_images")
    try:
        from torchvision.datasets import ImageFolder  # noqa: PLC0415  - part of the extra
    except ImportError as error:
        raise UserError("streaming images needs torchvision: install tenfold-shared[images]") from error
    root = data_root() if root is None else Path(root)
    train = split == "train"
    if name == "imagenet":
        split = {"train": "train", "val": "val", "test": "val"}[_split_name(name, split, ("train", "val", "test"))]
        root = root / "imagenet" if (root / "imagenet").is_dir() else root
        if not (root / split).is_dir():
            layout = f"{root}/{{train,val}}/<wnid>/*.JPEG"
            raise missing("ImageNet-1k (its terms ask for an account)", "https://image-net.org/download.php", layout)
    classes = _folder_classes(root, split)
    if _classes(root / split) != classes:
        raise UserError(f"{root / split} lacks a class that {root / 'train'} has: both need the same class folders")
    for entry in (root / split).iterdir():
        if entry.is_dir() and entry.name.startswith("."):
            raise UserError(f"{entry} is a hidden folder, which would be read as a class: remove it")
    try:
        return ImageFolder(str(root / split), transform or imagenet_transform(train), loader=_load_rgb)
    except FileNotFoundError as error:
        raise UserError(f"a class in {root / split} has no images ({error}): add some, or remove the class") from error


def imagenet_transform(train: bool, size: int = 224) -> Callable[["Image"], Tensor]:
    """ImageNet's usual transform to a normalised float [3, size, size].

    To train with: a random resized crop and a flip; to test: the shorter side resized to size * 256/224, the centre
    cut.
    """
    from torchvision import transforms  # noqa: PLC0415  - part of the extra

    ending = [transforms.ToTensor(), transforms.Normalize(*_IMAGENET)]
    if train:
        return transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *ending])
    return transforms.Compose([transforms.Resize(size * 256 // 224), transforms.CenterCrop(size), *ending])


def _load_rgb(file: str) -> "Image":
    return _read_image(Path(file), "RGB")


# --- the names --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]
    load: Callable[..., ImageSet] | None
    fetch: Callable[[Path], None] | None = None


# Licences: CIFAR has none stated (cite Krizhevsky 2009); MNIST CC BY-SA 3.0; Fashion-MNIST MIT; (Tiny-)ImageNet
# non-commercial research terms; scikit-learn's digits BSD.
_SOURCES = {
    "digits": _Source(((8 / 255,), (16 / 255,)), _digits),
    "cifar10": _Source(((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)), _CIFAR10.load, _CIFAR10.fetch),
    "cifar100": _Source(((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)), _CIFAR100.load, _CIFAR100.fetch),
    "mnist": _Source(((0.1307,), (0.3081,)), _MNIST.load, _MNIST.fetch),
    "fashion-mnist": _Source(((0.2860,), (0.3530,)), _FASHION.load, _FASHION.fetch),
    "tiny-imagenet": _Source(_IMAGENET, _tiny, _fetch_tiny),
    "imagenet": _Source(_IMAGENET, None),
    "folder": _Source(_IMAGENET, _folder),
}


def _source(name: str) -> _Source:
    if name not in _SOURCES:
        hint = did_you_mean(name, _SOURCES)
        raise UserError(f"there is no image set {name!r}: the sets are {', '.join(_SOURCES)}{hint}")
    return _SOURCES[name]
