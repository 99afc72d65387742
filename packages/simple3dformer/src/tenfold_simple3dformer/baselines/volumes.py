"""Baselines on occupancy grids: VoxNet, a volumetric Vision Permutator, logistic regression."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold_simple3dformer.tokenizers import InflatedEmbedding, cells_per_axis, voxnet_stem


class VoxNet(nn.Module):
    """The stem (see `voxnet_stem`), FC 6912 -> 128, ReLU, dropout .4, FC -> classes, on a 32^3 grid."""

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes
        self.feat = voxnet_stem()
        self.fc1, self.fc2 = nn.Linear(6912, 128), nn.Linear(128, classes)

    def forward(self, voxels: Float[Tensor, "b 1 v v v"]) -> Float[Tensor, "b k"]:
        """Logits; another grid is padded with emptiness (up to 32) or resized."""
        side = voxels.shape[-1]
        if side < 32:
            low = (32 - side) // 2
            voxels = F.pad(voxels, [low, 32 - side - low] * 3)
        elif side > 32:
            voxels = F.interpolate(voxels, size=(32, 32, 32), mode="trilinear", align_corners=False)
        hidden = self.fc1(self.feat(voxels).flatten(1)).relu()
        return self.fc2(F.dropout(hidden, 0.4, self.training))


class _Permute(nn.Module):
    """Mixes tokens along x, y, z and over the channels with one linear map each, and sums."""

    def __init__(self, n: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.axes = nn.ModuleList(nn.Linear(n, n) for _ in range(3))
        self.channels, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Float[Tensor, "b n n n c"]) -> Float[Tensor, "b n n n c"]:
        y = self.norm1(x)
        mixed = self.channels(y)
        for axis, linear in enumerate(self.axes, start=1):
            mixed = mixed + linear(y.transpose(axis, -1)).transpose(axis, -1)
        x = x + self.out(mixed)
        return x + self.mlp(self.norm2(x))


class VisionPermutator3D(nn.Module):
    """An MLP in place of attention on the same cells: `depth` layers of axis-wise linear maps, mean, linear head."""

    def __init__(self, classes: int, *, voxels: int = 30, cell: int = 6, width: int = 192, depth: int = 8):
        super().__init__()
        self.embed = InflatedEmbedding(width, cell)
        self.layers = nn.Sequential(*(_Permute(cells_per_axis(voxels, cell), width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, voxels: Float[Tensor, "b 1 v v v"]) -> Float[Tensor, "b k"]:
        """Logits."""
        return self.head(self.norm(self.layers(self.embed(voxels))).mean((1, 2, 3)))


class OccupancyLogistic(nn.Module):
    """Logistic regression on the occupancy of every voxel: the floor that anything has to pass."""

    def __init__(self, classes: int, *, voxels: int = 30):
        super().__init__()
        self.linear = nn.Linear(voxels**3, classes)

    def forward(self, voxels: Float[Tensor, "b 1 v v v"]) -> Float[Tensor, "b k"]:
        """Logits."""
        return self.linear(torch.flatten(voxels, 1))
