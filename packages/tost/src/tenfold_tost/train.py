"""Training a sparse network (section 2.8): mask, learned scales, then masked SGD while the ghosts fade.

A run is a sequence of phases (`Run.steps`): for a lottery ticket `dense` and `round-k`, which find the mask; `start`, the
masked and rescaled initial weights; `ghosts`, as long as any fades; `train`, the rest. Every phase's outcome is kept, so
a resumed run goes on in the middle of any of them.
"""

import dataclasses
import itertools
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from tenfold_shared.batches import Stream
from tenfold_shared.checkpoint import load_weights, write_json
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions, derived_seed, seed_everything
from tenfold_tost.activations import RELEASED_BETA
from tenfold_tost.compat import from_released, load_official_checkpoint
from tenfold_tost.data import Data, load_data
from tenfold_tost.evaluate import accuracy, check_fit, mean_zero_rates, operations, weight_counts
from tenfold_tost.ghosts import Ghosts, Soft, SparseRecipe
from tenfold_tost.lrsi import Batch, Lrsi, gradient_norm, learn_scales
from tenfold_tost.maskfiles import read_tensors
from tenfold_tost.masking import MaskKeeper, Masks, apply_masks, check_flow, density, prunable_weights
from tenfold_tost.maskmaking import TICKETS, Rewind, masks_at_initialisation
from tenfold_tost.models import create_model, normalizes_inside
from tenfold_tost.pruning import layerwise_cut, magnitude_cut, ticket_rounds
from tenfold_tost.recipe import VANILLA, Recipe
from tenfold_tost.schedules import learning_rate
from tenfold_tost.skips import GhostSkip, hook_skips


@dataclasses.dataclass
class Result:
    """What a run ends with; accuracies in per cent on the evaluation images."""

    accuracy: float
    """After the last epoch."""
    best_dev_accuracy: float | None
    """At the epoch that is best on the dev set, once the ghosts are gone; None without a dev set."""
    density: float
    """Fraction of the masked weights that remains."""
    steps: int
    """Steps of training, those that find a ticket's mask included, and iterations of the learned scales."""
    parameters: dict[str, int]
    """While the ghosts were there, and deployed."""
    counts: dict[str, Any]
    """Weights and operations; see `evaluate.weight_counts` and `evaluate.operations`."""
    losses: list[float]
    """Mean training loss of every epoch."""
    zero_rates: dict[str, float]
    """Fraction of zeros that each activation puts out on the evaluation images."""
    scales: dict[str, Any]
    """Of the learned scales: iterations bound by gamma, the gradient's norm at first and last, the factors' range."""


class Carried:
    """What goes from one phase to the next and is kept: the network, its masks, the momentum of its parameters."""

    def __init__(
        self, model: nn.Module, masks: Mapping[str, Tensor] | None = None, momentum: Mapping[str, Tensor] | None = None
    ) -> None:
        self.model, self.masks, self.momentum = model, dict(masks or {}), dict(momentum or {})

    def state_dict(self) -> dict[str, Tensor]:
        """Everything in one dictionary."""
        parts = {"model": self.model.state_dict(), "mask": self.masks, "momentum": self.momentum}
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take it back."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "mask": {}, "momentum": {}}
        for key, tensor in state.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        self.model.load_state_dict(parts["model"])
        self.masks, self.momentum = parts["mask"], parts["momentum"]


@dataclasses.dataclass
class Session:
    """What the loops share."""

    run: Run
    recipe: Recipe
    data: Data
    steps: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)

    def fresh(self, draw: str = "init") -> nn.Module:
        """The network at its initial weights, on the device; another `draw` gives other weights."""
        seed_everything(self.run.options.seed, draw)
        return create_model(self.recipe.arch, self.data.classes).to(self.run.device)

    def mask(self, model: nn.Module) -> Masks:
        """The recipe's mask, of a method that does not train first."""
        seed = derived_seed(self.run.options.seed, "random masks")
        masks = masks_at_initialisation(self.recipe.mask, model, self.data.shape, seed, self.stream())
        check_flow(model, masks, self.data.shape)
        return masks

    def stream(self) -> Iterator[Batch]:
        """Training batches without end, whole in every process."""
        source = Stream(self.data.scoring)
        step = 0
        while True:
            yield source[step]
            step += 1


def train(recipe: Recipe, options: RunOptions) -> None:
    """Run a recipe and keep its network, and what came of it in ``result.json``."""
    with Run("tost", recipe, options) as run:
        _, result = run_recipe(run, recipe)
        if run.is_main:
            about = {"techniques": recipe.techniques, "mask": recipe.mask.method, "seed": options.seed}
            write_json(run.directory / "result.json", about | dataclasses.asdict(result))
            best = (
                "" if result.best_dev_accuracy is None else f" ({result.best_dev_accuracy:.2f} % at the best dev epoch)"
            )
            print(
                f"{recipe.techniques} {recipe.arch} on {recipe.data.name}, {recipe.mask.method} mask: "
                f"{result.accuracy:.2f} %{best}, {100 * result.density:.2f} % of the masked weights remain, "
                f"{result.parameters['deployed']} parameters deployed; {run.directory}"
            )


def run_recipe(run: Run, recipe: Recipe) -> tuple[nn.Module, Result]:
    """Make the mask and train under it; returns the network and what it is worth and cost.

    Raises:
        UserError: the recipe does not fit the data or the architecture, or its mask lets nothing through.
        RunFailure: the loss is no longer finite.

    """
    try:
        with torch.device("meta"):
            raw = normalizes_inside(create_model(recipe.arch))
        session = Session(run, recipe, load_data(recipe.data, recipe.batch_size, run, raw))
        model = session.fresh()
        check_fit(model, session.data, recipe.data.name)
        masks: Masks = {}
        if recipe.mask.method in TICKETS:
            model, masks = ticket(session)
        elif recipe.mask.method != "dense" and not run.completed("start"):
            if recipe.mask.file is not None:
                model = imported(session, model, recipe.mask.file)
            masks = session.mask(model)
        return sparse_training(session, model, masks)
    except UserError:
        raise
    except ValueError as error:  # of the method: a mask that does not fit, no skip that can be added
        raise UserError(str(error)) from error


# -- masks ----------------------------------------------------------------------------------------------------------------


def ticket(session: Session) -> tuple[nn.Module, Masks]:
    """A lottery ticket: train, cut, rewind, again until the density is reached. The weights to go on from, and the mask.

    `omp` cuts once. Every training here is vanilla but for the activation that the recipe may ask for; the techniques come
    in when the ticket itself is trained. The rounds of a ticket that is to be drawn anew go back to its initial weights all
    the same: what the control changes is the weights under the mask, not the mask.
    """
    settings = session.recipe.mask
    between: Rewind = "init" if settings.rewind == "random" else settings.rewind
    model = search(session, session.fresh(), {}, "dense")
    one_shot = settings.method == "omp"
    rounds = [1.0 - settings.density] if one_shot else ticket_rounds(settings.density, settings.percent)
    masks: Masks = {}
    for number, percent in enumerate(rounds, 1):
        weights = {name: weight.detach() for name, weight in prunable_weights(model, settings.linear).items()}
        masks = (
            layerwise_cut(weights, percent)
            if settings.method == "lth-layerwise"
            else magnitude_cut(weights, percent)[0]
        )
        check_flow(model, masks, session.data.shape)
        if number < len(rounds):
            model = rewound(session, model, between)
            apply_masks(model, masks)
            model = search(session, model, masks, f"round-{number}")
    return rewound(session, model, settings.rewind), masks


def search(session: Session, model: nn.Module, masks: Masks, name: str) -> nn.Module:
    """One training on the way to a ticket; the plain network at its end."""
    settings, plan = session.recipe.mask, VANILLA
    if settings.activation != "relu":
        kept = Soft(kind=settings.activation, beta0=RELEASED_BETA, constant=True)
        plan = dataclasses.replace(VANILLA, soft=kept)
    ghosts = Ghosts(model, plan)
    snapshot = settings.rewind == "late" and not masks
    model = fit(session, model, masks, name, plan, ghosts=ghosts, snapshot=snapshot)
    ghosts.detach(everything=True)
    return model


def imported(session: Session, drawn: nn.Module, file: Path) -> nn.Module:
    """The network at the weights that belong to a mask's file (section 2.1); as drawn where none are named."""
    recipe = session.recipe
    if recipe.mask.weights is not None:
        model = load_official_checkpoint(recipe.mask.weights, recipe.arch)
        check_fit(model, session.data, recipe.data.name)
        return model.to(session.run.device)
    if from_released(read_tensors(file)).keys() >= dict(drawn.named_parameters()).keys():
        warnings.warn(
            f"{file} holds weights beside the mask, and the run starts from newly drawn ones: add --mask.weights {file} to "
            "start from those",
            stacklevel=2,
        )
    return drawn


def rewound(session: Session, trained: nn.Module, how: Rewind) -> nn.Module:
    """The network to train a ticket from."""
    if how == "none":
        return trained
    model = session.fresh("redrawn" if how == "random" else "init")
    if how == "late":
        state, _ = load_weights(session.run.directory / "checkpoints" / "rewind.safetensors")
        model.load_state_dict(state)
    return model


# -- training -------------------------------------------------------------------------------------------------------------


def sparse_training(session: Session, model: nn.Module, masks: Masks) -> tuple[nn.Module, Result]:
    """Section 2.8 from the masked initial weights on: ghosts in, scales learned, training, ghosts out, proof."""
    run, recipe, data = session.run, session.recipe, session.data
    plan = recipe.plan()
    if masks:
        apply_masks(model, masks)
    ghosts = Ghosts(model, plan, data.example.to(run.device))
    while_ghosts = sum(p.numel() for p in model.parameters())
    carried = Carried(model, masks)
    scales: dict[str, Any] = {}
    if plan.lrsi is not None and not run.completed("start"):
        scales = scale_summary(session, model, plan.lrsi, masks)
    scales = run.complete("start", carried, scales=scales)["scales"]  # type: ignore[arg-type]
    masks = carried.masks
    session.steps += int(scales.get("iterations", 0))
    session.losses = []
    model = fit(session, model, masks, "train", plan, ghosts=ghosts, warm=recipe.warmup_steps)
    if not plan.stays:
        ghosts.finalize(masks)
    test = accuracy(model, data.evaluation, run).item()
    result = Result(
        accuracy=test,
        best_dev_accuracy=best_dev(run),
        density=density(masks) if masks else 1.0,
        steps=session.steps,
        parameters={"training": while_ghosts, "deployed": sum(p.numel() for p in model.parameters())},
        counts={**weight_counts(model), **operations(model, data.example)},
        losses=session.losses,
        zero_rates=mean_zero_rates(model, data.evaluation, run),
        scales=scales,
    )
    about: dict[str, Any] = {
        "arch": recipe.arch,
        "classes": data.classes,
        "techniques": recipe.techniques,
        "accuracy": result.accuracy,
    }
    if plan.soft is not None and plan.soft.constant:
        about |= {"soft": plan.soft.kind, "beta": plan.soft.beta0}
    if plan.skips is not None and plan.skips.constant:
        about["skip"] = plan.skips.kind
    run.save_weights("last", model, **about, density=result.density)
    return model, result


def scale_summary(session: Session, model: nn.Module, settings: Lrsi, masks: Masks) -> dict[str, Any]:
    """Learn the scales and say what came of it."""
    device_masks = {name: mask.to(session.run.device) for name, mask in masks.items()}
    report = learn_scales(model, session.stream(), settings, device_masks)
    factors = sorted(report.scales.values())
    return {
        "iterations": len(report.norms),
        "constrained": sum(report.constrained),
        "first_norm": report.norms[0] if report.norms else None,
        "last_norm": report.norms[-1] if report.norms else None,
        "smallest": factors[0],
        "largest": factors[-1],
    }


def best_dev(run: Run) -> float | None:
    """Test accuracy at the epoch that is best on the dev set."""
    dev, test = run.logged("train", "dev_accuracy"), run.logged("train", "accuracy")
    return test[max(range(len(dev)), key=dev.__getitem__)] if dev else None


def fit(
    session: Session,
    model: nn.Module,
    masks: Masks,
    name: str,
    plan: SparseRecipe,
    *,
    ghosts: Ghosts | None = None,
    snapshot: bool = False,
    warm: int = 0,
) -> nn.Module:
    """Train from the weights given under a mask, first with the ghosts that fade, then without; one phase each.

    The parameters that go with the ghosts take their momentum with them; everything else keeps its own.
    """
    run, recipe = session.run, session.recipe
    per_epoch = len(session.data.train)
    total = recipe.epochs * per_epoch
    loop = _Loop(session, masks, plan, ghosts, total, snapshot, warm)
    momentum: dict[str, Tensor] = {}
    if ghosts is not None and plan.fades:
        window = plan.window(total)
        model, optimiser = loop.stage(model, f"{name}-ghosts", 0, window, {})
        ghosts.detach()
        if recipe.recalibrate:
            update_bn((images for images, _ in itertools.islice(session.stream(), recipe.recalibrate)), model)
        carried = Carried(model, momentum=momentum_of(model, optimiser))
        run.complete(f"{name}-ghosts", carried)  # type: ignore[arg-type]
        momentum = carried.momentum
    else:
        window = 0
    model, _ = loop.stage(model, name, window, total, momentum)
    session.steps += total + warm
    session.losses += loop.losses(name, per_epoch)
    run.complete(name, model)
    return model


class _Loop:
    """The masked loop; a stage of it is a phase of the run."""

    def __init__(
        self,
        session: Session,
        masks: Masks,
        plan: SparseRecipe,
        ghosts: Ghosts | None,
        total: int,
        snapshot: bool,
        warm: int,
    ) -> None:
        self.session, self.masks, self.plan, self.ghosts = session, masks, plan, ghosts
        self.total, self.snapshot, self.warm = total, snapshot, warm

    def stage(
        self, model: nn.Module, name: str, first: int, end: int, momentum: Mapping[str, Tensor]
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The steps from `first` to before `end` of the `total`, with warm-up steps in front of the first of all."""
        run, recipe, data = self.session.run, self.session.recipe, self.session.data
        optimiser: Any = make_optimiser(model, recipe, self.plan)
        model, optimiser = run.prepare(model.train(), optimiser, channels_last=True)
        plain = run.unwrap(model)
        hook_skips(plain)
        for parameter_name, parameter in plain.named_parameters():
            if parameter_name in momentum:
                buffer = momentum[parameter_name].to(parameter.device)
                optimiser.state[parameter] = {"momentum_buffer": buffer}
        keeper = MaskKeeper(plain, self.masks) if self.masks else None
        if self.snapshot and recipe.mask.rewind_epoch == 0 and not run.completed(name):
            run.save_weights("rewind", plain)
        per_epoch, warm = len(data.train), self.warm if first == 0 else 0
        stream = Stream(data.train)
        for turn in run.steps(name, end - first + warm, model=model, optimiser=optimiser):
            step = max(0, first + turn - warm)
            epoch, position = divmod(step, per_epoch)
            rate = learning_rate(epoch, recipe.lr, recipe.milestones) * min(1.0, (turn + 1) / (warm + 1))
            for group in optimiser.param_groups:
                group["lr"] = rate * group["factor"]
            progress = step / self.total
            if self.ghosts is not None and first == 0:
                self.ghosts.advance(progress)
            images, labels = stream[turn if turn < warm else step]
            loss = self.plan.loss(model(images), labels, progress)
            optimiser.zero_grad()
            run.backward(loss)
            if keeper is not None:
                keeper.mask_gradients()
            optimiser.step()
            if keeper is not None:
                keeper.mask_weights()
            run.log(loss=run.reduce(loss.detach(), "mean"))
            if turn >= warm and position + 1 == per_epoch:
                if run.accelerator.scaler is None:  # in fp16 a gradient may overflow, and its step is passed over
                    gradients = [p.grad for p in plain.parameters() if p.grad is not None]
                    run.log(gradient_norm=gradient_norm(gradients))
                self._epoch_ends(model, epoch + 1)
        return plain, optimiser

    def _epoch_ends(self, model: nn.Module, done: int) -> None:
        run, recipe, data = self.session.run, self.session.recipe, self.session.data
        if self.snapshot and done == recipe.mask.rewind_epoch:
            run.save_weights("rewind", model)
        if done % recipe.evaluate_every == 0 or done == recipe.epochs:
            run.log(accuracy=accuracy(model, data.evaluation, run))
            if data.dev is not None:
                run.log(dev_accuracy=accuracy(model, data.dev, run))

    def losses(self, name: str, per_epoch: int) -> list[float]:
        """Mean loss of every epoch over both stages."""
        run = self.session.run
        values = [*run.logged(f"{name}-ghosts", "loss"), *run.logged(name, "loss")][self.warm :]
        return [sum(values[i : i + per_epoch]) / per_epoch for i in range(0, len(values), per_epoch)]


def make_optimiser(model: nn.Module, recipe: Recipe, plan: SparseRecipe) -> torch.optim.SGD:
    """SGD with a group each for the network and for the ghost skips, and one more for the batch norms of each where they
    are not decayed.
    """
    skips = {id(p) for module in model.modules() if isinstance(module, GhostSkip) for p in module.parameters()}
    groups: dict[str, list[nn.Parameter]] = {"network": [], "norm": [], "skips": [], "skip norm": []}
    for module in model.modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and not recipe.decay_norm
        for parameter in module.parameters(recurse=False):
            if id(parameter) in skips:
                groups["skip norm" if norm else "skips"].append(parameter)
            else:
                groups["norm" if norm else "network"].append(parameter)
    factor = plan.skips.lr_factor if plan.skips is not None else 1.0
    settings = {
        "network": {"factor": 1.0},
        "norm": {"factor": 1.0, "weight_decay": 0.0},
        "skips": {"factor": factor},
        "skip norm": {"factor": factor, "weight_decay": 0.0},
    }
    chosen = [{"params": params, **settings[kind]} for kind, params in groups.items() if params]
    return torch.optim.SGD(chosen, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)


def momentum_of(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Momentum buffers by parameter name."""
    state = optimiser.state
    return {
        name: state[parameter]["momentum_buffer"]
        for name, parameter in model.named_parameters()
        if state.get(parameter, {}).get("momentum_buffer") is not None
    }
