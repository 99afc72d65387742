"""Bounds of a network on a box (section 2.6): CROWN-IBP and CROWN, by backward passes from each layer in turn."""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tenfold_grafting.arithmetic import exact_arithmetic, node_error, rounded_out
from tenfold_grafting.backward import backward
from tenfold_grafting.graph import Graph
from tenfold_grafting.intervals import Box, Intervals, ibp, ibp_margins
from tenfold_grafting.operations import Activation, Add, Affine, Conv, Input, Linear, Operation, interval_of
from tenfold_grafting.relaxation import Lines, relax
from tenfold_grafting.windows import Windows, filter_windows, unit_windows

SCREENED_FROM = 64
"""Neurons of a layer from which on a pass in single precision comes first."""


# -- intermediate bounds --------------------------------------------------------------------------------------------------


def relaxations(graph: Graph, intervals: Intervals) -> dict[int, Lines]:
    """The default lines of every activation with an interval."""
    return {index: relax(graph.activation(index), *interval) for index, interval in intervals.items()}


def crown_intervals(
    graph: Graph, box: Box, *, intersect: bool = True, rigorous: bool = False, elements: int | None = None
) -> tuple[Intervals, dict[int, Lines]]:
    """CROWN bounds of every pre-activation, layer by layer, and the lines they give.

    Args:
        graph: the network.
        box: the inputs.
        intersect: compute rows only for neurons that interval arithmetic from the layers before leaves unstable, and
            keep the tighter of the two bounds everywhere; otherwise CROWN's bound alone, for every neuron.
        rigorous: widen everything by what rounding may have cost.
        elements: numbers that one chunk of rows may hold at a node; default: by the memory there is.

    """
    values: list[tuple[Tensor, Tensor]] = []
    mixing: list[int] = []  # maps on the way that read several inputs; interval arithmetic is exact through one
    intervals: Intervals = {}
    lines: dict[int, Lines] = {}
    at_centre = graph.values(box.centre) if intersect else []
    screened = intersect and graph.dtype == torch.float64 and graph.device.type == "cpu"
    screen = _Screen(graph, box) if screened else None
    errors: list[Tensor] = []
    for index, node in enumerate(graph.nodes):
        depth = max((mixing[i] for i in node.inputs), default=0)
        if isinstance(node, Activation):
            source = node.inputs[0]
            lower, upper = values[source]
            if mixing[source] > 1:
                if screen is not None:
                    lower, upper = screen.refined(node, intervals, (lower, upper), at_centre[source], elements)
                centre = at_centre[source] if at_centre else None
                refined = _refined(graph, box, node, lines, (lower, upper), elements, centre)
                lower, upper = _less_error(refined, (lower, upper), errors[source]) if rigorous else refined
            intervals[index] = (torch.minimum(lower, upper), torch.maximum(lower, upper))
            lines[index] = relax(node, *intervals[index])
            values.append(node.interval(*intervals[index]))
            depth += 1
        else:
            values.append(interval_of(node, values, box.lower, box.upper))
        if rigorous:
            ranges = [values[i] for i in node.inputs] or [(box.lower, box.upper)]
            values[index] = rounded_out(node, values[index], ranges)
            errors.append(_error(graph, node, errors, ranges, graph.dtype))
        if screen is not None:
            screen.append(node, [values[i] for i in node.inputs])
        mixing.append(depth + (isinstance(node, Add) or (isinstance(node, Affine) and node.mixes)))
    return intervals, lines


def _less_error(refined: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor], error: Tensor) -> tuple[Tensor, Tensor]:
    """Refined ends less the rounding error of their backward pass, where that still improves on the interval before."""
    return torch.maximum(refined[0] - error, before[0]), torch.minimum(refined[1] + error, before[1])


def margin_errors(graph: Graph, box: Box, intervals: Intervals) -> list[Tensor]:
    """What a backward pass from each node may be off by in the graph's arithmetic (see `arithmetic`)."""
    values: list[tuple[Tensor, Tensor]] = []
    errors: list[Tensor] = []
    for index, node in enumerate(graph.nodes):
        if isinstance(node, Activation):
            values.append(node.interval(*intervals[index]))
            ranges = [intervals[index]]
        else:
            values.append(interval_of(node, values, box.lower, box.upper))
            ranges = [values[i] for i in node.inputs] or [(box.lower, box.upper)]
        errors.append(_error(graph, node, errors, ranges, graph.dtype))
    return errors


def _error(
    graph: Graph, node: Operation, errors: list[Tensor], ranges: list[tuple[Tensor, Tensor]], dtype: torch.dtype
) -> Tensor:
    return node_error(node, [errors[i] for i in node.inputs], ranges, dtype, graph.input_size, len(graph.nodes))


def _refined(
    graph: Graph,
    box: Box,
    node: Activation,
    lines: Mapping[int, Lines],
    interval: tuple[Tensor, Tensor],
    elements: int | None,
    centre: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The interval of an activation's input after a backward pass from the neurons that need one.

    With the neurons' values at the box's centre, a first pass bounds unstable neurons on the side that could make them
    stable, a second one those that remain on the other; a stable neuron's other end matters to nothing.
    """
    lower, upper = (bound.flatten(1) for bound in interval)
    source, shape = node.inputs[0], interval[0].shape
    if centre is None:
        every = torch.arange(lower.shape[1], device=lower.device).expand(len(lower), -1)
        plus = torch.ones_like(lower)
        lower = neuron_bounds(graph, box, source, every, plus, lines, elements)
        return lower.view(shape), -neuron_bounds(graph, box, source, every, -plus, lines, elements).view(shape)
    side = torch.where(centre.flatten(1) > 0, 1.0, -1.0).to(lower.dtype)
    for signs in (side, -side):
        wanted = node.unstable(lower.view(shape), upper.view(shape)).flatten(1)
        lower, upper = _tightened(graph, box, source, wanted, signs, lines, (lower, upper), elements)
    return lower.view(shape), upper.view(shape)


def _tightened(
    graph: Graph,
    box: Box,
    source: int,
    wanted: Bool[Tensor, "batch neurons"],
    signs: Float[Tensor, "batch neurons"],
    lines: Mapping[int, Lines],
    ends: tuple[Tensor, Tensor],
    elements: int | None,
    error: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Intervals [batch, neurons] with one end of the wanted neurons bounded: the lower one where the sign is positive.

    Images with about as many wanted neurons go through together, the fullest first, as many as fill a chunk: every
    image of a group has as many rows as its fullest.
    """
    lower, upper = (end.clone() for end in ends)
    counts = wanted.sum(1)
    order = counts.argsort(descending=True, stable=True)
    sizes = counts[order].tolist()
    room = chunk_rows(graph, box, source, elements)
    first = 0
    while first < len(sizes) and sizes[first]:
        last = first + 1
        while last < len(sizes) and sizes[last] and (last + 1 - first) * sizes[first] <= room:
            last += 1
        images = order[first:last]
        neurons = wanted[images].to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : sizes[first]]
        sign = signs[images].gather(1, neurons)
        here = {i: line.of(images) for i, line in lines.items()}
        bound = neuron_bounds(graph, box[images], source, neurons, sign.to(graph.dtype), here, elements)
        if error is not None:
            bound = bound - error[images].gather(1, neurons)
        low, high = lower[images], upper[images]
        lows, highs = low.gather(1, neurons), high.gather(1, neurons)
        lower[images] = low.scatter(1, neurons, torch.where(sign > 0, torch.maximum(lows, bound), lows))
        upper[images] = high.scatter(1, neurons, torch.where(sign < 0, torch.minimum(highs, -bound), highs))
        first = last
    return lower, upper


class _Screen:
    """A first pass in single precision, less its rounding error, that finds most of the stable neurons at a fraction of
    the cost; what it leaves is bounded in double precision.
    """

    def __init__(self, graph: Graph, box: Box):
        self.graph, self.box = graph.single, box
        self.errors: list[Tensor] = []

    def append(self, node: Operation, ranges: list[tuple[Tensor, Tensor]]) -> None:
        """Take notice of a node whose inputs' ranges are known."""
        ranges = ranges or [(self.box.lower, self.box.upper)]
        dtype = torch.float64 if isinstance(node, Input) else torch.float32  # the box itself stays in double precision
        self.errors.append(_error(self.graph, node, self.errors, ranges, dtype))

    def refined(
        self,
        node: Activation,
        intervals: Intervals,
        interval: tuple[Tensor, Tensor],
        centre: Tensor,
        elements: int | None,
    ) -> tuple[Tensor, Tensor]:
        """The interval with the bounds of the side on which a neuron may be stable."""
        wanted = node.unstable(*interval).flatten(1)
        if int(wanted.sum(1).max()) < SCREENED_FROM:
            return interval
        sign = torch.where(centre.flatten(1) > 0, 1.0, -1.0).to(centre.dtype)
        single = {
            index: relax(activation, low.float(), high.float())
            for index, (low, high) in intervals.items()
            for activation in [self.graph.activation(index)]
        }
        source, shape = node.inputs[0], interval[0].shape
        ends, error = (interval[0].flatten(1), interval[1].flatten(1)), self.errors[source].flatten(1)
        lower, upper = _tightened(self.graph, self.box, source, wanted, sign, single, ends, elements, error)
        return lower.view(shape), upper.view(shape)


def neuron_bounds(
    graph: Graph,
    box: Box,
    source: int,
    neurons: Int[Tensor, "batch rows"],
    signs: Float[Tensor, "batch rows"],
    lines: Mapping[int, Lines],
    elements: int | None = None,
) -> Float[Tensor, "batch rows"]:
    """Lower bounds of sign * z for chosen neurons (numbered in the flattened node), in chunks of rows."""
    step = max(1, chunk_rows(graph, box, source, elements) // len(box))
    parts = []
    for chosen, sign in zip(neurons.split(step, 1), signs.split(step, 1), strict=True):
        start, rows, constant = _start_rows(graph, source, chosen, sign)
        parts.append(backward(graph, start, rows, lines, box).bound + constant)
    return torch.cat(parts, 1)


def _start_rows(graph: Graph, source: int, neurons: Tensor, signs: Tensor) -> tuple[int, Tensor | Windows, Tensor]:
    """Rows for single neurons of a node, taken one operation further where that is a look-up: (node, rows, constant)."""
    node = graph.nodes[source]
    none = signs.new_zeros(neurons.shape)
    if isinstance(node, Linear):
        return node.inputs[0], node.weight[neurons] * signs[..., None], node.bias[neurons] * signs
    if len(node.shape) == 3:
        channels, height, width = node.shape
        units = unit_windows((channels, height, width), neurons, signs)
        if isinstance(node, Conv):
            rows = filter_windows(node, units, neurons, signs)
            return node.inputs[0], rows, node.bias[neurons // (height * width)] * signs
        return source, units, none
    unit = torch.nn.functional.one_hot(neurons, torch.Size(node.shape).numel()).to(signs.dtype) * signs[..., None]
    return source, unit.view(*neurons.shape, *node.shape), none


def chunk_rows(graph: Graph, box: Box, source: int, elements: int | None) -> int:
    """How many rows that start at a node fit into one chunk."""
    widest = max(torch.Size(node.shape).numel() for node in graph.nodes[: source + 1])
    return max(1, (elements or chunk_elements(box.lower)) // widest)


def chunk_elements(like: Tensor) -> int:
    """Numbers one chunk of rows may hold at a node: of the memory that is free on a GPU, or what stays near a CPU."""
    if like.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(like.device)
        free += torch.cuda.memory_reserved(like.device) - torch.cuda.memory_allocated(like.device)
        return max(1 << 22, free // (10 * like.element_size()))
    return 1 << 22


# -- margins --------------------------------------------------------------------------------------------------------------


def margin_spec(labels: Int[Tensor, " batch"], classes: int) -> Float[Tensor, "batch rows classes"]:
    """Rows e_y - e_j for the wrong classes j in increasing order."""
    eye = torch.eye(classes, dtype=torch.float64, device=labels.device)
    others = torch.arange(classes, device=labels.device).expand(len(labels), -1)
    others = others[others != labels[:, None]].view(len(labels), classes - 1)
    return eye[labels][:, None] - eye[others]


def crown_margins(
    graph: Graph, box: Box, spec: Float[Tensor, "batch rows classes"], lines: Mapping[int, Lines]
) -> Float[Tensor, "batch rows"]:
    """CROWN's lower bounds of C f(x), given the lines of every activation."""
    return backward(graph, graph.output, spec.to(box.lower), lines, box).bound


def bound_margins(
    graph: Graph,
    box: Box,
    spec: Float[Tensor, "batch rows classes"],
    method: Literal["ibp", "crown-ibp", "crown"] = "crown",
    *,
    intersect: bool = True,
) -> Float[Tensor, "batch rows"]:
    """Sound lower bounds of C f(x) over the box.

    Args:
        graph: the network.
        box: the inputs, normalised (see `specification.pixel_box`).
        spec: C, as `margin_spec` makes it.
        method: interval arithmetic; CROWN on its intervals; or CROWN with CROWN's intermediate bounds.
        intersect: see `crown_intervals`.

    """
    spec = spec.to(box.lower)
    if not len(box):
        return spec.new_zeros(spec.shape[:2])
    with exact_arithmetic():
        if method == "ibp":
            return ibp_margins(graph, box, spec)
        if method == "crown-ibp":
            return crown_margins(graph, box, spec, relaxations(graph, ibp(graph, box)[0]))
        _, lines = crown_intervals(graph, box, intersect=intersect)
        return crown_margins(graph, box, spec, lines)
