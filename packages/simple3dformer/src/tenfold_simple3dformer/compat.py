"""The authors' checkpoint layout (section 4) to ours and back.

Voxel files are bare state dicts, point files hold ``model_state_dict``; either may carry a ``module.`` prefix. Image-side
keys are timm's. Nothing in a file is executed.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tenfold_shared.checkpoint import load_pickled_tensors, load_weights
from tenfold_shared.errors import UserError
from tenfold_simple3dformer.backbone import create_vit
from tenfold_simple3dformer.baselines import PointTransformer, VoxNet
from tenfold_simple3dformer.point import PointFormer
from tenfold_simple3dformer.tokenizers import tokenizer_name
from tenfold_simple3dformer.voxel import VoxelFormer


class CheckpointError(UserError):
    """A checkpoint that does not fit; the message lists the keys."""


_DOWN = [
    (r"(.*)downs\.(\d+)\.mlp\.linears\.(\d+)\.(.*)", r"\1transition_downs.\2.sa.mlp_convs.\3.\4"),
    (r"(.*)downs\.(\d+)\.mlp\.norms\.(\d+)\.(.*)", r"\1transition_downs.\2.sa.mlp_bns.\3.\4"),
    (r"(.*)ups\.(\d+)\.coarse\.linears\.0\.(.*)", r"\1transition_ups.\2.fc1.0.\3"),
    (r"(.*)ups\.(\d+)\.coarse\.norms\.0\.(.*)", r"\1transition_ups.\2.fc1.2.\3"),
    (r"(.*)ups\.(\d+)\.fine\.linears\.0\.(.*)", r"\1transition_ups.\2.fc2.0.\3"),
    (r"(.*)ups\.(\d+)\.fine\.norms\.0\.(.*)", r"\1transition_ups.\2.fc2.2.\3"),
]
_VOXEL = [
    (r"vit\.(.*)", r"\1"),
    (r"embed\.(weight|bias)", r"voxel_embed.proj.conv3d_1.\1"),
    (r"embed\.conv\.(.*)", r"voxel_embed.proj.conv2d_1.\1"),
    (r"embed\.(backbone|proj)\.(.*)", r"voxel_embed.\1.\2"),
    (r"pos_embed", "voxel_pos_embed"),
    (r"head\.(.*)", r"voxel_head.\1"),
    (r"group\.layer\.(.*)", r"group_embed.\1"),
    (r"group\.(cls_token|pos_embed)", r"group_\1"),
]
_POINT = [
    (r"vit\.(.*)", r"\1"),
    (r"embed\.(.*)", r"fc1.\1"),
    (r"position\.(.*)", r"fc_pos_embed.\1"),
    *_DOWN,
]
_POINT_TRANSFORMER = [
    *[(p, rf"backbone.{t}" if "downs" in p else t) for p, t in _DOWN],
    (r"(fc1|transformer1|transformers)\.(.*)", r"backbone.\1.\2"),
    (r"up_transformers\.(.*)", r"transformers.\1"),
]
_VOXNET = [
    (r"feat\.0\.(.*)", r"feat.conv3d_1.\1"),
    (r"feat\.3\.(.*)", r"feat.conv3d_2.\1"),
    (r"(fc[12]\..*)", r"mlp.\1"),
]
UNUSED = (
    r".*\.sa\.last_pos_embed\..*",
    r"patch_embed\.(conv1|conv2|bn1|bn2|gather_local_\d+)\..*",
)
"""Tensors that the release stores and never uses: an MLP in every set abstraction, and `3DViT`'s point tokenizer."""


def official_key(model: nn.Module, key: str) -> str:
    """The released name of one of our tensors."""
    if isinstance(model, PointFormer) and key.startswith("head."):
        return key if not model.image_path else f"new_{key}"
    rules = {VoxelFormer: _VOXEL, PointFormer: _POINT, PointTransformer: _POINT_TRANSFORMER, VoxNet: _VOXNET}
    for pattern, replacement in rules.get(type(model), []):
        if match := re.fullmatch(pattern, key):
            return match.expand(replacement)
    return key


def _is_convolution(official: str) -> bool:
    return bool(re.search(r"mlp_convs\.\d+\.weight$", official))


def to_official(model: nn.Module) -> dict[str, Tensor]:
    """The state dict under the released names and shapes, without the tensors that the release never uses."""
    state = {}
    for key, tensor in model.state_dict().items():
        name = official_key(model, key)
        state[name] = tensor.detach()[:, :, None, None] if _is_convolution(name) else tensor.detach()
    return state


def plain_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by name, out of the usual wraps: ``model_state_dict``, ``state_dict``, ``model``, and ``module.``."""
    for wrap in ("model_state_dict", "state_dict", "model"):
        inner = state.get(wrap)
        if isinstance(inner, Mapping):
            state = inner
            break
    return {str(k).removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}


def load_official_state(model: nn.Module, state: Mapping[str, Any], *, image_path: bool = True) -> list[str]:
    """Load tensors under the released names into a model of ours; returns the unused ones that were dropped.

    Args:
        model: of ours.
        state: tensors, possibly wrapped.
        image_path: whether the image-side tensors (patch embedding, positions, head) must be there.

    Raises:
        CheckpointError: keys are missing, unexpected or of another shape; all of them are listed.

    """
    given = plain_state(state)
    dropped = [key for key in given if any(re.fullmatch(pattern, key) for pattern in UNUSED)]
    if isinstance(model, PointFormer) and not model.image_path and "pos_embed" in given:
        dropped.append("pos_embed")  # the release keeps it, and no point ever sees it
    for key in dropped:
        given.pop(key)
    own = model.state_dict()
    names = {official_key(model, key): key for key in own}
    problems, loaded = [], {}
    for name, key in names.items():
        if name not in given:
            image = key.startswith(("vit.patch_embed.", "vit.head.")) or key == "vit.pos_embed"
            if image_path or not image:
                problems.append(f"{name} is missing")
            continue
        tensor = given.pop(name)
        if _is_convolution(name) and tensor.dim() == 4:
            tensor = tensor[:, :, 0, 0]
        if tensor.shape != own[key].shape:
            problems.append(f"{name} has shape {list(tensor.shape)}, expected {list(own[key].shape)}")
        loaded[key] = tensor
    problems += [f"{name} is unexpected" for name in given]
    if problems:
        shown = "; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise CheckpointError(f"the checkpoint does not fit {type(model).__name__}: {shown}")
    model.load_state_dict({**own, **loaded})
    return dropped


def recognise(state: Mapping[str, Tensor]) -> str:
    """What a released file holds: ``voxel``, ``point``, ``point_transformer``, ``voxnet``, or ``""``."""
    if "voxel_head.weight" in state or "voxel_head.W" in state:
        return "voxel"
    if "fc_pos_embed.0.weight" in state:
        return "point"
    if "backbone.fc1.0.weight" in state:
        return "point_transformer"
    return "voxnet" if "feat.conv3d_1.weight" in state else ""


def build_official(
    state: Mapping[str, Any],
    *,
    heads: int = 0,
    task: Literal["", "cls", "seg"] = "",
    neighbours: int = 16,
    voxels: int = 0,
    tokenizer: str = "",
    group_axis: Literal["z", "released"] = "released",
    start: Literal["first", "random"] = "first",
) -> nn.Module:
    """The network that fits a released state dict, built from the shapes of its tensors, with its weights.

    What the shapes do not tell is asked for: attention ``heads`` (0: 3, as every released tiny and base has; 6 for small),
    the point ``task`` (default: segmentation for 50 or 13 classes or a file with an image head), the grid's side
    (default: cells times their number, 128 for 14 cells of 9), the ``tokenizer`` where two fit (ours or the released name).

    Raises:
        CheckpointError: the keys are of no released model, or do not fit; they are listed.

    """
    tensors = plain_state(state)
    kind = recognise(tensors)
    try:
        model = _built(tensors, kind, heads, task, neighbours, voxels, tokenizer, group_axis, start)
    except KeyError as error:
        raise CheckpointError(f"the checkpoint looks like a released {kind} network, but {error} is missing") from error
    load_official_state(model, tensors)
    return model


def _built(
    tensors: Mapping[str, Tensor],
    kind: str,
    heads: int,
    task: Any,
    neighbours: int,
    voxels: int,
    tokenizer: str,
    group_axis: Any,
    start: Any,
) -> nn.Module:
    """The network of a kind, with the sizes of the tensors and weights of its own."""
    if kind == "voxnet":
        model: nn.Module = VoxNet(len(tensors["mlp.fc2.weight"]))
    elif kind == "voxel":
        model = _voxel(tensors, heads, voxels, tokenizer, group_axis)
    elif kind == "point":
        model = _point(tensors, heads, task, neighbours, start)
    elif kind == "point_transformer":
        stages = len({k.split(".")[2] for k in tensors if k.startswith("backbone.transition_downs.")})
        dim, inputs = tensors["backbone.transformer1.fc1.weight"].shape[0], tensors["backbone.fc1.0.weight"].shape[1]
        last = "fc3.4.weight" if "fc3.4.weight" in tensors else "fc2.4.weight"
        kind_of: Literal["cls", "seg"] = "seg" if last.startswith("fc3") else "cls"
        model = PointTransformer(inputs, len(tensors[last]), kind_of, stages=stages, dim=dim, neighbours=neighbours)
    else:
        shown = ", ".join(list(tensors)[:6])
        raise CheckpointError(f"no released Simple3D-Former, Point Transformer or VoxNet: its keys are {shown} ...")
    return model


def _backbone(tensors: Mapping[str, Tensor], heads: int) -> Any:
    c = tensors["cls_token"].shape[-1]
    depth = len({k.split(".")[1] for k in tensors if k.startswith("blocks.")})
    options: dict[str, Any] = {"embed_dim": c}
    if "patch_embed.proj.weight" in tensors:
        weight = tensors["patch_embed.proj.weight"]
        side = round((tensors["pos_embed"].shape[1] - 1) ** 0.5) * weight.shape[-1] if "pos_embed" in tensors else 224
        options |= {"patch_size": weight.shape[-1], "in_chans": weight.shape[1], "img_size": side}
    classes = len(tensors["head.bias"]) if tensors.get("head.bias") is not None else 1000
    return create_vit("tiny", heads=heads or (6 if c == 384 else 3), depth=depth, classes=classes, **options)


def _voxel(tensors: Mapping[str, Tensor], heads: int, voxels: int, tokenizer: str, axis: Any) -> VoxelFormer:
    positions = tensors["voxel_pos_embed"].shape[1] - 1
    head = "cosine" if "voxel_head.W" in tensors else "linear"
    classes = tensors["voxel_head.W"].shape[1] if head == "cosine" else len(tensors["voxel_head.weight"])
    square = round(positions**0.5)
    flat = "voxel_embed.proj.conv2d_1.weight" in tensors
    if "voxel_embed.proj.weight" in tensors:
        cell, n, name = 6, 6, "hybrid_naive" if positions == 6**3 else "hybrid"
    else:
        cell = tensors[f"voxel_embed.proj.conv{2 if flat else 3}d_1.weight"].shape[-1]
        n = square if square**2 == positions else round(positions ** (1 / 3))
        name = tokenizer_name(tokenizer) or (
            "occupancy2d" if flat else "projection" if square**2 == positions else "naive"
        )
        if "group_pos_embed" in tensors:
            name = "group"
    side = voxels or (128 if (cell, n) == (9, 14) else 30 if name.startswith("hybrid") else cell * n)
    vit = _backbone(tensors, heads)
    return VoxelFormer(vit, classes, name, voxels=side, cell=cell, head=head, group_axis=axis)  # type: ignore[arg-type]


def _point(tensors: Mapping[str, Tensor], heads: int, task: Any, neighbours: int, start: Any) -> PointFormer:
    stages = len({k.split(".")[1] for k in tensors if k.startswith("transition_downs.")})
    image_path = "new_head.weight" in tensors or "new_head.W" in tensors
    ratios = {0: (), 1: (4,), 2: (4, 16) if image_path else (1, 4)}[stages]
    prefix = "new_head" if image_path else "head"
    cosine = f"{prefix}.W" in tensors
    classes = tensors[f"{prefix}.W"].shape[1] if cosine else len(tensors[f"{prefix}.weight"])
    task = task or ("seg" if image_path or classes in (13, 50) else "cls")
    backbone = {k: v for k, v in tensors.items() if image_path or not k.startswith(("head.", "patch_embed."))}
    return PointFormer(
        _backbone(backbone, heads),
        tensors["fc1.0.weight"].shape[1],
        classes,
        task,
        ratios=ratios,
        neighbours=neighbours,
        image_path=image_path,
        head="cosine" if cosine else "linear",
        start=start,
    )


def safetensors_header(path: Path) -> dict[str, str]:
    """The metadata of a ``.safetensors`` file as it stands; nothing where it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors``, ``.npz``, ``.pth``, ``.pt`` or ``.tar`` file, unwrapped; nothing is executed.

    Raises:
        UserError: missing, unreadable, or without tensors.

    """
    if path.suffix == ".safetensors":
        # The metadata of a file of timm's is no JSON, as ours is, but the name of a format.
        foreign = "format" in safetensors_header(path)
        return plain_state(load_file(path) if foreign else load_weights(path)[0])
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give a .pth, .pt, .safetensors or .npz file")
    if path.suffix == ".npz":
        import zipfile  # noqa: PLC0415

        import numpy as np  # noqa: PLC0415

        try:
            with np.load(path, allow_pickle=False) as file:
                return plain_state({name: torch.from_numpy(file[name]) for name in file.files})
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is no readable .npz file of arrays: {error}") from error
    state = plain_state(load_pickled_tensors(path))
    if not state:
        raise UserError(f"{path} holds no tensors")
    return state


def load_official_checkpoint(path: str | Path, **options: Any) -> nn.Module:
    """The network of a released file, recognised by its keys; options as of `build_official`."""
    return build_official(read_state(Path(path)), **options)
