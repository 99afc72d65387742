"""The verbs around training: masks to files, analyses, the plain network, the compact one."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenfold_shared.checkpoint import atomic_write, save_weights
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions
from tenfold_tost.analysis import loss_gradient_norm, loss_slice, top_eigenvalue
from tenfold_tost.compat import to_official
from tenfold_tost.data import DataConfig, load_data
from tenfold_tost.evaluate import check_fit, load_model, weights_file, zero_filters, zero_rates
from tenfold_tost.export import save_compact, sparsify
from tenfold_tost.ghosts import has_ghosts
from tenfold_tost.maskfiles import mask_report, save_masks
from tenfold_tost.masking import density, hamming_distance, masks_from_zeros
from tenfold_tost.maskmaking import TICKETS
from tenfold_tost.models import create_model, normalizes_inside
from tenfold_tost.recipe import Recipe
from tenfold_tost.train import Session, ticket


@dataclasses.dataclass
class AnalyseConfig:
    """On what to analyse networks."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The images."""
    batch: int = 200
    """How many of them, from the training images."""


def make_mask(recipe: Recipe, options: RunOptions, file: Path = Path("mask.safetensors")) -> None:
    """Make the recipe's mask, print its layers and write it for ``train --mask.method file --mask.file FILE``; a ticket
    with the weights that it is rewound to, from which ``--mask.weights FILE`` trains it.

    Its run has a folder of its own, the name followed by "-mask", in which a ticket's training is kept.

    Args:
        file: where to: .safetensors.

    """
    if recipe.mask.method in ("dense", "file"):
        raise UserError(f"--mask.method {recipe.mask.method} makes no mask: choose another method")
    _check_name("--file", file, ".safetensors")
    named = dataclasses.replace(options, name=f"{options.name or f'run-seed{options.seed}'}-mask")
    with Run("tost", recipe, named) as run:
        try:
            with torch.device("meta"):
                raw = normalizes_inside(create_model(recipe.arch))
            session = Session(run, recipe, load_data(recipe.data, recipe.batch_size, run, raw))
            model = session.fresh()
            check_fit(model, session.data, recipe.data.name)
            if recipe.mask.method in TICKETS:
                model, masks = ticket(session)
            else:
                masks = session.mask(model)
        except UserError:
            raise
        except ValueError as error:  # of the method, as in training
            raise UserError(str(error)) from error
        if run.is_main:
            save_masks(file, masks, model.state_dict() if recipe.mask.method in TICKETS else None)
            print("\n".join(mask_report(model, masks)))
            print(f"{100 * density(masks):.2f} % of the weights remain; written to {file}")


def _check_name(option: str, path: Path, suffix: str) -> None:
    """Refuse a name that would later be read as another kind of file than is written."""
    if path.suffix != suffix:
        raise UserError(f"{option} {path}: the file is read again by its name, which has to end in {suffix}")


def analyse(*checkpoints: str, config: AnalyseConfig, options: RunOptions) -> None:
    """Print one JSON line a checkpoint: zeros by layer, zero filters, the gradient's norm, the Hessian's top eigenvalue
    and the loss along its eigenvector, on a batch of training images; then the Hamming distances of the masks.

    Args:
        checkpoints: runs' folders or files.

    """
    if not checkpoints:
        raise UserError("analyse takes one or more run folders or weight files")
    masks = {}
    with Run.evaluation("tost", options) as run:
        for name in checkpoints:
            model, _ = load_model(Path(name))
            loaded = load_data(config.data, config.batch, run, normalizes_inside(model))
            check_fit(model, loaded, config.data.name)
            model = model.to(run.device)
            images, labels = next(iter(loaded.scoring.epoch(0)))
            value, vector = top_eigenvalue(model, images, labels)
            line = {
                "checkpoint": name,
                "zero_rates": zero_rates(model, images),
                "zero_filters_90": zero_filters(model, 0.9),
                "zero_filters_95": zero_filters(model, 0.95),
                "gradient_norm": loss_gradient_norm(model, images, labels),
                "top_eigenvalue": value,
                "loss_slice": loss_slice(model, images, labels, vector, [-0.5, -0.25, 0.0, 0.25, 0.5]),
            }
            print(json.dumps(line))
            masks[name] = masks_from_zeros(model)
    names = list(masks)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            try:
                distance = hamming_distance(masks[first], masks[second])
            except ValueError as error:
                raise UserError(f"{first} and {second}: {error}") from error
            print(json.dumps({"masks": [first, second], "hamming_distance": distance}))


def finalize(checkpoint: Path, output: Path, official: bool = False) -> None:
    """Write the plain network of a checkpoint: as safetensors, or with --official in the authors' layout (torch.save).

    A network that was trained to keep its ghosts is refused: it is another function without them.

    Args:
        checkpoint: a run's folder or a file.
        output: where to.
        official: write the authors' layout.

    """
    if not official:
        _check_name("--output", output, ".safetensors")
    elif output.suffix in (".safetensors", ".npz"):
        raise UserError(f"--output {output}: the authors' layout is a torch file: let its name end in .pth.tar")
    model, about = load_model(checkpoint)
    if has_ghosts(model):
        raise UserError(f"{checkpoint} keeps its ghosts, so it has no plain network: train with fading ghosts")
    if official:
        with atomic_write(output) as file:
            torch.save(to_official(model, acc=float(about.get("accuracy", 0.0))), file)
    else:
        save_weights(output, model.state_dict(), about)
    print(f"{output}: {len(model.state_dict())} tensors, {sum(p.numel() for p in model.parameters())} parameters")


def export(checkpoint: Path, output: Path = Path("compact.safetensors"), batch: int = 64, rounds: int = 5) -> None:
    """Write the sparse network without its zeros and print, as one JSON line, what that saves: bytes of the file, and
    the time of a batch with dense and with sparse convolutions, measured in turns.

    Args:
        checkpoint: a run's folder or a file.
        output: where to: .safetensors.
        batch: images at a time.
        rounds: how often each way is timed.

    """
    if batch < 1 or rounds < 1:
        raise UserError(f"--batch and --rounds take 1 or more, got {batch} and {rounds}")
    _check_name("--output", output, ".safetensors")
    model, about = load_model(checkpoint)
    if has_ghosts(model):
        raise UserError(f"{checkpoint} keeps its ghosts: only a plain network is exported")
    save_compact(output, model, **about)
    sparse = sparsify(model)
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    images = torch.rand(batch, channels, *((8, 8) if channels == 1 else (32, 32)))
    model.eval()
    seconds = in_turns({"dense": lambda: model(images), "sparse": lambda: sparse(images)}, rounds)
    with torch.inference_mode():
        difference = float((model(images) - sparse(images)).abs().max())
    saved: dict[str, Any] = {
        "output": str(output),
        "bytes_dense": sum(t.numel() * t.element_size() for t in model.state_dict().values()),
        "bytes_compact": output.stat().st_size,
        "seconds_dense": seconds["dense"],
        "seconds_sparse": seconds["sparse"],
        "largest_difference": difference,
    }
    if weights_file(checkpoint).is_file():
        saved["bytes_checkpoint"] = weights_file(checkpoint).stat().st_size
    print(json.dumps(saved))


def in_turns(arms: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Shortest seconds of each arm. They take turns, so that a busy machine disturbs all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name, arm in arms.items():
                start = time.perf_counter()
                arm()
                if turn:  # the first turn warms up
                    times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}
