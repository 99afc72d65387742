"""PointNet without its transformation networks, and PointNet++ (single-scale grouping) from our own set abstraction."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tenfold_simple3dformer.abstraction import PointwiseMLP, SetAbstraction
from tenfold_simple3dformer.pointops import interpolate


def _classifier(width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        PointwiseMLP([width, 512]), nn.Dropout(0.4), PointwiseMLP([512, 256]), nn.Dropout(0.4), nn.Linear(256, classes)
    )


class PointNet(nn.Module):
    """A shared MLP 64-64-64-128-1024, the maximum over the points, 512-256-classes; segmentation joins 64 and 1024."""

    def __init__(self, inputs: int, classes: int, task: Literal["cls", "seg"] = "cls"):
        super().__init__()
        self.task = task
        self.low = PointwiseMLP([inputs, 64, 64])
        self.high = PointwiseMLP([64, 64, 128, 1024])
        if task == "cls":
            self.head = _classifier(1024, classes)
        else:
            self.head = nn.Sequential(PointwiseMLP([64 + 1024, 512, 256, 128]), nn.Linear(128, classes))

    def forward(self, points: Float[Tensor, "b n d"]) -> Float[Tensor, "b *n k"]:
        """Logits of clouds or of points."""
        low = self.low(points)
        top = self.high(low).amax(1)
        if self.task == "cls":
            return self.head(top)
        return self.head(torch.cat([low, top[:, None].expand(-1, low.shape[1], -1)], -1))


class FeaturePropagation(nn.Module):
    """Coarse features interpolated to the fine points, joined with theirs, through an MLP."""

    def __init__(self, widths: list[int]):
        super().__init__()
        self.mlp = PointwiseMLP(widths)

    def forward(
        self,
        fine_xyz: Float[Tensor, "b n 3"],
        coarse_xyz: Float[Tensor, "b s 3"],
        fine: Float[Tensor, "b n c"],
        coarse: Float[Tensor, "b s d"],
    ) -> Float[Tensor, "b n e"]:
        """Features of the fine points."""
        return self.mlp(torch.cat([fine, interpolate(fine_xyz, coarse_xyz, coarse)], -1))


class PointNet2(nn.Module):
    """PointNet++ SSG: 512 centres (radius .2, 32 samples), 128 (.4, 64), all; fewer centres for smaller clouds."""

    def __init__(self, inputs: int, classes: int, task: Literal["cls", "seg"] = "cls"):
        super().__init__()
        self.task = task
        self.first = SetAbstraction(512, 32, [inputs + 3, 64, 64, 128], radius=0.2)
        self.second = SetAbstraction(128, 64, [128 + 3, 128, 128, 256], radius=0.4)
        self.all = PointwiseMLP([256 + 3, 256, 512, 1024])
        if task == "cls":
            self.head = _classifier(1024, classes)
            return
        self.up3 = FeaturePropagation([256 + 1024, 256, 256])
        self.up2 = FeaturePropagation([128 + 256, 256, 128])
        self.up1 = FeaturePropagation([inputs + 128, 128, 128])
        self.head = nn.Sequential(PointwiseMLP([128, 128]), nn.Dropout(0.5), nn.Linear(128, classes))

    def forward(self, points: Float[Tensor, "b n d"]) -> Float[Tensor, "b *n k"]:
        """Logits of clouds or of points."""
        xyz = points[..., :3].contiguous()
        xyz1, f1 = self.first(xyz, points, count=min(512, xyz.shape[1]))
        xyz2, f2 = self.second(xyz1, f1, count=min(128, xyz.shape[1]))
        top = self.all(torch.cat([xyz2, f2], -1)).amax(1)
        if self.task == "cls":
            return self.head(top)
        f2 = self.up3(xyz2, xyz2.mean(1, keepdim=True), f2, top[:, None])
        f1 = self.up2(xyz1, xyz2, f1, f2)
        return self.head(self.up1(xyz, xyz1, points, f1))
