"""Hypergraphs as sorted incidence lists (section 2.1 of the paper's preprocessing).

A hypergraph on ``N`` nodes and ``M`` hyperedges is the list of its ``K`` memberships, an integer array ``[2, K]`` with the node in row 0
and the hyperedge in row 1. Everything that message passing needs of it - the two sorted orders, their offsets - is computed once.
"""

from __future__ import annotations

import csv
import itertools
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tenfold_shared.errors import UserError


class HypergraphError(UserError, ValueError):
    """A hypergraph, its features or its labels are not what they should be; the message says what, where, and what to do."""


def places(mask: Bool[Tensor, items], rank: Int[Tensor, items], count: int) -> Int[Tensor, count]:
    """Where the ``count`` true values of ``mask`` are; ``rank`` numbers them. Unlike ``nonzero`` it never waits for the device."""
    found = rank.new_empty(count + 1)
    found.scatter_(0, torch.where(mask, rank, count), torch.arange(mask.numel(), device=mask.device))
    return found[:count]


@dataclass(frozen=True)
class SortedIncidence:
    """The memberships sorted by one of their two ends, in compressed form.

    ``index[offsets[r]:offsets[r + 1]]`` are the other ends of row ``r``'s memberships, and ``position`` says where each of them
    stands in the list that was sorted, so that per-membership values can follow.
    """

    offsets: Int[Tensor, rows_plus_one]
    index: Int[Tensor, memberships]
    position: Int[Tensor, memberships]

    @classmethod
    def sort(cls, key: Int[Tensor, memberships], other: Int[Tensor, memberships], rows: int) -> SortedIncidence:
        """The memberships grouped by ``key``, which lies in ``[0, rows)``."""
        ordered, position = torch.sort(key, stable=True)
        offsets = torch.searchsorted(ordered, torch.arange(rows + 1, device=key.device))
        return cls(offsets, other[position], position)

    def keep(self, mask: Bool[Tensor, memberships], rank: Int[Tensor, memberships], count: int) -> SortedIncidence:
        """What is left when only the ``count`` memberships of ``mask`` (in the order of the list) stay: linear, nothing is sorted again.

        ``rank`` is the place of each in the list that is left.
        """
        chosen = mask[self.position]
        ends = torch.cumsum(chosen, 0)
        kept = places(chosen, ends - 1, count)
        offsets = torch.cat([ends.new_zeros(1), ends])[self.offsets]
        return SortedIncidence(offsets, self.index[kept], rank[self.position[kept]])

    @staticmethod
    def concatenate(parts: Sequence[SortedIncidence], index_shifts: Sequence[int]) -> SortedIncidence:
        """The disjoint union of ``parts``; the other ends of part ``i`` are shifted by ``index_shifts[i]``."""
        starts = starts_of(part.index.numel() for part in parts)
        offsets = [_shifted(part.offsets, start) for part, start in zip(parts, starts, strict=True)]
        return SortedIncidence(
            torch.cat([*[own[:-1] for own in offsets[:-1]], offsets[-1]]),
            torch.cat([_shifted(part.index, shift) for part, shift in zip(parts, index_shifts, strict=True)]),
            torch.cat([_shifted(part.position, start) for part, start in zip(parts, starts, strict=True)]),
        )

    @cached_property
    def rows(self) -> Int[Tensor, memberships]:
        """The row of every sorted membership."""
        lengths = self.offsets[1:] - self.offsets[:-1]
        rows = torch.arange(lengths.numel(), device=lengths.device)
        return torch.repeat_interleave(rows, lengths, output_size=self.index.numel())

    def per_head(self, heads: int) -> SortedIncidence:
        """The same structure between ``rows * heads`` and ``columns * heads`` items: head ``h`` only meets head ``h``."""
        if heads == 1:
            return self
        device, lengths = self.index.device, self.offsets[1:] - self.offsets[:-1]
        head = torch.arange(heads, device=device)
        total = self.index.numel() * heads
        length, start = lengths.repeat_interleave(heads), self.offsets[:-1].repeat_interleave(heads)
        offsets = torch.cat([self.offsets.new_zeros(1), torch.cumsum(length, 0)])
        within = torch.arange(total, device=device) - torch.repeat_interleave(offsets[:-1], length, output_size=total)
        entry = torch.repeat_interleave(start, length, output_size=total) + within
        which = torch.repeat_interleave(head.repeat(lengths.numel()), length, output_size=total)
        return SortedIncidence(offsets, self.index[entry] * heads + which, self.position[entry] * heads + which)


def starts_of(sizes: Iterable[int]) -> list[int]:
    """Where each of several parts begins when they follow one another."""
    return [0, *itertools.accumulate(sizes)][:-1]


def _shifted(ids: Tensor, shift: int) -> Tensor:
    return ids + shift if shift else ids


@dataclass(frozen=True)
class Incidence:
    """A bipartite structure between nodes and hyperedges: all that an encoder reads.

    ``incidence`` has node ids in ``[0, num_nodes)`` and hyperedge ids in ``[0, num_hyperedges)``; neither range needs to be used up,
    so a view that loses its last hyperedge keeps its shape.
    """

    incidence: Int[Tensor, "2 memberships"]
    num_nodes: int
    num_hyperedges: int

    @cached_property
    def by_node(self) -> SortedIncidence:
        """The memberships grouped by node."""
        return SortedIncidence.sort(self.incidence[0], self.incidence[1], self.num_nodes)

    @cached_property
    def by_hyperedge(self) -> SortedIncidence:
        """The memberships grouped by hyperedge."""
        return SortedIncidence.sort(self.incidence[1], self.incidence[0], self.num_hyperedges)

    @cached_property
    def _heads(self) -> dict[int, tuple[SortedIncidence, SortedIncidence]]:
        return {}

    def per_head(self, heads: int) -> tuple[SortedIncidence, SortedIncidence]:
        """``(by_node, by_hyperedge)`` for ``heads`` attention heads, computed once."""
        if heads not in self._heads:
            self._heads[heads] = (self.by_node.per_head(heads), self.by_hyperedge.per_head(heads))
        return self._heads[heads]

    @cached_property
    def node_degrees(self) -> Int[Tensor, nodes]:
        """Number of hyperedges of each node (its own singleton included, where there is one)."""
        return self.by_node.offsets[1:] - self.by_node.offsets[:-1]

    @cached_property
    def hyperedge_sizes(self) -> Int[Tensor, hyperedges]:
        """Number of members of each hyperedge."""
        return self.by_hyperedge.offsets[1:] - self.by_hyperedge.offsets[:-1]

    @property
    def num_memberships(self) -> int:
        """Number of columns of ``incidence``."""
        return self.incidence.shape[1]


def disjoint_union(parts: Sequence[Incidence]) -> Incidence:
    """All ``parts`` side by side as one structure, so that several views go through the encoder in one pass.

    Nodes, hyperedges and memberships of part ``i`` follow those of part ``i - 1``; the sorted orders are concatenated, not computed.
    """
    nodes, hyperedges = starts_of(part.num_nodes for part in parts), starts_of(part.num_hyperedges for part in parts)
    ends = [
        torch.cat([_shifted(part.incidence[row], shift) for part, shift in zip(parts, shifts, strict=True)])
        for row, shifts in enumerate((nodes, hyperedges))
    ]
    last = parts[-1]
    union = Incidence(torch.stack(ends), nodes[-1] + last.num_nodes, hyperedges[-1] + last.num_hyperedges)
    union.__dict__["by_node"] = SortedIncidence.concatenate([part.by_node for part in parts], hyperedges)
    union.__dict__["by_hyperedge"] = SortedIncidence.concatenate([part.by_hyperedge for part in parts], nodes)
    return union


@dataclass(frozen=True)
class Hypergraph(Incidence):
    """A hypergraph whose first ``num_real`` memberships are its own and whose others are singleton hyperedges (section 2.1).

    ``num_real_hyperedges`` counts the hyperedges before the singletons; in a hypergraph without singletons it equals ``num_hyperedges``.
    """

    num_real: int
    num_real_hyperedges: int

    @classmethod
    def from_incidence(
        cls, incidence: Int[Tensor, "2 memberships"], num_nodes: int | None = None, num_hyperedges: int | None = None
    ) -> Hypergraph:
        """A hypergraph without singletons from its list of memberships; duplicates are merged with a warning.

        Without ``num_nodes`` or ``num_hyperedges`` the largest id decides.

        Raises:
            HypergraphError: for anything but two rows of integers, for negative ids and for ids beyond the numbers given.
        """
        if incidence.dim() != 2 or incidence.shape[0] != 2 or incidence.is_floating_point():
            raise HypergraphError(
                f"Memberships are two rows of integers, nodes and hyperedges, not {list(incidence.shape)} of {incidence.dtype}."
            )
        incidence = incidence.long()
        sizes = []
        for row, (noun, given) in enumerate((("node", num_nodes), ("hyperedge", num_hyperedges))):
            ids = incidence[row]
            largest = int(ids.max()) if ids.numel() else -1
            size = largest + 1 if given is None else given
            bad = torch.nonzero((ids < 0) | (ids >= size))
            if bad.numel():
                where = int(bad[0])
                other = f"hyperedge {int(incidence[1, where])}" if row == 0 else f"node {int(incidence[0, where])}"
                raise HypergraphError(
                    f"Membership {where} ({other}) names {noun} {int(ids[where])}, but there are {size} {noun}s, numbered from 0: "
                    f"correct the id or raise the number of {noun}s."
                )
            sizes.append(size)
        key = torch.unique(incidence[0] * max(sizes[1], 1) + incidence[1])
        if key.numel() < incidence.shape[1]:
            warnings.warn(f"{incidence.shape[1] - key.numel()} duplicate memberships were merged.", stacklevel=2)
        merged = torch.stack([key // max(sizes[1], 1), key % max(sizes[1], 1)])
        return cls(merged, sizes[0], sizes[1], merged.shape[1], sizes[1])

    @classmethod
    def from_hyperedges(cls, hyperedges: Iterable[Iterable[int]], num_nodes: int | None = None) -> Hypergraph:
        """A hypergraph from any list of hyperedges, each a list or set of zero-based node ids.

        Raises:
            HypergraphError: for an empty hyperedge, an id that is no integer, or a node that does not exist.
        """
        nodes: list[int] = []
        owners: list[int] = []
        count = 0
        for edge, members in enumerate(hyperedges):
            before = len(nodes)
            nodes.extend(members)
            owners.extend([edge] * (len(nodes) - before))
            if len(nodes) == before:
                raise HypergraphError(f"Hyperedge {edge} is empty: remove it, or give it its members.")
            count = edge + 1
        array = np.asarray(nodes)
        if array.size and array.dtype.kind not in "iu":
            raise HypergraphError(
                f"Node ids must be integers, got {array.dtype} values: map the names to 0..N-1 first."
            )
        incidence = torch.tensor(np.stack([array.astype(np.int64), np.asarray(owners, dtype=np.int64)]))
        return cls.from_incidence(incidence, num_nodes, count)

    @classmethod
    def from_csv(cls, path: str | Path, num_nodes: int | None = None) -> tuple[Hypergraph, list[str]]:
        """A hypergraph from a CSV of ``node, hyperedge`` rows (a header line is recognised by its words ``node,hyperedge``).

        Hyperedges may have any names; they are numbered by first appearance and returned. Nodes are zero-based integers.

        Raises:
            HypergraphError: for a row that has no two columns, or a node id that is no integer; the line is named.
        """
        path = Path(path)
        names: dict[str, int] = {}
        pairs: list[tuple[int, int]] = []
        with path.open(newline="", encoding="utf-8") as file:
            for line, row in enumerate(csv.reader(file), start=1):
                if not row or (line == 1 and [cell.strip().lower() for cell in row] == ["node", "hyperedge"]):
                    continue
                if len(row) != 2:
                    raise HypergraphError(
                        f"{path}, line {line}: expected two columns (node, hyperedge), found {len(row)}."
                    )
                try:
                    node = int(row[0])
                except ValueError:
                    raise HypergraphError(f"{path}, line {line}: the node id {row[0]!r} is no integer.") from None
                pairs.append((node, names.setdefault(row[1].strip(), len(names))))
        incidence = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
        return cls.from_incidence(incidence, num_nodes, len(names)), list(names)

    @classmethod
    def from_nearest_neighbors(
        cls, features: Float[np.ndarray, "nodes features"], k: int, include_self: bool = True
    ) -> Hypergraph:
        """One hyperedge per node: its ``k`` nearest nodes in Euclidean distance, itself among them if ``include_self``."""
        from sklearn.neighbors import NearestNeighbors  # noqa: PLC0415 - slow to import

        features = np.asarray(features)
        check_features(torch.from_numpy(features))
        if not 1 <= k < len(features) + include_self:
            raise HypergraphError(f"k = {k} neighbours cannot be found among {len(features)} nodes.")
        # Asked about its own points, scikit-learn leaves each one out of its neighbours; with itself there are k - 1 others.
        search = NearestNeighbors(n_neighbors=max(k - include_self, 1)).fit(features)
        others = search.kneighbors(return_distance=False)[:, : k - include_self]
        own = np.arange(len(features))
        members = np.concatenate([own[:, None], others], axis=1) if include_self else others
        incidence = np.stack([members.reshape(-1), np.repeat(own, members.shape[1])])
        return cls.from_incidence(torch.from_numpy(incidence.astype(np.int64)), len(features), len(features))

    def with_singletons(self, nodes: str = "all") -> Hypergraph:
        """One singleton hyperedge ``{v}`` appended for every node (section 2.1), numbered after the real ones.

        ``nodes="missing"`` is the AllSet form: nodes that already own a hyperedge of size 1 get none.
        """
        if self.num_hyperedges != self.num_real_hyperedges:
            raise HypergraphError("This hypergraph already has its singletons.")
        if nodes not in {"all", "missing"}:
            raise ValueError(f"nodes must be 'all' or 'missing', not {nodes!r}.")
        own = torch.arange(self.num_nodes, device=self.incidence.device)
        if nodes == "missing":
            alone = self.hyperedge_sizes[self.incidence[1]] == 1
            mask = torch.ones_like(own, dtype=torch.bool)
            mask[self.incidence[0, alone]] = False
            own = own[mask]
        ids = torch.arange(own.numel(), device=own.device) + self.num_hyperedges
        incidence = torch.cat([self.incidence, torch.stack([own, ids])], dim=1)
        total = self.num_hyperedges + own.numel()
        return Hypergraph(incidence, self.num_nodes, total, self.num_memberships, self.num_hyperedges)

    @property
    def has_all_singletons(self) -> bool:
        """Whether every node has its singleton."""
        return self.num_hyperedges - self.num_real_hyperedges == self.num_nodes

    def without_singletons(self) -> Hypergraph:
        """The hypergraph before :meth:`with_singletons`."""
        edges = self.num_real_hyperedges
        return Hypergraph(self.incidence[:, : self.num_real], self.num_nodes, edges, self.num_real, edges)

    def keep(self, mask: Bool[Tensor, memberships], counts: tuple[int, int] | None = None) -> Hypergraph:
        """The hypergraph with only the memberships of ``mask``; nodes and hyperedges keep their ids.

        ``counts``, where they are known, are the numbers of memberships and of real ones that stay: reading them waits for the device.
        """
        if counts is None:
            total, real = torch.stack([mask.sum(), mask[: self.num_real].sum()]).tolist()
        else:
            total, real = counts
        rank = torch.cumsum(mask, 0) - 1
        left = self.incidence[:, places(mask, rank, total)]
        kept = Hypergraph(left, self.num_nodes, self.num_hyperedges, real, self.num_real_hyperedges)
        kept.__dict__["by_node"] = self.by_node.keep(mask, rank, total)
        kept.__dict__["by_hyperedge"] = self.by_hyperedge.keep(mask, rank, total)
        return kept

    def relabel(self, mask: Bool[Tensor, memberships], nodes: Int[Tensor, kept] | None = None) -> Hypergraph:
        """The memberships of ``mask``, all of them of the (sorted) ``nodes`` where these are given: no other node stays.

        Hyperedges that are left empty vanish, the order of ids stays.
        """
        used = torch.zeros(self.num_hyperedges + 1, dtype=torch.bool, device=mask.device)
        used.index_fill_(0, torch.where(mask, self.incidence[1], self.num_hyperedges), True)
        used = used[: self.num_hyperedges]
        groups = (mask, mask[: self.num_real], used, used[: self.num_real_hyperedges])
        total, real, edges, real_edges = torch.stack([group.sum() for group in groups]).tolist()
        incidence = self.incidence[:, places(mask, torch.cumsum(mask, 0) - 1, total)]
        node, edge = incidence[0], (torch.cumsum(used, 0) - 1)[incidence[1]]
        if nodes is not None:
            new_node = torch.full((self.num_nodes,), -1, device=nodes.device)
            new_node[nodes] = torch.arange(nodes.numel(), device=nodes.device)
            node = new_node[node]
        return Hypergraph(
            torch.stack([node, edge]), self.num_nodes if nodes is None else nodes.numel(), edges, real, real_edges
        )

    def to(self, device: torch.device | str) -> Hypergraph:
        """The hypergraph on another device."""
        moved = self.incidence.to(device)
        return Hypergraph(moved, self.num_nodes, self.num_hyperedges, self.num_real, self.num_real_hyperedges)

    def to_data(self, **attributes: Any) -> Any:
        """A ``torch_geometric.data.HyperGraphData`` of the real memberships; ``attributes`` (``x``, ``y`` ...) are stored with it."""
        from torch_geometric.data.hypergraph_data import HyperGraphData  # noqa: PLC0415 - slow to import

        real = self.incidence[:, : self.num_real]
        data = HyperGraphData(edge_index=real, num_nodes=self.num_nodes, **attributes)
        data.num_hyperedges = self.num_real_hyperedges
        return data

    @classmethod
    def from_data(cls, data: Any) -> Hypergraph:
        """The hypergraph of a ``HyperGraphData`` (its ``edge_index`` rows are node and hyperedge)."""
        count = data.num_hyperedges if "num_hyperedges" in data else None
        return cls.from_incidence(data.edge_index, count_nodes(data), count)


def count_nodes(data: Any) -> int:
    """The number of nodes of a ``HyperGraphData``: as stored, else by its features.

    (Its own property mistakes a stored number that equals the number of hyperedges for an inferred one.)
    """
    if "num_nodes" in data:
        return int(data["num_nodes"])
    return int(data.num_nodes if data.x is None else data.x.shape[0])


def check_features(features: Float[Tensor, "nodes features"], num_nodes: int | None = None) -> None:
    """Refuse features that are not finite or that belong to another number of nodes."""
    if num_nodes is not None and features.shape[0] != num_nodes:
        raise HypergraphError(f"There are {features.shape[0]} rows of features for {num_nodes} nodes.")
    bad = torch.nonzero(~torch.isfinite(features))
    if bad.numel():
        node, column = bad[0].tolist()
        raise HypergraphError(
            f"The features have {bad.shape[0]} values that are not finite, the first at node {node}, column {column}: "
            "replace or drop them first."
        )


def check_labels(labels: Int[Tensor, nodes], num_nodes: int) -> int:
    """The number of classes of ``labels`` (-1 = unlabelled), refusing a wrong length and a hypergraph with no label at all."""
    if labels.shape[0] != num_nodes:
        raise HypergraphError(
            f"There are {labels.shape[0]} labels for {num_nodes} nodes: mark nodes without a label by -1."
        )
    if not num_nodes:
        raise HypergraphError("There is no node: a hypergraph needs some.")
    if int(labels.min()) < -1:
        raise HypergraphError(f"Labels must be classes from 0, or -1 for none; found {int(labels.min())}.")
    classes = int(labels.max()) + 1
    if classes == 0:
        raise HypergraphError("No node has a label: training needs some.")
    return classes
