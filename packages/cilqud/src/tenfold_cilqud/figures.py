"""The figures of a report: accuracy task by task, the accuracy matrix, forgetting, robustness, and what was queried."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from tenfold_cilqud.data import load_data, pixels
from tenfold_cilqud.evaluate import load_checkpoint
from tenfold_cilqud.pools import open_pool
from tenfold_cilqud.protocol import saved_samples
from tenfold_cilqud.query import query
from tenfold_cilqud.recipe import Recipe
from tenfold_cilqud.session import features_of, pool_features
from tenfold_shared.checkpoint import load_weights
from tenfold_shared.claims import Claim, Outcome
from tenfold_shared.cli import load_recipe
from tenfold_shared.report import COLOURS, ReportFigure, figure_style

SHOWN_ANCHORS = 5


def figures(claims: Sequence[Claim], outcomes: Sequence[Outcome], folder: Path) -> list[ReportFigure]:
    """Curves over the tasks first; then matrix, forgetting, robust arms, and a contact sheet of the query."""
    runs = collect(outcomes)
    robust = {arm: seeds for arm, seeds in runs.items() if seeds and seeds[0]["robust_matrix"]}
    plain = {arm: seeds for arm, seeds in runs.items() if seeds and arm not in robust}
    drawn: list[ReportFigure] = []
    with figure_style():
        if plain:
            drawn.append(
                ReportFigure(
                    curves(plain),
                    title="Accuracy task by task",
                    caption="Mean accuracy over all classes seen after each task; bands span one standard deviation over "
                    "the seeds. Dashed: joint training on all data of the classes seen.",
                    alt="Accuracy after each task, a line a method",
                )
            )
            drawn.append(
                ReportFigure(
                    forgetting_curves(plain),
                    title="What is left of the first task",
                    caption="Accuracy on the classes of the first task after each task, mean over the seeds.",
                    alt="Accuracy on the first task after each task, a line a method",
                )
            )
            drawn.append(
                ReportFigure(
                    matrices(plain),
                    title="Accuracy matrix",
                    caption="Row: after which task; column: on which task's test images; mean over the seeds, in %.",
                    alt="Accuracy by task learned and task tested, a panel a method",
                )
            )
        if robust:
            drawn.append(
                ReportFigure(
                    scatter(robust),
                    title="Accuracy and robustness after the last task",
                    caption="A dot a seed: clean accuracy against accuracy under PGD.",
                    alt="Clean against robust accuracy, a colour a method",
                )
            )
        sheet = queried(claims, runs, folder)
        if sheet is not None:
            pools = sorted({run["pool"] for seeds in runs.values() for run in seeds if run.get("pool")})
            drawn.append(
                ReportFigure(
                    sheet,
                    title="What the anchors take",
                    caption="Anchors of the last task's query, first seed, and the pool images that each takes. Pools of the "
                    f"runs: {'; '.join(pools)}.",
                    alt="Anchor images and the pool images nearest to them",
                )
            )
    return drawn


def collect(outcomes: Sequence[Outcome]) -> dict[str, list[Mapping[str, Any]]]:
    """Each arm's runs over the seeds; arms of several claims under their first name."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    known: set[str] = set()
    for outcome in outcomes:
        for name, arm in outcome.arms.items():
            runs = [extras for value, extras in zip(arm.values, arm.extras, strict=True) if value is not None]
            if runs and name not in found and runs[0]["run"] not in known:
                found[name] = runs
                known.add(runs[0]["run"])
    return found


def colours(arms: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a line style for each arm."""
    styles = itertools.cycle(itertools.product(("-", "-.", ":"), COLOURS))
    return {arm: (colour, style) for arm, (style, colour) in zip(arms, styles, strict=False)}


def curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Mean accuracy of every state."""
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for arm, (colour, style) in colours(list(runs)).items():
        states = np.array([[np.mean(row) for row in run["matrix"]] for run in runs[arm]])
        mean, spread = states.mean(0), states.std(0)
        tasks = np.arange(1, len(mean) + 1)
        if arm == "joint":
            axes.plot(tasks, mean, "--", color="0.3", label=arm)
            continue
        axes.plot(tasks, mean, style, color=colour, marker="o", label=arm)
        axes.fill_between(tasks, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
    _task_axis(axes, "accuracy on all classes seen, %")
    return figure


def forgetting_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Accuracy on the first task's classes."""
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for arm, (colour, style) in colours(list(runs)).items():
        first = np.array([[row[0] for row in run["matrix"]] for run in runs[arm]]).mean(0)
        axes.plot(np.arange(1, len(first) + 1), first, style, color=colour, marker="o", label=arm)
    _task_axis(axes, "accuracy on the first task, %")
    return figure


def _task_axis(axes: Axes, label: str) -> None:
    axes.set_xlabel("tasks learned")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def matrices(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """A panel an arm."""
    columns = min(4, len(runs))
    rows = -(-len(runs) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.3 * columns, 2.3 * rows), squeeze=False, layout="constrained")
    for panel in axes.flat[len(runs) :]:
        panel.axis("off")
    for panel, (arm, seeds) in zip(axes.flat, runs.items(), strict=False):
        size = len(seeds[0]["matrix"])
        mean = np.full((size, size), np.nan)
        for t in range(size):
            mean[t, : t + 1] = np.mean([run["matrix"][t] for run in seeds], 0)
        panel.imshow(mean, vmin=0, vmax=100, cmap="viridis")
        panel.grid(False)
        panel.set_title(arm, fontsize=9)
        panel.set_xticks(range(size), range(1, size + 1))
        panel.set_yticks(range(size), range(1, size + 1))
        for t, j in itertools.product(range(size), range(size)):
            if j <= t:
                shade = "white" if mean[t, j] < 60 else "black"
                panel.text(j, t, f"{mean[t, j]:.0f}", ha="center", va="center", fontsize=7, color=shade)
    return figure


def scatter(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Clean against robust accuracy."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for arm, (colour, _) in colours(list(runs)).items():
        axes.plot(
            [run["last"] for run in runs[arm]], [run["robust_last"] for run in runs[arm]], "o", color=colour, label=arm
        )
    axes.set_xlabel("accuracy, %")
    axes.set_ylabel("accuracy under attack, %")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def queried(claims: Sequence[Claim], runs: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path) -> Figure | None:
    """The last task's query of the first CIL-QUD arm and seed, made again from the network that made it."""
    arms = [
        (claim, claim.arms[name])
        for claim in claims
        for name in claim.arms
        if name in runs and "queries" in runs[name][0] and runs[name][0]["queries"]
    ]
    for _, arm in arms:
        recipe = load_recipe("tenfold_cilqud", str(arm.recipe), Recipe, **arm.options)
        name = runs[arm.name][0]["run"]
        checkpoints = folder / "runs" / name / "checkpoints"
        before = checkpoints / f"task-{recipe.data.tasks - 2}.safetensors"
        if recipe.query.strategy != "query" or recipe.query.approximate or recipe.data.tasks < 2 or not before.exists():
            continue
        seed = int(name.rpartition("seed")[2])
        data = load_data(recipe.data, seed)
        net, _ = load_checkpoint(before)
        _, about = load_weights(before)
        kept = data.anchors or [
            images[torch.tensor(about["anchors"].get(str(label), []), dtype=torch.int64)]
            for label, images in enumerate(data.train)
        ]
        old, asked = recipe.data.tasks - 1, recipe.query
        anchors = saved_samples(kept, data.order, old, data.classes_per_task).images
        pool = open_pool(recipe.pool, data, seed)
        found = query(
            features_of(net, anchors, asked.feature, old),
            pool_features(net, pool, asked.feature, old),
            asked.per_anchor,
            metric=asked.metric,
            order=asked.order,
            max_total=asked.max_total,
        )
        chosen = np.linspace(0, len(anchors) - 1, SHOWN_ANCHORS).astype(int).tolist()
        return contact_sheet([(anchors[i], pool[found.indices[found.anchor == i]][:8]) for i in chosen])
    return None


def contact_sheet(rows: list[tuple[Tensor, Tensor]]) -> Figure:
    """A figure with an anchor in front of each row, and what it took behind it."""
    columns = 1 + max(len(taken) for _, taken in rows)
    figure, axes = plt.subplots(len(rows), columns, figsize=(0.7 * columns, 0.75 * len(rows)), squeeze=False)
    for line, (anchor, taken) in zip(axes, rows, strict=True):
        for place in line:
            place.axis("off")
        for place, image in zip(line, [anchor, *taken], strict=False):
            shown = pixels(image).permute(1, 2, 0).clamp(0, 1).numpy()
            place.imshow(shown.squeeze(2) if shown.shape[2] == 1 else shown, cmap="gray", vmin=0, vmax=1)
    axes[0, 0].set_title("anchor", fontsize=8)
    if columns > 1:
        axes[0, 1].set_title("takes", fontsize=8, loc="left")
    return figure
