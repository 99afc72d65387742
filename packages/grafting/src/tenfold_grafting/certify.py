"""Certification as a product: one JSON line an image, resumable, over shards; export; overlap of masks."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor

from tenfold_grafting.compat import load_official_checkpoint
from tenfold_grafting.data import DataConfig, load_data, resolve
from tenfold_grafting.evaluate import check_precision, load_model
from tenfold_grafting.grafting import activation_shapes, grafted_masks
from tenfold_grafting.graph import Graph, trace
from tenfold_grafting.networks import architecture, create_network
from tenfold_grafting.onnx_io import read_onnx, write_onnx
from tenfold_grafting.records import complete_lines, recorded
from tenfold_grafting.selection import load_masks, overlap
from tenfold_grafting.specification import Property, ball, check_eps, check_pixels
from tenfold_grafting.verify import Verdict, VerifySettings, verified_radius, verify
from tenfold_grafting.vnnlib import read_vnnlib, write_vnnlib
from tenfold_grafting.workers import over_processes
from tenfold_shared.checkpoint import write_json
from tenfold_shared.cli import to_yaml
from tenfold_shared.errors import RunFailure, UserError
from tenfold_shared.provenance import environment
from tenfold_shared.run import Run, RunOptions


@dataclasses.dataclass
class CertifyConfig:
    """What to certify."""

    model: Path
    """A run's folder, a .safetensors file, an authors' checkpoint, a verification .npz, or an .onnx file."""
    property: Path | None = None
    """A VNN-LIB file; without one, the balls around the images of --data."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The images."""
    eps: float = 2 / 255
    """Radius of the balls, in pixel units."""
    bisections: int = 0
    """Balls that are decided to find an image's verified radius below --eps where that one is not; 0: none is looked for."""
    start: int = 0
    """First image."""
    end: int = 0
    """Image after the last; 0: all."""
    shard: int = 0
    """This process's share of the images, from 0."""
    shards: int = 1
    """Into how many shares the images are cut: every shards-th image is one."""
    jobs: int = 1
    """Images decided at the same time, in a process each; 0: one a core, or four on a GPU."""
    memory: float = 0.0
    """Largest memory of a process in GiB (on Linux); 0: no limit. An image that needs more gets the status "memory"."""
    arch: str = ""
    """Architecture of an authors' checkpoint, where its keys do not tell."""
    verify: VerifySettings = dataclasses.field(default_factory=VerifySettings)
    """The verifier."""

    def __post_init__(self) -> None:
        """Refuse what certifies nothing."""
        check_eps(self.eps)
        if not 0 <= self.shard < self.shards:
            raise UserError(f"--shard {self.shard} is not one of the {self.shards} shards, counted from 0")
        if self.start < 0 or self.end < 0 or self.memory < 0 or self.jobs < 0 or self.bisections < 0:
            raise UserError("--start, --end, --jobs, --memory and --bisections take 0 or more")
        if self.bisections and self.property is not None:
            raise UserError("--bisections changes the radius of an image's ball: leave out --property")


def certify(config: CertifyConfig, options: RunOptions) -> None:
    """Decide every image, append one JSON line each to ``results.jsonl``, keep counter-examples, print the summary.

    ``summary.json`` counts what all shards have written so far, and states the limits and the hardware; a folder has the
    results of one configuration, in one number of shards. With --resume, images that have a line already are left out.
    The exit code is 1 if a verdict contradicts an attack.
    """
    check_precision(options)
    folder = options.output / "grafting" / (options.name or f"certify-{config.model.stem}")
    _make(folder, "--output")
    suffix = f"-{config.shard}of{config.shards}" if config.shards > 1 else ""
    path = folder / f"results{suffix}.jsonl"
    with Run.evaluation("grafting", options) as run, _locked(path):
        graph = load_graph(config.model, config.data, config.arch).to(torch.float64, run.device)
        _claim(path, config, options)
        done = recorded(path)
        tasks = ((*problem, config, folder) for problem in _problems(config, graph, done))
        with path.open("a", encoding="utf-8") as file:
            for _, line in over_processes(_line, graph, tasks, config.jobs):
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
                done[line["index"]] = line
                if not options.quiet:
                    print(f"{line['index']}: {line['status']} in {line['seconds']:.2f} s", flush=True)
        files = sorted(folder.glob("results*.jsonl"))
        whole = list({line["index"]: line for file in files for line in complete_lines(file)[0]}.values())
        about = {"eps": None if config.property else config.eps, "environment": environment(run.device)}
        write_json(folder / "summary.json", summary(whole, config.verify) | about)
    print(json.dumps(summary(list(done.values()), config.verify)))


def _make(folder: Path, option: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use {folder}: {error.strerror}; choose another {option}") from error


def _locked(path: Path) -> Any:
    try:
        return filelock.FileLock(path.with_suffix(".lock"), timeout=0).acquire()
    except filelock.Timeout:
        raise UserError(f"{path} is in use by another process; wait for it or choose another --name") from None


def _claim(results: Path, config: CertifyConfig, options: RunOptions) -> None:
    """Refuse to mix the results of two configurations in one folder; shards differ in their number and their jobs alone."""
    saved = results.with_name("config.yaml")
    text = to_yaml(dataclasses.replace(config, shard=0, jobs=1))
    # A refused call leaves an empty file.
    held = [file for file in results.parent.glob("results*.jsonl") if file.stat().st_size]
    if results in held and not options.resume:
        raise UserError(f"{results} holds results already; add --resume to go on with it or choose another --name")
    if held and (not saved.exists() or saved.read_text(encoding="utf-8") != text):
        raise UserError(
            f"{saved}, with which {held[0].name} was written, differs from the configuration given "
            "in more than --shard and --jobs; choose another --name"
        )
    saved.write_text(text, encoding="utf-8")


def _out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: an image that needs more than there is stays undecided, the next may not."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def load_graph(model: Path, data: DataConfig, arch: str = "") -> Graph:
    """The graph of a checkpoint, folded in double precision, or of an ONNX file in its own; of pixels."""
    path = resolve(model)
    if path.suffix == ".onnx":
        if arch:
            raise UserError(f"{path} says itself which network it is: leave --arch out")
        return read_onnx(path)
    network, about = load_model(path, data, arch)
    shape = about["input_shape"] if "input_shape" in about else load_data(data).shape
    return trace(network.double(), shape)


def _problems(
    config: CertifyConfig, graph: Graph, done: Container[int]
) -> Iterator[tuple[int, int | None, Tensor | None, Property]]:
    """(number, label, image, property) of this shard, without those that are done."""
    if config.property is not None:
        prop = read_vnnlib(config.property, graph.input_shape, graph.classes).checked(graph)
        if config.model.suffix != ".onnx":  # an ONNX network may want its inputs normalised
            check_pixels(torch.stack([prop.lower, prop.upper]), "the property's box reaches")
        if 0 not in done:
            yield 0, None, None, prop
        return
    data = load_data(config.data)
    if data.shape != graph.input_shape:
        raise UserError(f"the images have shape {data.shape}, the network takes {graph.input_shape}")
    images, labels = data.test.pixels()
    end = min(config.end or len(images), len(images))
    if config.start >= end:
        raise UserError(f"--start {config.start} --end {config.end} leaves none of the {len(images)} images")
    for index in range(config.start, end):
        if index % config.shards == config.shard and index not in done:
            image, label = images[index].clone(), int(labels[index])
            yield index, label, image, ball(image, label, config.eps, graph.classes)


def _line(
    graph: Graph,
    index: int,
    label: int | None,
    image: Tensor | None,
    prop: Property,
    config: CertifyConfig,
    folder: Path,
) -> dict[str, Any]:
    """One image's line; a counter-example is written, read again and checked."""
    line: dict[str, Any] = {"index": index, "label": label}
    if image is not None and int(graph(image[None].to(graph.device)).argmax()) != label:
        return line | {"status": "wrong", "seconds": 0.0, "domains": 0, "bounds": []}
    if config.memory and sys.platform == "linux":
        import resource  # noqa: PLC0415 - not on every platform

        limit = int(config.memory * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    prop = prop.to(graph.device)
    started = time.monotonic()
    try:
        verdict = verify(graph, prop, config.verify)
        if config.bisections and image is not None and label is not None:
            line["radius"] = config.eps
            if not verdict.verified:
                line["radius"] = verified_radius(graph, image, label, config.eps, config.bisections, config.verify)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        nothing = {"domains": 0, "bounds": [], "attack_margins": []}
        return line | {"status": "memory", "seconds": time.monotonic() - started} | nothing
    line |= verdict.plain()
    if verdict.counterexample is not None:
        line["counterexample"] = _keep(graph, prop, verdict, folder / f"counterexample-{index}.pt")
    if verdict.verified:
        line["checked_on_float32_forward"] = _sampled(graph, prop)
    return line


def _keep(graph: Graph, prop: Property, verdict: Verdict, path: Path) -> str:
    """Write a counter-example, and check what was written: inside of the box, with a margin below 0."""
    assert verdict.counterexample is not None
    torch.save({"pixels": verdict.counterexample.double()}, path)
    pixels = torch.load(path, weights_only=True)["pixels"].to(graph.device)
    margins = graph(pixels[None])[0] @ prop.rows.T + prop.constant
    slack = 1e-9
    if bool((pixels < prop.lower - slack).any() or (pixels > prop.upper + slack).any() or margins.min() >= 0):
        raise RunFailure(f"{path} is no counter-example: the verifier contradicts itself")
    return path.name


def _sampled(graph: Graph, prop: Property, count: int = 64) -> bool:
    """Whether single-precision outputs at random points of the box have positive margins too."""
    draws = torch.rand((count, *graph.input_shape), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    points = prop.lower + draws.to(graph.device) * (prop.upper - prop.lower)
    margins = graph.single(points.float()).double() @ prop.rows.T + prop.constant
    return bool((margins > 0).all())


def summary(lines: list[dict[str, Any]], settings: VerifySettings) -> dict[str, Any]:
    """Counts by status, verified accuracy over all images, and times, with the limit that they were taken under."""
    statuses: dict[str, int] = {}
    for line in lines:
        statuses[line["status"]] = statuses.get(line["status"], 0) + 1
    reached = [line["seconds"] for line in lines if line["status"] not in ("wrong", "attacked")]
    verified = sum(count for status, count in statuses.items() if status.startswith("verified"))
    return {
        "images": len(lines),
        "verified": verified,
        "va": 100 * verified / len(lines) if lines else None,
        "statuses": statuses,
        "seconds_per_call": sum(reached) / len(reached) if reached else None,
        "time_limit": settings.timeout,
        "domain_limit": settings.max_domains,
        "method": settings.method,
        "arithmetic": settings.arithmetic,
    }


@dataclasses.dataclass
class ExportConfig:
    """What to export."""

    model: Path
    """A run's folder, a checkpoint, or a verification .npz."""
    folder: Path = Path("exported")
    """Where to."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The images of the properties."""
    eps: float = 2 / 255
    """Radius of the balls."""
    images: int = 1
    """How many properties, of the first images; 0: none."""
    arch: str = ""
    """Architecture of an authors' checkpoint, where its keys do not tell."""
    official: bool = False
    """Write the weights in the authors' layout too."""

    def __post_init__(self) -> None:
        """Refuse a radius that makes no ball."""
        check_eps(self.eps)
        if self.images < 0:
            raise UserError(f"--images takes 0 or more, got {self.images}")


def export(config: ExportConfig) -> None:
    """Write ``network.onnx``, ``property-<i>.vnnlib``, and where asked ``network.pth.tar`` in the authors' layout."""
    graph = load_graph(config.model, config.data, config.arch)
    _make(config.folder, "--folder")
    written = graph if config.model.suffix == ".onnx" else graph.single  # a checkpoint's own arithmetic
    write_onnx(written, config.folder / "network.onnx")
    if config.official:
        from tenfold_grafting.compat import to_official  # noqa: PLC0415

        model, _ = load_model(config.model, config.data, config.arch)
        torch.save(to_official(model[1]), config.folder / "network.pth.tar")
    count = config.images
    if count:
        images, labels = load_data(config.data).test.pixels(count)
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            prop = ball(image, label, config.eps, graph.classes).checked(graph)
            write_vnnlib(prop, config.folder / f"property-{i}.vnnlib", f"image {i}, label {label}, eps {config.eps}")
    print(f"{config.folder}: network.onnx and {count} properties")


def compare_masks(*files: str, arch: str = "cnn_b") -> None:
    """Print the overlap (Jaccard index, by layer and in all) of every two mask files or grafted checkpoints.

    Args:
        files: mask files, runs' folders or checkpoints, two or more.
        arch: the network whose masks a mask file holds.

    """
    if len(files) < 2:
        raise UserError("compare-masks takes two or more mask files or grafted checkpoints")
    masks = {name: _masks_of(Path(name), arch) for name in files}
    names = list(masks)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if [m.shape for m in masks[first]] != [m.shape for m in masks[second]]:
                raise UserError(f"{first} and {second} are masks of different networks")
            pair = [{str(k): m for k, m in enumerate(masks[name])} for name in (first, second)]
            print(json.dumps({"first": first, "second": second, "jaccard": overlap(*pair)}))


def _masks_of(path: Path, arch: str) -> list[Tensor]:
    """The masks of a file in forward order."""
    path = resolve(path)
    if path.is_dir() or path.suffix == ".safetensors":
        model, _ = load_model(path)
        found = list(grafted_masks(model).values())
    elif path.suffix in (".pth", ".tar"):
        found = list(grafted_masks(load_official_checkpoint(path)).values())
    else:
        shapes = activation_shapes(create_network(arch), architecture(arch).input_shape)
        return list(load_masks(path, shapes).values())
    if not found:
        raise UserError(f"{path} is not grafted")
    return found
