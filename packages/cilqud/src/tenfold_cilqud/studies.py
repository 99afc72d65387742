"""One recipe many times: over a grid of values, judged on validation data, and over seeds and class orders."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tenfold_cilqud.recipe import Recipe
from tenfold_cilqud.reproduce import measure
from tenfold_shared.claims import Measurement, Metric, mean_interval
from tenfold_shared.errors import UserError
from tenfold_shared.reproduction import Request, compare_points, grid_points
from tenfold_shared.run import RunOptions

METRIC = Metric("accuracy after the last task", "%")
FIGURES = (
    "last",
    "average",
    "forgetting",
    "backward_transfer",
    "robust_last",
    "robust_average",
    "robust_forgetting",
    "final_last",
)


def sweep(recipe: Recipe, options: RunOptions, grid: dict[str, list[Any]], seeds: int = 3, jobs: int = 0) -> None:
    """Run a recipe at every point of a grid of its values, judged on validation images of every class.

    The result, best point first, is printed and written to ``sweep.json`` in the sweep's folder. The test images are
    never looked at: ``--data.validation N --data.evaluate_on validation`` puts others in their place.

    Args:
        grid: the values of every option that varies, as '{"lr": [0.1, 0.01]}'.
        seeds: how many, from 0 on, the same at every point.
        jobs: runs at the same time; 0: one a core on the CPU, one on a GPU.

    """
    if recipe.data.evaluate_on != "validation":
        raise UserError(
            "sweep chooses values, which the test images must not do: add --data.validation 10 --data.evaluate_on validation"
        )
    _compare(recipe, options, "sweep", grid_points(grid), seeds, jobs)


def repeat(recipe: Recipe, options: RunOptions, seeds: int = 5, jobs: int = 0) -> None:
    """Run a recipe with several seeds, each with a class order of its own unless the recipe fixes it.

    Means with their 95 % intervals are printed and written to ``repeat.json``.

    Args:
        seeds: how many, from 0 on.
        jobs: runs at the same time; 0: one a core on the CPU, one on a GPU.

    """
    _compare(recipe, options, "repeat", [{}], seeds, jobs)


def _compare(
    recipe: Recipe, options: RunOptions, verb: str, points: Sequence[dict[str, Any]], seeds: int, jobs: int
) -> None:
    if seeds < 1:
        raise UserError(f"--seeds takes 1 or more, got {seeds}")
    request = Request(seeds=seeds, jobs=jobs)
    compare_points("cilqud", verb, recipe, points, METRIC, request, options, measure, also=intervals)


def intervals(measured: Sequence[Measurement]) -> dict[str, Any]:
    """Mean, 95 % interval and values of every figure of a run that there is."""
    found: dict[str, Any] = {}
    for name in FIGURES:
        values = [result.extras[name] for result in measured if result.extras.get(name) is not None]
        if values:
            found[name] = {**dataclasses.asdict(mean_interval(values)), "values": values}
    return found
