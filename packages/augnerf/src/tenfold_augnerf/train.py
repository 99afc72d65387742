"""Training: one explicit loop for NeRF, Aug-NeRF and its rivals (sections 2.4, 6 and 8)."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from tenfold_augnerf.attack import steps_of
from tenfold_augnerf.data import Data, DataConfig, load_data
from tenfold_augnerf.evaluate import COLLAPSED, compile_networks, memorised, rays_at_once, scores_of
from tenfold_augnerf.models import ModelConfig, create_model
from tenfold_augnerf.objective import (
    Adversary,
    Batch,
    Cost,
    Losses,
    Objective,
    Starts,
    accumulate,
    free_replay,
    random_starts,
)
from tenfold_augnerf.perturbation import KEYS, broadcast, describe_budget
from tenfold_augnerf.renderer import RELEASED, Draws, RaySampling, Renderer, Variant
from tenfold_augnerf.schedules import RadiusControl, RadiusSchedule, learning_rate
from tenfold_augnerf.views import RayBatch, RayBatches
from tenfold_augnerf.weights import WeightPerturbation, moved, sharpness_aware
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions, derived_seed, seed_everything

logger = logging.getLogger(__name__)
Method = Literal["nerf", "aug", "random", "unadv", "awp", "awp-aug", "sam", "auxiliary"]
PERTURBED_WEIGHTS = ("awp", "awp-aug")
GUARD_STEPS = 200  # between looks at whether the scene is empty: so rarely that waiting for the device costs nothing


@dataclasses.dataclass
class Attack:
    """The perturbations (sections 2.2 and 2.3); lists have one entry for all keys, or one for each."""

    keys: list[str] = dataclasses.field(
        default_factory=lambda: ["pts_c", "pts_f", "feat_c", "feat_f", "raw_c", "raw_f"]
    )
    """Places that are perturbed."""
    levels: list[str] = dataclasses.field(default_factory=list)
    """Only the keys of these levels: coordinates, features, samples; empty: all."""
    eps: list[float] = dataclasses.field(default_factory=lambda: [1e-5])
    """Radii: pixels or half bins for coordinates, degrees for cam_r, absolute otherwise."""
    alpha: list[float] = dataclasses.field(default_factory=lambda: [1.25])
    """Step sizes, as multiples of the radius."""
    absolute_alpha: bool = False
    """Take the step sizes as they are, in the perturbation's own unit, as the released code does."""
    iterations: list[int] = dataclasses.field(default_factory=lambda: [1])
    """Ascent steps."""
    norm: list[str] = dataclasses.field(default_factory=lambda: ["l_inf"])
    """Norms of the balls: l_inf or l_2."""
    weight: float = 0.5
    """Lambda: weight of the perturbed loss."""
    mix: Literal["convex", "additive"] = "convex"
    """(1 - lambda) clean + lambda perturbed, or clean + lambda perturbed."""
    restarts: int = 1
    """Attacks a batch, of which the worst counts."""
    start: Literal["random", "zero"] = "random"
    """Where the ascent starts."""
    cost: Cost = "plain"
    """plain; reuse: the clean backward pass gives the gradient (one step from zero; only aug, others: plain); heads:
    features are shared."""
    every: int = 1
    """Attack at every n-th step only."""
    replays: int = 1
    """Updates a batch, whose backward passes move the perturbation too ("free" training of aug and unadv); 1: off."""
    warmup: float = 0.0
    """Fraction of the training before the first perturbation."""
    ramp: float = 0.0
    """Fraction of the training over which radii grow."""
    anneal: float = 0.0
    """Last fraction of the training, over which they shrink to 0."""
    target_ratio: float = 0.0
    """Scale the radii until the perturbed loss is this multiple of the clean one; 0: as given."""
    awp_gamma: float = 0.01
    """AWP: size of the weights' perturbation, relative to their norm."""
    awp_lr: float = 5e-4
    """AWP: learning rate of the proxy."""
    awp_warmup: int = 0
    """AWP: first step with it."""
    sam_rho: float = 0.05
    """SAM: length of the weights' perturbation."""

    def __post_init__(self) -> None:
        """Refuse what is no attack."""
        known = {key.level for key in KEYS.values()}
        for level in self.levels:
            if level not in known:
                raise UserError(f"--attack.levels {level}: the levels are coordinates, features, samples")
        if self.every < 1 or self.replays < 1:
            raise UserError("--attack.every and --attack.replays take 1 or more")
        if any(not 0 <= value < math.inf for value in (*self.eps, *self.alpha)):
            raise UserError(f"--attack.eps {self.eps} and alpha {self.alpha}: radii and step sizes are 0 or more")
        for name in ("weight", "target_ratio", "awp_gamma", "awp_lr", "sam_rho"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--attack.{name} {getattr(self, name)}: take a number of 0 or more")


@dataclasses.dataclass
class Optimisation:
    """Adam, its schedule, and the batches (sections 2.1 and 5.3)."""

    steps: int = 500_000
    """Updates; with replays, batches."""
    batch_rays: int = 1024
    """Rays a step, over all processes."""
    batching: Literal["pool", "view"] = "pool"
    """Rays of all views shuffled together, or of one random view a step."""
    precrop_steps: int = 0
    """Steps of batching `view` that stay in the central crop."""
    lr: float = 5e-4
    """Learning rate at the start."""
    lr_factor: float = 0.1
    """What it has fallen to after lr_every steps."""
    lr_every: int = 250_000
    """See lr_factor."""
    noise_std: float = 0.0
    """Standard deviation of noise on the raw density while training."""
    jitter: bool = True
    """Jitter the samples of the clean rendering; false leaves noise_std out too. Method auxiliary has neither, as released,
    whatever is given here."""
    loss: Literal["mse", "huber", "trimmed"] = "mse"
    """The photometric loss: squared, or a robust rival; trimmed takes one process."""
    chunk: int = 0
    """Rays whose graph is alive at once; 0: as many as cache or memory hold."""

    def __post_init__(self) -> None:
        """Refuse what no optimiser takes."""
        counts = min(self.steps, self.batch_rays, self.lr_every) >= 1 and self.chunk >= 0
        if not (counts and 0 < self.lr < math.inf and 0 < self.lr_factor < math.inf):
            raise UserError(
                "--optim.steps, lr, lr_factor, lr_every and batch_rays take positive numbers, --optim.chunk 0 or more"
            )
        if not 0 <= self.noise_std < math.inf or min(self.precrop_steps, self.validate_every) < 0:
            raise UserError("--optim.noise_std, precrop_steps and validate_every take 0 or more")
        if self.precrop_steps and self.batching == "pool":
            raise UserError("--optim.precrop_steps is for --optim.batching view: with pool, set it to 0")

    validate_every: int = 0
    """Steps between looks at the validation views; 0: none."""


@dataclasses.dataclass
class Recipe:
    """One experiment."""

    method: Method = "aug"
    """nerf: no perturbation; aug: worst-case; random: only drawn; unadv: helpful; awp and sam: of the weights; awp-aug: of
    the weights and worst-case; auxiliary: as released, through a third network."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The pictures."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """The networks."""
    coarse: int = 64
    """Samples of the coarse pass."""
    fine: int = 64
    """Further samples of the fine pass; of mip-NeRF, intervals of the fine pass."""
    inverse: bool = False
    """Coarse samples at equal steps of 1/z."""
    attack: Attack = dataclasses.field(default_factory=Attack)
    """The perturbations."""
    optim: Optimisation = dataclasses.field(default_factory=Optimisation)
    """The optimisation."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before anything is."""
        if self.coarse < 2 or self.fine < 0:
            raise UserError(f"--coarse {self.coarse} and --fine {self.fine}: take 2 or more and 0 or more")
        attack = self.attack
        if self.method in (*PERTURBED_WEIGHTS, "auxiliary") and attack.cost == "heads":
            raise UserError(
                f"--method {self.method} has no features to share: --attack.cost heads is for the other methods"
            )
        alone = attack.cost == "plain" and attack.restarts == 1 and all(count == 1 for count in attack.iterations)
        if (
            self.method not in ("nerf", "sam")
            and attack.replays > 1
            and not (alone and self.method in ("aug", "unadv"))
        ):
            raise UserError(
                "--attack.replays is an attack of its own, one ascent step a replay: it goes with the methods aug and unadv, "
                "--attack.cost plain, one iteration and one restart"
            )
        if self.method == "aug" and attack.cost == "reuse" and attack.start == "random":
            raise UserError(
                "--attack.cost reuse takes its step from zero: add --attack.start zero, or use --attack.cost plain"
            )
        RadiusSchedule(self.attack.warmup, self.attack.ramp, self.attack.anneal)


@dataclasses.dataclass
class Result:
    """What a run ends with."""

    test: dict[str, Any]
    """Scores of the test views."""
    validation: dict[str, Any]
    """Scores of the validation views."""
    train_psnr: float
    """PSNR of the training views against what was trained on."""
    train_clean_psnr: float
    """The same against the clean pictures."""
    collapsed: bool
    """Whether the scene is empty."""
    history: list[float]
    """PSNR of the validation views while training."""
    budget: list[str]
    """Radii in physical units."""


def train(recipe: Recipe, options: RunOptions) -> None:
    """Run a recipe and keep its networks."""
    with Run("augnerf", recipe, options) as run:
        _, result = run_recipe(run, recipe)
        if run.is_main:
            for line in result.budget:
                print(f"  {line}")
            empty = "; the scene is empty: the run collapsed" if result.collapsed else ""
            print(
                f"{recipe.method} on {recipe.data.name} {recipe.data.scene}: test PSNR {result.test['psnr']:.2f} dB, SSIM "
                f"{result.test['ssim']:.3f}, training views {result.train_psnr:.2f} dB as given and "
                f"{result.train_clean_psnr:.2f} dB clean{empty}; {run.directory}"
            )


def build(recipe: Recipe, data: Data) -> Renderer:
    """The renderer of a recipe for the bounds of its data."""
    sampling = RaySampling(data.train.near, data.train.far, recipe.coarse, recipe.fine, recipe.inverse, data.ndc)
    variant = RELEASED if recipe.method == "auxiliary" else Variant()
    return create_model(recipe.model, sampling, white=data.white, variant=variant)


def adversary_of(recipe: Recipe, renderer: Renderer, data: Data) -> Adversary | None:
    """Who perturbs: None for plain NeRF and SAM; without keys for AWP.

    The clean backward pass gives the worst-case gradient of the shared branch alone: where a recipe has `cost: reuse` and
    another method is asked for, that one is computed plainly.

    Raises:
        UserError: keys that do not exist, that this renderer does not expose, or that the mode of cost excludes.

    """
    attack = recipe.attack
    if recipe.method in ("nerf", "sam"):
        return None
    cost = "plain" if attack.cost == "reuse" and recipe.method != "aug" else attack.cost
    if recipe.method == "awp":
        return Adversary({}, weight=attack.weight, mix=attack.mix)
    steps = steps_of(
        attack.keys,
        renderer.geometry(*data.train.size, len(data.train)),
        eps=attack.eps,
        alpha=attack.alpha,
        iterations=attack.iterations,
        norm=attack.norm,
        relative_alpha=not attack.absolute_alpha,
    )
    if attack.levels:
        steps = {key: step for key, step in steps.items() if KEYS[key].level in attack.levels}
    if not steps:
        raise UserError("--attack.levels leaves no key of --attack.keys: perturb something, or use --method nerf")
    renderer.check(steps)
    modes: dict[str, Literal["worst", "random", "helpful"]] = {"random": "random", "unadv": "helpful"}
    return Adversary(
        steps,
        mode=modes.get(recipe.method, "worst"),
        weight=attack.weight,
        mix=attack.mix,
        restarts=attack.restarts,
        cost=cost,
        zero_start=attack.start == "zero" and recipe.method != "random",
    )


def budget_of(trainer: "Trainer") -> list[str]:
    """The radii of the places that are perturbed, in pixels, bins and 8-bit levels."""
    if not trainer.keys:
        return []
    settings = broadcast(trainer.recipe.attack.keys, eps=trainer.recipe.attack.eps)
    return [describe_budget(key, float(settings[key]["eps"]), trainer.geometry) for key in trainer.keys]


class Trainer:
    """What a step needs; `step` makes one update."""

    def __init__(self, run: Run, recipe: Recipe, data: Data) -> None:
        attack, optim = recipe.attack, recipe.optim
        if run.options.precision == "fp16":
            raise UserError("--precision fp16: the losses' gradients are too small for it here, use bf16 or fp32")
        self.run, self.recipe, self.data = run, recipe, data
        self.renderer = build(recipe, data).to(run.device)
        self.adversary = adversary_of(recipe, self.renderer, data)
        undivided = recipe.method in PERTURBED_WEIGHTS or any(k.startswith("cam") for k in self.keys)
        if run.world > 1 and (undivided or optim.loss == "trimmed"):
            raise UserError(
                "AWP, camera keys and --optim.loss trimmed need all rays in one process: start it without torchrun"
            )
        self.optimiser = torch.optim.Adam(self.renderer.parameters(), optim.lr)
        self.batches = RayBatches(
            data.train,
            optim.batch_rays,
            derived_seed(run.options.seed, "batches") % 2**31,
            mode=optim.batching,
            precrop_steps=optim.precrop_steps,
            rank=run.rank,
            world=run.world,
        )
        self.geometry = self.renderer.geometry(*data.train.size, len(data.train))
        self.objective = Objective(self.renderer.coarse_weight, optim.loss)
        self.schedule = RadiusSchedule(attack.warmup, attack.ramp, attack.anneal)
        self.control = RadiusControl(attack.target_ratio or 1.0)
        self.awp = (
            WeightPerturbation(self.renderer, attack.awp_gamma, attack.awp_lr)
            if recipe.method in PERTURBED_WEIGHTS
            else None
        )
        self.chunk = optim.chunk or rays_at_once(self.renderer, run.device, training=True)
        if run.options.compile:
            compile_networks(self.renderer)

    @property
    def keys(self) -> list[str]:
        """The places that are perturbed."""
        return list(self.adversary.steps) if self.adversary else []

    @property
    def tracked(self) -> dict[str, Any]:
        """What resuming restores."""
        held = {"model": self.renderer, "optimiser": self.optimiser, "control": self.control}
        return held if self.awp is None else {**held, "awp": self.awp}

    def step(self, number: int) -> Losses:
        """One batch: gradients, update, learning rate."""
        recipe, attack, optim = self.recipe, self.recipe.attack, self.recipe.optim
        share = self.batches[number]
        draw = torch.Generator(self.run.device).manual_seed(derived_seed(self.run.options.seed, "draws", number))
        released = recipe.method == "auxiliary"  # its adversarial runs have neither jitter nor noise
        drawn = Draws()
        if optim.jitter and not released:
            drawn = self.renderer.draws(share.total, draw, optim.noise_std).chosen(share.rows)
        batch = Batch(share.rays, share.truth, drawn, share.total)
        scale = self.schedule.share(number, optim.steps) * self.control.scale
        adversary = self.adversary
        if number % attack.every or (scale == 0 and self.keys and self.awp is None):
            adversary = None
        elif adversary is not None:  # without radii, AWP still has the weights to perturb
            adversary = adversary.scaled(scale) if scale else dataclasses.replace(adversary, steps={})
        with self.run.accelerator.autocast():
            if recipe.method == "sam":
                losses = self._sharpness_aware(batch)
            elif adversary is not None and attack.replays > 1:
                losses = self._free(batch, adversary, self._starts(adversary, share, draw))
            else:
                losses = self._update(batch, adversary, share, draw, number)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(number + 1, optim.lr, optim.lr_factor, optim.lr_every)
        if attack.target_ratio and losses.adversarial is not None:  # waits for the device; off by default
            self.control.observe(float(self.run.reduce(losses.clean)), float(self.run.reduce(losses.adversarial)))
        return losses

    def _starts(self, adversary: Adversary, share: RayBatch, draw: torch.Generator) -> Starts:
        """Starts of this process's rays, drawn for the batch of all processes."""
        dtype = share.truth.dtype
        full = random_starts(adversary.steps, self.geometry, share.total, draw, dtype, zero=adversary.zero_start)
        first = share.rows.start
        return lambda number, rows: full(number, slice(first + rows.start, first + rows.stop))

    def _update(
        self, batch: Batch, adversary: Adversary | None, share: RayBatch, draw: torch.Generator, number: int
    ) -> Losses:
        starts = None if adversary is None else self._starts(adversary, share, draw)
        self.optimiser.zero_grad()
        with contextlib.ExitStack() as stack:

            def perturb(loss: Callable[[Any], Tensor]) -> None:
                assert self.awp is not None
                stack.enter_context(self.awp.applied(self.renderer, self.awp.direction(self.renderer, loss)))

            use_awp = self.awp is not None and number >= self.recipe.attack.awp_warmup
            losses = accumulate(
                self.renderer,
                batch,
                adversary,
                starts,
                objective=self.objective,
                chunk=self.chunk,
                backward=self.run.backward,
                perturb_weights=perturb if use_awp else None,
            )
            self._synchronise()
            self.optimiser.step()
        return losses

    def _sharpness_aware(self, batch: Batch) -> Losses:
        options: dict[str, Any] = {"objective": self.objective, "chunk": self.chunk, "backward": self.run.backward}
        self.optimiser.zero_grad()
        losses = accumulate(self.renderer, batch, **options)
        self._synchronise()
        with sharpness_aware(self.renderer, self.recipe.attack.sam_rho):
            accumulate(self.renderer, batch, **options)
        self._synchronise()
        self.optimiser.step()
        return losses

    def _free(self, batch: Batch, adversary: Adversary, starts: Starts) -> Losses:
        delta = dict(starts(0, slice(0, len(batch.truth))))
        for _ in range(self.recipe.attack.replays):
            self.optimiser.zero_grad()
            losses, delta = free_replay(
                self.renderer,
                batch,
                adversary,
                delta,
                objective=self.objective,
                chunk=self.chunk,
                backward=self.run.backward,
            )
            self._synchronise()
            self.optimiser.step()
            moved()
        return losses

    def _synchronise(self) -> None:
        """Sum the gradients of all processes: each holds its rays' part of the mean over the whole batch."""
        if self.run.world == 1:
            return
        held = [parameter for parameter in self.renderer.parameters() if parameter.grad is not None]
        flat = torch.cat([parameter.grad.flatten() for parameter in held if parameter.grad is not None])
        for parameter, part in zip(held, self.run.reduce(flat).split([p.numel() for p in held]), strict=True):
            parameter.grad = part.view_as(parameter)


def run_recipe(run: Run, recipe: Recipe, data: Data | None = None) -> tuple[Renderer, Result]:
    """Train as the recipe says; returns the renderer and its scores.

    Raises:
        UserError: the recipe does not fit the data or the renderer.
        RunFailure: a loss is no longer finite.

    """
    seed_everything(run.options.seed, "init")
    data = (load_data(recipe.data) if data is None else data).to(run.device)
    trainer = Trainer(run, recipe, data)
    renderer, optim = trainer.renderer, recipe.optim
    warned = False
    for step in run.steps("train", optim.steps, **trainer.tracked):
        losses = trainer.step(step)
        shares = {"clean_loss": losses.clean, "acc": losses.acc}
        if losses.adversarial is not None:
            shares["perturbed_loss"] = losses.adversarial
        run.log(
            **{name: run.reduce(value, "mean") for name, value in shares.items()}, psnr=run.reduce(losses.psnr, "mean")
        )
        if optim.validate_every and (step + 1) % optim.validate_every == 0:
            scores = scores_of(renderer, data.validation, run=run)
            run.log(validation_psnr=scores["psnr"])
        if (step + 1) % GUARD_STEPS == 0 and not warned and float(losses.acc) < COLLAPSED:
            warned = True
            logger.warning(
                "the scene is empty after %d steps: start again with another --seed, a lower --optim.lr, smaller radii or "
                "a longer --attack.warmup",
                step + 1,
            )
    exact = bool(data.scene)
    about = {
        "sizes": dataclasses.asdict(recipe.model),
        "samples": [recipe.coarse, recipe.fine],
        "inverse": recipe.inverse,
        "method": recipe.method,
        "data": {
            **dataclasses.asdict(recipe.data),
            "root": None if recipe.data.root is None else str(recipe.data.root),
        },
    }
    run.complete("last", renderer, **about)
    test = scores_of(renderer, data.test, exact=exact, run=run)
    result = Result(
        test=test,
        validation=scores_of(renderer, data.validation, exact=exact, run=run),
        collapsed=bool(test["collapsed"]),
        history=run.logged("train", "validation_psnr") if optim.validate_every else [],
        budget=budget_of(trainer),
        **memorised(renderer, data),
    )
    return renderer, result
