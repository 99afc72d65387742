"""How much the error rises when a trained field is perturbed (sections 9 and 11): curves over the radius, by level."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold_augnerf.attack import Step, attack
from tenfold_augnerf.data import Data, load_data
from tenfold_augnerf.evaluate import OtherData, data_of, load_renderer, placed, rays_at_once, views_of
from tenfold_augnerf.objective import Objective, Starts, random_starts
from tenfold_augnerf.perturbation import KEYS, radius
from tenfold_augnerf.renderer import Renderer
from tenfold_augnerf.views import Views
from tenfold_shared.checkpoint import write_json
from tenfold_shared.errors import UserError
from tenfold_shared.report import COLOURS, figure_style
from tenfold_shared.run import Run, RunOptions, derived_seed

LEVELS: dict[str, tuple[str, ...]] = {
    "coordinates": ("pts_c", "pts_f"),
    "features": ("feat_c", "feat_f"),
    "samples": ("raw_c", "raw_f"),
}
RADII: dict[str, tuple[float, ...]] = {
    "coordinates": (0.125, 0.25, 0.5, 1.0),
    "features": (0.01, 0.02, 0.05, 0.1),
    "samples": (0.05, 0.1, 0.2, 0.4),
}


def error_under(
    renderer: Renderer,
    views: Views,
    pixels: Tensor,
    eps: Mapping[str, float],
    *,
    worst: bool,
    iterations: int = 1,
    seed: int = 0,
) -> float:
    """Mean squared error of pixels under perturbations of given radii: the worst found, or a random one."""
    geometry = renderer.geometry(*views.size, len(views))
    steps = {}
    for key, value in eps.items():
        epsilon = radius(key, value, geometry)
        steps[key] = Step(epsilon, 1.25 * epsilon / iterations, iterations)
    objective, total = Objective(0.0), 0.0
    for number, part in enumerate(pixels.split(rays_at_once(renderer, pixels.device, training=True))):
        rays, truth = views.rays(part), views.truth(part)
        draw = torch.Generator(pixels.device).manual_seed(derived_seed(seed, "sharpness", number))
        starts = random_starts(steps, geometry, len(part), draw, truth.dtype, zero=False)

        def loss(delta: Mapping[str, Tensor], rays=rays, truth=truth) -> Tensor:
            return objective(renderer(rays, delta), truth)

        whole = slice(0, len(part))

        def begin(number: int, starts: Starts = starts, whole: slice = whole) -> Mapping[str, Tensor]:
            return starts(number, whole)

        found = attack(loss, begin, steps) if worst else dict(starts(0, whole))
        with torch.no_grad():
            total += float(loss(found).sum())
    return total / len(pixels)


def curves(
    renderer: Renderer,
    views: Views,
    *,
    radii: Mapping[str, Sequence[float]] = RADII,
    rays: int = 1024,
    iterations: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """The error of some of the views' rays, clean and by level and radius, under the worst and a random perturbation.

    Args:
        renderer: any, also of other codes' checkpoints.
        views: usually the test views.
        radii: by level, in the units of `perturbation.KEYS`.
        rays: how many, drawn once for all radii.
        iterations: ascent steps.
        seed: of the rays and the starts.

    """
    height, width = views.size
    draw = torch.Generator().manual_seed(derived_seed(seed, "sharpness"))
    pixels = torch.randperm(len(views) * height * width, generator=draw)[:rays].to(views.colours.device)
    was_training = renderer.training
    renderer.eval()
    rows: dict[str, Any] = {"clean": error_under(renderer, views, pixels, {}, worst=False), "levels": {}}
    for level, values in radii.items():
        keys = [key for key in LEVELS[level] if renderer.sampling.fine or KEYS[key].which != "coarse"]
        rows["levels"][level] = [
            {
                "eps": value,
                "worst": error_under(
                    renderer, views, pixels, dict.fromkeys(keys, value), worst=True, iterations=iterations, seed=seed
                ),
                "random": error_under(renderer, views, pixels, dict.fromkeys(keys, value), worst=False, seed=seed),
            }
            for value in values
        ]
    renderer.train(was_training)
    return rows


@dataclasses.dataclass
class SharpnessConfig:
    """What to probe."""

    checkpoint: Path
    """A run's folder or a checkpoint file, ours or of the released layouts."""
    data: OtherData = dataclasses.field(default_factory=OtherData)
    """The pictures."""
    split: str = "test"
    """Views whose error is looked at."""
    rays: int = 1024
    """Rays, drawn from all views."""
    iterations: int = 1
    """Ascent steps."""


def sharpness(config: SharpnessConfig, options: RunOptions) -> None:
    """Write the curves of a checkpoint as `sharpness.json` and `sharpness.png`, and print them."""
    if config.rays < 1 or config.iterations < 1:
        raise UserError(f"--rays {config.rays} and --iterations {config.iterations}: take 1 or more")
    data: Data = load_data(data_of(config.checkpoint, config.data))
    views = views_of(data, config.split)
    renderer, _ = load_renderer(config.checkpoint, data)
    with Run.evaluation("augnerf", options) as run:
        rows = curves(
            placed(renderer, run),
            views.to(run.device),
            rays=config.rays,
            iterations=config.iterations,
            seed=options.seed,
        )
    folder = options.output / "augnerf" / (options.name or "sharpness")
    write_json(folder / "sharpness.json", rows)
    draw(rows, folder / "sharpness.png")
    for level, points in rows["levels"].items():
        for point in points:
            print(json.dumps({"level": level, **point, "clean": rows["clean"]}))
    print(f"written to {folder}")


def draw(rows: Mapping[str, Any], path: Path) -> None:
    """The curves as a picture: rise of the error over the clean one."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 - slow to import

    with figure_style():
        figure, panels = plt.subplots(1, len(rows["levels"]), figsize=(4 * len(rows["levels"]), 3.2))
        for axes, (level, points) in zip(panels, rows["levels"].items(), strict=True):
            eps = [point["eps"] for point in points]
            for kind, colour in zip(("worst", "random"), COLOURS, strict=False):
                axes.plot(eps, [point[kind] - rows["clean"] for point in points], "o-", color=colour, label=kind)
            axes.set_title(level)
            axes.set_xlabel("radius")
        panels[0].set_ylabel("rise of the squared error")
        panels[0].legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)
