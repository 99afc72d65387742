"""The paper's claims: which arms are run, which numbers are compared, and the figures its reader knows."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tenfold_hypergcl.recipe import Recipe
from tenfold_hypergcl.train import run_recipe
from tenfold_shared.claims import Arm, Claim, Measurement, Outcome
from tenfold_shared.cli import load_recipe
from tenfold_shared.report import COLOURS, ReportFigure, figure_style
from tenfold_shared.reproduction import Request, once, reproduce_claims
from tenfold_shared.run import Run, RunOptions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VALUES = {
    "test accuracy": "accuracy",
    "ROC-AUC": "auc",
    "statistical parity gap": "statistical_parity",
}
"""Name of a claim's metric -> what of a run's test metrics it is."""


def reproduce(*claims: str, request: Request, options: RunOptions) -> None:
    """Measure claims of the paper; without arguments the miniature on digits. Seed k is the split number k.

    Args:
        claims: their names, as ``tenfold-hypergcl claims`` lists them.

    """
    reproduce_claims("hypergcl", claims, request, options, measure, figures)


def measure(claim: Claim, arm: Arm, seed: int, *, options: RunOptions, folder: Path) -> Measurement:
    """What one arm gives on one split; an arm that several claims share is run once."""
    name = f"{arm.recipe}-{arm.name}-{arm.key}-seed{seed}"
    measured = once(name, folder, lambda: _run_arm(arm, name, options, folder))
    return dataclasses.replace(measured, value=measured.extras["test"][VALUES[claim.metric.name]])


def _run_arm(arm: Arm, name: str, options: RunOptions, folder: Path) -> Measurement:
    recipe = load_recipe("tenfold_hypergcl", str(arm.recipe), Recipe, **arm.options)
    with Run("hypergcl", recipe, dataclasses.replace(options, name=name), parent=folder / "runs") as run:
        _, result = run_recipe(run, recipe)
        return Measurement(None, extras={**dataclasses.asdict(result), "threads": _threads()}, **run.usage())


def _threads() -> int:
    import torch  # noqa: PLC0415 - loaded by then

    return torch.get_num_threads()


# -- figures ----------------------------------------------------------------------------------------------------------


def figures(claims: Sequence[Claim], outcomes: Sequence[Outcome], folder: Path) -> list[ReportFigure]:
    """The value of every arm on every split, and what the generator drops while it is trained."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 - slow to import, needed once the runs are done

    drawn = []
    with figure_style():
        for claim, outcome in zip(claims, outcomes, strict=True):
            figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
            _paired_dots(axes, claim, outcome)
            drawn.append(
                ReportFigure(
                    figure,
                    title=f"{claim.data}: {claim.metric.name} by arm",
                    caption=f"{claim.id}: a line is a split, which all arms share; black, the mean over the splits; "
                    "dashed, the paper's value where there is one.",
                    alt=f"{claim.metric.name} of every arm on every split",
                )
            )
        curves = {c.id: (c, o) for c, o in zip(claims, outcomes, strict=True) if _drop_curves(o)}
        for claim, outcome in curves.values():
            figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
            for arm, colour in zip(_drop_curves(outcome), itertools.cycle(COLOURS), strict=False):
                for extras in outcome.arms[arm].extras:
                    ratios = extras.get("drop_ratio", [])
                    share = [i / max(1, len(ratios) - 1) for i in range(len(ratios))]
                    axes.plot(share, [100 * (1 - ratio) for ratio in ratios], color=colour, linewidth=1)
            axes.set_xlabel("share of the training")
            axes.set_ylabel("kept memberships, %")
            drawn.append(
                ReportFigure(
                    figure,
                    title=f"{claim.data}: what the generator keeps",
                    caption=f"{claim.id}: share of the real memberships in the generated view, a line a split.",
                    alt="Share of memberships that the generator keeps, over the training",
                )
            )
    return drawn


def _drop_curves(outcome: Outcome) -> list[str]:
    return [name for name, arm in outcome.arms.items() if any(extras.get("drop_ratio") for extras in arm.extras)]


def _paired_dots(axes: "Axes", claim: Claim, outcome: Outcome) -> None:
    arms = list(outcome.arms)
    values = [outcome.arms[arm].values for arm in arms]
    for i, colour in zip(range(len(outcome.seeds)), itertools.cycle(COLOURS), strict=False):
        points = [(x, series[i]) for x, series in enumerate(values) if series[i] is not None]
        axes.plot(*zip(*points, strict=True), "o-", color=colour, alpha=0.7, linewidth=1, markersize=4)
    for x, arm in enumerate(arms):
        mean, paper = outcome.arms[arm].mean, outcome.arms[arm].paper
        if mean is not None:
            axes.plot([x - 0.2, x + 0.2], [mean, mean], color="black", linewidth=2.5)
        if paper is not None:
            axes.plot([x - 0.3, x + 0.3], [paper, paper], color="black", linestyle="--", linewidth=1.2)
    axes.set_xticks(range(len(arms)), arms)
    axes.set_ylabel(f"{claim.metric.name}, {claim.metric.unit}")
