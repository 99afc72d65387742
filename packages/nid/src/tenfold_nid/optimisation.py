"""One step of dictionary learning, and of the released fine-tuning (sections 2.3 to 2.5)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .ct import project
from .dictionary import Mixture, NeuralDictionary
from .experts import SharedTrunkExperts
from .gating import cv_squared
from .losses import WEIGHT_CAP, DataTerm, data_loss, l1_weights, sparsity_loss

Places = Literal["points", "embedded", "antipodal", "rays"]


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

    def __post_init__(self) -> None:
        """Refuse weights that reward what they are to limit."""
        for name in ("loss_cv", "loss_l1", "l1_cap"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


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
    share: float = 1.0,
) -> Losses:
    """The loss of the sparse phase, or of the dense one when the mixture has no load (section 2.3).

    Args:
        mixture: outcome of the forward pass.
        targets: the signals at the same coordinates.
        settings: weights of the terms.
        weights: ω, to save their computation in a loop; None computes them.
        share: weight of the terms that are means over the signals.

    """
    data = share * data_loss(mixture.preds, targets, settings.loss_type)
    balance = cv_squared(mixture.importance)
    if mixture.load is not None:
        balance = balance + cv_squared(mixture.load)
        return Losses(data + settings.loss_cv * balance, data, balance, None)
    gates = mixture.gates.dense
    if weights is None:
        weights = l1_weights(
            gates.shape[-1], settings.l1_exp, cap=settings.l1_cap, device=gates.device, dtype=gates.dtype
        )
    sparsity = share * sparsity_loss(mixture.gates, weights)
    return Losses(data + settings.loss_l1 * sparsity + settings.loss_cv * balance, data, balance, sparsity)


class Sampled(nn.Module):
    """A dictionary with the kind of places it is sampled at: one module for processes and precisions to wrap.

    Args:
        model: the dictionary.
        places: ``points``: coordinates. ``embedded``: their embedding, which a loop over a fixed lattice keeps.
            ``antipodal``: the Fourier features of the points x, which stand for these and then for all -x.
            ``rays``: samples of every ray, of which the mean is wanted.

    """

    def __init__(self, model: NeuralDictionary, places: Places) -> None:
        super().__init__()
        self.model, self.places = model, places

    def forward(self, signal: Tensor, where: Tensor, *, dense: bool = False) -> Mixture:
        """Values of the signals there."""
        experts = self.model.experts
        if self.places == "rays":
            return project(self.model, signal, where, dense=dense)
        if self.places == "points":
            features = experts.features(where)
        elif self.places == "embedded":
            features = experts.trunk(where)
        else:
            assert isinstance(experts, SharedTrunkExperts)
            features = experts.antipodal_trunk(where)
        return self.model.mixture(signal, features, dense=dense)


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    signal: Tensor,
    where: Tensor,
    targets: Float[Tensor, "batch points channels"],
    settings: Objective,
    *,
    dense: bool = False,
    weights: Float[Tensor, " experts"] | None = None,
    share: float = 1.0,
    balance: Callable[[Mixture], Mixture] | None = None,
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
) -> Losses:
    """One optimiser step on everything the optimiser holds (section 2.4); the losses come back detached, on the device.

    Args:
        model: the dictionary, or ``Sampled`` around it.
        optimizer: over all parameters, or over ``gate_parameters(model)`` for fine-tuning.
        signal: images, or ids for the codebook gate.
        where: coordinates [points, m] shared by the batch, or [batch, points, m]; or what ``Sampled`` takes.
        targets: the signals there.
        settings: weights of the loss.
        dense: all atoms on (warm-up).
        weights: ω of the L1 penalty, precomputed.
        share: weight of this process's data term, where its part of the batch is larger or smaller than the others'.
        balance: makes importance and load those of the whole batch, where processes share it.
        backward: what differentiates; Accelerate's where precision is mixed.

    """
    mixture = model(signal, where, dense=dense)
    if balance is not None:
        mixture = balance(mixture)
    losses = objective(mixture, targets, settings, weights, share)
    optimizer.zero_grad(set_to_none=True)
    backward(losses.total)
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


def coordinate_chunks(
    points: int, chunk_size: int, generator: torch.Generator | None = None, *, antipodal: bool = False
) -> list[Int[Tensor, " chunk"]]:
    """A shuffled lattice cut into chunks, every coordinate once (section 2.4); indices on the CPU.

    ``antipodal`` keeps x and -x, which are point i and point n-1-i, in the same chunk: half of them, then their
    partners.
    """
    if not antipodal:
        return list(torch.randperm(points, generator=generator).split(chunk_size))
    halves = torch.randperm(points // 2, generator=generator).split(max(1, chunk_size // 2))
    return [torch.cat([half, points - 1 - half]) for half in halves]
