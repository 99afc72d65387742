"""Unlabeled pools (section 5): where the images come from, how they are read, and whether test images are among them.

A pool is named by its source: `split` (what the data set holds back; `split:FRACTION` says how much), `patches:N`
(squares of two photographs), `official150k:FILE`, `ti500k:FILE`, `tinyimages-bin:FILE`, `imagenet32:FOLDER`,
`imagenet64:FOLDER`, `cifar10`, `cifar100`, `svhn`, `folder:PATH`, `npy:PATH`, and any of them joined by `+`.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tenfold_cilqud.data import ClassData, DataConfig, pixels
from tenfold_cilqud.protocol import draws
from tenfold_shared.download import data_root, missing, restricted_pickle_load
from tenfold_shared.errors import UserError
from tenfold_shared.images import load_images

WITHDRAWN = "80 Million Tiny Images was withdrawn by its makers in 2020: nothing fetches it; check that you may use it"
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
CHUNK = 4096


@dataclasses.dataclass
class PoolConfig:
    """The unlabeled images."""

    source: str = "split+patches:3000"
    """Where they come from: split (what --data.held_back is) or split:FRACTION (which sets it), patches:N,
    official150k:FILE, ti500k:FILE, tinyimages-bin:FILE, imagenet32:FOLDER, imagenet64:FOLDER, cifar10, cifar100, svhn,
    folder:PATH, npy:PATH; several joined by +."""
    duplicates: Literal["refuse", "drop", "keep"] = "refuse"
    """Pool images that are test images, found by their hash: stop, leave them out, or (for measuring the harm) keep."""
    near: float = 0.0
    """Treat pool images closer than this to a test image, in Euclidean pixel distance, as duplicates too; 0 does not."""
    exclude: Path | None = None
    """Text file of indices that may not be taken, one a line, as audit --show indices prints them: they count the images
    of the source within --pool.limit, before any test image is left out."""
    limit: int = 0
    """Take only so many images, at random by the seed; 0 takes all."""

    def __post_init__(self) -> None:
        """Refuse what is no pool."""
        if self.near < 0 or self.limit < 0:
            raise UserError(f"--pool.near and --pool.limit take 0 or more, got {self.near} and {self.limit}")

    def holding_back(self, data: DataConfig) -> DataConfig:
        """The data with what a source `split:FRACTION` says that each class holds back of its training images.

        Raises:
            UserError: it is no fraction, or the data say another.

        """
        for name in self.source.split("+"):
            kind, _, where = name.strip().partition(":")
            if kind != "split" or not where:
                continue
            try:
                fraction = float(where)
            except ValueError:
                fraction = 0.0
            if not 0 < fraction < 1:
                raise UserError(f"--pool.source {name}: a fraction between 0 and 1 is held back, such as split:0.5")
            if data.held_back not in (0, fraction):
                raise UserError(f"--pool.source {name} and --data.held_back {data.held_back} differ: leave one out")
            data = dataclasses.replace(data, held_back=fraction)
        return data


class Pool:
    """Unlabeled images that are read when asked for.

    Args:
        size: how many.
        read: indices [m] to images [m, c, h, w], uint8 or float32 in [0, 1].
        provenance: where they come from, for reports.
        labels: original class by image, -1 where it is none of the data set's; used only to measure purity.

    """

    def __init__(
        self, size: int, read: Callable[[Tensor], Tensor], provenance: str, labels: Int[Tensor, " p"] | None = None
    ):
        self.size, self._read, self.provenance, self.labels = size, read, provenance, labels

    def __len__(self) -> int:
        """How many images."""
        return self.size

    def __getitem__(self, indices: Int[Tensor, " m"]) -> Tensor:
        """The images at the indices, in their order."""
        return self._read(indices.cpu())

    def subset(self, indices: Int[Tensor, " m"]) -> "Pool":
        """The images at the indices as a pool."""
        labels = None if self.labels is None else self.labels[indices]
        return Pool(len(indices), lambda chosen: self[indices[chosen]], self.provenance, labels)


def memory_pool(images: Tensor, provenance: str, labels: Tensor | None = None) -> Pool:
    """A pool over a tensor [p, c, h, w]."""
    return Pool(len(images), images.__getitem__, provenance, labels)


def mixed(parts: Sequence[Pool]) -> Pool:
    """Pools one after the other."""
    starts = np.cumsum([0, *(len(part) for part in parts)])

    def read(indices: Tensor) -> Tensor:
        owner = torch.from_numpy(np.searchsorted(starts, indices.numpy(), side="right") - 1)
        found: list[tuple[Tensor, Tensor]] = []
        for k, part in enumerate(parts):
            own = (owner == k).nonzero().squeeze(1)
            if len(own):
                found.append((own, part[indices[own] - int(starts[k])]))
        if not found:
            return parts[0][indices]
        first = found[0][1]
        for _, images in found:
            if images.shape[1:] != first.shape[1:]:
                raise UserError(f"the pool mixes images of {list(images.shape[1:])} and {list(first.shape[1:])}")
        alike = all(images.dtype == first.dtype for _, images in found)  # else 8-bit images become those in [0, 1]
        out = torch.empty(len(indices), *first.shape[1:], dtype=first.dtype if alike else torch.float32)
        for own, images in found:
            out[own] = images if alike else pixels(images)
        return out

    known = any(part.labels is not None for part in parts)
    labels = [torch.full((len(part),), -1) if part.labels is None else part.labels for part in parts]
    return Pool(int(starts[-1]), read, " + ".join(p.provenance for p in parts), torch.cat(labels) if known else None)


# --- sources -------------------------------------------------------------------------------------------------------------


def open_pool(config: PoolConfig, data: ClassData, seed: int, *, download: bool = False) -> Pool:
    """The pool of a run, with images of the data set's shape, excluded ones left out, test images refused or dropped.
    CIFAR is fetched with `download` where it is not there.

    Raises:
        UserError: an unknown source, files that are missing or of another form or shape, test images in the pool, or
            nothing in it.

    """
    parts = [_source(name, data, seed, download) for name in config.source.split("+")]
    pool = parts[0] if len(parts) == 1 else mixed(parts)
    if config.limit and config.limit < len(pool):
        drawn = draws(seed).permutation(len(pool))[: config.limit]
        pool = pool.subset(torch.from_numpy(np.sort(drawn)))
    excluded = read_excluded(config.exclude, len(pool))
    if excluded is not None:
        pool = without(pool, excluded)
    if not len(pool):
        raise UserError(f"--pool.source {config.source}: the pool is empty, so nothing can be queried")
    shape = tuple(pool[torch.zeros(1, dtype=torch.int64)].shape[1:])
    if shape != data.shape:
        raise UserError(f"--pool.source {config.source}: its images are {shape}, the data set's are {data.shape}")
    return audited(pool, config, data)


def without(pool: Pool, indices: Int[Tensor, " e"]) -> Pool:
    """The pool without the images at the indices."""
    kept = torch.ones(len(pool), dtype=torch.bool)
    kept[indices] = False
    return pool.subset(kept.nonzero().squeeze(1))


def _source(name: str, data: ClassData, seed: int, download: bool) -> Pool:
    kind, _, where = name.strip().partition(":")
    if kind not in SOURCES:
        raise UserError(f"--pool.source {name}: the sources are {', '.join(SOURCES)}")
    options = {"download": download} if kind in FETCHED else {}
    return SOURCES[kind](where, data, seed, **options)


def _held_back(where: str, data: ClassData, seed: int) -> Pool:
    images = torch.cat(list(data.held_back))
    if not len(images):
        raise UserError("--pool.source split: nothing is held back; say with --data.held_back how much of the set is")
    labels = torch.arange(len(data.names)).repeat_interleave(torch.tensor([len(part) for part in data.held_back]))
    return memory_pool(images, "in-distribution pool: training images without their labels", labels)


def _patches(where: str, data: ClassData, seed: int) -> Pool:
    if where and not where.isdigit():
        raise UserError(f"--pool.source patches:{where}: the number of patches is a whole one, such as patches:3000")
    count = int(where) if where else 3000
    return memory_pool(photo_patches(count, data.shape, seed, data.train[0].dtype), f"{count} patches of photographs")


def photo_patches(count: int, shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Squares of scikit-learn's two photographs [count, c, s, s], as distractors.

    A third each of the squares are s, 2 s and 4 s pixels wide, block-averaged to s, stretched to [0, 1] each; grey where
    c is 1.
    """
    from sklearn.datasets import load_sample_images  # noqa: PLC0415 - slow to import

    channels, side = shape[0], shape[1]
    draw = draws(seed)
    photographs = [photograph.astype(np.float32) / 255 for photograph in load_sample_images().images]
    if channels == 1:
        photographs = [photograph.mean(2, keepdims=True) for photograph in photographs]
    kinds = [(photograph, side * factor) for photograph in photographs for factor in (1, 2, 4)]
    patches = []
    for position, (photograph, width) in enumerate(kinds):
        number = count * (position + 1) // len(kinds) - count * position // len(kinds)
        rows = draw.randint(photograph.shape[0] - width + 1, size=number)
        columns = draw.randint(photograph.shape[1] - width + 1, size=number)
        for row, column in zip(rows, columns, strict=True):
            cut = photograph[row : row + width, column : column + width]
            factor = width // side
            patches.append(cut.reshape(side, factor, side, factor, channels).mean((1, 3)))
    images = torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2) if patches else torch.zeros(0, *shape)
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    images = ((images - low) / (high - low).clamp(min=1e-8)).contiguous()
    return (images * 255).round().to(torch.uint8) if dtype == torch.uint8 else images


def _array_pool(array: Any, what: str, channels_last: bool = True) -> Pool:
    """A pool over a uint8 array (which may be memory-mapped), [p, h, w, c] or [p, c, h, w]."""
    if array.dtype != np.uint8 or array.ndim != 4:
        raise UserError(
            f"{what}: it holds {array.dtype} {list(array.shape)}, uint8 images in four dimensions are needed"
        )

    def read(indices: Tensor) -> Tensor:
        images = torch.from_numpy(np.ascontiguousarray(array[indices.numpy()]))
        return images.permute(0, 3, 1, 2).contiguous() if channels_last else images

    return Pool(len(array), read, what)


def _file(where: str, name: str, what: str, url: str) -> Path:
    path = Path(where) if where else data_root() / name
    if not path.exists():
        raise missing(what, url, str(path))
    return path


def _pickled(key: str, name: str, what: str, url: str) -> Callable[[str, ClassData, int], Pool]:
    def read(where: str, data: ClassData, seed: int) -> Pool:
        # The bundle has a pool for each of the two data sets.
        path = _file(where, name.format(100 if len(data.names) == 100 else 10), f"{what} ({WITHDRAWN})", url)
        content = restricted_pickle_load(path, encoding="latin1")
        if not isinstance(content, dict) or key not in content:
            raise UserError(f"{path} has no entry {key!r}: it is no {what}")
        return _array_pool(np.asarray(content[key]), f"{what}; {WITHDRAWN}")

    return read


def _tiny_images(where: str, data: ClassData, seed: int) -> Pool:
    path = _file(where, "tiny_images.bin", f"tiny_images.bin ({WITHDRAWN})", "its former site, which is closed")
    if path.stat().st_size % 3072:
        raise UserError(f"{path} has {path.stat().st_size} bytes, no multiple of the 3072 of an image: it is truncated")
    # An image is three planes, each column after column.
    array = np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, 3, 32, 32)

    def read(indices: Tensor) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array[indices.numpy()].transpose(0, 1, 3, 2)))

    return Pool(len(array), read, f"80 Million Tiny Images; {WITHDRAWN}")


def _downsampled(side: int) -> Callable[[str, ClassData, int], Pool]:
    def read(where: str, data: ClassData, seed: int) -> Pool:
        url = "https://image-net.org/download-images"
        folder = _file(where, f"imagenet{side}", f"ImageNet at {side}x{side} pixels", url)
        files = [folder / f"train_data_batch_{k}" for k in range(1, 11)]
        present = [path for path in files if path.is_file()]
        if not present:
            raise missing(f"ImageNet at {side}x{side} pixels", url, f"{folder}/train_data_batch_{{1..10}}")
        parts = []
        for path in present:
            content = restricted_pickle_load(path, encoding="latin1")
            rows = np.asarray(content["data"]) if isinstance(content, dict) and "data" in content else None
            if rows is None or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3 * side * side:
                raise UserError(f"{path} holds no rows of {3 * side * side} bytes under 'data': fetch it again")
            parts.append(_array_pool(rows.reshape(-1, 3, side, side), f"ImageNet {side}x{side}", channels_last=False))
        pool = mixed(parts)
        pool.provenance = f"ImageNet at {side}x{side} pixels, {len(parts)} of 10 files"
        return pool

    return read


def _named(name: str) -> Callable[..., Pool]:
    def read(where: str, data: ClassData, seed: int, download: bool = False) -> Pool:
        images = load_images(name, Path(where) if where else None, "train", download=download).images
        return memory_pool(images, f"training images of {name}, labels dropped")

    return read


def _svhn(where: str, data: ClassData, seed: int) -> Pool:
    from scipy.io import loadmat  # noqa: PLC0415 - seldom needed

    path = _file(where, "svhn/extra_32x32.mat", "SVHN", "http://ufldl.stanford.edu/housenumbers/")
    try:
        images = loadmat(path, variable_names=["X"])["X"].transpose(3, 0, 1, 2)
    except Exception as error:  # scipy raises a different type for each way in which a file can be broken
        raise UserError(f"{path} is no MATLAB file with images X ({error}): fetch it again") from error
    return _array_pool(images, "SVHN, labels dropped")


def _folder(where: str, data: ClassData, seed: int) -> Pool:
    files = sorted(path for path in Path(where).rglob("*") if path.suffix.lower() in SUFFIXES) if where else []
    if not files:
        raise UserError(f"{where or '--pool.source folder:'}: no image files are there; give a folder of images")
    return Pool(
        len(files), lambda chosen: _decoded([files[i] for i in chosen.tolist()], data.shape), f"images of {where}"
    )


def _decoded(files: Sequence[Path], shape: tuple[int, ...]) -> Tensor:
    """Image files with the shorter side resized to the data set's, the centre cut."""
    from PIL import Image, ImageOps  # noqa: PLC0415

    out = torch.empty(len(files), *shape, dtype=torch.uint8)
    for position, file in enumerate(files):
        try:
            with Image.open(file) as image:
                fitted = ImageOps.fit(image.convert("L" if shape[0] == 1 else "RGB"), (shape[2], shape[1]))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{file} is no readable image ({error}): remove it from the pool") from error
        out[position] = torch.from_numpy(np.array(fitted)).view(*shape[1:], shape[0]).permute(2, 0, 1)
    return out


def _npy(where: str, data: ClassData, seed: int) -> Pool:
    try:
        array = np.load(where, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--pool.source npy:{where}: no readable array is there ({error})") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"--pool.source npy:{where}: an archive of arrays (.npz) is there, one array (.npy) is needed")
    channels_last = array.ndim == 4 and tuple(array.shape[1:]) != data.shape
    return _array_pool(array, f"images of {where}", channels_last)


FETCHED = ("cifar10", "cifar100")
SOURCES: dict[str, Callable[..., Pool]] = {
    "split": _held_back,
    "patches": _patches,
    "official150k": _pickled(
        "data",
        "cil-qud/cifar{}_80m_150k.pkl",
        "the released 150k tiny images",
        "https://www.dropbox.com/sh/hrugy5qb7y80tyl/AAB9THdb7-Kk_I-RIFsL_ywxa?dl=0",
    ),
    "ti500k": _pickled(
        "data",
        "ti_500K_pseudo_labeled.pickle",
        "the 500k tiny images of Carmon et al. 2019",
        "https://github.com/yaircarmon/semisup-adv",
    ),
    "tinyimages-bin": _tiny_images,
    "imagenet32": _downsampled(32),
    "imagenet64": _downsampled(64),
    "cifar10": _named("cifar10"),
    "cifar100": _named("cifar100"),
    "svhn": _svhn,
    "folder": _folder,
    "npy": _npy,
}


# --- audit -----------------------------------------------------------------------------------------------------------------


def digests(images: Tensor) -> list[bytes]:
    """A hash of every image's 8-bit pixels."""
    whole = images if images.dtype == torch.uint8 else (images * 255).round().to(torch.uint8)
    return [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in whole.cpu()]


def find_duplicates(pool: Pool, test: Tensor, near: float = 0.0) -> Int[Tensor, " d"]:
    """Pool indices that are test images [n, c, h, w] by their hash, or closer than `near` in pixel distance."""
    known = set(digests(test))
    # In double precision: cdist expands the square, which loses small distances in single.
    flat = pixels(test).flatten(1).double() if near else None
    found = []
    for first in range(0, len(pool), CHUNK):
        images = pool[torch.arange(first, min(first + CHUNK, len(pool)))]
        same = torch.tensor([digest in known for digest in digests(images)])
        if flat is not None:
            same |= torch.cdist(pixels(images).flatten(1).double(), flat).amin(1) < near
        found.append(same.nonzero().squeeze(1) + first)
    return torch.cat(found)


def audited(pool: Pool, config: PoolConfig, data: ClassData) -> Pool:
    """The pool without the test images in it, or refused for having them."""
    if config.duplicates == "keep":
        return pool
    found = find_duplicates(pool, torch.cat(list(data.test)), config.near)
    if not len(found):
        return pool
    if config.duplicates == "refuse":
        raise UserError(
            f"the pool contains {len(found)} of the test images (pool indices {found[:5].tolist()}...): leave them out "
            "with --pool.duplicates drop"
        )
    rest = without(pool, found)
    rest.provenance += f" ({len(found)} test images left out)"
    return rest


def read_excluded(path: Path | None, size: int) -> Tensor | None:
    """The indices of a text file, one a line. UserError for what is none of the pool's."""
    if path is None:
        return None
    try:
        indices = torch.tensor([int(line) for line in path.read_text(encoding="utf-8").split()], dtype=torch.int64)
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise UserError(f"--pool.exclude {path}: one index a line is needed ({error})") from error
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        raise UserError(f"--pool.exclude {path}: an index lies outside of the pool's 0..{size - 1}")
    return indices
