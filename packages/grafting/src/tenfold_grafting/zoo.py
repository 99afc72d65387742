"""Trained networks in plain arrays, with what is needed to verify them: the layout of the bundled benchmark set.

A file holds ``w/<state key>`` arrays and ``meta``, a JSON string with input_shape, mean, std, eps, classes and arch:
a list of layers (`networks.from_layers`) or the name of an architecture.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tenfold_grafting.graph import Normalise
from tenfold_grafting.networks import create_network, from_layers
from tenfold_shared.errors import UserError


def load_network(path: Path) -> tuple[nn.Sequential, dict[str, Any]]:
    """The normalisation followed by the network, in evaluation mode, and the file's `meta`.

    Raises:
        UserError: the file is missing or unreadable, or its arrays do not fit its architecture.

    """
    if not path.is_file():
        raise UserError(f"no network at {path}: check the path")
    try:
        with np.load(path, allow_pickle=False) as file:
            meta = json.loads(str(np.asarray(file["meta"]).reshape(-1)[0]))
            state = {name[2:]: torch.from_numpy(file[name]) for name in file.files if name.startswith("w/")}
        arch, classes, channels = meta["arch"], meta["classes"], meta["input_shape"][0]
        mean, std = (list(meta[key]) for key in ("mean", "std"))
    except Exception as error:  # numpy and zipfile raise a different type for each way in which a file can be broken
        raise UserError(f"{path} is no readable network ({str(error).splitlines()[0][:120]})") from error
    model = create_network(arch, classes) if isinstance(arch, str) else from_layers(arch)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit its architecture: {' '.join(str(error).split())[:300]}") from error
    mean, std = (values * channels if len(values) == 1 else values for values in (mean, std))
    return nn.Sequential(Normalise(mean, std), model).eval(), meta


def load_images(path: Path) -> tuple[Float[Tensor, "n channels height width"], Int[Tensor, " n"]]:
    """Pixels in [0, 1] (float64) and labels of a file with ``x`` (uint8) and ``y``.

    Raises:
        UserError: the file is missing or unreadable.

    """
    if not path.is_file():
        raise UserError(f"no images at {path}: check the path")
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = torch.from_numpy(file["x"]), torch.from_numpy(file["y"])
    except Exception as error:
        raise UserError(f"{path} is no readable image file ({str(error).splitlines()[0][:120]})") from error
    if images.dtype != torch.uint8 or images.dim() != 4 or len(labels) != len(images):
        raise UserError(f"{path} holds {images.dtype} {tuple(images.shape)}, expected x uint8 [n, c, h, w] and y [n]")
    if not len(images):
        raise UserError(f"{path} holds no images")
    return images.double() / 255, labels.long()
