"""Images with their cameras: the `Scene` type, image files that are decoded once while they fit, reading and writing of pictures."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tenfold_shared.errors import UserError
from tenfold_shared.scenes.cameras import CameraSet

# Decoded pictures that a process keeps: a scene of hundreds of photographs whole, but not a collection of a thousand scenes.
KEPT_BYTES = 2 * 2**30
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def pillow() -> Any:
    """`PIL.Image`, imported when the first picture is touched.

    Raises:
        UserError: Pillow is not installed.

    """
    try:
        from PIL import Image  # noqa: PLC0415 - optional dependency of the `scenes` extra
    except ImportError as error:
        raise UserError("reading pictures needs Pillow: pip install 'tenfold-shared[scenes]'") from error
    return Image


def read_image(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """The picture at `path` as uint8 [H, W, 3] or, with transparency, [H, W, 4].

    Args:
        path: any format that Pillow reads.
        size: (height, width) to resize to by area averaging, if the picture has another.

    Raises:
        UserError: the file is missing, cut short or no picture.

    """
    image_type = pillow()
    try:
        with image_type.open(path) as image:
            mode = "RGBA" if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info else "RGB"
            converted = image.convert(mode)
    except FileNotFoundError:
        raise UserError(f"the image {path} does not exist") from None
    except Exception as error:  # Pillow raises many types on damaged files
        raise UserError(f"the image {path} cannot be decoded ({error}); fetch it again") from error
    if size is not None and (converted.height, converted.width) != size:
        converted = converted.resize((size[1], size[0]), image_type.Resampling.BOX)
    return np.asarray(converted)


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) from the header of a picture.

    Raises:
        UserError: the file is missing or no picture.

    """
    image_type = pillow()
    try:
        with image_type.open(path) as image:
            return image.height, image.width
    except FileNotFoundError:
        raise UserError(f"the image {path} does not exist") from None
    except Exception as error:  # Pillow raises many types on damaged files
        raise UserError(f"the image {path} cannot be decoded ({error}); fetch it again") from error


def read_array(path: Path) -> np.ndarray:
    """The array of an `.npy` file.

    Raises:
        UserError: the file is damaged, or holds objects.

    """
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged header is parsed as Python, and fails in as many ways
        raise UserError(f"{path} is damaged ({error}); fetch it again") from error


def write_image(path: Path, image: np.ndarray) -> None:
    """Write [H, W, 1, 3 or 4] as an 8-bit picture; floats are clipped to [0, 1] and rounded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = image.ndim == 3 and image.shape[2] == 1
    pillow().fromarray(to_uint8(image[..., 0] if grey else image)).save(path)


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] (clipped) as uint8 by rounding; uint8 passes."""
    return image if image.dtype == np.uint8 else (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def list_images(folder: Path) -> list[Path]:
    """The pictures of `folder`, sorted by name.

    Raises:
        UserError: there is no such folder, or no picture in it.

    """
    if not folder.is_dir():
        raise UserError(f"the image folder {folder} does not exist")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise UserError(f"the folder {folder} holds no image")
    return found


def common_size(paths: Sequence[Path]) -> tuple[int, int]:
    """The one (height, width) of all files.

    Raises:
        UserError: two files differ in size; both are named.

    """
    first = image_size(paths[0])
    for path in paths[1:]:
        if (size := image_size(path)) != first:
            raise UserError(
                f"images of one scene need one size: {paths[0].name} is {first[1]}x{first[0]} and "
                f"{path.name} is {size[1]}x{size[0]} (in {path.parent})"
            )
    return first


class ImageFiles(Sequence[np.ndarray]):
    """Pictures on disk as a sequence of uint8 arrays [H, W, 3 or 4]; the last ones decoded are kept (`KEPT_BYTES`).

    Args:
        paths: the files, in the order of the cameras.
        size: (height, width) that every picture must have, or is resized to when `resize` is set.
        resize: resize pictures of another size instead of refusing them.

    """

    def __init__(self, paths: Sequence[Path], size: tuple[int, int], *, resize: bool = False) -> None:
        self.paths, self.size, self.resize = list(paths), size, resize
        self._decoded: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        index = range(len(self.paths))[index]
        with self._lock:
            image = self._decoded.get(index)
            if image is None:
                image = self._decoded[index] = self.decode(index)
        _KEPT.note(self, index, image.nbytes)
        return image

    def decode(self, index: int) -> np.ndarray:
        """Picture `index` from its file.

        Raises:
            UserError: it cannot be read, or is of another size.

        """
        image = read_image(self.paths[index], self.size if self.resize else None)
        if image.shape[:2] != self.size:
            height, width = image.shape[:2]
            raise UserError(
                f"the image {self.paths[index]} is {width}x{height}, its camera says {self.size[1]}x{self.size[0]}"
            )
        return image

    def forget(self, index: int) -> None:
        """Decode picture `index` anew when it is asked for again."""
        self._decoded.pop(index, None)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_decoded")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _decoded={})


class _Kept:
    """Which pictures were asked for last, of all sequences; the oldest beyond `KEPT_BYTES` are forgotten.

    Those of a sequence that is gone count until they are the oldest: too few are kept then, never too many.
    """

    def __init__(self) -> None:
        self.sizes: OrderedDict[tuple[weakref.ref[ImageFiles], int], int] = OrderedDict()
        self.total, self.lock = 0, threading.Lock()

    def note(self, files: ImageFiles, index: int, size: int) -> None:
        key = weakref.ref(files), index
        with self.lock:
            self.total += size - self.sizes.pop(key, 0)
            self.sizes[key] = size
            while self.total > KEPT_BYTES:
                (owner, oldest), freed = self.sizes.popitem(last=False)
                self.total -= freed
                if (holder := owner()) is not None:
                    holder.forget(oldest)


_KEPT = _Kept()


@dataclass(frozen=True)
class Scene:
    """Images of one static scene with their cameras.

    Attributes:
        name: of the scene, for messages and output folders.
        cameras: N views.
        images: N pictures [H, W, 3 or 4], uint8 or floats in [0, 1]; a fourth channel is (straight) alpha.
        depth: true z-depth [N, H, W], inf where the ray meets nothing; None where unknown.

    Raises:
        UserError: as many images as cameras are not there.

    """

    name: str
    cameras: CameraSet
    images: Sequence[np.ndarray]
    depth: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.images) != len(self.cameras):
            raise UserError(
                f"scene {self.name} has {len(self.cameras)} poses and {len(self.images)} images; they must correspond"
            )

    def __len__(self) -> int:
        return len(self.cameras)

    def rgb(self, view: int, background: float = 1.0) -> np.ndarray:
        """View `view` as float32 [H, W, 3] in [0, 1], composited on a grey of value `background` where transparent."""
        image = self.images[view]
        pixels = image.astype(np.float32) / np.float32(255) if image.dtype == np.uint8 else image.astype(np.float32)
        if pixels.shape[-1] == 3:
            return pixels
        alpha = pixels[..., 3:]
        return pixels[..., :3] * alpha + np.float32(background) * (1 - alpha)

    def all_rgb(self, background: float = 1.0) -> np.ndarray:
        """All views, float32 [N, H, W, 3]."""
        return np.stack([self.rgb(i, background) for i in range(len(self))])

    def alpha(self, view: int) -> np.ndarray | None:
        """Coverage [H, W] in [0, 1] of a view, or None for images without transparency."""
        image = self.images[view]
        if image.shape[-1] == 3:
            return None
        return image[..., 3].astype(np.float32) / np.float32(255 if image.dtype == np.uint8 else 1)

    def subset(self, views: Sequence[int] | np.ndarray) -> Scene:
        """The chosen views; pictures are not decoded by this."""
        chosen = np.asarray(views)
        index = np.arange(len(self))[chosen if chosen.dtype == bool else chosen.astype(int)]
        return replace(
            self,
            cameras=self.cameras[index],
            images=_Selection(self.images, index),
            depth=None if self.depth is None else self.depth[index],
        )

    def split(self, hold: int = 8) -> tuple[Scene, Scene]:
        """(train, test): every `hold`-th view from 0 is a test view."""
        index = np.arange(len(self))
        return self.subset(index[index % hold != 0]), self.subset(index[index % hold == 0])


class _Selection(Sequence[np.ndarray]):
    """Some elements of a sequence, looked up on demand."""

    def __init__(self, images: Sequence[np.ndarray], views: np.ndarray) -> None:
        self.images, self.views = images, views

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        return self.images[int(self.views[index])]
