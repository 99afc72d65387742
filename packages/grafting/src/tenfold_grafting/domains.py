"""beta-CROWN (section 2.6): bounds of many subdomains of one problem at once.

A subdomain fixes the sign of some unstable neurons. There the ReLU is the identity or zero, and a multiplier beta >= 0
brings the half-space s z >= 0 into the bound: A <- A - s beta at the pre-activation. Any beta >= 0 is sound. A domain is
three vectors over the root's unstable neurons: signs, alpha, beta.
"""

import dataclasses
import time
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from tenfold_grafting.backward import Lower, backward
from tenfold_grafting.bounds import chunk_elements
from tenfold_grafting.graph import Graph
from tenfold_grafting.intervals import Box, Intervals
from tenfold_grafting.relaxation import Lines, relax
from tenfold_shared.errors import UserError


@dataclasses.dataclass
class Problem:
    """One margin, c f(x) + d > 0 over a box, with the intermediate bounds of the root.

    `slots` numbers the unstable ungrafted neurons: activation's node -> (their numbers in the flattened layer, where
    they lie in a domain's vectors).
    """

    graph: Graph
    box: Box
    row: Float[Tensor, "1 1 classes"]
    constant: float
    intervals: Intervals
    slots: dict[int, tuple[Tensor, slice]]
    size: int

    @classmethod
    def make(cls, graph: Graph, box: Box, row: Tensor, constant: float, intervals: Intervals) -> "Problem":
        """The problem of one row of a specification; box and intervals have a batch of one."""
        slots: dict[int, tuple[Tensor, slice]] = {}
        size = 0
        for index, interval in intervals.items():
            (chosen,) = graph.activation(index).unstable(*interval).flatten(1)[0].nonzero(as_tuple=True)
            if len(chosen):
                slots[index] = (chosen, slice(size, size + len(chosen)))
                size += len(chosen)
        return cls(graph, box, row.reshape(1, 1, -1).to(box.lower), constant, intervals, slots, size)

    def single(self) -> "Problem":
        """The problem in single precision, to optimise in; nothing is claimed from it."""
        intervals = {i: (low.float(), high.float()) for i, (low, high) in self.intervals.items()}
        box = Box(self.box.lower.float(), self.box.upper.float())
        return dataclasses.replace(self, graph=self.graph.single, box=box, row=self.row.float(), intervals=intervals)

    def scattered(self, vectors: Tensor, index: int, missing: float = 0.0) -> Tensor:
        """Vectors of domains as values of a layer's neurons, [domains, *shape]."""
        neurons, part = self.slots[index]
        shape = self.graph.nodes[index].shape
        full = vectors.new_full((len(vectors), torch.Size(shape).numel()), missing)
        return full.index_copy(1, neurons, vectors[:, part]).view(len(vectors), *shape)

    def adaptive(self) -> Float[Tensor, " neurons"]:
        """The slopes that CROWN would take at the root."""
        found = self.row.new_zeros(self.size)
        for index, (neurons, part) in self.slots.items():
            found[part] = relax(self.graph.activation(index), *self.intervals[index]).lower_slope.flatten()[neurons]
        return found


@dataclasses.dataclass
class Domains:
    """Subdomains of a problem: rows of equal length."""

    signs: Int8[Tensor, "domains neurons"]
    """1 where z >= 0, -1 where z <= 0, 0 where the neuron is undecided."""
    alpha: Float[Tensor, "domains neurons"]
    beta: Float[Tensor, "domains neurons"]
    lower: Float[Tensor, " domains"]
    """Bounds of the margin."""

    def __len__(self) -> int:
        """How many."""
        return len(self.signs)

    def __getitem__(self, index: Tensor | slice) -> "Domains":
        """Some of them."""
        return Domains(self.signs[index], self.alpha[index], self.beta[index], self.lower[index])

    @staticmethod
    def joined(parts: Sequence["Domains"]) -> "Domains":
        """All of them in one."""
        fields = [f.name for f in dataclasses.fields(Domains)]
        return Domains(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))

    def split(self, neurons: Tensor) -> "Domains":
        """Both children of every domain, the positive ones first, at the given neuron each; the parent's bounds hold."""
        rows = torch.arange(len(self), device=neurons.device)
        children = []
        for sign in (1, -1):
            signs = self.signs.clone()
            signs[rows, neurons] = sign
            children.append(Domains(signs, self.alpha, self.beta, self.lower))
        return Domains.joined(children)


def split_intervals(problem: Problem, signs: Int8[Tensor, "domains neurons"]) -> Intervals:
    """The root's intervals, cut at 0 where a neuron is decided: [domains, *shape]."""
    intervals: Intervals = {}
    for index, (lower, upper) in problem.intervals.items():
        low, high = (end.expand(len(signs), *end.shape[1:]) for end in (lower, upper))
        if index in problem.slots:
            sign = problem.scattered(signs, index)
            low = torch.where(sign > 0, low.clamp(min=0), low)
            high = torch.where(sign < 0, high.clamp(max=0), high)
        intervals[index] = (low, high)
    return intervals


def domain_lines(
    problem: Problem, signs: Tensor, alpha: Tensor, beta: Tensor, base: dict[int, Lines] | None = None
) -> dict[int, Lines]:
    """The lines of every activation in every domain, with alpha on undecided neurons and s beta on decided ones."""
    base = base or base_lines(problem, signs)
    lines = dict(base)
    for index in problem.slots:
        sign = problem.scattered(signs, index)
        undecided = problem.scattered((signs == 0).to(alpha.dtype), index) > 0
        slope = torch.where(undecided, problem.scattered(alpha, index), base[index].lower_slope)
        shift = sign.to(beta.dtype) * problem.scattered(beta, index)
        lines[index] = base[index]._replace(lower_slope=slope, shift=shift)
    return lines


def base_lines(problem: Problem, signs: Tensor) -> dict[int, Lines]:
    """The default lines in every domain."""
    return {i: relax(problem.graph.activation(i), *ends) for i, ends in split_intervals(problem, signs).items()}


def chunk_size(problem: Problem) -> int:
    """How many domains are bounded at once, so that the coefficients of all layers, and what their gradients need, fit."""
    sizes = [torch.Size(node.shape).numel() for node in problem.graph.nodes]
    if problem.row.device.type == "cuda":
        return max(1, chunk_elements(problem.row) // (2 * sum(sizes)))
    return max(1, chunk_elements(problem.row) // (4 * max(sizes)))


def chunks(problem: Problem, domains: Domains) -> list[Domains]:
    """The domains in parts that are bounded at once."""
    step = chunk_size(problem)
    return [domains[i : i + step] for i in range(0, len(domains), step)]


def evaluate(problem: Problem, domains: Domains, observe: dict[int, Tensor] | None = None) -> Lower:
    """The bounds that the domains' alpha and beta give, [domains], in the problem's arithmetic, a chunk at a time."""
    if observe is None and len(domains) > chunk_size(problem):
        parts = [evaluate(problem, part) for part in chunks(problem, domains)]
        return Lower(*(torch.cat(part) for part in zip(*parts, strict=True)))
    with torch.no_grad():
        alpha, beta = (v.to(problem.row).clamp(0, c) for v, c in ((domains.alpha, 1.0), (domains.beta, torch.inf)))
        lines = domain_lines(problem, domains.signs, alpha, beta)
        rows = problem.row.expand(len(domains), -1, -1)
        found = backward(problem.graph, problem.graph.output, rows, lines, problem.box, observe)
        return Lower(found.bound[:, 0] + problem.constant, found.constant[:, 0])


@dataclasses.dataclass
class BetaSettings:
    """How alpha and beta are optimised together."""

    iterations: int = 20
    """Bounds that are computed."""
    lr_alpha: float = 0.01
    """Adam's step size for the slopes."""
    lr_beta: float = 0.05
    """Adam's step size for the multipliers."""
    decay: float = 0.98
    """Factor on both after every iteration."""

    def __post_init__(self) -> None:
        """Refuse what gives no bound."""
        if self.iterations < 1 or self.lr_alpha < 0 or self.lr_beta < 0 or self.decay <= 0:
            raise UserError(
                "beta-CROWN takes 1 or more iterations, step sizes of 0 or more and a factor on them above 0, "
                f"got {self.iterations}, {self.lr_alpha}, {self.lr_beta} and {self.decay}"
            )


def beta_crown(problem: Problem, domains: Domains, settings: BetaSettings, deadline: float = float("inf")) -> Domains:
    """The domains with better alpha and beta, warm-started, and the best bounds met; never below the given ones.

    The bounds are those of the problem's arithmetic. Once `time.monotonic` is past the deadline, each chunk of domains is
    bounded once more and nothing is optimised.
    """
    if len(domains) > chunk_size(problem):
        return Domains.joined([beta_crown(problem, part, settings, deadline) for part in chunks(problem, domains)])
    alpha = domains.alpha.to(problem.row).clone().requires_grad_()
    beta = domains.beta.to(problem.row).clone().requires_grad_()
    best = domains.lower.to(problem.row).clone()
    kept_alpha, kept_beta = alpha.detach().clone(), beta.detach().clone()
    signs, rows = domains.signs, problem.row.expand(len(domains), -1, -1)
    base = base_lines(problem, signs)
    groups = [{"params": [alpha], "lr": settings.lr_alpha}, {"params": [beta], "lr": settings.lr_beta}]
    optimiser = torch.optim.Adam(groups)
    for iteration in range(settings.iterations):
        last = iteration + 1 == settings.iterations or time.monotonic() > deadline
        with torch.set_grad_enabled(not last):
            lines = domain_lines(problem, signs, alpha, beta, base)
            found = backward(problem.graph, problem.graph.output, rows, lines, problem.box)
            value = found.bound[:, 0] + problem.constant
        better = value.detach() > best
        best = torch.where(better, value.detach(), best)
        first = iteration == 0
        keep = torch.ones_like(better) if first else better
        kept_alpha = torch.where(keep[:, None], alpha.detach(), kept_alpha)
        kept_beta = torch.where(keep[:, None], beta.detach(), kept_beta)
        if last:
            break
        optimiser.zero_grad()
        (-value.sum()).backward()
        optimiser.step()
        for group in optimiser.param_groups:
            group["lr"] *= settings.decay
        with torch.no_grad():
            alpha.clamp_(0, 1)
            beta.clamp_(min=0)
    return Domains(signs, kept_alpha, kept_beta, best)
