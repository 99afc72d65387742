"""The released trainers, update for update (section 2.5), where they differ from the paper.

Two optimisers hold *all* parameters. Frozen parameters keep a gradient of zeros, so each optimiser also decays, and
carries the momentum of, what the other one trains.
One iteration is four forward and three backward passes, and moves the running statistics of batch normalisation four
times.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD

from tenfold_bip.bilevel import Batch, LossFn
from tenfold_bip.masking import set_masks, split_parameters


def released_optimizer(model: nn.Module, lr: float, momentum: float = 0.9, weight_decay: float = 1e-4) -> SGD:
    """SGD over all parameters of the masked model, scores included.

    One tensor after the other (`foreach=False`): with tied scores a tensor is updated as weight first and as score
    afterwards, which a fused update over a list would not do.
    """
    return SGD(model.parameters(), lr, momentum, weight_decay=weight_decay, foreach=False)


def _groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(scores, weights and biases); batch normalisation is in neither since it is never frozen."""
    others, scores = split_parameters(model)
    normalisation = {
        id(p) for module in model.modules() if isinstance(module, _BatchNorm) for p in module.parameters(recurse=False)
    }
    return scores, [p for p in others if id(p) not in normalisation]


def _trainable(parameters: Iterable[nn.Parameter], flag: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(flag)


def _forward(model: nn.Module, batch: Batch, loss_fn: LossFn) -> tuple[Tensor, Tensor]:
    set_masks(model)  # the release projects in every forward pass: with tied scores each update moves the masks
    outputs = model(batch[0])
    return loss_fn(outputs, batch[1]), outputs.detach()


def released_bilevel_step(
    model: nn.Module,
    train_batch: Batch,
    val_batch: Batch,
    weight_optimizer: torch.optim.Optimizer,
    mask_optimizer: torch.optim.Optimizer,
    *,
    lr2: float = 1e-4,
    loss_fn: LossFn = cross_entropy,
) -> tuple[Tensor, Tensor]:
    """One iteration of the released bi-level trainer.

    Args:
        model: with masks and scores, in training mode; tied scores reproduce the release.
        train_batch: (inputs, targets) of the upper level.
        val_batch: (inputs, targets) of the lower level: the release trains the weights on its "validation" loader.
        weight_optimizer: over all parameters (`released_optimizer`).
        mask_optimizer: likewise, at the rate of the mask.
        lr2: factor of the elementwise product of the two gradients of the upper level.
        loss_fn: (outputs, targets) -> mean loss.

    Returns:
        (loss, outputs) of the last forward pass, detached.

    """
    scores, weights = _groups(model)
    parameters = list(model.parameters())

    _trainable(scores, False)
    weight_optimizer.zero_grad(set_to_none=False)
    _forward(model, val_batch, loss_fn)[0].backward()
    weight_optimizer.step()

    _trainable(scores, True)
    mask_optimizer.zero_grad(set_to_none=False)
    _forward(model, train_batch, loss_fn)[0].backward()
    unfrozen = [None if p.grad is None else p.grad.clone() for p in parameters]

    _trainable(weights, False)
    mask_optimizer.zero_grad(set_to_none=False)
    _forward(model, train_batch, loss_fn)[0].backward()
    for parameter, other in zip(parameters, unfrozen, strict=True):
        if parameter.grad is not None and other is not None:
            parameter.grad.addcmul_(parameter.grad, other, value=-lr2)
    mask_optimizer.step()
    _trainable(weights, True)

    with torch.no_grad():
        loss, outputs = _forward(model, train_batch, loss_fn)
    return loss, outputs


def released_accelerate_step(
    model: nn.Module,
    train_batch: Batch,
    val_batch: Batch,
    weight_optimizer: torch.optim.Optimizer,
    mask_optimizer: torch.optim.Optimizer,
    *,
    loss_fn: LossFn = cross_entropy,
) -> tuple[Tensor, Tensor]:
    """One iteration of the released "accelerate" trainer: scores on the train batch, then weights on the val batch,
    without implicit term.

    Returns:
        (loss, outputs) on the train batch, detached.

    """
    scores, weights = _groups(model)

    _trainable(weights, False)
    mask_optimizer.zero_grad(set_to_none=False)
    loss, outputs = _forward(model, train_batch, loss_fn)
    loss.backward()
    mask_optimizer.step()

    _trainable(weights, True)
    _trainable(scores, False)
    weight_optimizer.zero_grad(set_to_none=False)
    _forward(model, val_batch, loss_fn)[0].backward()
    weight_optimizer.step()
    _trainable(scores, True)
    return loss.detach(), outputs


def hydra_freeze(model: nn.Module, frozen: bool = True) -> None:
    """Freeze what Hydra never touches, weights and biases; or train them again."""
    weights = _groups(model)[1]
    _trainable(weights, not frozen)
    for weight in weights if frozen else ():
        weight.grad = None  # one that dense training left would be zeroed, and the weight decayed


def hydra_step(
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    *,
    loss_fn: LossFn = cross_entropy,
    backward: Callable[[Tensor], object] = torch.Tensor.backward,
) -> tuple[Tensor, Tensor]:
    """One step of Hydra: scores (and batch normalisation) by the straight-through gradient, weights and biases frozen
    and never touched.

    Args:
        model: with masks and scores, in training mode.
        batch: (inputs, targets).
        optimizer: over all parameters; frozen ones have no gradient and are skipped.
        loss_fn: (outputs, targets) -> mean loss.
        backward: how to differentiate, e.g. an Accelerator's `backward`.

    Returns:
        (loss, outputs), detached.

    """
    hydra_freeze(model)
    optimizer.zero_grad(set_to_none=False)
    loss, outputs = _forward(model, batch, loss_fn)
    backward(loss)
    optimizer.step()
    hydra_freeze(model, False)
    set_masks(model)
    return loss.detach(), outputs
