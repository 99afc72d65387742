"""What a network is worth and what it costs: accuracy, sparsity, operations (section 9); masks against masks; shrinking."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from tenfold_bip.compat import class_count, load_official_checkpoint, load_official_state, recognise_architecture
from tenfold_bip.data import Data, DataConfig, DataName, Evaluation, load_evaluation
from tenfold_bip.ledger import flops
from tenfold_bip.masking import (
    MaskedWeight,
    bake_masks,
    expected_iou,
    fix_masks,
    keep_ratio,
    kept_per_layer,
    mask_iou,
    prunable_weights,
)
from tenfold_bip.models import create_model
from tenfold_shared.checkpoint import atomic_write, load_weights
from tenfold_shared.errors import UserError
from tenfold_shared.images import Batches, StreamedBatches
from tenfold_shared.run import Run, RunOptions


@dataclasses.dataclass
class EvalConfig:
    """What to evaluate."""

    checkpoint: Path
    """A run's folder, a .safetensors file of ours, or a .pth.tar or .pt file of the authors' layout."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The images."""
    batch_size: int = 256
    """Images at a time in each process."""
    arch: str = ""
    """Architecture, where the checkpoint's keys do not tell."""
    keep: float = 0.0
    """Keep ratio of an authors' checkpoint with scores (it does not hold its own); 0: evaluate it dense."""
    structure: Literal["", "global", "filter", "channel"] = ""
    """Which masks an authors' checkpoint has, where only convolutions have scores; otherwise its keys tell."""

    def __post_init__(self) -> None:
        """Refuse a ratio that is none."""
        if not 0.0 <= self.keep <= 1.0:
            raise UserError(f"--keep is the fraction of the weights that remains, in (0, 1], or 0; got {self.keep}")
        if self.batch_size < 1:
            raise UserError(f"--batch_size takes 1 or more, got {self.batch_size}")


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Batches | StreamedBatches, run: Run) -> Tensor:
    """Top-1 accuracy in per cent over all processes, every sample counted once; stays on the device."""
    training = model.training
    model.eval()
    correct = torch.zeros((), device=run.device)
    for images, labels in batches.epoch(0):
        if len(labels):
            correct += (model(images).argmax(1) == labels).sum()
    model.train(training)
    return 100.0 * run.reduce(correct) / batches.samples


def has_masks(model: nn.Module) -> bool:
    """Whether any weight of a model is masked."""
    return any(isinstance(module, MaskedWeight) for module in model.modules())


def weights_file(checkpoint: Path) -> Path:
    """The weights of a run's folder, or the file itself."""
    return checkpoint / "checkpoints" / "last.safetensors" if checkpoint.is_dir() else checkpoint


def load_model(checkpoint: Path, arch: str = "", keep: float = 0.0, structure: str = "") -> tuple[nn.Module, dict]:
    """The network of a checkpoint with its mask fixed, and what the checkpoint says about itself.

    Ours hold z = m * theta, so the mask is where the weights are not zero.

    Raises:
        UserError: unreadable, or of no known architecture (the keys that do not fit are named), or masked otherwise.

    """
    try:
        return _load_model(checkpoint, arch, keep, structure)
    except ValueError as error:  # an unknown architecture, a keep ratio that leaves a layer empty
        raise UserError(str(error)) from error


def _load_model(checkpoint: Path, arch: str, keep: float, structure: str) -> tuple[nn.Module, dict]:
    path = weights_file(checkpoint)
    if path.suffix == ".safetensors":
        if keep or structure:
            raise UserError(f"--keep and --structure are of an authors' checkpoint; {path} holds the weights it kept")
        state, metadata = load_weights(path)
        arch = arch or metadata.get("arch") or recognise_architecture(state)
        model = create_model(arch, metadata.get("classes") or class_count(state))
        load_official_state(model, state, arch)
        masks = {name: getattr(module, attribute) != 0 for name, module, attribute in prunable_weights(model)}
        masked = metadata.pop("masked", None)  # files of others do not say which layers count, so those that are cut do
        pruned = {n: mask for n, mask in masks.items() if (n in masked if masked is not None else not bool(mask.all()))}
        return fix_masks(model, pruned) if pruned else model, {**metadata, "arch": arch}
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give a run's folder, a .safetensors or a .pth.tar file")
    model = load_official_checkpoint(path, arch or None, keep=keep or 1.0, structure=structure or None)
    if (keep or structure) and not has_masks(model):
        raise UserError(f"--keep and --structure: {path} has no scores to make a mask of")
    return model, {"arch": arch or "recognised by its keys"}


def evaluate(config: EvalConfig, options: RunOptions) -> None:
    """Print accuracy, sparsity and operations of a checkpoint as one JSON line."""
    model, about = load_model(config.checkpoint, config.arch, config.keep, config.structure)
    with Run.evaluation("bip", options) as run:
        data = load_evaluation(config.data, config.batch_size, run)
        check_fit(model, data, config.data.name)
        model = run.prepare(model)
        reached = accuracy(model, data.evaluation, run).item()
        if run.is_main:
            print(json.dumps({**about, "accuracy": reached, **costs(run.unwrap(model), data.shape)}))


def check_fit(model: nn.Module, data: Data | Evaluation, name: str) -> None:
    """Refuse a network that takes images of other channels than the data set has, or tells apart other classes.

    Raises:
        UserError: naming both.
    """
    _check_channels(model, data.shape[0], name, "choose another --arch or --data.name")
    heads = [module.out_features for module in model.modules() if isinstance(module, nn.Linear)]
    if heads and heads[-1] != data.classes:
        raise UserError(
            f"the network tells {heads[-1]} classes apart and {name} has {data.classes}: "
            "choose another checkpoint or --data.name"
        )


def _check_channels(model: nn.Module, channels: int, name: str, advice: str) -> None:
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None and first.in_channels != channels:
        raise UserError(f"the network takes images of {first.in_channels} channels and {name} has {channels}: {advice}")


def costs(model: nn.Module, shape: tuple[int, ...]) -> dict[str, object]:
    """Keep ratio over the prunable weights and over all parameters, kept weights by layer, operations of the dense and the
    sparse network.
    """
    device = next(model.parameters()).device
    operations = flops(model, torch.zeros(1, *shape, device=device))
    kept = kept_per_layer(model) if has_masks(model) else {}
    return {
        "keep": keep_ratio(model) if kept else 1.0,
        "keep_of_all_parameters": keep_ratio(model, "all") if kept else 1.0,
        "flops_dense": operations.dense,
        "flops_sparse": operations.sparse,
        "kept_per_layer": {name: list(count) for name, count in kept.items()},
    }


def compare_masks(
    *checkpoints: str, keep: float = 0.0, structure: Literal["", "global", "filter", "channel"] = ""
) -> None:
    """Print the overlap (intersection over union) of the masks of every two checkpoints, what chance would give, and the
    overlap layer by layer.

    Args:
        checkpoints: runs' folders or files, two or more.
        keep: keep ratio of the authors' checkpoints with scores among them.
        structure: which masks those have, where only convolutions have scores.

    """
    if len(set(checkpoints)) < 2 or len(set(checkpoints)) < len(checkpoints):
        raise UserError("compare-masks takes two or more different run folders, .safetensors or .pth.tar files")
    masks = {name: _masks(Path(name), keep, structure) for name in checkpoints}
    for first, second in itertools.combinations(checkpoints, 2):
        keeps = [
            sum(int(m.sum()) for m in masks[n].values()) / sum(m.numel() for m in masks[n].values())
            for n in (first, second)
        ]
        try:
            overlap = mask_iou(masks[first], masks[second])
        except ValueError as error:
            raise UserError(f"{first} and {second}: {error}") from error
        print(f"{first}  {second}  IoU {overlap:.4f}  by chance {expected_iou(*keeps):.4f}")
        for layer in masks[first]:
            print(f"  {layer}  IoU {mask_iou(*({layer: masks[n][layer]} for n in (first, second))):.4f}")


def _masks(checkpoint: Path, keep: float, structure: str) -> dict[str, Tensor]:
    EvalConfig(checkpoint, keep=keep)
    official = weights_file(checkpoint).suffix != ".safetensors"
    model, _ = load_model(checkpoint, keep=keep if official else 0.0, structure=structure if official else "")
    if official and has_masks(model) and not keep:
        raise UserError(f"{checkpoint} has scores and does not hold its keep ratio: give --keep")
    return {n: getattr(module, attribute) != 0 for n, module, attribute in prunable_weights(model)}


SHAPES: dict[DataName, tuple[int, int, int]] = {
    "digits": (1, 8, 8),
    "mnist": (1, 28, 28),
    "fashion-mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "cifar100": (3, 32, 32),
    "tiny-imagenet": (3, 64, 64),
    "imagenet": (3, 224, 224),
}
"""Channels, height and width of the sets whose images have one size."""


def shrink(
    checkpoint: Path,
    output: Path = Path("shrunk.pt2"),
    data: DataName | None = None,
    keep: float = 0.0,
    structure: Literal["", "global", "filter", "channel"] = "",
) -> None:
    """Remove the pruned filters and channels of a structured checkpoint and write the small network with torch.export.

    Args:
        checkpoint: a run's folder or a file.
        output: the small network: .pt2.
        data: the images that the small network takes, where the checkpoint does not say.
        keep: keep ratio of an authors' checkpoint with scores.
        structure: which masks that has, where only convolutions have scores.

    """
    from tenfold_bip.shrink import shrink as remove  # noqa: PLC0415 - torch.fx and torch.export are slow to import

    EvalConfig(checkpoint, keep=keep)
    if not output.resolve().parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.resolve().parent}; make it or choose another")
    model, about = load_model(checkpoint, keep=keep, structure=structure)
    model = bake_masks(model) if has_masks(model) else model
    shape = about.get("shape") if data is None else SHAPES.get(data)
    if shape is None:
        raise UserError(f"--data: say which images the network takes, one of {', '.join(SHAPES)}")
    _check_channels(model, shape[0], data or "its data", "choose another --data")
    example = torch.zeros(2, *shape)
    try:
        with torch.no_grad():
            model.eval()(example)
    except RuntimeError as error:
        size = " x ".join(map(str, shape))
        raise UserError(f"the network does not take images of {size}: choose another --data") from error
    small = remove(model, example)
    batch = torch.export.Dim("batch", max=2**31 - 1)  # PyTorch 2.6 cannot export sliced shortcuts without a bound
    program = torch.export.export(small, (example,), dynamic_shapes=({0: batch},), strict=False)
    try:
        with atomic_write(output) as file:
            torch.export.save(program, file)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from error
    before, after = (sum(p.numel() for p in network.parameters()) for network in (model, small))
    print(f"{output}: {after} of {before} parameters remain")
