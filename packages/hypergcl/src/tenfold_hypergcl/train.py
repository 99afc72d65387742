"""Training at the paper's protocol (sections 2.6, 6 and 9): one run is one split and one explicit loop over full-batch epochs."""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from tenfold_hypergcl.augment import View, fabricate, fabricate_pair
from tenfold_hypergcl.baselines import CliqueNet, Graph, clique_expansion, gcn_normalized
from tenfold_hypergcl.data import Dataset, load_data, split_of
from tenfold_hypergcl.evaluate import evaluate_links, evaluate_nodes
from tenfold_hypergcl.generative import VHGAE
from tenfold_hypergcl.hypergraph import Hypergraph
from tenfold_hypergcl.linkpred import link_split, membership_loss
from tenfold_hypergcl.minibatch import HypergraphSampler, subsample, train_on_batches
from tenfold_hypergcl.models import parameter_groups
from tenfold_hypergcl.propagate import Features
from tenfold_hypergcl.protocol import Split
from tenfold_hypergcl.recipe import Recipe, create, fields
from tenfold_hypergcl.setgnn import INPUT_DROPOUT, SetGNN
from tenfold_hypergcl.steps import (
    Core,
    ReceptiveField,
    compare,
    contrastive_loss,
    core,
    generate_view,
    generated_view,
    generator_step,
    supervised_loss,
)
from tenfold_shared.checkpoint import load_weights
from tenfold_shared.cli import to_yaml
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions, seed_everything


@dataclasses.dataclass
class Result:
    """What a run ends with, in per cent where it is an accuracy, a score or a gap."""

    test: dict[str, float]
    """Metrics on the test nodes at the selected epoch."""
    valid: float
    """The selected epoch's value on the validation nodes."""
    best_epoch: int
    """The selected epoch: the first with the best validation value."""
    drop_ratio: list[float]
    """A6: the generator's drop ratio, at every n-th epoch: 50 to 99 of them, or all of a shorter run."""
    cpu_seconds: float
    """Processor time of this process since it took up the run."""


class Best:
    """The weights at the first best validation value."""

    def __init__(self) -> None:
        self.value, self.epoch = -math.inf, -1
        self.weights: dict[str, Tensor] = {}

    def offer(self, value: float, epoch: int, model: nn.Module) -> None:
        """Take the weights if ``value`` is higher than all before."""
        if value > self.value:
            self.value, self.epoch = value, epoch
            self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs."""
        return {"value": self.value, "epoch": self.epoch, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        self.value, self.epoch, self.weights = state["value"], state["epoch"], dict(state["weights"])


@dataclasses.dataclass
class Session:
    """What an epoch reads and changes."""

    recipe: Recipe
    data: Dataset
    model: nn.Module
    optimiser: Any
    training: ReceptiveField
    labels: Tensor
    generator: VHGAE | None = None
    generator_optimiser: Any = None
    part: Core | None = None
    clique: CliqueNet | None = None

    def tracked(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        found = {name: getattr(self, name) for name in ("generator", "generator_optimiser", "clique")}
        return {name: item for name, item in found.items() if item is not None}


def train(recipe: Recipe, options: RunOptions) -> None:
    """Run a recipe and keep its network."""
    with Run("hypergcl", recipe, options) as run:
        _, result = run_recipe(run, recipe)
        if run.is_main:
            shown = ", ".join(f"{name} {value:.2f}" for name, value in result.test.items())
            split = options.seed if recipe.data.split is None else recipe.data.split
            print(
                f"{recipe.method} {recipe.model} on {recipe.data.name}, split {split}: test {shown} at epoch "
                f"{result.best_epoch} (validation {result.valid:.2f}); {run.directory}"
            )


def run_recipe(run: Run, recipe: Recipe) -> tuple[nn.Module, Result]:
    """Train as the recipe says; returns the network of the selected epoch and what it is worth.

    A full-batch epoch has no batch to divide: several processes all take the same steps, and end with the same network.

    Raises:
        UserError: the recipe does not fit the data, or asks for what this package does not do.
        RunFailure: a loss is no longer finite.

    """
    if run.options.precision == "fp16" or run.options.compile:
        raise UserError(
            "this package trains in fp32 or bf16 and without torch.compile: change --precision or --compile"
        )
    seed = run.options.seed
    seed_everything(seed, "data")
    data = load_data(recipe.data).to(run.device)
    if recipe.task == "memberships":
        return _train_links(run, recipe, data)
    with warnings.catch_warnings():
        if run.options.quiet or not run.is_main:
            warnings.simplefilter("ignore")
        split = split_of(recipe.data, data, seed).to(run.device)
    return _train_nodes(run, recipe, data, split)


def _train_nodes(run: Run, recipe: Recipe, data: Dataset, split: Split) -> tuple[nn.Module, Result]:
    seed, device = run.options.seed, run.device
    if recipe.select != "accuracy" and data.num_classes != 2:
        raise UserError(f"--select {recipe.select} is for two classes and {data.name} has {data.num_classes}")
    seed_everything(seed, "init")
    model = create(recipe, data)
    parts = fields(recipe, data, split)
    optimiser = torch.optim.Adam(parameter_groups(model, recipe.lr, recipe.weight_decay), fused=True)
    session = Session(recipe, data, model, optimiser, parts["train"], data.labels[split.train])
    if recipe.method == "A6":
        session.generator = VHGAE(data.x.shape[1], recipe.encoder).to(device)
        session.generator_optimiser = torch.optim.Adam(
            session.generator.parameters(), lr=recipe.generator.lr, fused=True
        )
        session.part = core(data.hypergraph, data.x)
    if recipe.method == "clique":
        encoder = recipe.encoder
        clique = CliqueNet(data.x.shape[1], encoder.hidden, recipe.projection, p=encoder.dropout, norm=encoder.norm)
        session.clique = clique.to(device)
        optimiser.add_param_group(
            {"params": list(session.clique.parameters()), "lr": recipe.lr, "weight_decay": recipe.weight_decay}
        )
    if recipe.carry_heads is not None:
        carry_heads(model, recipe.carry_heads)
    _pretrain(run, recipe, session)
    epoch_of, best, began = _epoch_of(recipe, data, split), Best(), time.process_time()
    tracked = {"model": model, "optimiser": optimiser, "best": best, **session.tracked()}
    valid_labels = data.labels[split.valid]
    for epoch in run.steps("train", recipe.epochs, **tracked):
        seed_everything(seed, "train", epoch)  # The same in every process.
        with _autocast(run):
            losses = epoch_of(session)
            valid = evaluate_nodes(model, parts["valid"], valid_labels, recipe.select)
        value = 100 * valid[recipe.select]
        best.offer(-value if recipe.select == "nll" else value, epoch, model)
        run.log(**losses, valid=value)
    return _close(
        run,
        recipe,
        model,
        best,
        began,
        data,
        lambda: evaluate_nodes(
            model, parts["test"], data.labels[split.test], "all" if data.sensitive_column is not None else "accuracy",
            data, split.test,
        ),
    )  # fmt: skip


def _pretrain(run: Run, recipe: Recipe, session: Session) -> None:
    """Epochs of the contrast alone (section 6)."""
    if not recipe.pretrain_epochs:
        return
    model = _encoder(session)
    optimiser = torch.optim.Adam(parameter_groups(model, recipe.pretrain_lr, recipe.weight_decay), fused=True)
    for epoch in run.steps("pretrain", recipe.pretrain_epochs, model=model, optimiser=optimiser):
        seed_everything(run.options.seed, "pretrain", epoch)
        model.train()
        optimiser.zero_grad(set_to_none=True)
        with _autocast(run):
            loss = _fabricated_loss(recipe, model, *_contrasted(session))
            loss.backward()
        optimiser.step()
        run.log(contrastive=loss)
    run.complete("pretrain", model)


def carry_heads(model: nn.Module, path: Path) -> None:
    """Start with the heads of another run's last network: the released code resets the encoder alone between runs (section 2.7).

    Raises:
        UserError: for a file that is missing or damaged, and for heads that do not fit.
    """
    state = load_weights(path / "checkpoints" / "last.safetensors" if path.is_dir() else path)[0]
    heads = {key: value for key, value in state.items() if key.split(".")[0] in {"proj_head", "linear", "decoder"}}
    own = model.state_dict()
    if not heads or any(key not in own or own[key].shape != value.shape for key, value in heads.items()):
        raise UserError(f"--carry_heads {path}: its heads do not fit this network")
    model.load_state_dict(own | heads)


def _autocast(run: Run) -> torch.autocast:
    """The run's precision. Weights change within an epoch, and are read with and without gradients: nothing is cached."""
    enabled = run.options.precision == "bf16"
    return torch.autocast(run.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def _train_links(run: Run, recipe: Recipe, data: Dataset) -> tuple[nn.Module, Result]:
    """The paper's side study (section 6): the encoder and its decoder learn which pairs are memberships."""
    seed = run.options.seed
    split = link_split(data.hypergraph, seed)
    data = dataclasses.replace(data, hypergraph=split.hypergraph)
    seed_everything(seed, "init")
    model = create(recipe, data)
    assert isinstance(model, SetGNN)
    optimiser = torch.optim.Adam(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    best, began = Best(), time.process_time()
    for epoch in run.steps("train", recipe.epochs, model=model, optimiser=optimiser, best=best):
        seed_everything(seed, "train", epoch)
        model.train()
        optimiser.zero_grad(set_to_none=True)
        with _autocast(run):
            loss = membership_loss(model, data.x, data.hypergraph)
            loss.backward()
            losses = {"loss": loss.detach()}
            if recipe.method != "supervised":
                contrastive = _fabricated_loss(recipe, model, *_part_of(recipe, data))
                (recipe.contrast_weight * contrastive).backward()
                losses["contrastive"] = contrastive.detach()
        optimiser.step()
        valid = 100 * evaluate_links(model, data.x, split.hypergraph, split.valid, split.valid_negatives)["auc"]
        best.offer(valid, epoch, model)
        run.log(**losses, valid=valid)
    return _close(
        run, recipe, model, best, began, data,
        lambda: evaluate_links(model, data.x, split.hypergraph, split.test, split.test_negatives),
    )  # fmt: skip


def _close(
    run: Run,
    recipe: Recipe,
    model: nn.Module,
    best: Best,
    began: float,
    data: Dataset,
    test: Callable[[], dict[str, float]],
) -> tuple[nn.Module, Result]:
    """The network of the selected epoch, its metrics on what is held out, both kept."""
    content = yaml.safe_load(to_yaml(recipe))
    about = {"recipe": content, "features": data.x.shape[1], "classes": data.num_classes, "seed": run.options.seed}
    run.save_weights("last", model, **about)
    model.load_state_dict(best.weights)
    dropped = run.logged("train", "drop_ratio") if recipe.method == "A6" else []
    result = Result(
        test={name: 100 * value for name, value in test().items()},
        valid=abs(best.value),
        best_epoch=best.epoch,
        drop_ratio=[round(value, 4) for value in dropped[:: max(1, len(dropped) // 50)]],
        cpu_seconds=time.process_time() - began,
    )
    run.save_weights("best", model, **about, epoch=best.epoch, valid=result.valid)
    return model, result


# -- one epoch of each method -----------------------------------------------------------------------------------------


def _epoch_of(recipe: Recipe, data: Dataset, split: Split) -> Callable[[Session], dict[str, Tensor]]:
    if recipe.batch_size:
        return SampledEpoch(data, split.train, recipe)
    if recipe.method == "supervised":
        return supervised_epoch
    if recipe.method == "A6":
        return generative_epoch
    if recipe.method == "clique":
        return CliqueContrast(data.hypergraph, recipe.sub_size)
    return fabricated_epoch


def supervised_epoch(session: Session) -> dict[str, Tensor]:
    """The encoder, or a baseline, without contrast."""
    session.model.train()
    session.optimiser.zero_grad(set_to_none=True)
    loss = supervised_loss(session.model, session.training, session.labels)
    loss.backward()
    session.optimiser.step()
    return {"supervised": loss.detach()}


def fabricated_epoch(session: Session) -> dict[str, Tensor]:
    """The supervised loss plus ``m_l`` times the contrast of two fabricated views.

    The two terms go backward one after the other, so that their graphs are never in memory together.
    """
    recipe, model = session.recipe, _encoder(session)
    h, x = _contrasted(session)
    model.train()
    session.optimiser.zero_grad(set_to_none=True)
    supervised = supervised_loss(model, session.training, session.labels)
    supervised.backward()
    contrastive = _fabricated_loss(recipe, model, h, x)
    (recipe.contrast_weight * contrastive).backward()
    session.optimiser.step()
    return {"supervised": supervised.detach(), "contrastive": contrastive.detach()}


def _fabricated_loss(recipe: Recipe, model: SetGNN, h: Hypergraph, x: Features) -> Tensor:
    first, second = fabricate_pair(recipe.method, h, x, recipe.ratio)
    p = _input_dropout(recipe)
    return contrastive_loss(model, first, second, recipe.temperature, loss=recipe.loss, input_dropout=p)


def _input_dropout(recipe: Recipe) -> float:
    """Without an augmentation the views differ by dropout only, and the input's is left out (section 2.2)."""
    return 0.0 if recipe.method == "A0" else INPUT_DROPOUT


def generative_epoch(session: Session) -> dict[str, Tensor]:
    """The joint training of A6: generator steps, then a model step on two views of which one or both are generated (section 2.6)."""
    recipe, model, generator, options = session.recipe, _encoder(session), session.generator, session.recipe.generator
    assert generator is not None
    h, x = _contrasted(session)
    part = session.part if h is session.data.hypergraph and session.part is not None else core(h, x)
    model.train()
    generator.train()
    for _ in range(options.steps):
        losses = generator_step(
            model,
            generator,
            h,
            x,
            options.contrast_weight,
            recipe.temperature,
            hard=options.hard,
            kl_scale=options.kl_scale,
            objective=options.objective,
            drop_weight=options.drop_weight,
            loss=recipe.loss,
        )
        session.generator_optimiser.step()
    session.optimiser.zero_grad(set_to_none=True)
    supervised = supervised_loss(model, session.training, session.labels)
    supervised.backward()
    views = [_model_view(session, generator, h, x, part, name) for name in options.views.split("-")]
    contrastive = contrastive_loss(
        model,
        views[0][0],
        views[1][0],
        recipe.temperature,
        weights=(views[0][1], views[1][1]),
        loss=recipe.loss,
    )
    (recipe.contrast_weight * contrastive).backward()
    session.optimiser.step()
    return {
        "supervised": supervised.detach(),
        "contrastive": contrastive.detach(),
        "generator": losses.total,
        "drop_ratio": losses.drop_ratio,
    }


def _model_view(
    session: Session, generator: VHGAE, h: Hypergraph, x: Features, part: Core, name: str
) -> tuple[View, Tensor | None]:
    """One view of A6's model step and its membership weights, where it is not simply a smaller hypergraph."""
    if name == "a2":
        return fabricate("A2", h, x, session.recipe.ratio), None
    if name == "clean":
        return View(h, x), None
    encoder, hard = session.recipe.encoder, session.recipe.generator.hard
    keep = generate_view(generator, h, part, hard=hard)
    if hard and (encoder.aggregate == "sum" or encoder.attention):
        return generated_view(h, x, keep), None
    return View(h, x), keep


class CliqueContrast:
    """The paper's "Con" baseline: the contrast of the hypergraph's encoder with one of its clique expansion (section 8)."""

    def __init__(self, h: Hypergraph, sub_size: int) -> None:
        self.graph = _clique_graph(h) if h.num_nodes <= sub_size else None  # else of the epoch's part

    def __call__(self, session: Session) -> dict[str, Tensor]:
        """One epoch."""
        recipe, model = session.recipe, _encoder(session)
        h, x = _contrasted(session)
        graph = _clique_graph(h) if self.graph is None else self.graph
        assert session.clique is not None
        model.train()
        session.clique.train()
        session.optimiser.zero_grad(set_to_none=True)
        supervised = supervised_loss(model, session.training, session.labels)
        supervised.backward()
        z1, z2 = model.project(x, h), session.clique(x, graph)
        contrastive = compare(z1, z2, recipe.temperature, recipe.loss)
        (recipe.contrast_weight * contrastive).backward()
        session.optimiser.step()
        return {"supervised": supervised.detach(), "contrastive": contrastive.detach()}


def _clique_graph(h: Hypergraph) -> Graph:
    return gcn_normalized(clique_expansion(h.without_singletons()))


class SampledEpoch:
    """The supervised loss and the contrast of fabricated views, batch by batch of sampled neighbourhoods."""

    def __init__(self, data: Dataset, train: Tensor, recipe: Recipe) -> None:
        self.train = train
        self.sampler = HypergraphSampler(data.hypergraph, data.x, recipe.batch_size, layers=recipe.encoder.layers)

    def __call__(self, session: Session) -> dict[str, Tensor]:
        """One epoch."""
        recipe, model = session.recipe, _encoder(session)
        return train_on_batches(
            model,
            session.optimiser,
            self.sampler,
            session.data.labels,
            self.train,
            recipe.method,
            recipe.ratio,
            recipe.contrast_weight,
            recipe.temperature,
            recipe.loss,
            _input_dropout(recipe),
        )


def _encoder(session: Session) -> SetGNN:
    assert isinstance(session.model, SetGNN)
    return session.model


def _contrasted(session: Session) -> tuple[Hypergraph, Features]:
    """The hypergraph that is contrasted: all of it, or the part of this epoch where it is large."""
    return _part_of(session.recipe, session.data)


def _part_of(recipe: Recipe, data: Dataset) -> tuple[Hypergraph, Features]:
    h, x = data.hypergraph, data.x
    if h.num_nodes <= recipe.sub_size:
        return h, x
    batch = subsample(h, x, recipe.sub_size)
    return batch.hypergraph, batch.x
