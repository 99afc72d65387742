"""The released checkpoints (section 4): their key names, loading and export.

A base network is a state dict under the names that `networks` has. A grafted one has the prefix ``layer`` on every
index of a sequential network and ``linear_masked_relu{index}`` for its activations; in the residual network the weights
keep their names and the activations are numbered from 1 in forward order. Training files are dictionaries around it.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tenfold_grafting.grafting import GraftedReLU, activation_shapes, graft
from tenfold_grafting.graph import Normalise
from tenfold_grafting.networks import ARCHITECTURES, architecture, create_network
from tenfold_shared.checkpoint import load_pickled
from tenfold_shared.errors import UserError

ACTIVATION = "linear_masked_relu"
MAY_MISS = "num_batches_tracked"


class CheckpointError(UserError):
    """A file that is no checkpoint of the released layout, or not one of the architecture."""


def official_names(model: nn.Module) -> dict[str, str]:
    """Our state key -> the released one, for a base or a grafted network."""
    grafted = [name for name, module in model.named_modules() if isinstance(module, GraftedReLU)]
    if not grafted:
        return {key: key for key in model.state_dict()}
    sequential = isinstance(model, nn.Sequential)
    names = {}
    for key in model.state_dict():
        module, _, what = key.rpartition(".")
        if module in grafted:
            names[key] = f"{ACTIVATION}{module if sequential else grafted.index(module) + 1}.{what}"
        else:
            names[key] = f"layer{key}" if sequential else key
    return names


def official_state(model: nn.Module) -> dict[str, Tensor]:
    """The state under the released names; without a normalisation that comes first, which is no part of it."""
    if isinstance(model, nn.Sequential) and len(model) == 2 and isinstance(model[0], Normalise):
        model = model[1]
    names = official_names(model)
    return {names[key]: tensor.detach().cpu().clone() for key, tensor in model.state_dict().items()}


def to_official(model: nn.Module, *, epoch: int = 0, best_sa: float = 0.0, best_ra: float = 0.0) -> dict[str, Any]:
    """A training file of the released layout, to be written with torch.save; accuracies in per cent."""
    return {
        "best_sa": best_sa,
        "best_ra": best_ra,
        "epoch": epoch,
        "state_dict": official_state(model),
        "optimizer": {},
        "scheduler": {},
        "result": {},
    }


def _read(source: Path | Mapping[str, Any]) -> dict[str, Tensor]:
    where = "the checkpoint"
    content: Any = source
    if isinstance(source, Path):
        where = str(source)
        content = _load(source)
    if isinstance(content, list | tuple) and content and isinstance(content[0], Mapping):
        content = content[0]  # older files: the state dict first
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{where} holds no state dict: expected names with tensors, or one under state_dict")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def _load(path: Path) -> Any:
    """What torch.save wrote, tensors, plain values and NumPy numbers only; nothing in it can run."""
    allowed: list[Any] = [np.dtype, np.ndarray, type(np.dtype(np.float64)), type(np.dtype(np.float32))]
    core = getattr(np, "_core", None) or np.core
    allowed += [core.multiarray.scalar, core.multiarray._reconstruct]
    return load_pickled(path, allowed)


def load_state(model: nn.Module, state: Mapping[str, Tensor], what: str = "the network") -> None:
    """Copy a state under released names into a network.

    Raises:
        CheckpointError: keys or shapes that do not fit, all listed; the network is then unchanged.

    """
    names = official_names(model)
    own = {names[key]: tensor for key, tensor in model.state_dict().items()}
    misfits = _misfits(state, own)
    if misfits:
        raise _refuse(what, misfits)
    with torch.no_grad():
        for name, tensor in own.items():
            if name in state:
                tensor.copy_(state[name])


def _misfits(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    found = [f"missing {name}" for name in own if name not in state and not name.endswith(MAY_MISS)]
    found += [f"unexpected {name}" for name in state if name not in own]
    return found + [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]


def _refuse(what: str, misfits: list[str]) -> CheckpointError:
    shown = "; ".join(misfits[:12]) + (f"; and {len(misfits) - 12} more" if len(misfits) > 12 else "")
    return CheckpointError(f"the checkpoint does not fit {what}: {shown}")


def _classes(state: Mapping[str, Tensor]) -> int:
    heads = [tensor.shape[0] for name, tensor in state.items() if name.endswith("weight") and tensor.dim() == 2]
    if not heads:
        raise CheckpointError("the checkpoint has no linear layer, so it is of none of the architectures")
    return heads[-1]


def _build(arch: str, classes: int, grafted: bool) -> nn.Module:
    model = create_network(arch, classes)
    if not grafted:
        return model
    shapes = activation_shapes(model, architecture(arch).input_shape)
    return graft(model, {name: torch.zeros(shape) for name, shape in shapes.items()})


@dataclasses.dataclass
class Recognised:
    """A network and its architecture's name."""

    arch: str
    model: nn.Module


def recognise(state: Mapping[str, Tensor]) -> Recognised:
    """The architecture, base or grafted, whose released keys and shapes a state has, with the state loaded.

    Raises:
        CheckpointError: none fits; lists what does not fit the nearest one.

    """
    classes, grafted = _classes(state), any(name.startswith(ACTIVATION) for name in state)
    weights = {name: tensor for name, tensor in state.items() if not name.startswith(ACTIVATION)}
    misfits: dict[str, list[str]] = {}
    for arch in ARCHITECTURES:
        with torch.device("meta"):  # shapes alone: some of the networks are large
            base = create_network(arch, classes)
        prefix = "layer" if grafted and isinstance(base, nn.Sequential) else ""
        misfits[arch] = _misfits(weights, {prefix + key: tensor for key, tensor in base.state_dict().items()})
        if not misfits[arch]:
            model = _build(arch, classes, grafted)
            load_state(model, state, arch)
            return Recognised(arch, model)
    nearest = min(misfits, key=lambda arch: len(misfits[arch]))
    raise _refuse(f"any known architecture, the nearest being {nearest}", misfits[nearest])


def load_recognised(source: str | Path | Mapping[str, Any], arch: str | None = None) -> Recognised:
    """`load_official_checkpoint` with the architecture's name."""
    state = _read(Path(source) if isinstance(source, str) else source)
    if arch is None:
        return recognise(state)
    model = _build(arch, _classes(state), any(name.startswith(ACTIVATION) for name in state))
    load_state(model, state, arch)
    return Recognised(arch, model)


def load_official_checkpoint(source: str | Path | Mapping[str, Any], arch: str | None = None) -> nn.Module:
    """The network of a released checkpoint, without its normalisation.

    Args:
        source: a ``.pth``, ``.pth.tar`` or ``.pt`` file, or what was loaded from one.
        arch: the architecture; by default it is recognised by keys and shapes.

    Raises:
        CheckpointError: no such file; keys that do not fit, listed.

    """
    return load_recognised(source, arch).model
