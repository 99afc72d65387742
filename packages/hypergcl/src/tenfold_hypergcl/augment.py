"""Fabricated augmentations A0-A5 and the released code's further ones (section 2.5), as functions of tensors.

Each augmentation is an operation that takes its random choice as an argument (``drop_hyperedges(h, removed)``) and a draw of that
choice (``draw_hyperedges(h, ratio)``), so that the operation can be checked exactly. No function changes its inputs.
All draws use PyTorch's global generator of the tensors' device.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tenfold_hypergcl.hypergraph import Hypergraph
from tenfold_hypergcl.propagate import Features, SparseFeatures

NAMES = {
    "A0": "identity",
    "A1": "drop hyperedges",
    "A2": "drop memberships",
    "A3": "drop nodes",
    "A4": "mask nodes' features",
    "A5": "random-walk sub-hypergraph",
}
WALK_STEPS = 16
WALK_STARTS = 128


@dataclass(frozen=True)
class View:
    """One augmented hypergraph. ``nodes`` are the original ids of its nodes, or None where it has all of them."""

    hypergraph: Hypergraph
    x: Features
    nodes: Int[Tensor, "kept"] | None = None


def _check_ratio(ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise ValueError(f"An augmentation ratio lies in [0, 1), not {ratio}.")


def _choose(population: int, count: int, device: torch.device) -> Int[Tensor, "count"]:
    return torch.randperm(population, device=device)[:count]


def _mask_without(size: int, removed: Tensor) -> Tensor:
    mask = torch.ones(size, dtype=torch.bool, device=removed.device)
    return mask.index_fill_(0, removed, False)


def draw_hyperedges(h: Hypergraph, ratio: float) -> Int[Tensor, "removed"]:
    """A1: ``int(M * ratio)`` real hyperedges without replacement."""
    _check_ratio(ratio)
    return _choose(h.num_real_hyperedges, int(h.num_real_hyperedges * ratio), h.incidence.device)


def drop_hyperedges(h: Hypergraph, removed: Int[Tensor, "removed"]) -> Hypergraph:
    """A1: ``h`` without the memberships of the hyperedges ``removed``; ids and singletons stay."""
    return h.keep(_mask_without(h.num_hyperedges, removed)[h.incidence[1]])


def draw_memberships(h: Hypergraph, ratio: float) -> Int[Tensor, "kept"]:
    """A2: the ``K - int(K * ratio)`` real memberships that stay, without replacement."""
    _check_ratio(ratio)
    return _choose(h.num_real, h.num_real - int(h.num_real * ratio), h.incidence.device)


def keep_memberships(h: Hypergraph, kept: Int[Tensor, "kept"]) -> Hypergraph:
    """A2: ``h`` with only the real memberships ``kept``, each named once; singletons stay."""
    mask = torch.zeros(h.num_memberships, dtype=torch.bool, device=h.incidence.device)
    mask.index_fill_(0, kept, True)
    mask[h.num_real :].fill_(True)
    return h.keep(mask, (kept.numel() + h.num_memberships - h.num_real, kept.numel()))


def add_memberships(h: Hypergraph, count: int) -> Hypergraph:
    """A2's optional second half: ``count`` random memberships, ids drawn with replacement, duplicates not merged."""
    if not count:
        return h
    device = h.incidence.device
    nodes = torch.randint(h.num_nodes, (count,), device=device)
    edges = torch.randint(h.num_real_hyperedges, (count,), device=device)
    real, singletons = h.incidence[:, : h.num_real], h.incidence[:, h.num_real :]
    incidence = torch.cat([real, torch.stack([nodes, edges]), singletons], dim=1)
    return Hypergraph(incidence, h.num_nodes, h.num_hyperedges, h.num_real + count, h.num_real_hyperedges)


def draw_nodes(h: Hypergraph, count: int) -> Int[Tensor, "kept"]:
    """A3 and the subsampling of large hypergraphs: ``count`` nodes without replacement, in increasing order."""
    return _choose(h.num_nodes, count, h.incidence.device).sort().values


def induce(h: Hypergraph, nodes: Int[Tensor, "kept"]) -> Hypergraph:
    """A3: the sub-hypergraph of the (sorted) ``nodes``: their memberships only, empty hyperedges gone, ids closed up in order."""
    mask = torch.zeros(h.num_nodes, dtype=torch.bool, device=nodes.device)
    mask[nodes] = True
    return h.relabel(mask[h.incidence[0]], nodes)


def mask_nodes(x: Features, masked: Int[Tensor, "masked"]) -> Float[Tensor, "nodes features"]:
    """A4: the whole feature row of the nodes ``masked`` replaced by the mean over all nodes."""
    dense = x.to_dense() if isinstance(x, SparseFeatures) else x.clone()
    dense[masked] = dense.mean(0)
    return dense


def random_walk(h: Hypergraph, starts: Int[Tensor, "starts"], steps: int = WALK_STEPS) -> tuple[Tensor, Tensor]:
    """A5: the visited ``(nodes, hyperedges)`` of a walk of ``steps`` uniform steps from each start, as two masks.

    The walk alternates between nodes and hyperedges, singletons among them.
    """
    device = h.incidence.device
    seen_nodes = torch.zeros(h.num_nodes, dtype=torch.bool, device=device)
    seen_edges = torch.zeros(h.num_hyperedges, dtype=torch.bool, device=device)
    at, on_node = starts, True
    seen_nodes.index_fill_(0, at, True)
    for _ in range(steps):
        side = h.by_node if on_node else h.by_hyperedge
        first, degree = side.offsets[at], side.offsets[at + 1] - side.offsets[at]
        if on_node and not h.has_all_singletons:
            # A walk that starts on an isolated node has nowhere to go and ends there.
            alive = degree > 0
            at, first, degree = at[alive], first[alive], degree[alive]
        step = (torch.rand(at.shape[0], device=device, dtype=torch.float64) * degree).long()
        at, on_node = side.index[first + step], not on_node
        (seen_nodes if on_node else seen_edges).index_fill_(0, at, True)
    return seen_nodes, seen_edges


def draw_walk_starts(h: Hypergraph) -> Int[Tensor, "starts"]:
    """A5: 128 start nodes (8 on a hypergraph of at most 128), shared by both views."""
    count = WALK_STARTS if h.num_nodes > WALK_STARTS else min(8, h.num_nodes)
    return _choose(h.num_nodes, count, h.incidence.device)


def visited_subgraph(
    h: Hypergraph, nodes: Bool[Tensor, "nodes"], hyperedges: Bool[Tensor, "hyperedges"]
) -> tuple[Hypergraph, Int[Tensor, "kept"]]:
    """A5: the memberships with both ends visited, ids closed up in order, and the original ids of its nodes."""
    kept = torch.nonzero(nodes).squeeze(1)
    return h.relabel(nodes[h.incidence[0]] & hyperedges[h.incidence[1]], kept), kept


def zero_columns(x: Features, columns: Int[Tensor, "columns"]) -> Features:
    """``mask_col``: the feature columns ``columns`` set to zero."""
    if isinstance(x, SparseFeatures):
        keep = _mask_without(x.num_features, columns)
        values = torch.empty_like(x.values)
        values[x.by_row.position] = x.values[x.by_row.position] * keep[x.by_row.index]
        return x.with_values(values)
    return x.index_fill(1, columns, 0.0)


def zero_rows(x: Features, rows: Int[Tensor, "rows"]) -> Features:
    """``mask_zero``: the feature rows ``rows`` set to zero."""
    if isinstance(x, SparseFeatures):
        values = torch.empty_like(x.values)
        keep = _mask_without(x.shape[0], rows)
        values[x.by_row.position] = x.values[x.by_row.position] * keep[x.by_row.rows]
        return x.with_values(values)
    return x.index_fill(0, rows, 0.0)


def hyperedge_drop_weights(h: Hypergraph) -> Float[Tensor, "real_hyperedges"]:
    """``adapt_edge``: how much more than others each real hyperedge is dropped; large hyperedges more (section 2.5)."""
    sizes = torch.bincount(h.incidence[1, : h.num_real], minlength=h.num_real_hyperedges)
    if not sizes.numel():
        return sizes.to(torch.float32)
    s = sizes.to(torch.float32).clamp_min(1).log()
    u = (s - s.min() + 1e-9) / (s.mean() - s.min() + 1e-9)
    return (u + 1e-9) / (u.mean() + 1e-9)


def column_drop_weights(x: Features, h: Hypergraph) -> Float[Tensor, "features"]:
    """``adapt_feat``: how much more than others each feature column is dropped (section 2.5).

    Columns that are zero everywhere count as the least important used column instead of spoiling the mean by ``log 0``.
    """
    degrees = h.node_degrees.to(torch.float32)
    if isinstance(x, SparseFeatures):
        contribution = x.values.abs()[x.by_row.position].to(torch.float32) * degrees[x.by_row.rows]
        weight = contribution.new_zeros(x.num_features).index_add_(0, x.by_row.index, contribution)
    else:
        weight = x.abs().to(torch.float32).T @ degrees
    used = weight > 0
    log = torch.where(used, weight, weight.where(used, weight.new_tensor(torch.inf)).min()).log()
    u = (log - log.min()) / (log.mean() - log.min()).clamp_min(torch.finfo(log.dtype).tiny)
    return u / u.mean().clamp_min(torch.finfo(log.dtype).tiny)


def draw_adaptive(weights: Float[Tensor, "items"], ratio: float) -> Int[Tensor, "dropped"]:
    """Independent draws with probability ``min(weight * ratio, 0.7)``."""
    _check_ratio(ratio)
    return torch.nonzero(torch.rand_like(weights) < (weights * ratio).clamp_max(0.7)).squeeze(1)


def fabricate(name: str, h: Hypergraph, x: Features, ratio: float, starts: Tensor | None = None) -> View:
    """A random view of ``(h, x)`` by the augmentation ``name``: A0-A5, ``A2_add``, ``mask_col``, ``mask_zero``, ``adapt_edge``, ``adapt_feat``, ``adapt``.

    ``starts`` are A5's start nodes, which both views share.
    """
    _check_ratio(ratio)
    device = h.incidence.device
    if name == "A0":
        return View(h, x)
    if name == "A1":
        return View(drop_hyperedges(h, draw_hyperedges(h, ratio)), x)
    if name == "A2":
        return View(keep_memberships(h, draw_memberships(h, ratio)), x)
    if name == "A2_add":
        fewer = keep_memberships(h, draw_memberships(h, ratio))
        return View(add_memberships(fewer, h.num_real - fewer.num_real), x)
    if name == "A3":
        nodes = draw_nodes(h, int(h.num_nodes * (1 - ratio)))
        return View(induce(h, nodes), take_rows(x, nodes), nodes)
    if name == "A4":
        return View(h, mask_nodes(x, _choose(h.num_nodes, int(h.num_nodes * ratio), device)))
    if name == "A5":
        sub, nodes = visited_subgraph(h, *random_walk(h, draw_walk_starts(h) if starts is None else starts))
        return View(sub, take_rows(x, nodes), nodes)
    if name == "mask_col":
        return View(h, zero_columns(x, _choose(x.shape[1], int(x.shape[1] * ratio), device)))
    if name == "mask_zero":
        return View(h, zero_rows(x, _choose(h.num_nodes, int(h.num_nodes * ratio), device)))
    if name in {"adapt_edge", "adapt_feat", "adapt"}:
        edited, masked = h, x
        if name != "adapt_feat":
            edited = drop_hyperedges(h, draw_adaptive(hyperedge_drop_weights(h), ratio))
        if name != "adapt_edge":
            masked = zero_columns(x, draw_adaptive(column_drop_weights(x, h), ratio))
        return View(edited, masked)
    known = [*NAMES, "A2_add", "mask_col", "mask_zero", "adapt_edge", "adapt_feat", "adapt"]
    raise ValueError(f"There is no augmentation {name!r}; there are {', '.join(known)}.")


def take_rows(x: Features, nodes: Int[Tensor, "kept"]) -> Features:
    """The feature rows of ``nodes``."""
    return x.rows(nodes) if isinstance(x, SparseFeatures) else x[nodes]


def fabricate_pair(name: str, h: Hypergraph, x: Features, ratio: float) -> tuple[View, View]:
    """Two independent views by the same augmentation; A5's walks start at the same nodes."""
    starts = draw_walk_starts(h) if name == "A5" else None
    return fabricate(name, h, x, ratio, starts), fabricate(name, h, x, ratio, starts)


def common_nodes(first: View, second: View) -> tuple[Int[Tensor, "common"], Int[Tensor, "common"]] | None:
    """The rows of the nodes present in both views, or None where both have all nodes in order."""
    if first.nodes is None and second.nodes is None:
        return None
    device = first.hypergraph.incidence.device
    a = torch.arange(first.hypergraph.num_nodes, device=device) if first.nodes is None else first.nodes
    b = torch.arange(second.hypergraph.num_nodes, device=device) if second.nodes is None else second.nodes
    return torch.nonzero(torch.isin(a, b)).squeeze(1), torch.nonzero(torch.isin(b, a)).squeeze(1)


def shared_rows(
    first: View, second: View, nodes: Int[Tensor, "compared"]
) -> tuple[Int[Tensor, "rows1"], Int[Tensor, "rows2"], tuple[Int[Tensor, "common"], Int[Tensor, "common"]] | None]:
    """The rows of ``nodes`` in each view, and which of these rows belong to the nodes in both; None where all of them do."""
    if first.nodes is None and second.nodes is None:
        return nodes, nodes, None
    rows, there = [], []
    for view in (first, second):
        own = nodes if view.nodes is None else view.nodes
        row = nodes.new_full((int(torch.cat([own, nodes]).max()) + 1,), -1)
        row[own] = own if view.nodes is None else torch.arange(own.numel(), device=own.device)
        rows.append(row[nodes])
        there.append(rows[-1] >= 0)
    both = there[0] & there[1]
    a, b = ((torch.cumsum(present, 0) - 1)[both] for present in there)
    return rows[0][there[0]], rows[1][there[1]], (a, b)
