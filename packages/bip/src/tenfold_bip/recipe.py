"""What an experiment is: a method, an architecture, images, and the schedules of its phases (section 6)."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

from tenfold_bip.data import DataConfig
from tenfold_bip.projections import check_keep
from tenfold_shared.errors import UserError

Method = Literal["dense", "bip", "imp", "omp", "random", "snip", "grasp", "synflow", "hydra", "finetune"]
FROM_TRAINED: tuple[Method, ...] = ("bip", "imp", "omp", "hydra")
"""The methods that prune a densely trained network; the others but ``finetune`` start from the initialisation."""


@dataclasses.dataclass
class Phase:
    """SGD over some epochs."""

    epochs: int = 30
    """Passes over the training images."""
    lr: float = 0.1
    """Learning rate at its peak."""
    schedule: Literal["cosine", "step", "mask_step"] = "cosine"
    """Learning rate by epoch."""
    momentum: float = 0.9
    """Momentum."""
    weight_decay: float = 5e-4
    """Weight decay; in BiP's lower level it is the quadratic term of the problem."""


@dataclasses.dataclass
class Bilevel:
    """BiP's own settings (sections 2.2-2.6)."""

    epochs: int = 30
    """Passes over the training images; a held-out upper level, which has fewer, is gone through as often as it takes."""
    alpha: float = 0.01
    """Step size of the lower level (weights)."""
    alpha_schedule: Literal["cosine", "step", "mask_step"] = "cosine"
    """Schedule of alpha."""
    beta: float = 0.1
    """Step size of the upper level (scores)."""
    beta_schedule: Literal["cosine", "step", "mask_step"] = "step"
    """Schedule of beta."""
    gamma: float = 1.0
    """Strength of the lower level's quadratic term in the implicit gradient."""
    lower_steps: int = 1
    """Lower-level steps N before each upper-level step."""
    ig: Literal["closed_form", "released", "none"] = "closed_form"
    """Implicit gradient: the paper's closed form, the released code's squared score gradient, or none."""
    lr2: float = 1e-4
    """Strength of the released implicit gradient."""
    scores_init: Literal["weight", "random"] = "weight"
    """Where the scores start."""
    tie_scores: bool = False
    """Let scores and weights share memory, as the released code does."""
    trainer: Literal["paper", "released"] = "paper"
    """The paper's two passes an iteration, or the released trainer's exact update with its four."""
    momentum: float = 0.9
    """Momentum of both levels."""
    weight_decay: float = 1e-4
    """Weight decay of both levels."""
    score_decay: float | None = None
    """Weight decay of the scores, where it is to be another."""


@dataclasses.dataclass
class Recipe:
    """One experiment."""

    method: Method = "bip"
    """How to prune; ``dense`` does not, ``finetune`` goes on with a pruned network under its masks."""
    arch: str = "digits_cnn"
    """Architecture."""
    keep: float = 0.1
    """Keep ratio k: the fraction of the prunable weights that remains; n:m has n/m whatever is given."""
    structure: str = "global"
    """What is pruned: global, layer, filter, channel, or n:m such as 2:4."""
    min_keep: int = 0
    """Weights that every layer keeps at least."""
    batch_size: int = 64
    """Images a step, over all processes."""
    rewind_epoch: int = 2
    """Epoch of dense training to which OMP and IMP rewind; 0 is the initialisation."""
    prune_rate: float = 0.2
    """Fraction of the survivors that one IMP round removes."""
    score_batches: int = 1
    """Batches on which SNIP and GraSP are scored."""
    pretrained: Path | None = None
    """A dense run's folder or checkpoint to start from in place of dense training, for bip, imp, omp and hydra; the pruned
    one that ``finetune`` is of."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The images."""
    dense: Phase = dataclasses.field(default_factory=Phase)
    """Dense training."""
    sparse: Phase = dataclasses.field(default_factory=Phase)
    """Training under a fixed mask: after a one-shot cut, or one round of IMP."""
    hydra: Phase = dataclasses.field(default_factory=Phase)
    """Hydra's training of the scores."""
    bilevel: Bilevel = dataclasses.field(default_factory=Bilevel)
    """BiP."""
    recalibrate: int = 0
    """Batches on which the statistics of batch normalisation are gathered anew under the final mask of BiP or Hydra."""
    finetune: Phase = dataclasses.field(default_factory=lambda: Phase(epochs=0))
    """Training under the final mask after BiP or Hydra, or of a pruned network; no epochs: none."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before anything is."""
        try:
            check_keep(self.keep)
        except ValueError as error:
            raise UserError(f"--keep: {error}") from error
        self._check_ranges()
        if not 0 <= self.rewind_epoch <= self.dense.epochs:
            raise UserError(
                f"--rewind_epoch {self.rewind_epoch} lies outside of the {self.dense.epochs} epochs of dense training"
            )
        if self.bilevel.trainer == "released" and self.bilevel.lower_steps != 1:
            raise UserError("--bilevel.lower_steps: the released trainer takes one; use --bilevel.trainer paper")
        if self.bilevel.trainer == "released" and self.bilevel.ig != "released":
            raise UserError(
                f"--bilevel.ig {self.bilevel.ig}: the released trainer has an implicit term of its own; give "
                "--bilevel.ig released, with --bilevel.lr2 0 to leave it out"
            )
        if self.bilevel.tie_scores and self.bilevel.scores_init != "weight":
            raise UserError("--bilevel.scores_init random: tied scores are the weights themselves, drop one of the two")
        if self.method == "finetune" and not (self.pretrained and self.finetune.epochs):
            raise UserError("--method finetune: give the pruned network, --pretrained, and --finetune.epochs")
        if self.pretrained is not None and self.method not in (*FROM_TRAINED, "finetune"):
            raise UserError(f"--pretrained: {self.method} starts from the initialisation, not from a trained network")
        if self.method == "imp" and ":" in self.structure:
            raise UserError(f"--structure {self.structure}: IMP cuts more in every round, which n:m does not; use omp")

    def _check_ranges(self) -> None:
        phases = {"dense": self.dense, "sparse": self.sparse, "hydra": self.hydra, "finetune": self.finetune}
        loops: dict[str, Phase | Bilevel] = {**phases, "bilevel": self.bilevel}
        counts = {
            "batch_size": self.batch_size,
            "score_batches": self.score_batches,
            "bilevel.lower_steps": self.bilevel.lower_steps,
            **{f"{name}.epochs": loop.epochs for name, loop in loops.items() if name != "finetune"},
        }
        not_negative = {
            "min_keep": self.min_keep,
            "finetune.epochs": self.finetune.epochs,
            "bilevel.alpha": self.bilevel.alpha,
            "bilevel.beta": self.bilevel.beta,
            "bilevel.lr2": self.bilevel.lr2,
            "bilevel.score_decay": self.bilevel.score_decay or 0.0,
            "recalibrate": self.recalibrate,
            **{f"{name}.lr": phase.lr for name, phase in phases.items()},
            **{f"{name}.weight_decay": loop.weight_decay for name, loop in loops.items()},
        }
        momenta = {f"{name}.momentum": loop.momentum for name, loop in loops.items()}
        for values, fits, wanted in (
            (counts, lambda value: value >= 1, "1 or more"),
            (not_negative, lambda value: 0 <= value < math.inf, "0 or more"),
            (momenta, lambda value: 0 <= value < 1, "a value in [0, 1)"),
            ({"bilevel.gamma": self.bilevel.gamma}, lambda value: value > 0, "a value above 0"),
            ({"prune_rate": self.prune_rate}, lambda value: 0 < value < 1, "a fraction in (0, 1)"),
        ):
            for name, value in values.items():
                if not fits(value):
                    raise UserError(f"--{name} takes {wanted}, got {value}")
