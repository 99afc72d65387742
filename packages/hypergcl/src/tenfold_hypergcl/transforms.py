"""The fabricated augmentations as torch-geometric transforms (section 2.5), usable alone on ``HyperGraphData``.

    from torch_geometric.transforms import Compose  # noqa: PLC0415 - slow to import
    view = Compose([DropMemberships(0.3), AddSingletons()])(data)

The data carries its real memberships in ``edge_index`` (row 0 nodes, row 1 hyperedges) and may carry ``num_hyperedges``. Transforms
return a changed copy; per-node tensors (``y``, masks, ...) follow where nodes are removed, and ``node_ids`` says which stayed.
"""

import copy

import torch
from torch_geometric.data.hypergraph_data import HyperGraphData
from torch_geometric.transforms import BaseTransform

from tenfold_hypergcl import augment
from tenfold_hypergcl.hypergraph import Hypergraph, count_nodes


def _replace(data: HyperGraphData, h: Hypergraph) -> HyperGraphData:
    out = copy.copy(data)
    out.edge_index = h.incidence
    out.num_hyperedges = h.num_hyperedges
    return out


def _subset(data: HyperGraphData, h: Hypergraph, nodes: torch.Tensor) -> HyperGraphData:
    out = _replace(data, h)
    total = count_nodes(data)
    for key, value in data.items():
        if key != "edge_index" and isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == total:
            out[key] = value[nodes]
    out.num_nodes = nodes.numel()
    out.node_ids = nodes
    return out


class AddSingletons(BaseTransform):
    """One singleton hyperedge for every node (``nodes="missing"``: only where there is none), numbered after the others."""

    def __init__(self, nodes: str = "all") -> None:
        self.nodes = nodes

    def forward(self, data: HyperGraphData) -> HyperGraphData:
        """The data with singletons."""
        return _replace(data, Hypergraph.from_data(data).with_singletons(self.nodes))


class _Ratio(BaseTransform):
    def __init__(self, ratio: float = 0.3) -> None:
        if not 0 <= ratio < 1:
            raise ValueError(f"An augmentation ratio lies in [0, 1), not {ratio}.")
        self.ratio = ratio

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.ratio})"


class Identity(BaseTransform):
    """A0: the data as it is."""

    def forward(self, data: HyperGraphData) -> HyperGraphData:
        """A shallow copy."""
        return copy.copy(data)


class DropHyperedges(_Ratio):
    """A1: ``int(M * ratio)`` hyperedges lose all their memberships; ids stay."""

    def forward(self, data: HyperGraphData) -> HyperGraphData:
        """The augmented data."""
        h = Hypergraph.from_data(data)
        return _replace(data, augment.drop_hyperedges(h, augment.draw_hyperedges(h, self.ratio)))


class DropMemberships(_Ratio):
    """A2: ``int(K * ratio)`` memberships are removed."""

    def forward(self, data: HyperGraphData) -> HyperGraphData:
        """The augmented data."""
        h = Hypergraph.from_data(data)
        return _replace(data, augment.keep_memberships(h, augment.draw_memberships(h, self.ratio)))


class DropNodes(_Ratio):
    """A3: the sub-hypergraph of ``int(N * (1 - ratio))`` random nodes."""

    def forward(self, data: HyperGraphData) -> HyperGraphData:
        """The augmented data."""
        h = Hypergraph.from_data(data)
        nodes = augment.draw_nodes(h, int(h.num_nodes * (1 - self.ratio)))
        return _subset(data, augment.induce(h, nodes), nodes)


class MaskNodes(_Ratio):
    """A4: ``int(N * ratio)`` nodes' features become the mean over all nodes."""

    def forward(self, data: HyperGraphData) -> HyperGraphData:
        """The augmented data."""
        out = copy.copy(data)
        masked = torch.randperm(len(data.x), device=data.x.device)[: int(len(data.x) * self.ratio)]
        out.x = augment.mask_nodes(data.x, masked)
        return out


class RandomWalkSubgraph(BaseTransform):
    """A5: the sub-hypergraph that random walks of 16 steps visit; singletons, as far as visited, are part of the result."""

    def __init__(self, steps: int = augment.WALK_STEPS) -> None:
        self.steps = steps

    def forward(self, data: HyperGraphData) -> HyperGraphData:
        """The augmented data."""
        h = Hypergraph.from_data(data).with_singletons()
        sub, nodes = augment.visited_subgraph(h, *augment.random_walk(h, augment.draw_walk_starts(h), self.steps))
        return _subset(data, sub, nodes)


BY_NAME = {
    "A0": Identity,
    "A1": DropHyperedges,
    "A2": DropMemberships,
    "A3": DropNodes,
    "A4": MaskNodes,
    "A5": RandomWalkSubgraph,
}
