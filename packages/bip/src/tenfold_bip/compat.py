"""The released checkpoints: their layout, loading and export (section 4).

A `.pth.tar` file holds `epoch`, `arch`, `state_dict`, `best_prec1` and `optimizer`; a `.pt` file is a bare state dict.
Masked layers add `popup_scores` of the weight's shape right after weight and bias. The keep ratio is not stored.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tenfold_bip.masking import masked_layers, prune_parametrize, set_masks
from tenfold_bip.models import create_model, model_names
from tenfold_bip.projections import project_layer
from tenfold_shared.checkpoint import load_pickled_tensors
from tenfold_shared.errors import UserError

SCORES = "popup_scores"
IGNORED = "weight_mask"
MAY_MISS = "num_batches_tracked"


class CheckpointError(UserError):
    """A checkpoint that is no checkpoint of the released layout, or not one of the architecture."""


def official_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state under the released names and in the released order, scores included; unmasked weights.

    The tensors are the model's own. A fixed mask stands in for the scores it has none of: ranking it at the mask's
    keep ratio gives the mask.
    """
    state: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if "parametrizations" in prefix.split("."):
            continue
        dot = f"{prefix}." if prefix else ""
        scores = None
        if parametrize.is_parametrized(module, "weight"):
            chain = module.parametrizations["weight"]
            state[f"{dot}weight"] = chain.original
            masking = chain[0]
            scores = masking.mask.to(chain.original.dtype) if masking.scores is None else masking.scores
        state.update({dot + name: tensor for name, tensor in module.named_parameters(recurse=False)})
        state.update({dot + name: tensor for name, tensor in module.named_buffers(recurse=False)})
        if scores is not None:
            state[dot + SCORES] = scores
    return {name: tensor.detach() for name, tensor in state.items()}


def to_official(model: nn.Module, *, arch: str, epoch: int = 0, best_prec1: float = 0.0) -> dict[str, Any]:
    """A checkpoint in the released `.pth.tar` layout, to be written with torch.save.

    Args:
        model: dense or masked.
        arch: its name.
        epoch: epochs trained.
        best_prec1: best top-1 accuracy in percent.

    """
    state = {name: tensor.clone() for name, tensor in official_state(model).items()}
    return {"epoch": epoch, "arch": arch, "state_dict": state, "best_prec1": best_prec1, "optimizer": {}}


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the plain network with the *real* masks applied: weights m * theta, no scores.

    The release ranks every layer by itself when it exports, which is not the mask its forward pass uses; for that one
    see `layerwise_dense_state`.
    """
    state = {name: tensor.clone() for name, tensor in official_state(model).items() if not name.endswith(SCORES)}
    for layer in masked_layers(model):
        state[layer.name] *= layer.masking.mask
    return state


def layerwise_dense_state(state: Mapping[str, Tensor], keep: float) -> dict[str, Tensor]:
    """The release's dense export of an official state dict: each scored layer cut to the ratio `keep` by itself."""
    dense = {name: tensor for name, tensor in state.items() if not name.endswith(SCORES)}
    for name, scores in state.items():
        if name.endswith(SCORES):
            weight = name.removesuffix(SCORES) + "weight"
            dense[weight] = dense[weight] * project_layer(scores.abs(), keep)
    return dense


def _read(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a file or of a loaded checkpoint, without data-parallel prefixes. Nothing in it can run."""
    where = "the checkpoint"
    content: Any = source
    if isinstance(source, str | Path):
        where = str(source)
        content = load_pickled_tensors(Path(source))
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(
            f"{where} holds no state dict: expected names with tensors, or such a dict under state_dict."
        )
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def _misfits(shapes: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> list[str]:
    """What does not fit, one phrase a key; empty when everything does."""
    missing = [f"missing {name}" for name in expected if name not in shapes and not name.endswith(MAY_MISS)]
    extra = [f"unexpected {name}" for name in shapes if name not in expected]
    other = [
        f"{name} has shape {tuple(shapes[name])} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    return missing + extra + other


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"legacy_sub_block": True} if any(name.startswith("sub_block1.") for name in state) else {}


def _refuse(arch: str, misfits: list[str]) -> CheckpointError:
    shown = "; ".join(misfits[:12]) + (f"; and {len(misfits) - 12} more" if len(misfits) > 12 else "")
    return CheckpointError(f"The checkpoint does not fit {arch}: {shown}.")


def class_count(state: Mapping[str, Tensor]) -> int:
    """How many classes the head of a state dict (released names, without scores) tells apart."""
    heads = [tensor.shape[0] for name, tensor in state.items() if name.endswith("weight") and tensor.dim() == 2]
    if not heads:
        raise CheckpointError("The checkpoint has no linear layer, so it is of none of the paper's architectures.")
    return heads[-1]


def _expected(arch: str, num_classes: int, options: dict[str, Any]) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return _shapes(create_model(arch, num_classes, **options).state_dict())


def recognise_architecture(state: Mapping[str, Tensor]) -> str:
    """Name of the architecture whose keys and shapes a state dict (released names) has.

    Raises:
        CheckpointError: none fits; lists what does not fit the nearest one.

    """
    weights = {name: tensor for name, tensor in state.items() if not name.endswith((SCORES, IGNORED))}
    num_classes, options, shapes = class_count(weights), _options(weights), _shapes(weights)
    misfits = {}
    for arch in model_names():
        if bool(options) != arch.startswith("wrn_") and options:
            continue
        misfits[arch] = _misfits(shapes, _expected(arch, num_classes, options))
        if not misfits[arch]:
            return arch
    nearest = min(misfits, key=lambda arch: len(misfits[arch]))
    raise _refuse(f"any known architecture, the nearest being {nearest}", misfits[nearest])


def load_official_state(model: nn.Module, state: Mapping[str, Tensor], arch: str = "the model") -> None:
    """Copy a state dict with released names into a model with or without masks, and recompute masks from its scores.

    The order of keys does not matter. Scores may be absent altogether (a dense checkpoint; the model's own remain), and
    are ignored by a model without masks.

    Raises:
        CheckpointError: keys or shapes that do not fit, all listed; the model is then unchanged.

    """
    own = official_state(model)
    scored = any(name.endswith(SCORES) for name in state) and any(name.endswith(SCORES) for name in own)
    skipped = (IGNORED,) if scored else (IGNORED, SCORES)
    given = {name: tensor for name, tensor in state.items() if not name.endswith(skipped)}
    own = {name: tensor for name, tensor in own.items() if not name.endswith(skipped)}
    misfits = _misfits(_shapes(given), _shapes(own))
    if misfits:
        raise _refuse(arch, misfits)
    for name, tensor in given.items():
        own[name].copy_(tensor)
    if scored:
        set_masks(model)


def load_official_checkpoint(
    source: str | Path | Mapping[str, Any],
    arch: str | None = None,
    *,
    keep: float | None = None,
    structure: str | None = None,
) -> nn.Module:
    """Build the network of a released checkpoint (also of Hydra's, named alike) and load it.

    Args:
        source: `checkpoint.pth.tar`, `model_best.pth.tar`, a bare `.pt` state dict, or what was loaded from one.
        arch: the architecture; by default it is recognised from keys and shapes.
        keep: keep ratio of the masks, which the file does not store; needed if it has scores.
        structure: set of masks; by default "global" if the head has scores. Without them it is "filter" or "channel",
            which the file does not tell and which does not matter at a keep ratio of 1.

    Returns:
        A dense model, or one with masks and scores if the file has scores.

    Raises:
        CheckpointError: not such a file; keys that do not fit, listed; a scored file without keep or structure.

    """
    state = _read(source)
    arch = arch or recognise_architecture(state)
    model = create_model(
        arch, class_count({n: t for n, t in state.items() if not n.endswith(SCORES)}), **_options(state)
    )
    dense = {name: tensor for name, tensor in state.items() if not name.endswith(SCORES)}
    load_official_state(model, dense, arch)
    scored = [name for name in state if name.endswith(SCORES)]
    if not scored:
        return model
    if keep is None:
        raise CheckpointError(
            "The checkpoint has mask scores, but its layout does not store the keep ratio: give keep."
        )
    if structure is None:
        structure = "global" if any(state[name].dim() == 2 for name in scored) else "filter"
        if structure == "filter" and keep < 1.0:
            raise CheckpointError("Only convolutions have scores: say whether the structure is 'filter' or 'channel'.")
    prune_parametrize(model, keep, structure)
    load_official_state(model, state, arch)
    return model
