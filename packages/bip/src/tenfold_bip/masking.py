"""Masks on the weights of any module, without rewriting it: z = m * theta as a parametrisation.

Each prunable weight (convolutions, linear layers, the projections of attention) becomes theta (the parameter the layer
had), scores s (a second parameter) and a mask m (a uint8 buffer).
The masks of the whole network are computed once, by `set_masks`, and stay until the next call, so a forward pass costs
one multiplication a layer.
Biases and normalisation layers are never masked.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from tenfold_bip.projections import CONVOLUTIONS, Projection, keep_count

M = TypeVar("M", bound=nn.Module)
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class MaskedProduct(torch.autograd.Function):
    """z = m * theta, whose one backward gives the gradients of both variables (section 2.2).

    With g = dl/dz: the gradient of theta is m * g, that of the scores sign(s) * theta * g. The latter is the dense
    straight-through rule (also where m = 0) through m = P_S(|s|).
    Both gradients come from one pass so that data-parallel training averages both; the implicit term follows from them
    (`bilevel.add_implicit_term_`).
    """

    @staticmethod
    def forward(theta: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        """The masked weight."""
        return theta * mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        """Keep the three inputs; theta and s are parameters and m a buffer, so this costs no memory."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of theta and of the scores; differentiable once more."""
        (g,) = grad_outputs
        theta, scores, mask = ctx.saved_tensors
        theta_grad = mask * g if ctx.needs_input_grad[0] else None
        scores_grad = scores.sign() * theta * g if ctx.needs_input_grad[1] else None
        return theta_grad, scores_grad, None


class MaskedWeight(nn.Module):
    """The parametrisation theta -> m * theta of one weight.

    Attributes:
        scores: parameter of the weight's shape, or None when the mask is fixed.
        mask: uint8 buffer of the weight's shape.
        projection: the set S the whole network's masks come from; None when the mask is fixed.
        tied: whether the scores are to share the weight's memory, as in the released code.

    """

    mask: Tensor

    def __init__(
        self, mask: Tensor, scores: Tensor | None = None, projection: Projection | None = None, tied: bool = False
    ) -> None:
        super().__init__()
        self.scores = None if scores is None else nn.Parameter(scores)
        self.register_buffer("mask", mask)
        self.projection = projection
        self.tied = tied

    def forward(self, theta: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The masked weight z."""
        if self.scores is None:
            return theta * self.mask
        return MaskedProduct.apply(theta, self.scores, self.mask)


class MaskedLayer(NamedTuple):
    """One masked weight: its name as in the unmasked model ("conv1.weight"), theta, and its parametrisation."""

    name: str
    theta: nn.Parameter
    masking: MaskedWeight


def prunable_weights(model: nn.Module, convolutions_only: bool = False) -> Iterator[tuple[str, nn.Module, str]]:
    """(name of the weight, module, attribute) of every prunable weight, in `named_modules` order."""
    for prefix, module in model.named_modules():
        attributes: tuple[str, ...] = ()
        if isinstance(module, CONVOLUTIONS) or (isinstance(module, nn.Linear) and not convolutions_only):
            attributes = ("weight",)
        elif isinstance(module, nn.MultiheadAttention) and not convolutions_only:
            attributes = tuple(a for a in ATTENTION_WEIGHTS if getattr(module, a) is not None)
        for attribute in attributes:
            yield f"{prefix}.{attribute}" if prefix else attribute, module, attribute


def prune_parametrize(
    model: M,
    keep: float,
    structure: str = "global",
    *,
    p: float = 2.0,
    min_keep: int = 0,
    scores_init: Literal["weight", "random"] = "weight",
    tie_scores: bool = False,
) -> M:
    """Give every prunable weight of a model scores and a mask, in place, and compute the first masks.

    Args:
        model: any module with Conv1d/2d/3d, Linear or MultiheadAttention layers.
        keep: fraction of the prunable weights that remains, in (0, 1].
        structure: the set S, see `Projection`.
        p: norm that ranks filters and channels.
        min_keep: entries every layer keeps at least ("global" only).
        scores_init: "weight" starts the scores at the weights, so that the first mask is magnitude pruning; "random"
            draws them uniformly (Kaiming, a = sqrt 5).
        tie_scores: let scores and weights share memory as the released code does (section 2.5), instead of cloning.

    Returns:
        The same model. Its parameters now also hold the scores; `split_parameters` separates them.

    Raises:
        ValueError: keep outside (0, 1]; no prunable layer; a model that has masks already; a keep ratio so small that
            some layer is bound to be empty; scores both tied and random.

    """
    projection = Projection(structure, keep, p, min_keep)
    found = list(prunable_weights(model, projection.convolutions_only))
    if not found:
        kind = "convolution" if projection.convolutions_only else "convolution, linear or attention layer"
        raise ValueError(
            f"{type(model).__name__} has no prunable layer: structure={structure!r} needs at least one {kind}."
        )
    if any(parametrize.is_parametrized(module) for _, module, _ in found):
        raise ValueError("The model has masks or other parametrisations already; bake_masks(model) removes masks.")
    if tie_scores and scores_init != "weight":
        raise ValueError("Tied scores share the weights' memory, so scores_init must be 'weight'.")
    check_budget(projection, [(name, getattr(module, attribute)) for name, module, attribute in found])
    for _, module, attribute in found:
        theta = getattr(module, attribute).detach()
        scores = theta if tie_scores else theta.clone()
        if scores_init == "random":
            nn.init.kaiming_uniform_(scores, a=5**0.5)
        parametrize.register_parametrization(
            module, attribute, MaskedWeight(torch.ones_like(theta, dtype=torch.uint8), scores, projection, tie_scores)
        )
    set_masks(model)
    return model


def check_budget(projection: Projection, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse a keep ratio that must leave a layer empty, whatever its weights are.

    Args:
        projection: the set S.
        weights: (name, tensor of its shape) of all weights to be masked.

    Raises:
        ValueError: fewer weights than layers remain, or no unit of a layer.

    """
    weights = list(weights)
    if projection.structure == "global":
        total = sum(weight.numel() for _, weight in weights)
        kept = keep_count(projection.keep, total)
        if kept < len(weights):
            raise ValueError(
                f"Keeping {projection.keep} of {total} weights leaves {kept} for {len(weights)} layers, so "
                "a layer would be empty; raise the keep ratio."
            )
        return
    for name, weight in weights:
        units = {"filter": weight.shape[0], "channel": weight.shape[1]}.get(projection.structure, weight.numel())
        if keep_count(projection.keep, units) == 0:
            raise ValueError(
                f"Keeping {projection.keep} of the {units} units of {name} leaves none; raise the keep ratio."
            )


def masked_layers(model: nn.Module) -> list[MaskedLayer]:
    """Every masked weight of a model in `named_modules` order, through wrappers such as data parallelism.

    Raises:
        ValueError: the model has no masked weight.

    """
    layers = []
    for prefix, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for attribute, chain in module.parametrizations.items():
            for masking in chain:
                if isinstance(masking, MaskedWeight):
                    layers.append(
                        MaskedLayer(f"{prefix}.{attribute}" if prefix else attribute, chain.original, masking)
                    )
    if not layers:
        raise ValueError(f"{type(model).__name__} has no masked layer; call prune_parametrize(model, keep=...) first.")
    return layers


@torch.no_grad()
def set_masks(model: nn.Module) -> None:
    """Recompute all masks from the scores, m = P_S(|s|), once for the whole network (section 2.4). No host
    synchronisation.

    Raises:
        ValueError: the model has no masks, or they are fixed.

    """
    layers = masked_layers(model)
    scores = []
    for layer in layers:
        if layer.masking.scores is None:
            raise ValueError(f"The mask of {layer.name} is fixed and has no scores to be recomputed from.")
        if layer.masking.tied and layer.masking.scores.data_ptr() != layer.theta.data_ptr():
            layer.masking.scores.data = layer.theta.data  # moving or copying a model separates shared memory
        scores.append(layer.masking.scores)
    projection = layers[0].masking.projection
    assert projection is not None, "a layer with scores has the projection it was created with"
    for layer, mask in zip(layers, projection([s.abs() for s in scores]), strict=True):
        layer.masking.mask.copy_(mask)


def set_keep(model: nn.Module, keep: float) -> None:
    """Change the keep ratio of a model with scores and recompute its masks."""
    for layer in masked_layers(model):
        if layer.masking.projection is not None:
            layer.masking.projection = replace(layer.masking.projection, keep=keep)
    set_masks(model)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of both levels, for two optimisers: theta with biases and normalisation; and the scores."""
    scores = [layer.masking.scores for layer in masked_layers(model) if layer.masking.scores is not None]
    identities = {id(score) for score in scores}
    return [parameter for parameter in model.parameters() if id(parameter) not in identities], scores


def get_masks(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the masks (uint8) by weight name."""
    return {layer.name: layer.masking.mask.clone() for layer in masked_layers(model)}


def fix_masks(model: M, masks: Mapping[str, Tensor]) -> M:
    """Give a model fixed masks without scores, in place: what every baseline trains under, and BiP's optional
    fine-tuning.

    Args:
        model: with or without masks; existing ones (and scores) are replaced, theta stays unmasked.
        masks: weight name -> 0/1 tensor of the weight's shape; weights not named stay dense.

    Raises:
        ValueError: a name or a shape that does not fit the model.

    """
    if any(isinstance(module, MaskedWeight) for module in model.modules()):
        _remove(model, leave_parametrized=False)
    weights = {name: (module, attribute) for name, module, attribute in prunable_weights(model)}
    if any(parametrize.is_parametrized(module) for module, _ in weights.values()):
        raise ValueError("The model has other parametrisations on layers to be masked; remove them first.")
    for name, mask in masks.items():
        if name not in weights:
            raise ValueError(f"There is a mask for {name!r}, but the model has no such prunable weight.")
        module, attribute = weights[name]
        weight = getattr(module, attribute)
        if weight.shape != mask.shape:
            raise ValueError(f"The mask of {name} has shape {tuple(mask.shape)}, its weight {tuple(weight.shape)}.")
        parametrize.register_parametrization(
            module, attribute, MaskedWeight(mask.to(weight.device, torch.uint8, copy=True))
        )
    return model


def freeze_masks(model: M) -> M:
    """Keep the current masks for good and drop the scores, in place; theta goes on training under the fixed masks."""
    return fix_masks(model, get_masks(model))


def bake_masks(model: M) -> M:
    """Replace every masked weight by the plain weight z = m * theta, in place; the modules are then as they were."""
    masked_layers(model)
    return _remove(model, leave_parametrized=True)


def _remove(model: M, leave_parametrized: bool) -> M:
    """Undo prune_parametrize or fix_masks, leaving z (masked) or theta as the weights.

    Not with torch's remove_parametrizations: it deletes the property from a class that copies of the module share, so
    that baking a copy would break the original.
    """
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        chains: dict[str, Any] = dict(module.parametrizations.items())  # type: ignore[union-attr, operator]
        if not any(isinstance(masking, MaskedWeight) for chain in chains.values() for masking in chain):
            continue
        for chain in chains.values():
            if leave_parametrized:
                chain.original.data = chain().detach()
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        others = dict(module._parameters)
        module._parameters.clear()
        for attribute, parameter in ({a: chain.original for a, chain in chains.items()} | others).items():
            module.register_parameter(attribute, parameter)
    return model


def kept_per_layer(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Weight name -> (ones of its mask, entries). Synchronises with the host; for reports, not for a step."""
    return {layer.name: (int(layer.masking.mask.sum()), layer.masking.mask.numel()) for layer in masked_layers(model)}


def keep_ratio(model: nn.Module, over: Literal["masked", "all"] = "masked") -> float:
    """Fraction of weights that remains, over the masked weights or over all trainable parameters except the scores.

    Over the masked weights it is one at which `keep_count` gives their number: where it would give one more, for want
    of digits, the fraction is half a weight smaller.
    """
    counts = kept_per_layer(model).values()
    kept, total = sum(k for k, _ in counts), sum(n for _, n in counts)
    if over == "all":
        everything = sum(parameter.numel() for parameter in split_parameters(model)[0])
        return (everything - (total - kept)) / everything
    return kept / total if keep_count(kept / total, total) == kept else (kept - 0.5) / total


def sparsity(model: nn.Module, over: Literal["masked", "all"] = "masked") -> float:
    """1 - `keep_ratio`."""
    return 1.0 - keep_ratio(model, over)


def check_no_empty_layer(model: nn.Module) -> None:
    """Raise ValueError, naming the layers, if the current masks leave a layer without any weight."""
    empty = [name for name, (kept, _) in kept_per_layer(model).items() if kept == 0]
    if empty:
        raise ValueError(
            f"The masks leave no weight in {', '.join(empty)}: raise the keep ratio, or give every "
            "layer a minimum with min_keep."
        )


def reaches_output(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a path of unmasked weights leads from the input of a network to its output.

    Without one the outputs are the same for every input. A layer without weights does not cut a network that goes
    around it, as residual ones do. The network is run with its non-zero weights at one, which keeps every activation on
    a path above zero.

    Args:
        model: with or without masks; it is not changed.
        shape: of one input, without the batch dimension.

    """
    model = copy.deepcopy(model).double().eval()
    if any(isinstance(module, MaskedWeight) for module in model.modules()):
        bake_masks(model)
    state = {name: (parameter.detach() != 0).double() for name, parameter in model.named_parameters()}
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            state[name] = torch.full_like(buffer, float(name.endswith("running_var")))
    example = next(model.parameters()).new_ones((1, *shape)).requires_grad_()
    (gradient,) = torch.autograd.grad(functional_call(model, state, (example,)).sum(), example)
    return bool((gradient != 0).any())


def mask_iou(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Overlap |a and b| / |a or b| of two sets of masks of the same layers, over their concatenation (section 9).

    Raises:
        ValueError: the two name different layers, or one has another shape.

    """
    if a.keys() != b.keys():
        different = sorted(set(a) ^ set(b))
        shown = ", ".join(different[:4]) + (f" and {len(different) - 4} more" if len(different) > 4 else "")
        raise ValueError(f"The masks are of different layers: only one of the two has {shown}.")
    for name, mask in a.items():
        if mask.shape != b[name].shape:
            raise ValueError(
                f"The masks of {name} have the shapes {tuple(mask.shape)} and {tuple(b[name].shape)}, so they are of "
                "different networks."
            )
    both = sum(int((a[name].bool() & b[name].bool()).sum()) for name in a)
    either = sum(int((a[name].bool() | b[name].bool()).sum()) for name in a)
    return both / either if either else 1.0


def expected_iou(keep: float, other: float | None = None) -> float:
    """Expected overlap of two independent random masks, for many weights: k / (2 - k) where both keep k, in general k l
    / (k + l - k l).
    """
    other = keep if other is None else other
    return keep * other / (keep + other - keep * other)


def pack_mask(mask: UInt8[Tensor, "*shape"]) -> UInt8[Tensor, " bytes"]:
    """A mask as bits, most significant first (numpy's packbits order), the last byte filled up with zeros."""
    flat = nn.functional.pad(mask.flatten(), (0, -mask.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(7, -1, -1, device=mask.device, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_mask(packed: UInt8[Tensor, " bytes"], shape: tuple[int, ...]) -> UInt8[Tensor, "..."]:
    """Inverse of `pack_mask`."""
    bits = (packed[:, None] >> torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)) & 1
    return bits.flatten()[: torch.Size(shape).numel()].view(shape)
