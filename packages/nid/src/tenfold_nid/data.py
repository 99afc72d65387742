"""The paper's data sets in their published layout (section 5).

Every loader takes the folder that the archive was unpacked into and returns channels-last tensors in [0, 1], unless
said otherwise. What is missing or damaged is named in one sentence, with the place it can be had from.
"""

import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from .errors import DataError
from .shapes import SYNSETS

SOURCES = {
    "celeba": "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html (non-commercial research only)",
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar.html",
    "olivetti": "https://scikit-learn.org/stable/modules/generated/sklearn.datasets.fetch_olivetti_faces.html",
    "yale": "http://vision.ucsd.edu/content/yale-face-database",
    "shapenet": "https://shapenet.org (registration) and http://3d-r2n2.stanford.edu",
}
"""Where each data set comes from; all but CIFAR-10 and Olivetti ask for an agreement and are not fetched for you."""
SPLITS = {"train": "0", "val": "1", "test": "2"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".pgm", ".ppm", ".gif"}


def _require(path: Path, data_set: str) -> Path:
    if not path.exists():
        raise DataError(
            f"{path} is missing; get {data_set} from {SOURCES[data_set]} and unpack it so that this path exists"
        )
    return path


def _read_image(path: Path, mode: str | None = "RGB") -> np.ndarray:
    from PIL import Image, UnidentifiedImageError  # noqa: PLC0415

    try:
        with Image.open(path) as image:
            depth = image.mode
            pixels = np.asarray(image if mode is None else image.convert(mode))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} is no image, or damaged ({error}); fetch it again") from error
    if depth[0] in "IF":  # Pillow cuts these off at 255
        raise DataError(f"{path} has more than 8 bits a pixel (mode {depth}): convert it to an image of 8 bits")
    return pixels


def _to_float(images: UInt8[np.ndarray, "*shape"]) -> Float[Tensor, "*shape"]:
    return torch.from_numpy(images.astype(np.float32) / 255)


def celeba_image(
    raw: UInt8[np.ndarray, "height width 3"], size: tuple[int, int] = (128, 128)
) -> Float[Tensor, "rows cols 3"]:
    """Central square of an aligned photograph (178×178 of 178×218), resized bicubically with Pillow, in [0, 1] (section
    5).
    """
    from PIL import Image  # noqa: PLC0415

    height, width = raw.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(raw).crop((left, top, left + side, top + side))
    resized = square.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255)


def celeba_names(root: str | Path, split: str) -> list[str]:
    """File names of a split, in the order of ``list_eval_partition.txt``.

    Raises:
        DataError: the list is missing, malformed, or has nothing in that split.

    """
    path = _require(Path(root) / "list_eval_partition.txt", "celeba")
    names = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) != 2 or parts[1] not in SPLITS.values():
            raise DataError(f"{path}:{number}: expected 'name 0|1|2', got {line!r}")
        if parts[1] == SPLITS[split]:
            names.append(parts[0])
    if not names:
        raise DataError(f"{path} lists no image of the split {split!r}")
    return names


def celeba(
    root: str | Path, split: str = "train", *, subset: int | None = 500, size: tuple[int, int] = (128, 128)
) -> Float[Tensor, "images rows cols 3"]:
    """CelebA: ``img_align_celeba/*.jpg`` and ``list_eval_partition.txt``; the first ``subset`` names of the split."""
    folder = _require(Path(root) / "img_align_celeba", "celeba")
    images = []
    for name in celeba_names(root, split)[:subset]:
        images.append(celeba_image(_read_image(_require(folder / name, "celeba")), size))
    return torch.stack(images)


def spread(count: int, subset: int | None) -> list[int]:
    """Indices of a subset spread evenly over a data set."""
    if subset is None or subset >= count:
        return list(range(count))
    return np.linspace(0, count - 1, subset).astype(int).tolist()


def cifar10(
    root: str | Path, split: str = "train", *, subset: int | None = None, download: bool = False
) -> Float[Tensor, "images 32 32 3"]:
    """CIFAR-10, an evenly spread subset of it.

    Raises:
        UserError: the set is missing (and not fetched) or damaged.

    """
    from tenfold_shared.images import load_images  # noqa: PLC0415

    images = load_images("cifar10", root, split, download).images.movedim(1, -1)
    return images[spread(len(images), subset)].float() / 255


def every_eighth(count: int, split: str) -> list[int]:
    """Indices of the face data sets: every eighth from 1 on is for testing."""
    test = set(range(1, count, 8))
    return [i for i in range(count) if (i in test) == (split == "test")]


def olivetti(root: str | Path, split: str = "train", *, download: bool = False) -> Float[Tensor, "images 64 64 1"]:
    """Olivetti faces through scikit-learn."""
    from sklearn.datasets import fetch_olivetti_faces  # noqa: PLC0415

    try:
        faces = fetch_olivetti_faces(data_home=str(root), download_if_missing=download).images
    except OSError as error:
        raise DataError(
            f"{root}: Olivetti faces are missing; get them from {SOURCES['olivetti']} or allow the download"
        ) from error
    except Exception as error:  # joblib raises a different type for each way in which a file can be broken
        raise DataError(
            f"{root}: the Olivetti faces there are damaged ({error}); remove them and fetch them again"
        ) from error
    return torch.from_numpy(faces[every_eighth(len(faces), split)].astype(np.float32))[..., None]


def yale(root: str | Path, split: str = "train") -> Float[Tensor, "images rows cols 1"]:
    """Yale faces: files ``subjectNN.condition``, read in the order of their names."""
    folder = _require(Path(root), "yale")
    files = sorted(p for p in folder.iterdir() if p.name.startswith("subject")) if folder.is_dir() else []
    if len(files) < 2:  # one to learn from, one to code
        raise DataError(
            f"{root} holds {len(files) or 'no'} file subjectNN.condition; get the Yale faces from {SOURCES['yale']}"
        )
    chosen = [files[i] for i in every_eighth(len(files), split)]
    return _to_float(_stack(chosen, "L"))[..., None]


def _stack(files: Sequence[Path], mode: str | None) -> np.ndarray:
    images = [_read_image(f, mode) for f in files]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                f"{file} is {image.shape[:2]} pixels, {files[0].name} is {images[0].shape[:2]}; all must be alike"
            )
    return np.stack(images)


def read_images(files: Sequence[Path], channels: int) -> Float[Tensor, "images height width channels"]:
    """Image files of one size, grey or in colour.

    Raises:
        DataError: a file is missing or damaged, the sizes differ, or images have neither 1 nor 3 channels.

    """
    if channels not in {1, 3}:
        raise DataError(f"image files have 1 or 3 channels, not {channels}")
    images = _to_float(_stack(files, "L" if channels == 1 else "RGB"))
    return images[..., None] if channels == 1 else images


def frames(folder: str | Path) -> Float[Tensor, "frames height width 3"]:
    """A video as a folder of images, in the order of their names."""
    path = Path(folder)
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES) if path.is_dir() else []
    if not files:
        raise DataError(
            f"{folder} holds no images; write the frames of the video there (for example with ffmpeg) as .png"
        )
    return _to_float(_stack(files, "RGB"))


def _load_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no array of numbers, or damaged ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        raise DataError(f"{path} is no array of numbers: save it with numpy.save")
    if not np.isfinite(array).all():
        raise DataError(f"{path} holds values that are not finite; make it again")
    return array


def ct_images(path: str | Path) -> Float[Tensor, "images height width 1"]:
    """Slices for tomography: an ``.npy`` file [N, H, W], values as they are."""
    if not Path(path).exists():
        raise DataError(
            f"{path} is missing: the random Shepp-Logan phantoms were not distributed; save slices [N, H, W] there, or take "
            "the set phantoms, which makes their like"
        )
    array = _load_array(Path(path))
    if array.ndim != 3:
        raise DataError(f"{path} has shape {array.shape}; images [N, H, W] are expected")
    return torch.from_numpy(array.astype(np.float32))[..., None]


def shapenet_ids(split_file: str | Path, split: str, synset: str = "03001627") -> list[str]:
    """Shape ids of a category and split from the R2N2 split file (``pix2mesh_splits_val05.json``).

    Raises:
        DataError: the category is unknown, or the file holds no such split.

    """
    import json  # noqa: PLC0415

    if synset not in SYNSETS:
        raise DataError(f"unknown category {synset}; there are " + ", ".join(f"{k} ({v})" for k, v in SYNSETS.items()))
    path = _require(Path(split_file), "shapenet")
    try:
        return sorted(json.loads(path.read_text(encoding="utf-8"))[split][synset])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} has no entry [{split!r}][{synset!r}]") from error


def sdf_volumes(folder: str | Path, ids: Sequence[str] | None = None) -> Iterator[tuple[str, Float[Tensor, "d h w 1"]]]:
    """Signed distance lattices ``<id>.sdf.npy``, one after the other (a 128³ lattice is 8 MB)."""
    path = _require(Path(folder), "shapenet")
    names = sorted(p.name.removesuffix(".sdf.npy") for p in path.glob("*.sdf.npy")) if ids is None else ids
    if not names:
        raise DataError(f"{folder} holds no <id>.sdf.npy; make them from meshes with tenfold_nid.shapes.sdf_from_mesh")
    first = None
    for name in names:
        array = _load_array(_require(path / f"{name}.sdf.npy", "shapenet"))
        first = first or array.shape
        if array.ndim != 3:
            raise DataError(f"{path / name}.sdf.npy has shape {array.shape}; a lattice [D, H, W] is expected")
        if array.shape != first:
            raise DataError(f"{path / name}.sdf.npy has shape {array.shape}, {names[0]} has {first}; all must be alike")
        yield name, torch.from_numpy(array.astype(np.float32))[..., None]


def point_cloud(path: str | Path) -> tuple[Float[Tensor, "points 3"], Float[Tensor, "points 3"]]:
    """Oriented points: rows ``x y z nx ny nz`` of an ``.xyz`` file; points and unit normals.

    Raises:
        DataError: the file is missing or a row has not six numbers.

    """
    file = Path(path)
    if not file.exists():
        raise DataError(f"{path} is missing; give an .xyz file with a row x y z nx ny nz for each point")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file without rows: said below
            rows: Any = np.loadtxt(file, dtype=np.float32, ndmin=2)
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: {error}") from error
    if not rows.size:
        raise DataError(f"{path} has no points: a row x y z nx ny nz for each is expected")
    if rows.shape[1:] != (6,):
        raise DataError(f"{path} has rows of {rows.shape[-1]} numbers; x y z nx ny nz are expected")
    if not np.isfinite(rows).all():
        raise DataError(
            f"{path}: row {int(np.isfinite(rows).all(axis=1).argmin()) + 1} holds a value that is not finite"
        )
    table = torch.from_numpy(rows)
    return table[:, :3], torch.nn.functional.normalize(table[:, 3:], dim=-1)
