"""The paper's claims: which arms are run, which numbers are compared, and the figures its reader knows."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from tenfold_shared.claims import Arm, Claim, Measurement, Outcome
from tenfold_shared.cli import load_recipe, recipes
from tenfold_shared.report import COLOURS, ReportFigure, figure_style
from tenfold_shared.reproduction import Request, once, reproduce_claims
from tenfold_shared.run import Run, RunOptions
from tenfold_simple3dformer.train import Recipe, run_recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VALUES = {
    "test accuracy": "overall accuracy", "mean class accuracy": "mean class accuracy", "instance mIoU": "instance mIoU",
    "class mIoU": "class mIoU", "mIoU": "mIoU", "AP25": "AP25", "AP50": "AP50", "2D retention": "retention",
}  # fmt: skip
"""Name of a claim's metric -> what of a run it is."""


def reproduce(*claims: str, request: Request, options: RunOptions) -> None:
    """Measure claims of the paper; without arguments the miniature on generated shapes.

    Args:
        claims: their names, as ``tenfold-simple3dformer claims`` lists them.

    """
    reproduce_claims("simple3dformer", claims, request, options, measure, figures)


def measure(claim: Claim, arm: Arm, seed: int, *, options: RunOptions, folder: Path) -> Measurement:
    """What one arm gives with one seed; an arm that several claims share is run once."""
    name = f"{Path(str(arm.recipe)).stem}-{arm.key}-seed{seed}"
    measured = once(name, folder, lambda: _run_arm(arm, name, seed, options, folder))
    return dataclasses.replace(measured, value=measured.extras[VALUES[claim.metric.name]])


def _run_arm(arm: Arm, name: str, seed: int, options: RunOptions, folder: Path) -> Measurement:
    recipe = load_recipe("tenfold_simple3dformer", str(arm.recipe), Recipe, **arm.options)
    if recipe.weights in recipes("tenfold_simple3dformer"):
        recipe = dataclasses.replace(recipe, weights=str(pretrained(recipe.weights, options, folder)))
    if recipe.lwf.teacher in recipes("tenfold_simple3dformer"):
        teacher = str(pretrained(recipe.lwf.teacher, options, folder))
        recipe = dataclasses.replace(recipe, lwf=dataclasses.replace(recipe.lwf, teacher=teacher))
    with Run("simple3dformer", recipe, dataclasses.replace(options, name=name), parent=folder / "runs") as run:
        _, result = run_recipe(run, recipe)
        extras: dict[str, Any] = {
            **result.metrics,
            "retention": result.retention,
            "drift": list(result.drift.values()),
            "run": name,
        }
        if result.last is not None:
            extras["last epoch"] = result.last
        return Measurement(result.value, extras={**extras, "parameters": result.parameters}, **run.usage())


def pretrained(recipe_name: str, options: RunOptions, folder: Path) -> Path:
    """The folder of the image network that all arms and seeds start from, trained by whoever comes first.

    One network with the first seed, as there is one set of ImageNet weights.
    """
    recipe = load_recipe("tenfold_simple3dformer", recipe_name, Recipe)
    directory = folder / "runs" / recipe_name
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / f".{recipe_name}.lock"):
        if not (directory / "checkpoints" / "last.safetensors").exists():
            once = dataclasses.replace(options, name=recipe_name, seed=0)
            with Run("simple3dformer", recipe, once, parent=folder / "runs") as run:
                run_recipe(run, recipe)
    return directory


# -- figures --------------------------------------------------------------------------------------------------------------


def figures(claims: Sequence[Claim], outcomes: Sequence[Outcome], folder: Path) -> list[ReportFigure]:
    """What every arm reaches in 3D and keeps in 2D, and the attention of the class token on voxels."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 - slow to import, needed once the runs are done

    metric = {claim.id: claim.metric for claim in claims}
    drawn = []
    with figure_style():
        first = [outcome for outcome in outcomes if metric[outcome.claim].name != "2D retention"]
        second = [outcome for outcome in outcomes if metric[outcome.claim].name == "2D retention"]
        panels = [panel for panel in (first, second) if panel]
        widths = [max(1, sum(len(o.arms) for o in panel)) for panel in panels]
        figure, axes = plt.subplots(
            1, len(panels), figsize=(9.0, 4.0), layout="constrained", squeeze=False, width_ratios=widths
        )
        arms = dict.fromkeys(arm for outcome in outcomes for arm in outcome.arms)
        colours = dict(zip(arms, itertools.cycle(COLOURS)))  # an arm has one colour, whatever it is compared with
        for axis, panel in zip(axes[0], panels, strict=True):
            _bars(axis, panel, {o.claim: metric[o.claim].name for o in panel}, colours)
        drawn.append(
            ReportFigure(
                figure,
                title="3D accuracy and what is kept of 2D",
                caption="Bars: mean over the seeds; dots: every seed. Left, the 3D task; right, held-out images on which "
                "the image head still decides as before the 3D training.",
                alt="Grouped bars of 3D accuracy and 2D retention for every arm",
            )
        )
        shown = _attention_examples(outcomes, folder)
        if shown:
            figure = _attention_figure(shown)
            drawn.append(
                ReportFigure(
                    figure,
                    title="What the class token looks at",
                    caption="Attention roll-out on test shapes, first seed: occupied voxels, the brighter the more.",
                    alt="Voxel shapes coloured by attention",
                )
            )
    return drawn


def _bars(axes: "Axes", outcomes: Sequence[Outcome], names: Mapping[str, str], colours: Mapping[str, str]) -> None:
    position, ticks, labels = 0.0, [], []
    for outcome in outcomes:
        for arm, result in outcome.arms.items():
            values = [value for value in result.values if value is not None]
            axes.bar(position, result.mean or 0.0, color=colours[arm], alpha=0.6, width=0.8)
            axes.plot([position] * len(values), values, "o", color="0.2", markersize=3)
            ticks.append(position)
            labels.append(arm)
            position += 1
        axes.text(
            position - len(outcome.arms) / 2 - 0.5,
            1.01,
            outcome.claim.removeprefix("mini-"),
            transform=axes.get_xaxis_transform(),
            ha="center",
            fontsize=10,
        )
        position += 0.8
    axes.set_xticks(ticks, labels, rotation=40, ha="right")
    axes.set_ylabel(f"{', '.join(dict.fromkeys(names.values()))}, %")


def _attention_examples(outcomes: Sequence[Outcome], folder: Path) -> list[tuple[str, Any, Any]]:
    """(title, occupied grid, weights) of a few test shapes for each tokenizer that was run."""
    from tenfold_simple3dformer.predict import voxel_examples  # noqa: PLC0415

    found: dict[str, str] = {}
    for outcome in outcomes:
        for name, result in outcome.arms.items():
            run = next((extras["run"] for extras in result.extras if "run" in extras), None)
            if run is not None and (folder / "runs" / run / "checkpoints" / "last.safetensors").exists():
                found.setdefault(run, name)
    shown: list[tuple[str, Any, Any]] = []
    for run, name in list(found.items())[:3]:
        shown += voxel_examples(folder / "runs" / run, name)
    return shown


def _attention_figure(shown: Sequence[tuple[str, Any, Any]]) -> Any:
    import matplotlib.pyplot as plt  # noqa: PLC0415

    from tenfold_simple3dformer.figures import draw_voxels  # noqa: PLC0415

    columns = 3
    rows = -(-len(shown) // columns)
    figure = plt.figure(figsize=(9.0, 3.0 * rows), layout="constrained")
    for i, (title, grid, weights) in enumerate(shown):
        axes = figure.add_subplot(rows, columns, i + 1, projection="3d")
        draw_voxels(axes, grid, weights)
        axes.set_title(title, fontsize=9)
    return figure
