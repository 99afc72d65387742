"""Which few samples of a class are kept: the anchors (section 5), and iCaRL's herding and nearest mean."""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tenfold_cilqud.protocol import draws

AnchorRule = Literal["random", "herding", "kcenter"]
TINY = 1e-8


def unit(features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Features over (their norm + 1e-8)."""
    return features / (features.norm(dim=1, keepdim=True) + TINY)


def herding(features: Float[Tensor, "n d"], count: int) -> Int[Tensor, " m"]:
    """Indices whose running mean of unit features stays closest to the class mean, in the order chosen.

    Step k takes the i that minimises ||mu - (v_i + sum of the chosen) / k||, without replacement.
    """
    vectors = unit(features)
    mean = vectors.mean(0)
    total = torch.zeros_like(mean)
    free = torch.ones(len(vectors), dtype=torch.bool, device=features.device)
    chosen = []
    for k in range(1, min(count, len(vectors)) + 1):
        gap = (mean - (vectors + total) / k).square().sum(1).sqrt()
        best = int(gap.masked_fill(~free, torch.inf).argmin())
        free[best] = False
        total += vectors[best]
        chosen.append(best)
    return torch.tensor(chosen, dtype=torch.int64)


def k_center(features: Float[Tensor, "n d"], count: int) -> Int[Tensor, " m"]:
    """Greedy k-centre: the sample closest to the mean, then always the one farthest from all chosen; none twice."""
    first = int((features - features.mean(0)).square().sum(1).argmin())
    chosen = [first]
    gap = (features - features[first]).square().sum(1)
    while len(chosen) < min(count, len(features)):
        gap[chosen[-1]] = -torch.inf  # also where all others are the same image
        chosen.append(int(gap.argmax()))
        gap = torch.minimum(gap, (features - features[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen[:count], dtype=torch.int64)


def random_anchors(size: int, count: int, seed: int, label: int) -> Int[Tensor, " m"]:
    """The first `count` of a class's images after the permutation that (seed + label) gives."""
    return torch.from_numpy(draws(seed + label).permutation(size)[:count].astype(np.int64))


def choose_anchors(
    rule: AnchorRule, size: int, count: int, seed: int, label: int, features: Float[Tensor, "n d"] | None = None
) -> Int[Tensor, " m"]:
    """Indices of a class's anchors among its `size` training images; `features` are needed for all but `random`."""
    if rule == "random":
        return random_anchors(size, count, seed, label)
    assert features is not None
    return herding(features, count) if rule == "herding" else k_center(features, count)


def class_means(features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], classes: int) -> Float[Tensor, "k d"]:
    """Mean of each class's unit features, made unit again (iCaRL's prototypes)."""
    vectors = unit(features)
    total = torch.zeros(classes, features.shape[1], dtype=features.dtype, device=features.device)
    total.index_add_(0, labels, vectors)
    counts = torch.bincount(labels, minlength=classes).clamp(min=1)
    mean = total / counts[:, None]
    return mean / mean.norm(dim=1, keepdim=True).clamp(min=TINY)


def nearest_mean(features: Float[Tensor, "n d"], means: Float[Tensor, "k d"]) -> Float[Tensor, "n k"]:
    """Scores by class, the greatest for the nearest mean: minus the squared distance of the unit features."""
    return -torch.cdist(unit(features), means).square()
