"""What a neuron matters and how often it is unstable (section 2.2)."""

from collections.abc import Iterable
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tenfold_grafting.arithmetic import exact_arithmetic
from tenfold_grafting.bounds import crown_intervals
from tenfold_grafting.grafting import activation_modules, pre_activations
from tenfold_grafting.graph import Graph, trace
from tenfold_grafting.intervals import ibp
from tenfold_grafting.optimise import alpha_crown_joint
from tenfold_grafting.specification import pixel_box
from tenfold_shared.attacks import held, pgd
from tenfold_shared.errors import UserError

Significance = Literal["gradient", "magnitude", "variance"]
BoundName = Literal["ibp", "crown-ibp", "crown", "alpha"]
Batch = tuple[Tensor, Tensor]

FGSM_STEP = 1.25
"""Step over radius of the attack on scored images, as in 2.5/255 over 2/255."""


def _attack_loss(model: nn.Module, labels: Tensor, images: Tensor) -> Tensor:
    return cross_entropy(model(images), labels)


def scored_images(images: int, count: int = 1000) -> Int[np.ndarray, " count"]:
    """The training images that are scored: the first of the released permutation of all."""
    np.random.seed(1)  # noqa: NPY002 - the released indices come from this generator
    return np.random.permutation(images)[:count]  # noqa: NPY002


def significance(
    model: nn.Module,
    batches: Iterable[Batch],
    kind: Significance = "gradient",
    *,
    fgsm_eps: float = 0.0,
    post_activation: bool = False,
) -> dict[str, Tensor]:
    """How much each neuron matters: a mean over samples, activation's name -> [*neurons].

    ``gradient`` is |d loss / d z| of the pre-activation z, with the cross entropy summed over the batch so that every
    sample's gradient is its own; ``magnitude`` is |z|; ``variance`` is that of z over the samples.

    Args:
        model: in any mode; it is evaluated in eval mode.
        batches: (images, labels).
        kind: which score.
        fgsm_eps: radius of a one-step attack on the images first, with a step of 1.25 times it; 0 scores them clean.
        post_activation: score the activation's output instead of its input.

    """
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    count = 0
    with held(model):
        for images, labels in batches:
            x = images
            if fgsm_eps:
                attacked = partial(_attack_loss, model, labels)
                x = x + pgd(attacked, x, eps=fgsm_eps, step_size=FGSM_STEP * fgsm_eps, steps=1, random_start=False)
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                values = _activation_outputs(model, x) if post_activation else _with_logits(model, x)
                logits = values.pop("")
                if kind == "gradient":
                    loss = cross_entropy(logits, labels, reduction="sum")
                    grads = torch.autograd.grad(loss, list(values.values()))
                    found = dict(zip(values, grads, strict=True))
                else:
                    found = values
            for name, value in found.items():
                amount = value.detach() if kind == "variance" else value.detach().abs()
                sums[name] = sums.get(name, 0) + amount.sum(0)
                squares[name] = squares.get(name, 0) + amount.square().sum(0)
            count += len(images)
    if kind == "variance":
        return {name: squares[name] / count - (sums[name] / count).square() for name in sums}
    return {name: total / count for name, total in sums.items()}


def _with_logits(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The pre-activations, and the logits under the empty name."""
    outputs: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        values = pre_activations(model, x)
    finally:
        handle.remove()
    return {**values, "": outputs[0]}


def _activation_outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What every activation gives, and the logits under the empty name."""
    values: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda m, inputs, output, name=name: values.__setitem__(name, output))
        for name, module in activation_modules(model).items()
    ]
    try:
        logits = model(x)
    finally:
        for handle in handles:
            handle.remove()
    return {**values, "": logits}


def instability(
    model: nn.Module | Graph,
    images: Float[Tensor, "n *input"],
    eps: float,
    *,
    bounds: BoundName = "crown",
    batch_size: int = 50,
) -> dict[str, Tensor]:
    """The fraction of images on which each neuron may have either sign: activation's name -> [*neurons].

    A grafted neuron counts as never unstable.

    Args:
        model: a network of pixels, or its graph.
        images: pixels in [0, 1].
        eps: radius of the boxes, in pixel units.
        bounds: whose intervals.
        batch_size: images at a time.

    Raises:
        UserError: no images.

    """
    if not len(images):
        raise UserError("the instability of neurons is a share of images: there are none")
    graph = model if isinstance(model, Graph) else trace(model, images.shape[1:])
    sums = {index: torch.zeros(graph.nodes[index].shape, device=graph.device) for index in graph.activations}
    for part in images.split(batch_size):
        for index, interval in activation_intervals(graph, part, eps, bounds).items():
            sums[index] += graph.activation(index).unstable(*interval).sum(0)
    return {graph.nodes[index].name: total / len(images) for index, total in sums.items()}


def activation_intervals(
    graph: Graph, images: Float[Tensor, "batch *input"], eps: float, bounds: BoundName
) -> dict[int, tuple[Tensor, Tensor]]:
    """The pre-activation intervals of a method; ``crown-ibp`` has those of interval arithmetic."""
    box = pixel_box(graph, images, eps)
    with torch.no_grad(), exact_arithmetic():
        if bounds in ("ibp", "crown-ibp"):
            return ibp(graph, box)[0]
        intervals, _ = crown_intervals(graph, box)
    if bounds == "crown":
        return intervals
    spec = torch.eye(graph.classes, device=graph.device).expand(len(images), -1, -1)
    return alpha_crown_joint(graph, box, spec, intervals).intervals


def unstable_ratio(
    model: nn.Module | Graph, images: Float[Tensor, "n *input"], eps: float, *, bounds: BoundName = "crown"
) -> float:
    """UNR: the mean over images of unstable, ungrafted neurons over all activation neurons, in per cent."""
    graph = model if isinstance(model, Graph) else trace(model, images.shape[1:])
    found = instability(graph, images, eps, bounds=bounds)
    return 100 * float(sum(float(share.sum()) for share in found.values())) / graph.neurons
