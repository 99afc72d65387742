"""Which signals are learned and which are coded: every data set of the paper, and what comes with the dependencies, as
arrays (section 5).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tenfold_shared.batches import generator
from tenfold_shared.download import data_root
from tenfold_shared.errors import UserError

from . import data, embedded
from .coordinates import lattice
from .corruptions import observe_fraction, occlude, shift_colours
from .patches import resize, split_patches
from .shapes import marching_cubes, primitive_sdf, sample_surface

DataName = Literal[
    "photographs", "faces", "discs", "phantoms", "primitives",
    "celeba", "cifar10", "olivetti", "yale", "video", "ct", "shapenet", "pointcloud",
]  # fmt: skip
EMBEDDED: tuple[DataName, ...] = get_args(DataName)[:5]
"""Sets that need no download."""
PROJECTED = ("phantoms", "ct")
"""Sets that are seen through a tomograph."""
Corruption = Literal["none", "occlusion", "colour", "both"]


@dataclass
class DataConfig:
    """Which signals."""

    name: DataName = "photographs"
    """The data set. Without a download: patches of photographs, faces, a video of moving discs, ellipse phantoms,
    distances of primitives; the others are the paper's."""
    root: Path | None = None
    """Folder of the data set (of pointcloud: the .xyz file); default: one of its name in the data root ($TENFOLD_DATA or the platform's cache)."""
    download: bool = False
    """Fetch the data set when it is not there and may be fetched."""
    size: int = 0
    """Samples along each axis to which a signal is brought; 0 leaves it as it comes."""
    patch: int = 0
    """Side of the patches that images are cut into, each a signal of its own; 0 takes whole images."""
    train_subset: int = 500
    """Images, phantoms or shapes to learn from; photographs, faces, olivetti, yale and videos are taken whole."""
    test_subset: int = 500
    """Images, phantoms or shapes to code; the sets above are taken whole."""
    views: int = 127
    """Views of the tomograph in training; both ends of the half turn are among them."""
    category: str = "03001627"
    """ShapeNet category (synset); the default is chair."""
    validation: bool = False
    """Code signals held out from the training set in the place of the test set; for choosing values."""
    fraction: float = 1.0
    """Part of a new signal's samples that is observed, drawn at random."""
    test_views: int = 0
    """Views of a new signal that are observed in tomography; 0: all."""
    corruption: Corruption = "none"
    """What is done to the images that are coded: a square of stripes, a shift of colours, or both."""

    def __post_init__(self) -> None:
        """Refuse what no data set can give."""
        if not 0 < self.fraction <= 1:
            raise UserError(f"--data.fraction lies in (0, 1], got {self.fraction}")
        for name in ("train_subset", "test_subset", "views"):
            if getattr(self, name) < 1:
                raise UserError(f"--data.{name} takes 1 or more, got {getattr(self, name)}")
        if self.name in PROJECTED and self.fraction < 1:
            raise UserError(
                f"--data.fraction hides samples, of {self.name} projections are seen: use --data.test_views"
            )
        if self.name not in PROJECTED and self.test_views:
            raise UserError(f"--data.test_views are a tomograph's, {self.name} is sampled: use --data.fraction")
        if self.name == "photographs" and self.patch:
            raise UserError("--data.patch: photographs come in patches of 16 pixels, leave it out")
        if self.test_views < 0 or self.size < 0 or self.patch < 0:
            raise UserError("--data.size, --data.patch and --data.test_views take 0 or more")


class Signals(NamedTuple):
    """Signals sampled on a lattice, values as the paper takes them ([0, 1] for images)."""

    train: Float[Tensor, "train *spatial channels"]
    test: Float[Tensor, "test *spatial channels"]
    seen: Float[Tensor, "test *spatial channels"]
    """what is given of the test signals: themselves, or a corrupted form"""
    image: tuple[int, int] | None = None
    """size of the images whose complete patches, row by row, are the test signals"""

    def to(self, device: torch.device) -> "Signals":
        """The signals on a device."""
        return Signals(self.train.to(device), self.test.to(device), self.seen.to(device), self.image)


def load_signals(config: DataConfig) -> Signals:
    """The signals of a data set.

    Raises:
        UserError: it is not there (the message says where to get it and where to put it), damaged, or of a size that
            does not divide into patches.

    """
    if config.name == "pointcloud":
        raise UserError("a point cloud is one shape, no set of signals: train --method scratch takes it")
    if config.name in EMBEDDED:
        train, test = _embedded(config)
    else:
        train, test = _published(config)
        if config.validation:
            test = train[-max(1, len(train) // 10) :]
            train = train[: -len(test)]
        if not len(train) or not len(test):
            raise UserError(
                f"{config.name}: {len(train)} signals to learn from and {len(test)} to code; each takes at least 1"
            )
    if train.ndim != 4 and (config.patch or config.corruption != "none"):
        raise UserError(f"--data.patch and --data.corruption are for images; {config.name} has volumes")
    if config.size:
        train, test = (_sized(x, config.size) for x in (train, test))
    seen = corrupt(test, config.corruption)
    if not config.patch:
        return Signals(train, test, seen)
    side = (config.patch, config.patch)
    try:
        cut = [split_patches(x, side) for x in (train, test, seen)]
    except ValueError as error:
        raise UserError(f"--data.patch {config.patch}: {error}") from error
    return Signals(cut[0], cut[1], cut[2], (test.shape[1], test.shape[2]))


def _embedded(config: DataConfig) -> tuple[Tensor, Tensor]:
    if config.name == "photographs":
        if config.validation:
            return embedded.photograph_patches("fit"), embedded.photograph_patches("validation")
        return embedded.photograph_patches("train"), embedded.photograph_patches("test")
    if config.name == "faces":
        train = embedded.faces("train")
        if config.validation:  # mirror images stay on the side of their originals
            half, kept = len(train) // 2, len(train) // 2 - 16
            return torch.cat([train[:kept], train[half : half + kept]]), train[kept:half]
        return train, embedded.faces("test")
    if config.name == "discs":
        frames = embedded.moving_discs(side=config.size or 64).frames
        return frames, frames
    seed = 2 if config.validation else 1
    size = config.size or (64 if config.name == "phantoms" else 32)
    make = embedded.phantoms if config.name == "phantoms" else embedded.distance_fields
    return make(config.train_subset, size, 0), make(config.test_subset, size, seed)


def _published(config: DataConfig) -> tuple[Tensor, Tensor]:
    root = config.root or data_root() / config.name
    name, size = config.name, config.size
    if name == "celeba":
        side = (size or 128, size or 128)
        return (
            data.celeba(root, "train", subset=config.train_subset, size=side),
            data.celeba(root, "test", subset=config.test_subset, size=side),
        )
    if name == "cifar10":
        place = config.root or data_root()
        return (
            data.cifar10(place, "train", subset=config.train_subset, download=config.download),
            data.cifar10(place, "test", subset=config.test_subset),
        )
    if name == "olivetti":
        return data.olivetti(root, "train", download=config.download), data.olivetti(root, "test")
    if name == "yale":
        return data.yale(root, "train"), data.yale(root, "test")
    if name == "video":
        frames = data.frames(root)
        return frames, frames
    if name == "ct":
        images = data.ct_images(root / "images.npy")
        if len(images) < 2:
            raise UserError(
                f"{root / 'images.npy'} has {len(images)} slices: at least one to learn from and one to code"
            )
        held = min(config.test_subset, len(images) // 2)  # where there are fewer than asked for, half are coded
        count = min(config.train_subset, len(images) - held)
        return images[:count], images[count : count + config.test_subset]
    splits = root / "pix2mesh_splits_val05.json"
    chosen = []
    for split, subset in (("train", config.train_subset), ("test", config.test_subset)):
        ids = data.shapenet_ids(splits, split, config.category)[:subset]
        chosen.append(torch.stack([volume for _, volume in data.sdf_volumes(root / config.category, ids)]))
    return chosen[0], chosen[1]


def load_points(config: DataConfig) -> tuple[Float[Tensor, "points 3"], Float[Tensor, "points 3"]]:
    """Oriented points of one surface: a file's, or 10,000 of a torus when none is named."""
    if config.root is not None:
        return data.point_cloud(config.root)
    field = primitive_sdf("torus", lattice((32,) * 3)).view(32, 32, 32)
    points, normals = sample_surface(marching_cubes(field), 10_000, generator(0))
    return points.float(), normals.float()


def _sized(signals: Tensor, size: int) -> Tensor:
    spatial = signals.shape[1:-1]
    if all(n == size for n in spatial):
        return signals
    if len(spatial) == 2:
        return resize(signals, (size, size))
    return torch.nn.functional.interpolate(
        signals.movedim(-1, 1), size=(size,) * 3, mode="trilinear", align_corners=True
    ).movedim(1, -1)


def corrupt(
    images: Float[Tensor, "batch *spatial channels"], kind: Corruption
) -> Float[Tensor, "batch *spatial channels"]:
    """Images with the disturbances of the inpainting experiments; image i draws from seed i, colours come first."""
    if kind == "none":
        return images
    out = []
    for seed, image in enumerate(images):
        shifted = shift_colours(image, seed) if kind in {"colour", "both"} else image
        side = min(image.shape[:2]) // 2
        out.append(occlude(shifted, seed, size=min(64, side)) if kind in {"occlusion", "both"} else shifted)
    return torch.stack(out)


def observation(
    signals: Float[Tensor, "batch *spatial channels"], fraction: float, seed: int
) -> Bool[Tensor, "batch *spatial"] | None:
    """Which samples of each signal are observed; None for all of them.

    Raises:
        UserError: not one sample would be.

    """
    if fraction == 1:
        return None
    points = signals[0, ..., 0].numel()
    try:
        mask = observe_fraction(len(signals), points, fraction, generator(seed, points))
    except ValueError as error:
        raise UserError(f"--data.fraction {fraction}: {error}") from error
    return mask.view(signals.shape[:-1]).to(signals.device)
