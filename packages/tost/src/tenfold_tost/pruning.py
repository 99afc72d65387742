"""How masks are made (section 2.6): by magnitude in rounds, by a score at initialisation, or at random.

Two conventions of the released code are kept apart. The lottery-ticket cut ranks convolutions alone and removes one
weight more than the fraction says; the foresight cut keeps what lies strictly above the k-th smallest score.
"""

import copy
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from tenfold_tost.lrsi import Batch, LossFn
from tenfold_tost.masking import Masks, prunable_weights

Scope = Literal["global", "layer"]
Scores = dict[str, Tensor]


def check_density(density: float) -> None:
    """Raise ValueError unless the density, the fraction of weights that *remains*, lies in (0, 1]."""
    if not 0.0 < density <= 1.0:
        raise ValueError(f"The density is the fraction of weights that remains and lies in (0, 1], got {density}.")


# -- lottery tickets ------------------------------------------------------------------------------------------------------


def magnitude_cut(weights: Mapping[str, Tensor], percent: float = 0.2) -> tuple[Masks, float]:
    """One round of global magnitude pruning: (masks, threshold).

    Of N weights, nnz of them not zero, the threshold is the sorted |w| at index N - nnz + int(nnz percent); what is
    strictly above it remains, so one weight more than int(nnz percent) goes.

    Args:
        weights: by name; zeros are pruned already.
        percent: fraction of the survivors to remove, in [0, 1).

    """
    if not 0.0 <= percent < 1.0:
        raise ValueError(f"A round removes a fraction of the survivors in [0, 1), got {percent}.")
    flat = torch.cat([weight.detach().abs().flatten() for weight in weights.values()])
    alive = int(flat.count_nonzero())
    index = flat.numel() - alive + int(alive * percent)
    threshold = _kth(flat, min(index, flat.numel() - 1) + 1)
    return {name: weight.detach().abs() > threshold for name, weight in weights.items()}, float(threshold)


def layerwise_cut(weights: Mapping[str, Tensor], percent: float = 0.1) -> Masks:
    """One round of the released layer-wise ticket: in every tensor what lies below the percentile of its alive |w| goes.

    The percentile interpolates linearly. Released, all parameters named weight take part, gains of normalisations and
    the classifier included; which ones do is the caller's choice here.
    """
    masks = {}
    for name, weight in weights.items():
        magnitude = weight.detach().abs()
        alive = magnitude[magnitude > 0]
        threshold = _quantile(alive, percent) if alive.numel() else magnitude.new_zeros(())
        masks[name] = (magnitude >= threshold) & (magnitude > 0)
    return masks


def _kth(values: Shaped[Tensor, " n"], k: int) -> Shaped[Tensor, ""]:
    """The k-th smallest; by sorting on a GPU, where earlier torch refuses `kthvalue` to `--deterministic`."""
    return values.sort().values[k - 1] if values.is_cuda else values.kthvalue(k).values


def _quantile(values: Float[Tensor, " n"], q: float) -> Float[Tensor, ""]:
    """Linearly interpolated quantile of any number of values (torch.quantile takes no more than 16 million)."""
    place = q * (values.numel() - 1)
    low = math.floor(place)
    below = _kth(values, low + 1)
    above = _kth(values, min(low + 2, values.numel()))
    return below + (above - below) * (place - low)


def ticket_rounds(density: float, percent: float = 0.2) -> list[float]:
    """The fraction of survivors each round removes to come down to a density: `percent`, and less in the last."""
    check_density(density)
    if not 0.0 < percent < 1.0:
        raise ValueError(f"A round removes a fraction of the survivors in (0, 1), got {percent}.")
    rounds, left = [], 1.0
    while left * (1.0 - percent) > density * (1.0 + 1e-9):
        rounds.append(percent)
        left *= 1.0 - percent
    return rounds if left <= density else [*rounds, 1.0 - density / left]


# -- foresight scores -------------------------------------------------------------------------------------------------------


def keep_above(scores: Mapping[str, Tensor], density: float, scope: Scope = "global") -> Masks:
    """Keep what scores strictly above the k-th smallest of the N scores, k = int((1 - density) N); all if k is 0.

    Ties at the threshold all go; it warns where that is more than a hundredth of what should remain.

    Args:
        scores: by weight name; those of pruned weights take part as they are.
        density: fraction that remains.
        scope: rank all layers together, or each by itself.

    """
    masks = _cut(scores, density, scope)
    _warn_of_ties(masks, density)
    return masks


def _cut(scores: Mapping[str, Tensor], density: float, scope: Scope) -> Masks:
    check_density(density)
    groups = [list(scores)] if scope == "global" else [[name] for name in scores]
    masks: Masks = {}
    for names in groups:
        flat = torch.cat([scores[name].flatten() for name in names])
        removed = int((1.0 - density) * flat.numel())
        threshold = _kth(flat, removed) if removed else flat.new_tensor(-torch.inf)
        masks |= {name: scores[name] > threshold for name in names}
    return masks


def _warn_of_ties(masks: Masks, wanted: float) -> None:
    total = sum(mask.numel() for mask in masks.values())
    kept = sum(int(mask.sum()) for mask in masks.values())
    if kept < 0.99 * wanted * total - 1:
        warnings.warn(
            f"Scores tie at the threshold: {kept} weights remain of the {wanted * total:.0f} asked for.", stacklevel=3
        )


def _masked(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    return {name: weight * masks[name].to(weight) if masks else weight for name, weight in weights.items()}


def _leaves(model: nn.Module, linear: bool) -> dict[str, Tensor]:
    return {name: w.detach().clone().requires_grad_() for name, w in prunable_weights(model, linear).items()}


def _summed_gradients(
    model: nn.Module,
    leaves: Mapping[str, Tensor],
    factors: Mapping[str, Tensor] | None,
    batches: Iterable[Batch],
    loss_fn: LossFn,
) -> dict[str, Tensor]:
    """Gradients with respect to the leaves of the loss at the weights leaf * factor, summed over the batches."""
    model = copy.deepcopy(model)  # a forward pass in training mode moves the running statistics
    total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for inputs, labels in batches:
        loss = loss_fn(functional_call(model, _masked(leaves, factors), (inputs,)), labels)
        for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            total[name] += gradient
    return total


def magnitude_scores(model: nn.Module, linear: bool = True) -> Scores:
    """|w|."""
    return {name: weight.detach().abs() for name, weight in prunable_weights(model, linear).items()}


def random_scores(model: nn.Module, linear: bool = True, generator: torch.Generator | None = None) -> Scores:
    """Uniform noise; drawn on the CPU, so that a seed gives the same mask on every device."""
    return {
        name: torch.rand(weight.shape, generator=generator).to(weight.device)
        for name, weight in prunable_weights(model, linear).items()
    }


def snip_scores(
    model: nn.Module,
    batches: Iterable[Batch],
    masks: Mapping[str, Tensor] | None = None,
    *,
    linear: bool = True,
    loss_fn: LossFn = cross_entropy,
) -> Scores:
    """|dL/dM| summed over the batches before the absolute value, normalised to sum 1 over all layers.

    Args:
        model: at initialisation, in the mode (training or evaluation) it is to be scored in; it is not changed.
        batches: (inputs, labels).
        masks: the masks in force; none is a mask of ones.
        linear: score linear layers too.
        loss_fn: (logits, labels) -> mean loss.

    """
    weights = {name: weight.detach() for name, weight in prunable_weights(model, linear).items()}
    leaves = {
        name: (masks[name].to(w, copy=True) if masks else torch.ones_like(w)).requires_grad_()
        for name, w in weights.items()
    }
    total = _summed_gradients(model, leaves, weights, batches, loss_fn)
    everything = torch.stack([score.abs().sum() for score in total.values()]).sum()
    return {name: score.abs() / everything for name, score in total.items()}


def taylor_scores(
    model: nn.Module,
    batches: Iterable[Batch],
    masks: Mapping[str, Tensor] | None = None,
    *,
    linear: bool = True,
    loss_fn: LossFn = cross_entropy,
) -> Scores:
    """|dL/dw w|, the gradient summed over the batches. Arguments as of `snip_scores`."""
    weights = _leaves(model, linear)
    total = _summed_gradients(model, weights, masks, batches, loss_fn)
    return {name: (total[name] * weight).abs().detach() for name, weight in weights.items()}


def grasp_scores(
    model: nn.Module,
    batches: Iterable[Batch],
    masks: Mapping[str, Tensor] | None = None,
    *,
    linear: bool = True,
    temperature: float = 200.0,
    loss_fn: LossFn = cross_entropy,
) -> Scores:
    """Theta (H g) divided by its absolute sum; the largest are kept. g is the gradient summed over all batches, with the
    logits divided by the temperature. Arguments as of `snip_scores`.
    """
    model = copy.deepcopy(model)
    weights = _leaves(model, linear)
    held = list(batches)

    def gradients(batch: Batch, create_graph: bool) -> tuple[Tensor, ...]:
        logits = functional_call(model, _masked(weights, masks), (batch[0],)) / temperature
        return torch.autograd.grad(loss_fn(logits, batch[1]), list(weights.values()), create_graph=create_graph)

    flow = [torch.zeros_like(weight) for weight in weights.values()]
    for batch in held:
        torch._foreach_add_(flow, list(gradients(batch, create_graph=False)))
    product = [torch.zeros_like(weight) for weight in weights.values()]
    for batch in held:
        value = torch.stack(
            [(f * g).sum() for f, g in zip(flow, gradients(batch, create_graph=True), strict=True)]
        ).sum()
        torch._foreach_add_(product, list(torch.autograd.grad(value, list(weights.values()))))
    scores = [(h * w).detach() for h, w in zip(product, weights.values(), strict=True)]
    norm = torch.stack([score.sum() for score in scores]).sum().abs() + 1e-10
    return {name: score / norm for name, score in zip(weights, scores, strict=True)}


def synflow_scores(
    model: nn.Module,
    input_shape: tuple[int, ...],
    masks: Mapping[str, Tensor] | None = None,
    *,
    linear: bool = True,
) -> Scores:
    """|dR/dw w|: R is the sum of the outputs for an input of ones, with every parameter, buffer and mask at its absolute
    value, in double precision (products over depth overflow single precision).

    In training mode, as released, batch norm normalises the one image by itself, which is degenerate where its map is
    a single pixel; in evaluation mode it is not.

    Args:
        model: at initialisation, in the mode it is to be scored in; it is not changed.
        input_shape: (channels, height, width) of one sample.
        masks: the masks in force.
        linear: score linear layers too.

    """
    model = copy.deepcopy(model).double()
    state = {name: tensor.detach().abs() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    weights = _leaves(model, linear)
    ones = next(iter(weights.values())).new_ones((1, *input_shape))
    flow = functional_call(model, _masked(weights, masks), (ones,)).sum()
    gradients = torch.autograd.grad(flow, list(weights.values()))
    return {name: (g * w).abs().detach() for (name, w), g in zip(weights.items(), gradients, strict=True)}


def synflow_masks(
    model: nn.Module,
    density: float,
    input_shape: tuple[int, ...],
    *,
    scope: Scope = "global",
    linear: bool = True,
    iterations: int = 100,
) -> Masks:
    """SynFlow's masks: round i of n scores the network under the masks so far and keeps density^(i / n) of all weights."""
    check_density(density)
    masks: Masks | None = None
    for i in range(iterations):
        scores = synflow_scores(model, input_shape, masks, linear=linear)
        masks = _cut(scores, density ** ((i + 1) / iterations), scope)
    assert masks is not None
    _warn_of_ties(masks, density)
    return masks


# -- random -----------------------------------------------------------------------------------------------------------------


def erk_densities(weights: Mapping[str, Tensor], density: float) -> dict[str, float]:
    """Density of each layer after Erdos-Renyi with kernel sizes: proportional to (sum of the dimensions) / (product), so
    that small layers keep more; layers that would exceed 1 stay dense and the others share what is left.
    """
    check_density(density)
    dense: set[str] = set()
    total = sum(weight.numel() for weight in weights.values())
    while True:
        budget = density * total - sum(weights[name].numel() for name in dense)
        raw = {name: sum(w.shape) / w.numel() for name, w in weights.items() if name not in dense}
        if not raw:
            return dict.fromkeys(weights, 1.0)
        scale = budget / sum(raw[name] * weights[name].numel() for name in raw)
        over = {name for name, value in raw.items() if value * scale > 1.0}
        if not over:
            return {name: 1.0 if name in dense else max(0.0, raw[name] * scale) for name in weights}
        dense |= over


def erk_masks(
    model: nn.Module, density: float, linear: bool = False, generator: torch.Generator | None = None
) -> Masks:
    """Random masks whose layers have the densities of `erk_densities`, exactly up to rounding, one weight at least."""
    weights = prunable_weights(model, linear)
    masks = {}
    for name, share in erk_densities(weights, density).items():
        weight = weights[name]
        kept = max(1, round(share * weight.numel()))
        order = torch.rand(weight.numel(), generator=generator).argsort()
        mask: Bool[Tensor, " n"] = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[order[:kept]] = True
        masks[name] = mask.view(weight.shape).to(weight.device)
    return masks
