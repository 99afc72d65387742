"""What a network is worth and what it costs (section 9): accuracy, non-zero weights, multiply-adds; ERF; export."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tenfold_shared.batches import Batches, StreamedBatches
from tenfold_shared.checkpoint import load_weights
from tenfold_shared.cli import as_trained
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions
from tenfold_slak.compat import check_state, holds_segmenter, load_official_checkpoint, read_content, weights_file
from tenfold_slak.data import (
    EMBEDDED,
    EVALUATION_BATCH,
    DataConfig,
    DataName,
    chosen_images,
    embedded_sets,
    load_evaluation,
    pictures,
)
from tenfold_slak.layer import LargeKernel, merge_large_kernels
from tenfold_slak.macs import count_macs, count_parameters
from tenfold_slak.masks import maskable_parameters
from tenfold_slak.models import create_network


@dataclasses.dataclass
class EvalData:
    """The images to evaluate on; None: those of the training. Of segmenters and detectors the root alone is read."""

    name: DataName | None = None
    """The set; default: what the checkpoint was trained on, where it says so."""
    root: Path | None = None
    """Folder of the data set, looked for here and in the data root."""
    download: bool = False
    """Fetch the data set when it is not there (CIFAR)."""
    validation: float = 0.0
    """Evaluate on the fraction of the training images that a training with this option and the same --seed held out."""
    size: int | None = None
    """Side of the images, pixels; default: the training's, 224 on another set."""
    workers: int = 8
    """Processes that decode images."""


def data_of(about: Mapping[str, Any], asked: EvalData) -> DataConfig:
    """The data of a checkpoint's training, changed in what is asked for; another set begins at its defaults.

    Raises:
        UserError: neither says which.

    """
    trained = about.get("data") or {}
    if asked.name is None and not trained:
        raise UserError("the checkpoint does not say what it was trained on: name the images by --data.name")
    return as_trained(DataConfig, trained, asked)


@dataclasses.dataclass
class EvalConfig:
    """What to evaluate."""

    checkpoint: Path
    """A run's folder, a .safetensors file of ours, or a .pth file of the authors (looked for in the data root too)."""
    data: EvalData = dataclasses.field(default_factory=EvalData)
    """The images; default: those of the training."""
    batch_size: int = EVALUATION_BATCH
    """Images at a time in each process; segmenters and detectors take one."""
    weights: Literal["last", "ema"] = "last"
    """Of a run's folder: the weights of the last step, or their moving average. Of the authors': model or model_ema."""
    merge: bool = False
    """Merge the branches of the large-kernel layers first, which changes nothing but the speed."""


class Accuracy(NamedTuple):
    """Over all processes, every image counted once; tensors on the device."""

    top1: Tensor  # per cent
    top5: Tensor
    loss: Tensor  # mean cross-entropy


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Batches | StreamedBatches, run: Run) -> Accuracy:
    """Top-1 and top-5 accuracy and the plain cross-entropy, in eval mode."""
    training = model.training
    model.eval()
    sums = torch.zeros(3, device=run.device)
    for images, labels in batches.epoch(0):
        if not len(labels):
            continue
        with run.accelerator.autocast():
            scores = model(images)
        scores = scores.float()
        ranked = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
        loss = cross_entropy(scores, labels, reduction="sum")
        sums += torch.stack([ranked[:, 0].sum(), ranked.sum(), loss])
    model.train(training)
    sums = run.reduce(sums) / batches.samples
    return Accuracy(100 * sums[0], 100 * sums[1], sums[2])


class Checkpoint(NamedTuple):
    """A file of weights, read."""

    path: Path
    content: Any  # of ours a state dict; of others whatever they hold
    about: dict[str, Any]  # what our files say of themselves; nothing of others
    weights: str | None  # which of the weights in a file from elsewhere; None: those it has

    @property
    def task(self) -> str:
        """What the network does: `classify`, `segment` or `detect`."""
        if not self.about:
            return "segment" if holds_segmenter(self.content, self.weights) else "classify"
        return str(self.about.get("task", "classify"))


def read_checkpoint(checkpoint: Path, weights: Literal["last", "ema"] = "last") -> Checkpoint:
    """What a run's folder, a weights file of ours or a released file holds.

    Raises:
        UserError: there is none, or it is damaged.

    """
    path = weights_file(checkpoint)
    if path.is_dir():
        path = path / "checkpoints" / f"{weights}.safetensors"
    if not path.is_file():
        what = "it keeps no moving average" if weights == "ema" else "the run has not ended"
        raise UserError(f"there is no checkpoint {path}: {what}")
    if path.suffix != ".safetensors" or _from_elsewhere(path):
        return Checkpoint(path, read_content(path), {}, "model_ema" if weights == "ema" else None)
    if weights == "ema" and path.stem != "ema":
        raise UserError(
            f"{path} holds one set of weights: for the moving average give the run's folder or its ema.safetensors"
        )
    return Checkpoint(path, *load_weights(path), None)


def load_model(checkpoint: Path, weights: Literal["last", "ema"] = "last") -> tuple[nn.Module, dict[str, Any]]:
    """A classifier from a run's folder, a weights file of ours or a released file, and what is known about it.

    Raises:
        UserError: there is none, it is damaged, or its keys do not fit, which are listed.

    """
    return classifier(read_checkpoint(checkpoint, weights))


def classifier(read: Checkpoint) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a checkpoint, and what is known about it; see `load_model`."""
    if not read.about:
        return load_official_checkpoint(read.content, weights=read.weights), {"arch": "released"}
    if read.task != "classify":
        raise UserError(
            f"{read.path} holds a network for {read.task}, which eval takes and nothing else; this takes a classifier"
        )
    with refusals(str(read.path)):
        model = create_network(read.about["arch"], **read.about["arguments"])
    fill(model, read)
    return model, read.about


def fill(model: nn.Module, read: Checkpoint) -> None:
    """Give a network the weights of a file of ours.

    Raises:
        UserError: they do not fit, the keys are listed.

    """
    try:
        check_state(model.state_dict(), read.content)
    except UserError as error:
        raise UserError(f"{read.path}: {error}") from error
    model.load_state_dict(read.content)


def _from_elsewhere(path: Path) -> bool:
    """Whether a safetensors file is sound but none of ours, which say their architecture."""
    try:
        with safe_open(path, "pt") as file:
            return "arch" not in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False  # `load_weights` says what is wrong


def evaluate(config: EvalConfig, options: RunOptions) -> None:
    """Print what a checkpoint is worth and what it costs as one JSON line.

    A classifier's accuracy and loss, a segmenter's mean IoU, or a detector's average precisions.
    """
    read = read_checkpoint(config.checkpoint, config.weights)
    if read.task != "classify":
        from tenfold_slak.evaluate_downstream import evaluate_downstream  # noqa: PLC0415 - it imports this module

        evaluate_downstream(read, config, options)
    else:
        _evaluate_classifier(read, config, options)


def _evaluate_classifier(read: Checkpoint, config: EvalConfig, options: RunOptions) -> None:
    model, about = classifier(read)
    images = data_of(about, config.data)
    with Run.evaluation("slak", options) as run:
        data = load_evaluation(images, run, config.batch_size)
        check_fit(model, data.shape, data.classes, images.name)
        with refusals(f"--checkpoint {config.checkpoint}"):
            counted = costs(model, data.shape)
        model = run.prepare(merge_large_kernels(model) if config.merge else model)
        reached = accuracy(model, data.batches, run)
        if run.is_main:
            values = {name: value.item() for name, value in reached._asdict().items()}
            print(json.dumps({"arch": about["arch"], "data": images.name, **values, **counted}))


def check_fit(model: nn.Module, shape: tuple[int, int, int], classes: int, name: str) -> None:
    """Refuse images that the network cannot take.

    Raises:
        UserError: naming what does not fit.

    """
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    if first.in_channels != shape[0]:
        raise UserError(
            f"the network takes images of {first.in_channels} channels and {name} has {shape[0]}: "
            "choose other data or another checkpoint"
        )
    minimum = getattr(model, "minimum_size", 1)
    if min(shape[1:]) < minimum:
        raise UserError(
            f"the network needs images of at least {minimum} x {minimum} pixels and {name} has {shape[1]} x {shape[2]}"
        )
    outputs = getattr(model, "num_classes", classes)
    if outputs != classes:
        raise UserError(f"the network tells {outputs} classes apart and {name} has {classes}")


def costs(model: nn.Module, shape: tuple[int, int, int] | None) -> dict[str, Any]:
    """Parameters and multiply-adds of one image, stored and non-zero, and the density of every maskable weight.

    Args:
        model: any.
        shape: of the image; None where its content decides how much is computed: multiply-adds are left out.

    """
    parameters = count_parameters(model)
    macs = None if shape is None else count_macs(model, (shape[1], shape[2]), shape[0])
    return {
        "parameters": parameters.stored,
        "parameters_nonzero": parameters.nonzero,
        **({} if macs is None else {"macs": macs.stored, "macs_nonzero": macs.nonzero}),
        "density": {
            name: float(torch.count_nonzero(weight)) / weight.numel()
            for name, weight in maskable_parameters(model).items()
        },
    }


@contextlib.contextmanager
def refusals(subject: str) -> Iterator[None]:
    """Tell what the method, timm or PyTorch refuse in one sentence that begins with the subject."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, AssertionError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{subject}: {reason}") from error


def _at_least_one(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise UserError(f"--{name} takes 1 or more, got {value}")


def _make_room(output: Path, *endings: str) -> None:
    """See before anything is computed that the file can be written."""
    if output.suffix not in endings:
        raise UserError(f"--output {output}: the ending says what to write, {' or '.join(endings)}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror}): choose another folder") from error


def _check_image(model: nn.Module, size: int, channels: int | None = None, name: str = "the image") -> int:
    """Refuse square images that the network cannot take; returns their channels."""
    if channels is None:
        channels = next(module for module in model.modules() if isinstance(module, nn.Conv2d)).in_channels
    check_fit(model, (channels, size, size), getattr(model, "num_classes", 0), name)
    return channels


# -- verbs -------------------------------------------------------------------------------------------------------------


def erf(
    checkpoint: Path,
    output: Path = Path("erf.png"),
    data: DataName = "pictures",
    root: Path | None = None,
    size: int = 1024,
    images: int = 50,
) -> None:
    """Draw the effective receptive field of a checkpoint and print the squares that hold given shares of it.

    The paper takes 50 validation images: of `imagenet`, `folder` or CIFAR (below `root`, or in the data root) that many
    are drawn. From 384 pixels on they are resized to `size` (bicubic), as the eight pictures always are.

    Args:
        checkpoint: a run's folder or a file.
        output: the picture: .png, .svg or .pdf.
        data: where the images come from.
        root: where `imagenet`, `folder` or CIFAR lie.
        size: side length of the images, in pixels.
        images: how many, at most.

    """
    from tenfold_slak.erf import effective_receptive_field, plot  # noqa: PLC0415

    _at_least_one(size=size, images=images)
    _make_room(output, ".png", ".svg", ".pdf")
    model, _ = load_model(checkpoint)
    if data == "pictures":
        resized = (
            torch.nn.functional.interpolate(picture[None].float() / 255, (size, size), mode="bicubic")
            for picture in pictures()[:images]
        )
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        batches = [(picture - mean) / std for picture in resized]
    elif data in EMBEDDED:
        batches = [embedded_sets(data)[1].images[:images].float() / 255]
    else:
        validation = chosen_images(DataConfig(name=data, root=root, size=size), False, 0)
        drawn = torch.randperm(len(validation), generator=torch.Generator().manual_seed(0))[:images]
        batches = [validation[index][0][None] for index in drawn.tolist()]
    _check_image(model, batches[0].shape[-1], batches[0].shape[1], data)
    with refusals(f"--checkpoint {checkpoint}"):
        field = effective_receptive_field(model, batches)
    plot({checkpoint.name: field}, output)
    squares = {str(share): square._asdict() for share, square in field.rectangles.items()}
    count = sum(len(batch) for batch in batches)
    print(json.dumps({"size": batches[0].shape[-1], "images": count, "squares": squares}))
    print(f"drawn to {output}")


def export(
    checkpoint: Path, output: Path = Path("slak.onnx"), size: int = 224, form: Literal["two", "one"] = "two"
) -> None:
    """Merge the branches of a checkpoint's layers and write it as ONNX (.onnx) or as a torch.export program (.pt2).

    Args:
        checkpoint: a run's folder or a file.
        output: the file; its ending says which of the two.
        size: side length of the images it will take, in pixels.
        form: every large-kernel layer as two convolutions, or as one of the whole kernel.

    """
    from tenfold_slak.export import branch_scores, export_onnx, export_program, onnx_runs  # noqa: PLC0415 - slow to import

    _at_least_one(size=size)
    _make_room(output, ".onnx", ".pt2")
    model, _ = load_model(checkpoint)
    # Not zeros: on them no kernel could be merged wrongly.
    example = torch.randn(2, _check_image(model, size), size, size, generator=torch.Generator().manual_seed(0))
    ran = output.suffix == ".pt2" or onnx_runs()
    with refusals(f"--output {output}"), torch.no_grad():
        if output.suffix == ".onnx":
            scores = export_onnx(model, example, output, form)
        else:
            program = export_program(model, example, form)
            torch.export.save(program, output)
            scores = program.module()(example)
        difference = float((scores - branch_scores(model, example)).abs().max())
    what = "its scores differ" if ran else "not run, for want of onnxruntime; the scores of the merged network differ"
    print(f"{output}: written; {what} from those of the branches by {difference:.1e} at most")


def profile(
    arch: str = "", checkpoint: Path | None = None, size: int = 224, batch_size: int = 4, repeats: int = 5
) -> None:
    """Print, for every large-kernel layer and every other convolution or Linear, its multiply-adds and its time.

    Args:
        arch: a network of the package, by default slak_tiny; a checkpoint knows its own.
        checkpoint: a trained network in place of a fresh one.
        size: side length of the images, in pixels.
        batch_size: images at a time.
        repeats: how often each layer is timed.

    """
    from tenfold_slak.profile import profile_layers  # noqa: PLC0415

    _at_least_one(size=size, batch_size=batch_size, repeats=repeats)
    if arch and checkpoint is not None:
        raise UserError("profile takes --arch or --checkpoint, not both: a checkpoint knows its network")
    with refusals("--arch"):
        model = create_network(arch or "slak_tiny") if checkpoint is None else load_model(checkpoint)[0]
    _check_image(model, size)
    with refusals(f"--size {size}"):
        rows = profile_layers(model, size, batch_size, repeats)
    total = sum(row.seconds for row in rows)
    print(f"{'layer':44}{'MACs, M':>12}{'non-zero, M':>14}{'ms':>10}{'share':>8}{'GMAC/s':>10}")
    for row in rows:
        rate = batch_size * row.macs / row.seconds / 1e9 if row.seconds else 0.0
        print(
            f"{row.name:44}{row.macs / 1e6:12.2f}{row.macs_nonzero / 1e6:14.2f}{1e3 * row.seconds:10.3f}"
            f"{row.seconds / total:8.1%}{rate:10.2f}"
        )
    large = sum(row.seconds for row in rows if row.kind is LargeKernel)
    print(f"large-kernel layers: {large / total:.0%} of the time of all these layers")
