"""Sums over the incidence list in O(memberships x width): the sparse products behind every encoder.

The forward and the backward pass are the same operation on the two sorted orders of one structure, so nothing of the size
``memberships x width`` is ever stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tenfold_hypergcl.hypergraph import SortedIncidence, starts_of

CHUNK_VALUES = 1 << 22
"""Largest temporary, in values, of the gradient with respect to membership weights."""


def _sum_rows(
    items: Float[Tensor, "items width"], into: SortedIncidence, weight: Float[Tensor, "memberships"] | None
) -> Float[Tensor, "rows width"]:
    if into.index.numel() == 0:
        return items.new_zeros(into.offsets.numel() - 1, items.shape[1])
    per_sample = None if weight is None else weight[into.position]
    return F.embedding_bag(
        into.index, items, into.offsets, mode="sum", per_sample_weights=per_sample, include_last_offset=True
    )


class _SumMembers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, items: Tensor, weight: Tensor | None, into: SortedIncidence, outof: SortedIncidence
    ) -> Tensor:
        ctx.into, ctx.outof = into, outof
        ctx.save_for_backward(items if ctx.needs_input_grad[1] else None, weight)
        return _sum_rows(items, into, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grad_outputs
        grad = grad.contiguous()
        items, weight = ctx.saved_tensors
        grad_items = _sum_rows(grad, ctx.outof, weight) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            into: SortedIncidence = ctx.into
            grad_weight = torch.empty_like(weight)
            step = max(1, CHUNK_VALUES // items.shape[1])
            for start in range(0, into.index.numel(), step):
                part = slice(start, start + step)
                dots = (grad[into.rows[part]] * items[into.index[part]]).sum(1)
                grad_weight[into.position[part]] = dots
        return grad_items, grad_weight, None, None


def sum_members(
    items: Float[Tensor, "items width"],
    into: SortedIncidence,
    outof: SortedIncidence,
    weight: Float[Tensor, "memberships"] | None = None,
) -> Float[Tensor, "rows width"]:
    """``out[r] = sum over memberships (r, i) of weight * items[i]``.

    ``into`` is the structure grouped by ``r``, ``outof`` the same one grouped by ``i``; ``weight`` is in the order of the list that
    both were sorted from. Rows without members are zero. Differentiable in ``items`` and ``weight``.
    """
    if torch.is_autocast_enabled(items.device.type):
        items = items.to(torch.get_autocast_dtype(items.device.type))
    if weight is not None:
        weight = weight.to(items.dtype)
    return _SumMembers.apply(items.contiguous(), weight, into, outof)


@dataclass(frozen=True)
class SparseFeatures:
    """Node features of which most are zero (bag-of-words), as the list of their other values.

    It stands wherever an encoder takes a dense ``[nodes, features]`` tensor: dropout acts on the stored values (a zero stays a zero
    either way) and the first linear map is a sparse product, so its cost follows the number of words, not the vocabulary.
    """

    values: Float[Tensor, "nonzeros"]
    by_row: SortedIncidence
    by_column: SortedIncidence
    num_features: int

    @classmethod
    def from_dense(cls, x: Float[Tensor, "nodes features"]) -> "SparseFeatures":
        """The sparse form of a dense matrix."""
        where = torch.nonzero(x)
        rows, columns = where[:, 0].contiguous(), where[:, 1].contiguous()
        return cls.from_entries(x[rows, columns], rows, columns, (x.shape[0], x.shape[1]))

    @classmethod
    def from_entries(
        cls,
        values: Float[Tensor, "nonzeros"],
        rows: Int[Tensor, "nonzeros"],
        columns: Int[Tensor, "nonzeros"],
        shape: tuple[int, int],
    ) -> "SparseFeatures":
        """The sparse form of a list of entries."""
        by_row, by_column = SortedIncidence.sort(rows, columns, shape[0]), SortedIncidence.sort(columns, rows, shape[1])
        return cls(values, by_row, by_column, shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """``(nodes, features)`` as of a dense tensor."""
        return self.by_row.offsets.numel() - 1, self.num_features

    @cached_property
    def row_sums(self) -> tuple[Float[Tensor, "nodes"], Float[Tensor, "nodes"]]:
        """The sums of values and of squares of each row."""
        pairs = torch.stack([self.values, self.values.square()], dim=1)
        sums = pairs.new_zeros(self.shape[0], 2).index_add_(0, self.by_row.rows, pairs[self.by_row.position])
        return sums[:, 0], sums[:, 1]

    def with_values(self, values: Float[Tensor, "nonzeros"]) -> "SparseFeatures":
        """Other values at the same places."""
        return SparseFeatures(values, self.by_row, self.by_column, self.num_features)

    def matmul(self, right: Float[Tensor, "features width"]) -> Float[Tensor, "nodes width"]:
        """``X @ right``."""
        return sum_members(right, self.by_row, self.by_column, self.values)

    def rows(self, index: Tensor) -> "SparseFeatures":
        """The rows ``index``, at the cost of their own entries."""
        side = self.by_row
        first, length = side.offsets[index], side.offsets[index + 1] - side.offsets[index]
        total = int(length.sum())
        row = torch.repeat_interleave(torch.arange(index.numel(), device=index.device), length, output_size=total)
        start = torch.cumsum(length, 0) - length
        entry = first[row] + torch.arange(total, device=index.device) - start[row]
        values = self.values[side.position[entry]]
        return SparseFeatures.from_entries(values, row, side.index[entry], (index.numel(), self.num_features))

    def repeat(self, times: int) -> "SparseFeatures":
        """The matrix stacked ``times`` times over itself; computed once."""
        if times not in self._repeated:
            self._repeated[times] = SparseFeatures.stack([self] * times)
        return self._repeated[times]

    @cached_property
    def _repeated(self) -> "dict[int, SparseFeatures]":
        return {}

    @classmethod
    def stack(cls, parts: "Sequence[SparseFeatures]") -> "SparseFeatures":
        """Matrices of the same columns over one another."""
        by_row = SortedIncidence.concatenate([part.by_row for part in parts], [0] * len(parts))
        orders = [part.by_column for part in parts]
        columns = torch.arange(parts[0].num_features, device=parts[0].values.device)
        keys = [columns.repeat_interleave(own.offsets.diff(), output_size=own.index.numel()) for own in orders]
        below = SortedIncidence.concatenate(orders, starts_of(part.shape[0] for part in parts))
        merged = SortedIncidence.sort(torch.cat(keys), below.index, columns.numel())
        by_column = SortedIncidence(merged.offsets, merged.index, below.position[merged.position])
        return cls(torch.cat([part.values for part in parts]), by_row, by_column, columns.numel())

    def to_dense(self) -> Float[Tensor, "nodes features"]:
        """The dense matrix."""
        dense = self.values.new_zeros(self.shape)
        dense[self.by_row.rows, self.by_row.index] = self.values[self.by_row.position]
        return dense

    def to(self, target: torch.device | str | torch.dtype) -> "SparseFeatures":
        """The features on another device or in another precision."""
        if isinstance(target, torch.dtype):
            return self.with_values(self.values.to(target))
        side = self.by_row
        values = self.values[side.position].to(target)
        return SparseFeatures.from_entries(values, side.rows.to(target), side.index.to(target), self.shape)


Features = Tensor | SparseFeatures


def stack_views(views: list[Features]) -> Features:
    """The features of several views over one another, sparse if all of them are."""
    sparse = [view for view in views if isinstance(view, SparseFeatures)]
    if len(sparse) < len(views):
        return torch.cat([view.to_dense() if isinstance(view, SparseFeatures) else view for view in views])
    if all(view is sparse[0] for view in sparse):
        return sparse[0].repeat(len(sparse))
    return SparseFeatures.stack(sparse)
