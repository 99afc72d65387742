"""One recipe many times: over a grid of values, judged on validation data, and over seeds and class orders."""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tenfold_cilqud.recipe import Recipe
from tenfold_cilqud.reproduce import measure
from tenfold_shared.checkpoint import write_json, write_text
from tenfold_shared.claims import Arm, Claim, Measurement, Metric, mean_interval
from tenfold_shared.cli import to_yaml
from tenfold_shared.errors import UserError
from tenfold_shared.reproduction import Request, measure_all
from tenfold_shared.run import RunOptions

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
    """
    if recipe.data.evaluate_on != "validation":
        raise UserError(
            "sweep chooses values, which the test images must not do: add --data.validation 10 --data.evaluate_on validation"
        )
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    found = _measured(recipe, options, "sweep", points, seeds, jobs)
    rows = [{**point, **_intervals(found[i])} for i, point in enumerate(points)]
    rows.sort(key=lambda row: -(row["last"]["mean"] or 0.0))
    _report(options, "sweep", recipe, rows)


def repeat(recipe: Recipe, options: RunOptions, seeds: int = 5, jobs: int = 0) -> None:
    """Run a recipe with several seeds, each with a class order of its own unless the recipe fixes it.

    Means with their 95 % intervals are printed and written to ``repeat.json``.
    """
    found = _measured(recipe, options, "repeat", [{}], seeds, jobs)
    _report(options, "repeat", recipe, [_intervals(found[0])])


def _folder(options: RunOptions, what: str) -> Path:
    return options.output / "cilqud" / f"{what}-{options.name or 'recipe'}"


def _measured(
    recipe: Recipe, options: RunOptions, what: str, points: list[dict[str, Any]], seeds: int, jobs: int
) -> list[list[Measurement]]:
    if seeds < 1:
        raise UserError(f"--seeds takes 1 or more, got {seeds}")
    folder = _folder(options, what)
    write_text(folder / "recipe.yaml", to_yaml(recipe))
    path = str(folder / "recipe.yaml")
    arms = {f"point-{i}": Arm(f"point-{i}", recipe=path, options=point) for i, point in enumerate(points)}
    claim = Claim(
        id=what,
        table="",
        statement="",
        data=recipe.data.name,
        model=recipe.arch,
        scale="mini",
        provenance="none",
        metric=Metric("accuracy after the last task", "%"),
        method="point-0",
        arms=arms,
        seeds=seeds,
    )
    results = measure_all([claim], Request(seeds=seeds, jobs=jobs), options, measure, folder)
    return [[results[what, name, options.seed + i] for i in range(seeds)] for name in arms]


def _intervals(measured: list[Measurement]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in FIGURES:
        values = [result.extras[name] for result in measured if result.extras.get(name) is not None]
        if values:
            interval = mean_interval(values)
            found[name] = {**dataclasses.asdict(interval), "values": values}
    return found or {"last": {"mean": None, "values": []}}


def _report(options: RunOptions, what: str, recipe: Recipe, rows: list[dict[str, Any]]) -> None:
    path = _folder(options, what) / f"{what}.json"
    write_json(path, {"recipe": to_yaml(recipe), "rows": rows})
    for row in rows:
        shown = {key: value if not isinstance(value, Mapping) else _shown(value) for key, value in row.items()}
        print(json.dumps(shown, ensure_ascii=False))
    print(f"written to {path}")


def _shown(interval: Mapping[str, Any]) -> str:
    if interval["mean"] is None:
        return "failed"
    if interval.get("low") is None:
        return f"{interval['mean']:.2f}"
    return f"{interval['mean']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"
