"""Mini-batches of hypergraphs that do not fit: by sampled neighbourhoods, or by the released code's vertex subsampling (section 2.6)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tenfold_hypergcl.augment import draw_nodes, fabricate_pair, induce, shared_rows, take_rows
from tenfold_hypergcl.hypergraph import Hypergraph, SortedIncidence
from tenfold_hypergcl.propagate import Features
from tenfold_hypergcl.setgnn import INPUT_DROPOUT, SetGNN
from tenfold_hypergcl.steps import contrastive_loss

SUB_SIZE = 16384
"""The released code's number of vertices per epoch on hypergraphs with more."""


@dataclass(frozen=True)
class Batch:
    """A part of a hypergraph with its singletons. ``nodes`` are its nodes' original ids, ``seeds`` the rows of the batch's own nodes."""

    hypergraph: Hypergraph
    x: Features
    nodes: Int[Tensor, "kept"]
    seeds: Int[Tensor, "seeds"]


def subsample(h: Hypergraph, x: Features, size: int = SUB_SIZE) -> Batch:
    """The sub-hypergraph induced by ``size`` random nodes (all, if there are no more), as the released code trains large ones."""
    nodes = draw_nodes(h, min(size, h.num_nodes))
    return Batch(induce(h, nodes), take_rows(x, nodes), nodes, torch.arange(nodes.numel(), device=nodes.device))


def _sample_rows(side: SortedIncidence, rows: Int[Tensor, "rows"], fanout: int) -> Int[Tensor, "positions"]:
    """Positions (in the list) of at most ``fanout`` memberships of each of ``rows``, without replacement."""
    first, length = side.offsets[rows], side.offsets[rows + 1] - side.offsets[rows]
    total = int(length.sum())
    start = torch.cumsum(length, 0) - length
    owner = torch.repeat_interleave(torch.arange(rows.numel(), device=rows.device), length, output_size=total)
    entry = first[owner] + torch.arange(total, device=rows.device) - start[owner]
    # A random order within each row: sort by a random key, then stably by row; the rank within the row decides.
    order = torch.argsort(torch.rand(total, device=rows.device))
    order = order[torch.argsort(owner[order], stable=True)]
    chosen = torch.arange(total, device=rows.device) - start[owner[order]] < fanout
    return side.position[entry[order[chosen]]]


class HypergraphSampler:
    """Batches of seed nodes with a sampled neighbourhood: per layer at most ``hyperedges`` of each node, at most ``members`` of each.

    Hypergraphs must have their singletons; a batch keeps those of its nodes. With fanouts no smaller than the largest degree and size,
    the seeds' embeddings are exactly those of the whole hypergraph.

    Raises:
        ValueError: for a batch size or a fanout below 1.
    """

    def __init__(
        self, h: Hypergraph, x: Features, batch_size: int, hyperedges: int = 16, members: int = 16, layers: int = 1
    ) -> None:
        if min(batch_size, hyperedges, members, layers) < 1:
            raise ValueError("Batch size, fanouts and layers are at least 1.")
        self.h, self.x, self.batch_size = h, x, batch_size
        self.hyperedges, self.members, self.layers = hyperedges, members, layers

    def __len__(self) -> int:
        return (self.h.num_nodes + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(self.h.num_nodes, device=self.h.incidence.device)
        for seeds in order.split(self.batch_size):
            yield self.batch(seeds)

    def batch(self, seeds: Int[Tensor, "seeds"]) -> Batch:
        """The batch of ``seeds``."""
        h, device = self.h, seeds.device
        known = torch.zeros(h.num_nodes, dtype=torch.bool, device=device)
        known[seeds] = True
        used = torch.zeros(h.num_memberships, dtype=torch.bool, device=device)
        frontier = seeds
        for _ in range(self.layers):
            out = _sample_rows(h.by_node, frontier, self.hyperedges)
            used[out] = True
            edges = torch.unique(h.incidence[1, out])
            back = _sample_rows(h.by_hyperedge, edges, self.members)
            used[back] = True
            reached = torch.unique(h.incidence[0, back])
            frontier = reached[~known[reached]]
            known[reached] = True
        used[h.num_real :] = known[h.incidence[0, h.num_real :]]
        nodes = torch.nonzero(known).squeeze(1)
        row = torch.cumsum(known, 0) - 1
        return Batch(h.relabel(used, nodes), take_rows(self.x, nodes), nodes, row[seeds])


def train_on_batches(
    model: SetGNN,
    optimizer: torch.optim.Optimizer,
    sampler: HypergraphSampler,
    labels: Int[Tensor, "nodes"],
    train: Int[Tensor, "train"],
    name: str,
    ratio: float,
    weight: float,
    temperature: float,
    loss: str = "info_nce",
    input_dropout: float = INPUT_DROPOUT,
) -> dict[str, Float[Tensor, ""]]:
    """One epoch over all nodes in batches: the contrast among each batch's own nodes, and the supervised loss of those that train.

    The sampled neighbours are only read: of their own neighbourhoods most is missing. Returns the means of both losses over the batches
    that have them.
    """
    supervised, contrastive = [], []
    model.train()
    is_training = torch.zeros(sampler.h.num_nodes, dtype=torch.bool, device=labels.device)
    is_training[train] = True
    for batch in sampler:
        optimizer.zero_grad(set_to_none=True)
        rows = batch.seeds[is_training[batch.nodes[batch.seeds]]]
        if rows.numel():
            logits = model(batch.x, batch.hypergraph, rows)
            supervised.append(torch.nn.functional.cross_entropy(logits, labels[batch.nodes[rows]]))
            supervised[-1].backward()
        views = fabricate_pair(name, batch.hypergraph, batch.x, ratio)
        common = shared_rows(*views, batch.seeds)[2]
        if common is None or common[0].numel():  # A small batch's views may have none of its nodes in common.
            contrastive.append(
                contrastive_loss(model, *views, temperature, loss=loss, input_dropout=input_dropout, only=batch.seeds)
            )
            (weight * contrastive[-1]).backward()
        optimizer.step()
    found = {"supervised": supervised, "contrastive": contrastive}
    return {name: torch.stack([part.detach() for part in parts]).mean() for name, parts in found.items() if parts}
