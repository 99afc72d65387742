"""Poisoned structure: the released attacks' pair lists, random removal, and attacks of our own (section 9).

A model is trained *and* tested on the poisoned hypergraph.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tenfold_hypergcl.hypergraph import Hypergraph, HypergraphError
from tenfold_hypergcl.propagate import Features
from tenfold_hypergcl.setgnn import SetGNN


def from_poisoned_pairs(pairs: Int[Tensor, "a b"], num_nodes: int, num_hyperedges: int) -> Hypergraph:
    """The hypergraph of a poisoned star expansion, a list ``[P, 2]`` or ``[2, P]`` of ordered id pairs (hyperedge ids from ``num_nodes``).

    Node-hyperedge pairs become memberships, hyperedge-hyperedge pairs vanish; a node that is listed first with two or more partner
    nodes gives a new hyperedge of itself and its partners, numbered after the others in order of first appearance.

    Raises:
        HypergraphError: if the list has neither form, or names ids that do not exist.
    """
    if 2 not in pairs.shape:
        raise HypergraphError(f"A list of pairs is [P, 2] or [2, P], not {list(pairs.shape)}.")
    if pairs.shape[1] == 2 and not (pairs.shape[0] == 2 and _is_pair_per_column(pairs, num_nodes)):
        pairs = pairs.T
    total = num_nodes + num_hyperedges
    if pairs.numel() and (int(pairs.min()) < 0 or int(pairs.max()) >= total):
        raise HypergraphError(f"The pair list names ids outside 0..{total - 1}: it belongs to another hypergraph.")
    source, target = pairs
    first_is_node, second_is_node = source < num_nodes, target < num_nodes
    forward, backward = first_is_node & ~second_is_node, ~first_is_node & second_is_node
    members = [
        torch.stack([source[forward], target[forward] - num_nodes]),
        torch.stack([target[backward], source[backward] - num_nodes]),
    ]
    listed = pairs[:, first_is_node & second_is_node]
    position = torch.arange(listed.shape[1], device=pairs.device)
    first = torch.full((num_nodes,), listed.shape[1], device=pairs.device)
    first = first.scatter_reduce(0, listed[0], position, "amin")
    owners, partners = torch.unique(listed, dim=1)
    count = torch.bincount(owners, minlength=num_nodes)
    chosen = torch.nonzero(count >= 2).squeeze(1)
    chosen = chosen[torch.argsort(first[chosen])]
    new_id = torch.full((num_nodes,), -1, device=owners.device)
    new_id[chosen] = num_hyperedges + torch.arange(chosen.numel(), device=owners.device)
    several = count[owners] >= 2
    members += [
        torch.stack([partners[several], new_id[owners[several]]]),
        torch.stack([chosen, new_id[chosen]]),
    ]
    incidence = torch.unique(torch.cat(members, dim=1), dim=1)
    return Hypergraph.from_incidence(incidence, num_nodes, num_hyperedges + chosen.numel())


def _is_pair_per_column(pairs: Tensor, num_nodes: int) -> bool:
    """Of a 2 x 2 list only the content can tell: every membership pair has one end on either side of ``num_nodes``."""
    columns = ((pairs[0] < num_nodes) != (pairs[1] < num_nodes)).sum()
    rows = ((pairs[:, 0] < num_nodes) != (pairs[:, 1] < num_nodes)).sum()
    return bool(columns > rows)


def remove_random(h: Hypergraph, ratio: float = 0.1) -> Hypergraph:
    """The ``remove`` attack: ``ratio`` of the directed star-expansion entries (two a membership) deleted before the node-to-hyperedge
    half is kept, so each membership goes with about that probability.
    """
    _check_share(ratio)
    total = 2 * h.num_real
    removed = torch.randperm(total, device=h.incidence.device)[: int(total * ratio)]
    mask = torch.ones(h.num_memberships, dtype=torch.bool, device=h.incidence.device)
    mask[removed[removed < h.num_real]] = False
    return h.keep(mask)


def remove_by_degree(h: Hypergraph, ratio: float = 0.1) -> Hypergraph:
    """A targeted attack: the ``int(K * ratio)`` memberships of the largest ``node degree x hyperedge size`` removed."""
    real = h.incidence[:, : h.num_real]
    score = h.node_degrees[real[0]] * h.hyperedge_sizes[real[1]]
    return _remove(h, score.to(torch.float32), ratio)


def remove_by_gradient(
    model: SetGNN,
    h: Hypergraph,
    x: Features,
    nodes: Int[Tensor, "nodes"],
    labels: Int[Tensor, "nodes"],
    ratio: float = 0.1,
) -> Hypergraph:
    """An evasion attack on a trained model: the memberships removed whose weights' gradient promises the largest loss on ``nodes``."""
    mode = model.training
    model.eval()
    weight = next(model.parameters()).new_ones(h.num_memberships).requires_grad_()
    logits = model.classifier(model.embed(x, h, weight, rows=nodes))
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels), weight)
    model.train(mode)
    return _remove(h, -gradient[: h.num_real], ratio)


def _check_share(ratio: float) -> None:
    if not 0 <= ratio <= 1:
        raise ValueError(f"The share of memberships to remove lies in [0, 1], not {ratio}.")


def _remove(h: Hypergraph, score: Float[Tensor, "real"], ratio: float) -> Hypergraph:
    _check_share(ratio)
    mask = torch.ones(h.num_memberships, dtype=torch.bool, device=h.incidence.device)
    mask[torch.topk(score, int(h.num_real * ratio)).indices] = False
    return h.keep(mask)
