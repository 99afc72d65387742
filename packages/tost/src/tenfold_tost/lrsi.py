"""LRsI (section 2.4): one factor for every parameter tensor of a masked network, learned before training.

p_j = alpha_j p_j^0 for the weights and biases of convolutions, linear layers and batch norms. An iteration either
lowers the gradient's norm where it exceeds gamma (constraint step), or the loss after one step of the optimiser to come
(objective step). Scaling whole tensors leaves the mask as it is.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

Batch = tuple[Tensor, Tensor]
LossFn = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass
class Lrsi:
    """Settings of the learned scales; the defaults are the released command's."""

    iters: int = 180
    """Iterations; 0 leaves the initial weights as they are."""
    lr: float = 1e-2
    """Step size of the factors."""
    eta: float = 0.1
    """Step size of the lookahead: the learning rate to come."""
    gamma: float = 1.0
    """Bound on the gradient's norm."""
    normalize: bool = True
    """Divide the lookahead's gradient by its norm."""
    min_scale: float = 0.01
    """Lower bound of the factors of weights; that of biases is 0."""
    clip: float = 1.0
    """Bound on the derivative with respect to a factor; 0 for none."""
    target: Literal["sgd", "adam"] = "sgd"
    """The optimiser to come: the Euclidean norm and its step, or the 1-norm and the sign step."""
    no_overlap: bool = False
    """Judge the lookahead on two batches that its gradient has not seen, instead of one."""
    mask_lookahead: bool = True
    """Let the gradient of pruned weights neither move them nor count; the released code lets it."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if self.target not in ("sgd", "adam"):
            raise ValueError(f"The learned scales look ahead with the target sgd or adam, got {self.target!r}.")
        if self.iters < 0 or self.lr <= 0 or self.eta <= 0 or self.gamma <= 0 or self.clip < 0 or self.min_scale < 0:
            raise ValueError(
                "The learned scales take iters, clip and min_scale of at least 0 and lr, eta and gamma above 0, "
                f"got {dataclasses.asdict(self)}."
            )


@dataclasses.dataclass
class ScaleReport:
    """What the learning of the scales did."""

    scales: dict[str, float]
    """Factor by parameter name."""
    constrained: list[bool]
    """Whether each iteration was a constraint step."""
    norms: list[float]
    """The gradient's norm at each iteration."""


class ScaleAdam:
    """Adam on the factors alpha with a first moment and a counter for each of the two kinds of step and one second
    moment, whose correction counts both.

    Args:
        alive: the tensors whose factors can move at all: those that are not zero.
        lr: step size of each factor.
        floor: lower bound of each factor.
        clip: bound on the derivative, 0 for none.

    Attributes:
        alpha: the factors, ones at first.

    """

    def __init__(
        self,
        alive: Bool[Tensor, " tensors"],
        lr: Float[Tensor, " tensors"],
        floor: Float[Tensor, " tensors"],
        clip: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.alive, self.lr, self.floor, self.clip, self.betas, self.eps = alive, lr, floor, clip, betas, eps
        self.alpha = torch.ones_like(lr)
        self.first = torch.zeros(2, *lr.shape, dtype=lr.dtype, device=lr.device)
        self.second = torch.zeros_like(lr)
        self.counts = torch.zeros_like(self.first)

    def step(self, gradient: Float[Tensor, " tensors"], is_constraint: bool) -> None:
        """One update from the derivatives with respect to alpha. A factor that has reached zero stays there."""
        beta1, beta2 = self.betas
        kind = int(is_constraint)
        moves = self.alive & (self.alpha != 0)
        if self.clip > 0:
            gradient = gradient.clamp(-self.clip, self.clip)
        self.counts[kind] += moves
        first = beta1 * self.first[kind] + (1 - beta1) * gradient
        self.first[kind] = torch.where(moves, first, self.first[kind])
        self.second = torch.where(moves, beta2 * self.second + (1 - beta2) * gradient.square(), self.second)
        own, total = self.counts[kind].clamp(min=1), self.counts.sum(0).clamp(min=1)
        spread = (self.second / (1 - beta2**total)).sqrt() + self.eps
        moved = self.alpha - self.lr / (1 - beta1**own) * self.first[kind] / spread
        self.alpha = torch.where(moves, torch.maximum(moved, self.floor), self.alpha)


@contextlib.contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, but batch norm uses the batch's statistics and leaves the running ones alone."""
    modes = {module: module.training for module in model.modules()}
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    tracked = [norm.track_running_stats for norm in norms]
    model.eval()
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, tracks in zip(norms, tracked, strict=True):
            norm.track_running_stats = tracks
        for module, mode in modes.items():
            module.training = mode


def scalable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights and biases of convolutions, linear layers and normalisations, by name."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear, _BatchNorm, nn.LayerNorm, nn.GroupNorm)
    return {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, module in model.named_modules()
        if isinstance(module, kinds)
        for name, parameter in module.named_parameters(recurse=False)
    }


def learn_scales(
    model: nn.Module,
    batches: Iterable[Batch],
    settings: Lrsi | None = None,
    masks: Mapping[str, Tensor] | None = None,
    loss_fn: LossFn = cross_entropy,
) -> ScaleReport:
    """Rescale the initial weights of a model, in place. Masks are applied to it before; ghosts are attached.

    A constraint iteration takes two batches (A0, A1), an objective iteration three (A0, A1, B), or four with
    `no_overlap`, from `batches`, which must not end.

    Args:
        model: at its initial, masked weights.
        batches: (inputs, labels) without end.
        settings: see `Lrsi`.
        masks: weight name -> mask; used with `mask_lookahead`.
        loss_fn: (logits, labels) -> mean loss.

    Raises:
        ValueError: the batches end; the model has no parameter to scale.

    """
    settings = settings or Lrsi()
    parameters = scalable_parameters(model)
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no convolution, linear layer or normalisation to scale.")
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    keep = dict(masks or {}) if settings.mask_lookahead else {}
    state = _Scales(start, settings)
    source = iter(batches)
    report = ScaleReport({}, [], [])
    with batch_statistics(model):
        for _ in range(settings.iters):
            gradient, is_constraint, norm = _iteration(model, state, source, settings, keep, loss_fn)
            state.adam.step(gradient, is_constraint)
            report.constrained.append(is_constraint)
            report.norms.append(norm)
    with torch.no_grad():
        for name, scaled in state.parameters().items():
            parameters[name].copy_(scaled)
    report.scales = dict(zip(parameters, state.adam.alpha.tolist(), strict=True))
    return report


class _Scales:
    """p^0 and the factors on it."""

    def __init__(self, start: Mapping[str, Tensor], settings: Lrsi) -> None:
        self.start = start
        like = next(iter(start.values()))
        alive = torch.stack([(value != 0).any() for value in start.values()])
        floor = like.new_tensor([settings.min_scale if "weight" in name else 0.0 for name in start])
        self.adam = ScaleAdam(alive, torch.full_like(floor, settings.lr), floor, settings.clip)

    def parameters(self, alpha: Tensor | None = None) -> dict[str, Tensor]:
        """p_j = alpha_j p_j^0."""
        factors = (self.adam.alpha if alpha is None else alpha).unbind()
        return {name: factor * value for factor, (name, value) in zip(factors, self.start.items(), strict=True)}


def _next(source: Iterator[Batch]) -> Batch:
    try:
        return next(source)
    except StopIteration:
        raise ValueError("The batches ended before the scales were learned: give a source without end.") from None


def _joined(first: Batch, second: Batch) -> Batch:
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])


def _iteration(
    model: nn.Module,
    state: _Scales,
    source: Iterator[Batch],
    settings: Lrsi,
    masks: Mapping[str, Tensor],
    loss_fn: LossFn,
) -> tuple[Float[Tensor, " tensors"], bool, float]:
    """(derivative with respect to the factors, whether of the constraint, the gradient's norm)."""
    alpha = state.adam.alpha.detach().requires_grad_()
    p = state.parameters(alpha)
    a0, a1 = _next(source), _next(source)

    def loss_at(point: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return loss_fn(functional_call(model, dict(point), (batch[0],)), batch[1])

    gradients = torch.autograd.grad(
        loss_at(p, _joined(a0, a1)), list(p.values()), create_graph=True, allow_unused=True, materialize_grads=True
    )
    moving = {name: g * masks[name].to(g) if name in masks else g for name, g in zip(p, gradients, strict=True)}
    norm = gradient_norm(list(moving.values()), settings.target)
    size = float(norm.detach())
    if size > settings.gamma:
        return _derivative(norm, alpha), True, size
    ahead = dict(p)
    for name, g in moving.items():
        constant = g.detach()
        if settings.target == "adam":
            step = constant.sign()
        else:
            step = constant / norm.detach() if settings.normalize else constant
        ahead[name] = p[name] - settings.eta * step
    b = _next(source)
    if settings.no_overlap:
        a0 = _next(source)
    return _derivative(loss_at(ahead, _joined(a0, b)) / settings.eta, alpha), False, size


def _derivative(value: Tensor, alpha: Float[Tensor, " tensors"]) -> Float[Tensor, " tensors"]:
    """D value / d alpha."""
    (gradient,) = torch.autograd.grad(value, [alpha], allow_unused=True, materialize_grads=True)
    return gradient


def gradient_norm(gradients: Sequence[Tensor], target: Literal["sgd", "adam"] = "sgd") -> Float[Tensor, ""]:
    """The norm of the whole gradient that the target optimiser is bounded by: Euclidean for SGD, the 1-norm for Adam."""
    if target == "adam":
        return torch.stack([g.abs().sum() for g in gradients]).sum()
    return torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
