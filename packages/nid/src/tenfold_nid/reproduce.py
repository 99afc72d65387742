"""The paper's claims: which arms are run and which numbers are compared."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor, nn

from tenfold_shared.batches import generator
from tenfold_shared.claims import Arm, Claim, Measurement
from tenfold_shared.cli import config_digest, load_recipe
from tenfold_shared.errors import UserError
from tenfold_shared.reproduction import Request, once, reproduce_claims
from tenfold_shared.run import Run, RunOptions, seed_everything

from .baselines.classical import median_background, rpca
from .checkpoints import load_model
from .dictionary import NeuralDictionary
from .embedded import moving_discs
from .evaluate import Point, assembled, code_prior, image_report, observe, trajectory
from .figures import figures
from .metrics import lpips, surface_distance
from .networks import CoordinateNetwork
from .recipe import UNTRAINED, Recipe
from .shapes import FINE, SURFACE_SAMPLES, Mesh, marching_cubes, sample_surface
from .signals import EMBEDDED, DataConfig, Signals, load_signals
from .solvers import FitOptions, residual_outliers
from .train import network_config, run_recipe
from .video import background_dictionary, mask_scores, separate

STEPS = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 60, 80, 100, 150, 200, 300, 500, 1000, 2000, 5000)
"""Optimiser steps on a new signal at which it is looked at."""
GENERATED = ("phantoms", "primitives")
"""Data drawn at will, so that signals to choose values on are further ones."""
VALIDATION_SEED = 100
"""Videos from this seed on are for choosing values."""
TARGET = 30.0
"""dB whose time is compared."""
SPEED_UP = "speed to 30 dB relative to a SIREN"
"""The metric that sets the times of two arms in relation: that of the arm siren over each arm's own."""


def reproduce(*claims: str, request: Request, options: RunOptions) -> None:
    """Measure claims of the paper; without arguments the miniature.

    Args:
        claims: their names, as ``tenfold-nid claims`` lists them.

    """
    reproduce_claims("nid", claims, request, options, measure, figures)


def measure(claim: Claim, arm: Arm, seed: int, *, options: RunOptions, folder: Path) -> Measurement:
    """What one arm gives with one seed; an arm that several claims share is run once."""

    def of(some: Arm) -> Measurement:
        return once(f"{some.name}-{some.key}-seed{seed}", folder, lambda: _run_arm(some, seed, options, folder))

    measured = of(arm)
    try:
        if claim.metric.name == SPEED_UP:
            value = time_to_target(of(claim.arms["siren"]).extras) / time_to_target(measured.extras)
        else:
            value = VALUES[claim.metric.name](measured.extras)
        return dataclasses.replace(measured, value=value)
    except KeyError:
        return dataclasses.replace(measured, error=f"{arm.name} gives no {claim.metric.name}")


def _run_arm(arm: Arm, seed: int, options: RunOptions, folder: Path) -> Measurement:
    recipe = load_recipe("tenfold_nid", str(arm.recipe), Recipe, **arm.options)
    extras = coded(recipe, seed, options, folder)
    return Measurement(None, seconds=extras["seconds"], extras=extras)


def at_step(step: int) -> Callable[[Mapping[str, Any]], float]:
    """PSNR after a number of steps; what takes none has it from the start."""

    def value(extras: Mapping[str, Any]) -> float:
        return max((p for p in map(Point._make, extras["points"]) if p.step <= step), key=lambda p: p.step).psnr

    return value


def time_to_target(extras: Mapping[str, Any]) -> float:
    """Processor milliseconds until the target is reached. KeyError when it is not."""
    for point in map(Point._make, extras["points"]):
        if point.psnr >= TARGET:
            return 1000 * point.seconds
    raise KeyError(TARGET)


VALUES: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "PSNR at step 0": at_step(0),
    "PSNR at step 1": at_step(1),
    "PSNR at step 3": at_step(3),
    "PSNR": lambda extras: extras["points"][-1][2],
    "processor time to 30 dB": time_to_target,
    "Chamfer distance": lambda extras: extras["chamfer"],
    "normal consistency": lambda extras: extras["normal_consistency"],
    "SSIM": lambda extras: extras["ssim"],
    "LPIPS": lambda extras: extras["lpips"],
    "parameters": lambda extras: extras["parameters"],
    "throughput": lambda extras: extras["signals"] / extras["seconds"],
    "F1 of the foreground": lambda extras: extras["f1"],
}
"""Name of a claim's metric -> what of a measurement it is."""


def coded(recipe: Recipe, seed: int, options: RunOptions, folder: Path) -> dict[str, Any]:
    """Learn what the recipe learns, or take it from the arm that has, then code the new signals."""
    if recipe.data.name in {"discs", "video"}:
        return separated(recipe, seed)
    model, signals, name = learned(recipe, seed, options, folder)
    if recipe.data.name not in EMBEDDED:  # these are small, and processor time is what some are measured by
        with Run.evaluation("nid", options) as run:
            signals = signals.to(run.device)
            model = None if model is None else model.to(run.device)
    observed = observe(signals, recipe.data, seed)
    seed_everything(seed, "coding")
    prior = None
    if recipe.fit.solver == "map" and isinstance(model, NeuralDictionary):
        prior = code_prior(model, signals)
    steps = [step for step in STEPS if step <= recipe.fit.steps]
    points, last = trajectory(model, recipe, observed, steps, prior=prior)
    extras: dict[str, Any] = {"points": points, "seconds": points[-1].seconds, "run": name}
    preds, truth = assembled(last, observed), assembled(observed.truth, observed)
    extras |= {"signals": len(truth), "parameters": parameters(model, recipe, signals)}
    if len(observed.spatial) == 2:
        extras |= image_report(preds, truth, perceptual=False)
    if recipe.data.name == "celeba":  # whose table has it
        with contextlib.suppress(ValueError):  # too small, or without AlexNet's weights: it is missing then
            extras["lpips"] = float(lpips(preds, truth, released=True).mean())
    if len(observed.spatial) == 3:
        extras |= shape_scores(last, observed.truth, recipe.data)
    return extras


def learned(
    recipe: Recipe, seed: int, options: RunOptions, folder: Path
) -> tuple[nn.Module | None, Signals, str | None]:
    """The trained model of a recipe, trained by whoever comes first; the signals; the name of its run."""
    signals = load_signals(recipe.data)
    if recipe.method == "scratch" or recipe.method in UNTRAINED:
        return None, signals, None
    data = dataclasses.replace(recipe.data, fraction=1.0, test_views=0, test_subset=DataConfig.test_subset)
    if recipe.data.name in GENERATED:  # what is held out of these was never among what is learned from
        data = dataclasses.replace(data, validation=False)
    training = dataclasses.replace(
        recipe, data=data, fit=FitOptions(), meta=dataclasses.replace(recipe.meta, test_optimiser="sgd")
    )
    name = f"{recipe.method}-{config_digest(training)}-seed{seed}"
    directory = folder / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / f".{name}.lock"):
        if not (directory / "checkpoints" / "last.safetensors").exists():
            with Run("nid", training, dataclasses.replace(options, name=name), parent=folder / "runs") as run:
                run_recipe(run, training)
    model, _ = load_model(directory)
    return model, signals, name


def parameters(model: nn.Module | None, recipe: Recipe, signals: Signals) -> int:
    """Parameters of a dictionary or a start; of one network where each signal has its own; 0 for what has none."""
    if model is None and recipe.method == "scratch":
        with torch.device("meta"):
            model = CoordinateNetwork(network_config(recipe, signals.test))
    return 0 if model is None else sum(p.numel() for p in model.parameters())


def shape_scores(preds: Tensor, truth: Tensor, data: DataConfig) -> dict[str, float]:
    """Mean Chamfer distance and normal consistency of the surfaces found to samples of the true ones (section 9).

    The true surface of a primitive is that of its closed form on a finer lattice. A field without a surface counts as
    if that were the centre, without a normal.
    """
    if data.name == "primitives":
        truth = load_signals(dataclasses.replace(data, size=FINE, train_subset=1)).test
    distances = []
    for found, field in zip(preds[..., 0], truth[..., 0], strict=True):
        points, normals = sample_surface(marching_cubes(field), SURFACE_SAMPLES, generator(0))
        try:
            mesh = marching_cubes(found)
        except ValueError:
            mesh = Mesh(points.new_zeros(1, 3), torch.zeros(0, 3, dtype=torch.long), points.new_zeros(1, 3))
        distances.append(surface_distance(mesh.vertices, points, mesh.normals, normals))
    consistencies = [d.normal_consistency for d in distances if d.normal_consistency is not None]  # all have normals
    return {
        "chamfer": float(torch.stack([d.chamfer for d in distances]).mean()),
        "normal_consistency": float(torch.stack(consistencies).mean()),
    }


def separated(recipe: Recipe, seed: int) -> dict[str, Any]:
    """A video with moving discs, of which the truth is known, taken apart; every seed has a video of its own."""
    if recipe.data.name != "discs":
        raise UserError("only the video of discs has a known foreground: the verb separate takes any other")
    video = moving_discs(side=recipe.data.size or 64, seed=seed + VALIDATION_SEED * recipe.data.validation)
    frames, start = video.frames, time.process_time()
    if recipe.method == "nid":
        schedule = recipe.schedule
        model = background_dictionary(
            frames,
            recipe.model,
            settings=recipe.objective,
            steps=schedule.epochs * -(-len(frames) // schedule.batch_size),
            lr=schedule.lr,
            chunk_size=schedule.chunk_size,
            batch=schedule.batch_size,
            seed=seed,
        )
        found = separate(model, frames, background_atoms=recipe.fit.atoms, penalty=recipe.fit.penalty).mask
    elif recipe.method == "rpca":
        low = rpca(frames.flatten(1)).low_rank.view_as(frames)
        found = residual_outliers(frames, low)
    elif recipe.method == "median":
        found = residual_outliers(frames, median_background(frames).expand_as(frames))
    else:
        raise UserError(f"a video is taken apart by nid, rpca or median, not by {recipe.method}")
    precision, recall, f1 = mask_scores(found, video.mask)
    return {"precision": precision, "recall": recall, "f1": f1, "seconds": time.process_time() - start}
