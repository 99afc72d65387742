"""Which weights are sparse, and their first masks: SNIP, ERK, uniform (section 2.4)."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

T = TypeVar("T")

Masks = dict[str, Bool[Tensor, "..."]]

#: Layers whose first mask is at least this dense lose the mask and stay dense.
DENSE_FROM = 0.99


def bare_name(name: str) -> str:
    """A parameter's name without the components that wrappers add.

    `torch.compile` adds `_orig_mod` wherever a module is compiled, `DistributedDataParallel` a `module` at the start.
    """
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while parts[0] == "module" and len(parts) > 1:
        parts = parts[1:]
    return ".".join(parts)


def by_bare_name(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Named parameters, buffers or the like by bare name.

    Raises:
        ValueError: two have the same one, so that a mask could not tell them apart.

    """
    found: dict[str, T] = {}
    for name, value in named:
        bare = bare_name(name)
        if bare in found:
            raise ValueError(
                f"two parameters are called {bare!r} once wrappers' prefixes are left out, one of them {name!r}: "
                "rename the submodule 'module'"
            )
        found[bare] = value
    return found


def maskable_parameters(model: nn.Module, only_large_kernels: bool = False) -> dict[str, nn.Parameter]:
    """Every parameter of 2 or 4 dimensions by its bare name: convolutions, depthwise kernels, Linears and the head.

    Args:
        model: any module, wrapped or not.
        only_large_kernels: the rectangles `LoRA1` and `LoRA2` of the large-kernel layers alone.

    Raises:
        ValueError: there is none, or two have the same bare name.

    """
    found = by_bare_name(
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim in {2, 4} and (not only_large_kernels or ".LoRA" in f".{name}")
    )
    if not found:
        kind = "large-kernel rectangle (LoRA1, LoRA2)" if only_large_kernels else "parameter of 2 or 4 dimensions"
        raise ValueError(f"the model has no {kind} to make sparse")
    return found


def check_sparsity(sparsity: float) -> float:
    """The density 1 - sparsity.

    Raises:
        ValueError: the sparsity is not in [0, 1).

    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the share of weights that are zero, in [0, 1); got {sparsity}")
    return 1 - sparsity


def erk_densities(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """Erdős-Rényi-Kernel densities: proportional to `sum(shape) / prod(shape)`, dense tensors set apart until all fit.

    `eps = (sum over the others of d n_l - sum over dense of (1-d) n_l) / sum(raw_l n_l)`; while `eps max(raw) > 1`
    the tensors that attain the maximum become dense.

    Args:
        shapes: of the maskable tensors, in order.
        density: of all of them together, (0, 1].

    Returns:
        One density a shape, in (0, 1].

    """
    sizes = [float(torch.Size(shape).numel()) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    dense: set[int] = set()
    while len(dense) < len(sizes):
        others = [i for i in range(len(sizes)) if i not in dense]
        budget = sum(density * sizes[i] for i in others) - sum((1 - density) * sizes[i] for i in dense)
        epsilon = budget / sum(raw[i] * sizes[i] for i in others)
        largest = max(raw[i] for i in others)
        if epsilon * largest <= 1:
            return [1.0 if i in dense else epsilon * raw[i] for i in range(len(sizes))]
        dense |= {i for i in others if raw[i] == largest}
    return [1.0] * len(sizes)


def snip_scores(
    model: nn.Module,
    images: Float[Tensor, "batch ..."],
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    names: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """`|w dL/dw|` of each maskable weight on one batch, in train mode on a copy: the model is left untouched.

    Args:
        model: the freshly built network.
        images: one training batch without mixup.
        targets: whatever `loss` takes; hard labels for the cross-entropy.
        loss: of the model's output and the targets, a scalar.
        names: the maskable parameters; all by default.

    """
    twin = copy.deepcopy(model).train()
    parameters = maskable_parameters(twin)
    parameters = {name: parameters[name] for name in (parameters if names is None else names)}
    with torch.enable_grad():
        scalar = loss(twin(images), targets)
        gradients = torch.autograd.grad(scalar, list(parameters.values()), materialize_grads=True)
    return {
        name: (weight.detach() * gradient).abs()
        for (name, weight), gradient in zip(parameters.items(), gradients, strict=True)
    }


def snip_keep(scores: Mapping[str, Tensor], density: float) -> Masks:
    """The weights that score strictly above the K-th largest score of all, K = int(total * density)."""
    everything = torch.cat([score.flatten() for score in scores.values()])
    keep = max(1, int(everything.numel() * density))
    threshold = torch.topk(everything, keep, sorted=True).values[-1]
    return {name: score > threshold for name, score in scores.items()}


def snip_densities(scores: Mapping[str, Tensor], density: float) -> dict[str, float]:
    """Layer-wise densities by SNIP: the share of each layer that `snip_keep` keeps."""
    # 1 - (share at or below the threshold), in this order: the released code's rounding decides borderline draws.
    return {name: 1 - float((~kept).sum()) / kept.numel() for name, kept in snip_keep(scores, density).items()}


def bernoulli_masks(
    shapes: Mapping[str, Sequence[int]],
    densities: Mapping[str, float],
    uniform: Callable[[str, Sequence[int]], Tensor],
) -> Masks:
    """Random masks `u < density`, layer by layer; `uniform(name, shape)` draws from [0, 1) in the order of `shapes`."""
    return {name: uniform(name, shape) < densities[name] for name, shape in shapes.items()}


def without_dense(masks: Masks) -> Masks:
    """Leaves out the masks that are at least 99 % dense: those layers stay dense for ever."""
    return {name: mask for name, mask in masks.items() if float(mask.sum()) / mask.numel() < DENSE_FROM}


def initial_masks(
    model: nn.Module,
    sparsity: float = 0.4,
    init: str = "snip",
    batch: tuple[Tensor, Tensor] | None = None,
    only_large_kernels: bool = False,
    seed: int = 0,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Masks:
    """The first masks of a model, by bare parameter name, on the devices of the parameters.

    Args:
        model: any module.
        sparsity: share of zeros over all maskable weights, [0, 1).
        init: `snip` takes only the layer-wise densities from SNIP and draws the positions at random, as the released
            code does; `snip_exact` keeps the positions with the top scores; `erk`; `uniform`; `resume` takes the
            weights that are not zero.
        batch: images and targets, for the two SNIP forms.
        only_large_kernels: see `maskable_parameters`.
        seed: of the random positions, which are drawn on the CPU so that every device draws the same.
        loss: for the two SNIP forms.

    Raises:
        ValueError: sparsity outside [0, 1), an unknown `init`, or SNIP without a batch.

    """
    density = check_sparsity(sparsity)
    parameters = maskable_parameters(model, only_large_kernels)
    if init == "resume":
        return without_dense({name: weight.detach() != 0 for name, weight in parameters.items()})
    if init in {"snip", "snip_exact"}:
        if batch is None:
            raise ValueError(f"init={init!r} scores the weights on one training batch: give batch=(images, targets)")
        scores = snip_scores(model, *batch, loss=loss, names=parameters)
        if init == "snip_exact":
            return without_dense(snip_keep(scores, density))
        densities = snip_densities(scores, density)
    elif init == "erk":
        values = erk_densities([tuple(weight.shape) for weight in parameters.values()], density)
        densities = dict(zip(parameters, values, strict=True))
    elif init == "uniform":
        densities = dict.fromkeys(parameters, density)
    else:
        raise ValueError(f"unknown mask initialisation {init!r}: choose snip, snip_exact, erk, uniform or resume")
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tuple(weight.shape) for name, weight in parameters.items()}
    masks = bernoulli_masks(shapes, densities, lambda _, shape: torch.rand(tuple(shape), generator=generator))
    return without_dense({name: mask.to(parameters[name].device) for name, mask in masks.items()})
