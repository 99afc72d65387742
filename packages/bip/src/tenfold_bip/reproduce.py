"""The paper's claims: which arms are run, which numbers are compared, and the figures its reader knows."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import yaml

from tenfold_bip.baselines import imp_keep_schedule
from tenfold_bip.evaluate import load_model
from tenfold_bip.masking import expected_iou, mask_iou, prunable_weights
from tenfold_bip.recipe import FROM_TRAINED, Recipe
from tenfold_bip.train import run_recipe
from tenfold_shared.checkpoint import atomic_write
from tenfold_shared.claims import Arm, Claim, ClaimSet, Measurement, Metric, Outcome, load_claims
from tenfold_shared.cli import config_digest, load_recipe, to_yaml
from tenfold_shared.errors import UserError
from tenfold_shared.report import COLOURS, ReportFigure, figure_style
from tenfold_shared.reproduction import Request, compare_points, grid_points, once, reproduce_claims
from tenfold_shared.run import Run, RunOptions

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def reproduce(*claims: str, request: Request, options: RunOptions) -> None:
    """Measure claims of the paper; without arguments the miniature on digits.

    Args:
        claims: their names, as ``tenfold-bip claims`` lists them.

    """
    outcomes = reproduce_claims("bip", claims, request, options, measure, figures)
    for line in winning_tickets(load_claims("tenfold_bip"), outcomes):
        print(line)


def winning_tickets(claims: ClaimSet, outcomes: Sequence[Outcome]) -> list[str]:
    """Two lines for every network that was measured dense too: the best and the sparsest winning ticket of each method.

    A winning ticket is a sparse network whose mean accuracy over the seeds is at least the dense one's (section 7), or,
    in the second line, that less one standard deviation; the sparsities are those of the outcomes.
    """
    networks: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        claim = claims[outcome.claim]
        if claim.metric.name == "test accuracy":
            networks.setdefault(f"{claim.model} on {claim.data}", []).append(outcome)
    lines = []
    for network, measured in networks.items():
        dense = next((outcome.arms["dense"] for outcome in measured if "dense" in outcome.arms), None)
        if dense is None or dense.mean is None:
            continue
        for margin, name in ((0.0, "dense"), (dense.std or 0.0, "dense less one standard deviation")):
            found: dict[str, list[tuple[float, float]]] = {}
            for outcome in measured:
                for arm, result in outcome.arms.items():
                    if arm != "dense" and result.mean is not None:
                        tickets = found.setdefault(arm, [])
                        if result.mean >= dense.mean - margin:
                            tickets.append((result.mean, _points(outcome, arm)[0][1]["keep"]))
            told = [f"{arm} {_tickets(tickets)}" for arm, tickets in found.items()]
            lines.append(f"winning tickets, {network}, {dense.mean - margin:.2f} % ({name}): {'; '.join(told)}")
    return lines


def _tickets(tickets: Sequence[tuple[float, float]]) -> str:
    if not tickets:
        return "none"
    (accuracy, keep), sparsest = max(tickets), min(keep for _, keep in tickets)
    return f"best {accuracy:.2f} % with {100 * keep:.2f} % of the weights, sparsest {100 * sparsest:.2f} %"


VALUES = {"test accuracy": "accuracy", "validation accuracy": "accuracy", "gradient evaluations": "passes"}
"""Name of a claim's metric -> what of a run it is."""


def measure(claim: Claim, arm: Arm, seed: int, *, options: RunOptions, folder: Path) -> Measurement:
    """What one arm gives with one seed; an arm that several claims share is run once."""
    name = f"{arm.name}-{arm.key}-seed{seed}"
    measured = once(name, folder, lambda: _run_arm(arm, name, seed, options, folder))
    return dataclasses.replace(measured, value=measured.extras[VALUES[claim.metric.name]])


def _run_arm(arm: Arm, name: str, seed: int, options: RunOptions, folder: Path) -> Measurement:
    recipe = load_recipe("tenfold_bip", str(arm.recipe), Recipe, **arm.options)
    if recipe.method == "dense":
        return _dense_accuracy(dense_run(recipe, seed, options, folder))
    if recipe.method in FROM_TRAINED and recipe.pretrained is None:
        recipe = dataclasses.replace(recipe, pretrained=dense_run(recipe, seed, options, folder))
    if recipe.method == "imp":
        share_rounds(recipe, folder / "runs" / name, seed)
    with Run("bip", recipe, dataclasses.replace(options, name=name), parent=folder / "runs") as run:
        _, result = run_recipe(run, recipe)
        usage = run.usage()
    usage["seconds"] = sum(phase["seconds"] for phase in result.history)
    return Measurement(result.accuracy, extras={**dataclasses.asdict(result), "run": name}, **usage)


def share_rounds(recipe: Recipe, directory: Path, seed: int) -> None:
    """Give a run of IMP the rounds that one like it, but for its keep ratio, has finished beside it.

    The cuts before the last do not depend on where they end, nor does their training: the run takes the rounds for its
    own, with their time and gradient evaluations, and goes on after them.
    """
    wanted = {**yaml.safe_load(to_yaml(recipe)), "seed": seed}
    for file in sorted(directory.parent.glob("*/config.yaml")):
        other = yaml.safe_load(file.read_text(encoding="utf-8"))
        if {name: other.get(name) for name in wanted} != {**wanted, "keep": other.get("keep")}:
            continue
        both = zip(*(imp_keep_schedule(keep, recipe.prune_rate) for keep in (recipe.keep, other["keep"])), strict=False)
        for number, _ in enumerate(itertools.takewhile(lambda cuts: cuts[0] == cuts[1], both), 1):
            done, ours = (run / "checkpoints" / f"round-{number}.safetensors" for run in (file.parent, directory))
            if done.exists() and not ours.exists():
                with atomic_write(ours) as copy:
                    copy.write(done.read_bytes())


def _dense_accuracy(directory: Path) -> Measurement:
    _, about = load_model(directory)
    return Measurement(
        about["accuracy"], extras={"accuracy": about["accuracy"], "passes": 0, "keep": 1.0, "history": []}
    )


def dense_run(recipe: Recipe, seed: int, options: RunOptions, folder: Path) -> Path:
    """The folder of the dense training that all arms of a seed start from, trained by whoever comes first.

    Its name holds a digest of all that dense training reads: another batch size or data set is another network.
    """
    dense = dataclasses.replace(recipe, **_dense_part(recipe))
    name = f"dense-{recipe.arch}-{recipe.data.name}-{config_digest(dense)}-seed{seed}"
    directory = folder / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / f".{name}.lock"):
        if not (directory / "checkpoints" / "last.safetensors").exists():
            with Run("bip", dense, dataclasses.replace(options, name=name), parent=folder / "runs") as run:
                run_recipe(run, dense)
    return directory


def _dense_part(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what only pruning reads, so that every arm's dense training is the same."""
    kept = {"arch", "batch_size", "data", "dense", "rewind_epoch"}
    defaults = {f.name: getattr(Recipe(), f.name) for f in dataclasses.fields(Recipe) if f.name not in kept}
    return {**defaults, "method": "dense"}


# -- choosing values ------------------------------------------------------------------------------------------------------


def sweep(recipe: Recipe, options: RunOptions, grid: dict[str, list[Any]], seeds: int = 3, jobs: int = 0) -> None:
    """Run a recipe at every point of a grid of its values, judged on held-out training images.

    The result, best point first, is printed and written to ``sweep.json`` in the run's folder. The test images are
    never looked at: ``--data.validation`` must say which part of the training images takes their place.

    Args:
        grid: the values of every option that varies, as '{"lr": [0.1, 0.01]}'.
        seeds: how many, from 0 on, the same at every point.
        jobs: runs at the same time; 0: one a core on the CPU, one on a GPU.

    """
    if not recipe.data.validation:
        raise UserError("sweep chooses values, which the test images must not do: add --data.validation 0.2")
    metric, request = Metric("validation accuracy", "%"), Request(seeds=seeds, jobs=jobs)
    compare_points("bip", "sweep", recipe, grid_points(grid), metric, request, options, measure)


# -- figures --------------------------------------------------------------------------------------------------------------


def figures(claims: Sequence[Claim], outcomes: Sequence[Outcome], folder: Path) -> list[ReportFigure]:
    """Accuracy against sparsity of every network, accuracy against gradient evaluations, and the overlap of the masks.

    The last two show the sparsest claim that compares most methods.
    """
    import matplotlib.pyplot as plt  # noqa: PLC0415 - slow to import, needed once the runs are done

    metric = {claim.id: claim.metric.name for claim in claims}
    accurate = [outcome for outcome in outcomes if metric[outcome.claim] == "test accuracy"]
    if not accurate:
        return []
    sparsest = max(accurate, key=lambda outcome: (len(outcome.arms), -_keep(outcome)))
    where = {claim.id: f"{claim.model} on {claim.data}" for claim in claims}
    drawn = []
    with figure_style():
        for network in dict.fromkeys(where[outcome.claim] for outcome in accurate):
            figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
            _accuracy_against_sparsity(axes, [outcome for outcome in accurate if where[outcome.claim] == network])
            drawn.append(
                ReportFigure(
                    figure,
                    title="Accuracy against sparsity",
                    caption=f"{network}: mean over the seeds, bars span one standard deviation; dotted, the dense network.",
                    alt=f"Test accuracy of every method at every sparsity, {network}",
                )
            )
        figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
        _accuracy_against_cost(axes, sparsest)
        drawn.append(
            ReportFigure(
                figure,
                title="Accuracy against gradient evaluations",
                caption=f"{sparsest.claim}, every seed: where each method ends; thin lines are IMP on its way, by round.",
                alt="Test accuracy against the number of forward-backward passes",
            )
        )
        overlap = _overlaps(sparsest, folder)
        if overlap:
            figure, axes = plt.subplots(figsize=(5.2, 4.4), layout="constrained")
            _overlap_matrix(axes, *overlap)
            chance = expected_iou(_keep(sparsest))
            drawn.append(
                ReportFigure(
                    figure,
                    title="Overlap of the masks",
                    caption=f"{sparsest.claim}: intersection over union, mean over the seeds; by chance {chance:.2f}.",
                    alt="Matrix of mask overlaps between methods",
                )
            )
    return drawn


def _keep(outcome: Outcome) -> float:
    """The keep ratio that a claim's method ended at."""
    points = _points(outcome, outcome.method)
    return points[0][1]["keep"] if points else 1.0


def _points(outcome: Outcome, arm: str) -> list[tuple[float, Mapping[str, Any]]]:
    """(accuracy, extras) of the seeds of an arm that gave a value."""
    result = outcome.arms[arm]
    return [(value, extras) for value, extras in zip(result.values, result.extras, strict=True) if value is not None]


def _colours(arms: Iterable[str]) -> dict[str, str]:
    return dict(zip(arms, itertools.cycle(COLOURS)))


def _accuracy_against_sparsity(axes: "Axes", outcomes: Sequence[Outcome]) -> None:
    arms = dict.fromkeys(arm for outcome in outcomes for arm in outcome.arms if arm != "dense")
    for arm, colour in _colours(arms).items():
        found: dict[float, tuple[float, float]] = {}
        for outcome in outcomes:
            if arm in outcome.arms and _points(outcome, arm):
                result = outcome.arms[arm]
                found[100 * (1 - _points(outcome, arm)[0][1]["keep"])] = (result.mean or 0.0, result.std or 0.0)
        sparsity = sorted(found)
        mean, std = [found[s][0] for s in sparsity], [found[s][1] for s in sparsity]
        axes.errorbar(sparsity, mean, yerr=std, marker="o", capsize=3, label=arm, color=colour)
    dense = [value for outcome in outcomes if "dense" in outcome.arms for value, _ in _points(outcome, "dense")]
    if dense:
        axes.axhline(sum(dense) / len(dense), linestyle=":", color="0.4", label="dense")
    axes.set_xlabel("pruned weights, %")
    axes.set_ylabel("test accuracy, %")
    axes.legend()


def _accuracy_against_cost(axes: "Axes", outcome: Outcome) -> None:
    for arm, colour in _colours(arm for arm in outcome.arms if arm != "dense").items():
        points = _points(outcome, arm)
        passes = [extras["passes"] for _, extras in points]
        axes.plot(passes, [value for value, _ in points], "o", color=colour, label=arm)
        for _, extras in points:
            rounds = [entry for entry in extras["history"] if entry["passes"] > 0]
            if len(rounds) > 1:
                path = [entry["passes"] for entry in rounds], [entry["accuracy"] for entry in rounds]
                axes.plot(*path, "-", color=colour, alpha=0.4, linewidth=1)
    axes.set_xlabel("gradient evaluations after dense training")
    axes.set_ylabel("test accuracy, %")
    axes.legend()


def _overlaps(outcome: Outcome, folder: Path) -> tuple[list[str], list[list[float]]] | None:
    """Arms, and the mean overlap between every two of them over the seeds."""
    runs = {
        arm: {
            seed: extras["run"]
            for seed, value, extras in zip(outcome.seeds, result.values, result.extras, strict=True)
            if value is not None and "run" in extras
        }
        for arm, result in outcome.arms.items()
    }
    arms = [arm for arm, names in runs.items() if names]
    if len(arms) < 2:
        return None
    masks = {}
    for name in itertools.chain.from_iterable(names.values() for names in runs.values()):
        model, _ = load_model(folder / "runs" / name)
        masks[name] = {n: getattr(module, attribute) != 0 for n, module, attribute in prunable_weights(model)}

    def overlap(first: str, second: str) -> float:
        pairs = [mask_iou(masks[name], masks[runs[second][s]]) for s, name in runs[first].items() if s in runs[second]]
        return sum(pairs) / len(pairs) if pairs else math.nan

    return arms, [[overlap(first, second) for second in arms] for first in arms]


def _overlap_matrix(axes: "Axes", arms: list[str], matrix: list[list[float]]) -> None:
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(arms)), arms, rotation=45, ha="right")
    axes.set_yticks(range(len(arms)), arms)
    axes.grid(False)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
    axes.figure.colorbar(image, ax=axes, label="intersection over union")
