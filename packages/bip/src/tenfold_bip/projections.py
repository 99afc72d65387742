"""The projection P_S of relaxed scores onto the feasible masks (the paper's set S).

Every function takes an *importance* (`|s|` for BiP, a saliency for a baseline; larger is kept) and returns 0/1 masks of
dtype uint8 and of the same shape.
The number of ones is exact whatever ties there are: the last places are given by the indices of a selection (`topk`,
linear time), not by comparing with a threshold, and nothing is sorted in full.
No function synchronises the host with a device.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SAMPLE = 1 << 16
"""Entries whose order says where to look for a threshold, in tensors of at least 16 times as many."""
STRUCTURES = ("global", "layer", "filter", "channel", "n:m")


def drop_count(keep: float, n: int) -> int:
    """How many of n entries a keep ratio removes: int((1 - keep) * n).

    The truncation of the double product is the released code's and is kept as it is: drop_count(0.9, 10) is 0 because 1
    - 0.9 is a little less than 0.1, and drop_count(0.7, 10) is 3.
    """
    return int((1.0 - keep) * n)


def keep_count(keep: float, n: int) -> int:
    """How many of n entries remain at a keep ratio; see `drop_count`."""
    return n - drop_count(keep, n)


def check_keep(keep: float) -> None:
    """Raise ValueError unless keep, the fraction of weights that *remains*, lies in (0, 1]."""
    if not 0.0 < keep <= 1.0:
        raise ValueError(
            f"The keep ratio is the fraction of weights that remains and must lie in (0, 1], but it is {keep}; "
            "for a sparsity of p give 1 - p."
        )


def top_mask(importance: Float[Tensor, "*shape"], kept: int) -> UInt8[Tensor, "*shape"]:
    """Mask with exactly `kept` ones at the largest entries; among equal entries the choice is arbitrary. O(n)."""
    flat = importance.flatten()
    if flat.device.type == "cpu" and flat.numel() >= 16 * SAMPLE:  # elsewhere it would wait for the device
        mask = _sampled_mask(flat, kept)
        if mask is not None:
            return mask.view(importance.shape)
    return _selected_mask(flat, kept).view(importance.shape)


def _selected_mask(flat: Float[Tensor, " n"], kept: int) -> UInt8[Tensor, " n"]:
    """Selects whichever side is smaller, the kept or the dropped one."""
    n = flat.numel()
    keep_few = kept <= n - kept
    index = flat.topk(kept if keep_few else n - kept, largest=keep_few, sorted=False).indices
    mask = torch.full((n,), int(not keep_few), dtype=torch.uint8, device=flat.device)
    return mask.index_fill_(0, index, int(keep_few))


def _sampled_mask(flat: Float[Tensor, " n"], kept: int) -> UInt8[Tensor, " n"] | None:
    """The same by two thresholds from a sample, between which the last of the kept entries is all but sure to lie: only what
    is between them, a few per cent, is selected from. None where it does not lie there.
    """
    n = flat.numel()
    sample = flat[:: n // SAMPLE].sort(descending=True).values
    rank = kept / n * sample.numel()
    margin = 4 * (rank * (1 - kept / n)) ** 0.5 + 4  # four standard deviations of where it lies in the sample
    upper = sample[max(0, int(rank - margin))]
    lower = sample[min(sample.numel() - 1, int(rank + margin))]
    sure = flat > upper
    open_places = kept - int(torch.count_nonzero(sure))
    between = torch.nonzero((flat >= lower) ^ sure).squeeze(1)
    if not 0 <= open_places <= between.numel():
        return None
    chosen = between[flat[between].topk(open_places, sorted=False).indices]
    return sure.view(torch.uint8).index_fill_(0, chosen, 1)


def project_global(importances: Sequence[Tensor], keep: float, min_keep: int = 0) -> list[Tensor]:
    """Global unstructured projection (section 2.4): one ranking over all layers, layer ratios float freely.

    Args:
        importances: one tensor a layer, any shapes, n entries together.
        keep: fraction of the n entries that remains, in (0, 1].
        min_keep: entries that every layer keeps at least (or all it has, if fewer); the rest of the budget is ranked
            globally. 0 is the paper's form.

    Raises:
        ValueError: keep outside (0, 1], or a budget too small to give every layer its minimum.

    """
    check_keep(keep)
    flat = torch.cat([importance.flatten() for importance in importances])
    kept = keep_count(keep, flat.numel())
    reserved = sum(min(min_keep, importance.numel()) for importance in importances)
    if reserved > kept:
        raise ValueError(
            f"Keeping {keep} of {flat.numel()} weights leaves {kept}, but min_keep={min_keep} over "
            f"{len(importances)} layers "
            f"reserves {reserved}; raise keep or lower min_keep."
        )
    if min_keep:
        reserve = torch.cat(
            [top_mask(importance, min(min_keep, importance.numel())).flatten() for importance in importances]
        )
        flat = flat.masked_fill(reserve.bool(), torch.inf)
    parts = top_mask(flat, kept).split([importance.numel() for importance in importances])
    return [part.view(importance.shape) for part, importance in zip(parts, importances, strict=True)]


def project_layer(importance: Float[Tensor, "*shape"], keep: float) -> UInt8[Tensor, "*shape"]:
    """Unstructured projection of one layer: its largest entries at the ratio `keep`."""
    check_keep(keep)
    return top_mask(importance, keep_count(keep, importance.numel()))


def project_filter(importance: Float[Tensor, "out *rest"], keep: float, p: float = 2.0) -> UInt8[Tensor, "out *rest"]:
    """Filter-wise projection of one convolution (section 2.4): whole output filters, ranked by their p-norm."""
    check_keep(keep)
    norm = importance.flatten(1).norm(p=p, dim=1)
    mask = top_mask(norm, keep_count(keep, norm.numel()))
    return mask.view(-1, *[1] * (importance.dim() - 1)).expand_as(importance).contiguous()


def project_channel(
    importance: Float[Tensor, "out in *kernel"], keep: float, p: float = 2.0
) -> UInt8[Tensor, "out in *kernel"]:
    """Channel-wise projection of one convolution (section 2.4): whole input channels, ranked by their p-norm.

    A single input channel (depth-wise convolutions, grey images) is never removed: int((1 - keep) * 1) = 0.
    """
    check_keep(keep)
    norm = importance.transpose(0, 1).flatten(1).norm(p=p, dim=1)
    mask = top_mask(norm, keep_count(keep, norm.numel()))
    return mask.view(1, -1, *[1] * (importance.dim() - 2)).expand_as(importance).contiguous()


def project_n_m(importance: Float[Tensor, "out in *kernel"], n: int, m: int) -> UInt8[Tensor, "out in *kernel"]:
    """n:m projection: the n largest of every m consecutive inputs of the same output and kernel position.

    A layer whose input dimension m does not divide stays dense, as sparse tensor cores demand.
    """
    inputs = importance.shape[1]
    if inputs % m:
        return torch.ones_like(importance, dtype=torch.uint8)
    groups = importance.transpose(1, -1).unflatten(-1, (inputs // m, m))
    index = groups.topk(n, dim=-1, sorted=False).indices
    mask = torch.zeros_like(groups, dtype=torch.uint8).scatter_(-1, index, 1)
    return mask.flatten(-2).transpose(1, -1).contiguous()


@dataclass(frozen=True)
class Projection:
    """The feasible set S and its projection: which masks are allowed, and how many entries they keep.

    Attributes:
        structure: "global" (the paper's unstructured form), "layer" (unstructured, the same ratio in every layer),
            "filter", "channel" (both on convolutions only), or "n:m" with numbers, e.g. "2:4".
        keep: fraction that remains, in (0, 1]; for n:m it is n/m whatever is given.
        p: order of the norm that ranks filters and channels, 1 or 2.
        min_keep: with "global", the entries that every layer keeps at least.

    Raises:
        ValueError: unknown structure, keep outside (0, 1], or n:m without 0 < n <= m.

    """

    structure: str = "global"
    keep: float = 1.0
    p: float = 2.0
    min_keep: int = 0

    def __post_init__(self) -> None:
        """Check the ratio and the structure's name; an n:m pattern fixes the keep ratio."""
        check_keep(self.keep)
        pattern = re.fullmatch(r"(\d+):(\d+)", self.structure)
        if pattern:
            n, m = int(pattern[1]), int(pattern[2])
            if not 0 < n <= m:
                raise ValueError(
                    f"In an n:m structure n of every m weights remain, with 0 < n <= m; got {self.structure!r}."
                )
            object.__setattr__(self, "keep", n / m)
        elif self.structure not in STRUCTURES[:-1]:
            raise ValueError(
                f"Unknown structure {self.structure!r}: choose one of {', '.join(STRUCTURES)} "
                "(with numbers for n and m, as in 2:4)."
            )
        if self.min_keep and self.structure != "global":
            raise ValueError(
                f"min_keep applies to structure='global' only, where layer ratios float, not to {self.structure!r}."
            )

    @property
    def convolutions_only(self) -> bool:
        """Whether linear layers stay dense."""
        return self.structure in ("filter", "channel")

    def __call__(self, importances: Sequence[Tensor]) -> list[Tensor]:
        """Masks (uint8) of the importances, one a layer, in the same order."""
        if self.structure == "global":
            return project_global(importances, self.keep, self.min_keep)
        if self.structure == "layer":
            return [project_layer(importance, self.keep) for importance in importances]
        if self.structure == "filter":
            return [project_filter(importance, self.keep, self.p) for importance in importances]
        if self.structure == "channel":
            return [project_channel(importance, self.keep, self.p) for importance in importances]
        n, m = map(int, self.structure.split(":"))
        return [project_n_m(importance, n, m) for importance in importances]
