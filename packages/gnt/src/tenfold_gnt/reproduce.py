"""The paper's claims: which arms are run, which numbers are compared, and the figures its reader knows."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tenfold_gnt.baselines import nearest_view
from tenfold_gnt.evaluate import load_model, render_target
from tenfold_gnt.experiments import judged_targets
from tenfold_gnt.train import Recipe, judge, run_recipe
from tenfold_shared.claims import Arm, Claim, Measurement, Metric, Outcome
from tenfold_shared.cli import load_recipe
from tenfold_shared.errors import UserError
from tenfold_shared.report import COLOURS, ReportFigure, figure_style
from tenfold_shared.reproduction import Request, compare_points, once, reproduce_claims
from tenfold_shared.run import Run, RunOptions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VALUES = {
    "PSNR": "psnr",
    "SSIM": "ssim",
    "LPIPS": "lpips_01",
    "depth correlation": "depth_correlation",
}
"""Name of a claim's metric -> the score it is."""
FLOORS = {"nearest": "nearest_psnr", "mean": "mean_psnr"}
"""Name of an arm that learns nothing -> the score it is, in what another arm's run measured."""
PICTURES = 3  # rows of the figure
QUICK = ("mini-unseen", "mini-depth", "mini-one-table")
"""The claims that `reproduce` measures when it is told nothing, in three minutes; --seeds or names ask for longer ones."""


def reproduce(*claims: str, request: Request, options: RunOptions) -> None:
    """Measure claims of the paper; without arguments the miniature on tables never seen, and with --seeds 3 also the one
    of 1200 steps.

    Args:
        claims: their names, as ``tenfold-gnt claims`` lists them.

    """
    if not claims and request.scale == "mini" and not request.seeds:
        claims = QUICK
        options = dataclasses.replace(options, name=options.name or "reproduce-mini")
    reproduce_claims("gnt", claims, request, options, measure, functools.partial(figures, options=options))


def measure(claim: Claim, arm: Arm, seed: int, *, options: RunOptions, folder: Path) -> Measurement:
    """What one arm gives with one seed; an arm that several claims share is run once."""
    name = f"{arm.key}-seed{seed}"
    measured = once(name, folder, lambda: _run_arm(arm, name, options, folder))
    score = FLOORS.get(arm.name, VALUES[claim.metric.name])
    if score == "lpips_01":  # not part of training, which shall not need its weights
        measured = once(f"{name}-lpips", folder, lambda: _with_lpips(arm, name, measured, options, folder))
    return dataclasses.replace(measured, value=measured.extras["scores"][score])


def _run_arm(arm: Arm, name: str, options: RunOptions, folder: Path) -> Measurement:
    recipe = load_recipe("tenfold_gnt", str(arm.recipe), Recipe, **arm.options)
    with Run("gnt", recipe, dataclasses.replace(options, name=name), parent=folder / "runs") as run:
        model, result = run_recipe(run, recipe)
        scores = {key: value for key, value in dataclasses.asdict(result.scores).items() if not math.isnan(value)}
        about = {
            "scores": scores,
            "history": result.history,
            "parameters": sum(p.numel() for p in model.coarse.parameters()),
            "run": name,
        }
        return Measurement(result.scores.psnr, extras=about, **run.usage())


def _with_lpips(arm: Arm, name: str, measured: Measurement, options: RunOptions, folder: Path) -> Measurement:
    """The measurement with the scores of the run's network again, LPIPS among them."""
    recipe = load_recipe("tenfold_gnt", str(arm.recipe), Recipe, **arm.options)
    model, _ = load_model(folder / "runs" / name)
    with Run.evaluation("gnt", options) as run:
        scores = judge(run, model.to(run.device), recipe, judged_targets(recipe.data), stride=1, with_lpips=True)
    known = {key: value for key, value in dataclasses.asdict(scores).items() if not math.isnan(value)}
    return dataclasses.replace(measured, extras={**measured.extras, "scores": {**measured.extras["scores"], **known}})


def sweep(recipe: Recipe, options: RunOptions, points: list[dict[str, Any]], seeds: int = 1, jobs: int = 0) -> None:
    """Run a recipe at the points listed ('[{key: value}, ...]'), judged on tables or views held out for it.

    The points, best first, with their paired difference to the first, are printed and written to ``sweep.json`` in the
    run's folder. What the claims are judged on is never looked at.

    Args:
        points: the values of the options at every point.
        seeds: how many, from 0 on, the same at every point.
        jobs: runs at the same time; 0: one a core on the CPU, one on a GPU.

    """
    if recipe.data.name != "tabletop":
        raise UserError(
            f"sweep chooses values on views kept for that, which {recipe.data.name} does not have: --data.name tabletop"
        )
    if recipe.data.judge != "validation":
        raise UserError("sweep chooses values, which the judged views must not do: add --data.judge validation")
    request = Request(seeds=seeds, jobs=jobs)
    compare_points("gnt", "sweep", recipe, points, Metric("PSNR", "dB"), request, options, measure)


# -- figures --------------------------------------------------------------------------------------------------------------


def figures(
    claims: Sequence[Claim], outcomes: Sequence[Outcome], folder: Path, *, options: RunOptions
) -> list[ReportFigure]:
    """Held-out views beside the truth, with depth; and the course of training. Of the claim with most arms."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 - slow to import, needed once the runs are done

    chosen = max(outcomes, key=lambda outcome: len(outcome.arms))
    claim = next(claim for claim in claims if claim.id == chosen.claim)
    runs = {arm: found[0]["run"] for arm in chosen.arms if (found := _extras(chosen, arm)) and arm not in FLOORS}
    if not runs:
        return []
    drawn = []
    with figure_style():
        with Run.evaluation("gnt", options) as run:
            figure = _pictures(claim, runs, folder, run.device)
        drawn.append(
            ReportFigure(
                figure,
                title="Held-out views",
                caption=f"{claim.model} on {claim.data}, first seed: the true view, the nearest source view, each arm's "
                "rendering, the true depth, each arm's expected depth (near is bright).",
                alt="Renderings and depth maps of held-out views, one row a view",
            )
        )
        figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
        _courses(axes, chosen)
        drawn.append(
            ReportFigure(
                figure,
                title="PSNR over training",
                caption=f"{chosen.claim}, every seed, on every second pixel; dotted, a copy of the nearest view.",
                alt="PSNR against training steps for every arm",
            )
        )
    return drawn


def _extras(outcome: Outcome, arm: str) -> list[Mapping[str, Any]]:
    result = outcome.arms[arm]
    return [extras for value, extras in zip(result.values, result.extras, strict=True) if value is not None]


def _pictures(claim: Claim, runs: Mapping[str, str], folder: Path, device: torch.device) -> Any:
    """One row a judged view: truth, nearest, arms, true depth, depths of the arms."""
    import matplotlib.pyplot as plt  # noqa: PLC0415

    arm = claim.arms[claim.method]
    recipe = load_recipe("tenfold_gnt", str(arm.recipe), Recipe, **arm.options)
    targets = judged_targets(recipe.data)
    targets = targets[:: max(1, len(targets) // PICTURES)][:PICTURES]
    models = {name: load_model(folder / "runs" / run)[0].to(device) for name, run in runs.items()}
    columns = ["truth", "nearest", *models, "true depth", *(f"{name} depth" for name in models)]
    figure, axes = plt.subplots(
        len(targets), len(columns), figsize=(1.35 * len(columns), 1.45 * len(targets)), layout="constrained"
    )
    axes = np.atleast_2d(axes)
    for row, target in zip(axes, targets, strict=True):
        views = target.views(recipe.data.sources).to(device)
        rays = recipe.rays
        found = {
            name: render_target(model, views, rays.judged_samples, rays.importance, inverse=rays.inverse)
            for name, model in models.items()
        }
        shown = [views.rgb, nearest_view(views.camera, views.images, views.cameras), *(p.rgb for p in found.values())]
        for cell, picture in zip(row, shown, strict=False):
            cell.imshow(np.clip(picture.numpy(force=True), 0, 1))
        depths = [p.depth.numpy(force=True) for p in found.values()]
        truth = None if target.scene.depth is None else target.scene.depth[target.view]
        for cell, depth in zip(row[len(shown) :], [truth, *depths], strict=True):
            if depth is not None:
                cell.imshow(
                    np.where(np.isfinite(depth), depth, np.nan), cmap="viridis_r", vmin=views.near, vmax=views.far
                )
        for cell in row:
            cell.axis("off")
    for cell, title in zip(axes[0], columns, strict=True):
        cell.set_title(title, fontsize="small")
    return figure


def _courses(axes: "Axes", outcome: Outcome) -> None:
    for arm, colour in zip((a for a in outcome.arms if a not in FLOORS), COLOURS, strict=False):
        for number, extras in enumerate(_extras(outcome, arm)):
            steps, values = zip(*extras["history"], strict=True)
            axes.plot(steps, values, "o-", color=colour, alpha=0.8, label=None if number else arm)
    floors = [extras["scores"]["nearest_psnr"] for arm in outcome.arms for extras in _extras(outcome, arm)]
    axes.axhline(sum(floors) / len(floors), linestyle=":", color="0.4", label="nearest view")
    axes.set_xlabel("training steps")
    axes.set_ylabel("PSNR, dB")
    axes.legend()
