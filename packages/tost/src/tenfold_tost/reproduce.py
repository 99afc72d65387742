"""The paper's claims: which arms are run, which numbers are compared, and the figures its reader knows."""

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold_shared.claims import Arm, ArmResult, Claim, Measurement, Metric, Outcome
from tenfold_shared.cli import load_recipe
from tenfold_shared.errors import UserError
from tenfold_shared.report import COLOURS, ReportFigure, figure_style
from tenfold_shared.reproduction import Request, compare_points, grid_points, once, reproduce_claims
from tenfold_shared.run import Run, RunOptions
from tenfold_tost.recipe import Recipe
from tenfold_tost.train import run_recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUICK = tuple(f"mini-{mask}-95-{name}" for mask in ("erk", "snip") for name in ("tost", "soft", "skip", "ls", "lrsi"))
"""The claims that `reproduce` measures when it is told nothing, in two minutes; --seeds or names ask for others."""
VANILLA = "vanilla"


def reproduce(*claims: str, request: Request, options: RunOptions) -> None:
    """Measure claims of the paper; without arguments those of the miniature on digits at 95 % sparsity, with two seeds,
    and with --seeds 5 the whole miniature.

    Args:
        claims: their names, as ``tenfold-tost claims`` lists them.

    """
    if not claims and request.scale == "mini" and not request.seeds:
        claims = QUICK
        options = dataclasses.replace(options, name=options.name or "reproduce-mini")
    reproduce_claims("tost", claims, request, options, measure, figures)


def measure(claim: Claim, arm: Arm, seed: int, *, options: RunOptions, folder: Path) -> Measurement:
    """What one arm gives with one seed: an accuracy, its gain over vanilla training of the same seed under the same mask,
    or the mean over the activations of the zeros that each puts out.
    """
    measured = _measured(arm, seed, options, folder)
    value = measured.extras["accuracy"]
    if claim.metric.name == "gain over vanilla":
        vanilla = dataclasses.replace(arm, name=VANILLA, options={**arm.options, "techniques": VANILLA})
        value -= _measured(vanilla, seed, options, folder).extras["accuracy"]
    elif claim.metric.name == "zero activations":
        value = 100.0 * statistics.fmean(measured.extras["zero_rates"].values())
    return dataclasses.replace(measured, value=value)


def _measured(arm: Arm, seed: int, options: RunOptions, folder: Path) -> Measurement:
    """The arm's run; one that several claims share is made once."""
    name = f"{arm.name}-{arm.key}-seed{seed}"
    return once(name, folder, lambda: _run_arm(arm, name, seed, options, folder))


def _run_arm(arm: Arm, name: str, seed: int, options: RunOptions, folder: Path) -> Measurement:
    recipe = load_recipe("tenfold_tost", str(arm.recipe), Recipe, **arm.options)
    options = dataclasses.replace(options, name=name, seed=seed)
    with Run("tost", recipe, options, parent=folder / "runs") as run:
        _, result = run_recipe(run, recipe)
        fades = recipe.ghost_fraction if recipe.plan().fades else 0.0
        extras = {**dataclasses.asdict(result), "ghost_fraction": fades, "wanted_density": recipe.mask.density}
        return Measurement(result.accuracy, extras=extras, **run.usage())


# -- choosing values, and ablations -----------------------------------------------------------------------------------------


def sweep(
    recipe: Recipe,
    options: RunOptions,
    grid: dict[str, list[Any]] | None = None,
    points: list[dict[str, Any]] | None = None,
    seeds: int = 3,
    jobs: int = 0,
) -> None:
    """Run a recipe at every point of a grid of its values, or at the points listed, judged on held-out training images.

    The points, best first, with their paired difference to the first point of the grid, are printed and written to
    ``sweep.json`` in the run's folder. The test images are never looked at.

    Args:
        grid: the values of every option that varies, as '{"lr": [0.1, 0.01]}'.
        points: the points themselves, as '[{"lr": 0.1, "epochs": 20}, ...]', in place of a grid.
        seeds: how many, from 0 on, the same at every point.
        jobs: runs at the same time; 0: one a core on the CPU, one on a GPU.

    """
    if recipe.data.judge != "dev":
        raise UserError("sweep chooses values, which the test images must not do: add --data.judge dev --data.dev 200")
    if (grid is None) == (points is None):
        raise UserError("sweep takes either --grid '{key: [values]}' or --points '[{key: value}, ...]'")
    if grid is not None:
        points = grid_points(grid)
    assert points is not None
    request = Request(seeds=seeds, jobs=jobs)
    compare_points("tost", "sweep", recipe, points, Metric("dev accuracy", "%"), request, options, measure)


def ablate(recipe: Recipe, options: RunOptions, seeds: int = 3, jobs: int = 0) -> None:
    """Run a recipe as vanilla, with each technique alone, with all but one, and with all; differences to vanilla.

    Args:
        seeds: how many, from 0 on, the same for every arm.
        jobs: runs at the same time; 0: one a core on the CPU, one on a GPU.

    """
    names = ("soft", "skip", "ls", "lrsi")
    without = ["+".join(name for name in names if name != left) for left in names]
    points = [{"techniques": name} for name in (VANILLA, *names, *without, "tost")]
    metric, request = Metric(f"{recipe.data.judge} accuracy", "%"), Request(seeds=seeds, jobs=jobs)
    compare_points("tost", "ablate", recipe, points, metric, request, options, measure)


# -- figures ----------------------------------------------------------------------------------------------------------------

Arms = dict[str, ArmResult]


def figures(claims: Sequence[Claim], outcomes: Sequence[Outcome], folder: Path) -> list[ReportFigure]:
    """Accuracy of every arm under every mask; the training loss with the ghosts' window; zeros by layer."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 - slow to import, needed once the runs are done

    where, groups = f"{claims[0].model} on {claims[0].data}", by_mask(outcomes)
    shown, arms = next(iter(groups.items()))
    pages = (
        (
            partial(_points, groups=groups),
            "What each technique brings under each mask",
            f"{where}: lines are means over the seeds, dots the seeds. All arms of a seed share mask, start and batches.",
            "Mean test accuracy by mask and technique with a dot for every seed",
        ),
        (
            partial(_losses, arms=arms),
            "Training loss while the ghosts fade",
            f"{shown}: mean over the seeds; grey, the window in which soft neurons and skips fade. Smoothed labels put a "
            "floor above zero under the loss.",
            "Training loss by epoch for every arm",
        ),
        (
            partial(_zeros, arms=arms),
            "Zero activations in the deployed network",
            f"{shown}: fraction of zeros behind each ReLU on the test images, mean over the seeds.",
            "Fraction of zero activations by layer for every arm",
        ),
    )
    drawn = []
    with figure_style():
        for number, (draw, title, caption, alt) in enumerate(pages):
            width = max(6.4, 2.6 * len(groups)) if number == 0 else 6.4
            figure, axes = plt.subplots(figsize=(width, 3.9), layout="constrained")
            draw(axes)
            drawn.append(ReportFigure(figure, title=title, caption=caption, alt=alt))
    return drawn


def by_mask(outcomes: Sequence[Outcome]) -> dict[str, Arms]:
    """The arms of all claims that differ in their method alone, vanilla first: "mini-erk-95-soft" is of "mini-erk-95"."""
    groups: dict[str, Arms] = {}
    for outcome in outcomes:
        group = groups.setdefault(outcome.claim.removesuffix(f"-{outcome.method}"), {})
        for name, arm in outcome.arms.items():
            group.setdefault(name, arm)
    return {key: dict(sorted(arms.items(), key=lambda item: item[0] != VANILLA)) for key, arms in groups.items()}


def _extras(arm: ArmResult) -> list[Mapping[str, Any]]:
    """Extras of the seeds that gave a value."""
    return [extras for value, extras in zip(arm.values, arm.extras, strict=True) if value is not None]


def _colours(names: Iterable[str]) -> dict[str, str]:
    return dict(zip(dict.fromkeys(names), itertools.cycle(COLOURS)))


def _points(axes: "Axes", groups: Mapping[str, Arms]) -> None:
    colours = _colours(name for arms in groups.values() for name in arms)
    width = 0.8 / len(colours)
    for j, (name, colour) in enumerate(colours.items()):
        seeds = [
            [extras["accuracy"] for extras in _extras(arms[name])] if name in arms else [] for arms in groups.values()
        ]
        found = [(i, values) for i, values in enumerate(seeds) if values]
        places = [i + (j - (len(colours) - 1) / 2) * width for i, _ in found]
        means = [statistics.fmean(values) for _, values in found]
        axes.plot(places, means, "_", markersize=14, markeredgewidth=3, color=colour, label=name)
        for place, (_, values) in zip(places, found, strict=True):
            axes.plot([place] * len(values), values, "o", color="black", markersize=2.5)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel("test accuracy, %")
    axes.legend(ncols=6, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.12))


def _losses(axes: "Axes", arms: Arms) -> None:
    window = 0.0
    for name, colour in _colours(arms).items():
        curves = [extras["losses"] for extras in _extras(arms[name])]
        if curves:
            mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
            axes.plot(range(1, len(mean) + 1), mean, color=colour, label=name)
            window = max(window, *(extras["ghost_fraction"] * len(mean) for extras in _extras(arms[name])))
    axes.axvspan(0.5, 0.5 + window, color="0.9", zorder=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss")
    axes.legend()


def _zeros(axes: "Axes", arms: Arms) -> None:
    for name, colour in _colours(arms).items():
        found = [list(extras["zero_rates"].values()) for extras in _extras(arms[name])]
        if found:
            mean = [100 * sum(values) / len(values) for values in zip(*found, strict=True)]
            axes.plot(range(1, len(mean) + 1), mean, "o-", color=colour, label=name)
    axes.set_xlabel("activation, from input to output")
    axes.set_ylabel("zeros, %")
    axes.legend()
