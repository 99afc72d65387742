"""Accuracy on the tasks seen, clean and under attack (section 9), and the verb `eval` on a checkpoint."""

import dataclasses
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from tenfold_cilqud.compat import load_official_state, read_official, recognise
from tenfold_cilqud.data import DataConfig, load_data, pixels
from tenfold_cilqud.decisions import add_decision, decision_of
from tenfold_cilqud.models import IncrementalNet, create_model
from tenfold_cilqud.protocol import Samples, new_samples
from tenfold_shared.attacks import held, pgd
from tenfold_shared.checkpoint import load_weights
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions, derived_seed

Sets = Sequence[Samples]
"""Images and incremental labels of each task."""


@dataclasses.dataclass
class Evaluation:
    """How a state is tested."""

    attack: Literal["none", "pgd", "ensemble", "autoattack"] = "none"
    """Robust accuracy after every task: PGD on the cross entropy; the ensemble of AutoAttack's four parts (Auto-PGD on
    two losses, FAB, Square); or AutoAttack from the package autoattack, which needs four classes: with fewer the ensemble
    takes its place."""
    final: Literal["none", "ensemble", "autoattack"] = "none"
    """A stronger attack besides, after the last task."""
    eps: float = 8 / 255
    """Radius of the ball in pixels of [0, 1]."""
    step_size: float = 2 / 255
    """Length of a PGD step."""
    steps: int = 20
    """PGD steps; also those of the ensemble's Auto-PGD and FAB, of which AutoAttack takes 100."""
    restarts: int = 1
    """PGD's random starts; an image counts as robust if it withstands all."""
    targets: int = 9
    """Wrong classes that the ensemble aims at, the likeliest first."""
    queries: int = 5000
    """Queries of the ensemble's Square."""
    images: int = 0
    """Test images of each task that are attacked, the first ones of every class in equal shares; 0 attacks all."""
    batch_size: int = 500
    """Images at a time."""

    def __post_init__(self) -> None:
        """Refuse what is no test."""
        if min(self.eps, self.step_size, self.steps, self.targets, self.queries, self.images) < 0:
            raise UserError("--evaluation.eps, step_size, steps, targets, queries and images cannot be negative")
        if self.restarts < 1 or self.batch_size < 1:
            raise UserError(
                f"--evaluation.restarts and batch_size take 1 or more, got {self.restarts} and {self.batch_size}"
            )
        for name in ("attack", "final"):
            if getattr(self, name) == "autoattack" and importlib.util.find_spec("autoattack") is None:
                raise UserError(
                    f"--evaluation.{name} autoattack needs the package autoattack: install it, or take ensemble"
                )


@torch.no_grad()
def predictions(net: IncrementalNet, images: Tensor, tasks: int, batch_size: int = 500) -> Int[Tensor, " n"]:
    """The incremental class of every image among those of the first `tasks` tasks, in eval mode."""
    training = net.training
    net.eval()
    found = [net.scores(pixels_as(net, part), tasks).argmax(1) for part in images.split(batch_size)]
    net.train(training)
    return torch.cat(found)


def pixels_as(net: IncrementalNet, images: Tensor) -> Tensor:
    """Images in [0, 1] where the network lies, in its precision."""
    weight = next(net.parameters())
    return pixels(images).to(weight.device, weight.dtype)


def hits(net: IncrementalNet, sets: Sets, tasks_seen: int, batch_size: int = 500) -> list[Tensor]:
    """Which of each task's images are right, by the greatest score over all classes seen."""
    return [predictions(net, images, tasks_seen, batch_size).cpu() == labels.cpu() for images, labels in sets]


def percent(right: Tensor) -> float:
    """How many of them hold, in per cent."""
    return 100.0 * float(right.double().mean())


def task_accuracies(net: IncrementalNet, sets: Sets, tasks_seen: int, batch_size: int = 500) -> list[float]:
    """Accuracy in per cent on each task's images."""
    return [percent(right) for right in hits(net, sets, tasks_seen, batch_size)]


def withstood(
    net: IncrementalNet, x: Tensor, y: Int[Tensor, " b"], tasks: int, settings: Evaluation, seed: int
) -> Tensor:
    """Which images [b] are still classified as `y` whatever the attack tries; the same decision over the classes seen."""

    def score(images: Tensor) -> Tensor:
        return net.scores(images, tasks)

    with held(net), torch.no_grad():
        alive = score(x).argmax(1) == y
        classes = tasks * net.classes_per_task
        if settings.attack == "autoattack" and classes >= 4:
            return alive & _autoattack(score, x, y, classes, settings, seed)
        if settings.attack in ("ensemble", "autoattack"):
            from tenfold_cilqud.ensemble import withstands_ensemble  # noqa: PLC0415

            return withstands_ensemble(
                score,
                x,
                y,
                alive,
                eps=settings.eps,
                steps=settings.steps,
                targets=settings.targets,
                queries=settings.queries,
                seed=seed,
            )
        for restart in range(settings.restarts):
            rows = alive.nonzero().squeeze(1)
            if not len(rows):
                break
            images, labels = x[rows], y[rows]
            delta = pgd(
                lambda attacked, labels=labels: cross_entropy(score(attacked), labels, reduction="sum"),  # type: ignore[misc]
                images,
                eps=settings.eps,
                step_size=settings.step_size,
                steps=settings.steps,
                generator=torch.Generator().manual_seed(derived_seed(seed, "restart", restart)),
            )
            alive[rows] = score(images + delta).argmax(1) == labels
    return alive


def _autoattack(score, x: Tensor, y: Tensor, classes: int, settings: Evaluation, seed: int) -> Tensor:
    from autoattack import AutoAttack  # noqa: PLC0415 - optional

    adversary = AutoAttack(score, norm="Linf", eps=settings.eps, version="standard", device=x.device, verbose=False)
    adversary.seed = seed
    # Its nine targets are for ten classes and more.
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = min(9, classes - 1)
    with torch.enable_grad():
        attacked = adversary.run_standard_evaluation(x, y, bs=len(x))
    return score(attacked).argmax(1) == y


def robust_accuracies(net: IncrementalNet, sets: Sets, tasks_seen: int, settings: Evaluation, seed: int) -> list[float]:
    """Accuracy under attack in per cent on each task's images."""
    rows = []
    for task, (images, labels) in enumerate(sets):
        attacked = shared_out(labels, settings.images) if settings.images else torch.arange(len(labels))
        right = 0
        for part, rows_of_part in enumerate(attacked.split(settings.batch_size)):
            x, own = pixels_as(net, images[rows_of_part]), labels[rows_of_part]
            right += int(
                withstood(net, x, own.to(x.device), tasks_seen, settings, derived_seed(seed, task, part)).sum()
            )
        rows.append(100.0 * right / len(attacked))
    return rows


def shared_out(labels: Int[Tensor, " n"], count: int) -> Int[Tensor, " m"]:
    """Which `count` rows (all where there are fewer) are taken, ascending: the first of every class, then the second of
    every class, and so on, since a test set lists its images class after class.
    """
    turn = torch.empty_like(labels)
    for label in labels.unique():
        own = labels == label
        turn[own] = torch.arange(int(own.sum()), device=labels.device)
    return turn.argsort(stable=True)[:count].sort().values


# --- the verb ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class EvalConfig:
    """What to evaluate."""

    checkpoint: Path
    """A run's folder, a .safetensors file of ours, or a .pt file of the released layout."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The images; the class order of one of our checkpoints is its own."""
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    """How to test."""
    seen: int = 0
    """Tasks that the state has seen; 0: what the checkpoint or a released file's name, task{k}_*, says, or all."""


def load_checkpoint(
    checkpoint: Path, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)
) -> tuple[IncrementalNet, dict]:
    """The network of a checkpoint in eval mode, and what the checkpoint says about itself.

    Released files are recognised by their keys and do not say how images are normalised: `mean` and `std` are for them.

    Raises:
        UserError: unreadable, or of no known form (the keys that do not fit are named).

    """
    path = checkpoint / "checkpoints" / "last.safetensors" if checkpoint.is_dir() else checkpoint
    if path.suffix == ".safetensors":
        state, about = load_weights(path)
        if "arch" not in about:
            layout = recognise(state)
            net: IncrementalNet = layout.build(mean=mean, std=std)
            about = {"arch": "recognised by its keys", **dataclasses.asdict(layout)}
        else:
            net = create_model(
                about["arch"],
                about["classes_per_task"],
                about["tasks"],
                shape=tuple(about["shape"]),
                width=about["width"],
                mean=about["mean"],
                std=about["std"],
            )
        add_decision(net, decision_of(state))
        load_official_state(net, state)
        return net.eval(), about
    state = read_official(path)
    layout = recognise(state)
    net = layout.build(mean=mean, std=std)
    load_official_state(net, state)
    return net.eval(), {"arch": "recognised by its keys", **dataclasses.asdict(layout)}


def evaluate(config: EvalConfig, options: RunOptions) -> None:
    """Print the accuracy of a checkpoint on every task seen, their mean, the accuracy on all images together, and that of
    each class, as one JSON line; of a released state also its layout, as its keys and shapes tell it.
    """
    net, about = load_checkpoint(config.checkpoint)
    # The split of the images and the number of tasks are the run's.
    data = load_data(dataclasses.replace(config.data, tasks=net.tasks), about.get("seed", options.seed))
    if "mean" not in about:
        net, about = load_checkpoint(config.checkpoint, data.mean, data.std)
    order = tuple(about.get("class_order", data.order))
    named = re.match(r"task(\d+)_", config.checkpoint.name)
    named_seen = int(named[1]) + 1 if named and "seen" not in about else 0
    seen = config.seen or named_seen or about.get("seen", net.tasks)
    per_task = net.classes_per_task
    if sorted(order) != list(range(len(data.names))) or not 1 <= seen <= net.tasks:
        raise UserError(
            f"the checkpoint has {net.tasks} tasks of {per_task} classes, {config.data.name} has {len(data.names)} "
            f"classes and {seen} tasks are asked for: choose another --data.name or --seen"
        )
    if seen > about.get("seen", net.tasks):
        raise UserError(f"--seen {seen}: the checkpoint has seen {about['seen']} tasks, its later heads are untrained")
    if len(data.names) != net.tasks * per_task:
        raise UserError(
            f"the checkpoint is about {net.tasks * per_task} classes, {config.data.name} has {len(data.names)}"
        )
    # A released state tells the number of channels alone.
    shape = tuple(about["shape"]) if "shape" in about else (about["in_channels"], *data.shape[1:])
    if shape != data.shape:
        raise UserError(
            f"the network takes images of {shape} (channels, height, width), those of {config.data.name} are {data.shape}: "
            "choose another --data.name"
        )
    with Run.evaluation("cilqud", options) as run:
        if named_seen and not config.seen and run.is_main and not run.options.quiet:
            print(
                f"note: {config.checkpoint.name} has seen {seen} of {net.tasks} tasks by its name and is tested on these; "
                "--seen takes another number",
                file=sys.stderr,
            )
        net = net.to(run.device)
        split = data.test if config.data.evaluate_on == "test" else data.validation
        sets = [new_samples(split, order, task, per_task) for task in range(seen)]
        right = hits(net, sets, seen, config.evaluation.batch_size)
        rows = [percent(own) for own in right]
        every, labels = torch.cat(right), torch.cat([labels.cpu() for _, labels in sets])
        found = {"arch": about["arch"], "seen": seen, "per_task": rows, "accuracy": sum(rows) / len(rows)}
        if "pruned" in about:
            found["layout"] = {name: value for name, value in about.items() if name != "arch"}
        found["pooled_accuracy"] = percent(every)
        found["per_class"] = {data.names[order[k]]: percent(every[labels == k]) for k in range(seen * per_task)}
        for name, attack in (("robust", config.evaluation.attack), ("final", config.evaluation.final)):
            if attack != "none":
                chosen = dataclasses.replace(config.evaluation, attack=attack)
                robust = robust_accuracies(net, sets, seen, chosen, options.seed)
                found |= {f"{name}_per_task": robust, f"{name}_accuracy": sum(robust) / len(robust)}
        if run.is_main:
            print(json.dumps(found))
