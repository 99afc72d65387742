"""What the techniques do to a network besides its accuracy (section 9 d, e): gradients and curvature of the loss."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tenfold_tost.lrsi import batch_statistics, gradient_norm


def _gradient(model: nn.Module, images: Tensor, labels: Tensor, create_graph: bool) -> tuple[Tensor, ...]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = cross_entropy(model(images), labels)
    return torch.autograd.grad(loss, parameters, create_graph=create_graph)


def loss_gradient_norm(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Euclidean norm of the whole gradient of the cross entropy, batch norm with the batch's statistics."""
    with batch_statistics(model):
        return float(gradient_norm(_gradient(model, images, labels, create_graph=False)))


def top_eigenvalue(
    model: nn.Module, images: Tensor, labels: Tensor, iterations: int = 20, seed: int = 0
) -> tuple[float, list[Tensor]]:
    """The Hessian's eigenvalue of largest magnitude and its eigenvector, by power iteration on Hessian-vector products."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    draws = torch.Generator().manual_seed(seed)
    vector = _unit([torch.randn(p.shape, generator=draws).to(p) for p in parameters])
    value = 0.0
    model_mode = model.training
    with batch_statistics(model):
        gradients = _gradient(model, images, labels, create_graph=True)
        for _ in range(iterations):
            along = torch.stack([(g * v).sum() for g, v in zip(gradients, vector, strict=True)]).sum()
            product = torch.autograd.grad(
                along, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            value = float(torch.stack([(h * v).sum() for h, v in zip(product, vector, strict=True)]).sum())
            vector = _unit(product)
    model.train(model_mode)
    return value, vector


def _unit(vector: Sequence[Tensor]) -> list[Tensor]:
    norm = gradient_norm(list(vector)).clamp(min=1e-30)
    return [part / norm for part in vector]


@torch.no_grad()
def loss_slice(
    model: nn.Module, images: Tensor, labels: Tensor, direction: Sequence[Tensor], steps: Sequence[float]
) -> list[float]:
    """The loss at the weights plus each step along a direction; the weights are then as before."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    start = [p.clone() for p in parameters]
    losses = []
    with batch_statistics(model):
        for step in steps:
            for parameter, origin, part in zip(parameters, start, direction, strict=True):
                parameter.copy_(origin + step * part)
            losses.append(float(cross_entropy(model(images), labels)))
        for parameter, origin in zip(parameters, start, strict=True):
            parameter.copy_(origin)
    return losses
