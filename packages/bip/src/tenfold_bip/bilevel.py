"""BiP: pruning as bi-level optimisation (sections 2.1-2.3 of the paper's description).

    min over m in S of  l(m * theta*(m))
    subject to          theta*(m) = argmin over theta of  l(m * theta) + (gamma/2) ||theta||^2

Masks and weights meet only in z = m * theta. With g = dl/dz the partial gradients are dl/dm = theta * g and dl/dtheta =
m * g. Stationarity of the lower level, m * g + gamma * theta* = 0,
differentiated in m gives the response of theta*. Leaving out second derivatives of l in z (the Hessian-free step) it is
-(1/gamma) diag(g), hence

    dl/dm = theta * g - (1/gamma) * (m * g) * g                                        (IG)

A training loop alternates `theta_step` (N times) and `m_step`; each is one forward-backward pass and neither
synchronises the host with the device.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tenfold_bip.masking import masked_layers, set_masks

Batch: TypeAlias = tuple[Tensor, Tensor]
LossFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]
ImplicitGradient: TypeAlias = Literal["closed_form", "released", "none"]


def implicit_gradient(
    theta: Float[Tensor, "*shape"], mask: Float[Tensor, "*shape"], grad_z: Float[Tensor, "*shape"], gamma: float
) -> Float[Tensor, "*shape"]:
    """Total derivative of the upper-level loss in the mask, equation (IG): (theta - m * g / gamma) * g.

    Exact where l is linear in z; for kept weights the implicit part is never positive, so descent raises the score of
    kept weights with a large gradient.
    """
    return (theta - mask * grad_z / gamma) * grad_z


@torch.no_grad()
def add_implicit_term_(model: nn.Module, gamma: float) -> None:
    """Subtract sign(s) * (m * g)^2 / gamma from the gradients of the scores, in place.

    After a backward pass theta.grad = m * g and s.grad = sign(s) * theta * g, and since m is binary m * g * g = (m *
    g)^2: the implicit term of (IG) needs nothing else.
    A layer that the forward pass left out has no gradient, and its scores stay.
    Both gradients are averaged over processes by then, so data-parallel training applies the term to the gradient of
    the whole batch, as one process would.
    """
    called = False
    for layer in masked_layers(model):
        scores = layer.masking.scores
        if scores is None or scores.grad is None:
            continue
        called = True
        if layer.theta.grad is None:
            raise ValueError(f"{layer.name} lacks the gradient of its weight, which the implicit term is made of.")
        scores.grad.addcmul_(scores.sign(), layer.theta.grad.square(), value=-1.0 / gamma)
    if not called:
        raise ValueError("The model lacks the gradients of its weights and scores; run a backward pass first.")


def _pass(
    model: nn.Module, batch: Batch, loss_fn: LossFn, backward: Callable[[Tensor], object]
) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    inputs, targets = batch
    outputs = model(inputs)
    loss = loss_fn(outputs, targets)
    backward(loss)
    return loss.detach(), outputs.detach()


def theta_step(
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    *,
    loss_fn: LossFn = cross_entropy,
    backward: Callable[[Tensor], object] = torch.Tensor.backward,
) -> tuple[Tensor, Tensor]:
    """One step of the lower level with the mask fixed: theta <- theta - alpha * (m * g + decay * theta). One
    forward-backward pass.

    Args:
        model: with masks; in training mode.
        batch: (inputs, targets) of the lower level.
        optimizer: holds the first part of `split_parameters`; its weight decay is the quadratic term of the lower
            level. It must not hold the scores.
        loss_fn: (outputs, targets) -> mean loss.
        backward: how to differentiate, e.g. an Accelerator's `backward`.

    Returns:
        (loss, outputs) of the step, detached, on the device.

    """
    result = _pass(model, batch, loss_fn, backward)
    optimizer.step()
    return result


def m_step(
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    *,
    gamma: float = 1.0,
    ig: ImplicitGradient = "closed_form",
    lr2: float = 1e-4,
    loss_fn: LossFn = cross_entropy,
    backward: Callable[[Tensor], object] = torch.Tensor.backward,
) -> tuple[Tensor, Tensor]:
    """One projected gradient step of the upper level with theta fixed: s <- s - beta * sign(s) * dl/dm, then m =
    P_S(s). One forward-backward pass.

    The scores rank by magnitude and start as signed weights, so the gradient of the mask reaches them through sign(s).

    Args:
        model: with masks and scores; in training mode.
        batch: (inputs, targets) of the upper level.
        optimizer: holds the scores alone (the second part of `split_parameters`), so that theta, biases and
            normalisation stay bit-identical.
        gamma: strength of the lower level's quadratic term, > 0.
        ig: "closed_form" is (IG); "released" subtracts lr2 times the squared score gradient, as the released code does;
            "none" keeps the partial gradient alone.
        lr2: used by "released" only.
        loss_fn: (outputs, targets) -> mean loss.
        backward: as in `theta_step`. With a gradient scaler it must unscale the gradients of both optimisers, since the
            implicit term is quadratic in them.

    Returns:
        (loss, outputs) of the step, detached, on the device.

    Raises:
        ValueError: gamma not positive, or an unknown `ig`.

    """
    if not gamma > 0:
        raise ValueError(
            f"gamma weighs the quadratic term of the lower level and must be positive, but it is {gamma}; "
            "ig='none' switches the implicit term off."
        )
    if ig not in ("closed_form", "released", "none"):
        raise ValueError(f"ig must be 'closed_form', 'released' or 'none', not {ig!r}.")
    result = _pass(model, batch, loss_fn, backward)
    if ig == "closed_form":
        add_implicit_term_(model, gamma)
    elif ig == "released":
        _add_released_term_(model, lr2)
    optimizer.step()
    set_masks(model)
    return result


@torch.no_grad()
def _add_released_term_(model: nn.Module, lr2: float) -> None:
    for layer in masked_layers(model):
        if layer.masking.scores is not None and layer.masking.scores.grad is not None:
            layer.masking.scores.grad.sub_(layer.masking.scores.grad.square(), alpha=lr2)


def bilevel_iteration(
    model: nn.Module,
    lower_batches: Iterable[Batch],
    upper_batch: Batch,
    theta_optimizer: torch.optim.Optimizer,
    score_optimizer: torch.optim.Optimizer,
    *,
    gamma: float = 1.0,
    ig: ImplicitGradient = "closed_form",
    lr2: float = 1e-4,
    loss_fn: LossFn = cross_entropy,
    backward: Callable[[Tensor], object] = torch.Tensor.backward,
) -> tuple[Tensor, Tensor]:
    """One iteration of the algorithm (section 2.3): a theta-step on each of the N lower batches (N = 1 in the paper),
    then an m-step.

    Returns:
        (loss, outputs) of the m-step. The parameters are those of `theta_step` and `m_step`.

    """
    for batch in lower_batches:
        theta_step(model, batch, theta_optimizer, loss_fn=loss_fn, backward=backward)
    return m_step(model, upper_batch, score_optimizer, gamma=gamma, ig=ig, lr2=lr2, loss_fn=loss_fn, backward=backward)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def implicit_gradient_hessian(
    lower_loss: Callable[[list[Tensor]], Tensor],
    upper_loss: Callable[[list[Tensor]], Tensor],
    theta: Sequence[Tensor],
    masks: Sequence[Tensor],
    gamma: float,
    *,
    iterations: int = 100,
    tolerance: float = 1e-12,
) -> list[Tensor]:
    """dl/dm with the second derivatives that (IG) leaves out, for small networks: how good is the Hessian-free step?

    At a solution theta of the lower level, dl/dm = grad_m l_up - grad^2_{m theta} l_low (grad^2_theta l_low + gamma
    I)^-1 grad_theta l_up.
    The inverse is applied by conjugate gradients on Hessian-vector products; it exists where gamma exceeds the most
    negative curvature.

    Args:
        lower_loss: masked weights z, one tensor a layer -> scalar; twice differentiable.
        upper_loss: the same for the upper level.
        theta: weights at (or near) the lower level's solution, one tensor a layer.
        masks: masks, relaxed or binary, in the same shapes and dtype.
        gamma: > 0.
        iterations: bound on the conjugate-gradient steps.
        tolerance: squared residual, relative to the right-hand side, at which they stop.

    Returns:
        dl/dm, one tensor a layer.

    """
    theta = [t.detach().requires_grad_() for t in theta]
    masks = [m.detach().requires_grad_() for m in masks]
    z = [m * t for m, t in zip(masks, theta, strict=True)]
    upper = torch.autograd.grad(upper_loss(z), [*masks, *theta])
    direct, rhs = upper[: len(masks)], upper[len(masks) :]
    z = [m * t for m, t in zip(masks, theta, strict=True)]
    lower = torch.autograd.grad(lower_loss(z), theta, create_graph=True)

    def damped_hessian(v: Sequence[Tensor]) -> list[Tensor]:
        products = torch.autograd.grad(lower, theta, v, retain_graph=True, materialize_grads=True)
        return [h + gamma * x for h, x in zip(products, v, strict=True)]

    solution = [torch.zeros_like(b) for b in rhs]
    residual = [b.clone() for b in rhs]
    direction = [r.clone() for r in residual]
    norm = start = _dot(residual, residual)
    for _ in range(iterations):
        if norm <= tolerance * start:
            break
        image = damped_hessian(direction)
        step = norm / _dot(direction, image)
        solution = [x + step * d for x, d in zip(solution, direction, strict=True)]
        residual = [r - step * a for r, a in zip(residual, image, strict=True)]
        norm, previous = _dot(residual, residual), norm
        direction = [r + norm / previous * d for r, d in zip(residual, direction, strict=True)]
    mixed = torch.autograd.grad(lower, masks, solution)
    return [d - h for d, h in zip(direct, mixed, strict=True)]
