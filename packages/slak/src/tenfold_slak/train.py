"""Training a classifier, sparse or dense, as one explicit loop (sections 2.4, 2.5 and 6); other tasks start here too."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tenfold_shared.batches import Stream
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions, derived_seed, seed_everything
from tenfold_slak.data import Data, DataConfig, load_data
from tenfold_slak.detect import Detection, run_detection
from tenfold_slak.ema import SparseEMA
from tenfold_slak.evaluate import accuracy, check_fit, costs, load_model, refusals
from tenfold_slak.macs import count_macs
from tenfold_slak.masks import check_sparsity, initial_masks
from tenfold_slak.models import create_network
from tenfold_slak.optim import cosine_schedule, parameter_groups
from tenfold_slak.segment import Segmentation, run_segmentation
from tenfold_slak.sparse import CosinePruneRate, DynamicSparseTraining


@dataclasses.dataclass
class Optimisation:
    """AdamW and its schedules (section 2.5)."""

    epochs: int = 300
    """Passes over the training images."""
    steps: int = 0
    """Optimiser steps in place of epochs; 0 counts epochs."""
    batch_size: int = 512
    """Images a forward pass, over all processes."""
    accumulate: int = 8
    """Forward passes an optimiser step."""
    lr: float = 4e-3
    """Learning rate after the warmup."""
    min_lr: float = 1e-6
    """Learning rate that the cosine falls towards."""
    warmup_epochs: int = 20
    """Epochs of linear warmup."""
    warmup_steps: int = 0
    """Steps of warmup in place of epochs; 0 counts epochs."""
    weight_decay: float = 0.05
    """Of tensors with two and more dimensions."""
    layer_decay: float = 1.0
    """Factor of the learning rate from a layer to the one below it, for fine-tuning; 1 for the same everywhere."""
    ema: float = 0.9999
    """Decay of the moving average of the weights; 0 keeps none."""


@dataclasses.dataclass
class Mixing:
    """Mixup, CutMix and label smoothing, timm's."""

    mixup: float = 0.8
    """Alpha of mixup; 0 is off."""
    cutmix: float = 1.0
    """Alpha of CutMix; 0 is off."""
    prob: float = 1.0
    """Probability that a batch is mixed at all."""
    switch_prob: float = 0.5
    """Probability of CutMix where both are on."""
    smoothing: float = 0.1
    """Label smoothing."""


@dataclasses.dataclass
class Sparsity:
    """Dynamic sparse training (section 2.4)."""

    sparsity: float = 0.4
    """Share of weights that are zero; 0 trains densely. Segmenters and detectors keep the zeros of ``pretrained`` where
    it is above 0, and read nothing else of this."""
    init: Literal["snip", "snip_exact", "erk", "uniform", "resume"] = "snip"
    """First masks: the layers' densities by SNIP and random positions (as released), SNIP's own positions
    (the paper's), ERK, the same density everywhere, or the zeros of the weights to fine-tune."""
    growth: Literal["random", "random_exact", "gradient", "momentum"] = "random"
    """Where weights grow."""
    update_frequency: int = 100
    """Optimiser steps between two changes of the masks; 0 keeps the first masks (static sparsity)."""
    prune_rate: float = 0.3
    """Share of the active weights replaced at the first change; a cosine takes it to 0.005."""
    until: float = 1.0
    """Part of the training after which the masks stay as they are."""
    only_large_kernels: bool = False
    """Make the long kernels of the decomposed layers sparse and nothing else."""
    snip_images: int = 128
    """Images that SNIP scores the weights on, at most a batch."""


@dataclasses.dataclass
class Recipe:
    """One experiment."""

    task: Literal["classify", "segment", "detect"] = "classify"
    """What to train: a classifier, a UPerNet, or a detector."""
    arch: str = "slak_tiny"
    """Architecture: one of ours, or a name of timm's for baselines such as convnext_tiny."""
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of the architecture that replace its own."""
    drop_path: float = 0.1
    """Stochastic depth of the last block; earlier blocks have less."""
    pretrained: Path | None = None
    """Weights to start from: a run's folder, or a released file."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The images of a classifier."""
    optim: Optimisation = dataclasses.field(default_factory=Optimisation)
    """AdamW and its schedules."""
    mixing: Mixing = dataclasses.field(default_factory=Mixing)
    """Mixup, CutMix and label smoothing."""
    sparse: Sparsity = dataclasses.field(default_factory=Sparsity)
    """Dynamic sparse training."""
    segmentation: Segmentation = dataclasses.field(default_factory=Segmentation)
    """The segmentation task."""
    detection: Detection = dataclasses.field(default_factory=Detection)
    """The detection task."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before anything is."""
        optim, sparse = self.optim, self.sparse
        try:
            check_sparsity(sparse.sparsity)
        except ValueError as error:
            raise UserError(f"--sparse.sparsity: {error}") from error
        for name, value in (
            ("optim.batch_size", optim.batch_size),
            ("optim.accumulate", optim.accumulate),
            ("optim.epochs", optim.epochs),
            ("sparse.snip_images", sparse.snip_images),
        ):
            if value < 1:
                raise UserError(f"--{name} takes 1 or more, got {value}")
        for name, share in (("drop_path", self.drop_path), ("optim.ema", optim.ema)):
            if not 0 <= share < 1:
                raise UserError(f"--{name} is in [0, 1), got {share}")
        for name, count in (("optim.steps", optim.steps), ("sparse.update_frequency", sparse.update_frequency)):
            if count < 0:
                raise UserError(f"--{name} takes 0 or more, got {count}")
        for name, number in (("optim.lr", optim.lr), ("optim.layer_decay", optim.layer_decay)):
            if not 0 < number < float("inf"):
                raise UserError(f"--{name} takes a positive number, got {number}")
        mix = self.mixing
        for name, number in (
            ("optim.min_lr", optim.min_lr),
            ("optim.weight_decay", optim.weight_decay),
            ("optim.warmup_epochs", optim.warmup_epochs),
            ("optim.warmup_steps", optim.warmup_steps),
            ("mixing.mixup", mix.mixup),
            ("mixing.cutmix", mix.cutmix),
        ):
            if not 0 <= number < float("inf"):
                raise UserError(f"--{name} takes 0 or more, got {number}")
        for name, share in (
            ("mixing.prob", mix.prob),
            ("mixing.switch_prob", mix.switch_prob),
            ("mixing.smoothing", mix.smoothing),
            ("sparse.prune_rate", sparse.prune_rate),
            ("sparse.until", sparse.until),
        ):
            if not 0 <= share <= 1:
                raise UserError(f"--{name} is in [0, 1], got {share}")
        self._refuse_what_is_not_read()

    def _refuse_what_is_not_read(self) -> None:
        """Refuse options that this task would pass over, and arguments that come from elsewhere."""
        elsewhere = {"drop_path_rate": "--drop_path", "num_classes": "the data"}
        unread: dict[str, Any] = {"segmentation": Segmentation(), "detection": Detection()}
        if self.task == "classify":
            elsewhere["in_chans"] = "the data"
        else:
            del unread["segmentation" if self.task == "segment" else "detection"]
            unread |= {"data": DataConfig(), "optim": Optimisation(), "mixing": Mixing()}
            unread |= {"sparse": Sparsity(sparsity=self.sparse.sparsity)}
        for name, default in unread.items():
            if (given := getattr(self, name)) != default:
                key = next(f.name for f in dataclasses.fields(default) if vars(given)[f.name] != vars(default)[f.name])
                raise UserError(f"--{name}.{key} is not read where --task is {self.task}: leave it out")
        for name, source in elsewhere.items():
            if name in self.arguments:
                raise UserError(f"--arguments.{name} comes from {source}: leave it out")


@dataclasses.dataclass
class Result:
    """What a run ends with; accuracies in per cent on the evaluation images."""

    accuracy: float
    """Top-1 after the last step."""
    top5: float
    """Top-5."""
    loss: float
    """Cross-entropy."""
    accuracy_ema: float | None
    """Top-1 of the moving average, where one is kept."""
    steps: int
    """Optimiser steps."""
    costs: dict[str, Any]
    """Parameters and multiply-adds, stored and non-zero; densities by weight."""


def train(recipe: Recipe, options: RunOptions) -> None:
    """Run a recipe and keep its network."""
    with Run("slak", recipe, options) as run:
        try:
            if recipe.task == "segment":
                done = run_segmentation(run, recipe)
            elif recipe.task == "detect":
                done = run_detection(run, recipe)
            else:
                _, result = run_recipe(run, recipe)
                done = summary(recipe, result)
        except ValueError as error:  # of the method: an even kernel, an unknown name, masks that do not fit
            raise UserError(str(error)) from error
        if run.is_main:
            print(f"{done}; {run.directory}")


def summary(recipe: Recipe, result: Result) -> str:
    """A result in one line."""
    average = "" if result.accuracy_ema is None else f" ({result.accuracy_ema:.2f} % of the moving average)"
    stored, nonzero = result.costs["parameters"], result.costs["parameters_nonzero"]
    return (
        f"{recipe.arch} on {recipe.data.name}: {result.accuracy:.2f} % after {result.steps} steps{average}, "
        f"{nonzero} of {stored} parameters are not zero"
    )


def run_recipe(run: Run, recipe: Recipe) -> tuple[nn.Module, Result]:
    """Train a classifier; returns it and what it is worth and costs.

    Raises:
        UserError: the recipe does not fit the data.
        ValueError: the architecture refuses its arguments.
        RunFailure: the loss is no longer finite.

    """
    optim, device = recipe.optim, run.device
    seed_everything(run.options.seed, "init")
    data = load_data(recipe.data, optim.batch_size, run)
    model, arguments = build(recipe, data)
    masks = first_masks(recipe, model.to(device), data, run)
    per_epoch = len(data.train) // optim.accumulate
    total = optim.steps or optim.epochs * per_epoch
    if total < 1:
        raise UserError(
            f"{len(data.train)} batches of {optim.batch_size} make no step of {optim.accumulate} batches: "
            "lower --optim.batch_size or --optim.accumulate"
        )
    warmup = optim.warmup_steps or optim.warmup_epochs * per_epoch
    rates = cosine_schedule(optim.lr, optim.min_lr, 1, total, warmup_steps=warmup).tolist()
    groups = parameter_groups(model, optim.lr, optim.weight_decay, optim.layer_decay)
    model, optimiser = run.prepare(model, torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True))
    sparse = sparse_training(recipe, model, masks, optimiser, total, run.options.seed)
    ema = SparseEMA(run.unwrap(model), optim.ema) if optim.ema else None
    mix = mixing(recipe.mixing, data.classes)
    stream, last_move = Stream(data.train), int(recipe.sparse.until * total)
    kept = {"sparse": sparse, "ema": ema}
    tracked = {name: item for name, item in kept.items() if item is not None}

    for step in run.steps("train", total, model=model, optimiser=optimiser, **tracked):
        for group in optimiser.param_groups:
            group["lr"] = rates[step] * group["lr_scale"]
        loss = torch.zeros((), device=device)
        for part in range(optim.accumulate):
            images, targets = mix(*stream[step * optim.accumulate + part])
            wait = part + 1 < optim.accumulate  # the gradients are summed over the processes at the last part
            with run.accelerator.no_sync(model) if wait else contextlib.nullcontext():
                smoothing = 0.0 if targets.is_floating_point() else recipe.mixing.smoothing  # mixed ones are smooth
                share = cross_entropy(model(images), targets, label_smoothing=smoothing) / optim.accumulate
                run.backward(share)
            loss += share.detach()
        optimiser.step()
        if sparse is not None:
            if step >= last_move:
                sparse.update_frequency = 0
            sparse.step()
        optimiser.zero_grad()
        if ema is not None:
            ema.update(run.unwrap(model), sparse.masks if sparse is not None else None)
        run.log(loss=run.reduce(loss, "mean"))
        if not optim.steps and (step + 1) % per_epoch == 0 and step + 1 < total:
            run.log(accuracy=accuracy(model, data.evaluation, run).top1)

    root = None if recipe.data.root is None else str(recipe.data.root)
    trained_on = {"name": recipe.data.name, "root": root, "size": recipe.data.size}
    about = {"arch": recipe.arch, "arguments": arguments, "data": trained_on}
    outcome = finish(run, model, ema, data, about)
    plain = run.unwrap(model)
    run.save_weights("last", plain, **about, accuracy=outcome["accuracy"])
    return plain, Result(**outcome, steps=total, costs=costs(plain, data.shape))


# -- the parts ---------------------------------------------------------------------------------------------------------


def build(recipe: Recipe, data: Data) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a recipe, and the arguments that build it again."""
    arguments = {**recipe.arguments, "num_classes": data.classes, "in_chans": data.shape[0]}
    with refusals(f"--arch {recipe.arch}"):
        model = create_network(recipe.arch, drop_path_rate=recipe.drop_path, **arguments)
    if recipe.pretrained is not None:
        trained, _ = load_model(recipe.pretrained)
        state, own = trained.state_dict(), model.state_dict()
        # Another set of classes starts with a new head.
        state = {
            name: own[name] if name.startswith("head.") and name in own and own[name].shape != value.shape else value
            for name, value in state.items()
        }
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(f"--pretrained {recipe.pretrained} does not fit --arch {recipe.arch} ({error})") from error
    check_fit(model, data.shape, data.classes, recipe.data.name)
    with refusals(f"--arch {recipe.arch} on {recipe.data.name}"):  # a network of one image size, say
        count_macs(model, data.shape[1:], data.shape[0])
    return model, arguments


def first_masks(recipe: Recipe, model: nn.Module, data: Data, run: Run) -> dict[str, Tensor] | None:
    """The masks that training starts from; None for dense training."""
    settings = recipe.sparse
    if not settings.sparsity:
        return None
    batch = None
    if settings.init.startswith("snip"):
        images, labels = next(iter(data.scoring.epoch(0)))
        batch = images[: settings.snip_images], labels[: settings.snip_images]
    seed = derived_seed(run.options.seed, "masks")
    masks = initial_masks(model, settings.sparsity, settings.init, batch, settings.only_large_kernels, seed)
    if not masks:
        resumed = "the weights of --pretrained have next to no zeros to keep"
        drawn = f"--sparse.sparsity {settings.sparsity} leaves every layer at least 99 % dense"
        raise UserError(
            f"--sparse.init {settings.init} gives no mask, since {resumed if settings.init == 'resume' else drawn}: "
            "for dense training use --sparse.sparsity 0"
        )
    return masks


def sparse_training(
    recipe: Recipe, model: nn.Module, masks: dict[str, Tensor] | None, optimiser: Any, total: int, seed: int
) -> DynamicSparseTraining | None:
    """Keeps the masks; None for dense training."""
    if masks is None:
        return None
    settings = recipe.sparse
    return DynamicSparseTraining(
        model, masks, optimiser, CosinePruneRate(settings.prune_rate, total), settings.update_frequency,
        settings.growth, seed,
    )  # fmt: skip


def mixing(settings: Mixing, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Mixes a batch as timm does: images and soft targets; or leaves it as it is where both kinds are off."""
    if not settings.mixup and not settings.cutmix:
        return lambda images, labels: (images, labels)
    from timm.data import Mixup  # noqa: PLC0415 - slow to import

    mixup = Mixup(
        mixup_alpha=settings.mixup, cutmix_alpha=settings.cutmix, prob=settings.prob, num_classes=classes,
        switch_prob=settings.switch_prob, mode="batch", label_smoothing=settings.smoothing,
    )  # fmt: skip

    def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if len(images) % 2:
            raise UserError(f"mixup pairs the images of a batch, and a process has {len(images)}: make it even")
        return mixup(images, labels)

    return mix


def finish(run: Run, model: nn.Module, ema: SparseEMA | None, data: Data, about: dict[str, Any]) -> dict[str, Any]:
    """Close the training: what the weights and their average reach; a resumed run reads what was kept."""
    if run.completed("train"):
        return run.complete("train", model)
    reached = accuracy(model, data.evaluation, run)
    outcome: dict[str, Any] = {
        "accuracy": reached.top1.item(),
        "top5": reached.top5.item(),
        "loss": reached.loss.item(),
    }
    outcome["accuracy_ema"] = None
    if ema is not None:
        outcome["accuracy_ema"] = accuracy(ema.module, data.evaluation, run).top1.item()
        run.save_weights("ema", ema.module, **about)
    return run.complete("train", model, **outcome)
