"""What is done to training views (section 5.4); test views are always clean.

Every corruption takes float images [H, W, 3] in [0, 1] and a NumPy generator, one a view: `view_generator(seed, view)`.
"""

import io
import math
from collections.abc import Callable

import numpy as np

from tenfold_shared.errors import UserError

Image = np.ndarray
Corruption = Callable[[Image, float, np.random.Generator], Image]


def view_generator(seed: int, view: int) -> np.random.Generator:
    """The generator of a view: seeded with 1000 seed + view."""
    return np.random.default_rng(1000 * seed + view)


def salt_and_pepper_at(image: Image, coordinates: np.ndarray) -> Image:
    """The released variant at given pixels [2n, 2] (row, column): the first half turns black, the second white."""
    changed = image.copy()
    black, white = np.split(coordinates, 2)
    changed[black[:, 0], black[:, 1]] = 0
    changed[white[:, 0], white[:, 1]] = 255 if image.dtype == np.uint8 else 1
    return changed


def salt_and_pepper(image: Image, ratio: float, generator: np.random.Generator) -> Image:
    """The released variant: int(H W ratio / 2) black and as many white pixels, drawn with replacement.

    At ratio 0.3 it changes 25.9 % of the pixels.
    """
    height, width = image.shape[:2]
    count = int(height * width * ratio / 2)
    rows, columns = generator.integers(height, size=2 * count), generator.integers(width, size=2 * count)
    return salt_and_pepper_at(image, np.stack([rows, columns], -1))


def salt_and_pepper_bernoulli(image: Image, ratio: float, generator: np.random.Generator) -> Image:
    """Every pixel by itself: black or white with probability ratio / 2 each."""
    draw = generator.random(image.shape[:2])
    changed = image.copy()
    changed[draw < ratio / 2] = 0
    changed[(draw >= ratio / 2) & (draw < ratio)] = 1
    return changed


def gaussian(image: Image, sigma: float, generator: np.random.Generator) -> Image:
    """Additive noise of standard deviation `sigma`, clipped to [0, 1]."""
    return np.clip(image + sigma * generator.standard_normal(image.shape), 0, 1).astype(image.dtype)


def poisson(image: Image, photons: float, generator: np.random.Generator) -> Image:
    """Counting noise of `photons` for a white pixel."""
    return np.clip(generator.poisson(image * photons) / photons, 0, 1).astype(image.dtype)


def blur(image: Image, sigma: float, generator: np.random.Generator) -> Image:
    """Gaussian blur of `sigma` pixels."""
    from scipy.ndimage import gaussian_filter  # noqa: PLC0415 - slow to import

    return gaussian_filter(image, (sigma, sigma, 0), mode="nearest")


def exposure(image: Image, amount: float, generator: np.random.Generator) -> Image:
    """One gain a view, uniform in 1 ± `amount`, clipped."""
    return np.clip(image * generator.uniform(1 - amount, 1 + amount), 0, 1).astype(image.dtype)


def jpeg(image: Image, quality: float, generator: np.random.Generator) -> Image:
    """Compressed at a quality of 1 to 95 and read again."""
    from PIL import Image as Pillow  # noqa: PLC0415 - slow to import

    stored = io.BytesIO()
    Pillow.fromarray((image * 255 + 0.5).astype(np.uint8)).save(stored, "JPEG", quality=int(quality))
    return np.asarray(Pillow.open(stored), dtype=image.dtype) / 255


def occlusion(image: Image, share: float, generator: np.random.Generator) -> Image:
    """A grey box over `share` of the view at a random place."""
    height, width = image.shape[:2]
    tall, wide = (max(1, round(size * math.sqrt(share))) for size in (height, width))
    row, column = generator.integers(height - tall + 1), generator.integers(width - wide + 1)
    changed = image.copy()
    changed[row : row + tall, column : column + wide] = 0.5
    return changed


def pose_noise(
    views: int, offset: float, degrees: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Offsets uniform in ±offset and angles (radians) in ±degrees, [views, 3] each, for `cameras.corrupt_poses`.

    Draws are one [views, 3] block for the offsets, then one for the angles.
    """
    shift = generator.uniform(-offset, offset, (views, 3))
    return shift, np.deg2rad(generator.uniform(-degrees, degrees, (views, 3)))


CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, float]]] = {
    "saltpepper": (salt_and_pepper, (0, 1)),
    "saltpepper-bernoulli": (salt_and_pepper_bernoulli, (0, 1)),
    "gaussian": (gaussian, (0, 10)),
    "poisson": (poisson, (1, 1e9)),
    "blur": (blur, (0, 1e3)),
    "exposure": (exposure, (0, 1)),
    "jpeg": (jpeg, (1, 95)),
    "occlusion": (occlusion, (0, 1)),
}
"""Name -> the corruption, and the range of its amount."""


def corrupt_view(image: Image, kind: str, amount: float, seed: int, view: int) -> Image:
    """A view with one of `CORRUPTIONS`, the same for the same seed and view.

    Raises:
        UserError: an unknown kind, or an amount out of its range.

    """
    if kind not in CORRUPTIONS:
        raise UserError(f"--data.corruption {kind}: it is one of {', '.join(CORRUPTIONS)}")
    corruption, (low, high) = CORRUPTIONS[kind]
    if not low <= amount <= high:
        raise UserError(f"--data.amount {amount:g}: {kind} takes {low:g} to {high:g}")
    return corruption(image, amount, view_generator(seed, view))


def denoise(image: Image) -> Image:
    """A 3 x 3 median over each channel: the simple rival for salt and pepper."""
    from scipy.ndimage import median_filter  # noqa: PLC0415 - slow to import

    return median_filter(image, size=(3, 3, 1), mode="nearest")
