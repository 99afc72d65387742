"""One experiment as a dataclass: the recipe files hold its values, the command line overrides them."""

import dataclasses
from typing import Literal

from tenfold_cilqud.anchors import AnchorRule
from tenfold_cilqud.data import DataConfig
from tenfold_cilqud.evaluate import Evaluation
from tenfold_cilqud.objective import Distance, Weights
from tenfold_cilqud.pools import PoolConfig
from tenfold_cilqud.query import Metric, Order
from tenfold_cilqud.robust import Robust
from tenfold_shared.errors import UserError

Method = Literal["cil-qud", "finetune", "joint", "replay", "lwf", "icarl", "eeil", "bic", "wa", "il2m", "dmc", "rwalk"]


@dataclasses.dataclass
class QueryConfig:
    """Which pool images are taken (section 2.3)."""

    strategy: Literal["query", "random", "confidence", "all", "anchors"] = "query"
    """The anchors' nearest neighbours; the same number at random, or of the surest answers; the whole pool; or no pool:
    the anchors themselves."""
    per_anchor: int = 50
    """Neighbours k of an anchor."""
    max_total: int = 0
    """Take no more in all; 0 for no limit."""
    metric: Metric = "l2"
    """Distance of the features."""
    feature: Literal["penultimate", "logits"] = "penultimate"
    """What is compared."""
    order: Order = "stored"
    """Anchors take all their neighbours one after the other, or one a round."""
    approximate: int = 0
    """Search on so many principal components of the features, and report the recall; 0 searches exactly."""


@dataclasses.dataclass
class Recipe:
    """One experiment."""

    method: Method = "cil-qud"
    """The learner: CIL-QUD (robust by --robust), or a baseline."""
    heads: Literal["two", "random", "balanced"] = "two"
    """CIL-QUD's classifiers: primary on balanced and auxiliary on random batches, or a single one on either."""
    distill: Literal["none", "kd", "ft", "kd+ft"] = "kd"
    """Learning without forgetting on unlabeled images: by outputs, by features, both, or not at all."""
    arch: str = "small"
    """Architecture: preact18, preact34, preact50, small, or one of torchvision."""
    width: int = 0
    """Channels of the first layer; 0 is the architecture's own."""
    epochs: int = 100
    """Passes of a task over its random batches."""
    steps: int = 0
    """Steps of a task, in place of epochs; 0 counts epochs."""
    batch_size: int = 256
    """Images a step of the first task, over all processes."""
    sub_batch: int = 0
    """Images of each kind in a later step; 0 takes a quarter of the batch size."""
    sampler: Literal["groups", "joined", "class_balanced"] = "groups"
    """Balanced batches: new and old images passed apart and weighted by their numbers (as released), both groups in one
    batch drawn with replacement, or every class equally frequent."""
    lr: float = 0.01
    """Learning rate at a task's beginning."""
    momentum: float = 0.9
    """Momentum; its buffers are cleared at every task."""
    weight_decay: float = 5e-4
    """Weight decay of every parameter that has a gradient."""
    milestones: list[float] = dataclasses.field(default_factory=lambda: [0.6, 0.8])
    """Fractions of a task after which the learning rate falls to a tenth."""
    primary_weight: float = 0.5
    """Weight of the primary head's terms after the first task; the auxiliary head's is 1."""
    lambda_lwf: float = 1.0
    """Weight lambda of learning without forgetting."""
    temperature: float = 2.0
    """Temperature T of the distillation."""
    kd_T2: bool = True
    """Multiply the distillation by T^2 (as released)."""
    distance: Distance = "mse"
    """Feature transfer's distance."""
    reaugment: bool = False
    """Augment unlabeled images anew at every step; as released they are augmented once a task."""
    select: Literal["last", "best"] = "last"
    """Weights that a task ends with: the last, or the best on the validation images of all classes seen (as released)."""
    binary: bool = False
    """LwF and iCaRL in their binary form."""
    rwalk_lambda: float = 1.0
    """Weight of RWalk's penalty."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The labelled images and the protocol."""
    pool: PoolConfig = dataclasses.field(default_factory=PoolConfig)
    """The unlabeled images."""
    query: QueryConfig = dataclasses.field(default_factory=QueryConfig)
    """Which of them are taken."""
    robust: Robust = dataclasses.field(default_factory=Robust)
    """Attacks in training."""
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    """Tests after every task."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before anything is."""
        self.data = self.pool.holding_back(self.data)
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} takes 1 or more, got {getattr(self, name)}")
        for name in ("steps", "sub_batch", "width", "weight_decay", "primary_weight", "lambda_lwf", "rwalk_lambda"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} takes 0 or more, got {getattr(self, name)}")
        for name in ("per_anchor", "max_total", "approximate"):
            if getattr(self.query, name) < 0:
                raise UserError(f"--query.{name} takes 0 or more, got {getattr(self.query, name)}")
        if not self.sub_batch and self.batch_size < 4:
            raise UserError(
                f"--batch_size {self.batch_size}: a quarter of it, which later steps take, is nothing; take 4 or more, or "
                "say with --sub_batch how many"
            )
        if self.lr <= 0 or not 0 <= self.momentum < 1:
            raise UserError(f"--lr is positive and --momentum in [0, 1), got {self.lr} and {self.momentum}")
        if self.uses_pool and self.query.strategy not in ("all", "anchors") and self.query.per_anchor < 1:
            raise UserError("--query.per_anchor 0 makes an empty query: take 1 or more, or --distill none")
        if self.select == "best" and not (self.data.validation or self.data.name.startswith("official")):
            raise UserError("--select best chooses by validation images: hold some out with --data.validation")
        if self.temperature <= 0 or any(not 0 < fraction <= 1 for fraction in self.milestones):
            raise UserError("--temperature is positive, and --milestones are fractions of a task in (0, 1]")
        robust_lwf = self.robust.lwf == "attacked" or self.robust.gamma2 > 0
        if robust_lwf and (self.method != "cil-qud" or self.distill == "none"):
            raise UserError(
                "--robust.lwf attacked and --robust.gamma2 attack unlabeled images, which this method has none of: take "
                "--robust.lwf clean --robust.gamma2 0, which leaves --robust.adv"
            )

    @property
    def uses_pool(self) -> bool:
        """Whether unlabeled images are needed."""
        return (self.method == "cil-qud" and self.distill != "none") or self.method == "dmc"

    @property
    def anchor_rule(self) -> AnchorRule:
        """How anchors are chosen: as the data say, or as the method does (section 8)."""
        return self.data.anchor_rule or ("herding" if self.method == "icarl" else "random")

    @property
    def weights(self) -> Weights:
        """Weights of the terms; a single head counts fully."""
        return Weights(
            main=self.primary_weight if self.heads == "two" else 1.0,
            lwf=self.lambda_lwf * (self.robust.gamma1 if self.robust.lwf == "attacked" else 1.0),
            temperature=self.temperature,
            kd_factor=None if self.kd_T2 else 1.0,
            distance=self.distance,
            trades=self.robust.trades_beta,
        )
