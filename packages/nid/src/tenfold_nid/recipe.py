"""An experiment as data: all that `train`, `eval` and `reproduce` read."""

import dataclasses
from pathlib import Path
from typing import Literal

from tenfold_shared.errors import UserError

from .dictionary import DictionaryConfig
from .gating import ImportanceMode, LoadMode
from .networks import NetworkConfig
from .optimisation import Objective
from .signals import DataConfig
from .solvers import FitOptions

Method = Literal[
    "nid", "scratch", "maml", "reptile", "latent", "pca", "ksvd", "interpolation", "fbp", "tv", "rpca", "median"
]
UNTRAINED = ("interpolation", "fbp", "tv", "rpca", "median")
"""Methods that learn nothing before they see the signal."""
LINEAR = ("pca", "ksvd")
"""Methods that are linear algebra alone."""


@dataclasses.dataclass
class Schedule:
    """Optimisation over the training signals (sections 2.4 and 6)."""

    epochs: int = 5000
    """Passes over the training signals; for scratch, steps of each signal's network."""
    batch_size: int = 64
    """Signals a step, over all processes."""
    chunk_size: int = 1024
    """Coordinates (rays in tomography) a step."""
    inner_loop: Literal["recursive", "random"] = "recursive"
    """A step for every chunk of the lattice, or one chunk a batch."""
    warmup_epochs: int = 0
    """Epochs, from the first on, in which every atom is on."""
    official_warmup: bool = False
    """Keep one more epoch dense, as the released code does."""
    lr: float = 1e-4
    """Step size of Adam."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Step size over the run."""
    weight_decay: float = 0.0
    """L2 regularisation of what Adam learns."""

    def __post_init__(self) -> None:
        """Refuse what no run can have."""
        for name in ("epochs", "batch_size", "chunk_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--schedule.{name} takes 1 or more, got {getattr(self, name)}")
        if not 0 < self.lr < float("inf"):
            raise UserError(f"--schedule.lr takes a positive number, got {self.lr}")
        if self.warmup_epochs < 0:
            raise UserError(f"--schedule.warmup_epochs takes 0 or more, got {self.warmup_epochs}")


@dataclasses.dataclass
class Meta:
    """A learned start for networks (section 8)."""

    inner_steps: int = 3
    """Gradient steps on each signal."""
    inner_lr: float = 1e-2
    """Their step size."""
    second_order: bool = True
    """Differentiate through the inner steps (MAML)."""
    rate: float = 0.1
    """ε of Reptile."""
    test_optimiser: Literal["sgd", "adam"] = "sgd"
    """What goes on from the start on a new signal."""

    def __post_init__(self) -> None:
        """Refuse steps that lead nowhere."""
        if self.inner_steps < 1 or self.inner_lr <= 0 or self.rate <= 0:
            raise UserError(
                "--meta.inner_steps takes 1 or more, --meta.inner_lr and --meta.rate positive numbers, "
                f"got {self.inner_steps}, {self.inner_lr} and {self.rate}"
            )


@dataclasses.dataclass
class Linear:
    """Dictionaries on the sample grid."""

    components: int = 64
    """Principal components, or atoms of K-SVD."""
    sparsity: int = 64
    """Atoms a signal of K-SVD."""
    iterations: int = 10
    """Alternations of K-SVD."""
    signals: int = 2000
    """Training signals, spread over all of them, that K-SVD learns from."""

    def __post_init__(self) -> None:
        """Refuse what is no dictionary."""
        for name in ("components", "sparsity", "iterations", "signals"):
            if getattr(self, name) < 1:
                raise UserError(f"--linear.{name} takes 1 or more, got {getattr(self, name)}")


@dataclasses.dataclass
class Recipe:
    """One experiment."""

    method: Method = "nid"
    """What represents the signals: the neural dictionary; a network a signal from scratch, or from a start learned by
    MAML or Reptile; an auto-decoder; PCA, K-SVD; or interpolation, filtered back-projection, total variation, robust PCA, the median over time."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The signals."""
    model: DictionaryConfig = dataclasses.field(default_factory=DictionaryConfig)
    """The dictionary; in_dim, out_dim, size and num_signals follow from the data."""
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    """The network of scratch, maml, reptile and latent; in_dim and out_dim follow from the data."""
    objective: Objective = dataclasses.field(default_factory=Objective)
    """The loss."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    """Its optimisation."""
    load_mode: LoadMode = "abs"
    """Whether the load counts atoms in use, or those with a positive coefficient only (official)."""
    importance_mode: ImportanceMode = "abs"
    """Whether the importance sums magnitudes, or is the released signed sum."""
    meta: Meta = dataclasses.field(default_factory=Meta)
    """Settings of maml and reptile."""
    latent_dim: int = 64
    """Length of the auto-decoder's latent vectors."""
    latent_lr: float = 1e-3
    """Their step size in training; Adam moves all of them at every step, by its moments those of other signals too."""
    linear: Linear = dataclasses.field(default_factory=Linear)
    """Settings of pca and ksvd."""
    pretrained: Path | None = None
    """A run's folder or a checkpoint whose dictionary to start from; its shape takes the place of --model."""
    finetune: bool = False
    """The released fine-tuning: the atoms stay, the gate is trained on the signals to be coded, as they are seen."""
    fit: FitOptions = dataclasses.field(default_factory=FitOptions)
    """How codes of new signals are found; lr and steps also hold for networks and latent vectors."""

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.latent_dim < 1 or self.latent_lr <= 0:
            raise UserError(
                "--latent_dim takes 1 or more and --latent_lr a positive number, "
                f"got {self.latent_dim} and {self.latent_lr}"
            )
        if self.method == "reptile" and (self.schedule.schedule != "constant" or self.schedule.weight_decay):
            raise UserError(
                "--method reptile has no optimiser but the rate of --meta.rate: leave out --schedule.schedule and "
                "--schedule.weight_decay"
            )
        if self.finetune and self.pretrained is None:
            raise UserError("--finetune keeps the atoms of a trained dictionary: name it with --pretrained")
        if self.finetune and self.method != "nid":
            raise UserError(f"--finetune trains the gate of a dictionary, which {self.method} has not")
        if self.finetune and (self.data.fraction < 1 or self.data.test_views):
            raise UserError(
                "--finetune looks at the whole of the signals, and would see what --data.fraction and --data.test_views "
                "hide: leave them out, or use eval with --fit.solver gate, which looks at what is observed"
            )
