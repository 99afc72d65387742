"""All the hyperparameters of an experiment."""

import dataclasses

from tenfold_shared.errors import UserError
from tenfold_tost.data import DataConfig
from tenfold_tost.ghosts import Skips, Smoothing, Soft, SparseRecipe, parse_techniques
from tenfold_tost.lrsi import Lrsi
from tenfold_tost.maskmaking import MaskConfig


@dataclasses.dataclass
class Recipe:
    """One experiment."""

    techniques: str = "tost"
    """vanilla, tost (all four), or any of soft, skip, ls, lrsi joined by "+"."""
    arch: str = "digits_net"
    """Architecture."""
    epochs: int = 30
    """Passes over the training images."""
    batch_size: int = 64
    """Images a step, over all processes."""
    lr: float = 0.1
    """Learning rate at its peak."""
    milestones: list[int] = dataclasses.field(default_factory=lambda: [15, 22])
    """Epochs (0-based) at which the learning rate falls to a tenth."""
    warmup_steps: int = 0
    """Steps before the first epoch, on its batches, the rate rising linearly: a control that spends what the learned
    scales cost; not in the training that finds a ticket, whose mask is every arm's."""
    momentum: float = 0.9
    """Momentum."""
    weight_decay: float = 2e-4
    """Weight decay."""
    decay_norm: bool = True
    """Let weight decay act on batch norm too."""
    ghost_fraction: float = 0.5
    """Part of training in which soft neurons and ghost skips fade."""
    recalibrate: int = 0
    """Training batches from which batch norm's statistics are taken anew once the ghosts are gone; 0: they adapt."""
    evaluate_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    mask: MaskConfig = dataclasses.field(default_factory=MaskConfig)
    """The mask."""
    soft: Soft = dataclasses.field(default_factory=Soft)
    """Ghost soft neurons, where the techniques have them."""
    skip: Skips = dataclasses.field(default_factory=Skips)
    """Ghost skips, where the techniques have them."""
    ls: Smoothing = dataclasses.field(default_factory=Smoothing)
    """Label smoothing, where the techniques have it."""
    lrsi: Lrsi = dataclasses.field(default_factory=Lrsi)
    """The learned scales, where the techniques have them."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The images."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before anything is."""
        self.plan()
        for name in ("epochs", "batch_size", "evaluate_every"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} takes 1 or more, got {getattr(self, name)}")
        for name in ("lr", "momentum", "weight_decay", "warmup_steps", "recalibrate"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} takes 0 or more, got {getattr(self, name)}")
        if any(milestone < 0 for milestone in self.milestones):
            raise UserError(f"--milestones takes epochs from 0 on, got {self.milestones}")
        if self.mask.rewind == "late" and not 0 <= self.mask.rewind_epoch <= self.epochs:
            raise UserError(
                f"--mask.rewind_epoch {self.mask.rewind_epoch} lies outside of the {self.epochs} epochs of training"
            )

    def plan(self) -> SparseRecipe:
        """The techniques in force with their settings."""
        chosen = parse_techniques(self.techniques)
        return SparseRecipe(
            soft=self.soft if "soft" in chosen else None,
            skips=self.skip if "skip" in chosen else None,
            smoothing=self.ls if "ls" in chosen else None,
            lrsi=self.lrsi if "lrsi" in chosen else None,
            ghost_fraction=self.ghost_fraction,
        )


VANILLA = SparseRecipe(soft=None, skips=None, smoothing=None, lrsi=None)
