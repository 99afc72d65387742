"""Training under a fixed mask (section 2.1): w * M, from the first step to the last.

A mask is a dictionary from weight names to boolean tensors of the weights' shapes. Biases and normalisation are never
masked, and neither are ghost skips.
"""

import copy
import warnings
from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.func import functional_call

from tenfold_tost.skips import GhostSkip

Masks = dict[str, Tensor]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def prunable_weights(model: nn.Module, linear: bool = False) -> dict[str, nn.Parameter]:
    """The weights of all convolutions, and of the linear layers where asked for, by name; ghost skips left out.

    Raises:
        ValueError: there is none.
    """
    kinds = (*CONVOLUTIONS, nn.Linear) if linear else CONVOLUTIONS
    ghosts = {id(m) for skip in model.modules() if isinstance(skip, GhostSkip) for m in skip.modules()}
    found = {
        f"{name}.weight" if name else "weight": module.get_parameter("weight")
        for name, module in model.named_modules()
        if isinstance(module, kinds) and id(module) not in ghosts
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no {'convolution or linear layer' if linear else 'convolution'} to prune."
        )
    return found


def check_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Refuse masks that do not belong to a model, and warn of layers that they leave without any weight; whether anything
    passes by those is for `check_flow`.

    Raises:
        ValueError: naming every layer that does not fit.

    """
    weights = prunable_weights(model, linear=True)
    misfits = [f"the model has no weight {name}" for name in masks if name not in weights]
    misfits += [
        f"{name} has shape {tuple(weights[name].shape)}, its mask {tuple(mask.shape)}"
        for name, mask in masks.items()
        if name in weights and weights[name].shape != mask.shape
    ]
    if not masks:
        misfits = ["it masks no weight at all"]
    if misfits:
        shown = "; ".join(misfits[:8]) + (f"; and {len(misfits) - 8} more" if len(misfits) > 8 else "")
        raise ValueError(f"The mask does not fit the {type(model).__name__}: {shown}.")
    empty = emptied(masks)
    if empty:  # of one place in the code, so that a run that checks its mask in several is told once
        warnings.warn(f"The mask leaves no weight in {', '.join(empty)}: nothing passes there.", stacklevel=1)


def emptied(masks: Mapping[str, Tensor]) -> list[str]:
    """The layers of which no weight remains."""
    return [name for name, mask in masks.items() if not bool(mask.any())]


def check_flow(model: nn.Module, masks: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    """Refuse masks under which nothing of the input reaches the output. A layer without weights does not cut a network
    that goes around it, as residual ones do.

    Every weight that remains is taken as one and every shift as zero, so that paths only add up, and what a layer puts
    out is brought to at most one, so that depth neither overflows nor vanishes.

    Args:
        model: without ghosts; it is not changed.
        masks: that fit it.
        shape: of one input, without the batch dimension.

    Raises:
        ValueError: naming the layers that are fully masked.

    """
    model = copy.deepcopy(model).eval()
    for layer in prunable_weights(model, linear=True):
        model.get_submodule(layer.rpartition(".")[0]).register_forward_hook(
            lambda module, inputs, output: output / output.detach().abs().amax().clamp(min=1e-30)
        )
    state = {n: torch.full_like(p, float(not n.endswith("bias"))) for n, p in model.named_parameters()}
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            state[name] = torch.full_like(buffer, float(name.endswith("running_var")))
    state |= {name: mask.to(state[name]) for name, mask in masks.items()}
    example = next(model.parameters()).new_ones((1, *shape)).requires_grad_()
    (gradient,) = torch.autograd.grad(functional_call(model, state, (example,)).sum(), example)
    if not bool(gradient.any()):
        empty = emptied(masks)
        where = f"leaves no weight in {', '.join(empty)}, and" if empty else "is such that"
        raise ValueError(
            f"The mask {where} nothing of the input reaches the output: lower the sparsity, or prune layer by layer."
        )


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """W <- w * M, in place. Raises ValueError like `check_masks`."""
    check_masks(model, masks)
    weights = prunable_weights(model, linear=True)
    for name, mask in masks.items():
        weights[name].mul_(mask.to(weights[name].device))


class MaskKeeper:
    """Keeps pruned weights at zero: masks the gradients before a step and the weights after it.

    Momentum that starts at zero, masked gradients and weight decay on zeros leave pruned weights at exactly zero, so
    the second product changes nothing; it is there as a guard and costs one pass over the weights.

    Args:
        model: the module itself, not a wrapper around it.
        masks: weight name -> mask.

    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        check_masks(model, masks)
        weights = prunable_weights(model, linear=True)
        self.weights: list[Tensor] = [weights[name] for name in masks]
        self.masks = [mask.to(w.device, w.dtype) for mask, w in zip(masks.values(), self.weights, strict=True)]

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """G <- g * M; weights without a gradient (frozen, or not reached) are passed over."""
        found = [(w.grad, mask) for w, mask in zip(self.weights, self.masks, strict=True) if w.grad is not None]
        if found:
            torch._foreach_mul_([gradient for gradient, _ in found], [mask for _, mask in found])

    @torch.no_grad()
    def mask_weights(self) -> None:
        """W <- w * M."""
        torch._foreach_mul_(self.weights, self.masks)


@torch.no_grad()
def mask_gradients_by_zeros(model: nn.Module) -> None:
    """The released convention: the mask is where the current convolution weights are not zero, at every step anew.

    A surviving weight that becomes exactly zero is dead from then on.
    """
    for weight in prunable_weights(model).values():
        if weight.grad is not None:
            weight.grad.mul_(weight != 0)


def masks_from_zeros(model: nn.Module, linear: bool = False) -> Masks:
    """The mask that a pruned state dict implies: where the weights are not zero."""
    return {name: weight.detach() != 0 for name, weight in prunable_weights(model, linear).items()}


def density(masks: Mapping[str, Tensor]) -> float:
    """Fraction of the masked weights that remains."""
    return sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


def hamming_distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Fraction of entries in which two sets of masks of the same layers differ (section 9).

    Raises:
        ValueError: the two name different layers.

    """
    if first.keys() != second.keys():
        odd = ", ".join(sorted(first.keys() ^ second.keys()))
        raise ValueError(f"The masks are of different layers: {odd} is in one of them only.")
    differing = sum(int((first[name].bool() ^ second[name].bool()).sum()) for name in first)
    return differing / sum(mask.numel() for mask in first.values())


def relaxed_zero_filters(
    weights: Iterable[Tensor], epsilon: float = 1e-5, threshold: float = 0.9
) -> tuple[int, int, int]:
    """(filters, filters of which more than `threshold` of the weights are below `epsilon`, weights below `epsilon`).

    Args:
        weights: convolution weights, [out, in, *kernel] each.
        epsilon: what counts as zero.
        threshold: the fraction of zeros above which a filter counts.

    """
    filters = zero = entries = 0
    for weight in weights:
        small: Bool[Tensor, "out rest"] = weight.detach().abs().flatten(1) < epsilon
        filters += len(small)
        zero += int((small.double().mean(1) > threshold).sum())
        entries += int(small.sum())
    return filters, zero, entries
