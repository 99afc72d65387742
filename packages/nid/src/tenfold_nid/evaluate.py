"""How well, and how soon, new signals are represented: by the dictionary and by all it is compared with (section 9)."""

import contextlib
import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions

from .baselines.classical import fbp, interpolate, tv
from .baselines.linear import LinearDictionary
from .baselines.networks import AutoDecoder, NetworkBatch, fit_latents, fit_networks
from .checkpoints import load_model
from .coordinates import lattice
from .ct import pick_views, projection_design, ray_coordinates, sinogram, view_angles
from .dictionary import NeuralDictionary
from .errors import refusals, refuse_precision
from .fitting import CodePrior, System, fit_prior, gate_code, refine_codes, ridge, system
from .gates import CodebookGate
from .gating import cv_squared
from .metrics import atom_usage, lpips, psnr, ssim
from .networks import CoordinateNetwork, NetworkConfig
from .overrides import OtherData, OtherFit, data_of, fit_of
from .patches import merge_patches
from .recipe import LINEAR, Linear, Meta, Recipe
from .signals import PROJECTED, DataConfig, Signals, load_signals, observation
from .solvers import FitOptions, finetune_gate, gate_start, signal_parts, solve
from .sparse import omp

PRIOR_SIGNALS = 2000
"""Training signals at most whose codes give the Gaussian prior of the solver ``map``."""
RENDERED = 1 << 16
"""Coordinates at which networks are evaluated at a time, which bounds the memory."""


class Observed(NamedTuple):
    """New signals, and what is given of them: samples on the lattice, or projections along rays."""

    truth: Float[Tensor, "batch *spatial channels"]
    seen: Float[Tensor, "batch *spatial channels"]
    mask: Bool[Tensor, "batch *spatial"] | None
    rays: Float[Tensor, "rays samples 2"] | None
    angles: Float[Tensor, " views"] | None
    image: tuple[int, int] | None

    @property
    def spatial(self) -> tuple[int, ...]:
        """Samples along each axis."""
        return tuple(self.truth.shape[1:-1])

    def part(self, signals: slice) -> "Observed":
        """Some of the signals."""
        mask = None if self.mask is None else self.mask[signals]
        return self._replace(truth=self.truth[signals], seen=self.seen[signals], mask=mask)

    def targets(self) -> Float[Tensor, "batch points channels"]:
        """Samples in a row, or the sinograms."""
        return self.seen.flatten(1, -2) if self.rays is None else sinogram(self.seen, self.rays)


def observe(signals: Signals, data: DataConfig, seed: int) -> Observed:
    """The test signals as the experiment shows them."""
    size = signals.seen.shape[1:3]
    if data.name not in PROJECTED:
        mask = observation(signals.seen, data.fraction, seed)
        return Observed(signals.test, signals.seen, mask, None, None, signals.image)
    angles = view_angles(data.views, device=signals.seen.device)
    rays = ray_coordinates((size[0], size[1]), angles)
    if data.test_views:
        rays = rays[pick_views(data.views, size[0], data.test_views).to(rays.device)]
        angles = angles[torch.arange(data.test_views, device=angles.device) * (data.views - 1) // data.test_views]
    return Observed(signals.test, signals.seen, None, rays, angles, signals.image)


class Point(NamedTuple):
    """A new signal's reconstruction on its way."""

    step: int
    """optimiser steps done; 0 for what needs none"""
    seconds: float
    """processor time so far, for all signals together"""
    psnr: float
    """dB, over all samples, observed or not; mean over the signals"""


Step = tuple[int, float, Float[Tensor, "batch *spatial channels"]]


def trajectory(
    model: nn.Module | None,
    recipe: Recipe,
    observed: Observed,
    steps: Sequence[int],
    *,
    prior: CodePrior | None = None,
    target: float = float("inf"),
) -> tuple[list[Point], Tensor]:
    """PSNR after the given numbers of steps, until they are done or the target is reached; and the last reconstruction.

    Processor time counts the work on the new signals alone: observing, setting up, stepping. Neither learning
    beforehand nor taking the PSNR counts.
    """
    warm_up()
    points, last = [], observed.truth
    for step, seconds, preds in reconstructions(model, recipe, observed, steps, prior):
        last = preds.to(observed.truth.dtype)
        points.append(Point(step, seconds, float(quality(last, observed).mean())))
        if points[-1].psnr >= target:
            break
    return points, last


@functools.cache
def warm_up() -> None:
    """Once a process, what only the first fit of all pays for: the libraries that torch loads when they are used.

    The random numbers of whoever comes first are left as they are.
    """
    with torch.random.fork_rng(devices=[]):
        coords, targets = lattice((4, 4)), torch.rand(2, 16, 3)
        networks = NetworkBatch(NetworkConfig(hidden_dim=4, pos_emb="Id"), 2)
        for optimiser in ("adam", "sgd"):
            next(itertools.islice(fit_networks(networks, coords, targets, optimiser=optimiser), 2, None))
        ridge(system(torch.rand(48, 10), targets), penalty=1e-3)


def quality(preds: Tensor, observed: Observed) -> Float[Tensor, " images"]:
    """PSNR of each signal; of each whole image where the signals are its patches."""
    if observed.image is None:
        return psnr(preds, observed.truth)
    return psnr(assembled(preds, observed), assembled(observed.truth, observed))


def assembled(
    values: Float[Tensor, "batch *spatial channels"], observed: Observed
) -> Float[Tensor, "images channels *whole"]:
    """Signals with their channels first; whole images where the signals are their patches."""
    if observed.image is None:
        return values.movedim(-1, 1)
    return merge_patches(values.flatten(1, -2), (observed.spatial[0], observed.spatial[1]), observed.image)


def reconstructions(
    model: nn.Module | None,
    recipe: Recipe,
    observed: Observed,
    steps: Sequence[int],
    prior: CodePrior | None = None,
) -> Iterator[Step]:
    """(step, processor seconds, signals on their lattice) after each of the given numbers of steps.

    Methods without steps give one item, as step 0.
    """
    if isinstance(model, NeuralDictionary):
        yield from _by_dictionary(model, recipe.fit, observed, steps, prior)
    elif isinstance(model, LinearDictionary):
        yield from _by_linear(model, recipe, observed)
    elif isinstance(model, NetworkBatch):
        yield from _by_networks(model, recipe, observed, steps)
    elif isinstance(model, AutoDecoder):
        yield from _by_decoder(model, recipe.fit, observed, steps)
    elif recipe.method == "scratch":
        config = dataclasses.replace(recipe.network, in_dim=len(observed.spatial), out_dim=observed.truth.shape[-1])
        fresh = NetworkBatch(config, len(observed.truth)).to(observed.truth)
        yield from _by_networks(fresh, recipe, observed, steps)
    else:
        yield from _classical(recipe, observed)


def _by_dictionary(
    model: NeuralDictionary, fit: FitOptions, observed: Observed, steps: Sequence[int], prior: CodePrior | None
) -> Iterator[Step]:
    coords = lattice(observed.spatial, device=observed.truth.device)
    if fit.solver == "gate":
        yield from _by_gate(model, fit, observed, steps)
        return
    steps = sorted({*steps}) if fit.solver == "adam" else (0,)
    parts = [
        _coded(model, fit, observed.part(part), steps, prior)
        for part in signal_parts(model, fit, observed.seen, observed.mask)
    ]
    begun, each = sum(part.begun for part in parts), sum(part.each for part in parts)
    for step, code in zip(steps, torch.cat([part.codes for part in parts], dim=1), strict=True):
        with torch.no_grad():
            yield step, begun + each * step, model.render(code, coords).view_as(observed.truth)


class Coded(NamedTuple):
    """Codes on their way, and the processor time they took."""

    codes: Float[Tensor, "steps batch code"]
    begun: float
    """seconds before the first step"""
    each: float
    """seconds of a step; they are all alike"""


@torch.no_grad()
def _coded(
    model: NeuralDictionary, fit: FitOptions, observed: Observed, steps: Sequence[int], prior: CodePrior | None
) -> Coded:
    # What is solved for is linear algebra, which half precision would spoil.
    full = torch.autocast(observed.truth.device.type, enabled=False)
    start = time.process_time()
    problem = dictionary_system(model, observed)
    images = observed.seen if observed.rays is None else None
    if fit.solver != "adam":
        with full:
            codes = solve(model, problem, fit, images=images, mask=observed.mask, prior=prior)[None]
        return Coded(codes, time.process_time() - start, 0.0)
    code, support = gate_start(model, fit, images, observed.mask)
    if code is None:
        code = problem.targets.new_zeros(len(problem.targets), model.config.code_dim)
    begun = time.process_time() - start
    with full:
        codes = refine_codes(problem, code.to(problem.targets), support, steps=max(steps), lr=fit.lr, keep=steps)
    return Coded(codes, begun, (time.process_time() - start - begun) / max(*steps, 1))


def _by_gate(model: NeuralDictionary, fit: FitOptions, observed: Observed, steps: Sequence[int]) -> Iterator[Step]:
    """The released fine-tuning of the whole gate, begun anew for every number of steps."""
    if observed.rays is not None:
        raise UserError("the solver gate looks at images, not at projections: choose another --fit.solver")
    coords = lattice(observed.spatial, device=observed.truth.device)
    for step in steps:
        start = time.process_time()
        code = finetune_gate(model, observed.seen, observed.mask, steps=step, lr=fit.lr)
        seconds = time.process_time() - start
        with torch.no_grad():
            preds = model.render(code, coords).view_as(observed.truth)
        yield step, seconds, preds


def dictionary_system(model: NeuralDictionary, observed: Observed) -> System:
    """What was observed, as a linear system in the codes."""
    if observed.rays is not None:
        return system(projection_design(model, observed.rays).to(observed.truth.dtype), observed.targets())
    coords = lattice(observed.spatial, device=observed.truth.device)
    flat = None if observed.mask is None else observed.mask.flatten(1)
    return system(model.design(coords).to(observed.truth.dtype), observed.targets(), flat)


def _by_linear(model: LinearDictionary, recipe: Recipe, observed: Observed) -> Iterator[Step]:
    if observed.rays is not None:
        raise UserError(f"{recipe.method} is fitted to samples, not to projections")
    start = time.process_time()
    flat = None if observed.mask is None else observed.mask.flatten(1)
    problem = model.system(observed.targets(), flat)
    if recipe.method == "ksvd" and recipe.linear.sparsity < int(problem.counts.min()):
        code, _ = omp(problem, recipe.linear.sparsity)
    else:
        code = ridge(problem, penalty=recipe.fit.penalty)
    seconds = time.process_time() - start
    yield 0, seconds, model.render(code, observed.truth.shape[-1]).view_as(observed.truth)


class Projected(nn.Module):
    """Networks seen through the tomograph: means along rays."""

    def __init__(self, networks: nn.Module) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, rays: Float[Tensor, "rays samples 2"]) -> Float[Tensor, "nets rays channels"]:
        """Mean over the samples of each ray."""
        return self.networks(rays.flatten(0, 1)).unflatten(1, rays.shape[:2]).mean(dim=2)


def shown_to(
    networks: nn.Module, observed: Observed
) -> tuple[nn.Module, Float[Tensor, "*places dims"], Float[Tensor, "batch points channels"]]:
    """What networks are fitted to: the networks as they are observed, where, and the samples there.

    The places are common to all signals, but for a mask: then each has its own [batch, points, dims].
    """
    targets = observed.targets()
    if observed.rays is not None:
        return Projected(networks), observed.rays, targets
    coords = lattice(observed.spatial, device=observed.truth.device)
    if observed.mask is None:
        return networks, coords, targets
    # every signal shows the same number of samples, at places of its own
    seen = observed.mask.flatten(1).nonzero()[:, 1].view(len(targets), -1)
    return networks, coords[seen], targets.gather(1, seen[..., None].expand(-1, -1, targets.shape[-1]))


def _by_networks(model: NetworkBatch, recipe: Recipe, observed: Observed, steps: Sequence[int]) -> Iterator[Step]:
    coords = lattice(observed.spatial, device=observed.truth.device)
    start = time.process_time()
    networks = model.repeated(len(observed.truth)) if recipe.method in {"maml", "reptile"} else model
    fitted, where, targets = shown_to(networks, observed)
    optimiser = recipe.meta.test_optimiser if recipe.method in {"maml", "reptile"} else "adam"
    away = 0.0
    for step in fit_networks(fitted, where, targets, lr=recipe.fit.lr, optimiser=optimiser):
        if step in steps:
            now = time.process_time()
            with torch.no_grad():
                preds = torch.cat([networks(part) for part in coords.split(RENDERED)], dim=1).view_as(observed.truth)
            yield step, now - start - away, preds
            away += time.process_time() - now
        if step >= max(steps):
            return


def _by_decoder(model: AutoDecoder, fit: FitOptions, observed: Observed, steps: Sequence[int]) -> Iterator[Step]:
    if observed.rays is not None:
        raise UserError("the auto-decoder is fitted to samples, not to projections")
    coords = lattice(observed.spatial, device=observed.truth.device)
    start, away = time.process_time(), 0.0
    where, targets = coords, observed.targets()
    weights = None if observed.mask is None else observed.mask.flatten(1).float()
    if len(coords) > RENDERED:  # too large to be computed where nothing is observed
        _, where, targets = shown_to(model, observed)
        weights = None
    fitting = fit_latents(model, where, targets, weights, lr=fit.lr)
    for step, latent in enumerate(itertools.islice(fitting, max(steps) + 1)):
        if step in steps:
            now = time.process_time()
            with torch.no_grad():
                parts = [model.decode(latent, part) for part in coords.split(RENDERED)]
                preds = torch.cat(parts, dim=1).view_as(observed.truth)
            yield step, now - start - away, preds
            away += time.process_time() - now


def _classical(recipe: Recipe, observed: Observed) -> Iterator[Step]:
    start = time.process_time()
    if recipe.method == "interpolation":
        if observed.mask is None or len(observed.spatial) != 2:
            raise UserError("interpolation fills hidden pixels of images: lower --data.fraction")
        preds = interpolate(observed.seen, observed.mask)
    else:
        if observed.rays is None or observed.angles is None:
            raise UserError(f"{recipe.method} reconstructs from projections: choose phantoms or ct as --data.name")
        size = (observed.spatial[0], observed.spatial[1])
        if recipe.method == "fbp":
            if size[0] != size[1]:
                raise UserError(f"filtered back-projection takes square slices, these are {size[0]}×{size[1]}")
            preds = fbp(observed.targets(), observed.angles, size[0])
        else:
            preds = tv(observed.targets(), observed.rays, size, weight=recipe.fit.penalty)
    yield 0, time.process_time() - start, preds


def code_prior(model: NeuralDictionary, signals: Signals) -> CodePrior:
    """Mean and covariance of the training signals' codes: the gate's where there is one, else the codebook's.

    The codes are solved for in closed form on all atoms where the gate is a codebook, since its rows may be dense.
    """
    train = signals.train[torch.linspace(0, len(signals.train) - 1, min(PRIOR_SIGNALS, len(signals.train))).long()]
    with torch.no_grad():
        if not isinstance(model.gate_generator, CodebookGate):
            return fit_prior(gate_code(model, train)[0])
        coords = lattice(train.shape[1:-1], device=train.device)
        return fit_prior(ridge(system(model.design(coords), train.flatten(1, -2)), penalty=1e-4))


# -- the verb -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class EvalConfig:
    """What to evaluate."""

    checkpoint: Path
    """A run's folder, a .safetensors file of ours, or a .ckpt file of the authors' layout."""
    data: OtherData = dataclasses.field(default_factory=OtherData)
    """The signals; default: those of the training's data set that are to be coded."""
    fit: OtherFit = dataclasses.field(default_factory=OtherFit)
    """How codes of new signals are found; default: as the recipe of the training has it."""
    lpips: bool = False
    """Also give LPIPS of images of 32 pixels or more, which needs AlexNet's weights."""


def evaluate(config: EvalConfig, options: RunOptions) -> None:
    """Print what a checkpoint is worth on new signals as one JSON line; the rate goes to standard error."""
    model, about = load_model(config.checkpoint)
    refuse_precision(options, f"evaluating {about['method']}", networks=about["method"] not in LINEAR)
    with Run.evaluation("nid", options) as run, refusals():
        data, fit = data_of(about, config.data), fit_of(about, config.fit)
        signals = load_signals(data).to(run.device)
        check_fit(model, signals, data.name)
        if about["method"] == "scratch":
            _check_same(model, about, signals, data.name)
        model = model.to(run.device)
        observed = observe(signals, data, options.seed)
        recipe = Recipe(
            method=about["method"],
            data=data,
            fit=fit,
            meta=Meta(test_optimiser=about.get("test_optimiser", Meta.test_optimiser)),
            linear=Linear(sparsity=about.get("sparsity", Linear.sparsity)),
        )
        prior = None
        if fit.solver == "map" and isinstance(model, NeuralDictionary):
            prior = code_prior(model, signals)
        warm_up()
        started = time.perf_counter()
        steps = (0,) if about["method"] == "scratch" else (0, fit.steps)
        # Weights change within, so that no cast of theirs is kept.
        half = torch.autocast(run.device.type, torch.bfloat16, enabled=options.precision == "bf16", cache_enabled=False)
        with half:
            points, preds = trajectory(model, recipe, observed, steps, prior=prior)
        seconds = time.perf_counter() - started
        report: dict[str, Any] = {"method": about["method"], "data": data.name}
        if isinstance(model, NeuralDictionary):
            report["solver"] = fit.solver
        report |= {"signals": len(observed.truth), "psnr": points[-1].psnr}
        if len(observed.spatial) == 2:
            report |= image_report(assembled(preds, observed), assembled(observed.truth, observed), config.lpips)
        if isinstance(model, NeuralDictionary):
            with contextlib.suppress(ValueError):  # signals the gate was not built for, coded without it
                report |= dictionary_report(model, observed)
        if run.is_main:
            print(json.dumps(report))
            print(f"{len(observed.truth) / seconds:.4g} signals per second", file=sys.stderr)


def image_report(preds: Tensor, truth: Tensor, perceptual: bool) -> dict[str, float]:
    """Similarity of images [images, channels, height, width], where these are large enough for it."""
    found = {}
    if min(truth.shape[2:]) >= 11:
        found["ssim"] = float(ssim(preds, truth).mean())
    if perceptual:
        found |= {"lpips": float(lpips(preds, truth).mean())}
        found |= {"lpips_released": float(lpips(preds, truth, released=True).mean())}
    return found


def _check_same(model: nn.Module, about: dict[str, Any], signals: Signals, name: str) -> None:
    """Networks of single signals can be looked at on these signals only."""
    assert isinstance(model, NetworkBatch)
    count = model.weights[0].shape[0]
    trained = about["data"]["name"]
    if trained != name or count != len(signals.test):
        raise UserError(
            f"the checkpoint holds a network for each of {count} signals of {trained}, not for the "
            f"{len(signals.test)} of {name} that were asked for: give the --data options it was trained with"
        )


def dictionary_report(model: NeuralDictionary, observed: Observed) -> dict[str, Any]:
    """What the gate alone gives, and how evenly the atoms are used; nothing for a codebook, which knows no new signal."""
    if isinstance(model.gate_generator, CodebookGate) or observed.rays is not None:
        return {}
    code, _ = gate_code(model, observed.seen, observed.mask)
    coords = lattice(observed.spatial, device=code.device)
    preds = model.render(code, coords).view_as(observed.truth).detach()
    coefficients = code[:, : model.config.num_experts]
    used, overlap = atom_usage(coefficients)
    return {
        "gate_psnr": float(quality(preds, observed).mean()),
        "atoms_used": int((used > 0).sum()),
        "atoms": model.config.num_experts,
        "load_cv": float(cv_squared((coefficients != 0).sum(dim=0))),
        "overlap": float(overlap),
    }


def check_fit(model: nn.Module, signals: Signals, name: str) -> None:
    """Refuse signals that the model does not represent.

    Raises:
        UserError: naming both.

    """
    if isinstance(model, CoordinateNetwork):
        raise UserError(
            "the checkpoint holds an authors' network of one signal, and not which: load it with load_official_checkpoint"
        )
    size, channels = tuple(signals.test.shape[1:-1]), signals.test.shape[-1]
    if isinstance(model, LinearDictionary):
        if model.mean.numel() != signals.test[0].numel():
            raise UserError(
                f"the dictionary has atoms of {model.mean.numel()} numbers, a signal of {name} has {signals.test[0].numel()}"
            )
        return
    assert isinstance(model, AutoDecoder | NetworkBatch | NeuralDictionary)
    config = model.config
    if config.in_dim != len(size) or config.out_dim != channels:
        raise UserError(
            f"the checkpoint represents {config.in_dim}-D signals of {config.out_dim} channels, {name} has {len(size)}-D "
            f"ones of {channels}: choose another --data.name or checkpoint"
        )
