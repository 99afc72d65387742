"""What a network is worth (section 9): standard, robust and verified accuracy, unstable neurons, the verifier's time."""

import contextlib
import copy
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tenfold_grafting.arithmetic import exact_arithmetic
from tenfold_grafting.attacks import robust_mask
from tenfold_grafting.bounds import crown_margins, margin_spec, relaxations
from tenfold_grafting.compat import load_recognised
from tenfold_grafting.data import DataConfig, load_data, normalisation, resolve
from tenfold_grafting.grafting import graft
from tenfold_grafting.graph import Graph, Normalise, trace
from tenfold_grafting.intervals import ibp_margins
from tenfold_grafting.networks import create_network
from tenfold_grafting.records import recorded
from tenfold_grafting.scores import activation_intervals
from tenfold_grafting.specification import Property, ball, check_eps, check_labels, pixel_box
from tenfold_grafting.verify import VerifySettings, verify
from tenfold_grafting.workers import over_processes
from tenfold_grafting.zoo import load_network
from tenfold_shared.checkpoint import load_weights
from tenfold_shared.errors import RunFailure, UserError
from tenfold_shared.run import Run, RunOptions


@dataclasses.dataclass
class Evaluation:
    """What is measured, and on how many images."""

    eps: float = 0.1
    """Radius of the balls, in pixel units."""
    images: int = 0
    """Images for accuracies, CROWN and unstable neurons; 0: all of the evaluation set."""
    verify_images: int = 20
    """The first images, which the verifier decides; 0: none, -1: as many as `images`."""
    attack: Literal["pgd", "auto"] = "pgd"
    """Attack of the robust accuracy: PGD, or APGD on three losses."""
    attack_steps: int = 100
    """Its steps."""
    attack_restarts: int = 5
    """Its restarts."""
    attack_step: float = 0.0
    """Length of a PGD step; 0: eps / 4."""
    bounds: Literal["ibp", "crown-ibp", "crown"] = "crown"
    """Bounds of the incomplete verified accuracy and of the unstable neurons."""
    verify: VerifySettings = dataclasses.field(default_factory=VerifySettings)
    """The verifier."""
    jobs: int = 1
    """Images that the verifier decides at the same time, in a process each; 0: one a core, or four on a GPU."""

    def __post_init__(self) -> None:
        """Refuse a radius or numbers that mean nothing."""
        check_eps(self.eps)
        if self.images < 0 or self.verify_images < -1 or self.attack_restarts < 1 or self.attack_steps < 0:
            raise UserError("--evaluation takes 0 or more images and steps, and at least one restart")
        if self.jobs < 0 or self.attack_step < 0:
            raise UserError("--evaluation.jobs and --evaluation.attack_step take 0 or more")


@dataclasses.dataclass
class EvalConfig:
    """What to evaluate."""

    checkpoint: Path
    """A run's folder, a .safetensors file of ours, a .pth, .pth.tar or .pt of the authors', or a verification .npz."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The images."""
    arch: str = ""
    """Architecture, where the checkpoint's keys do not tell."""
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    """What is measured."""


def weights_file(checkpoint: Path) -> Path:
    """The weights of a run's folder, or the file itself."""
    return checkpoint / "checkpoints" / "last.safetensors" if checkpoint.is_dir() else checkpoint


def load_model(
    checkpoint: Path, data: DataConfig | None = None, arch: str = ""
) -> tuple[nn.Sequential, dict[str, Any]]:
    """Normalisation and network of a checkpoint, and what the checkpoint says about itself.

    A released checkpoint does not say how its pixels are normalised: what is taken for it is told on stderr.

    Args:
        checkpoint: see `EvalConfig`.
        data: the normalisation that is asked for, or the data set whose own an authors' checkpoint has.
        arch: architecture of an authors' checkpoint, by default recognised by its keys; any other names its own.

    Raises:
        UserError: unreadable, of no known architecture (the keys that do not fit are named), or of another than `arch`.

    """
    data = data or DataConfig()
    path = weights_file(resolve(checkpoint))
    if path.suffix == ".npz":
        model, about = load_network(path)
    elif path.suffix == ".safetensors":
        model, about = _own_checkpoint(path)
    else:
        found = load_recognised(path, arch or None)
        name, first = normalisation(data, _channels(found.model), found.arch)
        model, about = nn.Sequential(first, found.model), {"arch": found.arch}
        print(f"{path}: {found.arch} with the normalisation {name}; --data.normalisation chooses", file=sys.stderr)
    if arch and isinstance(about["arch"], str) and about["arch"] != arch:
        raise UserError(f"{path} holds {about['arch']}, not {arch}: give --arch {about['arch']}")
    if data.normalisation:
        _, model[0] = normalisation(data, _channels(model[1]))
    return model.eval(), about


def _own_checkpoint(path: Path) -> tuple[nn.Sequential, dict[str, Any]]:
    state, about = load_weights(path)
    if not {"arch", "mean", "std"} <= set(about):
        raise UserError(f"{path} does not say which network it holds: it was not written by this package")
    network = create_network(about["arch"], about["classes"])
    masks = {key.removesuffix(".mask"): mask for key, mask in state.items() if key.endswith(".mask")}
    network = graft(network, masks) if masks else network
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit {about['arch']}: {' '.join(str(error).split())[:300]}") from error
    return nn.Sequential(Normalise(about["mean"], about["std"]), network), about


def _channels(network: nn.Module) -> int:
    """Of the images that a network takes; MNIST's alone begins with a linear layer."""
    first = next(m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    return first.in_channels if isinstance(first, nn.Conv2d) else 1


def evaluate(config: EvalConfig, options: RunOptions) -> None:
    """Print accuracies, verified accuracies and unstable neurons of a checkpoint as one JSON line.

    The unstable-neuron ratio is a mean over all images that are evaluated, whatever the attacks and the verifier say.
    """
    check_precision(options)
    model, about = load_model(config.checkpoint, config.data, config.arch)
    data = load_data(config.data)
    with Run.evaluation("grafting", options) as run:
        check_fit(model, data.shape)
        count = config.evaluation.images or None
        images, labels = data.test.pixels(count)
        found = measure_network(model.to(run.device), images.to(run.device), labels.to(run.device), config.evaluation)
        for name in ("verifier_seconds", "call_seconds"):
            found.pop(name)
        if run.is_main:
            known = {key: about[key] for key in ("arch", "method", "selection") if key in about}
            print(json.dumps({**known, **found}))


def check_precision(options: RunOptions) -> None:
    """Refuse a precision in which nothing could be verified.

    Raises:
        UserError: another than fp32.

    """
    if options.precision != "fp32":
        raise UserError(
            f"--precision {options.precision} is for training: accuracies are measured in single precision and bounds in "
            "that of --verify.arithmetic"
        )


def check_fit(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Refuse images that the network does not take.

    Raises:
        UserError: naming the shape.

    """
    try:
        with torch.no_grad():
            weight = next(model.parameters())
            model(torch.zeros(1, *shape, dtype=weight.dtype, device=weight.device))
    except RuntimeError as error:
        raise UserError(
            f"the network does not take images of shape {shape}: choose another checkpoint or --data.name "
            f"({' '.join(str(error).split())[:160]})"
        ) from error


@torch.no_grad()
def standard_accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Clean top-1 accuracy in per cent."""
    weight = next(model.parameters())
    parts = [model(part.to(weight)).argmax(1) for part in images.split(500)]
    return 100 * float((torch.cat(parts) == labels).double().mean())


def measure_network(
    model: nn.Module,
    images: Float[Tensor, "n channels height width"],
    labels: Int[Tensor, " n"],
    evaluation: Evaluation,
    record: Path | None = None,
) -> dict[str, Any]:
    """SA, RA, incomplete and complete VA in per cent of all images considered, UNR over all, and the verifier's statuses.

    With a record, see `decided`.

    Raises:
        RunFailure: an image is verified and attacked at once, or VA <= RA <= SA does not hold on the same images.

    """
    training = model.training
    model.eval()
    try:
        return _measured(model, images, labels, evaluation, record)
    finally:
        model.train(training)


def _measured(model: nn.Module, images: Tensor, labels: Tensor, e: Evaluation, record: Path | None) -> dict[str, Any]:
    weight = next(model.parameters())
    graph = trace(copy.deepcopy(model).double(), images.shape[1:])  # before anything is folded, in single precision
    check_labels(labels, graph.classes)
    parts = []
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        parts.append(
            robust_mask(
                model,
                x.to(weight),
                y,
                e.eps,
                kind=e.attack,
                steps=e.attack_steps,
                restarts=e.attack_restarts,
                step=e.attack_step or None,
            )
        )
    robust = torch.cat(parts)
    proved, unstable = bounded(graph, images, labels, e.eps, e.bounds)
    if bool((proved & ~robust).any()):
        raise RunFailure("an image is verified by its bounds and attacked as well: the engine is unsound here")
    found: dict[str, Any] = {
        "images": len(images),
        "eps": e.eps,
        "sa": standard_accuracy(model, images, labels),
        "ra": 100 * float(robust.double().mean()),
        "bounds": e.bounds,
        "incomplete_va": 100 * float(proved.double().mean()),
        "unr": 100 * sum(unstable) / graph.neurons,
        "unr_images": "all",
        "unstable_per_layer": unstable,
    }
    count = len(images) if e.verify_images < 0 else min(e.verify_images, len(images))
    return found | decided(graph, images[:count], labels[:count], e, record, robust)


def bounded(
    graph: Graph, images: Tensor, labels: Tensor, eps: float, bounds: Literal["ibp", "crown-ibp", "crown"]
) -> tuple[Bool[Tensor, " n"], list[float]]:
    """What bounds alone say, in the graph's arithmetic.

    Returns:
        Which images are classified correctly and proved robust, and the mean number of unstable, ungrafted neurons of
        every activation layer, over all images.

    """
    proved = []
    unstable = dict.fromkeys(graph.activations, 0.0)
    with torch.no_grad(), exact_arithmetic():
        for x, y in zip(images.split(20), labels.split(20), strict=True):
            box, spec = pixel_box(graph, x, eps), margin_spec(y, graph.classes)
            intervals = activation_intervals(graph, x, eps, bounds)
            for index, interval in intervals.items():
                unstable[index] += float(graph.activation(index).unstable(*interval).sum()) / len(images)
            if bounds == "ibp":
                lower = ibp_margins(graph, box, spec)
            else:
                lower = crown_margins(graph, box, spec, relaxations(graph, intervals))
            proved.append((lower > 0).all(1) & (graph(x).argmax(1) == y))
    return torch.cat(proved), list(unstable.values())


def decided(
    graph: Graph,
    images: Tensor,
    labels: Tensor,
    e: Evaluation,
    record: Path | None = None,
    robust: Bool[Tensor, " n"] | None = None,
) -> dict[str, Any]:
    """The verifier's statuses, verified accuracy and times on images.

    A record takes one JSON line an image as soon as it is decided; what has a line already is not decided again.

    Raises:
        RunFailure: an image is verified whose label another attack changed: it is not among the `robust`.

    """
    lines = {} if record is None else recorded(record)
    with torch.no_grad():
        right = torch.cat([graph(x).argmax(1) == y for x, y in zip(images.split(100), labels.split(100), strict=True)])
    for i in (~right).nonzero(as_tuple=True)[0].tolist():
        lines[i] = {"index": i, "status": "wrong", "seconds": 0.0, "domains": 0}
    tasks = (
        (i, ball(x, y, e.eps, graph.classes), e.verify)
        for i, (x, y) in enumerate(zip(images.cpu(), labels.tolist(), strict=True))
        if i not in lines
    )
    with contextlib.ExitStack() as stack:
        file = None if record is None else stack.enter_context(record.open("a", encoding="utf-8"))
        for _, line in over_processes(_verified_line, graph, tasks, e.jobs):
            lines[line["index"]] = line
            if file is not None:
                file.write(json.dumps(line) + "\n")
                file.flush()
    for index, line in lines.items():
        if robust is not None and line["status"].startswith("verified") and not bool(robust[index]):
            raise RunFailure(f"image {index} is verified and attacked as well: the engine is unsound here")
    statuses: dict[str, int] = {}
    for line in lines.values():
        statuses[line["status"]] = statuses.get(line["status"], 0) + 1
    calls = [line["seconds"] for _, line in sorted(lines.items()) if line["status"] not in ("wrong", "attacked")]
    proved = [line["seconds"] for _, line in sorted(lines.items()) if line["status"].startswith("verified")]
    return {
        "verify_images": len(images),
        "time_limit": e.verify.timeout,
        "domain_limit": e.verify.max_domains,
        "va": 100 * len(proved) / len(images) if len(images) else None,
        "statuses": statuses,
        "domains": sum(line["domains"] for line in lines.values()),
        "verifier_seconds": proved,
        "call_seconds": calls,
        "seconds_per_call": sum(calls) / len(calls) if calls else None,
    }


def _verified_line(graph: Graph, index: int, prop: Property, settings: VerifySettings) -> dict[str, Any]:
    return {"index": index} | verify(graph, prop.to(graph.device), settings).plain()
