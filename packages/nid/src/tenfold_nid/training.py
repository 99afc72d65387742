"""One step of dictionary learning, and of the released fine-tuning (sections 2.3 to 2.5)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .dictionary import Mixture, NeuralDictionary
from .gating import cv_squared
from .losses import WEIGHT_CAP, DataTerm, data_loss, l1_weights, sparsity_loss


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Weights of the training loss (section 2.3)."""

    loss_type: DataTerm = "l2"
    """squared or absolute error"""
    loss_cv: float = 0.01
    """weight of the balancing terms"""
    loss_l1: float = 0.01
    """weight of the L1 penalty on the gates in the dense phase"""
    l1_exp: float = 1.0
    """base a of the penalty's weights 1/a^i"""
    l1_cap: float = WEIGHT_CAP
    """largest of these weights"""


@dataclass(frozen=True)
class Losses:
    """Terms of one step, tensors on the device; ``total`` is what is differentiated."""

    total: Float[Tensor, ""]
    data: Float[Tensor, ""]
    balance: Float[Tensor, ""]
    """cv(load) + cv(importance), before its weight; float32"""
    sparsity: Float[Tensor, ""] | None
    """weighted L1 of the dense phase, before its weight"""


def is_dense(epoch: int, warmup_epochs: int, *, official: bool = False) -> bool:
    """Whether all atoms are on in an epoch counted from 0; the released code keeps one more (section 2.4)."""
    return epoch <= warmup_epochs if official else epoch < warmup_epochs


def objective(
    mixture: Mixture,
    targets: Float[Tensor, "batch points channels"],
    settings: Objective,
    weights: Float[Tensor, " experts"] | None = None,
) -> Losses:
    """The loss of the sparse phase, or of the dense one when the mixture has no load (section 2.3).

    Args:
        mixture: outcome of the forward pass.
        targets: the signals at the same coordinates.
        settings: weights of the terms.
        weights: ω, to save their computation in a loop; None computes them.

    """
    data = data_loss(mixture.preds, targets, settings.loss_type)
    balance = cv_squared(mixture.importance)
    if mixture.load is not None:
        balance = balance + cv_squared(mixture.load)
        return Losses(data + settings.loss_cv * balance, data, balance, None)
    gates = mixture.gates.dense
    if weights is None:
        weights = l1_weights(
            gates.shape[-1], settings.l1_exp, cap=settings.l1_cap, device=gates.device, dtype=gates.dtype
        )
    sparsity = sparsity_loss(mixture.gates, weights)
    return Losses(data + settings.loss_l1 * sparsity + settings.loss_cv * balance, data, balance, sparsity)


def training_step(
    model: NeuralDictionary,
    optimizer: torch.optim.Optimizer,
    signal: Tensor,
    coords: Float[Tensor, "*points in_dim"],
    targets: Float[Tensor, "batch points channels"],
    settings: Objective,
    *,
    dense: bool = False,
    weights: Float[Tensor, " experts"] | None = None,
    embedded: Float[Tensor, "*points width"] | None = None,
) -> Losses:
    """One optimiser step on everything the optimiser holds (section 2.4); the losses come back detached, on the device.

    Args:
        model: the dictionary.
        optimizer: over all parameters, or over ``gate_parameters(model)`` for fine-tuning.
        signal: images, or ids for the codebook gate.
        coords: [points, m] shared by the batch, or [batch, points, m].
        targets: the signals there.
        settings: weights of the loss.
        dense: all atoms on (warm-up).
        weights: ω of the L1 penalty, precomputed.
        embedded: ``model.experts.map(coords)``, when the caller keeps it from step to step; not for the radial basis,
            whose centres learn.

    """
    features = model.experts.features(coords) if embedded is None else model.experts.trunk(embedded)
    losses = objective(model.mixture(signal, features, dense=dense), targets, settings, weights)
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()
    optimizer.step()
    detached = None if losses.sparsity is None else losses.sparsity.detach()
    return Losses(losses.total.detach(), losses.data.detach(), losses.balance.detach(), detached)


def adam(
    parameters: Iterator[nn.Parameter] | list[nn.Parameter], lr: float = 1e-4, weight_decay: float = 0.0
) -> torch.optim.Adam:
    """The released optimiser: Adam with default moments and L2 regularisation, one fused pass over the parameters."""
    return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, fused=True)


def gate_parameters(model: NeuralDictionary) -> list[nn.Parameter]:
    """What the released fine-tuning optimises: the gate and its noise network, not the atoms (section 2.5)."""
    return [p for name, p in model.named_parameters() if not name.startswith("experts.")]


def coordinate_chunks(points: int, chunk_size: int, generator: torch.Generator | None = None) -> list[torch.Tensor]:
    """A shuffled lattice cut into chunks, every coordinate once (section 2.4); indices on the CPU."""
    return list(torch.randperm(points, generator=generator).split(chunk_size))
