"""The query (section 2.3): anchors pick their nearest pool images, each among those not yet taken."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tenfold_shared.errors import UserError

Metric = Literal["l2", "cosine"]
Order = Literal["stored", "round_robin"]
MEMORY = 64 << 20  # bytes of distances held at a time


@dataclasses.dataclass(frozen=True)
class Query:
    """What the anchors took: pool indices in the order in which they were taken, and who took them from how far."""

    indices: Int[Tensor, " n"]
    anchor: Int[Tensor, " n"]
    distance: Float[Tensor, " n"]
    counts: Int[Tensor, " a"]
    """How many were taken in all after each anchor (in `stored` order)."""
    seconds: float = 0.0

    @property
    def chosen(self) -> Int[Tensor, " n"]:
        """The set of indices, ascending."""
        return self.indices.sort().values


@torch.no_grad()
def query(
    anchors: Float[Tensor, "a d"],
    pool: Float[Tensor, "p d"],
    per_anchor: int = 50,
    *,
    metric: Metric = "l2",
    order: Order = "stored",
    max_total: int = 0,
    exclude: Int[Tensor, " e"] | None = None,
    memory: int = MEMORY,
) -> Query:
    """The `per_anchor` nearest pool rows of every anchor, anchors in turn, without replacement; exact.

    The order of the anchors is part of the result. Where a pool is smaller than what the anchors ask for, all of it is
    taken. Distances are squared Euclidean ones of features centred on the pool's mean, in the features' precision (single for
    half ones); equal distances go to the lower index. At most `memory` bytes of distances are held at a time, whatever the pool's size.

    Args:
        anchors: features [a, d], in stored order.
        pool: features [p, d]; may lie on another device than the anchors, where the distances are computed.
        per_anchor: k.
        metric: `cosine` compares features of unit length.
        order: `round_robin` gives every anchor one image a round, which is fairer when a pool is scarce.
        max_total: end when so many are taken; 0 for no limit.
        exclude: pool indices that may not be taken.
        memory: bytes.

    Raises:
        UserError: there is no anchor, nothing may be taken, or nothing is asked for; a feature is not finite, or too large
            to be squared.

    """
    started = time.perf_counter()
    taken = torch.zeros(len(pool), dtype=torch.bool, device=anchors.device)
    if exclude is not None:
        taken[exclude.to(taken.device)] = True
    free = int((~taken).sum())
    if len(anchors) == 0 or free == 0 or per_anchor < 1:
        raise UserError(
            f"the query is empty: {len(anchors)} anchors ask for {per_anchor} each of {free} pool images that may be "
            "taken; give it anchors, a larger pool or a larger --query.per_anchor"
        )
    if max_total < 0:
        raise UserError(f"max_total takes 0 or more, got {max_total}")
    limit = min(free, max_total or free, per_anchor * len(anchors))
    anchors = anchors.float() if anchors.dtype in (torch.float16, torch.bfloat16) else anchors
    anchors, centre, scale = _prepared(anchors, pool, metric)
    rows = max(1, memory // (len(pool) * anchors.element_size()))
    held = anchors.new_empty(min(rows, len(anchors)), len(pool))
    each, rounds = (per_anchor, 1) if order == "stored" else (1, per_anchor)
    picks: list[tuple[int, Tensor, Tensor]] = []
    counts = torch.zeros(len(anchors), dtype=torch.int64)
    total = 0
    for _ in range(rounds):
        for first in range(0, len(anchors), rows):
            if total == limit:
                break
            block = _distances(anchors[first : first + rows], pool, centre, scale, held)
            block[:, taken] = torch.inf
            for row in range(len(block)):
                wanted = min(each, limit - total)
                if wanted == 0:
                    break
                indices, values = _nearest(block[row], wanted)
                block[:, indices] = torch.inf
                taken[indices] = True
                total += wanted
                picks.append((first + row, indices, values))
                counts[first + row] = total
    counts = torch.where(counts == 0, total, counts)  # of those who came when all was taken
    indices = torch.cat([indices for _, indices, _ in picks])
    owners = torch.cat([torch.full((len(chosen),), anchor) for anchor, chosen, _ in picks])
    # The expansion of the square may fall below zero by rounding.
    distance = torch.cat([values for _, _, values in picks]).clamp(min=0.0)
    return Query(indices.cpu(), owners, distance.cpu(), counts, time.perf_counter() - started)


def _prepared(anchors: Tensor, pool: Tensor, metric: Metric) -> tuple[Tensor, Tensor, bool]:
    """Anchors as they are compared, what is subtracted from pool rows, and whether those are scaled to unit length."""
    total = torch.zeros(pool.shape[1], dtype=torch.float64, device=pool.device)
    # An infinite distance would pass for that of an image which is taken.
    finite = anchors.square().sum(1).isfinite().all().to(pool.device)
    for _, chunk in _chunks(pool):
        total += chunk.sum(0, dtype=torch.float64)
        finite &= chunk.to(anchors.dtype).square().sum(1).isfinite().all()
    if not bool(finite):
        raise UserError(
            "the features of an anchor or of a pool image are not finite, or too large: look at the network"
        )
    if metric == "cosine":
        return torch.nn.functional.normalize(anchors), torch.zeros_like(anchors[0]), True
    centre = (total / len(pool)).to(anchors.device, anchors.dtype)
    return anchors - centre, centre, False


def _distances(anchors: Tensor, pool: Tensor, centre: Tensor, scale: bool, held: Tensor) -> Tensor:
    """|a|^2 + |p|^2 - 2 a p for a block of anchors and the whole pool, a chunk of the pool at a time, in `held`."""
    block = held[: len(anchors)]
    squares = anchors.square().sum(1, keepdim=True)
    for first, chunk in _chunks(pool):
        moved = chunk.to(anchors.device, anchors.dtype)
        rows = torch.nn.functional.normalize(moved) if scale else moved - centre
        part = block[:, first : first + len(rows)]
        torch.addmm(rows.square().sum(1), anchors, rows.T, alpha=-2.0, out=part)
        part += squares
    return block


def _chunks(pool: Tensor, size: int = 8192) -> Iterator[tuple[int, Tensor]]:
    first = 0
    for rows in pool.split(size):
        yield first, rows
        first += len(rows)


def _nearest(row: Float[Tensor, " p"], count: int) -> tuple[Tensor, Tensor]:
    """The `count` smallest entries, nearest first, equal ones by index."""
    values, indices = row.topk(count, largest=False)
    last = values[-1]
    if int((row <= last).sum()) > count:  # several at the last distance: the lowest indices of them
        closer = indices[values < last]
        tied = (row == last).nonzero().squeeze(1)[: count - len(closer)]
        indices = torch.cat([closer, tied])
    indices = indices.sort().values
    ranked = row[indices].sort(stable=True)
    return indices[ranked.indices], ranked.values


# --- alternatives --------------------------------------------------------------------------------------------------------


def random_choice(
    pool_size: int, count: int, generator: torch.Generator, exclude: Int[Tensor, " e"] | None = None
) -> Int[Tensor, " n"]:
    """`count` pool indices at random (all that may be taken where there are fewer), ascending."""
    allowed = torch.ones(pool_size, dtype=torch.bool)
    if exclude is not None:
        allowed[exclude] = False
    free = allowed.nonzero().squeeze(1)
    if len(free) == 0 or count < 1:
        raise UserError(f"the query is empty: {count} of {len(free)} pool images that may be taken; enlarge the pool")
    return free[torch.randperm(len(free), generator=generator)[:count]].sort().values


def most_confident(
    logits: Float[Tensor, "p k"], count: int, exclude: Int[Tensor, " e"] | None = None
) -> Int[Tensor, " n"]:
    """The `count` pool images of which the previous model is surest, ascending."""
    confidence = logits.softmax(1).amax(1)
    if exclude is not None:
        confidence[exclude] = -1.0
    free = int((confidence >= 0).sum())
    if free == 0 or count < 1:
        raise UserError(f"the query is empty: {count} of {free} pool images that may be taken; enlarge the pool")
    indices, _ = _nearest(-confidence, min(count, free))
    return indices.sort().values.cpu()


@torch.no_grad()
def approximate_query(
    anchors: Float[Tensor, "a d"],
    pool: Float[Tensor, "p d"],
    per_anchor: int,
    *,
    dimensions: int = 32,
    sample: int = 32,
    generator: torch.Generator | None = None,
    metric: Metric = "l2",
    order: Order = "stored",
    max_total: int = 0,
    exclude: Int[Tensor, " e"] | None = None,
) -> tuple[Query, float]:
    """The greedy query on the features' first principal components (of the features at unit length for `cosine`), and its
    recall.

    Recall is the share of the exact nearest neighbours of `sample` anchors (each alone, `per_anchor` of them) that the
    shortened features find too.
    """
    if anchors.dtype in (torch.float16, torch.bfloat16):
        anchors, pool = anchors.float(), pool.float()
    if metric == "cosine":
        anchors, pool = (torch.nn.functional.normalize(features) for features in (anchors, pool))
    dimensions = min(dimensions, *pool.shape)
    rows = torch.randperm(len(pool), generator=generator)[:20000].to(pool.device)
    centre = pool[rows].mean(0)
    _, _, basis = torch.linalg.svd(pool[rows] - centre, full_matrices=False)
    short_pool = torch.cat([(chunk - centre) @ basis[:dimensions].T for _, chunk in _chunks(pool)])
    short_anchors = (anchors - centre) @ basis[:dimensions].T
    result = query(short_anchors, short_pool, per_anchor, order=order, max_total=max_total, exclude=exclude)
    found = wanted = 0
    tested = range(0, len(anchors), max(1, len(anchors) // sample))
    for i in tested:
        exact = query(anchors[i : i + 1], pool, per_anchor, exclude=exclude).chosen
        close = query(short_anchors[i : i + 1], short_pool, per_anchor, exclude=exclude).chosen
        found += int(torch.isin(exact, close).sum())
        wanted += len(exact)
    return result, found / wanted
