"""The figures of a reproduction: pictures after few steps, quality against steps and time, few pixels, the atoms."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tenfold_shared.claims import Claim, Outcome
from tenfold_shared.cli import load_recipe
from tenfold_shared.report import COLOURS, ReportFigure, figure_style

from .checkpoints import load_model
from .coordinates import lattice
from .dictionary import NeuralDictionary
from .embedded import PATCH, photograph
from .evaluate import Observed, reconstructions
from .patches import merge_patches, split_patches
from .recipe import UNTRAINED, Recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN_STEPS = (0, 1, 3)
STEP_METRIC = "PSNR at step 0"
Arms = Mapping[str, tuple[Claim, Sequence[Mapping[str, Any]]]]


def figures(claims: Sequence[Claim], outcomes: Sequence[Outcome], folder: Path) -> list[ReportFigure]:
    """What there is to draw of the claims that were measured."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 - slow to import, needed once the runs are done

    by_id = {claim.id: claim for claim in claims}
    stepped: dict[str, Any] = {}
    coded: dict[str, Any] = {}
    few: dict[str, Any] = {}
    bars: list[Outcome] = []
    for outcome in outcomes:
        claim = by_id[outcome.claim]
        found = {arm: (claim, [e for e in result.extras if e]) for arm, result in outcome.arms.items()}
        found = {arm: pair for arm, pair in found.items() if pair[1]}
        if claim.metric.name == STEP_METRIC or (claim.id.endswith("-controls") and "step" in claim.id):
            stepped |= found
        elif claim.metric.name == "processor time to 30 dB":
            coded |= {arm: pair for arm, pair in found.items() if len(pair[1][0]["points"]) == 1}
            bars.append(outcome)
        elif claim.metric.name == "PSNR" and "few-pixels" in claim.id:
            few |= found
        else:
            bars.append(outcome)
    drawn = []
    with figure_style():
        if stepped:
            figure = pictures(plt, stepped, folder)
            caption = "A test photograph, cut into patches of 16 pixels, each coded on its own: optimiser steps on the new patches."
            drawn.append(
                ReportFigure(
                    figure, "A new image after 0, 1 and 3 steps", caption, "A photograph rebuilt by every method"
                )
            )
            figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.0), layout="constrained", sharey=True)
            curves(axes[0], {**stepped}, "step")
            curves(axes[1], {**stepped, **coded}, "seconds")
            axes[0].legend(fontsize=8)
            caption = (
                "64 test patches, mean over the seeds; processor time counts the new patches alone, all together, not what "
                "was learned before. Crosses: methods in closed form."
            )
            drawn.append(
                ReportFigure(figure, "Quality against steps and against time", caption, "PSNR curves of every method")
            )
        if few:
            figure, one = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
            bar_chart(one, {arm: [e["points"][-1][2] for e in extras] for arm, (_, extras) in few.items()}, "PSNR, dB")
            caption = "26 of 256 pixels of each patch observed, the gate sees no other; every dot a seed."
            drawn.append(
                ReportFigure(
                    figure, "A tenth of the pixels", caption, "PSNR of every method from a tenth of the pixels"
                )
            )
        for outcome in bars:
            claim = by_id[outcome.claim]
            values = {a: [v for v in r.values if v is not None] for a, r in outcome.arms.items()}
            values = {arm: found for arm, found in values.items() if found}
            if claim.metric.name.startswith("PSNR at step") or not values:
                continue
            figure, one = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
            unit = f", {claim.metric.unit}" if claim.metric.unit else ""
            bar_chart(one, values, f"{claim.metric.name}{unit}", log=claim.metric.unit == "ms")
            title = f"{claim.metric.name[0].upper()}{claim.metric.name[1:]}, {claim.data}"
            drawn.append(ReportFigure(figure, title, claim.statement, f"{claim.metric.name} of every arm"))
        atlas = atom_atlas(plt, {**few, **stepped}, folder)
        if atlas is not None:
            caption = "Every atom of the first seed's dictionary on the patch, scaled to its own range; those that most test patches use come first."
            drawn.append(ReportFigure(atlas, "Atom atlas", caption, "Images of all atoms of the dictionary"))
    return drawn


def curves(axes: "Axes", arms: Arms, against: str) -> None:
    """PSNR of every arm, mean over the seeds, against steps or processor time."""
    for (name, (_, extras)), colour in zip(arms.items(), itertools.cycle(COLOURS), strict=False):
        runs = [e["points"] for e in extras]
        length = min(map(len, runs))
        table = torch.tensor([[run[i] for i in range(length)] for run in runs], dtype=torch.float64).mean(dim=0)
        x = table[:, 0] if against == "step" else table[:, 1]
        if against == "step":
            axes.plot(x, table[:, 2], marker="o" if length > 1 else "x", markersize=3, label=name, color=colour)
        else:
            axes.plot(
                x.clamp(min=1e-3),
                table[:, 2],
                marker="o" if length > 1 else "x",
                markersize=3 if length > 1 else 9,
                label=name,
                color=colour,
            )
            if length == 1:
                axes.annotate(
                    name, (float(x[0]), float(table[0, 2])), textcoords="offset points", xytext=(6, -4), fontsize=8
                )
    axes.set_xscale("symlog" if against == "step" else "log", **({"linthresh": 1} if against == "step" else {}))
    axes.set_xlabel("optimiser steps on the new patches" if against == "step" else "processor seconds for 64 patches")
    axes.set_ylabel("PSNR, dB")


def bar_chart(axes: "Axes", values: Mapping[str, Sequence[float]], label: str, *, log: bool = False) -> None:
    """A bar for the mean of every arm and a dot for every seed."""
    means = [sum(v) / len(v) for v in values.values()]
    axes.bar(
        range(len(values)), means, color=[c for c, _ in zip(itertools.cycle(COLOURS), values, strict=False)], alpha=0.7
    )
    for i, found in enumerate(values.values()):
        axes.plot([i] * len(found), found, "k.", markersize=4)
    axes.set_xticks(range(len(values)), list(values), rotation=35, ha="right")
    axes.set_ylabel(label)
    if log:
        axes.set_yscale("log")


def pictures(plt: Any, arms: Arms, folder: Path) -> "Figure":
    """A whole test photograph by every arm of the first seed, after few steps."""
    truth = photograph("chelsea")
    patches = split_patches(truth[None], (PATCH, PATCH))
    observed = Observed(patches, patches, None, None, None, None)
    rows: list[tuple[str, list[Tensor]]] = []
    for name, (claim, extras) in arms.items():
        arm = claim.arms[name]
        recipe: Recipe = load_recipe("tenfold_nid", str(arm.recipe), Recipe, **arm.options)
        if recipe.method in UNTRAINED:
            continue
        model = load_model(folder / "runs" / extras[0]["run"])[0] if extras[0].get("run") else None
        torch.manual_seed(0)
        rows.append((name, [preds for _, _, preds in reconstructions(model, recipe, observed, SHOWN_STEPS)]))
    figure, axes = plt.subplots(len(SHOWN_STEPS) + 1, len(rows), figsize=(1.35 * len(rows) + 0.4, 5.6), squeeze=False)
    for column, (name, steps) in enumerate(rows):
        for row, preds in enumerate([*steps, patches]):
            image = merge_patches(preds.flatten(1, -2), (PATCH, PATCH), (truth.shape[0], truth.shape[1]))[0]
            axes[row, column].imshow(image.movedim(0, -1).clamp(0, 1).numpy())
        axes[0, column].set_title(name, fontsize=9)
    for row, label in enumerate([*(f"step {s}" for s in SHOWN_STEPS), "truth"]):
        axes[row, 0].set_ylabel(label, fontsize=9)
    for one in axes.flat:
        one.set_xticks([])
        one.set_yticks([])
        one.grid(False)
    return figure


def atom_atlas(plt: Any, arms: Arms, folder: Path) -> "Figure | None":
    """Every atom as an image, ordered by use; None when no dictionary of images was measured."""
    from .embedded import photograph_patches  # noqa: PLC0415 - the atlas alone looks at the test patches' codes

    for _, extras in arms.values():
        if not extras[0].get("run"):
            continue
        model, _ = load_model(folder / "runs" / extras[0]["run"])
        if isinstance(model, NeuralDictionary) and model.config.size == (PATCH, PATCH):
            break
    else:
        return None
    with torch.no_grad():
        atoms = model.experts.atoms(model.experts.features(lattice((PATCH, PATCH)))).transpose(0, 1)
        used = (model.sparse_code(photograph_patches("test"))[:, : model.config.num_experts] != 0).float().mean(dim=0)
    atoms = atoms[used.argsort(descending=True)]
    low, high = atoms.amin(dim=(1, 2), keepdim=True), atoms.amax(dim=(1, 2), keepdim=True)
    scaled = ((atoms - low) / (high - low).clamp(min=1e-9)).view(len(atoms), PATCH, PATCH, -1)
    columns = 32
    pad = -len(scaled) % columns
    scaled = torch.cat([scaled, scaled.new_ones(pad, *scaled.shape[1:])])
    framed = torch.nn.functional.pad(scaled, (0, 0, 1, 1, 1, 1), value=1.0)
    sheet = merge_patches(
        framed.flatten(1, 2), (PATCH + 2, PATCH + 2), (len(framed) // columns * (PATCH + 2), columns * (PATCH + 2))
    )
    figure, axes = plt.subplots(figsize=(8.0, 8.0 * sheet.shape[2] / sheet.shape[3] + 0.3), layout="constrained")
    axes.imshow(sheet[0].movedim(0, -1).squeeze(-1).numpy(), cmap="gray" if sheet.shape[1] == 1 else None)
    axes.set_axis_off()
    return figure
