"""Training: dense, BiP (section 2.3) and the methods it is compared with (section 8), one explicit loop each way.

A run is a sequence of phases (`Run.steps`): ``dense``, then ``prune`` for BiP and Hydra, ``round-k`` for IMP, ``train``
for one-shot masks, ``finetune`` where asked for. Every phase's outcome is kept, so a resumed run goes on in the middle
of any of them.
"""

import copy
import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tenfold_bip.baselines import (
    grasp_importance,
    imp_keep_schedule,
    importance_masks,
    magnitude_importance,
    random_importance,
    snip_importance,
    synflow_masks,
)
from tenfold_bip.bilevel import m_step, theta_step
from tenfold_bip.data import Data, DataConfig, load_data
from tenfold_bip.evaluate import accuracy, check_fit, costs, has_masks, load_model
from tenfold_bip.ledger import Ledger
from tenfold_bip.masking import (
    bake_masks,
    fix_masks,
    freeze_masks,
    keep_ratio,
    prune_parametrize,
    split_parameters,
)
from tenfold_bip.models import create_model
from tenfold_bip.projections import check_keep
from tenfold_bip.released import hydra_step, released_bilevel_step, released_optimizer
from tenfold_bip.schedules import SCHEDULES
from tenfold_shared.batches import Stream
from tenfold_shared.checkpoint import load_weights
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions, derived_seed, seed_everything

Method = Literal["dense", "bip", "imp", "omp", "random", "snip", "grasp", "synflow", "hydra"]


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
    """Passes over the upper level's images."""
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


@dataclasses.dataclass
class Recipe:
    """One experiment."""

    method: Method = "bip"
    """How to prune; ``dense`` does not."""
    arch: str = "digits_cnn"
    """Architecture."""
    keep: float = 0.1
    """Keep ratio k: the fraction of the prunable weights that remains."""
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
    """A dense run's folder or checkpoint to start from in place of dense training."""
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
    finetune: Phase = dataclasses.field(default_factory=lambda: Phase(epochs=0, lr=0.01))
    """Training under the final mask after BiP or Hydra; no epochs: none."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before anything is."""
        try:
            check_keep(self.keep)
        except ValueError as error:
            raise UserError(f"--keep: {error}") from error
        for name, value in (
            ("batch_size", self.batch_size),
            ("dense.epochs", self.dense.epochs),
            ("sparse.epochs", self.sparse.epochs),
            ("hydra.epochs", self.hydra.epochs),
            ("bilevel.epochs", self.bilevel.epochs),
        ):
            if value < 1:
                raise UserError(f"--{name} takes 1 or more, got {value}")
        if not 0 <= self.rewind_epoch <= self.dense.epochs:
            raise UserError(
                f"--rewind_epoch {self.rewind_epoch} lies outside of the {self.dense.epochs} epochs of dense training"
            )


@dataclasses.dataclass
class Result:
    """What a run ends with; accuracies in per cent on the evaluation images."""

    accuracy: float
    """After the last epoch."""
    best_accuracy: float
    """At the best epoch of the last phase: optimistic, since it is chosen on the evaluation images themselves."""
    keep: float
    """Fraction of the prunable weights that is left."""
    passes: int
    """Gradient evaluations, dense pre-training left out for every method alike."""
    history: list[dict[str, Any]]
    """After every phase: its name, the keep ratio, the gradient evaluations so far, the accuracy, its own seconds."""
    costs: dict[str, Any]
    """Operations and kept weights by layer."""


@dataclasses.dataclass
class Session:
    """What the loops share."""

    run: Run
    recipe: Recipe
    data: Data
    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def rate(self, optimiser: Any, schedule: str, epoch: int, peak: float, epochs: int) -> None:
        """Set the learning rate of an epoch."""
        for group in optimiser.param_groups:
            group["lr"] = SCHEDULES[schedule](epoch, peak, epochs)

    def backward(self, loss: Tensor) -> None:
        """Differentiate; a gradient scaler is undone at once, since the implicit term is quadratic in the gradient."""
        self.run.backward(loss)
        if self.run.accelerator.scaler is not None:
            self.run.accelerator.unscale_gradients()

    def close(self, model: nn.Module, phase: str, passes: int) -> None:
        """Keep what a phase ended with; in a resumed run that had closed it before, take it from there."""
        run, outcome = self.run, {}
        if not (earlier := run.completed(phase)):
            seconds = self.ledger.seconds - sum(closed["seconds"] for closed in self.history)
            outcome = {"accuracy": accuracy(model, self.data.evaluation, run).item(), "seconds": seconds}
        outcome = run.complete(phase, model, **outcome)
        if earlier:
            self.ledger.earlier_seconds += outcome["seconds"]
        plain = run.unwrap(model)
        self.ledger.count(self.recipe.batch_size, passes)
        keep = keep_ratio(plain) if has_masks(plain) else 1.0
        self.history.append({"phase": phase, "keep": keep, "passes": self.ledger.passes, **outcome})


def train(recipe: Recipe, options: RunOptions) -> None:
    """Run a recipe and keep its network."""
    with Run("bip", recipe, options) as run:
        _, result = run_recipe(run, recipe)
        if run.is_main:
            print(
                f"{recipe.method} {recipe.arch} on {recipe.data.name}: {result.accuracy:.2f} % after the last epoch "
                f"({result.best_accuracy:.2f} % at the best), {100 * result.keep:.2f} % of the weights kept, "
                f"{result.passes} gradient evaluations; {run.directory}"
            )


def run_recipe(run: Run, recipe: Recipe) -> tuple[nn.Module, Result]:
    """Prune as the recipe says; returns the network with its masks, and what it is worth and cost.

    Raises:
        UserError: the recipe does not fit the data or the architecture.
        RunFailure: the loss is no longer finite.

    """
    seed_everything(run.options.seed, "init")
    session = Session(run, recipe, load_data(recipe.data, recipe.batch_size, run))
    try:
        model = create_model(recipe.arch, session.data.classes)
        check_fit(model, session.data, recipe.data.name)
        if recipe.method != "dense":  # a cut that cannot be made is refused before anything is trained
            masks_of(session, magnitude_importance(model))
        model = METHODS[recipe.method](session, model)
    except (
        ValueError
    ) as error:  # of the method: no prunable layer, a layer that would be empty, an unknown architecture
        raise UserError(str(error)) from error
    last = session.history[-1]
    epochs = run.logged(last["phase"], "accuracy")
    result = Result(
        accuracy=last["accuracy"],
        best_accuracy=max([last["accuracy"], *epochs]),
        keep=last["keep"],
        passes=session.ledger.passes,
        history=session.history,
        costs=costs(model, session.data.shape),
    )
    plain = bake_masks(copy.deepcopy(model)) if has_masks(model) else model
    about = {"method": recipe.method, "arch": recipe.arch, "classes": session.data.classes, "accuracy": result.accuracy}
    run.save_weights("last", plain, **about)
    return model, result


# -- the loops ------------------------------------------------------------------------------------------------------------


def fit(session: Session, model: nn.Module, name: str, phase: Phase, *, dense: bool = False) -> nn.Module:
    """Minimise the cross entropy over whatever of the model is trainable, under fixed masks if it has any.

    ``dense`` training keeps the weights of the epoch to rewind to, and is not counted in the ledger.
    """
    run, batches, snapshot, epochs = session.run, session.data.lower, session.recipe.rewind_epoch, phase.epochs
    optimiser: Any = torch.optim.SGD(model.parameters(), phase.lr, phase.momentum, weight_decay=phase.weight_decay)
    model, optimiser = run.prepare(model, optimiser, channels_last=True)
    if dense and snapshot == 0 and not run.completed(name):
        run.save_weights("rewind", model)
    stream = Stream(batches)
    for step in run.steps(name, epochs * len(batches), model=model, optimiser=optimiser):
        epoch, position = divmod(step, len(batches))
        session.rate(optimiser, phase.schedule, epoch, phase.lr, epochs)
        images, labels = stream[step]
        loss = cross_entropy(model(images), labels)
        optimiser.zero_grad()
        run.backward(loss)
        optimiser.step()
        run.log(loss=run.reduce(loss.detach(), "mean"))
        if position + 1 == len(batches):
            run.log(accuracy=accuracy(model, session.data.evaluation, run))
            if dense and epoch + 1 == snapshot:
                run.save_weights("rewind", model)
    session.close(model, name, passes=0 if dense else epochs * len(batches))
    return run.unwrap(model)


def bip(session: Session, model: nn.Module) -> nn.Module:
    """BiP (section 2.3): theta-steps on the lower level's batches alternate with m-steps on the upper level's."""
    run, data, settings = session.run, session.data, session.recipe.bilevel
    model = scored(session, pretrained(session, model), settings.scores_init, settings.tie_scores)
    if settings.trainer == "released":
        return released_bip(session, model)
    weights, scores = split_parameters(model)
    momentum, decay = settings.momentum, settings.weight_decay
    lower: Any = torch.optim.SGD(weights, settings.alpha, momentum, weight_decay=decay)
    upper: Any = torch.optim.SGD(scores, settings.beta, momentum, weight_decay=decay)
    model, lower, upper = run.prepare(model, lower, upper, channels_last=True)
    lower_stream, upper_stream = Stream(data.lower), Stream(data.upper)
    per_epoch, n = len(data.upper), settings.lower_steps
    for step in run.steps("prune", settings.epochs * per_epoch, model=model, lower=lower, upper=upper):
        epoch, position = divmod(step, per_epoch)
        session.rate(lower, settings.alpha_schedule, epoch, settings.alpha, settings.epochs)
        session.rate(upper, settings.beta_schedule, epoch, settings.beta, settings.epochs)
        for k in range(n):
            lower_loss, _ = theta_step(model, lower_stream[step * n + k], lower, backward=session.backward)
        upper_loss, _ = m_step(
            model,
            upper_stream[step],
            upper,
            gamma=settings.gamma,
            ig=settings.ig,
            lr2=settings.lr2,
            backward=session.backward,
        )
        run.log(lower_loss=run.reduce(lower_loss, "mean"), upper_loss=run.reduce(upper_loss, "mean"))
        if position + 1 == per_epoch:
            run.log(accuracy=accuracy(model, data.evaluation, run))
    return finish(session, model, passes=settings.epochs * per_epoch * (n + 1))


def released_bip(session: Session, model: nn.Module) -> nn.Module:
    """BiP as the released trainer does it: four forward and three backward passes an iteration (section 2.5)."""
    run, data, settings = session.run, session.data, session.recipe.bilevel
    model = alone(run, model, "the released trainer")
    lower = released_optimizer(model, settings.alpha, settings.momentum, settings.weight_decay)
    upper = released_optimizer(model, settings.beta, settings.momentum, settings.weight_decay)
    lower_stream, upper_stream = Stream(data.lower), Stream(data.upper)
    per_epoch = len(data.upper)
    for step in run.steps("prune", settings.epochs * per_epoch, model=model, lower=lower, upper=upper):
        epoch, position = divmod(step, per_epoch)
        session.rate(lower, settings.alpha_schedule, epoch, settings.alpha, settings.epochs)
        session.rate(upper, settings.beta_schedule, epoch, settings.beta, settings.epochs)
        loss, _ = released_bilevel_step(model, upper_stream[step], lower_stream[step], lower, upper, lr2=settings.lr2)
        run.log(upper_loss=loss)
        if position + 1 == per_epoch:
            run.log(accuracy=accuracy(model, data.evaluation, run))
    return finish(session, model, passes=settings.epochs * per_epoch * 3)


def hydra(session: Session, model: nn.Module) -> nn.Module:
    """Hydra: scores alone, by the straight-through gradient; the weights stay as they were trained."""
    run, phase, batches = session.run, session.recipe.hydra, session.data.lower
    model = alone(run, scored(session, pretrained(session, model)), "Hydra")
    optimiser = released_optimizer(model, phase.lr, phase.momentum, phase.weight_decay)
    stream = Stream(batches)
    for step in run.steps("prune", phase.epochs * len(batches), model=model, optimiser=optimiser):
        epoch, position = divmod(step, len(batches))
        session.rate(optimiser, phase.schedule, epoch, phase.lr, phase.epochs)
        loss, _ = hydra_step(model, stream[step], optimiser)
        run.log(loss=loss)
        if position + 1 == len(batches):
            run.log(accuracy=accuracy(model, session.data.evaluation, run))
    return finish(session, model, passes=phase.epochs * len(batches))


# -- their parts ----------------------------------------------------------------------------------------------------------


def pretrained(session: Session, model: nn.Module) -> nn.Module:
    """The densely trained network: from the recipe's checkpoint, or trained here."""
    recipe = session.recipe
    if recipe.pretrained is None:
        return fit(session, model, "dense", recipe.dense, dense=True)
    trained, _ = load_model(recipe.pretrained, recipe.arch)
    return bake_masks(trained) if has_masks(trained) else trained


def rewound(session: Session, model: nn.Module) -> nn.Module:
    """A new network with the weights of the epoch to rewind to."""
    recipe = session.recipe
    folder = session.run.directory if recipe.pretrained is None else recipe.pretrained
    if not folder.is_dir():
        raise UserError(
            f"--pretrained {folder}: {recipe.method} rewinds to an early epoch, which only a run's folder has"
        )
    state, _ = load_weights(folder / "checkpoints" / "rewind.safetensors")
    fresh = create_model(recipe.arch, session.data.classes)
    fresh.load_state_dict(state)
    return fresh


def scored(
    session: Session, model: nn.Module, init: Literal["weight", "random"] = "weight", tie: bool = False
) -> nn.Module:
    """The network with scores and masks."""
    recipe = session.recipe
    return prune_parametrize(
        model, recipe.keep, recipe.structure, min_keep=recipe.min_keep, scores_init=init, tie_scores=tie
    )


def alone(run: Run, model: nn.Module, what: str) -> nn.Module:
    """The network on the device, for a trainer that is as it was released: one process, single precision."""
    if run.world > 1 or run.options.precision != "fp32":
        raise UserError(
            f"{what} runs in one process and in fp32, as released: start it without torchrun and --precision"
        )
    return model.to(run.device)


def finish(session: Session, model: nn.Module, passes: int) -> nn.Module:
    """Fix the masks that were found, and fine-tune under them where the recipe says so."""
    session.close(model, "prune", passes)
    model = freeze_masks(session.run.unwrap(model))
    phase = session.recipe.finetune
    return fit(session, model, "finetune", phase) if phase.epochs else model


def sparse_fit(session: Session, model: nn.Module, masks: dict[str, Tensor], name: str = "train") -> nn.Module:
    """Train under fixed masks."""
    return fit(session, fix_masks(model, masks), name, session.recipe.sparse)


def omp(session: Session, model: nn.Module) -> nn.Module:
    """One-shot magnitude pruning of the dense network, rewinding, training."""
    masks = masks_of(session, magnitude_importance(pretrained(session, model)))
    return sparse_fit(session, rewound(session, model), masks)


def imp(session: Session, model: nn.Module) -> nn.Module:
    """Iterative magnitude pruning with rewinding: a full training after every cut of a fifth of the survivors."""
    model = pretrained(session, model)
    for number, keep in enumerate(imp_keep_schedule(session.recipe.keep, session.recipe.prune_rate), 1):
        masks = masks_of(session, magnitude_importance(model), keep)
        model = sparse_fit(session, rewound(session, model), masks, f"round-{number}")
    return model


def at_initialisation(session: Session, model: nn.Module) -> nn.Module:
    """Random masks, SNIP, GraSP and SynFlow: cut at initialisation, then train."""
    recipe, data = session.recipe, session.data
    model = model.to(session.run.device)
    stream = Stream(data.scoring)
    batches = (stream[i] for i in range(recipe.score_batches))
    if recipe.method == "synflow":
        if recipe.structure != "global":
            raise UserError(f"--structure {recipe.structure}: synflow ranks all weights together, use global")
        return sparse_fit(session, model, synflow_masks(model, recipe.keep, data.shape))
    if recipe.method == "random":
        draws = torch.Generator().manual_seed(derived_seed(session.run.options.seed, "random masks"))
        return sparse_fit(session, model, masks_of(session, random_importance(model, draws)))
    score = snip_importance if recipe.method == "snip" else grasp_importance
    return sparse_fit(session, model, masks_of(session, score(model.train(), batches)))


def masks_of(session: Session, importances: dict[str, Tensor], keep: float | None = None) -> dict[str, Tensor]:
    """The masks of the recipe's structure."""
    recipe = session.recipe
    return importance_masks(
        importances, recipe.keep if keep is None else keep, recipe.structure, min_keep=recipe.min_keep
    )


METHODS = {
    "dense": pretrained,
    "bip": bip,
    "imp": imp,
    "omp": omp,
    "hydra": hydra,
    "random": at_initialisation,
    "snip": at_initialisation,
    "grasp": at_initialisation,
    "synflow": at_initialisation,
}
