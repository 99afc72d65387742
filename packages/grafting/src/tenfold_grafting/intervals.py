"""Boxes of inputs and interval arithmetic on them (section 2.6)."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold_grafting.graph import Graph
from tenfold_grafting.operations import Activation, Linear, interval_of

Intervals = dict[int, tuple[Tensor, Tensor]]
"""Activation's node -> (lower, upper) of its pre-activation, each [batch, *shape]."""


@dataclasses.dataclass
class Box:
    """All inputs with lower <= x <= upper, normalised, [batch, *input_shape]."""

    lower: Float[Tensor, "batch *input"]
    upper: Float[Tensor, "batch *input"]

    def __len__(self) -> int:
        """How many boxes."""
        return len(self.lower)

    def __getitem__(self, index: slice | Tensor) -> "Box":
        """Some of the boxes."""
        return Box(self.lower[index], self.upper[index])

    def to(self, dtype: torch.dtype) -> "Box":
        """The box in another arithmetic, not smaller than it was."""
        if dtype == self.lower.dtype:
            return self
        lower, upper = self.lower.to(dtype), self.upper.to(dtype)
        low, high = torch.full_like(lower, -torch.inf), torch.full_like(upper, torch.inf)
        lower = torch.where(lower.to(self.lower.dtype) > self.lower, torch.nextafter(lower, low), lower)
        upper = torch.where(upper.to(self.upper.dtype) < self.upper, torch.nextafter(upper, high), upper)
        return Box(lower, upper)

    @property
    def centre(self) -> Tensor:
        """Midpoints."""
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        """Half widths."""
        return (self.upper - self.lower) / 2


def ibp(graph: Graph, box: Box) -> tuple[Intervals, tuple[Tensor, Tensor]]:
    """Interval arithmetic: the pre-activation intervals, and the range of the outputs [batch, classes]."""
    values: list[tuple[Tensor, Tensor]] = []
    intervals: Intervals = {}
    for index, node in enumerate(graph.nodes):
        if isinstance(node, Activation):
            intervals[index] = values[node.inputs[0]]
        values.append(interval_of(node, values, box.lower, box.upper))
    return intervals, values[-1]


def merged_last_layer(graph: Graph, spec: Float[Tensor, "batch rows classes"]) -> tuple[Tensor, Tensor, int]:
    """C W and C b of a last linear layer, and the node it reads: margins lose nothing to interval arithmetic there."""
    last = graph.nodes[-1]
    if not isinstance(last, Linear):
        return spec, spec.new_zeros(spec.shape[:2]), graph.output
    return spec @ last.weight, spec @ last.bias, last.inputs[0]


def ibp_margins(graph: Graph, box: Box, spec: Float[Tensor, "batch rows classes"]) -> Float[Tensor, "batch rows"]:
    """Interval lower bounds of C f(x), with the specification merged into a last linear layer."""
    rows, constant, node = merged_last_layer(graph, spec)
    values: list[tuple[Tensor, Tensor]] = []
    for operation in graph.nodes[: node + 1]:
        values.append(interval_of(operation, values, box.lower, box.upper))
    lower, upper = (v.flatten(1)[:, :, None] for v in values[node])
    flat = rows.flatten(2)
    return constant + (flat.clamp(min=0) @ lower + flat.clamp(max=0) @ upper)[..., 0]
