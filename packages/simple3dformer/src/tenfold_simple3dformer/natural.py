"""`natural2d`: crops of the pictures that come with scikit-image, labelled by their picture (section 5).

The stand-in for ImageNet pretraining and for the image stream of learning without forgetting.
"""

import functools
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from numpy.random import RandomState

from tenfold_shared.errors import UserError
from tenfold_shared.images import ImageSet

PICTURES = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png", "coins.png",
    "color.png", "grass.png", "gravel.png", "horse.png", "hubble_deep_field.jpg", "ihc.png", "microaneurysms.png",
    "moon.png", "motorcycle_left.png", "page.png", "phantom.png", "retina.jpg", "rocket.jpg", "text.png",
)  # fmt: skip


@functools.cache
def pictures() -> list[UInt8[ndarray, "h w"]]:
    """The 22 pictures in grey.

    Raises:
        UserError: scikit-image is installed without them.

    """
    import skimage  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    folder = Path(str(skimage.__file__)).parent / "data"
    found = []
    for name in PICTURES:
        if not (folder / name).is_file():
            raise UserError(f"scikit-image is installed without its picture {name} ({folder}): reinstall scikit-image")
        with Image.open(folder / name) as image:
            found.append(np.asarray(image.convert("L")))
    return found


def crops(count: int, seed: int, size: int = 32) -> ImageSet:
    """Random square crops of side 48 to 160 pixels, scaled to ``size``, half of them mirrored; balanced over pictures."""
    from PIL import Image  # noqa: PLC0415

    rng = RandomState(seed)
    images = np.empty((count, 1, size, size), np.uint8)
    labels = np.arange(count) % len(PICTURES)
    for i, label in enumerate(labels):
        picture = pictures()[label]
        side = min(rng.randint(48, 161), *picture.shape)
        top, left = rng.randint(picture.shape[0] - side + 1), rng.randint(picture.shape[1] - side + 1)
        cut = Image.fromarray(picture[top : top + side, left : left + side]).resize(
            (size, size), Image.Resampling.BILINEAR
        )
        crop = np.asarray(cut)
        images[i, 0] = crop[:, ::-1] if rng.random_sample() < 0.5 else crop
    names = tuple(Path(name).stem for name in PICTURES)
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels).long(), names)


def standardised(
    images: Float[torch.Tensor, "n 1 s s"] | UInt8[torch.Tensor, "n 1 s s"],
) -> Float[torch.Tensor, "n 1 s s"]:
    """Every crop with mean 0 and standard deviation 1; a flat one is 0."""
    x = images.float()
    x = x - x.mean((1, 2, 3), keepdim=True)
    return x / x.std((1, 2, 3), keepdim=True).clamp(min=1.0)
