"""Voxels to tokens (section 2.2) and the group embedding (section 2.3).

All inflate a patch embedding: E = Conv3d(1 -> C, kernel = stride = T). Since the cells do not overlap, the convolution
is one matrix product over the cells' contents, and a mean over z of its output is the product with the mean over z of
its input: n times fewer operations. A shape fills a few hundredths of its grid, so where no gradient is asked for, a CPU
adds up the weights of the occupied voxels alone: exact, and the fewer there are, the faster.
"""

import functools
import math
from typing import Literal, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold_shared.errors import UserError

TokenizerName = Literal["naive", "projection", "group", "occupancy2d", "hybrid", "hybrid_naive", "slices"]

ReleasedTokenizer = Literal[
    "VoxelEmbed", "VoxelEmbed_no_average", "VoxelEmbed_no_average+group_embed", "VoxelEmbed_no_average+weight_sharing",
    "VoxelNaiveProjection", "VoxelEmbed_no_zdim", "VoxelEmbed_Hybrid", "VoxelEmbed_Hybrid_no_average",
]  # fmt: skip
"""Class of the release, with its position embedding behind a plus where that is not ``default``."""

RELEASED_NAMES: dict[tuple[str, str], TokenizerName] = {
    ("VoxelEmbed", "default"): "projection",
    ("VoxelEmbed_no_average", "default"): "naive",
    ("VoxelEmbed_no_average", "group_embed"): "group",
    ("VoxelEmbed_no_average", "weight_sharing"): "slices",
    ("VoxelNaiveProjection", "default"): "occupancy2d",
    ("VoxelEmbed_no_zdim", "default"): "occupancy2d",
    ("VoxelEmbed_Hybrid", "default"): "hybrid",
    ("VoxelEmbed_Hybrid_no_average", "default"): "hybrid_naive",
}
"""(class, position embedding) of the release -> our name; the release's README has the first two the wrong way round."""


def tokenizer_name(name: str) -> str:
    """Our name of a tokenizer, where it is given by a `ReleasedTokenizer`; any other name is returned."""
    embed_layer, _, positions = name.partition("+")
    return RELEASED_NAMES.get((embed_layer, positions or "default"), name)


def cells_per_axis(voxels: int, cell: int) -> int:
    """N = floor((V - T) / T) + 1.

    Raises:
        UserError: the grid is smaller than a cell.

    """
    if cell < 1 or voxels < cell:
        raise UserError(f"a grid of {voxels} voxels a side has no cell of {cell}: the cell must be 1 to {voxels}")
    return (voxels - cell) // cell + 1


def token_grid(name: str, voxels: int, cell: int) -> tuple[int, ...]:
    """The lattice of a tokenizer's tokens: (n, n, n) for naive, (n, n) for the others; the hybrids' n is 6."""
    if name.startswith("hybrid"):
        return (6, 6) if name == "hybrid" else (6, 6, 6)
    n = cells_per_axis(voxels, cell)
    return (n, n, n) if name == "naive" else (n, n)


def cells(voxels: Float[Tensor, "b 1 v v v"], cell: int, *, mean_over_z: bool = False) -> Float[Tensor, "b n n *m t"]:
    """The contents of the cells, T^3 values each: (B, n, n, n, T^3), or their mean over the cells of a column
    (B, n, n, T^3). A border narrower than a cell is cut off.
    """
    batch, side = voxels.shape[0], voxels.shape[2]
    n = cells_per_axis(side, cell)
    cut = voxels[:, 0, : n * cell, : n * cell, : n * cell]
    split = cut.unflatten(3, (n, cell)).unflatten(2, (n, cell)).unflatten(1, (n, cell))
    if mean_over_z:
        return split.mean(5).permute(0, 1, 3, 2, 4, 5).reshape(batch, n, n, cell**3)
    return split.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, n, n, n, cell**3)


DENSE = 0.06
"""Above this share of occupied voxels the matrix product over all of them is the faster one, where products are fast."""


@functools.lru_cache(maxsize=8)
def _places(side: int, cell: int) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
    """Each voxel's cell and its place in it, for a flat grid, in the order of `cells`. Border voxels have none (0, 0)."""
    n = cells_per_axis(side, cell)
    whole = n * cell
    order = torch.arange(whole**3, dtype=torch.int32).view(n, n, n, cell, cell, cell).permute(0, 3, 1, 4, 2, 5)
    flat = F.pad(order.reshape(whole, whole, whole), (0, side - whole) * 3).flatten()
    return flat // cell**3, flat % cell**3


def _by_cell(found: Int[np.ndarray, " p"], count: int) -> Int[np.ndarray, " p"]:
    """The order that sorts cell numbers below ``count``: by their lower 16 bits, then by the upper ones, as NumPy sorts
    16 bits by their digits, several times faster than by comparisons.
    """
    order = found.astype(np.uint16).argsort(kind="stable")
    if count > 2**16:
        order = order[(found >> 16).astype(np.uint16)[order].argsort(kind="stable")]
    return order


def embed_occupied(
    voxels: Float[Tensor, "b 1 v v v"], weight: Float[Tensor, "c t3"], bias: Float[Tensor, " c"], cell: int
) -> Float[Tensor, "b n n n c"] | None:
    """The product over the cells from the occupied voxels alone; None if there are too many for that to be faster."""
    batch, side = voxels.shape[0], voxels.shape[2]
    n = cells_per_axis(side, cell)
    grid, count = side**3, batch * n**3
    if voxels.numel() >= 2**31:
        return None
    occupied = voxels.to(torch.bool)
    for axis in (2, 3, 4):
        occupied.narrow(axis, n * cell, side - n * cell).zero_()
    if np.count_nonzero(occupied.numpy()) > DENSE * voxels.numel():
        return None
    found = np.flatnonzero(occupied.numpy())  # several times faster than torch.nonzero
    flat = torch.from_numpy(found.astype(np.int32))  # 32 bits halve the time of all that follows
    sample = flat // grid
    voxel = flat - sample * grid
    cell_of, place_in = _places(side, cell)
    of = (cell_of.index_select(0, voxel) + sample * n**3).numpy()
    order = torch.from_numpy(_by_cell(of, count))
    sizes = torch.from_numpy(np.bincount(of, minlength=count))
    places = place_in.index_select(0, voxel.index_select(0, order))
    values = voxels.flatten().index_select(0, flat.index_select(0, order))
    offsets = (sizes.cumsum(0) - sizes).to(torch.int32)
    table = weight.t().contiguous()
    summed = F.embedding_bag(places, table, offsets, mode="sum", per_sample_weights=values)
    return summed.add_(bias).view(batch, n, n, n, len(bias))


class InflatedEmbedding(nn.Module):
    """E = Conv3d(1 -> C, kernel = stride = T, bias) as a product over the cells; its parameters are the convolution's."""

    def __init__(self, width: int, cell: int):
        super().__init__()
        self.cell = cell
        reference = nn.Conv3d(1, width, cell, cell)  # its default initialisation
        self.weight = nn.Parameter(reference.weight.detach().clone())
        self.bias = nn.Parameter(cast(Tensor, reference.bias).detach().clone())

    def forward(self, voxels: Float[Tensor, "b 1 v v v"], *, mean_over_z: bool = False) -> Float[Tensor, "b ..."]:
        """(B, n, n, n, C), axes x, y, z; or its mean over z (B, n, n, C)."""
        weight = self.weight.flatten(1)
        if not mean_over_z and self._may_skip(voxels):
            embedded = embed_occupied(voxels, weight, self.bias, self.cell)
            if embedded is not None:
                return embedded
        return F.linear(cells(voxels, self.cell, mean_over_z=mean_over_z), weight, self.bias)

    def _may_skip(self, voxels: Tensor) -> bool:
        """On a CPU, where neither a gradient nor a graph of fixed shapes is asked for."""
        return (
            voxels.device.type == "cpu"
            and voxels.dtype == self.weight.dtype
            and voxels.dtype in (torch.float32, torch.float64)
            and not (torch.is_grad_enabled() and (voxels.requires_grad or self.weight.requires_grad))
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
        )


class SilhouetteEmbedding(nn.Module):
    """occupancy2d: the shadow clamp(sum over z, 0, 1), then Conv2d(1 -> C, kernel = stride = T)."""

    def __init__(self, width: int, cell: int):
        super().__init__()
        self.conv = nn.Conv2d(1, width, cell, cell)

    def forward(self, voxels: Float[Tensor, "b 1 v v v"]) -> Float[Tensor, "b n n c"]:
        """(B, n, n, C)."""
        return self.conv(voxels.sum(4).clamp(0, 1)).permute(0, 2, 3, 1)


class HybridEmbedding(nn.Module):
    """hybrid: VoxNet's two convolutions on a 32^3 grid, then a 1x1x1 convolution to C; averaged over z or not."""

    def __init__(self, width: int, mean_over_z: bool = True):
        super().__init__()
        self.mean_over_z = mean_over_z
        self.backbone = voxnet_stem()
        self.proj = nn.Conv3d(32, width, 1)

    def forward(self, voxels: Float[Tensor, "b 1 v v v"]) -> Float[Tensor, "b ..."]:
        """(B, 6, 6, C), or (B, 6, 6, 6, C) when not averaged over z."""
        grid = voxels
        if voxels.shape[-1] != 32:
            grid = F.interpolate(voxels, size=(32, 32, 32), mode="trilinear", align_corners=False)
        embedded = self.proj(self.backbone(grid)).permute(0, 2, 3, 4, 1)
        return embedded.mean(3) if self.mean_over_z else embedded


def voxnet_stem() -> nn.Sequential:
    """Conv3d(1, 32, 5, stride 2)-ReLU-dropout .2-Conv3d(32, 32, 3)-ReLU-max pool 2-dropout .3: 32^3 -> 32 x 6^3."""
    return nn.Sequential(
        nn.Conv3d(1, 32, 5, 2),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv3d(32, 32, 3),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Dropout(0.3),
    )


class GroupEncoder(nn.Module):
    """Steps 2 and 3 of the group embedding: a class token and positions for the columns, and one encoder layer.

    ``axis="z"`` attends along the column, as the paper intends. ``axis="released"`` attends across the batch and the
    columns, as the released code does: there, a sample's output depends on which others are in the batch.
    """

    def __init__(self, width: int, n: int, axis: Literal["z", "released"] = "z", *, zero_init: bool = True):
        super().__init__()
        if width % 4:
            raise UserError(f"the group embedding has 4 heads: the width {width} is no multiple of 4")
        self.axis = axis
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, n + 1, width))
        if not zero_init:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        # Its layer norms keep the encoder layer's own eps of 1e-5; the ViT's is 1e-6.
        self.layer = nn.TransformerEncoderLayer(
            width, 4, dim_feedforward=width, dropout=0.1, activation="relu", batch_first=True
        )

    def forward(self, columns: Float[Tensor, "g n c"]) -> Float[Tensor, "g m c"]:
        """Columns (B n n, n, C) to (B n n, n + 1, C), the columns' class token first."""
        sequence = torch.cat([self.cls_token.expand(columns.shape[0], -1, -1), columns], 1) + self.pos_embed
        if self.axis == "released":
            return self.layer(sequence.transpose(0, 1)).transpose(0, 1)
        return self.layer(sequence)


def attention_cost(name: str, n: int, width: int, depth: int) -> float:
    """Multiply-accumulates of the blocks' attention (scores and weighted sums) and of their linear maps, one sample."""

    def pass_over(tokens: int) -> float:
        return depth * (2.0 * tokens**2 * width + 12.0 * tokens * width**2)

    if name == "naive":
        return pass_over(n**3 + 1)
    if name == "group":
        return n**2 * pass_over(n + 1) + pass_over(n**2 + 1)
    if name == "slices":
        return n * pass_over(n**2 + 1)
    return pass_over(n**2 + 1)


def sequence_lengths(name: str, grid: tuple[int, ...]) -> list[int]:
    """Lengths of the sequences that the blocks see, the class token included."""
    full = math.prod(grid) + 1
    return [grid[0] + 1, full] if name == "group" else [full]
