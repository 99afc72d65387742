"""Attention roll-out: what the class token looks at, through all layers, on voxels and points."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold_simple3dformer.backbone import prefix_length, run_blocks
from tenfold_simple3dformer.point import PointFormer
from tenfold_simple3dformer.pointops import interpolate
from tenfold_simple3dformer.voxel import VoxelFormer

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


def rollout(attention: Sequence[Float[Tensor, "*b h t t"]]) -> list[Float[Tensor, "*b t t"]]:
    """Joint attention after each layer: mean over the heads, plus identity, rows normalised, later @ earlier."""
    joint: list[Tensor] = []
    for layer in attention:
        mixed = layer.mean(-3) + torch.eye(layer.shape[-1], dtype=layer.dtype, device=layer.device)
        mixed = mixed / mixed.sum(-1, keepdim=True)
        joint.append(mixed @ joint[-1] if joint else mixed)
    return joint


@contextmanager
def recorded_attention(vit: "VisionTransformer") -> Iterator[list[Float[Tensor, "b h t t"]]]:
    """Within it, the softmax weights of every block of every pass over the blocks are appended to the list.

    The blocks go on using fused attention; the weights are computed beside it.
    """
    recorded: list[Tensor] = []

    def record(module: Any, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0]
        batch, tokens, _ = x.shape
        qkv = module.qkv(x).reshape(batch, tokens, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = module.q_norm(qkv[0]), module.k_norm(qkv[1])
        recorded.append((q * module.scale @ k.transpose(-2, -1)).softmax(-1))

    handles = [block.attn.register_forward_pre_hook(record) for block in vit.blocks]  # type: ignore[union-attr]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def voxel_rollout(model: VoxelFormer, voxels: Float[Tensor, "b 1 v v v"]) -> Float[Tensor, "b n n n"]:
    """Attention of the class token on every cell, largest 1 in each sample.

    A tokenizer without depth gives the same weight to all cells of a column; with the group embedding, the second pass
    weighs the columns and the first the cells of each.
    """
    with recorded_attention(model.vit) as recorded:
        model.eval().features(voxels)
    depth, batch, n = len(model.vit.blocks), len(voxels), model.grid[0]
    skip = prefix_length(model.vit)
    if model.tokenizer == "slices":
        weights = rollout(recorded)[-1][:, 0, skip:].view(batch, n, n, n).permute(0, 2, 3, 1)
    else:
        plane = rollout(recorded[-depth:])[-1][:, 0, skip:].reshape(batch, *model.grid)
        if model.group is not None:
            along = rollout(recorded[:depth])[-1][:, 0, 1:].view(batch, n, n, n)
            weights = plane[..., None] * along / along.sum(-1, keepdim=True)
        else:
            weights = plane if plane.dim() == 4 else plane[..., None].expand(-1, -1, -1, n)
    return weights / weights.amax((1, 2, 3), keepdim=True)


@torch.no_grad()
def point_rollout(model: PointFormer, points: Float[Tensor, "b n d"]) -> Float[Tensor, "b n"]:
    """Attention of the class token on the tokens, carried to all points by 3-nearest interpolation; largest 1."""
    places, features = model.eval().tokens(points)
    with recorded_attention(model.vit) as recorded:
        run_blocks(model.vit, features[-1])
    weights = rollout(recorded)[-1][:, 0, prefix_length(model.vit) :]
    spread = interpolate(places[0], places[-1], weights[..., None])[..., 0]
    return spread / spread.amax(1, keepdim=True)
