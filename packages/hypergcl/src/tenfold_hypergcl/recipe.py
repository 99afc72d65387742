"""One experiment as data: every hyperparameter (section 6), and the model and its inputs that follow from them."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from torch import nn

from tenfold_hypergcl.augment import NAMES
from tenfold_hypergcl.contrast import MIN_TEMPERATURE
from tenfold_hypergcl.data import DataConfig, Dataset
from tenfold_hypergcl.minibatch import SUB_SIZE
from tenfold_hypergcl.models import ModelName, create_model, structure_of
from tenfold_hypergcl.protocol import Split
from tenfold_hypergcl.setgnn import EncoderConfig
from tenfold_hypergcl.steps import ReceptiveField, field_of
from tenfold_shared.errors import UserError

Method = Literal[
    "supervised", "A0", "A1", "A2", "A3", "A4", "A5", "A6", "clique",
    "A2_add", "mask_col", "mask_zero", "adapt_edge", "adapt_feat", "adapt",
]  # fmt: skip


@dataclasses.dataclass
class Generator:
    """The generative augmentation A6 (section 2.6)."""

    lr: float = 1e-3
    """Adam's learning rate for the generator."""
    contrast_weight: float = 10.0
    """Weight g_l of the contrastive term that the generator maximises."""
    steps: int = 1
    """Generator steps before each model step."""
    hard: bool = True
    """Keep or drop each membership (straight-through), instead of soft weights."""
    kl_scale: Literal["code", "paper"] = "code"
    """The KL terms divided by the number of rows once more, as released, or not."""
    objective: Literal["vhgae", "drop"] = "vhgae"
    """The auto-encoder's loss, or the distance of the drop ratio from 0.3."""
    drop_weight: float = 0.0
    """Weight d_l of the distance of the drop ratio from 0.3."""
    views: Literal["a2-gen", "clean-gen", "gen-gen"] = "a2-gen"
    """The two views of the model's step."""

    def __post_init__(self) -> None:
        """Refuse what no generator is trained by."""
        if self.steps < 1:
            raise UserError(f"--generator.steps takes 1 or more, got {self.steps}")
        for name in ("lr", "contrast_weight", "drop_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--generator.{name} takes 0 or more, got {getattr(self, name)}")


@dataclasses.dataclass
class Recipe:
    """One experiment."""

    method: Method = "A2"
    """No contrast, a fabricated augmentation A0-A5 (or one of the released code's further ones), A6, or the clique expansion's view."""
    task: Literal["nodes", "memberships"] = "nodes"
    """Classify nodes, or predict which node belongs to which hyperedge."""
    model: ModelName = "setgnn"
    """The paper's encoder, or a baseline (which has no contrast)."""
    encoder: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
    """The encoder; the generator of A6 has the same."""
    projection: int = 128
    """Width P of the projection head."""
    head_layers: int = 1
    """Linear maps in the classifier and in the projection head."""
    baseline_layers: int = 2
    """Layers of a baseline."""
    epochs: int = 500
    """Full-batch epochs."""
    lr: float = 1e-3
    """Adam's learning rate (unigcnii has its own: 0.01)."""
    weight_decay: float = 0.0
    """Adam's weight decay, in the gradient (unigcnii has its own: 0.01 and 5e-4)."""
    loss: Literal["info_nce", "jsd", "triplet"] = "info_nce"
    """The contrastive loss."""
    temperature: float = 0.3
    """Temperature t of InfoNCE."""
    ratio: float = 0.3
    """Augmentation ratio r."""
    contrast_weight: float = 0.1
    """Weight of the contrastive term: m_l of fabricated arms, a_l of A6."""
    generator: Generator = dataclasses.field(default_factory=Generator)
    """The generator of A6."""
    sub_size: int = SUB_SIZE
    """Hypergraphs with more nodes are contrasted on this many random ones an epoch."""
    batch_size: int = 0
    """Nodes of a mini-batch with a sampled neighbourhood, for hypergraphs that do not fit; 0: the whole hypergraph at once."""
    pretrain_epochs: int = 0
    """Epochs of the contrast alone, before the training."""
    pretrain_lr: float = 1e-3
    """Adam's learning rate in them."""
    carry_heads: Path | None = None
    """A run whose heads this one starts with, as the released code's runs took over the heads of the run before."""
    select: Literal["accuracy", "auc", "nll"] = "accuracy"
    """What of the validation nodes chooses the epoch; auc and nll are for the fairness sets."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The hypergraph."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before anything is."""
        for name in ("epochs", "projection", "head_layers", "baseline_layers", "sub_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} takes 1 or more, got {getattr(self, name)}")
        for name in ("lr", "weight_decay", "contrast_weight", "pretrain_lr", "batch_size"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} takes 0 or more, got {getattr(self, name)}")
        if not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise UserError(f"--temperature is {MIN_TEMPERATURE} or more, got {self.temperature}")
        if not 0 <= self.ratio < 1:
            raise UserError(f"--ratio is an augmentation ratio in [0, 1), got {self.ratio}")
        if self.model != "setgnn" and (self.method != "supervised" or self.task != "nodes"):
            raise UserError(f"--model {self.model} is a baseline: it is trained with --method supervised on nodes only")
        if self.batch_size and (self.task != "nodes" or self.method in {"supervised", "A6", "clique"}):
            raise UserError(
                f"--batch_size {self.batch_size} is for nodes and fabricated augmentations: use --method A0 to A5"
            )
        if self.pretrain_epochs < 0 or (self.pretrain_epochs and (self.task != "nodes" or self.method not in NAMES)):
            raise UserError(f"--pretrain_epochs {self.pretrain_epochs} is for nodes and --method {' '.join(NAMES)}")
        if self.task == "memberships" and self.method in {"A6", "clique", "A3", "A5"}:
            raise UserError(f"--method {self.method} is not for --task memberships: use supervised, A0, A1, A2 or A4")
        if self.task == "memberships" and self.select == "nll":
            raise UserError("--select nll is for nodes: --task memberships chooses the epoch by the AUC")
        if self.task == "memberships" and self.carry_heads is not None:
            raise UserError(
                f"--carry_heads {self.carry_heads} is for nodes: --task memberships starts from fresh heads"
            )


def recipe_of(content: dict[str, Any]) -> Recipe:
    """The recipe that a checkpoint's metadata holds.

    Raises:
        UserError: for content that is no recipe.
    """
    parts = {"encoder": EncoderConfig, "generator": Generator, "data": DataConfig}
    try:
        return Recipe(**{key: parts[key](**value) if key in parts else value for key, value in content.items()})
    except TypeError as error:
        raise UserError(f"the checkpoint was written by another version ({error})") from error


def create(recipe: Recipe, data: Dataset) -> nn.Module:
    """The recipe's model for a data set.

    Raises:
        UserError: sizes that do not go together.
    """
    try:
        model = create_model(
            recipe.model,
            data.x.shape[1],
            data.num_classes,
            recipe.encoder,
            recipe.projection,
            recipe.head_layers,
            recipe.baseline_layers,
            wide=Path(recipe.data.name).name == "citeseer",
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    return model.to(data.labels.device)


def fields(recipe: Recipe, data: Dataset, split: Split) -> dict[str, ReceptiveField]:
    """What the model reads for the training, validation and test nodes."""
    parts = {"train": split.train, "valid": split.valid, "test": split.test}
    if recipe.model == "setgnn":
        return {name: field_of(recipe.encoder, data.hypergraph, data.x, nodes) for name, nodes in parts.items()}
    structure = structure_of(recipe.model, data.hypergraph, data.x)
    return {name: ReceptiveField(structure, data.x, nodes) for name, nodes in parts.items()}
