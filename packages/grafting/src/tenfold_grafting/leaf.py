"""Exact answers where all neurons are decided, and for small networks at the root: linear and mixed-integer programs.

The network is linear on a leaf, so the smallest margin is a linear program; HiGHS, the solver in SciPy, solves it, and
its dual values are used as beta in a bound of our own, so that nothing rests on the solver's tolerances.
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tenfold_grafting.backward import input_coefficients
from tenfold_grafting.domains import Domains, Problem, domain_lines
from tenfold_grafting.graph import Graph
from tenfold_grafting.intervals import Box, Intervals
from tenfold_grafting.operations import Activation, Add, Affine, Input
from tenfold_shared.errors import UserError

OUT_OF_TIME = 1
"""SciPy's status of a solver that met its limit."""
MILP_VALUES = 4000
"""Largest number of values at all nodes for a mixed-integer program, whose matrix has about its square."""


@dataclasses.dataclass
class Leaf:
    """What is known about a leaf: ``verified``, ``falsified`` with a point, or ``unknown`` (within rounding of 0)."""

    status: Literal["verified", "falsified", "unknown"]
    point: Tensor | None = None
    bound: float = -float("inf")
    duals: Tensor | None = None
    """Multipliers of the decided neurons, as they lie in a domain's vectors, from which the bound was recomputed."""
    empty: bool = False
    """Whether no point has the leaf's signs."""


def _affine(problem: Problem, signs: Tensor, node: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(G, h): the rows of a node's value as G x + h on the leaf, exact where every neuron before is decided."""
    zero = problem.row.new_zeros(1, problem.size)
    lines = domain_lines(problem, signs, zero, zero)
    bare = {i: line._replace(shift=None) for i, line in lines.items()}
    coefficients, constant = input_coefficients(problem.graph, node, rows, bare)
    assert isinstance(coefficients, Tensor)
    return coefficients[0].flatten(1), constant[0]


def solve_leaf(problem: Problem, domains: Domains) -> Leaf:
    """The answer for one fully decided domain, in double precision.

    First the largest t with s_i z_i >= t for all decided neurons: if it is negative the leaf is empty. Then the
    smallest margin. Both conclusions are drawn from bounds recomputed from the solver's dual values.
    """
    from scipy.optimize import linprog  # noqa: PLC0415 - slow to import, needed at leaves only

    signs = domains.signs
    target, offset = _affine(problem, signs, problem.graph.output, problem.row)
    offset = offset + problem.constant
    gradients, constants = [], []
    for index, (neurons, part) in problem.slots.items():
        source = problem.graph.nodes[index].inputs[0]
        shape = problem.graph.nodes[source].shape
        unit = torch.nn.functional.one_hot(neurons, torch.Size(shape).numel()).to(problem.row)
        sign = signs[0, part].to(problem.row)
        g, h = _affine(problem, signs, source, (unit * sign[:, None]).view(1, -1, *shape))
        gradients.append(g)
        constants.append(h)
    inputs = target.shape[1]
    g = torch.cat(gradients) if gradients else target.new_zeros(0, inputs)
    h = torch.cat(constants) if constants else target.new_zeros(0)
    lower, upper = problem.box.lower.flatten().cpu(), problem.box.upper.flatten().cpu()
    target, offset, g, h = target.cpu(), offset.cpu(), g.cpu(), h.cpu()
    limits = list(zip(lower.tolist(), upper.tolist(), strict=True))

    def dual_bound(row: Tensor, constant: Tensor, duals: Tensor) -> float:
        """Min over the box of (row - duals G) x + constant - duals h: sound for any duals >= 0."""
        reduced = row - duals @ g
        least = torch.where(reduced > 0, reduced * lower, reduced * upper).sum()
        return float(least + constant - duals @ h)

    if len(g):
        scale = g.abs().amax(1).clamp(min=1e-12)
        wide = np.concatenate([-(g / scale[:, None]).numpy(), np.ones((len(g), 1))], 1)
        cost = np.zeros(inputs + 1)
        cost[-1] = -1.0
        found = linprog(cost, A_ub=wide, b_ub=(h / scale).numpy(), bounds=[*limits, (None, 1.0)], method="highs")
        if found.status == 0 and found.fun > 0:  # t < 0 at best: no point satisfies all signs
            duals = torch.from_numpy(-np.minimum(found.ineqlin.marginals, 0.0)) / scale
            # sum duals (g x + h) < 0 everywhere on the box, though every factor should be >= 0
            least = dual_bound(target.new_zeros(inputs), target.new_zeros(()), duals)
            if least > 0:
                return Leaf("verified", bound=float("inf"), duals=duals, empty=True)
    best = linprog(
        target[0].numpy(),
        A_ub=-g.numpy() if len(g) else None,
        b_ub=h.numpy() if len(g) else None,
        bounds=limits,
        method="highs",
    )
    if best.status != 0:
        return Leaf("unknown")
    duals = torch.from_numpy(-np.minimum(best.ineqlin.marginals, 0.0)) if len(g) else target.new_zeros(0)
    bound = dual_bound(target[0], offset[0], duals)
    if bound > 0:
        return Leaf("verified", bound=bound, duals=duals)
    point = torch.minimum(torch.maximum(torch.from_numpy(best.x), lower), upper).view(problem.box.lower.shape)
    there = problem.graph.values(point.to(problem.row.device))[-1]
    margin = float(there @ problem.row[0, 0] + problem.constant)
    return Leaf("falsified", point, bound) if margin < 0 else Leaf("unknown", point, bound)


def milp_minimum(
    graph: Graph, box: Box, row: Tensor, intervals: Intervals, seconds: float = float("inf")
) -> tuple[float, Tensor]:
    """The exact minimum of a margin over a box by a mixed-integer program (HiGHS): ground truth for tiny networks.

    Every node's values are variables; an unstable ReLU has a binary one and the big-M constraints of its interval. The
    value is exact to the solver's tolerances.

    Args:
        graph: in double precision.
        box: one box.
        row: the margin's coefficients of the logits, [classes].
        intervals: sound pre-activation intervals.
        seconds: how long the solver may take.

    Returns:
        The minimum, and a normalised input at which it is taken, of the box's shape.

    Raises:
        UserError: more than `MILP_VALUES` values in the network.
        TimeoutError: no optimum in the time given.
        RuntimeError: the solver did not end with an optimum.

    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # noqa: PLC0415

    sizes = [torch.Size(node.shape).numel() for node in graph.nodes]
    if sum(sizes) > MILP_VALUES:
        raise UserError(
            f"a mixed-integer program is for networks of up to {MILP_VALUES} values at their nodes, "
            f"this one has {sum(sizes)}: choose another --verify.method"
        )
    starts = np.concatenate([[0], np.cumsum(sizes)])
    unstable = {
        i: graph.activation(i).unstable(*intervals[i]).flatten().nonzero(as_tuple=True)[0].tolist() for i in intervals
    }
    binary = int(starts[-1])
    total = binary + sum(map(len, unstable.values()))
    low, high = np.full(total, -np.inf), np.full(total, np.inf)
    low[: sizes[0]], high[: sizes[0]] = box.lower.flatten().numpy(), box.upper.flatten().numpy()
    matrices, lows, highs = [], [], []

    def constrain(entries: Iterable[tuple[int, float]], least: float, most: float) -> None:
        line = np.zeros(total)
        for place, value in entries:
            line[place] += value  # a sum may read one node twice
        matrices.append(line)
        lows.append(least)
        highs.append(most)

    for index, node in enumerate(graph.nodes):
        start, before = int(starts[index]), [int(starts[i]) for i in node.inputs]
        if isinstance(node, Input):
            continue
        if isinstance(node, Add):
            for k in range(sizes[index]):
                constrain([(start + k, 1.0), (before[0] + k, -1.0), (before[1] + k, -1.0)], 0.0, 0.0)
        elif isinstance(node, Activation):
            ends = [end.flatten().tolist() for end in intervals[index]]
            for k in range(sizes[index]):
                y, z, (least, most) = start + k, before[0] + k, (ends[0][k], ends[1][k])
                grafted = node.mask is not None and bool(node.mask.flatten()[k])
                if grafted and node.slope is not None and node.intercept is not None:
                    slope, shift = float(node.slope.flatten()[k]), float(node.intercept.flatten()[k])
                    constrain([(y, 1.0), (z, -slope)], shift, shift)
                    continue
                if k in unstable[index]:
                    low[binary], high[binary], low[y] = 0.0, 1.0, 0.0
                    constrain([(y, 1.0), (z, -1.0)], 0.0, np.inf)
                    constrain([(y, 1.0), (z, -1.0), (binary, -least)], -np.inf, -least)
                    constrain([(y, 1.0), (binary, -most)], -np.inf, 0.0)
                    binary += 1
                elif least >= 0:
                    constrain([(y, 1.0), (z, -1.0)], 0.0, 0.0)
                else:
                    low[y] = high[y] = 0.0
        else:
            assert isinstance(node, Affine)
            unit = torch.eye(sizes[index], dtype=torch.float64).view(sizes[index], *node.shape)
            matrix = node.transpose(unit).reshape(sizes[index], -1).numpy()
            constant = node.constant(unit)
            for k in range(sizes[index]):
                terms = [(before[0] + int(j), -float(matrix[k, j])) for j in matrix[k].nonzero()[0]]
                shift = 0.0 if constant is None else float(constant[k])
                constrain([(start + k, 1.0), *terms], shift, shift)
    cost = np.zeros(total)
    cost[int(starts[-2]) : int(starts[-1])] = row.numpy()
    integrality = np.zeros(total)
    integrality[int(starts[-1]) :] = 1
    found = milp(
        cost,
        constraints=LinearConstraint(np.stack(matrices), lows, highs),
        bounds=Bounds(low, high),
        integrality=integrality,
        options={"mip_rel_gap": 1e-9, "time_limit": max(seconds, 0.0)},
    )
    if found.status == OUT_OF_TIME:
        raise TimeoutError(f"no optimum in {seconds:.0f} s")
    if not found.success:
        raise RuntimeError(f"the solver stopped without an optimum: {found.message}")
    point = torch.from_numpy(found.x[: sizes[0]]).view(box.lower.shape)
    return float(found.fun), torch.minimum(torch.maximum(point, box.lower), box.upper)
