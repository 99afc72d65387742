"""Which neuron to split (section 2.6): BaBSR scores, and their filtered variants FSB and kFSB.

Grafted, stable and split neurons are never candidates.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tenfold_grafting.domains import Domains, Problem, evaluate, split_intervals
from tenfold_grafting.graph import Graph
from tenfold_grafting.operations import Add, Conv, Linear, Reshape

Rule = Literal["babsr", "fsb", "kfsb"]
Reduce = Literal["min", "max"]

USELESS = {"babsr": 1e-3, "fsb": 1e-4, "kfsb": 1e-4}
"""Scores up to this are no reason to split; the backup score decides then."""
INVALID = -1e6


def layer_bias(graph: Graph, activation: int) -> Tensor:
    """p: the constant of the affine layer that feeds an activation (over a sum, both constants), [*shape] or scalar."""
    return _bias(graph, graph.nodes[activation].inputs[0])


def _bias(graph: Graph, index: int) -> Tensor:
    node = graph.nodes[index]
    if isinstance(node, Conv):
        return node.bias[:, None, None]
    if isinstance(node, Linear):
        return node.bias
    if isinstance(node, Add):
        return _bias(graph, node.inputs[0]) + _bias(graph, node.inputs[1])
    if isinstance(node, Reshape):
        return _bias(graph, node.inputs[0]).expand(graph.nodes[node.inputs[0]].shape).reshape(node.shape)
    return torch.zeros((), dtype=graph.dtype, device=graph.device)


def babsr_scores(
    problem: Problem, domains: Domains, reduce: Reduce = "min"
) -> tuple[Float[Tensor, "domains neurons"], Float[Tensor, "domains neurons"], Float[Tensor, " domains"]]:
    """BaBSR's score and its backup for every unstable neuron of the root, and the bounds of the domains.

    With A the coefficients after the activation, d the upper slope and p the layer's bias: t = min(A, 0) (-l d),
    q = reduce(p A (d - 1), p A d), score = |q + t|; the backup is -t, so that larger is better in both. Neurons that
    cannot be split have minus infinity.
    """
    observed: dict[int, Tensor] = {}
    bounds = evaluate(problem, domains, observed).bound
    intervals = split_intervals(problem, domains.signs)
    score = problem.row.new_full((len(domains), problem.size), -torch.inf)
    backup = score.clone()
    for index, (neurons, part) in problem.slots.items():
        a = (
            observed[index][:, 0]
            if index in observed
            else problem.row.new_zeros(len(domains), *problem.graph.nodes[index].shape)
        )
        lower, upper = intervals[index]
        slope = upper.clamp(min=0) / (upper.clamp(min=0) - lower.clamp(max=0)).clamp(min=1e-12)
        bias = layer_bias(problem.graph, index)
        t = a.clamp(max=0) * (-lower * slope)
        options = (bias * a * (slope - 1), bias * a * slope)
        q = torch.minimum(*options) if reduce == "min" else torch.maximum(*options)
        score[:, part] = (q + t).abs().flatten(1)[:, neurons]
        backup[:, part] = -t.flatten(1)[:, neurons]
    decided = domains.signs != 0
    return score.masked_fill(decided, -torch.inf), backup.masked_fill(decided, -torch.inf), bounds


def choose_neurons(
    problem: Problem, domains: Domains, rule: Rule = "kfsb", *, candidates: int = 3, reduce: Reduce = "min"
) -> Int[Tensor, " domains"]:
    """The neuron at which to split every domain, numbered as in the domains' vectors; -1 where all are decided."""
    score, backup, _ = babsr_scores(problem, domains, reduce)
    useless = score.amax(1) <= USELESS[rule]
    plain = torch.where(useless[:, None], backup, score)
    chosen = plain.argmax(1)
    if rule != "babsr":
        chosen = _filtered(problem, domains, score, backup, chosen, rule, candidates, reduce)
    undecided = domains.signs == 0
    latest = problem.size - 1 - undecided.flip(1).to(torch.int8).argmax(1)  # last layer first
    valid = undecided.gather(1, chosen[:, None])[:, 0]
    chosen = torch.where(valid, chosen, latest)
    return torch.where(undecided.any(1), chosen, -1)


def _filtered(
    problem: Problem,
    domains: Domains,
    score: Tensor,
    backup: Tensor,
    fallback: Tensor,
    rule: Rule,
    candidates: int,
    reduce: Reduce,
) -> Tensor:
    """Of the best by score and by backup, the one whose two children have the best bounds with unchanged alpha."""
    parts = [slice(0, problem.size)] if rule == "kfsb" else [part for _, part in problem.slots.values()]
    options = []
    for part in parts:
        for values in (score[:, part], backup[:, part]):
            options.append(values.topk(min(candidates, values.shape[1]), 1).indices + part.start)
    option = torch.cat(options, 1)
    count = option.shape[1]
    rows = torch.arange(len(domains), device=option.device).repeat_interleave(count)
    parents = domains[rows]
    children = parents.split(option.flatten())
    bounds = evaluate(problem, children).bound.view(2, len(domains), count)
    value = bounds.amin(0) if reduce == "min" else bounds.amax(0)
    valid = domains.signs.gather(1, option) == 0
    value = torch.where(valid, value, INVALID)
    best = value.argmax(1, keepdim=True)
    found = option.gather(1, best)[:, 0]
    return torch.where(valid.any(1), found, fallback)
