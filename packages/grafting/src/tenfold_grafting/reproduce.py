"""The paper's claims: which arms are run, which numbers are compared, and the figures its reader knows."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import torch

from tenfold_grafting.train import Recipe, run_recipe
from tenfold_shared.checkpoint import write_json
from tenfold_shared.claims import Arm, Claim, Measurement, Outcome
from tenfold_shared.cli import config_digest, load_recipe
from tenfold_shared.report import COLOURS, ReportFigure, figure_style
from tenfold_shared.reproduction import Request, reproduce_claims
from tenfold_shared.run import Run, RunOptions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VALUES = {
    "standard accuracy": "sa",
    "robust accuracy": "ra",
    "CROWN-verified accuracy": "incomplete_va",
    "verified accuracy": "va",
    "unstable neurons": "unr",
    "seconds per verifier call": "seconds_per_call",
}
"""Name of a claim's metric -> what of a run it is."""


def reproduce(*claims: str, request: Request, options: RunOptions) -> None:
    """Measure claims of the paper; without arguments the miniature on digits.

    Args:
        claims: their names, as ``tenfold-grafting claims`` lists them.

    """
    reproduce_claims("grafting", claims, request, options, measure, figures)


def measure(claim: Claim, arm: Arm, seed: int, *, options: RunOptions, folder: Path) -> Measurement:
    """What one arm gives with one seed; an arm that several claims share is run once."""
    name = f"{arm.name}-{arm.key}-seed{seed}"
    file = folder / "measured" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(file.with_suffix(".lock")):
        if not file.exists():
            write_json(file, dataclasses.asdict(_run_arm(arm, name, seed, options, folder)))
        measured = Measurement(**json.loads(file.read_text(encoding="utf-8")))
    return dataclasses.replace(measured, value=measured.extras[VALUES[claim.metric.name]])


def _run_arm(arm: Arm, name: str, seed: int, options: RunOptions, folder: Path) -> Measurement:
    recipe = load_recipe("tenfold_grafting", str(arm.recipe), Recipe, **arm.options)
    if recipe.method != "published" and recipe.pretrained is None:
        recipe = dataclasses.replace(recipe, pretrained=base_run(recipe, seed, options, folder))
    with Run("grafting", recipe, dataclasses.replace(options, name=name), parent=folder / "runs") as run:
        _, found = run_recipe(run, recipe)
        return Measurement(found["sa"], extras={**found, "run": name}, **run.usage())


def base_run(recipe: Recipe, seed: int, options: RunOptions, folder: Path) -> Path:
    """The folder of the base network that all arms of a seed start from, trained by whoever comes first."""
    default = Recipe()
    base = dataclasses.replace(
        recipe,
        method="base",
        selection=default.selection,
        finetune=default.finetune,
        evaluation=dataclasses.replace(recipe.evaluation, images=1, verify_images=0),
    )
    name = f"base-{recipe.arch}-{recipe.data.name}-{config_digest(base)}-seed{seed}"
    directory = folder / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / f".{name}.lock"):
        if not (directory / "checkpoints" / "last.safetensors").exists():
            with Run("grafting", base, dataclasses.replace(options, name=name), parent=folder / "runs") as run:
                run_recipe(run, base)
    return directory


# -- figures --------------------------------------------------------------------------------------------------------------


def figures(claims: Sequence[Claim], outcomes: Sequence[Outcome], folder: Path) -> list[ReportFigure]:
    """The cactus plot, accuracies by arm, and unstable neurons by layer, over all arms that were run."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 - slow to import, needed once the runs are done

    arms: dict[str, list[Mapping[str, Any]]] = {}
    for outcome in outcomes:
        for name, result in outcome.arms.items():
            arms.setdefault(name, [extras for extras in result.extras if "sa" in extras])
    arms = {name: seeds for name, seeds in arms.items() if seeds}
    if not arms:
        return []
    where = f"{claims[0].model} on {claims[0].data}"
    drawn = []
    with figure_style():
        if any(seed["verifier_seconds"] for seeds in arms.values() for seed in seeds):
            figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
            _cactus(axes, arms)
            drawn.append(
                ReportFigure(
                    figure,
                    title="Images verified against time",
                    caption=f"{where}: images proved within a time for each, all seeds together (a cactus plot).",
                    alt="Share of images verified within a time, by arm",
                )
            )
        figure, axes = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
        _accuracies(axes, arms)
        drawn.append(
            ReportFigure(
                figure,
                title="Standard, robust and verified accuracy",
                caption=f"{where}: means over the seeds. {_considered(arms)}",
                alt="Grouped bars of standard, robust, CROWN-verified and verified accuracy by arm",
            )
        )
        figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
        _unstable(axes, arms)
        drawn.append(
            ReportFigure(
                figure,
                title="Unstable neurons by layer",
                caption=f"{where}: mean number an image, grafted neurons left out.",
                alt="Stacked bars of unstable neurons by layer and arm",
            )
        )
    return drawn


def _considered(arms: Mapping[str, list[Mapping[str, Any]]]) -> str:
    first = next(iter(arms.values()))[0]
    if not first["verify_images"]:
        return "No image was branched on."
    limits = f"{first['time_limit']:g} s and {first['domain_limit']} subdomains"
    return f"Verified accuracy: the first {first['verify_images']} images, at most {limits} each."


def _mean(seeds: list[Mapping[str, Any]], name: str) -> float:
    values = [seed[name] for seed in seeds if seed[name] is not None]
    return sum(values) / len(values) if values else 0.0


def _cactus(axes: "Axes", arms: Mapping[str, list[Mapping[str, Any]]]) -> None:
    for (name, seeds), colour in zip(arms.items(), COLOURS * 3, strict=False):
        times = sorted(second for seed in seeds for second in seed["verifier_seconds"])
        count = sum(seed["verify_images"] for seed in seeds)
        if times and count:
            share = [100 * (i + 1) / count for i in range(len(times))]
            axes.step(times, share, where="post", label=name, color=colour)
    axes.set_xscale("log")
    axes.set_xlabel("seconds an image")
    axes.set_ylabel("images verified, %")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _accuracies(axes: "Axes", arms: Mapping[str, list[Mapping[str, Any]]]) -> None:
    bounds = {seed["bounds"] for seeds in arms.values() for seed in seeds}
    proved = "verified by bounds" if len(bounds) > 1 else f"{bounds.pop().upper()}-verified"
    metrics = {"sa": "standard", "ra": "robust", "incomplete_va": proved, "va": "verified"}
    if all(seed["va"] is None for seeds in arms.values() for seed in seeds):
        del metrics["va"]
    width = 0.8 / len(metrics)
    for number, (metric, label) in enumerate(metrics.items()):
        places = [i + (number - (len(metrics) - 1) / 2) * width for i in range(len(arms))]
        axes.bar(places, [_mean(s, metric) for s in arms.values()], width, label=label, color=COLOURS[number])
    axes.set_xticks(range(len(arms)), list(arms), rotation=20, ha="right")
    axes.set_ylabel("accuracy, %")
    axes.legend(ncols=len(metrics), loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _unstable(axes: "Axes", arms: Mapping[str, list[Mapping[str, Any]]]) -> None:
    layers = max(len(seeds[0]["unstable_per_layer"]) for seeds in arms.values())
    bottom = torch.zeros(len(arms))
    for layer in range(layers):
        height = torch.tensor(
            [
                sum(seed["unstable_per_layer"][layer] for seed in seeds) / len(seeds)
                if layer < len(seeds[0]["unstable_per_layer"])
                else 0.0
                for seeds in arms.values()
            ]
        )
        colour = COLOURS[layer % len(COLOURS)]
        axes.bar(list(arms), height.numpy(), bottom=bottom.numpy(), label=f"layer {layer + 1}", color=colour)
        bottom = bottom + height
    axes.tick_params(axis="x", rotation=20)
    axes.set_ylabel("unstable neurons an image")
    axes.legend()
