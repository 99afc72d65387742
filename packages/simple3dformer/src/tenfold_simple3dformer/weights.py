"""2D weights into the shared blocks (section 2.6): which tensors were taken, resized, inflated, or are new."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast
from urllib.parse import urlsplit

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold_shared.download import data_root, fetch
from tenfold_shared.errors import UserError
from tenfold_simple3dformer.backbone import create_vit, heads
from tenfold_simple3dformer.compat import plain_state, read_state, safetensors_header
from tenfold_simple3dformer.tokenizers import InflatedEmbedding
from tenfold_simple3dformer.voxel import VoxelFormer

Inflation = Literal["random", "center", "average"]
Positions = Literal["random", "resize2d", "replicate_z"]
Status = Literal["taken", "resized", "inflated", "new", "unused"]


@dataclass
class TransferReport:
    """Where every tensor of the network comes from, and which of the file's were not used."""

    source: str
    status: dict[str, Status] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def count(self, status: Status) -> int:
        """How many tensors of the network have a status."""
        return sum(value == status for value in self.status.values())

    def table(self) -> str:
        """One line for each status and group of tensors."""
        groups: dict[tuple[str, str], int] = {}
        for name, status in self.status.items():
            group = re.sub(r"(blocks|downs|ups|layers)\.\d+\..*", r"\1.*", name)
            groups[status, group] = groups.get((status, group), 0) + 1
        lines = [f"weights from {self.source}"]
        lines += [f"  {status:9} {group}{f'  ({n} tensors)' if n > 1 else ''}" for (status, group), n in groups.items()]
        lines += [f"  unused    {name}" for name in self.unused]
        return "\n".join(lines)


def read_image_weights(weights: str) -> tuple[dict[str, Tensor], str]:
    """Tensors under timm's names, and what they are called.

    Args:
        weights: ``timm:NAME``, read from ``weights/NAME.*`` in the data root if there is such a file, otherwise fetched by
            timm; ``url:ADDRESS``, fetched into the same folder once; a local file, or the folder of a run.

    Raises:
        UserError: no such model or file.

    """
    folder = data_root() / "weights"
    if weights.startswith("timm:"):
        name = weights.removeprefix("timm:")
        kept = [folder / f"{name}{ending}" for ending in (".safetensors", ".pth", ".npz")]
        for file in kept:
            if file.is_file():
                return to_timm(read_state(file)), str(file)
        import timm  # noqa: PLC0415

        try:
            model = timm.create_model(name, pretrained=True)
        except Exception as error:  # of the network, the hub or timm
            raise UserError(
                f"--weights {weights} cannot be fetched ({type(error).__name__}: {str(error)[:200]}); give a local file, or "
                f"put it at {kept[0]} (or .pth, .npz)"
            ) from error
        return to_timm(model.state_dict()), weights
    if weights.startswith("url:"):
        url = weights.removeprefix("url:")
        path = fetch(url, folder / PurePosixPath(urlsplit(url).path).name)
    else:
        path = _local(weights)
    return to_timm(read_state(path)), str(path)


def _local(weights: str) -> Path:
    """The file itself, or the weights of a run's folder."""
    path = Path(weights)
    return path / "checkpoints" / "last.safetensors" if path.is_dir() else path


def recorded_heads(weights: str) -> int:
    """Attention heads of the network that a checkpoint of ours holds; 0 for other weights, which do not say."""
    network = json.loads(safetensors_header(_local(weights)).get("network", "{}"))
    return heads(create_vit(network["backbone"], heads=network["heads"], depth=1)) if network else 0


def check_heads(model: nn.Module, weights: str) -> None:
    """Refuse a network whose blocks would split the weights of a checkpoint of ours into other heads than it was trained with.

    Raises:
        UserError: naming both numbers.

    """
    recorded, own = recorded_heads(weights), heads(cast(Any, model).vit)
    if recorded not in (0, own):
        raise UserError(
            f"{weights} was trained with {recorded} attention heads and the network has {own}: set --model.heads {recorded}"
        )


def to_timm(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Under timm's names: ours (``vit.``), DeiT's distilled files, and the naming of the ViT-21k ``B_16.pth``.

    Of a distilled file the distillation token and its position (index 1) are dropped; the release drops index 0, the
    class token's.
    """
    tensors = plain_state(state)
    if any(name.startswith("vit.blocks.") for name in tensors):
        tensors = {name.removeprefix("vit."): value for name, value in tensors.items() if name.startswith("vit.")}
    if any(name.startswith("transformer.blocks.") for name in tensors):
        tensors = _from_vit21k(tensors)
    if "dist_token" in tensors:
        del tensors["dist_token"]
        positions = tensors["pos_embed"]
        tensors["pos_embed"] = torch.cat([positions[:, :1], positions[:, 2:]], 1)
        tensors = {name: value for name, value in tensors.items() if not name.startswith("head_dist.")}
    return tensors


def _from_vit21k(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``transformer.`` stripped, ``pwff`` -> ``mlp``, q, k, v joined; tokens, positions, patches and head renamed too."""
    whole = {
        "class_token": "cls_token", "positional_embedding.pos_embedding": "pos_embed",
        "patch_embedding.weight": "patch_embed.proj.weight", "patch_embedding.bias": "patch_embed.proj.bias",
        "fc.weight": "head.weight", "fc.bias": "head.bias",
    }  # fmt: skip
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name in whole:
            renamed[whole[name]] = value
            continue
        if match := re.fullmatch(r"transformer\.(blocks\.\d+)\.attn\.proj_([qkv])\.(weight|bias)", name):
            if match[2] == "q":
                parts = [tensors[name.replace("proj_q", f"proj_{part}")] for part in "qkv"]
                renamed[f"{match[1]}.attn.qkv.{match[3]}"] = torch.cat(parts)
            continue
        stem = name.removeprefix("transformer.").replace(".pwff.", ".mlp.")
        renamed[re.sub(r"(blocks\.\d+)\.proj\.", r"\1.attn.proj.", stem)] = value
    return renamed


def resize_positions(positions: Float[Tensor, "1 p c"], grid: tuple[int, int]) -> Float[Tensor, "1 q c"]:
    """Bicubic resize of a square grid of positions; those of the tokens before it (none, or the class token's) stay.

    Raises:
        UserError: the positions are of no square grid.

    """
    side = math.isqrt(positions.shape[1])
    prefix = positions.shape[1] - side**2
    if prefix > 1:
        raise UserError(f"{positions.shape[1]} positions are of no square grid, with or without a class token")
    head, rest = positions[:, :prefix], positions[:, prefix:]
    if (side, side) == grid:
        return positions
    plane = rest.view(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(plane.float(), size=grid, mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([head, resized.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)], 1)


def inflate_patches(weight: Float[Tensor, "c i p q"], cell: int, how: Inflation) -> Float[Tensor, "c 1 t t t"]:
    """A 2D patch embedding for cells: summed over RGB, resized to T x T with the response to a constant kept.

    ``average`` repeats it along z and divides by T; ``center`` puts it at z = T // 2.
    """
    plane = weight.sum(1, keepdim=True)
    side = weight.shape[-1]
    plane = F.interpolate(plane.float(), size=(cell, cell), mode="bicubic", align_corners=False, antialias=True)
    plane = plane * (side / cell) ** 2
    if how == "average":
        return plane[..., None].expand(-1, -1, -1, -1, cell) / cell
    volume = plane.new_zeros(*plane.shape, cell)
    volume[..., cell // 2] = plane
    return volume


def transfer(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str = "a state dict",
    inflate: Inflation = "random",
    positions: Positions = "random",
) -> TransferReport:
    """Put image weights into the backbone ``model.vit``; tokenizer, positions and head stay new unless asked for.

    Args:
        model: a network with a backbone ``vit``, or a backbone.
        state: tensors under timm's names.
        source: what to call them in the report.
        inflate: the voxel embedding: left as it is, or inflated from the patch embedding (section 2.6).
        positions: the voxel positions: left as they are, resized from the image's (projection, group, slices), or
            resized and repeated along z (naive).

    Raises:
        UserError: a tensor of the blocks is missing, or of another width or depth than the network's.

    """
    vit: nn.Module = getattr(model, "vit", model)
    if not hasattr(vit, "blocks"):
        raise UserError(f"{type(model).__name__} has no image transformer that weights could go into")
    own = vit.state_dict()
    report = TransferReport(source)
    given = dict(state)
    _check_blocks(own, given, source)
    loaded: dict[str, Tensor] = {}
    prefix = "" if vit is model else "vit."
    for name, tensor in own.items():
        value = given.pop(name, None)
        if value is None:
            report.status[prefix + name] = "new"
        elif value.shape == tensor.shape:
            loaded[name], report.status[prefix + name] = value, "taken"
        elif name == "pos_embed" and value.dim() == 3 and value.shape[-1] == tensor.shape[-1]:
            side = math.isqrt(tensor.shape[1])
            resized = resize_positions(value, (side, side))
            if resized.shape != tensor.shape:
                raise UserError(
                    f"{source} has positions with or without a class token's, and the network the other way"
                )
            loaded[name], report.status[prefix + name] = resized, "resized"
        else:
            report.status[prefix + name] = "new"
            given[name] = value
    vit.load_state_dict({**own, **loaded})
    if vit is not model:
        for name, _ in [*model.named_parameters(), *model.named_buffers()]:
            if not name.startswith("vit."):
                report.status[name] = "new"
    if isinstance(model, VoxelFormer):
        _inflate(model, state, inflate, positions, report, given)
    report.unused = sorted(given)
    return report


def _check_blocks(own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    needed = {name: tensor for name, tensor in own.items() if name.startswith(("blocks.", "norm."))}
    missing = [name for name in needed if name not in given]
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise UserError(f"{source} lacks {shown}: it is no ViT of timm's names, or has fewer blocks than the network")
    wrong = [name for name, tensor in needed.items() if given[name].shape != tensor.shape]
    if wrong:
        name = wrong[0]
        ours, theirs = (len(state["blocks.0.norm1.weight"]) for state in (own, given))
        reason = (
            f"its width is {theirs} and the network's {ours}"
            if ours != theirs
            else (f"{name} has shape {list(given[name].shape)}, expected {list(own[name].shape)}")
        )
        raise UserError(f"{source} does not fit the backbone: {reason}; choose the --model.backbone of the weights")


def _inflate(
    model: VoxelFormer,
    state: Mapping[str, Tensor],
    inflate: Inflation,
    positions: Positions,
    report: TransferReport,
    given: dict[str, Tensor],
) -> None:
    if inflate != "random":
        if not isinstance(model.embed, InflatedEmbedding) or "patch_embed.proj.weight" not in state:
            raise UserError(
                f"--inflate {inflate}: the {model.tokenizer} tokenizer has no cells to inflate patches into"
            )
        with torch.no_grad():
            model.embed.weight.copy_(inflate_patches(state["patch_embed.proj.weight"], model.cell, inflate))
            if "patch_embed.proj.bias" in state:
                model.embed.bias.copy_(state["patch_embed.proj.bias"])
        report.status["embed.weight"] = report.status["embed.bias"] = "inflated"
        given.pop("patch_embed.proj.weight", None)
        given.pop("patch_embed.proj.bias", None)
    if positions == "random":
        return
    if model.pos_embed is None or "pos_embed" not in state:
        raise UserError(f"--positions {positions}: the network or {report.source} has no learned positions")
    deep = len(model.grid) == 3
    if deep != (positions == "replicate_z"):
        raise UserError(
            f"--positions {positions} does not fit the {model.tokenizer} tokenizer: use {'replicate_z' if deep else 'resize2d'}"
        )
    n = model.grid[0]
    flat = resize_positions(state["pos_embed"], (n, n))
    own = model.pos_embed.shape[1] - n ** len(model.grid)
    if flat.shape[1] > n * n and not own:
        flat = flat[:, 1:]
    if flat.shape[1] == n * n and own:  # a backbone whose class token has no position
        flat = torch.cat([torch.zeros_like(flat[:, :1]), flat], 1)
    if deep:
        flat = torch.cat([flat[:, :own], flat[:, own:].repeat_interleave(n, 1)], 1)  # z is the fastest axis
    with torch.no_grad():
        model.pos_embed.copy_(flat)
    report.status["pos_embed"] = "inflated"


def block_drift(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[int, float]:
    """1 - cosine between the weights of each block before and after training."""
    blocks = sorted({int(m[1]) for name in before if (m := re.match(r"blocks\.(\d+)\.", name))})
    drift = {}
    for block in blocks:
        names = [name for name in before if name.startswith(f"blocks.{block}.")]
        a, b = (torch.cat([state[name].flatten().double() for name in names]) for state in (before, after))
        drift[block] = float(1 - F.cosine_similarity(a, b, dim=0))
    return drift


def vit_from_weights(backbone: str, weights: str, **options: Any) -> tuple[nn.Module, TransferReport]:
    """A backbone with image weights and, where these are of a checkpoint of ours, its heads, for a teacher."""
    state, source = read_image_weights(weights)
    vit = create_vit(backbone, heads=recorded_heads(weights), **options)
    return vit, transfer(vit, state, source=source)
