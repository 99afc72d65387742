"""Training (section 2.4): the base network, the choice of the neurons, and fine-tuning with lines in their place.

A run is one or two phases: ``base``, unless a trained network is given, and ``finetune`` for everything that starts
from it. Every phase's outcome is kept, so a resumed run goes on in the middle of either.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tenfold_grafting.adversarial import (
    adversarial_loss,
    attacked,
    certified_loss,
    grad_align,
    rs_loss,
    trades,
    two_group_sgd,
)
from tenfold_grafting.attacks import robust_mask
from tenfold_grafting.data import Data, DataConfig, load_data, normalisation, resolve, training_batches
from tenfold_grafting.evaluate import Evaluation, check_fit, load_model, measure_network
from tenfold_grafting.grafting import activation_shapes, graft, graft_parameters, grafted_masks
from tenfold_grafting.networks import create_network
from tenfold_grafting.scores import BoundName, Significance, instability, scored_images, significance
from tenfold_grafting.selection import GAMMAS, Masks, Rank, Scope, load_masks, random_selection, select_neurons
from tenfold_shared.batches import Stream
from tenfold_shared.checkpoint import load_weights, write_json
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions, derived_seed, seed_everything

Method = Literal["base", "graft", "prune", "finetune", "published"]
Objective = Literal["fat", "pgd", "trades", "rs", "ibp", "crown-ibp", "clean"]


@dataclasses.dataclass
class Training:
    """The adversarial objective, the same for the base and for fine-tuning."""

    objective: Objective = "fat"
    """fat: one step and GradAlign; pgd: several steps; trades; rs: fat with the ReLU-stability loss; ibp and crown-ibp:
    certified training; clean."""
    eps: float = 2 / 255
    """Radius of the ball, in pixel units."""
    step: float = 2.5 / 255
    """Length of an attack step."""
    steps: int = 1
    """Steps of the attack."""
    grad_align: float = 0.2
    """Weight lambda of GradAlign in fat and rs."""
    beta: float = 6.0
    """Weight of the divergence in TRADES."""
    rs_weight: float = 1e-3
    """Weight of the ReLU-stability loss."""
    kappa: float = 0.5
    """Final weight of the clean loss in certified training; it starts at 1."""
    ramp: float = 0.5
    """Share of the epochs over which certified training raises eps and lowers its weights."""
    clip: float = 0.0
    """Largest norm of the gradient; 0: no limit."""

    def __post_init__(self) -> None:
        """Refuse what is no attack and no step."""
        for name in ("eps", "step", "steps", "grad_align", "beta", "rs_weight", "clip"):
            if getattr(self, name) < 0:
                raise UserError(f"--training.{name} takes 0 or more, got {getattr(self, name)}")
        for name in ("kappa", "ramp"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--training.{name} is a share in [0, 1], got {getattr(self, name)}")


@dataclasses.dataclass
class Phase:
    """SGD over some epochs."""

    epochs: int = 200
    """Passes over the training images."""
    lr: float = 0.1
    """Learning rate of the weights at its peak."""
    lr_lines: float = 0.01
    """Learning rate of slopes and intercepts."""
    schedule: Literal["step", "cosine"] = "step"
    """By epoch: a tenth at the milestones, or a cosine to zero."""
    milestones: list[int] = dataclasses.field(default_factory=lambda: [100, 150])
    """Epochs at which the rate falls."""
    momentum: float = 0.9
    """Momentum."""
    weight_decay: float = 5e-4
    """Weight decay of the weights; slopes and intercepts have none."""

    def rate(self, epoch: int) -> float:
        """The factor on the learning rates in an epoch."""
        if self.schedule == "cosine":
            return (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        return 0.1 ** sum(epoch >= milestone for milestone in self.milestones)


@dataclasses.dataclass
class Selection:
    """Which neurons become lines (sections 2.2 and 2.3)."""

    criterion: Literal["combined", "instability", "insignificance", "random", "file"] = "combined"
    """combined: instability against significance with the decaying gamma; either alone; random; or a mask file."""
    file: Path | None = None
    """The mask file: a released .pt, or packed .npz; looked for here and in the data root."""
    ratio: float = 0.5
    """Share of the neurons."""
    gammas: list[float] = dataclasses.field(default_factory=lambda: list(GAMMAS))
    """gamma of every round of the combined criterion."""
    rank: Rank = "min"
    """How ties are ranked."""
    scope: Scope = "global"
    """Over all layers together, or by layer."""
    significance: Significance = "gradient"
    """Significance score."""
    score_eps: float = 0.0
    """Radius of a one-step attack on the scored images; 0 scores them clean."""
    post_activation: bool = False
    """Score the significance of what the activations give, not of what they take."""
    bounds: BoundName = "crown"
    """Whose intervals say what is unstable."""
    images: int = 1000
    """Training images that are scored."""
    split: Literal["train", "test"] = "train"
    """Whose images the instability is counted on: those training images, or as many of the first that are reported on."""
    seed: int = 0
    """Seed of random masks, the same for all seeds of a run."""
    slope: float = 0.4
    """Initial slope a."""
    intercept: float = 0.0
    """Initial intercept b."""
    train_weights: bool = True
    """Fine-tune the weights too, not the lines alone."""

    def __post_init__(self) -> None:
        """Refuse what selects nothing."""
        if not 0 <= self.ratio <= 1:
            raise UserError(f"--selection.ratio is a share of the neurons in [0, 1], got {self.ratio}")
        if self.criterion == "file" and self.file is None:
            raise UserError("--selection.criterion file needs --selection.file")
        if not self.gammas or min(self.gammas) < 0:
            raise UserError(f"--selection.gammas takes one weight of 0 or more for each round, got {self.gammas}")
        if self.images < 1 or self.score_eps < 0:
            raise UserError("--selection.images takes 1 or more, and --selection.score_eps 0 or more")


@dataclasses.dataclass
class Recipe:
    """One experiment."""

    method: Method = "graft"
    """base: adversarial training alone; graft: lines on the chosen neurons; prune: the same with a = b = 0 frozen;
    finetune: the same budget and no mask; published: evaluate the given network."""
    arch: str = "cnn_b"
    """Architecture."""
    batch_size: int = 128
    """Images a step, over all processes."""
    pretrained: Path | None = None
    """A run's folder or checkpoint to start from in place of training a base network."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The images."""
    training: Training = dataclasses.field(default_factory=Training)
    """The objective."""
    base: Phase = dataclasses.field(default_factory=Phase)
    """Training of the base network."""
    selection: Selection = dataclasses.field(default_factory=Selection)
    """Choosing the neurons."""
    finetune: Phase = dataclasses.field(default_factory=lambda: Phase(epochs=100, lr=1e-3, schedule="cosine"))
    """Fine-tuning."""
    validation_steps: int = 1
    """Steps of the attack on the validation images that chooses the epoch."""
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    """What is measured in the end."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before anything is."""
        for name, value in (
            ("batch_size", self.batch_size),
            ("base.epochs", self.base.epochs),
            ("finetune.epochs", self.finetune.epochs),
            ("validation_steps", self.validation_steps),
        ):
            if value < 1:
                raise UserError(f"--{name} takes 1 or more, got {value}")
        for name, phase in (("base", self.base), ("finetune", self.finetune)):
            for field in ("lr", "lr_lines", "momentum", "weight_decay"):
                if getattr(phase, field) < 0:
                    raise UserError(f"--{name}.{field} takes 0 or more, got {getattr(phase, field)}")
            if any(milestone < 0 for milestone in phase.milestones):
                raise UserError(f"--{name}.milestones takes epochs from 0 on, got {phase.milestones}")
        if self.method in ("prune", "finetune") and not self.selection.train_weights:
            raise UserError(f"--selection.train_weights false leaves --method {self.method} nothing to train")
        if self.method == "published" and self.pretrained is None:
            raise UserError("--method published needs --pretrained, the network to evaluate")


@dataclasses.dataclass
class Session:
    """What the loops share."""

    run: Run
    recipe: Recipe
    data: Data


def train(recipe: Recipe, options: RunOptions) -> None:
    """Run a recipe and keep its network."""
    with Run("grafting", recipe, options) as run:
        _, found = run_recipe(run, recipe)
        if run.is_main:
            print(
                f"{recipe.method} {recipe.arch} on {recipe.data.name}: SA {found['sa']:.2f} %, RA {found['ra']:.2f} %, "
                f"{found['bounds']}-verified {found['incomplete_va']:.2f} % of {found['images']}, "
                f"UNR {found['unr']:.2f} %; {run.directory}"
            )


def run_recipe(run: Run, recipe: Recipe) -> tuple[nn.Module, dict[str, Any]]:
    """Train as the recipe says; returns normalisation and network, and what was measured in the end.

    Raises:
        UserError: the recipe does not fit the data or the architecture.
        RunFailure: the loss is no longer finite, or the verifier contradicts the attack.

    """
    seed_everything(run.options.seed, "init")
    if recipe.method == "published":
        assert recipe.pretrained is not None
        model, _ = load_model(recipe.pretrained, recipe.data, recipe.arch)
        data = load_data(recipe.data)
        check_fit(model, data.shape)
        return model, _measure(run, recipe, data, model.to(run.device))
    data = load_data(recipe.data)
    if data.train is None:
        raise UserError(f"--data.name {recipe.data.name} has no training images")
    session = Session(run, recipe, data)
    model = base_network(session)
    about = {"method": recipe.method, "selection": recipe.selection.criterion}
    if recipe.method != "base":
        model = fine_tuned(session, model)
    save(session, model, "last", about)
    return model, _measure(run, recipe, data, model)


def _measure(run: Run, recipe: Recipe, data: Data, model: nn.Module) -> dict[str, Any]:
    """The measured values, kept in ``measured.json``, in single precision whatever the training's was.

    The main process measures, as the work has no batches to share.
    """
    path = run.directory / "measured.json"
    if run.is_main and not path.exists():
        images, labels = data.test.pixels(recipe.evaluation.images or None)
        plain = run.accelerator.unwrap_model(model, keep_fp32_wrapper=False, keep_torch_compile=False)
        found = measure_network(
            plain.to(run.device),
            images.to(run.device),
            labels.to(run.device),
            recipe.evaluation,
            run.directory / "images.jsonl",
        )
        write_json(path, found)
    run.accelerator.wait_for_everyone()
    return json.loads(path.read_text(encoding="utf-8"))


def new_network(recipe: Recipe, data: Data) -> nn.Sequential:
    """Normalisation and a freshly initialised network."""
    _, first = normalisation(recipe.data, data.shape[0])
    model = nn.Sequential(first, create_network(recipe.arch, data.classes))
    check_fit(model, data.shape)
    return model


def base_network(session: Session) -> nn.Sequential:
    """The adversarially trained network: from the recipe's checkpoint, or trained here."""
    recipe = session.recipe
    model = new_network(recipe, session.data)
    if recipe.method in ("graft", "prune") and recipe.selection.criterion == "file":
        _masks(recipe, recipe.selection, session.data, model)  # a file that does not fit, before anything is trained
    if recipe.pretrained is None:
        fit(session, model, "base", recipe.base)
        return model
    loaded, _ = load_model(recipe.pretrained, recipe.data, recipe.arch)
    if grafted_masks(loaded):
        raise UserError(f"--pretrained {recipe.pretrained} is grafted already: start from a base network")
    try:
        model[1].load_state_dict(loaded[1].state_dict())
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--pretrained {recipe.pretrained} is no {recipe.arch}: {reason}") from error
    model[0] = loaded[0]  # what its weights were trained with
    return model


def fine_tuned(session: Session, model: nn.Sequential) -> nn.Sequential:
    """The network after the second phase, with lines (or zeros) on the chosen neurons."""
    recipe, settings = session.recipe, session.recipe.selection
    plain = new_network(recipe, session.data)  # anew: what a phase has wrapped around the trained one stays with it
    plain[0] = session.run.unwrap(model)[0]  # its numbers are no part of the state
    plain.load_state_dict(session.run.unwrap(model).state_dict())
    plain = plain.to(session.run.device)
    if recipe.method != "finetune":
        masks = choose_masks(session, plain)
        lines = {"slope": settings.slope, "bias": settings.intercept}
        if recipe.method == "prune":
            lines = {"slope": 0.0, "bias": 0.0}
        grafted = graft(plain, masks, trainable=recipe.method == "graft", **lines)
        assert isinstance(grafted, nn.Sequential)
        plain = grafted
        if not settings.train_weights:
            _, weights = graft_parameters(plain)
            for weight in weights:
                weight.requires_grad_(False)
    fit(session, plain, "finetune", recipe.finetune)
    return plain


def choose_masks(session: Session, model: nn.Module) -> Masks:
    """The grafting masks of the recipe; computed once and kept in ``masks.safetensors`` with the run."""
    recipe, settings, data, run = session.recipe, session.recipe.selection, session.data, session.run
    path = run.directory / "checkpoints" / "masks.safetensors"
    if path.exists():
        kept, _ = load_weights(path)
        return {name: kept[name] for name in activation_shapes(model, data.shape)}
    masks = _masks(recipe, settings, data, model)
    if run.is_main:
        from tenfold_shared.checkpoint import save_weights  # noqa: PLC0415

        save_weights(path, masks, {"criterion": settings.criterion})
    return masks


def _masks(recipe: Recipe, settings: Selection, data: Data, model: nn.Module) -> Masks:
    shapes = activation_shapes(model, data.shape)
    if settings.criterion == "random":
        return random_selection(shapes, settings.ratio, torch.Generator().manual_seed(settings.seed))
    if settings.criterion == "file":
        assert settings.file is not None
        return load_masks(resolve(settings.file), shapes)
    assert data.train is not None
    weight = next(model.parameters())
    chosen = torch.from_numpy(scored_images(len(data.train.labels), settings.images))
    images = (data.train.images[chosen].double() / data.train.top).to(weight)
    labels = data.train.labels[chosen].to(weight.device)
    batches = list(zip(images.split(128), labels.split(128), strict=True))
    significant = significance(
        model, batches, settings.significance, fgsm_eps=settings.score_eps, post_activation=settings.post_activation
    )
    if settings.split == "test":
        images = data.test.pixels(settings.images)[0].to(weight)
    unstable = instability(model, images, recipe.training.eps, bounds=settings.bounds)
    gammas = {"instability": [math.inf], "insignificance": [0.0]}.get(settings.criterion, settings.gammas)
    named = dict(zip(significant, unstable.values(), strict=True))
    masks = select_neurons(named, significant, settings.ratio, gammas=gammas, rank=settings.rank, scope=settings.scope)
    return {name: mask.float().cpu() for name, mask in masks.items()}


# -- the loop -------------------------------------------------------------------------------------------------------------


def fit(session: Session, model: nn.Sequential, name: str, phase: Phase) -> None:
    """Minimise the recipe's objective; keeps the epoch of the best validation robust accuracy where there is one."""
    run, recipe = session.run, session.recipe
    batches = training_batches(session.data, recipe.data.name, recipe.batch_size, run)
    lines, weights = graft_parameters(model)
    optimiser: Any = two_group_sgd(
        lines,
        weights,
        lr_lines=phase.lr_lines,
        lr_weights=phase.lr,
        momentum=phase.momentum,
        weight_decay=phase.weight_decay,
    )
    peaks = [group["lr"] for group in optimiser.param_groups]
    wrapped, optimiser = run.prepare(model, optimiser)
    stream = Stream(batches)
    total = phase.epochs * len(batches)
    for step in run.steps(name, total, model=wrapped, optimiser=optimiser):
        epoch, position = divmod(step, len(batches))
        for group, peak in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = peak * phase.rate(epoch)
        x, y = stream[step]
        draws = torch.Generator().manual_seed(derived_seed(run.options.seed, name, step))
        wrapped.train()
        loss = objective(session, wrapped, run.unwrap(wrapped), x, y, draws, step / total)
        optimiser.zero_grad()
        run.backward(loss)
        if recipe.training.clip:
            run.accelerator.clip_grad_norm_(wrapped.parameters(), recipe.training.clip)
        optimiser.step()
        run.log(loss=run.reduce(loss.detach(), "mean"))
        if position + 1 == len(batches) and session.data.validation is not None:
            _note_epoch(session, run.unwrap(wrapped), name)
    plain = run.unwrap(wrapped)
    if session.data.validation is not None and not run.completed(name):
        best, _ = load_weights(run.directory / "checkpoints" / f"{name}-best.safetensors")
        plain.load_state_dict(best)
    run.complete(name, plain)


def _note_epoch(session: Session, model: nn.Module, name: str) -> None:
    """Log the validation accuracies of an epoch, and keep its weights if none before was more robust."""
    run, recipe = session.run, session.recipe
    assert session.data.validation is not None
    images, labels = session.data.validation.pixels()
    seed_everything(run.options.seed, name, "validation")  # every epoch meets the same attack
    robust = []
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        pixels, target = x.float().to(run.device), y.to(run.device)
        length, t = recipe.training.step, recipe.training
        robust.append(robust_mask(model, pixels, target, t.eps, steps=recipe.validation_steps, restarts=1, step=length))
    accuracy = 100 * float(torch.cat(robust).double().mean())
    before = run.logged(name, "validation_ra")
    run.log(validation_ra=accuracy)
    if accuracy > max(before, default=-1.0):
        run.save_weights(f"{name}-best", model)
        run.accelerator.wait_for_everyone()


def objective(
    session: Session,
    wrapped: nn.Module,
    plain: nn.Module,
    x: Tensor,
    y: Tensor,
    draws: torch.Generator,
    progress: float,
) -> Tensor:
    """The loss of a batch.

    Noise is drawn for the whole batch of all processes, of which each takes its share, so that their number changes
    nothing. ``plain`` is the module inside of ``wrapped``, for gradients with respect to the images.
    """
    run, t = session.run, session.recipe.training

    def uniform() -> Tensor:
        noise = torch.rand((len(x) * run.world, *x.shape[1:]), generator=draws)
        return ((2 * noise - 1) * t.eps)[run.rank * len(x) : (run.rank + 1) * len(x)].to(x)

    if t.objective == "clean":
        return cross_entropy(wrapped(x), y)
    if t.objective == "trades":
        noise = torch.randn((len(x) * run.world, *x.shape[1:]), generator=draws)
        share = noise[run.rank * len(x) : (run.rank + 1) * len(x)].to(x)
        return trades(wrapped, x, y, eps=t.eps, step=t.step, steps=t.steps, beta=t.beta, noise=share)
    if t.objective in ("ibp", "crown-ibp"):
        return _certified(session, wrapped, plain, x, y, progress)
    bad = attacked(plain, x, y, t.eps, t.step, t.steps, uniform())
    loss = adversarial_loss(wrapped, bad, y)
    if t.objective in ("fat", "rs") and t.grad_align:
        loss = loss + t.grad_align * grad_align(plain, x, y, t.eps, uniform())
    if t.objective == "rs":
        loss = loss + t.rs_weight * rs_loss(plain, x, t.eps)
    return loss


def _certified(session: Session, wrapped: nn.Module, plain: nn.Module, x: Tensor, y: Tensor, progress: float) -> Tensor:
    """Certified training: eps, the weight of the clean loss and that of CROWN-IBP follow one ramp."""
    if session.run.world > 1:
        raise UserError("training with bounds reads the weights directly: start it without torchrun")
    t = session.recipe.training
    ramp = min(1.0, progress / t.ramp) if t.ramp > 0 else 1.0
    crown = 1 - ramp if t.objective == "crown-ibp" else 0.0
    return certified_loss(plain, x, y, ramp * t.eps, kappa=1 - (1 - t.kappa) * ramp, crown=crown)


def save(session: Session, model: nn.Sequential, name: str, about: dict[str, Any]) -> Path:
    """Write the network, without its normalisation, and what is needed to build it again."""
    recipe, run = session.recipe, session.run
    first, network = run.unwrap(model)
    return run.save_weights(
        name,
        network,
        arch=recipe.arch,
        classes=session.data.classes,
        input_shape=list(session.data.shape),
        mean=first.mean.tolist(),
        std=first.std.tolist(),
        **about,
    )
