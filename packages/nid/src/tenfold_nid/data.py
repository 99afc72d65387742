"""The paper's data sets in their published layout (section 5)."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def celeba_image(
    raw: UInt8[np.ndarray, "height width 3"], size: tuple[int, int] = (128, 128)
) -> Float[Tensor, "rows cols 3"]:
    """Central square of an aligned photograph (178×178 of 178×218), resized bicubically with Pillow, in [0, 1] (section 5)."""
    from PIL import Image  # noqa: PLC0415

    height, width = raw.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(raw).crop((left, top, left + side, top + side))
    resized = square.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255)
