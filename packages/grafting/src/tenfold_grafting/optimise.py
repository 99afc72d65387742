"""alpha-CROWN (section 2.6): the slopes of the lower lines are free in [0, 1], and gradient ascent chooses them.

Every value of alpha gives a sound bound, so the best bound seen is kept for every image and margin by itself.
"""

import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold_grafting.bounds import Box, Intervals, backward, exact_arithmetic, neuron_bounds
from tenfold_grafting.graph import Graph
from tenfold_grafting.relaxation import Lines, relax


@dataclasses.dataclass
class AlphaSettings:
    """How alpha is optimised: projected Adam."""

    iterations: int = 20
    """Bounds that are computed; the first has the adaptive slopes, so there is one step fewer."""
    lr: float = 0.1
    """Step size of Adam."""
    decay: float = 0.98
    """Factor on the step size after every iteration."""


@dataclasses.dataclass
class Optimised:
    """The best bounds and what gave them."""

    lower: Float[Tensor, "batch rows"]
    alphas: dict[int, Tensor]
    """Activation's node -> slopes [batch, rows, *shape], the ones of the best bound of each row."""
    intervals: Intervals
    """The pre-activation intervals: those given, or with ``joint`` the tightest that were met."""


def alpha_crown(
    graph: Graph,
    box: Box,
    spec: Float[Tensor, "batch rows classes"],
    intervals: Intervals,
    settings: AlphaSettings | None = None,
    *,
    until: float | None = None,
) -> Optimised:
    """alpha-CROWN with fixed intermediate bounds (scope "final"): own slopes for every image and margin.

    Args:
        graph: the network.
        box: the inputs.
        spec: C.
        intervals: pre-activation intervals, as `bounds.crown_intervals` gives them.
        settings: of the optimisation.
        until: stop when all bounds lie above it.

    """
    settings = settings or AlphaSettings()
    spec = spec.to(box.lower)
    rows = spec.shape[1]
    base = {index: relax(graph.activation(index), *interval) for index, interval in intervals.items()}
    unstable = {i: graph.activation(i).unstable(*interval)[:, None] for i, interval in intervals.items()}
    alphas = {
        i: lines.lower_slope[:, None].repeat(1, rows, *(1 for _ in lines.lower_slope.shape[1:])).requires_grad_()
        for i, lines in base.items()
        if bool(unstable[i].any())
    }
    best = box.lower.new_full(spec.shape[:2], -torch.inf)
    kept = {i: alpha.detach().clone() for i, alpha in alphas.items()}
    with exact_arithmetic():
        for bound in _ascend(lambda: _bound(graph, box, spec, base, unstable, alphas), list(alphas.values()), settings):
            better = bound > best
            best = torch.where(better, bound, best)
            for i, alpha in alphas.items():
                wide = better.reshape(*better.shape, *(1 for _ in alpha.shape[2:]))
                kept[i] = torch.where(wide, alpha.detach(), kept[i])
            if until is not None and bool((best > until).all()):
                break
    return Optimised(best, kept, intervals)


def _bound(
    graph: Graph,
    box: Box,
    spec: Tensor,
    base: dict[int, Lines],
    unstable: dict[int, Tensor],
    alphas: dict[int, Tensor],
) -> Tensor:
    lines = {
        i: line._replace(lower_slope=torch.where(unstable[i], alphas[i], line.lower_slope[:, None]))
        if i in alphas
        else line
        for i, line in base.items()
    }
    return backward(graph, graph.output, spec, lines, box)


def _ascend(bound, parameters: list[Tensor], settings: AlphaSettings) -> Iterator[Tensor]:  # type: ignore[no-untyped-def]
    """Bounds along projected gradient ascent on their sum; parameters are slopes, kept in [0, 1]."""
    if settings.iterations < 1:
        raise ValueError(f"alpha-CROWN takes 1 or more iterations, got {settings.iterations}")
    if not parameters:
        with torch.no_grad():
            yield bound()
        return
    optimiser = torch.optim.Adam(parameters, settings.lr, foreach=True)
    for iteration in range(settings.iterations):
        last = iteration + 1 == settings.iterations
        with torch.set_grad_enabled(not last):
            value = bound()
        yield value.detach()
        if last:
            return
        optimiser.zero_grad(set_to_none=True)
        (-value.sum()).backward()
        optimiser.step()
        for group in optimiser.param_groups:
            group["lr"] *= settings.decay
        with torch.no_grad():
            for parameter in parameters:
                parameter.clamp_(0, 1)


def alpha_crown_joint(
    graph: Graph,
    box: Box,
    spec: Float[Tensor, "batch rows classes"],
    intervals: Intervals,
    settings: AlphaSettings | None = None,
) -> Optimised:
    """alpha-CROWN with scope "joint": the intermediate bounds are optimised too, for the sum of the final ones.

    Every activation's lower and upper bounds have slopes of their own for all activations before (shared by the
    layer's neurons), and are computed anew in each iteration; gradients flow through them. The tightest interval met is
    kept for every neuron, and the last bounds are those of `alpha_crown` on these intervals.
    """
    settings = settings or AlphaSettings()
    spec = spec.to(box.lower)
    starts = [i for i in intervals if bool(graph.activation(i).unstable(*intervals[i]).any())]
    adaptive = {i: relax(graph.activation(i), *intervals[i]).lower_slope for i in intervals}
    slopes = {
        (start, i): torch.stack([adaptive[i], adaptive[i]], 1).detach().requires_grad_()
        for start in [*starts, graph.output]
        for i in starts
        if i < start
    }
    tight = {i: (lower.clone(), upper.clone()) for i, (lower, upper) in intervals.items()}

    def bound() -> Tensor:
        current: Intervals = {}
        for index in intervals:
            lower, upper = tight[index]
            before = [i for i in starts if i < index]
            if index in starts and before:
                lower, upper = _recomputed(graph, box, index, before, current, slopes, tight[index])
                with torch.no_grad():
                    tight[index] = (torch.maximum(tight[index][0], lower), torch.minimum(tight[index][1], upper))
            current[index] = (lower, upper)
        lines = _lines(graph, current, slopes, graph.output, 0)
        return backward(graph, graph.output, spec, lines, box)

    best = box.lower.new_full(spec.shape[:2], -torch.inf)
    with exact_arithmetic():
        for value in _ascend(bound, list(slopes.values()), settings):
            best = torch.maximum(best, value)
    tight = {i: (lower.detach(), upper.detach()) for i, (lower, upper) in tight.items()}
    final = alpha_crown(graph, box, spec, tight, settings)
    return dataclasses.replace(final, lower=torch.maximum(final.lower, best))


def _lines(
    graph: Graph, intervals: Intervals, slopes: dict[tuple[int, int], Tensor], start: int, side: int
) -> dict[int, Lines]:
    return {
        i: relax(graph.activation(i), *interval, slopes[start, i][:, side] if (start, i) in slopes else None)
        for i, interval in intervals.items()
    }


def _recomputed(
    graph: Graph,
    box: Box,
    index: int,
    before: list[int],
    intervals: Intervals,
    slopes: dict[tuple[int, int], Tensor],
    root: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Both ends of the intervals of an activation's unstable neurons with its own slopes, never looser than before."""
    activation = graph.activation(index)
    wanted = activation.unstable(*root).flatten(1)
    count = int(wanted.sum(1).max())
    neurons = wanted.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
    ends = []
    for side, sign in enumerate((1.0, -1.0)):
        lines = _lines(graph, intervals, slopes, index, side)
        signs = root[0].new_full(neurons.shape, sign)
        found = sign * neuron_bounds(graph, box, activation.inputs[0], neurons, signs, lines)
        kept = root[side].flatten(1)
        tighter = torch.maximum if side == 0 else torch.minimum
        ends.append(kept.scatter(1, neurons, tighter(found, kept.gather(1, neurons))).view(root[0].shape))
    return ends[0], ends[1]
