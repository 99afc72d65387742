"""Point Transformer, the released baseline: vector attention among the k nearest neighbours (section 3)."""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from tenfold_simple3dformer.abstraction import SetAbstraction, TransitionUp, two_layers
from tenfold_simple3dformer.pointops import gather_points, nearest_neighbours


class VectorAttention(nn.Module):
    """fc2(sum_j w_ij (v_j + delta_ij)) + input, with w = softmax over j of MLP(q_i - k_j + delta_ij) / sqrt(dim)."""

    def __init__(self, width: int, dim: int, neighbours: int):
        super().__init__()
        self.neighbours, self.dim = neighbours, dim
        self.fc1, self.fc2 = nn.Linear(width, dim), nn.Linear(dim, width)
        self.fc_delta, self.fc_gamma = two_layers(3, dim), two_layers(dim, dim)
        self.w_qs, self.w_ks, self.w_vs = (nn.Linear(dim, dim, bias=False) for _ in range(3))

    def forward(self, xyz: Float[Tensor, "b n 3"], features: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Features of the same points."""
        group = nearest_neighbours(xyz, xyz, self.neighbours)[1]
        x = self.fc1(features)
        keys, values = gather_points(self.w_ks(x), group), gather_points(self.w_vs(x), group)
        delta = self.fc_delta(xyz[:, :, None] - gather_points(xyz, group))
        weights = self.fc_gamma(self.w_qs(x)[:, :, None] - keys + delta) / math.sqrt(self.dim)
        return self.fc2((weights.softmax(2) * (values + delta)).sum(2)) + features


class PointTransformer(nn.Module):
    """Stages of N / 4^i points and widths 32 * 2^i, one attention block each.

    Args:
        inputs: channels of a point, coordinates first.
        classes: classes.
        task: ``cls``: mean, 256, 64, classes; ``seg``: an MLP of 512 at the bottom, the way back up, 64, 64, classes.
        stages: how many.
        dim: of the attention.
        neighbours: k.

    """

    def __init__(
        self,
        inputs: int,
        classes: int,
        task: Literal["cls", "seg"] = "cls",
        *,
        stages: int = 4,
        dim: int = 512,
        neighbours: int = 16,
    ):
        super().__init__()
        self.task, self.stages, self.inputs, self.classes = task, stages, inputs, classes
        widths = [32 * 2**i for i in range(stages + 1)]
        self.fc1 = two_layers(inputs, 32)
        self.transformer1 = VectorAttention(32, dim, neighbours)
        pairs = list(itertools.pairwise(widths))
        self.downs = nn.ModuleList(SetAbstraction(0, neighbours, [a + 3, b, b]) for a, b in pairs)
        self.transformers = nn.ModuleList(VectorAttention(b, dim, neighbours) for _, b in pairs)
        top = widths[-1]
        if task == "cls":
            self.fc2 = nn.Sequential(
                nn.Linear(top, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, classes)
            )
            return
        self.fc2 = nn.Sequential(nn.Linear(top, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, top))
        self.transformer2 = VectorAttention(top, dim, neighbours)
        self.ups = nn.ModuleList(TransitionUp(b, a, a) for a, b in reversed(pairs))
        self.up_transformers = nn.ModuleList(VectorAttention(a, dim, neighbours) for a, _ in reversed(pairs))
        self.fc3 = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes))

    def forward(
        self, points: Float[Tensor, "b n d"], starts: Sequence[Int[Tensor, " b"]] | None = None
    ) -> Float[Tensor, "b *n k"]:
        """Logits of clouds or of points."""
        xyz = points[..., :3].contiguous()
        places, features = [xyz], [self.transformer1(xyz, self.fc1(points))]
        for i, (down, transformer) in enumerate(zip(self.downs, self.transformers, strict=True)):
            count = max(1, points.shape[1] // 4 ** (i + 1))
            centres, reduced = down(places[-1], features[-1], "first" if starts is None else starts[i], count)
            places.append(centres)
            features.append(transformer(centres, reduced))
        if self.task == "cls":
            return self.fc2(features[-1].mean(1))
        current = self.transformer2(places[-1], self.fc2(features[-1]))
        for level, up, transformer in zip(range(self.stages - 1, -1, -1), self.ups, self.up_transformers, strict=True):
            current = transformer(places[level], up(places[level + 1], current, places[level], features[level]))
        return self.fc3(current)
