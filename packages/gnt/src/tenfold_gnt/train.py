"""Training (section 2.5): rays of a target view, its sources' features, one gradient step. An explicit loop."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from tenfold_gnt.compat import refuse_misfits
from tenfold_gnt.evaluate import Scores, load_model, mean_scores, score_targets, untrained_model
from tenfold_gnt.experiments import DataConfig, Target, judged_targets, training_set
from tenfold_gnt.models import NetworkConfig, create_model
from tenfold_gnt.objective import Optimisation, accumulate_gradients, build_optimiser
from tenfold_gnt.render import Model
from tenfold_gnt.sampling import refuse_few_samples
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions, derived_seed, seed_everything


@dataclasses.dataclass
class Rays:
    """How rays are drawn and sampled."""

    count: int = 2048
    """Rays a target view; more where a step has fewer source views than wanted."""
    centre: float = 0.0
    """Draw them from the central part of the image of this relative size; 0 draws from the whole."""
    samples: int = 64
    """Depths a ray in training."""
    judged_samples: int = 192
    """Depths a ray at evaluation."""
    importance: int = 0
    """Further depths where the first pass has its weights; none in the published configurations."""
    inverse: bool = True
    """Depths uniform in inverse depth; otherwise in depth."""

    def __post_init__(self) -> None:
        """Refuse what no ray has."""
        if self.count < 1 or self.importance < 0:
            raise UserError("--rays.count takes 1 or more, --rays.importance 0 or more")
        for name in ("samples", "judged_samples"):
            refuse_few_samples(getattr(self, name), self.importance, f"--rays.{name}")
        if not 0.0 <= self.centre <= 1.0:
            raise UserError(f"--rays.centre is a fraction of the image in [0, 1], got {self.centre}")


@dataclasses.dataclass
class Recipe:
    """One experiment."""

    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    """What renders."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The scenes."""
    rays: Rays = dataclasses.field(default_factory=Rays)
    """The rays."""
    optimisation: Optimisation = dataclasses.field(default_factory=Optimisation)
    """Adam and its schedule."""
    steps: int = 250_000
    """Training steps."""
    targets: int = 1
    """Target views a step, over all processes, each with its own sources and rays."""
    init: Path | None = None
    """A checkpoint to start from, ours or the authors': fine-tuning, with a fresh optimiser."""
    judge_every: int = 50_000
    """Steps between two evaluations of the training's course."""
    judge_stride: int = 2
    """Of those evaluations: every n-th pixel of both directions."""
    memory_mb: int = 0
    """Bound on the memory of a chunk of rays, MB; 0: the processor's cache, or half of the free GPU memory."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before anything is."""
        for name in ("steps", "targets", "judge_every", "judge_stride"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} takes 1 or more, got {getattr(self, name)}")
        if self.memory_mb < 0:
            raise UserError(f"--memory_mb takes 0 or more, got {self.memory_mb}")
        if self.network.fine and not self.rays.importance:
            raise UserError("--network.fine is a second network for the importance pass: add --rays.importance")
        if self.rays.importance and not self.network.fine and self.network.features == "small":
            raise UserError("--rays.importance needs the full feature network: --network.features resunet")


@dataclasses.dataclass
class Result:
    """What a run ends with."""

    scores: Scores
    """Means over the judged views, at full resolution."""
    history: list[tuple[int, float]]
    """(step, PSNR at `judge_stride`) over the course of training."""


def train(recipe: Recipe, options: RunOptions) -> None:
    """Train a network by a recipe, keep it, and say what it is worth."""
    with Run("gnt", recipe, options) as run:
        _, result = run_recipe(run, recipe)
        if run.is_main:
            print(f"{recipe.network.name} on {recipe.data.name}: {result.scores.sentence()}; {run.directory}")


def run_recipe(run: Run, recipe: Recipe) -> tuple[Model, Result]:
    """Train as the recipe says; returns the network, in evaluation mode, and what it is worth.

    Raises:
        UserError: the recipe does not fit the data or the processes.
        RunFailure: the loss is no longer finite.

    """
    if recipe.targets % run.world:
        raise UserError(f"--targets {recipe.targets} cannot be shared by {run.world} processes: use a multiple of them")
    if run.options.precision == "fp16":
        raise UserError("--precision fp16: the logits of masked views overflow it, use bf16 or fp32")
    views, judged = training_set(recipe.data), judged_targets(recipe.data)
    seed_everything(run.options.seed, "init")
    model = initial_model(recipe).to(run.device)
    if run.options.compile:
        model.compile_networks()
    optimiser, scheduler = build_optimiser(model, recipe.optimisation, recipe.steps)
    model.train()
    for step in run.steps("train", recipe.steps, model=model, optimiser=optimiser, scheduler=scheduler):
        optimiser.zero_grad(set_to_none=True)
        losses = []
        for number in range(run.rank, recipe.targets, run.world):
            key = derived_seed(run.options.seed, "target", step, number)
            draw, chosen = np.random.default_rng(key), torch.Generator(run.device).manual_seed(key)
            # Dropout is the target's own where processes may share targets; a lone one draws on from the run's stream.
            if recipe.targets > 1:
                seed_everything(run.options.seed, "dropout", step, number)
            target = views.draw(draw).to(run.device)
            batch = target.rays(
                recipe.rays.count, chosen, wanted_views=recipe.data.sources, centre=recipe.rays.centre or None
            )
            sampling = target.sampling(recipe.rays.samples, recipe.rays.importance, inverse=recipe.rays.inverse)
            with run.accelerator.autocast():
                result = accumulate_gradients(
                    model, batch, sampling, generator=chosen, memory=recipe.memory_mb * 2**20 or None
                )
            losses.append(result.loss)
        average_gradients(run, model, recipe.targets)
        optimiser.step()
        scheduler.step()
        run.log(loss=run.reduce(torch.stack(losses).sum()) / recipe.targets)
        if (step + 1) % recipe.judge_every == 0 or step + 1 == recipe.steps:
            run.log(psnr=judge(run, model, recipe, judged, recipe.judge_stride).psnr)
    untrained = untrained_model(recipe.network, run.options.seed).to(run.device)
    scores = judge(run, model, recipe, judged, stride=1, untrained=untrained)
    about = {"network": dataclasses.asdict(recipe.network), "inverse": recipe.rays.inverse, "psnr": scores.psnr}
    run.save_weights("last", model, **about)
    found = run.logged("train", "psnr")
    steps = [min((i + 1) * recipe.judge_every, recipe.steps) for i in range(len(found))]
    return model, Result(scores, list(zip(steps, found, strict=True)))


def initial_model(recipe: Recipe) -> Model:
    """A new network, or that of the recipe's checkpoint.

    Raises:
        UserError: the checkpoint does not hold the recipe's network.

    """
    model = create_model(recipe.network)
    if recipe.init is not None:
        start, about = load_model(recipe.init)
        refuse_misfits(start.state_dict(), model.state_dict(), f"--init {recipe.init}", "recipe's network")
        held = about.get("network", {}).get("double_projection", True)
        if recipe.network.double_projection != held:  # other values from the same weights
            raise UserError(
                f"--init {recipe.init} needs --network.double_projection {str(held).lower()}, as it was trained"
            )
        model.load_state_dict(start.state_dict())
    return model


def average_gradients(run: Run, model: Model, targets: int) -> None:
    """Gradients as the mean over the targets of all processes, in one exchange."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = run.reduce(torch.cat([gradient.flatten() for gradient in gradients])) / targets
    for parameter, part in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def judge(
    run: Run,
    model: Model,
    recipe: Recipe,
    targets: list[Target],
    stride: int,
    *,
    with_lpips: bool = False,
    untrained: Model | None = None,
) -> Scores:
    """Mean scores over the judged scenes."""
    rays = recipe.rays
    table = score_targets(
        run,
        model,
        targets,
        sources=recipe.data.sources,
        samples=rays.judged_samples,
        importance=rays.importance,
        inverse=rays.inverse,
        stride=stride,
        with_lpips=with_lpips,
        untrained=untrained,
    )
    return mean_scores(table, [target.scene.name for target in targets])
