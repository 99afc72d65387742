"""Video into a background and what moves in front of it (sections 2.3 and 6)."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .coordinates import lattice
from .dictionary import DictionaryConfig, NeuralDictionary
from .fitting import system
from .losses import l1_weights
from .optimisation import Objective, adam, coordinate_chunks, training_step
from .robust import irls
from .solvers import residual_outliers

ROBUST_OBJECTIVE = Objective(loss_type="l1", l1_exp=0.5, loss_l1=0.01, loss_cv=0.0)
"""Absolute error and an L1 penalty that doubles from atom to atom, in the place of balancing (section 6)."""


class Separation(NamedTuple):
    """A video taken apart; ``background + foreground`` is the video."""

    background: Float[Tensor, "frames height width channels"]
    foreground: Float[Tensor, "frames height width channels"]
    mask: Bool[Tensor, "frames height width"]
    """where something stands before the background"""


def background_dictionary(
    frames: Float[Tensor, "frames height width channels"],
    config: DictionaryConfig,
    *,
    settings: Objective = ROBUST_OBJECTIVE,
    steps: int = 1000,
    lr: float = 1e-3,
    chunk_size: int = 1024,
    batch: int = 16,
    seed: int = 0,
) -> NeuralDictionary:
    """Learn a dictionary whose low-index atoms carry what all frames share; dense throughout, as the penalty needs it.

    Args:
        frames: the video, in [0, 1].
        config: shape of the dictionary; the gate becomes a codebook with a row a frame.
        settings: the loss.
        steps: optimiser steps.
        lr: step size.
        chunk_size: coordinates a step.
        batch: frames a step.
        seed: of initialisation and order.

    """
    count, height, width, channels = frames.shape
    shape = {
        **vars(config),
        "gate": "codebook",
        "num_signals": count,
        "size": (height, width),
        "out_dim": channels,
        "noise": False,
    }
    with torch.random.fork_rng(devices=[frames.device] if frames.is_cuda else []):
        torch.manual_seed(seed)
        model = NeuralDictionary(DictionaryConfig(**shape)).to(frames)
    generator = torch.Generator().manual_seed(seed)
    coords, targets = lattice((height, width), device=frames.device, dtype=frames.dtype), frames.flatten(1, 2)
    weights = l1_weights(config.num_experts, settings.l1_exp, cap=settings.l1_cap).to(frames)
    optimizer = adam(list(model.parameters()), lr=lr)
    chunks: list[Tensor] = []
    for _ in range(steps):
        if not chunks:
            chunks = coordinate_chunks(len(coords), chunk_size, generator)
        points = chunks.pop().to(frames.device)
        ids = torch.randperm(count, generator=generator)[:batch].to(frames.device)
        there = targets[ids[:, None], points]
        training_step(model, optimizer, ids, coords[points], there, settings, dense=True, weights=weights)
    return model.eval()


@torch.no_grad()
def separate(
    model: NeuralDictionary,
    frames: Float[Tensor, "frames height width channels"],
    *,
    background_atoms: int | None = None,
    penalty: float = 1e-4,
    steps: int = 20,
    threshold: float = 4.0,
    floor: float = 0.05,
) -> Separation:
    """Robust codes of frames, seen in training or new, and what they leave over.

    Args:
        model: dictionary of the scene.
        frames: the video, in [0, 1].
        background_atoms: how many atoms, from the cheapest on, may take part; None lets all.
        penalty: λ of the fit.
        steps: reweightings.
        threshold: robust standard deviations beyond which a pixel is foreground.
        floor: smallest difference that is.

    """
    coords = lattice(frames.shape[1:3], device=frames.device, dtype=frames.dtype)
    support = None
    if background_atoms is not None:
        support = torch.arange(background_atoms, device=frames.device).expand(len(frames), -1)
    fitted = irls(system(model.design(coords), frames.flatten(1, 2)), support, penalty=penalty, steps=steps)
    background = model.render(fitted.code, coords).view_as(frames)
    return Separation(background, frames - background, residual_outliers(frames, background, threshold, floor))


def mask_scores(found: Bool[Tensor, "*shape"], truth: Bool[Tensor, "*shape"]) -> tuple[float, float, float]:
    """Precision, recall and F1 of a foreground mask; 0 where undefined."""
    hit = int((found & truth).sum())
    precision, recall = hit / max(int(found.sum()), 1), hit / max(int(truth.sum()), 1)
    return precision, recall, 2 * precision * recall / max(precision + recall, 1e-12)
