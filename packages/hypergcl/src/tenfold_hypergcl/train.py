"""Training at the paper's protocol (sections 2.6, 6 and 9): one run is one split, one loop."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tenfold_hypergcl.augment import View, fabricate, fabricate_pair
from tenfold_hypergcl.data import Dataset
from tenfold_hypergcl.generative import VHGAE
from tenfold_hypergcl.hypergraph import Hypergraph
from tenfold_hypergcl.propagate import Features
from tenfold_hypergcl.protocol import Split
from tenfold_hypergcl.setgnn import INPUT_DROPOUT, EncoderConfig, SetGNN
from tenfold_hypergcl.steps import (
    Core,
    ReceptiveField,
    contrastive_loss,
    core,
    generate_view,
    generated_view,
    generator_step,
    receptive_field,
    supervised_loss,
)


@dataclass(frozen=True)
class FitConfig:
    """One arm of an experiment."""

    method: str = "A2"
    """supervised, A0-A5 (fabricated, and the extra names of augment.fabricate), or A6 (generative)."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """The encoder; the generator of A6 has the same."""
    projection: int = 128
    """Width P of the projection head."""
    epochs: int = 500
    """Full-batch epochs."""
    lr: float = 1e-3
    """Adam's learning rate."""
    weight_decay: float = 0.0
    """Adam's weight decay (in the gradient)."""
    temperature: float = 0.3
    """Temperature t of InfoNCE."""
    ratio: float = 0.3
    """Augmentation ratio r."""
    contrast_weight: float = 0.1
    """Weight of the contrastive term: m_l of fabricated arms, a_l of A6."""
    generator_lr: float = 1e-3
    """Adam's learning rate for the generator."""
    generator_contrast: float = 10.0
    """Weight g_l of the contrastive term in the generator's loss."""


def fabricated_epoch(
    model: SetGNN,
    optimizer: torch.optim.Optimizer,
    h: Hypergraph,
    x: Features,
    training: ReceptiveField,
    labels: Int[Tensor, "train"],
    name: str,
    ratio: float,
    weight: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """One epoch with two fabricated views: the supervised loss plus ``weight`` times the contrast; returns both.

    The two terms go backward one after the other, so that their graphs are never in memory together.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    supervised = supervised_loss(model, training, labels)
    supervised.backward()
    first, second = fabricate_pair(name, h, x, ratio)
    # Without an augmentation the views differ by dropout only, and the input's is left out (section 2.2).
    contrastive = contrastive_loss(
        model, first, second, temperature, input_dropout=0.0 if name == "A0" else INPUT_DROPOUT
    )
    (weight * contrastive).backward()
    optimizer.step()
    return supervised.detach(), contrastive.detach()


def generative_epoch(
    model: SetGNN,
    generator: VHGAE,
    optimizer: torch.optim.Optimizer,
    generator_optimizer: torch.optim.Optimizer,
    h: Hypergraph,
    x: Features,
    part: Core,
    training: ReceptiveField,
    labels: Int[Tensor, "train"],
    ratio: float,
    weight: float,
    generator_weight: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One epoch of the joint training: a generator step, then a model step on an A2 view and a generated one (section 2.6).

    Returns the supervised and the contrastive loss and the generator's drop ratio.
    """
    model.train()
    generator.train()
    losses = generator_step(model, generator, h, x, generator_weight, temperature)
    generator_optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    supervised = supervised_loss(model, training, labels)
    supervised.backward()
    keep = generate_view(generator, h, part)
    if model.config.aggregate == "sum" or model.config.attention:
        second, weights = generated_view(h, x, keep), None
    else:
        second, weights = View(h, x), keep
    contrastive = contrastive_loss(model, fabricate("A2", h, x, ratio), second, temperature, weights=(None, weights))
    (weight * contrastive).backward()
    optimizer.step()
    return supervised.detach(), contrastive.detach(), losses.drop_ratio


@torch.inference_mode()
def correct(model: SetGNN, part: ReceptiveField, labels: Tensor) -> Tensor:
    """The share of the part's nodes that the model, in evaluation mode, classifies as labelled."""
    model.eval()
    return (model(part.x, part.incidence, part.rows).argmax(1) == labels).to(torch.float64).mean()


def fit(config: FitConfig, data: Dataset, split: Split, seed: int) -> dict[str, Any]:
    """Train one run from ``seed`` and return its metrics: test accuracy at the first best validation accuracy, in percent.

    Validation is evaluated every epoch. The test nodes are only when validation improves, which leaves the result as it is.
    """
    torch.manual_seed(seed)
    h, x, y = data.hypergraph, data.x, data.labels
    layers = config.encoder.layers
    parts = [receptive_field(h, x, nodes, layers) for nodes in (split.train, split.valid, split.test)]
    targets = [y[nodes] for nodes in (split.train, split.valid, split.test)]
    model = SetGNN(x.shape[1], data.num_classes, config.encoder, config.projection).to(y.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    generator = VHGAE(x.shape[1], config.encoder).to(y.device) if config.method == "A6" else None
    generated = core(h, x)
    generator_optimizer = (
        None if generator is None else torch.optim.Adam(generator.parameters(), lr=config.generator_lr, fused=True)
    )
    best, test, best_epoch, dropped = -1.0, 0.0, -1, None
    start, cpu = time.perf_counter(), time.process_time()
    for epoch in range(config.epochs):
        if generator is not None and generator_optimizer is not None:
            *_, dropped = generative_epoch(
                model,
                generator,
                optimizer,
                generator_optimizer,
                h,
                x,
                generated,
                parts[0],
                targets[0],
                config.ratio,
                config.contrast_weight,
                config.generator_contrast,
                config.temperature,
            )
        elif config.method == "supervised":
            model.train()
            optimizer.zero_grad(set_to_none=True)
            supervised_loss(model, parts[0], targets[0]).backward()
            optimizer.step()
        else:
            fabricated_epoch(
                model,
                optimizer,
                h,
                x,
                parts[0],
                targets[0],
                config.method,
                config.ratio,
                config.contrast_weight,
                config.temperature,
            )
        valid = float(correct(model, parts[1], targets[1]))
        if valid > best:
            best, best_epoch = valid, epoch
            test = float(correct(model, parts[2], targets[2]))
    return {
        "test": 100 * test,
        "valid": 100 * best,
        "best_epoch": best_epoch,
        "drop_ratio": None if dropped is None else float(dropped),
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
    }
