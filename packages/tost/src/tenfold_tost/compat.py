"""The released checkpoints (section 4): their layout, loading, and export to it.

`init.pth.tar` holds `state_dict`; `checkpoint.pth.tar`, `model_best.pth.tar` and `pruned.pth.tar` also `epoch`, `acc`,
`best_acc` and `optimizer`; the output of the learned scales is a plain state dict. A pruned network's mask is the zeros
of its convolutions. Ghost skips are `conv_jump{1,2}` and `conv_jump{1,2}_bn` of their block.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold_shared.errors import UserError
from tenfold_tost.ghosts import Ghosts, Skips, Soft, SparseRecipe
from tenfold_tost.maskfiles import MASK, ORIGINAL, read_tensors
from tenfold_tost.models import create_model, model_names
from tenfold_tost.skips import NAME, ghost_skips

MAY_MISS = "num_batches_tracked"
_RELEASED = re.compile(r"(.*)\bconv_jump([12])(_bn)?\.(.+)")
_OURS = re.compile(rf"(.*)\bconv([12])\.{NAME}\.(jump|norm)\.(.+)")


class CheckpointError(UserError):
    """A checkpoint that is not of the released layout, or not of the architecture."""


def from_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released names -> ours; `weight_orig` and `weight_mask` pairs become the masked weight."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(MASK):
            continue
        found = _RELEASED.fullmatch(name)
        if found:
            renamed[f"{found[1]}conv{found[2]}.{NAME}.{'norm' if found[3] else 'jump'}.{found[4]}"] = value
        elif name.endswith(ORIGINAL):
            plain = name.removesuffix(ORIGINAL)
            renamed[plain] = value * state[plain + MASK] if plain + MASK in state else value
        else:
            renamed[name] = value * state[name + MASK] if name + MASK in state else value
    return renamed


def to_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> the released ones, the skips of a block behind its second batch norm."""
    renamed: dict[str, Tensor] = {}
    skips: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        found = _OURS.fullmatch(name)
        if found:
            norm = "_bn" if found[3] == "norm" else ""
            skips.setdefault(found[1], {})[f"{found[1]}conv_jump{found[2]}{norm}.{found[4]}"] = value
        else:
            renamed[name] = value
    ordered: dict[str, Tensor] = {}
    names = list(renamed)
    for i, name in enumerate(names):
        ordered[name] = renamed[name]
        block = name.rpartition("bn2.")[0]
        last = "bn2." in name and (i + 1 == len(names) or not names[i + 1].startswith(f"{block}bn2."))
        if last and block in skips:
            for kind in ("conv_jump1.", "conv_jump2.", "conv_jump1_bn.", "conv_jump2_bn."):
                ordered |= {key: value for key, value in skips[block].items() if key.startswith(block + kind)}
    return ordered


def to_official(model: nn.Module, *, epoch: int = 0, acc: float = 0.0, best_acc: float = 0.0) -> dict[str, Any]:
    """A checkpoint in the released layout, to be written with torch.save.

    Args:
        model: at any stage; pruned weights are zeros in it.
        epoch: epochs trained.
        acc: accuracy of this epoch in per cent.
        best_acc: best accuracy so far in per cent; leave it 0 in a freshly pruned file, or the release's training takes
            it for its own.

    """
    state = to_released({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
    return {"epoch": epoch, "state_dict": state, "acc": acc, "best_acc": best_acc, "optimizer": {}}


def restore(
    state: Mapping[str, Tensor],
    arch: str = "",
    soft: str | None = None,
    beta: float | None = None,
    skip: str | None = None,
    activation: str = "",
) -> nn.Module:
    """The network of a state dict under our names, with the ghosts that it was trained to keep.

    Args:
        state: weights; ghost skips with parameters are seen by their keys.
        arch: the architecture; by default it is recognised from keys and shapes.
        soft: kind of the soft neurons that were kept, which no key tells.
        beta: their slope, of pswish.
        skip: kind of the ghost skips that were kept, where they have no parameters.
        activation: the activation that the network was built with in place of ReLU, which no key tells either.

    Raises:
        CheckpointError: no known architecture has these keys and shapes; what does not fit is listed.

    """
    plain = without_skips(state)
    arch = arch or recognise_architecture(plain)
    options = {"activation": activation} if activation else {}
    try:
        model = create_model(arch, _classes(plain), **options)
    except TypeError as error:
        raise CheckpointError(f"{arch} has no other activation than ReLU: leave out {activation!r}") from error
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    misfits = _misfits(_shapes(plain), _shapes(model.state_dict()))
    if misfits:
        raise _refuse(arch, misfits)
    skip = "conv" if len(plain) != len(state) else skip
    try:
        recipe = SparseRecipe(
            soft=Soft(kind=soft, beta0=beta or 1.0, beta_max=max(beta or 1.0, 10.0), constant=True) if soft else None,  # type: ignore[arg-type]
            skips=Skips(kind=skip, constant=True) if skip else None,  # type: ignore[arg-type]
            smoothing=None,
            lrsi=None,
        )
        Ghosts(model, recipe, torch.zeros(1, _channels(plain), 32, 32) if skip else None)
    except ValueError as error:
        raise CheckpointError(f"The checkpoint keeps ghosts that {arch} cannot have: {error}") from error
    own = model.state_dict()
    if skip == "conv":
        missing = [name for name in ghost_skips(model) if f"{name}.{NAME}.jump.weight" not in state]
        if missing:
            raise _refuse(arch, [f"missing the skip around {name}" for name in missing])
    misfits = _misfits(_shapes(state), _shapes(own))
    if misfits:
        raise _refuse(arch, misfits)
    model.load_state_dict({name: state.get(name, own[name]) for name in own})
    return model


def without_skips(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict, under our names, of the network without ghost skips."""
    return {name: tensor for name, tensor in state.items() if f".{NAME}." not in name}


def load_official_checkpoint(
    source: str | Path | Mapping[str, Any], arch: str | None = None, activation: str = ""
) -> nn.Module:
    """Build the network of a released checkpoint and load it; ghost skips, which the release keeps, are attached.

    Args:
        source: a file, or what was loaded from one.
        arch: the architecture; by default it is recognised from keys and shapes.
        activation: the soft activation that it was trained with, such as "swish": the release keeps it for good, and no
            key tells. ReLU by default.

    Raises:
        CheckpointError: not such a file; keys that do not fit, listed.

    """
    if isinstance(source, Mapping):
        nested = source.get("state_dict", source)
        content = {str(k).removeprefix("module."): v for k, v in nested.items() if isinstance(v, Tensor)}
        if not content:
            raise CheckpointError("The checkpoint holds no state dict: expected names with tensors.")
    else:
        content = read_tensors(Path(source))
    return restore(from_released(content), arch or "", activation=activation)


def recognise_architecture(state: Mapping[str, Tensor]) -> str:
    """Name of the architecture whose keys and shapes a state dict (without ghosts) has.

    Raises:
        CheckpointError: none fits; lists what does not fit the nearest one.

    """
    classes, shapes = _classes(state), _shapes(state)
    misfits = {}
    for arch in model_names():
        with torch.device("meta"):
            expected = _shapes(create_model(arch, classes).state_dict())
        misfits[arch] = _misfits(shapes, expected)
        if not misfits[arch]:
            return arch
    nearest = min(misfits, key=lambda arch: len(misfits[arch]))
    raise _refuse(f"any known architecture, the nearest being {nearest}", misfits[nearest])


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _misfits(shapes: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> list[str]:
    """What does not fit, one phrase a key; empty when everything does."""
    found = [f"missing {name}" for name in expected if name not in shapes and not name.endswith(MAY_MISS)]
    for name, shape in shapes.items():
        if name not in expected:
            found.append(f"unexpected {name}")
        elif expected[name] != shape:
            found.append(f"{name} has shape {tuple(shape)} instead of {tuple(expected[name])}")
    return found


def _refuse(arch: str, misfits: list[str]) -> CheckpointError:
    shown = "; ".join(misfits[:12]) + (f"; and {len(misfits) - 12} more" if len(misfits) > 12 else "")
    return CheckpointError(f"The checkpoint does not fit {arch}: {shown}.")


def _classes(state: Mapping[str, Tensor]) -> int:
    heads = [tensor.shape[0] for name, tensor in state.items() if name.endswith("weight") and tensor.dim() == 2]
    if not heads or heads[-1] < 2:
        raise CheckpointError(
            "The checkpoint has no linear layer of two or more classes, so it is of no known network."
        )
    return heads[-1]


def _channels(state: Mapping[str, Tensor]) -> int:
    return next(tensor.shape[1] for tensor in state.values() if tensor.dim() == 4)
