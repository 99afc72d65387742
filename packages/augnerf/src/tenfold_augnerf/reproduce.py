"""The paper's claims: which arms are run, which numbers are compared, and the pictures its reader knows."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tenfold_augnerf.data import Data, DataConfig, load_data, load_to_choose
from tenfold_augnerf.evaluate import load_renderer, render_view, truth_of
from tenfold_augnerf.sharpness import curves
from tenfold_augnerf.train import Recipe, run_recipe
from tenfold_shared.claims import Arm, Claim, Measurement, Metric, Outcome
from tenfold_shared.cli import load_recipe
from tenfold_shared.report import COLOURS, ReportFigure, figure_style
from tenfold_shared.reproduction import Request, compare_points, grid_points, once, reproduce_claims
from tenfold_shared.run import Run, RunOptions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PROBED_RAYS = 512
QUICK = ("mini-saltpepper", "mini-saltpepper-depth")
"""The slice of the miniature that `reproduce` measures when it is told nothing; --seeds or names ask for the rest."""


def reproduce(*claims: str, request: Request, options: RunOptions) -> None:
    """Measure claims of the paper; without arguments a slice of the miniature on the exact blocks, and with --seeds 3 all
    of the miniature.

    Args:
        claims: their names, as ``tenfold-augnerf claims`` lists them.

    """
    if not claims and request.scale == "mini" and not request.seeds:
        claims = QUICK
        options = dataclasses.replace(options, name=options.name or "reproduce-mini")
    reproduce_claims("augnerf", claims, request, options, measure, figures)


VALUES = {
    "test PSNR": ("test", "psnr"),
    "test SSIM": ("test", "ssim"),
    "validation PSNR": ("validation", "psnr"),
    "depth error": ("test", "depth_mae"),
    "normal error": ("test", "normal_error"),
    "memorised noise": ("memorised",),
}
"""Name of a claim's metric -> where it is among a run's scores."""


def measure(
    claim: Claim,
    arm: Arm,
    seed: int,
    *,
    options: RunOptions,
    folder: Path,
    load: Callable[[DataConfig], Data] = load_data,
) -> Measurement:
    """What one arm gives with one seed; an arm that several claims share is run once."""
    name = f"{arm.name}-{arm.key}-seed{seed}"
    measured = once(name, folder, lambda: _run_arm(arm, name, options, folder, load))
    value: Any = measured.extras
    for key in VALUES[claim.metric.name]:
        value = value[key]
    return dataclasses.replace(measured, value=value)


def _run_arm(arm: Arm, name: str, options: RunOptions, folder: Path, load: Callable[[DataConfig], Data]) -> Measurement:
    recipe = load_recipe("tenfold_augnerf", str(arm.recipe), Recipe, **arm.options)
    data = load(recipe.data)
    with Run("augnerf", recipe, dataclasses.replace(options, name=name), parent=folder / "runs") as run:
        renderer, result = run_recipe(run, recipe, data)
        usage = run.usage()
        scores = dataclasses.asdict(result)
        scores["memorised"] = result.train_psnr - result.train_clean_psnr
        scores["sharpness"] = curves(renderer, data.test.to(run.device), rays=PROBED_RAYS)
    return Measurement(result.test["psnr"], extras={**scores, "run": name, "method": recipe.method}, **usage)


# -- choosing values ------------------------------------------------------------------------------------------------------


def sweep(recipe: Recipe, options: RunOptions, grid: dict[str, list[Any]], seeds: int = 1, jobs: int = 0) -> None:
    """Run a recipe at every point of a grid of its values, judged on the validation views; the test views never count:
    of LLFF captures, whose validation views they are, every 8th training view is held out instead.

    The result, best point first, is printed and written to ``sweep.json`` in the run's folder.

    Args:
        grid: the values of every option that varies, as '{"lr": [0.1, 0.01]}'.
        seeds: how many, from 0 on, the same at every point.
        jobs: runs at the same time; 0: one a core on the CPU, one on a GPU.

    """
    metric, request = Metric("validation PSNR", "dB"), Request(seeds=seeds, jobs=jobs)
    judged = functools.partial(measure, load=load_to_choose)
    compare_points("augnerf", "sweep", recipe, grid_points(grid), metric, request, options, judged, _collapses)


def _collapses(found: Sequence[Measurement]) -> dict[str, int]:
    return {"collapsed": sum(bool(measured.extras.get("collapsed")) for measured in found)}


# -- figures --------------------------------------------------------------------------------------------------------------


def figures(claims: Sequence[Claim], outcomes: Sequence[Outcome], folder: Path) -> list[ReportFigure]:
    """Renderings and depth of every arm beside the truth, test PSNR by arm and seed, and sharpness by level."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 - slow to import, needed once the runs are done

    widest = max(outcomes, key=lambda outcome: (len(_arms(outcome)), outcome.claim))
    claim = next(claim for claim in claims if claim.id == widest.claim)
    drawn = []
    with figure_style():
        pictures = _pictures(claim, widest, folder)
        if pictures is not None:
            drawn.append(pictures)
        figure, axes = plt.subplots(figsize=(6.4, 0.5 + 0.42 * max(3, len(_arms(widest)))), layout="constrained")
        _points(axes, widest, claim)
        collapsed = sum(bool(extras.get("collapsed")) for arm in widest.arms.values() for extras in arm.extras)
        drawn.append(
            ReportFigure(
                figure,
                title=f"{claim.metric.name} by arm",
                caption=f"{widest.claim}: dots are seeds, upright lines their mean; crosses are collapsed runs ({collapsed}).",
                alt=f"{claim.metric.name} of every arm and seed",
            )
        )
        drawn += _histories(widest)
        levels = _sharpness(widest)
        if levels:
            figure, panels = plt.subplots(1, len(levels), figsize=(3.6 * len(levels), 3.2), layout="constrained")
            for panel, (level, arms) in zip(np.atleast_1d(panels), levels.items(), strict=True):
                _sharpness_curves(panel, level, arms)
            drawn.append(
                ReportFigure(
                    figure,
                    title="Sharpness",
                    caption="Rise of the test error under a one-step worst-case perturbation, mean over the seeds.",
                    alt="Rise of the squared error against the radius, by level and arm",
                )
            )
    return drawn


def _arms(outcome: Outcome) -> dict[str, list[tuple[float, Mapping[str, Any]]]]:
    """(value, extras) of the seeds of each arm that gave a value."""
    found = {}
    for name, arm in outcome.arms.items():
        pairs = [(v, e) for v, e in zip(arm.values, arm.extras, strict=True) if v is not None]
        if pairs:
            found[name] = pairs
    return found


def _colours(arms: Iterable[str]) -> dict[str, str]:
    return dict(zip(arms, itertools.cycle(COLOURS)))


def _pictures(claim: Claim, outcome: Outcome, folder: Path) -> ReportFigure | None:
    """Rows are arms; columns the truth, the rendering, its error and its depth, at the first test view, first seed."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 - slow to import, needed once the runs are done

    rows = {}
    for name, pairs in _arms(outcome).items():
        run = folder / "runs" / str(pairs[0][1].get("run"))
        if (run / "checkpoints" / "last.safetensors").is_file():
            rows[name] = run
    if not rows:
        return None
    figure, panels = plt.subplots(len(rows), 4, figsize=(7.2, 1.8 * len(rows)), layout="constrained", squeeze=False)
    for place, (name, run) in enumerate(rows.items()):
        line = panels[place]
        recipe = load_recipe("tenfold_augnerf", str(claim.arms[name].recipe), Recipe, **claim.arms[name].options)
        data = load_data(recipe.data)
        renderer, _ = load_renderer(run, data)
        found, truth = render_view(renderer.eval(), data.test, 0), truth_of(data.test, 0)
        depth = (found.depth / found.acc.clamp(min=1e-3)).masked_fill(found.acc < 1e-3, data.test.far)
        line[0].imshow(truth.numpy())
        line[1].imshow(found.rgb.clamp(0, 1).numpy())
        line[2].imshow((found.rgb - truth).abs().mean(-1).numpy(), vmin=0, vmax=0.5, cmap="magma")
        line[3].imshow(depth.numpy(), vmin=data.test.near, vmax=data.test.far, cmap="viridis")
        line[0].set_ylabel(name)
        for axes, title in zip(line, ("truth", "rendering", "error", "depth"), strict=True):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(False)
            if place == 0:
                axes.set_title(title)
    corruption = f"{recipe.data.corruption} {recipe.data.amount:g}" if recipe.data.corruption != "none" else "clean"
    return ReportFigure(
        figure,
        title="A test view, by arm",
        caption=f"{outcome.claim} ({corruption} training views): first test view, first seed.",
        alt="Truth, rendering, error and depth of every arm",
    )


def _points(axes: "Axes", outcome: Outcome, claim: Claim) -> None:
    arms = _arms(outcome)
    colours = _colours(arms)
    for place, (name, pairs) in enumerate(arms.items()):
        values = [value for value, _ in pairs]
        axes.plot(float(np.mean(values)), place, "|", markersize=22, markeredgewidth=3, color=colours[name])
        for value, extras in pairs:
            axes.plot(value, place, "x" if extras.get("collapsed") else "o", color=colours[name])
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.4, -0.6)  # the first on top
    axes.set_xlabel(f"{claim.metric.name}, {claim.metric.unit}")


def _histories(outcome: Outcome) -> list[ReportFigure]:
    """PSNR of the validation views while training, where the recipes looked at them."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 - slow to import, needed once the runs are done

    seen = {name: [e["history"] for _, e in pairs if e.get("history")] for name, pairs in _arms(outcome).items()}
    colours = _colours(seen)
    lines = {name: np.mean(seeds, axis=0) for name, seeds in seen.items() if seeds}
    if not lines:
        return []
    figure, axes = plt.subplots(layout="constrained")
    for name, line in lines.items():
        axes.plot(np.linspace(0, 1, len(line) + 1)[1:], line, "o-", markersize=3, color=colours[name], label=name)
    axes.set(xlabel="share of the training", ylabel="validation PSNR, dB")
    axes.legend(fontsize=7)
    caption = f"{outcome.claim}: PSNR of clean validation views, mean over the seeds. A fall is over-fitting."
    return [ReportFigure(figure, "Validation views while training", caption, "Validation PSNR by arm while training")]


def _sharpness(outcome: Outcome) -> dict[str, dict[str, list[list[dict[str, float]]]]]:
    """Level -> arm -> one list of points a seed, with the rise over the clean error."""
    levels: dict[str, dict[str, list[list[dict[str, float]]]]] = {}
    for name, pairs in _arms(outcome).items():
        for _, extras in pairs:
            probe = extras.get("sharpness") or {"levels": {}}
            for level, points in probe["levels"].items():
                rises = [{"eps": p["eps"], "rise": p["worst"] - probe["clean"]} for p in points]
                levels.setdefault(level, {}).setdefault(name, []).append(rises)
    return levels


def _sharpness_curves(axes: "Axes", level: str, arms: Mapping[str, list[list[dict[str, float]]]]) -> None:
    colours = _colours(arms)
    for name, seeds in arms.items():
        eps = [point["eps"] for point in seeds[0]]
        rise = np.mean([[point["rise"] for point in points] for points in seeds], axis=0)
        axes.plot(eps, rise, "o-", color=colours[name], label=name)
    axes.set_title(level)
    axes.set_xlabel("radius")
    axes.set_ylabel("rise of the squared error")
    axes.legend(fontsize=7)
