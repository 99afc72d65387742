"""Points to tokens and back (section 2.7): set abstraction, transitions down and up, the local operator."""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tenfold_shared.errors import UserError
from tenfold_simple3dformer.pointops import (
    ball_query,
    farthest_point_sampling,
    gather_points,
    interpolate,
    nearest_neighbours,
)

Start = Int[Tensor, " b"] | Literal["first", "random"]


class PointwiseMLP(nn.Module):
    """1x1 convolution with bias, batch norm, ReLU, for each width; a linear map over the last axis is the convolution."""

    def __init__(self, widths: Sequence[int], *, bias: bool = True):
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.linears = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm1d(b) for _, b in pairs)

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b d"]:
        """Every position on its own; the statistics run over all of them."""
        shape = x.shape[:-1]
        # Where statistics run over several processes, the norms are of another class.
        if self.training and shape.numel() == 1 and type(self.norms[0]) is nn.BatchNorm1d:
            raise UserError("batch norm needs more than one sample to train on: raise --batch_size")
        x = x.reshape(-1, x.shape[-1])
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = norm(linear(x)).relu()
        return x.view(*shape, -1)


class SetAbstraction(nn.Module):
    """S farthest points; the features [xyz - centre, f] of their neighbours through an MLP; the maximum over them.

    Args:
        count: centres S; the cloud's own size when it is smaller or ``count`` is 0.
        neighbours: neighbours of each centre.
        widths: of the MLP, the input's (3 more than the features') first.
        radius: None takes the k nearest; otherwise a ball query whose offsets are divided by the radius.

    """

    def __init__(
        self, count: int, neighbours: int, widths: Sequence[int], radius: float | None = None, *, bias: bool = True
    ):
        super().__init__()
        self.count, self.neighbours, self.radius = count, neighbours, radius
        self.mlp = PointwiseMLP(widths, bias=bias)

    def forward(
        self,
        xyz: Float[Tensor, "b n 3"],
        features: Float[Tensor, "b n c"] | None = None,
        start: Start = "first",
        count: int = 0,
    ) -> tuple[Float[Tensor, "b s 3"], Float[Tensor, "b s d"]]:
        """Centres and their features; ``count`` takes the place of the layer's own."""
        index = farthest_point_sampling(xyz, count or self.count or xyz.shape[1], start)
        return self.around(gather_points(xyz, index), xyz, features)

    def around(
        self, centres: Float[Tensor, "b s 3"], xyz: Float[Tensor, "b n 3"], features: Float[Tensor, "b n c"] | None
    ) -> tuple[Float[Tensor, "b s 3"], Float[Tensor, "b s d"]]:
        """The same with given centres."""
        if self.radius is None:
            group = nearest_neighbours(centres, xyz, self.neighbours)[1]
        else:
            group = ball_query(centres, xyz, self.radius, self.neighbours)
        offsets = gather_points(xyz, group) - centres[:, :, None]
        if self.radius is not None:
            offsets = offsets / self.radius
        grouped = offsets if features is None else torch.cat([offsets, gather_points(features, group)], -1)
        return centres, self.mlp(grouped).amax(2)


class TransitionUp(nn.Module):
    """relu(BN(Linear(coarse))) interpolated to the fine points, plus relu(BN(Linear(fine)))."""

    def __init__(self, coarse: int, fine: int, out: int):
        super().__init__()
        self.coarse = PointwiseMLP([coarse, out])
        self.fine = PointwiseMLP([fine, out])

    def forward(
        self,
        coarse_xyz: Float[Tensor, "b s 3"],
        coarse: Float[Tensor, "b s c"],
        fine_xyz: Float[Tensor, "b n 3"],
        fine: Float[Tensor, "b n d"],
    ) -> Float[Tensor, "b n e"]:
        """Features of the fine points."""
        return interpolate(fine_xyz, coarse_xyz, self.coarse(coarse)) + self.fine(fine)


def two_layers(inputs: int, hidden: int) -> nn.Sequential:
    """Linear, ReLU, Linear."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden))


class LocalOperator(nn.Module):
    """The release's other point tokenizer, ``local_op``: features [f_j - f_i, f_i] of k neighbours, MLP, maximum.

    Conv1d(d -> 64 -> 64) with batch norm and ReLU on every point, then ``count`` centres with ``neighbours`` each and a
    1x1 MLP 128 -> e -> e. The convolutions have no bias.
    """

    def __init__(self, inputs: int, width: int, count: int = 0, neighbours: int = 32):
        super().__init__()
        self.count, self.neighbours = count, neighbours
        self.point = PointwiseMLP([inputs, 64, 64], bias=False)
        self.local = PointwiseMLP([128, width, width], bias=False)

    def forward(
        self, xyz: Float[Tensor, "b n 3"], features: Float[Tensor, "b n c"], start: Start = "first", count: int = 0
    ) -> tuple[Float[Tensor, "b s 3"], Float[Tensor, "b s d"]]:
        """Centres and their tokens; ``count`` takes the place of the layer's own."""
        embedded = self.point(features)
        index = farthest_point_sampling(xyz, count or self.count or xyz.shape[1], start)
        centres, own = gather_points(xyz, index), gather_points(embedded, index)
        group = gather_points(embedded, nearest_neighbours(centres, xyz, self.neighbours)[1])
        own = own[:, :, None].expand_as(group)
        return centres, self.local(torch.cat([group - own, own], -1)).amax(2)
