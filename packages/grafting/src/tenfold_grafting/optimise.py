"""alpha-CROWN (section 2.6): the slopes of the lower lines are free in [0, 1], and gradient ascent chooses them.

Every value of alpha gives a sound bound, so the best bound seen is kept for every image and margin by itself.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold_grafting.arithmetic import exact_arithmetic
from tenfold_grafting.backward import backward
from tenfold_grafting.bounds import neuron_bounds
from tenfold_grafting.graph import Graph
from tenfold_grafting.intervals import Box, Intervals
from tenfold_grafting.relaxation import Lines, relax
from tenfold_shared.errors import UserError


@dataclasses.dataclass
class AlphaSettings:
    """How alpha is optimised: projected Adam."""

    iterations: int = 20
    """Bounds that are computed; the first has the adaptive slopes, so there is one step fewer."""
    lr: float = 0.1
    """Step size of Adam."""
    decay: float = 0.98
    """Factor on the step size after every iteration."""
    scope: Literal["final", "joint"] = "final"
    """What `verify` optimises: the margins' slopes over fixed intermediate bounds, or jointly those of every intermediate
    bound too (`alpha_crown_joint`; in double precision, for small networks)."""

    def __post_init__(self) -> None:
        """Refuse what gives no bound."""
        if self.iterations < 1 or self.lr < 0 or self.decay <= 0:
            raise UserError(
                "alpha-CROWN takes 1 or more iterations, a step size of 0 or more and a factor on it above 0, "
                f"got {self.iterations}, {self.lr} and {self.decay}"
            )


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
    until: Tensor | float | None = None,
    deadline: float = float("inf"),
) -> Optimised:
    """alpha-CROWN with fixed intermediate bounds (scope "final"): own slopes for every image and margin.

    Args:
        graph: the network.
        box: the inputs.
        spec: C.
        intervals: pre-activation intervals, as `bounds.crown_intervals` gives them.
        settings: of the optimisation.
        until: stop when all bounds lie above it; for all rows, or of each [rows].
        deadline: stop with the bounds there are when `time.monotonic` is past it.

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
            if time.monotonic() > deadline or (until is not None and bool((best > until).all())):
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
    return backward(graph, graph.output, spec, lines, box).bound


def _ascend(bound: Callable[[], Tensor], parameters: list[Tensor], settings: AlphaSettings) -> Iterator[Tensor]:
    """Bounds along projected gradient ascent on their sum; parameters are slopes, kept in [0, 1]."""
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
    *,
    deadline: float = float("inf"),
) -> Optimised:
    """alpha-CROWN with scope "joint": the intermediate bounds are optimised too, for the sum of the final ones.

    Both ends of every unstable neuron's interval have slopes of their own for all activations before; they are computed
    anew in each iteration, and gradients flow through them. An interval is never looser than the one given, and the
    tightest that was met is kept. The memory is quadratic in the neurons: it is for small networks. Arguments are those
    of `alpha_crown`.
    """
    settings = settings or AlphaSettings()
    problem = _Joint(graph, box, spec.to(box.lower), intervals)
    best = box.lower.new_full(spec.shape[:2], -torch.inf)
    kept = {i: problem.slopes[graph.output, i].detach().clone() for i in problem.unstable}
    with exact_arithmetic():
        for value in _ascend(problem.bound, list(problem.slopes.values()), settings):
            better = value > best
            best = torch.where(better, value, best)
            for i, alpha in kept.items():
                wide = better.reshape(*better.shape, *(1 for _ in alpha.shape[2:]))
                kept[i] = torch.where(wide, problem.slopes[graph.output, i].detach(), alpha)
            if time.monotonic() > deadline:
                break
    return Optimised(best, kept, problem.tight)


class _Joint:
    """The bound as a function of all slopes, those of the intermediate bounds included."""

    def __init__(self, graph: Graph, box: Box, spec: Tensor, intervals: Intervals):
        self.graph, self.box, self.spec, self.root = graph, box, spec, intervals
        self.tight = {i: (lower.clone(), upper.clone()) for i, (lower, upper) in intervals.items()}
        wanted = {i: graph.activation(i).unstable(*interval).flatten(1) for i, interval in intervals.items()}
        self.unstable = [i for i, mask in wanted.items() if bool(mask.any())]
        self.neurons = {i: _chosen(wanted[i]) for i in self.unstable}
        self.slopes: dict[tuple[int, int], Tensor] = {}
        adaptive = {i: relax(graph.activation(i), *intervals[i]).lower_slope.detach() for i in self.unstable}
        for start in [*self.unstable, graph.output]:
            rows = spec.shape[1] if start == graph.output else 2 * self.neurons[start].shape[1]
            for i in self.unstable:
                if i < start:
                    wide = adaptive[i][:, None].repeat(1, rows, *(1 for _ in adaptive[i].shape[1:]))
                    self.slopes[start, i] = wide.requires_grad_()

    def bound(self) -> Tensor:
        """The margins with the present slopes."""
        current: Intervals = {}
        base: dict[int, Lines] = {}
        for index, interval in self.root.items():
            current[index] = interval
            if index in self.unstable and any(i < index for i in self.unstable):
                current[index] = self._recomputed(index, current, base)
            base[index] = relax(self.graph.activation(index), *current[index])
        output = self.graph.output
        return backward(self.graph, output, self.spec, self._lines(output, current, base), self.box).bound

    def _lines(self, start: int, current: Intervals, base: dict[int, Lines]) -> dict[int, Lines]:
        lines = dict(base)
        for i, line in base.items():
            if (start, i) in self.slopes:
                crossing = self.graph.activation(i).unstable(*current[i])[:, None]
                slope = torch.where(crossing, self.slopes[start, i], line.lower_slope[:, None])
                lines[i] = line._replace(lower_slope=slope)
        return lines

    def _recomputed(self, index: int, current: Intervals, base: dict[int, Lines]) -> tuple[Tensor, Tensor]:
        """Both ends of the intervals of an activation's unstable neurons, never looser than at the root."""
        neurons = self.neurons[index]
        count = neurons.shape[1]
        signs = torch.cat([torch.ones_like(neurons), -torch.ones_like(neurons)], 1).to(self.box.lower)
        lines = self._lines(index, current, base)
        source = self.graph.nodes[index].inputs[0]
        found = neuron_bounds(self.graph, self.box, source, torch.cat([neurons, neurons], 1), signs, lines, 1 << 62)
        low, high = (end.flatten(1) for end in self.root[index])
        # The tighter of the two ends has its value; the gradient is that of the recomputed end in any case, which starts
        # out equal to the root's: at a tie, or just below it, a maximum's own gradient would leave it there for good.
        below, above = found[:, :count], -found[:, count:]
        below = below + (torch.maximum(below, low.gather(1, neurons)) - below).detach()
        above = above + (torch.minimum(above, high.gather(1, neurons)) - above).detach()
        lower, upper = low.scatter(1, neurons, below), high.scatter(1, neurons, above)
        shape = self.root[index][0].shape
        lower, upper = lower.view(shape), upper.view(shape)
        with torch.no_grad():
            held = self.tight[index]
            self.tight[index] = (torch.maximum(held[0], lower), torch.minimum(held[1], upper))
        return lower, upper


def _chosen(mask: Tensor) -> Tensor:
    """Numbers of the neurons of a mask [batch, n], as many for every image as the fullest has: [batch, rows]."""
    count = int(mask.sum(1).max())
    return mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
