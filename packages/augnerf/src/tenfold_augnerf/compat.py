"""The released checkpoints (section 4): their layout, other NeRF codes' layouts, export.

A released file holds `global_step`, `model` and `optimizer`. Keys of the model are `nerf.mlp.*`, `nerf_fine.mlp.*` and,
for adversarial models, `nerf_adv.mlp.*`; our state dicts have the same names. The released networks know one density, a
ReLU; a file of ours with another names it under `density`, which other readers of the layout pass over.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from tenfold_augnerf.models import ModelConfig, create_model
from tenfold_augnerf.renderer import RELEASED, RaySampling, Renderer, Variant
from tenfold_shared.checkpoint import load_pickled_tensors
from tenfold_shared.errors import UserError

logger = logging.getLogger(__name__)
BRANCHES = ("nerf", "nerf_fine", "nerf_adv")
Density = Literal["relu", "softplus"]


class CheckpointError(UserError):
    """A checkpoint of no known layout, or one that does not fit; the keys are named."""


def convert(content: Mapping[str, Any], where: str = "the checkpoint") -> dict[str, Tensor]:
    """A state dict with the released names, from a released file, a bare state dict, or the two networks of nerf-pytorch.

    Raises:
        CheckpointError: none of these.

    """
    if "network_fn_state_dict" in content:
        state = {f"nerf.mlp.{name}": value for name, value in content["network_fn_state_dict"].items()}
        fine = content.get("network_fine_state_dict") or content["network_fn_state_dict"]
        return state | {f"nerf_fine.mlp.{name}": value for name, value in fine.items()}
    state = content.get("model", content)
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"{where} holds no state dict: expected tensors under `model`, or networks of nerf-pytorch"
        )
    state = {name.removeprefix("module."): value for name, value in state.items()}
    strangers = [name for name in state if name.split(".")[0] not in BRANCHES]
    if strangers:
        raise CheckpointError(f"{where} has keys of no network of a released model: {', '.join(strangers[:8])}")
    return state


def density_of(content: Mapping[str, Any]) -> Density:
    """The activation of the density that a file names under `density`; the released one where it names none.

    Raises:
        CheckpointError: an activation that there is not.

    """
    named = content.get("density", "relu")
    if named not in get_args(Density):
        raise CheckpointError(
            f"the checkpoint's density is {named!r}: the activations are {', '.join(get_args(Density))}"
        )
    return cast(Density, named)


def recognise(state: Mapping[str, Tensor], density: Density = "relu") -> ModelConfig:
    """Depth, width and encodings from the shapes of a state dict with released names, which say nothing on the density.

    Raises:
        CheckpointError: the layers that tell are missing.

    """
    layers = [int(m[1]) for name in state if (m := re.fullmatch(r"nerf\.mlp\.pts_linears\.(\d+)\.weight", name))]
    first = state.get("nerf.mlp.pts_linears.0.weight")
    if not layers or first is None or first.ndim != 2:
        raise CheckpointError("the checkpoint has no nerf.mlp.pts_linears.0.weight: it is no released model")
    width, points = first.shape
    views = state.get("nerf.mlp.views_linears.0.weight")
    directions = 0 if views is None else views.shape[1] - width
    depth = max(layers) + 1
    if points % 6 == 0:
        return ModelConfig("mip-nerf", depth, width, points // 6, (directions // 3 - 1) // 2)
    conv, embedded = "nerf.conv_embed.weight" in state, points > 3 or directions > 3
    octaves = (points // 3 - 1) // 2 if embedded else ModelConfig.octaves
    view_octaves = (directions // 3 - 1) // 2 if embedded and directions else ModelConfig.view_octaves
    return ModelConfig(
        "nerf",
        depth,
        width,
        octaves,
        view_octaves,
        viewdirs=views is not None,
        use_embed=embedded,
        conv_embed=conv,
        density=density,
    )


def misfits(state: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """What does not fit, one phrase a key."""
    own = model.state_dict()
    found = [f"missing {name}" for name in own if name not in state]
    found += [f"unexpected {name}" for name in state if name not in own]
    return found + [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state dict with released names; the auxiliary network is dropped, with a message, where there is none.

    Raises:
        CheckpointError: keys or shapes that do not fit, listed; the model is then unchanged.

    """
    own = model.state_dict()
    auxiliary = [name for name in state if name.startswith("nerf_adv.")]
    if auxiliary and not any(name.startswith("nerf_adv.") for name in own):
        logger.warning("nerf_adv is left out: the shared model has no auxiliary network, and evaluation never asks it")
        state = {name: value for name, value in state.items() if name not in auxiliary}
    wrong = misfits(state, model)
    if wrong:
        shown = "; ".join(wrong[:12]) + (f"; and {len(wrong) - 12} more" if len(wrong) > 12 else "")
        raise CheckpointError(f"the checkpoint does not fit the model: {shown}")
    model.load_state_dict(dict(state))


def load_official_checkpoint(
    source: str | Path | Mapping[str, Any],
    sampling: RaySampling | None = None,
    *,
    white: bool = False,
    auxiliary: bool = False,
) -> Renderer:
    """The renderer of a checkpoint file or dictionary; sizes are recognised from its shapes. Nothing in it can run.

    Args:
        source: a released `.ckpt`, a bare state dict, or nerf-pytorch's `.tar`.
        sampling: where rays are sampled; 64 + 64 between 2 and 6 by default.
        white: background.
        auxiliary: keep the third network, with all of the released behaviour.

    Raises:
        CheckpointError: no known layout, or partial.

    """
    content = source if isinstance(source, Mapping) else load_pickled_tensors(Path(source))
    state = convert(content, "the checkpoint" if isinstance(source, Mapping) else str(source))
    variant = RELEASED if auxiliary else Variant()
    sampling = sampling or RaySampling(2.0, 6.0)
    if not any(name.startswith("nerf_fine.") for name in state):
        state |= {
            name.replace("nerf.", "nerf_fine.", 1): value for name, value in state.items() if name.startswith("nerf.")
        }
    model = create_model(recognise(state, density_of(content)), sampling, white=white, variant=variant)
    load_state(model, state)
    return model


def to_official(model: nn.Module, *, step: int = 0, optimizer: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A checkpoint in the released layout, to be written with torch.save as `checkpoints/{step:08d}.ckpt`.

    Without an `optimizer` the file has the state of a fresh Adam, with which the released code can go on or evaluate.
    A renderer whose fine field is its coarse one has both sets of keys, as the release does. A density other than the
    released ReLU is named under `density`: `load_official_checkpoint` reads it; other programs would render another scene.
    """
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if optimizer is None:
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-4).state_dict()
    checkpoint = {"global_step": step, "model": state, "optimizer": dict(optimizer)}
    density = getattr(getattr(model, "nerf", None), "density", "relu")
    return checkpoint if density == "relu" else {**checkpoint, "density": density}


def from_keras(arrays: Sequence[np.ndarray], prefix: str = "nerf.mlp.") -> dict[str, Tensor]:
    """A network's weights from the list of the original TensorFlow code: trunk, feature, views, rgb, alpha, each W, b.

    Raises:
        CheckpointError: a list of another length.

    """
    trunk = len(arrays) // 2 - 4
    if len(arrays) % 2 or trunk < 1:
        raise CheckpointError(
            f"{len(arrays)} arrays are no network with view directions: weights and biases of 5 or more layers are needed"
        )
    names = [f"pts_linears.{i}" for i in range(trunk)] + [
        "feature_linear",
        "views_linears.0",
        "rgb_linear",
        "alpha_linear",
    ]
    state = {}
    for i, name in enumerate(names):
        state[f"{prefix}{name}.weight"] = torch.from_numpy(np.ascontiguousarray(arrays[2 * i].T))
        state[f"{prefix}{name}.bias"] = torch.from_numpy(np.ascontiguousarray(arrays[2 * i + 1]))
    return state
