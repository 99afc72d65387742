"""The paper's claims: which arms are run, which numbers are compared, and the figures its reader knows."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from tenfold_shared.claims import Arm, Claim, Measurement, Outcome
from tenfold_shared.cli import load_recipe
from tenfold_shared.report import COLOURS, ReportFigure, figure_style
from tenfold_shared.reproduction import Request, once, reproduce_claims
from tenfold_shared.run import Run, RunOptions, derived_seed, seed_everything
from tenfold_slak.data import embedded_sets
from tenfold_slak.downstream import SLaKBackbone, UPerNet
from tenfold_slak.erf import ReceptiveField, effective_receptive_field
from tenfold_slak.evaluate import costs, load_model
from tenfold_slak.macs import count_parameters, macs_by_layer
from tenfold_slak.masks import initial_masks
from tenfold_slak.models import create_network
from tenfold_slak.train import Recipe, run_recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tenfold_slak.models.slak import SLaK

ERF_IMAGES = 64
SCORED = 4  # images that SNIP is given when counting
SEGMENTED = (512, 2048)  # the image for which segmenters are counted, pixels

#: Accuracies on row cues without following the cue, per cent, from the chances of four digits drawn at random: naming
#: any digit; one of the four in the image, some of which are alike (1/4 + 3/4 x 1/10); the most frequent of the four.
GUESSES = {"a digit": 10.0, "one of the four digits": 32.5, "the most frequent of the four": 38.35}

QUICK = ("mini-decomposed",)
"""What `reproduce` measures when it is told nothing."""


def reproduce(*claims: str, request: Request, options: RunOptions) -> None:
    """Measure claims of the paper; without arguments the miniature's kernels on long-range digits, in about three minutes,
    and with --seeds 5 all of the miniature.

    Args:
        claims: their names, as ``tenfold-slak claims`` lists them.

    """
    if not claims and request.scale == "mini" and not request.seeds:
        claims = QUICK
        options = dataclasses.replace(options, name=options.name or "reproduce-mini")
    reproduce_claims("slak", claims, request, options, measure, figures)


def _entry(name: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda extras: extras[name]


#: Name of a claim's metric -> what of a measurement it is.
VALUES: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "test accuracy": _entry("accuracy"),
    "top-1 accuracy": _entry("accuracy"),
    "mIoU": _entry("miou"),
    "mAP": _entry("map50"),
    "receptive field side": _entry("erf_side"),
    **{f"{kind} AP{level}": _entry(f"{kind}_ap{level}") for kind in ("box", "mask") for level in ("", "50", "75")},
    "non-zero parameters": lambda extras: extras["parameters_nonzero"] / 1e6,
    "stored parameters": _entry("parameters"),
    "multiply-adds": lambda extras: extras["macs_nonzero"] / 1e9,
    "segmenter parameters": lambda extras: extras["segmenter_parameters_nonzero"] / 1e6,
    "segmenter multiply-adds": lambda extras: extras["segmenter_macs_nonzero"] / 1e9,
}
COUNTS = {name for name in VALUES if name.endswith(("parameters", "multiply-adds"))}


def measure(claim: Claim, arm: Arm, seed: int, *, options: RunOptions, folder: Path) -> Measurement:
    """What one arm gives with one seed; an arm that several claims share is run once."""
    name = f"{arm.name}-{arm.key}-seed{seed}"
    recipe = load_recipe("tenfold_slak", str(arm.recipe), Recipe, **arm.options)
    if claim.metric.name in COUNTS:
        kept, run_arm = f"{name}-counts", lambda: _counted(recipe, seed, options)
    else:
        kept, run_arm = name, lambda: _trained(recipe, name, options, folder)
    measured = once(kept, folder, run_arm)
    return dataclasses.replace(measured, value=VALUES[claim.metric.name](measured.extras))


def _trained(recipe: Recipe, name: str, options: RunOptions, folder: Path) -> Measurement:
    with Run("slak", recipe, dataclasses.replace(options, name=name), parent=folder / "runs") as run:
        if recipe.task == "segment":
            from tenfold_slak.segment import train_segmenter  # noqa: PLC0415 - heavy, for its claims alone

            extras = train_segmenter(run, recipe)
        elif recipe.task == "detect":
            from tenfold_slak.detect import train_detector  # noqa: PLC0415

            extras = train_detector(run, recipe)
        else:
            model, result = run_recipe(run, recipe)
            extras = {**dataclasses.asdict(result), **result.costs, "run": name}
            if recipe.data.name == "row-cue":
                extras["erf_side"] = receptive_field(model).rectangles[0.5].side
        return Measurement(None, extras=extras, **run.usage())


def _counted(recipe: Recipe, seed: int, options: RunOptions) -> Measurement:
    """Parameters and multiply-adds of a freshly built network under its first masks, and of UPerNet on it; nothing is
    trained.

    SNIP scores the weights on Gaussian images, each of a class of its own, of the size of the recipe's data: where it puts the
    densities, and with them the multiply-adds, depends on the images by several per cent.
    """
    with Run.evaluation("slak", dataclasses.replace(options, seed=seed)) as run:
        size, sparse = recipe.data.size, recipe.sparse
        images = torch.randn(
            SCORED, 3, size, size, generator=torch.Generator().manual_seed(derived_seed(seed, "images"))
        )
        batch = images.to(run.device), torch.arange(SCORED, device=run.device)
        seed_everything(seed, "init")
        model = create_network(recipe.arch, drop_path_rate=recipe.drop_path, **recipe.arguments).to(run.device)
        drawn = derived_seed(seed, "masks")
        masks = {}
        if sparse.sparsity:
            masks = initial_masks(model, sparse.sparsity, sparse.init, batch, sparse.only_large_kernels, drawn)
        for name, parameter in model.named_parameters():
            if name in masks:
                parameter.data.mul_(masks[name])
        # Biases, norms and layer scales count as they will be once they are trained: none of them is exactly zero.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_((parameter == 0).to(parameter))
        counts = costs(model, (3, size, size))
        segmenter = UPerNet(SLaKBackbone(cast("SLaK", model)))
        layers = macs_by_layer(segmenter, SEGMENTED)
        counts["segmenter_parameters_nonzero"] = count_parameters(segmenter).nonzero
        counts["segmenter_macs_nonzero"] = sum(layer.nonzero for layer in layers.values())
        # A counter that knows plain convolutions alone passes the large kernels over.
        counts["segmenter_macs_large_kernels"] = sum(
            layer.nonzero for name, layer in layers.items() if ".large_kernel." in name
        )
        return Measurement(None, extras=counts)


def receptive_field(model: Any) -> ReceptiveField:
    """The effective receptive field on test images of the row cues."""
    images = embedded_sets("row-cue")[1].images[:ERF_IMAGES].float() / 255
    return effective_receptive_field(model, [images.to(next(model.parameters()).device)])


# -- figures -----------------------------------------------------------------------------------------------------------


def figures(claims: Sequence[Claim], outcomes: Sequence[Outcome], folder: Path) -> list[ReportFigure]:
    """The miniature's two, accuracy of every arm over its non-zero parameters and the effective receptive fields; and
    counts beside the paper's.
    """
    import matplotlib.pyplot as plt  # noqa: PLC0415 - slow to import, needed once the runs are done

    kinds = {claim.id: claim.metric.name for claim in claims}
    accurate = [outcome for outcome in outcomes if kinds[outcome.claim] in {"test accuracy", "top-1 accuracy"}]
    # The miniature's claims share arms and data; elsewhere arms of one name are of other networks and other data.
    mini = {claim.id for claim in claims if claim.scale == "mini"}
    small = [outcome for outcome in accurate if outcome.claim in mini]
    groups = [small] if small else []
    groups += [[outcome] for outcome in accurate if outcome.claim not in mini]
    titles = {claim.id: f"{claim.data}, {claim.model}" for claim in claims}
    drawn: list[ReportFigure] = []
    with figure_style():
        for group in groups:
            arms = {name: arm for outcome in reversed(group) for name, arm in outcome.arms.items() if arm.n}
            if not arms:
                continue
            figure, axes = plt.subplots(figsize=(6.8, 4.0), layout="constrained")
            _accuracy_bars(axes, arms)
            caption = (
                f"{titles[group[0].claim]}: mean over the seeds (dots: every seed), non-zero parameters under each arm"
            )
            if group[0].claim in mini:
                for (guess, chance), style in zip(GUESSES.items(), (":", "-.", "--"), strict=True):
                    axes.axhline(chance, linestyle=style, color="0.4", linewidth=1)
                    axes.annotate(
                        f"naming {guess}",
                        (1, chance),
                        (-2, 2),
                        ("axes fraction", "data"),
                        textcoords="offset points",
                        ha="right",
                        fontsize=7,
                    )
                caption += "; lines, what guessing without the cue is worth"
            drawn.append(
                ReportFigure(
                    figure,
                    title="Accuracy by kernel",
                    caption=f"{caption}.",
                    alt="Bars of test accuracy for every arm",
                )
            )
            fields = _fields(arms, folder)
            if fields:
                figure, grid = plt.subplots(
                    1, len(fields), figsize=(2.1 * len(fields), 2.6), layout="constrained", squeeze=False
                )
                for axes, (name, field) in zip(grid[0], fields.items(), strict=True):
                    _field_map(axes, name, field)
                drawn.append(
                    ReportFigure(
                        figure,
                        title="Effective receptive fields",
                        caption="What the centre of the last map listens to, over its maximum, first seed; the square "
                        "holds half of it.",
                        alt="Maps of the effective receptive field of every arm",
                    )
                )
        counted = [outcome for outcome in outcomes if kinds[outcome.claim] in COUNTS]
        if counted:
            figure, axes = plt.subplots(figsize=(6.8, 1.2 + 0.4 * len(counted)), layout="constrained")
            _count_bars(axes, counted)
            drawn.append(
                ReportFigure(
                    figure,
                    title="Counts",
                    caption="Parameters and multiply-adds under the first masks, over the paper's number.",
                    alt="Bars of counts over the paper's",
                )
            )
    return drawn


def _count_bars(axes: "Axes", outcomes: Sequence[Outcome]) -> None:
    names, ratios = [], []
    for outcome in outcomes:
        arm = outcome.arms[outcome.method]
        if arm.mean is not None and arm.paper:
            names.append(f"{outcome.claim.removeprefix('count-')}: {arm.mean:.12g} (paper {arm.paper:.12g})")
            ratios.append(arm.mean / arm.paper)
    axes.barh(names, ratios, color=COLOURS[0], alpha=0.75)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("ours over the paper's")


def _accuracy_bars(axes: "Axes", arms: Mapping[str, Any]) -> None:
    for place, ((_, arm), colour) in enumerate(zip(arms.items(), itertools.cycle(COLOURS))):
        values = [value for value in arm.values if value is not None]
        axes.bar(place, arm.mean, color=colour, alpha=0.75)
        axes.plot([place] * len(values), values, "o", color="black", markersize=4)
    labels = []
    for name, arm in arms.items():
        counts = [extras["parameters_nonzero"] for extras in arm.extras if "parameters_nonzero" in extras]
        labels.append(f"{name}\n{sum(counts) / len(counts) / 1e3:.1f} k" if counts else name)
    axes.set_xticks(range(len(arms)), labels, fontsize=9)
    axes.set_ylabel("test accuracy, %")


def _fields(arms: Mapping[str, Any], folder: Path) -> dict[str, ReceptiveField]:
    """The receptive field of the first run of every arm that left one on row cues."""
    found = {}
    for name, arm in arms.items():
        runs = [extras["run"] for extras in arm.extras if "run" in extras and "erf_side" in extras]
        if runs:
            found[name] = receptive_field(load_model(folder / "runs" / runs[0])[0])
    return found


def _field_map(axes: "Axes", name: str, field: ReceptiveField) -> None:
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    size, side = len(field.mean), field.rectangles[0.5].side
    axes.imshow((field.mean / field.mean.max()).cpu().numpy(), cmap="YlGn", vmin=0, vmax=1)
    corner = size // 2 - side // 2 - 0.5
    axes.add_patch(Rectangle((corner, corner), side, side, fill=False, edgecolor=COLOURS[1]))
    axes.set_title(f"{name}\nhalf in {side} x {side}", fontsize=9)
    axes.set_axis_off()
