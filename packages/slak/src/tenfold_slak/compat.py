"""The authors' checkpoint files, in and out, and the way to and from plain ConvNeXt weights (section 4)."""

import argparse
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tenfold_shared.checkpoint import load_pickled
from tenfold_shared.download import data_root
from tenfold_shared.errors import UserError
from tenfold_slak.layer import DilatedKernel, MergedOne, MergedTwo, SmallKernelStack, merge_large_kernels
from tenfold_slak.models.slak import SLaK

State = dict[str, Tensor]

#: Keys under which the released training script saves weights, in the order in which they are looked for.
_CONTAINERS = ("model", "state_dict", "model_ema")
#: Where the published weights are, by the name under which they are looked for in `slak/` of the data root.
_DRIVE, _SURF = "https://drive.google.com/file/d/", "https://surfdrive.surf.nl/files/index.php/s/"
RELEASED = {
    "slak_tiny_300.pth": f"{_DRIVE}1Iut2f5FMS_77jGPYoUJDQzDIXOsax1u4",
    "slak_small_300.pth": f"{_DRIVE}1etM6KQbnlsgDAZ37adsQJ3UI8Bbv2AVe",
    "slak_base_300.pth": f"{_DRIVE}1duUxUD3RSblQ6eDHd0n-u0aulwGypf1j",
    "slak_tiny_31_120.pth": f"{_SURF}VXzBxFXQdlAQ7h8/download",
    "slak_tiny_51_120.pth": f"{_SURF}WiQYWNclJ9bW5XV/download",
    "slak_tiny_61_120.pth": f"{_SURF}VpR1te71NmVImJb/download",
    "slak_tiny_ade20k.pth": f"{_SURF}cc6Pqb7IZaecWMv/download",
    "slak_small_ade20k.pth": f"{_SURF}HMLBXtKUDY6wyFF/download",
    "slak_base_ade20k.pth": f"{_SURF}JDZ6dMBMZDxUHQG/download",
    "slak_tiny_coco_12.pth": f"{_SURF}2IvPyGgSTT2RvPu/download",
    **{
        f"convnext_{size}_1k_224_ema.pth": f"https://dl.fbaipublicfiles.com/convnext/convnext_{size}_1k_224_ema.pth"
        for size in ("tiny", "small", "base")
    },
}

_PREFIXES = ("module.", "_orig_mod.", "backbone.")


class CheckpointError(UserError):
    """A checkpoint that is not a SLaK network, or not this one; the message lists the keys that do not fit."""


def read_official(file: Path | str, weights: str | None = None) -> State:
    """The weights in a released file, with bare names.

    Args:
        file: see `read_content`.
        weights: `model` or `model_ema`; by default `model`.

    Raises:
        CheckpointError: the file is damaged, or holds no weights of that name.
        FileNotFoundError: there is no such file.

    """
    return bare_state(read_content(file), weights)


def read_content(file: Path | str) -> Any:
    """What a released file holds: `checkpoint-*.pth` as published or as the released script saves it, or safetensors.

    Nothing in the file is executed: tensors, containers and the `argparse.Namespace` of the training script are read.

    Raises:
        CheckpointError: the file is damaged.
        FileNotFoundError: there is no such file.

    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        return load_file(path) if path.suffix == ".safetensors" else load_pickled(path, [argparse.Namespace])
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or corrupted ({error}): fetch it again") from error
    except UserError as error:
        raise CheckpointError(f"{error}; fetch it again") from error


def weights_file(name: Path | str) -> Path:
    """A file of weights: the given path, or that name in the folder `slak` of the data root.

    Raises:
        UserError: it is at neither place; for published weights the message says where to get them.

    """
    places = [Path(name), data_root() / "slak" / Path(name).name]
    for place in places:
        if place.exists():
            return place
    url = RELEASED.get(Path(name).name)
    where = f"get it from {url} and put it at {places[1]}" if url else f"check the path, or put it at {places[1]}"
    raise UserError(f"there is no checkpoint {name}: {where}")


def bare_state(content: Any, weights: str | None = None) -> State:
    """The state dict inside what a checkpoint holds, without wrappers' prefixes; of a detector or a segmenter, its backbone.

    Raises:
        CheckpointError: there is none, or not under `weights`.

    """
    named = whole_state(content, weights)
    # A detector's or a segmenter's file holds heads beside its backbone.
    backbone = {name: value for name, value in named.items() if name.startswith("backbone.")}
    state = {_without_prefixes(name): value for name, value in (backbone or named).items()}
    if not state:
        raise CheckpointError("the checkpoint holds no tensors")
    return state


def whole_state(content: Any, weights: str | None = None) -> State:
    """The state dict inside what a checkpoint holds, heads and `backbone.` included, without `module.`.

    Raises:
        CheckpointError: there is none under `weights`.

    """
    if not isinstance(content, Mapping):
        raise CheckpointError(f"a checkpoint is a dictionary; this one holds {type(content).__name__}")
    if weights is not None:
        if weights not in content:
            raise CheckpointError(f"the checkpoint has no {weights!r}; it holds {', '.join(map(str, content))}")
        content = content[weights]
    else:
        for key in _CONTAINERS:
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    return {str(name).removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}


def holds_segmenter(content: Any, weights: str | None = None) -> bool:
    """Whether a checkpoint has mmsegmentation's decoding head beside its backbone."""
    return "decode_head.conv_seg.weight" in whole_state(content, weights)


def _without_prefixes(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def infer_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of the `SLaK` that a state dict belongs to.

    Raises:
        CheckpointError: the keys are not SLaK's.

    """
    blocks = [match for match in (re.match(r"stages\.(\d)\.(\d+)\.", name) for name in state) if match]
    needed = ["downsample_layers.0.0.weight", *(f"downsample_layers.{i}.1.weight" for i in (1, 2, 3))]
    missing = [name for name in needed if name not in state]
    if missing or {int(match[1]) for match in blocks} != {0, 1, 2, 3}:
        raise CheckpointError(f"these are not the weights of a SLaK network; missing: {', '.join(missing) or 'stages'}")
    depths = [1 + max(int(match[2]) for match in blocks if int(match[1]) == stage) for stage in range(4)]
    layers = [f"stages.{stage}.0.large_kernel." for stage in range(4)]
    decomposed = layers[0] + "LoRA1.conv.weight" in state
    kind = "LoRA1.conv" if decomposed else "lkb_origin.conv"
    if any(prefix + "lkb_reparam.weight" in state for prefix in layers):
        kind = "lkb_reparam"
    absent = [prefix + kind + ".weight" for prefix in layers if prefix + kind + ".weight" not in state]
    if absent:
        raise CheckpointError(f"these are not the weights of a SLaK network; missing: {', '.join(absent)}")
    kernels = [state[f"{prefix}{kind}.weight"].shape for prefix in layers]
    small = [state[name].shape[2] for prefix in layers if (name := prefix + "small_conv.conv.weight") in state]
    return {
        "in_chans": state[needed[0]].shape[1],
        "stem_stride": state[needed[0]].shape[2],
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
        "depths": tuple(depths),
        "dims": tuple(state[name].shape[0] for name in needed),
        "kernel_sizes": tuple(shape[2] for shape in kernels),
        # Without any small branch the network is in ConvNeXt mode, whose small kernel is "larger than the kernel".
        "small_kernel": kernels[0][3] if decomposed else (small[0] if small else 100),
        "decomposed": decomposed,
        "bn": any(name.endswith(".bn.weight") for name in state),
        "layer_scale_init": 1.0 if "stages.0.0.gamma" in state else 0.0,
    }


def load_official_checkpoint(
    source: Path | str | Mapping[str, Any], model: SLaK | None = None, weights: str | None = None
) -> SLaK:
    """A network with the released weights; its architecture is read off the shapes unless a model is given.

    Files whose layers are merged (`lkb_reparam`) give a merged network; a plain ConvNeXt's (`dwconv`, timm's
    `conv_dw`) one in ConvNeXt mode. Downstream backbones (`norm0..norm3`, no head) load without those norms;
    `SLaKBackbone.load` keeps them.

    Args:
        source: a file, or what was read from one.
        model: filled in place if given.
        weights: `model` or `model_ema`; by default `model`.

    Raises:
        CheckpointError: keys are missing, left over or of another shape; they are listed.
        FileNotFoundError: there is no such file.

    """
    state = read_official(source, weights) if isinstance(source, str | Path) else bare_state(source, weights)
    state = {name: value for name, value in state.items() if not re.match(r"norm\d\.", name)}
    if model is None and any(".dwconv." in name or ".conv_dw." in name for name in state):
        return from_convnext(state)
    if model is None:
        arguments = infer_arguments(state)
        merged = any(".lkb_reparam." in name for name in state)
        if merged:  # the shape of the branches before merging is lost: any that merge to the same kernel will do
            arguments |= {"decomposed": False, "small_kernel": 100}
        with torch.device("meta"):
            model = SLaK(**arguments)
        model = model.to_empty(device="cpu")
        if merged:
            merge_large_kernels(model, "one")
        if "norm.weight" not in state:
            state |= {"norm.weight": torch.ones(model.num_features), "norm.bias": torch.zeros(model.num_features)}
        dtype = next(iter(state.values())).dtype
        model = model.to(dtype) if dtype.is_floating_point else model
    check_state(model.state_dict(), state)
    model.load_state_dict(state)
    return model


def check_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` with the list of keys that are missing, left over or of another shape."""
    problems = [f"missing {name}" for name in expected if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in expected]
    problems += [
        f"{name} is {tuple(state[name].shape)}, should be {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(f"{len(problems)} keys do not fit the network: {'; '.join(problems[:20])}{more}")


def to_official(model: SLaK) -> dict[str, State]:
    """What the released script reads: `{"model": state_dict}` under the released names, on the CPU.

    Raises:
        ValueError: the network has layers that the release has no names for.

    """
    _refuse_layers(model, MergedTwo, DilatedKernel, SmallKernelStack)
    return {"model": {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}}


def to_convnext(model: SLaK) -> State:
    """Weights of a plain ConvNeXt, whose depthwise convolution has a bias and no norm: `dwconv.{weight,bias}`.

    Each large-kernel layer is merged to one kernel; exact in eval mode. With 7 x 7 kernels this is the ConvNeXt layout.

    Raises:
        ValueError: the network has layers that are not merged to one kernel.

    """
    _refuse_layers(model, MergedTwo, DilatedKernel, SmallKernelStack)
    merged: State = {}
    for name, value in model.state_dict().items():
        if ".large_kernel." not in name:
            merged[name] = value.detach().clone()
    for stage_index, stage in enumerate(model.stages):
        for index, block in enumerate(stage.children()):
            layer: Any = block.large_kernel
            kernel: Any = (layer if isinstance(layer, MergedOne) else layer.merged("one")).lkb_reparam
            prefix = f"stages.{stage_index}.{index}.dwconv."
            merged[prefix + "weight"] = kernel.weight.detach().clone()
            merged[prefix + "bias"] = kernel.bias.detach().clone()
    return merged


def _refuse_layers(model: SLaK, *kinds: type) -> None:
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            raise ValueError(
                f"{name} is a {type(module).__name__}, which this layout has no names for: write the network before it is "
                "merged, or merge it to one kernel"
            )


def from_convnext(state: Mapping[str, Tensor]) -> SLaK:
    """A network in ConvNeXt mode with a plain ConvNeXt's weights (released or timm's names), for inference and training.

    The batch norms start as identities that carry the depthwise bias: mean 0, variance 1 - eps, so that the scale is
    one.

    Raises:
        CheckpointError: a key is missing or left over.

    """
    converted: State = {}
    for name, value in from_timm(state).items():
        match = re.match(r"(stages\.\d+\.\d+)\.dwconv\.(weight|bias)$", name)
        if match is None:
            converted[name] = value
            continue
        prefix = f"{match[1]}.large_kernel.lkb_origin."
        if match[2] == "weight":
            converted[prefix + "conv.weight"] = value
            continue
        converted[prefix + "bn.weight"] = torch.ones_like(value)
        converted[prefix + "bn.bias"] = value
        converted[prefix + "bn.running_mean"] = torch.zeros_like(value)
        converted[prefix + "bn.running_var"] = torch.full_like(value, 1 - 1e-5)
        converted[prefix + "bn.num_batches_tracked"] = torch.zeros((), dtype=torch.long)
    return load_official_checkpoint(converted)


#: Names of timm's ConvNeXt and the released ones.
_TIMM = (
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc([12])\.", r".pwconv\1."),
    (r"^head\.norm\.", "norm."),
    (r"^head\.fc\.", "head."),
)


def from_timm(state: Mapping[str, Tensor]) -> State:
    """Weights of timm's ConvNeXt under the released names; what has them already stays as it is."""
    return {
        functools.reduce(lambda said, rename: re.sub(rename[0], rename[1], said), _TIMM, name): value
        for name, value in state.items()
    }
