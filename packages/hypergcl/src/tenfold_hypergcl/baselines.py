"""The baselines of the paper (section 8): MLP, HCHA, HGNN, HNHN, HyperGCN, UniGCNII, CE-GCN, CE-GAT.

All of them take ``(x, incidence)`` and give class logits. Convolutions on a graph take its clique expansion or HyperGCN's operator,
both built once by the functions here.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tenfold_hypergcl.hypergraph import Hypergraph, Incidence, SortedIncidence
from tenfold_hypergcl.mlp import dropout, linear, make_norm
from tenfold_hypergcl.propagate import Features, sum_members
from tenfold_hypergcl.setgnn import attention


@dataclass(frozen=True)
class Graph:
    """A weighted directed graph: messages flow from ``edges[0]`` to ``edges[1]``."""

    edges: Int[Tensor, "2 edges"]
    weight: Float[Tensor, "edges"]
    num_nodes: int

    @cached_property
    def by_target(self) -> SortedIncidence:
        """The edges grouped by target."""
        return SortedIncidence.sort(self.edges[1], self.edges[0], self.num_nodes)

    @cached_property
    def by_source(self) -> SortedIncidence:
        """The edges grouped by source."""
        return SortedIncidence.sort(self.edges[0], self.edges[1], self.num_nodes)

    def propagate(self, x: Float[Tensor, "nodes width"]) -> Float[Tensor, "nodes width"]:
        """``A x``: weighted sums over the incoming edges."""
        return sum_members(x, self.by_target, self.by_source, self.weight)

    def to(self, target: torch.device | str) -> "Graph":
        """The graph on another device."""
        return Graph(self.edges.to(target), self.weight.to(target), self.num_nodes)


def clique_expansion(h: Hypergraph, directed: bool = False) -> Graph:
    """The graph that joins all members of each hyperedge; an edge's weight is the number of hyperedges its ends share.

    ``directed`` keeps only the pairs from the smaller to the larger id, as the released code does. Hyperedges of size 1 join nobody.
    """
    nodes, edges = h.incidence[:, : h.num_real].cpu().numpy()
    shape = (h.num_nodes, h.num_real_hyperedges)
    matrix = scipy.sparse.csr_matrix((np.ones(nodes.size), (nodes, edges)), shape=shape)
    shared = scipy.sparse.triu(matrix @ matrix.T, k=1).tocoo()
    source, target, weight = shared.row, shared.col, shared.data
    if not directed:
        source, target = np.concatenate([source, target]), np.concatenate([target, source])
        weight = np.concatenate([weight, weight])
    pairs = torch.from_numpy(np.stack([source, target]).astype(np.int64)).to(h.incidence.device)
    return Graph(pairs, torch.from_numpy(weight).to(pairs.device, torch.float32), h.num_nodes)


def gcn_normalized(graph: Graph, loops: int | None = None) -> Graph:
    """Self-loops of weight 1 added, then ``w_ij / sqrt(d_i d_j)`` with ``d`` the incoming weight.

    ``loops`` restricts the self-loops to the first nodes: the released code gives none to those after the last one with an edge.
    """
    own = torch.arange(graph.num_nodes if loops is None else loops, device=graph.edges.device)
    edges = torch.cat([graph.edges, torch.stack([own, own])], dim=1)
    weight = torch.cat([graph.weight, graph.weight.new_ones(own.numel())])
    degree = weight.new_zeros(graph.num_nodes).index_add_(0, edges[1], weight)
    scale = torch.where(degree > 0, degree.rsqrt(), 0.0)
    return Graph(edges, scale[edges[0]] * weight * scale[edges[1]], graph.num_nodes)


def hypergcn_operator(h: Hypergraph, signal: Float[Tensor, "nodes"], mediators: bool = True) -> Graph:
    """HyperGCN's graph for a node signal (features on one random vector): symmetric, with identity, normalised.

    In each hyperedge the two extremes S, I of the signal are joined with each other and, with ``mediators``, with every other member,
    each pair with weight ``1 / (2|e| - 3)`` (without: only S-I, ``1 / |e|``). Hyperedges of size 1 are skipped.
    """
    nodes, owners = h.incidence[:, : h.num_real]
    sizes = torch.bincount(owners, minlength=h.num_real_hyperedges)
    order = torch.argsort(signal[nodes], stable=True)
    order = order[torch.argsort(owners[order], stable=True)]
    nodes, owners = nodes[order], owners[order]
    ends = torch.cumsum(sizes, 0)
    present = sizes >= 2
    low, high = torch.zeros_like(sizes), torch.zeros_like(sizes)
    low[present], high[present] = nodes[(ends - sizes)[present]], nodes[(ends - 1)[present]]
    weight = 1 / (2 * sizes - 3 if mediators else sizes).clamp_min(1).to(signal.dtype)
    pairs, weights = [torch.stack([high[present], low[present]])], [weight[present]]
    if mediators:
        middle = present[owners] & (nodes != low[owners]) & (nodes != high[owners])
        for extreme in (high, low):
            pairs.append(torch.stack([extreme[owners[middle]], nodes[middle]]))
            weights.append(weight[owners[middle]])
    one_way, value = torch.cat(pairs, 1), torch.cat(weights)
    own = torch.arange(h.num_nodes, device=nodes.device)
    edges = torch.cat([one_way, one_way.flip(0), torch.stack([own, own])], dim=1)
    value = torch.cat([value, value, value.new_ones(h.num_nodes)])
    degree = value.new_zeros(h.num_nodes).index_add_(0, edges[1], value)
    scale = degree.rsqrt()
    return Graph(edges, scale[edges[0]] * value * scale[edges[1]], h.num_nodes)


class _Affine(nn.Module):
    """A weight ``[in, out]`` and a bias, in the layout of the released hypergraph convolutions."""

    def __init__(self, in_features: int, out_features: int, name: str = "weight") -> None:
        super().__init__()
        self.name = name
        setattr(self, name, nn.Parameter(nn.init.xavier_uniform_(torch.empty(in_features, out_features))))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def product(self, x: Features) -> Tensor:
        """``x @ weight``, without the bias."""
        return linear(x, getattr(self, self.name).T, None)


class HypergraphConvNet(nn.Module):
    """HCHA (``D^-1 H B^-1 H^T X W + b``) and, with ``symmetric``, HGNN (``D^-1/2 H B^-1 H^T D^-1/2 X W + b``); ELU between layers.

    The released code runs its HGNN without the symmetric form, that is, as HCHA.
    """

    def __init__(
        self, in_features: int, hidden: int, num_classes: int, layers: int = 2, p: float = 0.2, symmetric: bool = False
    ) -> None:
        super().__init__()
        widths = [in_features, *[hidden] * (layers - 1), num_classes]
        self.p, self.symmetric = p, symmetric
        self.convs: Any = nn.ModuleList([_Affine(a, b) for a, b in itertools.pairwise(widths)])

    def forward(self, x: Features, incidence: Incidence) -> Float[Tensor, "nodes classes"]:
        """Class logits."""
        out: Tensor
        for i, conv in enumerate(self.convs):
            out = conv.product(dropout(F.elu(out), self.p, self.training) if i else x)
            degree = _inverse(incidence.node_degrees, out.dtype, 0.5 if self.symmetric else 1.0)
            if self.symmetric:
                out = out * degree
            out = sum_members(out, incidence.by_hyperedge, incidence.by_node)
            out = out * _inverse(incidence.hyperedge_sizes, out.dtype, 1.0)
            out = sum_members(out, incidence.by_node, incidence.by_hyperedge) * degree + conv.bias
        return out


def _inverse(count: Tensor, dtype: torch.dtype, power: float) -> Float[Tensor, "rows 1"]:
    """``count ** -power``, and 0 where there is nothing."""
    value = count.to(dtype)
    return torch.where(value > 0, value.clamp_min(1) ** -power, torch.zeros_like(value))[:, None]


class _HNHNConv(nn.Module):
    def __init__(self, in_features: int, hidden: int, out_features: int) -> None:
        super().__init__()
        self.weight_v2e = nn.Linear(in_features, hidden)
        self.weight_e2v = nn.Linear(hidden, out_features)


@dataclass(frozen=True)
class HNHNWeights:
    """HNHN's degree weights ``d_v^beta`` and ``|e|^alpha`` and the inverses of their sums over the other side's members."""

    node: Float[Tensor, "nodes"]
    hyperedge: Float[Tensor, "hyperedges"]
    inverse_node_sum: Float[Tensor, "hyperedges"]
    inverse_hyperedge_sum: Float[Tensor, "nodes"]

    @classmethod
    def of(cls, incidence: Incidence, dtype: torch.dtype, alpha: float = -1.5, beta: float = -0.5) -> "HNHNWeights":
        """The weights of ``incidence``; they are constants of a run."""
        node = _inverse(incidence.node_degrees, dtype, -beta)
        edge = _inverse(incidence.hyperedge_sizes, dtype, -alpha)
        node_sum = sum_members(node, incidence.by_hyperedge, incidence.by_node)
        edge_sum = sum_members(edge, incidence.by_node, incidence.by_hyperedge)
        inverses = [torch.where(total > 0, 1 / total, 0.0).squeeze(1) for total in (node_sum, edge_sum)]
        return cls(node.squeeze(1), edge.squeeze(1), *inverses)


class HNHN(nn.Module):
    """HNHN: degree-weighted means in both directions with a nonlinearity on the hyperedges (alpha = -1.5, beta = -0.5)."""

    def __init__(
        self,
        in_features: int,
        hidden: int,
        num_classes: int,
        layers: int = 2,
        p: float = 0.2,
        alpha: float = -1.5,
        beta: float = -0.5,
    ) -> None:
        super().__init__()
        widths = [in_features, *[hidden] * (layers - 1), num_classes]
        self.p, self.alpha, self.beta = p, alpha, beta
        self.convs: Any = nn.ModuleList([_HNHNConv(a, hidden, b) for a, b in itertools.pairwise(widths)])

    def forward(
        self, x: Features, incidence: Incidence, weights: HNHNWeights | None = None
    ) -> Float[Tensor, "nodes classes"]:
        """Class logits; ``weights`` saves computing :meth:`HNHNWeights.of` anew."""
        by_node, by_edge = incidence.by_node, incidence.by_hyperedge
        w = weights or HNHNWeights.of(incidence, self.convs[0].weight_v2e.weight.dtype, self.alpha, self.beta)
        out: Tensor
        for i, conv in enumerate(self.convs):
            read = dropout(F.relu(out), self.p, self.training) if i else x
            sent = linear(read, conv.weight_v2e.weight, conv.weight_v2e.bias)
            received = sum_members(sent * w.node[:, None], by_edge, by_node)
            sent = conv.weight_e2v(F.relu(received * w.inverse_node_sum[:, None]))
            received = sum_members(sent * w.hyperedge[:, None], by_node, by_edge)
            out = received * w.inverse_hyperedge_sum[:, None]
        return out


class _UniConv(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.W = nn.Linear(width, width, bias=False)


class UniGCNII(nn.Module):
    """UniGCNII: initial residual (alpha) and identity mapping (lambda) on the two-step hypergraph mean; width ``hidden * heads``."""

    def __init__(
        self,
        in_features: int,
        hidden: int,
        num_classes: int,
        layers: int = 2,
        p: float = 0.2,
        heads: int = 1,
        alpha: float = 0.1,
        lambda_: float = 0.5,
    ) -> None:
        super().__init__()
        width = hidden * heads
        self.p, self.alpha, self.lambda_ = p, alpha, lambda_
        convs = [_UniConv(width) for _ in range(layers)]
        self.convs: Any = nn.ModuleList([nn.Linear(in_features, width), *convs, nn.Linear(width, num_classes)])

    def forward(self, x: Features, incidence: Incidence) -> Float[Tensor, "nodes classes"]:
        """Class logits."""
        by_node, by_edge = incidence.by_node, incidence.by_hyperedge
        first, last = self.convs[0], self.convs[-1]
        start = out = F.relu(linear(dropout(x, self.p, self.training), first.weight, first.bias))
        inverse_size = _inverse(incidence.hyperedge_sizes, out.dtype, 1.0)
        degrees = incidence.node_degrees.to(out.dtype)[:, None]
        mean_degree = sum_members(degrees, by_edge, by_node) * inverse_size
        edge_scale = inverse_size * mean_degree.clamp_min(1).rsqrt()
        node_scale = _inverse(incidence.node_degrees, out.dtype, 0.5)
        for i, conv in enumerate(list(self.convs)[1:-1]):
            edges = sum_members(out, by_edge, by_node) * edge_scale
            out = sum_members(edges, by_node, by_edge) * node_scale
            out = (1 - self.alpha) * out + self.alpha * start
            beta = math.log(self.lambda_ / (i + 1) + 1)
            out = F.relu((1 - beta) * out + beta * conv.W(out))
        return last(out)

    def parameter_groups(self) -> list[dict[str, object]]:
        """Adam's groups with the paper's weight decays: 0.01 on the convolutions, 5e-4 on the two linear maps; lr 0.01."""
        ends = [*self.convs[0].parameters(), *self.convs[-1].parameters()]
        middle = [p for conv in list(self.convs)[1:-1] for p in conv.parameters()]
        return [
            {"params": middle, "lr": 0.01, "weight_decay": 0.01},
            {"params": ends, "lr": 0.01, "weight_decay": 5e-4},
        ]


class _GCNConv(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.lin = nn.Linear(in_features, out_features, bias=False)
        nn.init.xavier_uniform_(self.lin.weight)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Features, graph: Graph) -> Tensor:
        return graph.propagate(linear(x, self.lin.weight, None)) + self.bias


class _GATConv(nn.Module):
    def __init__(self, in_features: int, out_features: int, heads: int) -> None:
        super().__init__()
        self.lin = nn.Linear(in_features, heads * out_features, bias=False)
        self.att_src = nn.Parameter(torch.empty(1, heads, out_features))
        self.att_dst = nn.Parameter(torch.empty(1, heads, out_features))
        self.bias = nn.Parameter(torch.zeros(heads * out_features))
        for parameter in (self.lin.weight, self.att_src, self.att_dst):
            nn.init.xavier_uniform_(parameter)

    def forward(self, x: Features, graph: Graph) -> Tensor:
        heads = self.att_src.shape[1]
        value = linear(x, self.lin.weight, None).view(x.shape[0], heads, -1)
        into, outof = graph.by_target, graph.by_source
        source, target = (value * self.att_src).sum(-1), (value * self.att_dst).sum(-1)
        pairs = F.leaky_relu(source[into.index] + target[into.rows], 0.2)
        alpha = attention(pairs, _identity(into), None)
        ordered = torch.empty_like(alpha).index_copy(0, into.position, alpha).reshape(-1)
        items = value.reshape(-1, value.shape[2])
        out = sum_members(items, into.per_head(heads), outof.per_head(heads), ordered)
        return out.view(x.shape[0], -1) + self.bias


def _identity(into: SortedIncidence) -> SortedIncidence:
    """The same rows over items that are the sorted edges themselves."""
    own = torch.arange(into.index.numel(), device=into.index.device)
    return SortedIncidence(into.offsets, own, into.position)


class CliqueNet(nn.Module):
    """CE-GCN and, with ``attention``, CE-GAT on the clique expansion: convolution, ReLU, norm, dropout.

    Pass :func:`gcn_normalized` of the expansion to either; the attention ignores the weights. All hidden layers have all heads.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        num_classes: int,
        layers: int = 2,
        p: float = 0.2,
        norm: str = "ln",
        attention: bool = False,
        heads: int = 1,
    ) -> None:
        super().__init__()
        self.p = p
        width = hidden * heads if attention else hidden
        inputs = [in_features, *[width] * (layers - 1)]
        if attention:
            outputs = [(hidden, heads)] * (layers - 1) + [(num_classes, 1)]
            convs: list[nn.Module] = [_GATConv(a, *b) for a, b in zip(inputs, outputs, strict=True)]
        else:
            convs = [_GCNConv(a, b) for a, b in zip(inputs, [*inputs[1:], num_classes], strict=True)]
        self.convs: Any = nn.ModuleList(convs)
        self.normalizations = nn.ModuleList([make_norm(norm, width) for _ in range(layers - 1)])

    def forward(self, x: Features, graph: Graph) -> Float[Tensor, "nodes classes"]:
        """Class logits."""
        for conv, norm in zip(self.convs, self.normalizations, strict=False):
            x = dropout(norm(F.relu(conv(x, graph))), self.p, self.training)
        return self.convs[-1](x, graph)


class HyperGCN(nn.Module):
    """HyperGCN on a precomputed operator: ``relu(A X W + b)`` in every layer, the last one included."""

    def __init__(self, in_features: int, num_classes: int, layers: int = 2, p: float = 0.2, wide: bool = False) -> None:
        super().__init__()
        power = 4 if wide else 2
        widths = [in_features, *[2 ** (layers - i + power) for i in range(layers - 1)], num_classes]
        self.p = p
        self.layers: Any = nn.ModuleList([_Affine(a, b, "W") for a, b in itertools.pairwise(widths)])

    def forward(self, x: Features, graph: Graph) -> Float[Tensor, "nodes classes"]:
        """Class logits (not negative). ``wide`` at construction is the width rule of citeseer."""
        out: Tensor
        for i, layer in enumerate(self.layers):
            out = F.relu(graph.propagate(layer.product(out if i else x)) + layer.bias)
            if i < len(self.layers) - 1:
                out = dropout(out, self.p, self.training)
        return out
