"""Training: dense, BiP (section 2.3) and the methods it is compared with (section 8), one explicit loop each way.

A run is a sequence of phases (`Run.steps`): ``dense``, then ``prune`` for BiP and Hydra, ``round-k`` for IMP, ``train``
for one-shot masks, ``recalibrate`` and ``finetune`` where asked for; ``finetune`` alone for a pruned network. Every
phase's outcome is kept, so a resumed run goes on in the middle of any of them.
"""

import copy
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import update_bn

from tenfold_bip.baselines import (
    SYNFLOW_ROUNDS,
    grasp_importance,
    imp_keep_schedule,
    importance_masks,
    magnitude_importance,
    random_importance,
    snip_importance,
    synflow_masks,
)
from tenfold_bip.bilevel import m_step, theta_step
from tenfold_bip.data import Data, load_data
from tenfold_bip.evaluate import accuracy, check_fit, costs, has_masks, load_model, weights_file
from tenfold_bip.ledger import Ledger, flops
from tenfold_bip.masking import (
    bake_masks,
    fix_masks,
    freeze_masks,
    keep_ratio,
    kept_per_layer,
    prune_parametrize,
    reaches_output,
    set_masks,
    split_parameters,
)
from tenfold_bip.models import create_model
from tenfold_bip.recipe import Bilevel, Phase, Recipe
from tenfold_bip.released import hydra_freeze, hydra_step, released_bilevel_step, released_optimizer
from tenfold_bip.schedules import SCHEDULES
from tenfold_shared.batches import Stream
from tenfold_shared.checkpoint import load_weights, write_json
from tenfold_shared.errors import RunFailure, UserError
from tenfold_shared.run import Run, RunOptions, derived_seed, seed_everything

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Result:
    """What a run ends with; accuracies in per cent on the evaluation images."""

    accuracy: float
    """After the last epoch."""
    best_accuracy: float
    """At the best epoch of the last phase that trained: optimistic, since it is chosen on the evaluation images themselves."""
    keep: float
    """Fraction of the prunable weights that is left."""
    passes: int
    """Gradient evaluations, dense pre-training left out for every method alike; scores at initialisation count."""
    training_flops: int
    """Operations of these passes on dense kernels."""
    history: list[dict[str, Any]]
    """After every phase: its name, the keep ratio, the gradient evaluations and their operations so far, the accuracy, its
    own seconds."""
    costs: dict[str, Any]
    """Operations and kept weights by layer."""
    layers_emptied: list[str]
    """Layers that the last cut left without any weight."""


@dataclasses.dataclass
class Session:
    """What the loops share."""

    run: Run
    recipe: Recipe
    data: Data
    forward_flops: int = 0
    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def steps(self, phase: str, total: int, **tracked: Any) -> Iterator[int]:
        """The steps of a phase still to do; a resumed run goes on counting its time where the checkpoint has it."""
        return self.run.steps(phase, total, ledger=self.ledger, **tracked)

    def rate(self, optimiser: Any, schedule: str, epoch: int, peak: float, epochs: int) -> None:
        """Set the learning rate of an epoch."""
        for group in optimiser.param_groups:
            group["lr"] = SCHEDULES[schedule](epoch, peak, epochs)

    def backward(self, loss: Tensor) -> None:
        """Differentiate; a gradient scaler is undone at once, since the implicit term is quadratic in the gradient."""
        self.run.backward(loss)
        if self.run.accelerator.scaler is not None:
            self.run.accelerator.unscale_gradients()

    def count(self, passes: int) -> None:
        """Put gradient evaluations on whole batches into the ledger."""
        self.ledger.count(min(self.recipe.batch_size, self.data.lower.samples), passes)

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
        self.count(passes)
        operations = self.ledger.training_flops(self.forward_flops)
        keep = keep_ratio(plain) if has_masks(plain) else 1.0
        counted = {"passes": self.ledger.passes, "training_flops": operations}
        self.history.append({"phase": phase, "keep": keep, **counted, **outcome})


def train(recipe: Recipe, options: RunOptions) -> None:
    """Run a recipe; its network and ``result.json`` are kept in the run's folder."""
    with Run("bip", recipe, options) as run:
        _, result = run_recipe(run, recipe)
        if run.is_main:
            about = {"method": recipe.method, "seed": options.seed}
            write_json(run.directory / "result.json", about | dataclasses.asdict(result))
            print(
                f"{recipe.method} {recipe.arch} on {recipe.data.name}: {result.accuracy:.2f} % after the last epoch "
                f"({result.best_accuracy:.2f} % at the best), {100 * result.keep:.2f} % of the weights kept, "
                f"{result.passes} gradient evaluations; {run.directory}"
            )


def run_recipe(run: Run, recipe: Recipe) -> tuple[nn.Module, Result]:
    """Prune as the recipe says; returns the network with its masks, and what it is worth and cost.

    Raises:
        UserError: the recipe does not fit the data or the architecture.
        RunFailure: the loss is no longer finite; a cut leaves nothing that leads from the input to the output.

    """
    released = recipe.method == "bip" and recipe.bilevel.trainer == "released"
    if released and (run.world > 1 or run.options.precision != "fp32"):
        raise UserError(
            "--bilevel.trainer released runs in one process and in fp32, as released: start it without torchrun and "
            "--precision"
        )
    seed_everything(run.options.seed, "init")
    session = Session(run, recipe, load_data(recipe.data, recipe.batch_size, run))
    try:
        model = create_model(recipe.arch, session.data.classes)
        check_fit(model, session.data, recipe.data.name)
        session.forward_flops = flops(model, torch.zeros(1, *session.data.shape)).dense
        # a cut that cannot be made is refused before anything is trained
        if recipe.method not in ("dense", "finetune"):
            masks_of(session, magnitude_importance(model))
        model = METHODS[recipe.method](session, model)
    except (
        ValueError
    ) as error:  # of the method: no prunable layer, a layer that would be empty, an unknown architecture
        raise UserError(str(error)) from error
    last = session.history[-1]
    trained = next(entry["phase"] for entry in reversed(session.history) if entry["phase"] != "recalibrate")
    epochs = run.logged(trained, "accuracy")
    result = Result(
        accuracy=last["accuracy"],
        best_accuracy=max([last["accuracy"], *epochs]),
        keep=last["keep"],
        passes=session.ledger.passes,
        training_flops=session.ledger.training_flops(session.forward_flops),
        history=session.history,
        costs=costs(model, session.data.shape),
        layers_emptied=emptied(model),
    )
    plain = bake_masks(copy.deepcopy(model)) if has_masks(model) else model
    about = {"method": recipe.method, "arch": recipe.arch, "classes": session.data.classes, "accuracy": result.accuracy}
    masked = list(kept_per_layer(model)) if has_masks(model) else []
    run.save_weights("last", plain, **about, shape=session.data.shape, masked=masked)
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
        run.save_weights("rewind", model, epoch=snapshot)
    stream = Stream(batches)
    for step in session.steps(name, epochs * len(batches), model=model, optimiser=optimiser):
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
                run.save_weights("rewind", model, epoch=snapshot)
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
    upper: Any = torch.optim.SGD(scores, settings.beta, momentum, weight_decay=score_decay(settings))
    model, lower, upper = run.prepare(model, lower, upper, channels_last=True)
    if settings.tie_scores:  # the way to a GPU parts the scores from the weights, which would lose their first step
        set_masks(model)
    lower_stream, upper_stream = Stream(data.lower), Stream(data.upper)
    per_epoch, n = len(data.lower), settings.lower_steps
    for step in session.steps("prune", settings.epochs * per_epoch, model=model, lower=lower, upper=upper):
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
    model = model.to(run.device)
    lower = released_optimizer(model, settings.alpha, settings.momentum, settings.weight_decay)
    upper = released_optimizer(model, settings.beta, settings.momentum, score_decay(settings))
    lower_stream, upper_stream = Stream(data.lower), Stream(data.upper)
    per_epoch = len(data.lower)
    for step in session.steps("prune", settings.epochs * per_epoch, model=model, lower=lower, upper=upper):
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
    model = scored(session, pretrained(session, model))
    optimiser: Any = released_optimizer(model, phase.lr, phase.momentum, phase.weight_decay)
    hydra_freeze(model)  # before processes agree on whose gradients they average
    model, optimiser = run.prepare(model, optimiser, channels_last=True)
    stream = Stream(batches)
    for step in session.steps("prune", phase.epochs * len(batches), model=model, optimiser=optimiser):
        epoch, position = divmod(step, len(batches))
        session.rate(optimiser, phase.schedule, epoch, phase.lr, phase.epochs)
        loss, _ = hydra_step(model, stream[step], optimiser, backward=session.backward)
        run.log(loss=run.reduce(loss, "mean"))
        if position + 1 == len(batches):
            run.log(accuracy=accuracy(model, session.data.evaluation, run))
    hydra_freeze(run.unwrap(model), False)
    return finish(session, model, passes=phase.epochs * len(batches))


def finetune(session: Session, model: nn.Module) -> nn.Module:
    """Go on training a network that was pruned before, under its masks (section 2.8).

    Of an authors' file, which holds scores alone, the recipe's keep ratio and structure give the masks.
    """
    recipe, path = session.recipe, session.recipe.pretrained
    assert path is not None, "checked with the recipe"
    ours = weights_file(path).suffix == ".safetensors"
    keep, structure = (0.0, "") if ours else (recipe.keep, recipe.structure)
    model, _ = load_model(path, recipe.arch, keep, structure)
    check_fit(model, session.data, recipe.data.name)
    if not has_masks(model):
        raise UserError(f"--pretrained {path}: finetune takes a pruned network, and every weight of this one is kept")
    return fit(session, freeze_masks(model), "finetune", recipe.finetune)


# -- their parts ----------------------------------------------------------------------------------------------------------


def pretrained(session: Session, model: nn.Module) -> nn.Module:
    """The densely trained network: from the recipe's checkpoint, or trained here."""
    recipe = session.recipe
    if recipe.pretrained is None:
        return fit(session, model, "dense", recipe.dense, dense=True)
    trained, _ = load_model(recipe.pretrained, recipe.arch)
    check_fit(trained, session.data, recipe.data.name)
    return bake_masks(trained) if has_masks(trained) else trained


def rewound(session: Session, model: nn.Module) -> nn.Module:
    """A new network with the weights of the epoch to rewind to."""
    recipe = session.recipe
    folder = session.run.directory if recipe.pretrained is None else recipe.pretrained
    if not folder.is_dir():
        raise UserError(
            f"--pretrained {folder}: {recipe.method} rewinds to an early epoch, which only a run's folder has"
        )
    state, about = load_weights(folder / "checkpoints" / "rewind.safetensors")
    if (epoch := about.get("epoch", recipe.rewind_epoch)) != recipe.rewind_epoch:
        raise UserError(
            f"--rewind_epoch {recipe.rewind_epoch}: {folder} has kept the weights of epoch {epoch}; give that epoch, "
            "or no --pretrained"
        )
    fresh = create_model(recipe.arch, session.data.classes)
    fresh.load_state_dict(state)
    return fresh


def scored(
    session: Session, model: nn.Module, init: Literal["weight", "random"] = "weight", tie: bool = False
) -> nn.Module:
    """The network with scores and masks."""
    recipe = session.recipe
    seed_everything(session.run.options.seed, "scores")  # a resumed run draws what one that was not killed does
    return prune_parametrize(
        model, recipe.keep, recipe.structure, min_keep=recipe.min_keep, scores_init=init, tie_scores=tie
    )


def score_decay(settings: Bilevel) -> float:
    """Weight decay of the scores."""
    return settings.weight_decay if settings.score_decay is None else settings.score_decay


def finish(session: Session, model: nn.Module, passes: int) -> nn.Module:
    """Fix the masks that were found; gather statistics and fine-tune under them where the recipe says so."""
    session.close(model, "prune", passes)
    model = freeze_masks(session.run.unwrap(model))
    check_cut(session, model)
    if batches := session.recipe.recalibrate:  # those so far were gathered under masks that changed with every step
        stream = Stream(session.data.scoring)
        if not session.run.completed("recalibrate"):
            update_bn((stream[i][0] for i in range(batches)), model)
        session.close(model, "recalibrate", 0)
    phase = session.recipe.finetune
    return fit(session, model, "finetune", phase) if phase.epochs else model


def sparse_fit(session: Session, model: nn.Module, masks: dict[str, Tensor], name: str = "train") -> nn.Module:
    """Train under fixed masks."""
    model = fix_masks(model, masks)
    check_cut(session, model)
    return fit(session, model, name, session.recipe.sparse)


def emptied(model: nn.Module) -> list[str]:
    """The layers whose mask has no ones."""
    return [name for name, (kept, _) in kept_per_layer(model).items() if not kept] if has_masks(model) else []


def check_cut(session: Session, model: nn.Module) -> None:
    """Say which layers the scores, not the budget, left empty; a global ranking may do so at any keep ratio.

    Raises:
        RunFailure: no path from input to output is left, so the network is a constant and training it is in vain.
            Whatever was trained before is kept.
    """
    recipe, run = session.recipe, session.run
    if not (empty := emptied(model)):
        return
    found = f"{recipe.method} at keep ratio {keep_ratio(model):.4g} leaves no weight in {', '.join(empty)}"
    advice = "raise --keep" + (", or give every layer a minimum with --min_keep" * (recipe.structure == "global"))
    if not reaches_output(model, session.data.shape):
        raise RunFailure(f"{found}, so that the output no longer depends on the input: {advice}; see {run.directory}")
    if run.is_main:
        logger.warning("%s; %s if that is not wanted", found, advice)


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
    """Random masks, SNIP, GraSP and SynFlow: cut at initialisation, then train.

    A batch that SNIP is scored on is one gradient evaluation, and two for GraSP: a gradient, and its product with the
    Hessian. A round of SynFlow is one, of a single sample.
    """
    recipe, data = session.recipe, session.data
    model = model.to(session.run.device)
    stream = Stream(data.scoring)
    batches = (stream[i] for i in range(recipe.score_batches))
    if recipe.method == "synflow":
        if recipe.structure != "global":
            raise UserError(f"--structure {recipe.structure}: synflow ranks all weights together, use global")
        masks = synflow_masks(model, recipe.keep, data.shape, min_keep=recipe.min_keep)
        session.ledger.count(1, SYNFLOW_ROUNDS)
        return sparse_fit(session, model, masks)
    if recipe.method == "random":
        draws = torch.Generator().manual_seed(derived_seed(session.run.options.seed, "random masks"))
        return sparse_fit(session, model, masks_of(session, random_importance(model, draws)))
    score, passes = (snip_importance, 1) if recipe.method == "snip" else (grasp_importance, 2)
    session.count(passes * recipe.score_batches)
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
    "finetune": finetune,
    "random": at_initialisation,
    "snip": at_initialisation,
    "grasp": at_initialisation,
    "synflow": at_initialisation,
}
