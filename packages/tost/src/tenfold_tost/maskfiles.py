"""Masks to and from files: whatever a pruning tool writes (section 4), named by weight."""

import pickle
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tenfold_shared.checkpoint import load_pickled_tensors, load_weights, save_weights
from tenfold_shared.errors import UserError
from tenfold_tost.masking import CONVOLUTIONS, Masks, density, prunable_weights
from tenfold_tost.pruning import keep_above

MASK, ORIGINAL, SCORES = "_mask", "_orig", ".popup_scores"
UNREADABLE = (  # what NumPy raises for the ways in which a file may be no archive of numbers
    AttributeError, EOFError, OSError, TypeError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def save_masks(path: Path, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None) -> None:
    """Write masks as safetensors, under ``<weight>_mask``, beside the state dict of the `weights` to train from."""
    named = {name + MASK: mask.to(torch.uint8) for name, mask in masks.items()}
    save_weights(path, {**(weights or {}), **named}, {"kind": "masks"})


def load_masks(path: Path, model: nn.Module, keep: float | None = None, linear: bool = False) -> Masks:
    """The masks of a file for a model's weights.

    Read are: `<weight>_mask` entries, alone or beside `<weight>_orig` as torch.nn.utils.prune writes them; scores named
    `popup_scores`, ranked together at the density `keep`; entries named as the weights, boolean or integer; and
    otherwise a pruned state dict, whose zeros are the mask. Layers that it leaves out stay dense, with a warning that names
    them. The file is .safetensors, .npz, or written by torch.save.

    Raises:
        UserError: unreadable; nothing in it is a mask; scores without `keep`; names or shapes that do not fit.

    """
    state = read_tensors(path)
    masks = masks_of_state(state, model, keep, linear)
    if not masks:
        raise UserError(f"{path} holds no mask: expected <weight>_mask entries, scores, or a pruned state dict")
    weights = prunable_weights(model, linear=True)
    misfits = [
        f"{name} {list(mask.shape)}" for name, mask in masks.items()
        if name not in weights or weights[name].shape != mask.shape
    ]  # fmt: skip
    if misfits:
        raise UserError(
            f"the mask in {path} does not fit {type(model).__name__}: {', '.join(misfits[:8])} "
            "is no weight of it, or has another shape"
        )
    left_out = [name for name in prunable_weights(model, linear) if name not in masks]
    if left_out:
        shown = ", ".join(left_out[:8]) + (f" and {len(left_out) - 8} more" if len(left_out) > 8 else "")
        warnings.warn(
            f"{path} has no mask for {len(left_out)} layers of {type(model).__name__}, which stay dense: {shown}",
            stacklevel=2,
        )
    if density(masks) == 1.0:
        raise UserError(f"{path} masks nothing: none of its weights is zero")
    return masks


def masks_of_state(
    state: Mapping[str, Tensor], model: nn.Module, keep: float | None = None, linear: bool = False
) -> Masks:
    """The masks in a dictionary of tensors; see `load_masks`."""
    masks = {name.removesuffix(MASK): value != 0 for name, value in state.items() if name.endswith(MASK)}
    if masks:
        return masks
    scores = {
        f"{name.removesuffix(SCORES)}.weight": value.abs() for name, value in state.items() if name.endswith(SCORES)
    }
    if scores:
        if keep is None:
            raise UserError("the file holds scores, which make a mask at a density only: give one")
        return keep_above(scores, keep)
    names = prunable_weights(model, linear)
    return {name: state[name] != 0 for name in names if name in state}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, without data-parallel prefixes; nothing in it is run.

    Raises:
        UserError: missing, damaged, or without tensors.

    """
    if path.suffix == ".safetensors":
        state: Mapping[str, object] = load_weights(path)[0]
    elif path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                state = {name: torch.from_numpy(file[name]) for name in file.files}
        except UNREADABLE as error:
            raise UserError(f"{path} is no readable .npz file of arrays ({error})") from error
    else:
        state = load_pickled_tensors(path)
    nested = state.get("state_dict")
    if isinstance(nested, Mapping):
        state = nested
    tensors = {str(name).removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors by name, nor a state_dict of them")
    return tensors


def mask_report(model: nn.Module, masks: Mapping[str, Tensor]) -> list[str]:
    """One line a layer: name, shape, weights that remain; layers that keep less than a percent are marked."""
    lines = []
    for name, mask in masks.items():
        share = density({name: mask})
        module = model.get_submodule(name.rpartition(".")[0])
        kind = "convolution" if isinstance(module, CONVOLUTIONS) else "linear"
        warning = "  near collapse" if share < 0.01 else ""
        lines.append(f"{name:32} {kind:12} {tuple(mask.shape)!s:22} {100 * share:6.2f} %{warning}")
    return lines
