"""Two clouds, a small network with batch norm and, on request, a loss that turns NaN."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tenfold_shared.checkpoint import load_weights
from tenfold_shared.claims import Arm, Claim, Measurement, Outcome
from tenfold_shared.cli import load_recipe
from tenfold_shared.download import data_root
from tenfold_shared.errors import UserError
from tenfold_shared.report import ReportFigure
from tenfold_shared.reproduction import Request, reproduce_claims
from tenfold_shared.run import Run, RunOptions


@dataclasses.dataclass
class Optimiser:
    """SGD."""

    lr: float = 0.1
    """Learning rate."""


@dataclasses.dataclass
class Recipe:
    """A run of the toy."""

    data: str = "embedded"
    """``embedded``, or ``clouds`` from the data root."""
    steps: int = 40
    """Optimiser steps."""
    norm: bool = True
    """Whether to use batch norm."""
    nan_at: int = -1
    """The step whose loss is NaN."""
    pause: float = 0.0
    """Seconds that a step sleeps."""
    optimiser: Optimiser = dataclasses.field(default_factory=Optimiser)
    """The optimiser."""

    def __post_init__(self) -> None:
        """Refuse a run without steps."""
        if self.steps < 1:
            raise UserError(f"--steps takes 1 or more, got {self.steps}")


def clouds(data: str) -> tuple[Tensor, Tensor]:
    """Points and labels."""
    if data != "embedded":
        raise UserError(f"the data set {data} is not in {data_root()}: fetch it and put it there")
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 2
    return torch.randn(256, 4, generator=generator) + labels[:, None], labels


def network(norm: bool) -> nn.Sequential:
    """The network."""
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.ReLU(), nn.Linear(16, 2))


def train(recipe: Recipe, options: RunOptions) -> None:
    """Fit the network."""
    with Run("toy", recipe, options) as run:
        fit(run, recipe)


def fit(run: Run, recipe: Recipe) -> nn.Module:
    """The loop."""
    points, labels = (tensor.to(run.device) for tensor in clouds(recipe.data))
    model = network(recipe.norm)
    optimiser = torch.optim.SGD(model.parameters(), recipe.optimiser.lr, momentum=0.9)
    model, optimiser = run.prepare(model, optimiser)
    for step in run.steps("train", recipe.steps, model=model, optimiser=optimiser):
        time.sleep(recipe.pause)
        order = torch.randperm(len(points), generator=torch.Generator().manual_seed(step))[:32]
        batch = order[run.rank :: run.world]
        loss = nn.functional.cross_entropy(model(points[batch]), labels[batch])
        loss = loss * (float("nan") if step == recipe.nan_at else 1.0)
        optimiser.zero_grad()
        run.backward(loss)
        optimiser.step()
        run.log(loss=run.reduce(loss.detach(), "mean"))
    run.complete("last", model, norm=recipe.norm)
    return model


def accuracy(model: nn.Module) -> float:
    """Per cent of the points on the right side."""
    points, labels = clouds("embedded")
    with torch.inference_mode():
        return 100 * (model.eval()(points).argmax(1) == labels).float().mean().item()


def evaluate(checkpoint: Path, options: RunOptions) -> None:
    """Accuracy of a checkpoint.

    Args:
        checkpoint: a run's folder or a file.

    """
    tensors, kept = load_weights(
        checkpoint if checkpoint.is_file() else checkpoint / "checkpoints" / "last.safetensors"
    )
    model = network(kept["norm"])
    model.load_state_dict(tensors)
    print(f"accuracy {accuracy(model):.2f} %")


def measure(claim: Claim, arm: Arm, seed: int, *, options: RunOptions, folder: Path) -> Measurement:
    """One arm with one seed."""
    recipe = load_recipe("tenfold_toy", arm.recipe, Recipe, **arm.options)
    with Run("toy", recipe, dataclasses.replace(options, name=f"{arm.name}-seed{seed}"), parent=folder / "runs") as run:
        model = fit(run, recipe)
        return Measurement(accuracy(model.cpu()), **run.usage())


def figures(claims: Sequence[Claim], outcomes: Sequence[Outcome], folder: Path) -> list[ReportFigure]:
    """Nothing but bars."""
    import matplotlib.figure  # noqa: PLC0415

    figure = matplotlib.figure.Figure(figsize=(4, 2))
    axes = figure.add_subplot()
    axes.bar(list(outcomes[0].arms), [arm.mean or 0 for arm in outcomes[0].arms.values()])
    return [ReportFigure(figure, title="Accuracy", caption="Accuracy of the arms.", alt="two bars")]


def reproduce(*claims: str, request: Request, options: RunOptions) -> None:
    """Compare the arms.

    Args:
        claims: their names.

    """
    reproduce_claims("toy", claims, request, options, measure, figures)
