"""The metrics (section 9) on nodes and memberships, and the evaluation of a checkpoint."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tenfold_hypergcl.compat import load_official_checkpoint, load_state
from tenfold_hypergcl.data import Dataset, load_data, split_of
from tenfold_hypergcl.fairness import binary_scores, counterfactual_flips, equal_opportunity, statistical_parity
from tenfold_hypergcl.hypergraph import Hypergraph
from tenfold_hypergcl.linkpred import link_split, membership_auc
from tenfold_hypergcl.models import node_logits
from tenfold_hypergcl.propagate import Features, SparseFeatures
from tenfold_hypergcl.protocol import accuracy
from tenfold_hypergcl.recipe import Recipe, create, fields, recipe_of
from tenfold_hypergcl.setgnn import SetGNN
from tenfold_hypergcl.steps import ReceptiveField
from tenfold_shared.checkpoint import load_weights
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions, seed_everything


@dataclasses.dataclass
class EvalConfig:
    """What to evaluate."""

    checkpoint: Path
    """A run's folder, a .safetensors file of ours (both on the split of their training), or a .pt file of the authors' layout (on
    split --seed)."""
    data: str = ""
    """The data set; default: the one that the checkpoint was trained on, or digits."""
    root: Path | None = None
    """Folder that holds the data sets; default: $TENFOLD_DATA or the platform's cache."""
    attack: Literal["none", "minmax", "net", "remove", "degree"] | None = None
    """Evaluate on poisoned structure, or on clean one; default: as in training."""


@torch.inference_mode()
def evaluate_nodes(
    model: nn.Module,
    field: ReceptiveField,
    labels: Tensor,
    what: str = "accuracy",
    data: Dataset | None = None,
    nodes: Tensor | None = None,
) -> dict[str, float]:
    """Metrics of the field's nodes in [0, 1], the model in evaluation mode: ``accuracy``; ``auc`` or ``nll`` (with F1); ``all``, which
    for the fairness sets adds the gaps and needs the whole ``data`` and the ``nodes``' ids in it.
    """
    training = model.training
    model.eval()
    logits = node_logits(model, field.x, field.incidence, field.rows).float()
    found = {"accuracy": float(accuracy(logits, labels))}
    if what != "accuracy":
        found |= binary_scores(logits, labels)
    if what == "all":
        assert data is not None
        assert nodes is not None
        found |= fairness(model, field, data, nodes, labels)
    model.train(training)
    return found


def fairness(model: nn.Module, field: ReceptiveField, data: Dataset, nodes: Tensor, labels: Tensor) -> dict[str, float]:
    """The gaps of statistical parity and equal opportunity, and the share of predictions that follow the sensitive attribute."""
    assert data.sensitive_column is not None
    x = data.x.to_dense() if isinstance(data.x, SparseFeatures) else data.x
    structure = field.incidence if field.x is data.x else data.hypergraph
    everyone = torch.arange(x.shape[0], device=x.device)

    def predict(features: Tensor) -> Tensor:
        return node_logits(model, features, structure, everyone).argmax(1)

    sensitive, predicted = x[nodes, data.sensitive_column], predict(x)[nodes]
    return {
        "statistical_parity": statistical_parity(predicted, sensitive),
        "equal_opportunity": equal_opportunity(predicted, labels, sensitive),
        "counterfactual": counterfactual_flips(predict, x, data.sensitive_column, nodes),
    }


def evaluate_links(
    model: nn.Module, x: Features, h: Hypergraph, positive: Tensor, negative: Tensor
) -> dict[str, float]:
    """ROC-AUC of true memberships against pairs that are none."""
    assert isinstance(model, SetGNN)
    return {"auc": membership_auc(model, x, h, positive, negative)}


def weights_file(checkpoint: Path) -> Path:
    """The weights of a run's selected epoch, or the file itself."""
    return checkpoint / "checkpoints" / "best.safetensors" if checkpoint.is_dir() else checkpoint


def evaluate(config: EvalConfig, options: RunOptions) -> None:
    """Print the metrics of a checkpoint on the training, validation and test nodes (or memberships) of its split as one JSON line."""
    released, recipe, about = _load(config)
    seed = about.get("seed", options.seed)
    with Run.evaluation("hypergcl", options) as run:
        if run.is_main and options.seed not in (RunOptions.seed, seed):
            print(
                f"note: evaluated on the split of the training, {seed}, not on --seed {options.seed}", file=sys.stderr
            )
        seed_everything(seed, "data")
        data = load_data(recipe.data).to(run.device)
        if released is None:
            seed_everything(seed, "init")  # HyperGCN's operator is drawn after the weights, as in training.
            model = create(recipe, data)
            load_state(model, about["state"])
        else:
            model = _fitting(released, data)
        model.to(run.device)
        with run.accelerator.autocast():
            found = _metrics(model, recipe, data, seed)
        if run.is_main:
            shown = {"data": recipe.data.name, "method": recipe.method, "model": recipe.model, "seed": seed}
            print(json.dumps({**shown, **found}))


def _fitting(model: SetGNN, data: Dataset) -> SetGNN:
    """The network, if it reads the data's features and tells its classes apart."""
    reads, classes = next(p for p in model.parameters() if p.dim() == 2).shape[1], model.linear.out_features
    for noun, own, there in (("features", reads, data.x.shape[1]), ("classes", classes, data.num_classes)):
        if own != there:
            raise UserError(f"the network is for {own} {noun} and {data.name} has {there}: choose another --data")
    return model


def _load(config: EvalConfig) -> tuple[SetGNN | None, Recipe, dict[str, Any]]:
    """The authors' network with the default recipe, or none but our recipe and state."""
    path = weights_file(config.checkpoint)
    state, metadata = load_weights(path) if path.suffix == ".safetensors" else ({}, {})
    model, about = None, {"state": state, **metadata}
    if "recipe" in metadata:
        recipe = recipe_of(about.pop("recipe"))
    else:
        found = load_official_checkpoint(path)
        assert isinstance(found, SetGNN)  # Nothing else is recognised.
        model = found
        recipe = Recipe(method="supervised", encoder=model.config)
    data = dataclasses.replace(recipe.data, name=config.data or recipe.data.name)
    data = dataclasses.replace(data, root=config.root or (None if data.root is None else Path(data.root)))
    if config.attack is not None:
        data = dataclasses.replace(data, attack=config.attack)
    return model, dataclasses.replace(recipe, data=data), about


def _metrics(model: nn.Module, recipe: Recipe, data: Dataset, seed: int) -> dict[str, Any]:
    if recipe.task == "memberships":
        split = link_split(data.hypergraph, seed)
        pairs = {"valid": (split.valid, split.valid_negatives), "test": (split.test, split.test_negatives)}
        aucs = {name: evaluate_links(model, data.x, split.hypergraph, *both)["auc"] for name, both in pairs.items()}
        return {name: {"auc": 100 * auc} for name, auc in aucs.items()}
    nodes = split_of(recipe.data, data, seed).to(data.labels.device)
    what = "all" if data.sensitive_column is not None else "accuracy"
    return {
        name: {
            key: 100 * value
            for key, value in evaluate_nodes(
                model, field, data.labels[getattr(nodes, name)], what, data, getattr(nodes, name)
            ).items()
        }
        for name, field in fields(recipe, data, nodes).items()
    }
