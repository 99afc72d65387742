"""The importance scores of the methods BiP is compared with (section 8).

Each function takes a model without changing it and returns weight name -> importance, of the weight's shape; larger is
kept. `importance_masks` projects them, `masking.fix_masks` applies the masks:

- random: `random_importance`, then training from the initial weights.
- OMP: `magnitude_importance` of the trained dense model, rewinding to an early snapshot, training.
- IMP: the same in rounds, keeping `imp_keep_schedule`.
- SNIP, GraSP, SynFlow: at initialisation, then training.
- Hydra: `prune_parametrize` and `released.hydra_step`, then fine-tuning.
"""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from tenfold_bip.bilevel import Batch, LossFn
from tenfold_bip.masking import check_budget, prunable_weights
from tenfold_bip.projections import Projection, check_keep

SYNFLOW_ROUNDS = 100


def importance_masks(
    importances: Mapping[str, Tensor], keep: float, structure: str = "global", *, p: float = 2.0, min_keep: int = 0
) -> dict[str, Tensor]:
    """Masks (uint8) of the most important weights, by weight name.

    With "filter" and "channel" only convolutions are masked, as in BiP, by the p-norm of their importance.

    Raises:
        ValueError: keep outside (0, 1]; a structure that ranks by a norm with importances of both signs (GraSP); a keep
            ratio so small that some layer is bound to be empty.

    """
    projection = Projection(structure, keep, p, min_keep)
    if projection.convolutions_only:
        importances = {name: i for name, i in importances.items() if i.dim() > 2}
        if any(bool((i < 0).any()) for i in importances.values()):
            raise ValueError(f"structure={structure!r} ranks by norms, which a signed importance has no use for.")
    if not importances:
        raise ValueError(f"structure={structure!r} finds no layer to prune in the model.")
    check_budget(projection, importances.items())
    return dict(zip(importances, projection(list(importances.values())), strict=True))


def _weights(model: nn.Module) -> dict[str, Tensor]:
    weights = {name: getattr(module, attribute) for name, module, attribute in prunable_weights(model)}
    if not weights:
        raise ValueError(f"{type(model).__name__} has no prunable layer (convolution, linear or attention).")
    return weights


def random_importance(model: nn.Module, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Uniform noise; drawn on the CPU, so that a seed gives the same masks on every device."""
    return {n: torch.rand(w.shape, generator=generator).to(w.device) for n, w in _weights(model).items()}


def magnitude_importance(model: nn.Module) -> dict[str, Tensor]:
    """|w|, for OMP and IMP. In a model with masks it is |m * theta|, so what is pruned stays pruned."""
    return {name: weight.detach().abs() for name, weight in _weights(model).items()}


def imp_keep_schedule(keep: float, rate: float = 0.2) -> list[float]:
    """Keep ratios after each round of iterative pruning: each removes `rate` of the survivors, the last stops at keep.

    A round that would remove less than a twentieth of that is left out, so that the paper's ratios, which are powers of
    0.8 in two to four digits (0.262 for 0.8^6), take as many rounds as their power says.

    Raises:
        ValueError: keep outside (0, 1] or rate outside (0, 1).

    """
    check_keep(keep)
    if not 0.0 < rate < 1.0:
        raise ValueError(f"The pruning rate of a round must lie in (0, 1), but it is {rate}.")
    ratios: list[float] = []
    ratio = 1.0 - rate
    while ratio > keep * (1.0 + rate / 20.0):
        ratios.append(ratio)
        ratio *= 1.0 - rate
    return [*ratios, keep]


def snip_importance(model: nn.Module, batches: Iterable[Batch], loss_fn: LossFn = cross_entropy) -> dict[str, Tensor]:
    """|dl/dm| = |theta * dl/dtheta| at m = 1, of the loss summed over one or a few batches.

    Args:
        model: without masks, at initialisation, in the mode (training) it is to be scored in.
        batches: (inputs, targets).
        loss_fn: (outputs, targets) -> mean loss.

    """
    model = copy.deepcopy(model)  # a forward pass in training mode moves the running statistics
    weights = _weights(model)
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for inputs, targets in batches:
        loss = loss_fn(model(inputs), targets)
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
        for name, gradient in zip(weights, gradients, strict=True):
            total[name] += gradient
    return {name: (weight * total[name]).abs().detach() for name, weight in weights.items()}


def grasp_importance(
    model: nn.Module, batches: Iterable[Batch], loss_fn: LossFn = cross_entropy, temperature: float = 200.0
) -> dict[str, Tensor]:
    """Signed theta * (H g), with g and H of the loss at logits / temperature.

    Removing the smallest keeps most of the gradient flow.

    Args:
        model: without masks, at initialisation.
        batches: (inputs, targets); their scores are summed.
        loss_fn: (outputs, targets) -> mean loss.
        temperature: divides the logits.

    """
    model = copy.deepcopy(model)
    weights = _weights(model)
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for inputs, targets in batches:
        loss = loss_fn(model(inputs) / temperature, targets)
        parameters = list(weights.values())
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
        flow = torch.stack([(g.detach() * g).sum() for g in gradients]).sum()
        products = torch.autograd.grad(flow, parameters, allow_unused=True, materialize_grads=True)
        for name, product in zip(weights, products, strict=True):
            total[name] += product
    return {name: (weight * total[name]).detach() for name, weight in weights.items()}


def synflow_masks(
    model: nn.Module,
    keep: float,
    input_shape: tuple[int, ...],
    iterations: int = SYNFLOW_ROUNDS,
    *,
    min_keep: int = 0,
) -> dict[str, Tensor]:
    """SynFlow's masks: `iterations` rounds at keep ratios keep^(i / iterations), each ranking |dR/dtheta * theta|.

    R is the sum of the outputs for an all-ones input with |theta| in place of theta, batch normalisation in evaluation
    mode, in double precision (products over depth overflow single precision). No data is needed.

    Args:
        model: without masks, at initialisation.
        keep: fraction that remains, in (0, 1].
        input_shape: of one sample, without the batch dimension.
        iterations: rounds.
        min_keep: entries every layer keeps at least.

    """
    check_keep(keep)
    model = copy.deepcopy(model).double().eval()
    parameters = {name: parameter.detach().abs() for name, parameter in model.named_parameters()}
    theta = {name: parameters[name] for name in _weights(model)}
    ones = next(iter(theta.values())).new_ones((1, *input_shape))
    masks = {name: torch.ones_like(weight, dtype=torch.uint8) for name, weight in theta.items()}
    for i in range(1, iterations + 1):
        z = {name: (weight * masks[name]).requires_grad_() for name, weight in theta.items()}
        flow = functional_call(model, parameters | z, (ones,)).sum()
        gradients = torch.autograd.grad(flow, list(z.values()), allow_unused=True, materialize_grads=True)
        importances = {name: (g * z[name]).detach() for name, g in zip(z, gradients, strict=True)}
        masks = importance_masks(importances, keep ** (i / iterations), min_keep=min_keep)
    return masks
