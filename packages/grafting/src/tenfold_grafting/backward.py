"""CROWN's backward pass (section 2.6): rows of coefficients are carried from a node back to the input.

At every node, sum A z + c is a lower bound of what was specified; an activation is replaced by its lower line where its
coefficient is positive and by its upper line where it is negative.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold_grafting.graph import Graph
from tenfold_grafting.intervals import Box
from tenfold_grafting.operations import Activation, Add, Affine, Conv, Pad, Scale
from tenfold_grafting.relaxation import Lines
from tenfold_grafting.windows import Windows

BLOCK = 1 << 18
"""Numbers of a layer that go through the rest of a backward pass together on a CPU: they stay in its cache."""

WINDOW_SHARE = 0.6
"""Windows that cover more of a map than this are written out: from there on the dense pass is the quicker one."""


class Lower(NamedTuple):
    """Lower bounds, and c, the part of each that the pass has summed up apart from the input."""

    bound: Float[Tensor, "*rows"]
    constant: Float[Tensor, "*rows"]


def backward(
    graph: Graph,
    start: int,
    rows: Tensor | Windows,
    lines: Mapping[int, Lines],
    box: Box,
    observe: dict[int, Tensor] | None = None,
) -> Lower:
    """Lower bounds of A z at a node, over the box, [batch, rows].

    Args:
        graph: the network.
        start: the node at which `rows` are coefficients.
        rows: A, [batch, rows, *shape of the node] or its windows.
        lines: relaxation of every activation before the node.
        box: the inputs, as many as the batch or one for all.
        observe: receives the coefficients at the output of every activation (node -> [batch, rows, *shape]).

    """
    front = _Front.at(start, rows)
    if observe is not None:
        front = front.walked(graph, lines, observe)
        return Lower(front.bound(box), front.constant)
    front = front.walked(graph, lines, while_windows=True)
    found = []
    for part, of_rows in front.blocks(graph, lines):
        end = part.walked(graph, of_rows)
        found.append(Lower(end.bound(box), end.constant))
    return found[0] if len(found) == 1 else Lower(*(torch.cat(parts, 1) for parts in zip(*found, strict=True)))


def input_coefficients(
    graph: Graph, start: int, rows: Tensor | Windows, lines: Mapping[int, Lines]
) -> tuple[Tensor | Windows, Tensor]:
    """(A, c) with A x + c <= the rows at the node, for every input x of the box that the lines were made for."""
    front = _Front.at(start, rows).walked(graph, lines)
    return front.pending[0], front.constant


@dataclasses.dataclass
class _Front:
    """How far a backward pass has come: coefficients at nodes up to ``index``, whose sum and ``constant`` are the bound."""

    index: int
    pending: dict[int, Tensor | Windows]
    constant: Float[Tensor, "batch rows"]

    @classmethod
    def at(cls, start: int, rows: Tensor | Windows) -> "_Front":
        values = rows.values if isinstance(rows, Windows) else rows
        return cls(start, {start: rows}, values.new_zeros(values.shape[:2]))

    def walked(
        self,
        graph: Graph,
        lines: Mapping[int, Lines],
        observe: dict[int, Tensor] | None = None,
        *,
        while_windows: bool = False,
    ) -> "_Front":
        """The pass, carried on to the input, or as long as there are windows."""
        pending, constant = dict(self.pending), self.constant
        for index in range(self.index, 0, -1):
            if while_windows and not any(isinstance(rows, Windows) for rows in pending.values()):
                return _Front(index, pending, constant)
            current = pending.pop(index, None)
            if current is None:
                continue
            node = graph.nodes[index]
            if isinstance(node, Add):
                for source in node.inputs:
                    _push(pending, source, current)
                continue
            if isinstance(node, Activation):
                if observe is not None:
                    current = _dense(current)
                    observe[index] = current
                current, added = _through_activation(current, lines[index])
                constant = constant + added
            else:
                assert isinstance(node, Affine)
                current, added_or_none = _through_affine(current, node)
                constant = constant if added_or_none is None else constant + added_or_none
            if isinstance(current, Windows) and current.covers > WINDOW_SHARE:
                current = current.dense()
            _push(pending, node.inputs[0], current)
        return _Front(0, pending, constant)

    def blocks(self, graph: Graph, lines: Mapping[int, Lines]) -> Iterator[tuple["_Front", Mapping[int, Lines]]]:
        """Parts of the rows that stay in a CPU's cache until they are through, with the lines of their rows."""
        batch, rows = self.constant.shape
        widest = max(torch.Size(node.shape).numel() for node in graph.nodes[: self.index + 1])
        count = min(rows, -(-batch * rows * widest // BLOCK)) if self.constant.device.type == "cpu" else 1
        if count == 1 or self.index == 0:
            yield self, lines
            return
        for chosen in torch.arange(rows).tensor_split(count):
            part = slice(int(chosen[0]), int(chosen[-1]) + 1)
            pending: dict[int, Tensor | Windows] = {i: _dense(values)[:, part] for i, values in self.pending.items()}
            yield (
                _Front(self.index, pending, self.constant[:, part]),
                {i: line.of_rows(part) for i, line in lines.items()},
            )

    def bound(self, box: Box) -> Float[Tensor, "batch rows"]:
        """The least value over the box, once the input is reached."""
        return self.constant + concretise(self.pending[0], box)


def _through_affine(current: Tensor | Windows, node: Affine) -> tuple[Tensor | Windows, Tensor | None]:
    """The coefficients before an affine map, and what its constant adds."""
    if isinstance(current, Windows) and isinstance(node, Conv | Pad | Scale):
        before, added = _windows_through(current, node)
        shape = current.values.shape[:2]
    else:
        rows = _dense(current)
        shape, flat = rows.shape[:2], rows.flatten(0, 1)
        added = node.constant(flat)
        before = node.transpose(flat).unflatten(0, shape)
    return before, None if added is None else added.view(shape)


def _dense(rows: Tensor | Windows) -> Tensor:
    return rows.dense() if isinstance(rows, Windows) else rows


def _push(pending: dict[int, Tensor | Windows], node: int, rows: Tensor | Windows) -> None:
    """Add rows to what has reached a node; several readers of one node are summed before it is passed."""
    if node not in pending:
        pending[node] = rows
        return
    there = pending[node]
    if isinstance(there, Windows) and isinstance(rows, Windows) and there.step == rows.step:
        pending[node] = there.plus(rows)
    else:
        pending[node] = _dense(there) + _dense(rows)


def _windows_through(rows: Windows, node: Conv | Pad | Scale) -> tuple[Windows, Tensor | None]:
    rows = rows.masked()  # neurons outside of the map do not exist
    flat = rows.values.flatten(0, 1)
    if isinstance(node, Conv):
        return rows.through(node), flat.flatten(2).sum(2) @ node.bias
    if isinstance(node, Pad):
        channels, height, width = node.in_shape
        return rows.padded_away(node.sides, (channels, height, width)), None
    scaled = rows.values * node.factor[:, None, None]
    return dataclasses.replace(rows, values=scaled), flat.flatten(2).sum(2) @ node.shift


def _through_activation(rows: Tensor | Windows, lines: Lines) -> tuple[Tensor | Windows, Tensor]:
    """A+ lower line + A- upper line: the coefficients before the activation, and what its intercepts add."""
    if isinstance(rows, Windows) and lines.lower_slope.dim() == lines.upper_slope.dim() and lines.shift is None:
        values, added = _through_lines(
            rows.values,
            rows.gather(lines.lower_slope),
            rows.gather(lines.upper_slope),
            None if lines.lower_intercept is None else rows.gather(lines.lower_intercept),
            rows.gather(lines.upper_intercept),
        )
        return dataclasses.replace(rows, values=values), added
    dense = _dense(rows)
    rowwise = lines.lower_slope.dim() == dense.dim()
    values, added = _through_lines(
        dense,
        lines.lower_slope if rowwise else lines.lower_slope[:, None],
        lines.upper_slope[:, None],
        None if lines.lower_intercept is None else lines.lower_intercept[:, None],
        lines.upper_intercept[:, None],
    )
    return values if lines.shift is None else values - lines.shift[:, None], added


def _through_lines(
    rows: Tensor, lower: Tensor, upper: Tensor, lower_intercept: Tensor | None, upper_intercept: Tensor
) -> tuple[Tensor, Tensor]:
    negative = rows.clamp(max=0)
    if lower_intercept is None:
        added = _dot(negative, upper_intercept)
    else:
        added = _dot(negative, upper_intercept - lower_intercept) + _dot(rows, lower_intercept)
    return torch.addcmul(rows * lower, negative, upper - lower), added


def _dot(rows: Tensor, values: Tensor) -> Tensor:
    """Sum over all but the first two dimensions; values have one row for all or one each."""
    if values.shape[1] == 1 and len(values) in (1, len(rows)):
        return torch.matmul(rows.flatten(2), values.flatten(2).transpose(1, 2))[..., 0]
    return (rows * values).flatten(2).sum(2)


def concretise(rows: Tensor | Windows, box: Box) -> Float[Tensor, "batch rows"]:
    """The minimum of A x over the box, in the box's arithmetic: A centre - |A| radius."""
    if isinstance(rows, Windows):
        bounds = []
        for part in rows.blocks(BLOCK // 2):
            centre, radius = part.gather(box.centre), part.gather(box.radius)
            values = part.values.to(centre)
            bounds.append(torch.addcmul(values * centre, values.abs(), radius, value=-1).flatten(2).sum(2))
        return torch.cat(bounds, 1)
    rows = rows.to(box.lower)
    return _dot(rows, box.centre[:, None]) - _dot(rows.abs(), box.radius[:, None])
