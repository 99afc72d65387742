"""Training under a fixed mask (section 2.1): w * M, from the first step to the last.

A mask is a dictionary from weight names to boolean tensors of the weights' shapes. Biases and normalisation are never
masked, and neither are ghost skips.
"""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Bool
from torch import Tensor, nn

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
    """Refuse masks that do not belong to a model, or that leave a layer without any weight.

    Raises:
        ValueError: naming every layer that does not fit, or that is fully masked.

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
    empty = [name for name, mask in masks.items() if not bool(mask.any())]
    if empty:
        raise ValueError(
            f"The mask leaves no weight in {', '.join(empty)}, so nothing would pass there: lower the sparsity, "
            "or prune layer by layer."
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
