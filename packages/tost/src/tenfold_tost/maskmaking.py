"""Which mask a run trains under, and the masks that need no training."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from tenfold_shared.errors import UserError
from tenfold_tost.activations import SoftKind
from tenfold_tost.lrsi import Batch
from tenfold_tost.maskfiles import load_masks
from tenfold_tost.masking import Masks
from tenfold_tost.pruning import (
    Scope,
    Scores,
    check_density,
    erk_masks,
    grasp_scores,
    keep_above,
    magnitude_scores,
    random_scores,
    snip_scores,
    synflow_masks,
    taylor_scores,
)

MaskMethod = Literal[
    "dense", "lth", "lth-layerwise", "omp", "magnitude", "snip", "grasp", "synflow", "taylor", "random", "erk", "file"
]
Rewind = Literal["init", "late", "none", "random"]
SCORED = ("magnitude", "snip", "grasp", "synflow", "taylor", "random")  # the methods that rank scores
TICKETS = ("lth", "lth-layerwise", "omp")  # the methods that train before they cut


@dataclasses.dataclass
class MaskConfig:
    """Which weights remain."""

    method: MaskMethod = "erk"
    """How the mask is made: by tickets (`lth`, `lth-layerwise`, `omp`), a score at initialisation, at random, or read
    from a file; `dense` masks nothing."""
    density: float = 0.1
    """Fraction of the prunable weights that remains: 1 - sparsity."""
    scope: Scope = "global"
    """Rank the scores over all layers together, or layer by layer."""
    linear: bool = False
    """Prune linear layers too, as the released code does in masks that a score or chance makes at initialisation."""
    batches: int = 1
    """Batches on which SNIP, GraSP and Taylor are scored."""
    percent: float = 0.2
    """Fraction of the survivors that one round of a lottery ticket removes."""
    rewind: Rewind = "init"
    """Weights a ticket is trained from: the initial ones, those of `rewind_epoch`, the trained ones (learning-rate
    rewinding), or, under the mask found from the initial ones, newly drawn ones."""
    rewind_epoch: int = 2
    """The epoch of dense training to which `late` goes back."""
    activation: Literal["relu", SoftKind] = "relu"
    """Activation of the networks whose training finds a ticket, at the released slope for pswish; the ticket itself is
    trained with the recipe's."""
    file: Path | None = None
    """The mask of the method `file`."""
    weights: Path | None = None
    """The initial weights that belong to the mask of the method `file`: any checkpoint of the network, the mask's own file
    where that holds one. Without it they are drawn."""

    def __post_init__(self) -> None:
        """Refuse what makes no mask."""
        check_density(self.density)
        if (self.method == "file") != (self.file is not None):
            raise UserError("--mask.file belongs to --mask.method file, and that method needs it")
        if self.weights is not None and self.method != "file":
            raise UserError(f"--mask.weights belongs to --mask.method file, not to {self.method}")
        for name, default in (("rewind", "init"), ("activation", "relu")):
            value = getattr(self, name)
            if value != default and self.method not in TICKETS:
                raise UserError(
                    f"--mask.{name} {value} is for tickets ({', '.join(TICKETS)}), not for --mask.method {self.method}"
                )
        if self.batches < 1:
            raise UserError(f"--mask.batches takes 1 or more, got {self.batches}")
        if self.scope == "layer" and self.method not in SCORED:
            raise UserError(
                f"--mask.scope layer is for the methods that rank scores ({', '.join(SCORED)}), not for {self.method}; "
                "tickets are cut layer by layer with --mask.method lth-layerwise"
            )
        if not 0.0 < self.percent < 1.0:
            raise UserError(f"--mask.percent is the fraction that a round removes, between 0 and 1, got {self.percent}")


def masks_at_initialisation(
    settings: MaskConfig, model: nn.Module, shape: tuple[int, ...], seed: int, source: Iterator[Batch]
) -> Masks:
    """The mask of every method that does not train: random, by a score, or from a file.

    Args:
        settings: which, and how dense.
        model: at its initial weights; its mode may change.
        shape: (channels, height, width) of a picture, for SynFlow.
        seed: of the random masks.
        source: training batches, for the scores that need them.

    """
    draws = torch.Generator().manual_seed(seed)
    if settings.method == "file":
        assert settings.file is not None
        return load_masks(settings.file, model, settings.density, settings.linear)
    if settings.method == "erk":
        return erk_masks(model, settings.density, settings.linear, draws)
    if settings.method == "synflow":
        return synflow_masks(model.eval(), settings.density, shape, scope=settings.scope, linear=settings.linear)
    if settings.method == "random":
        scores = random_scores(model, settings.linear, draws)
    elif settings.method == "magnitude":
        scores = magnitude_scores(model, settings.linear)
    else:
        batches = [next(source) for _ in range(settings.batches)]
        scorers: dict[str, Callable[..., Scores]] = {
            "snip": snip_scores,
            "grasp": grasp_scores,
            "taylor": taylor_scores,
        }
        scores = scorers[settings.method](model.train(), batches, linear=settings.linear)
    return keep_above(scores, settings.density, settings.scope)
