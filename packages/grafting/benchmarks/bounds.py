"""Seconds of every bound for one image and for a batch, against dense matrices, and subdomains a second.

python benchmarks/bounds.py [--folder FOLDER] [--networks NAME ...] [--batch 8] [--rounds 3] [--save]

With a folder, its verification networks (.npz) and images are used; without, architectures of the same sizes with
random weights and random images. One thread, double precision, nine margins. A batch is compared with its own images one
by one: they differ in how many neurons are unstable. Memory is the growth of a process that does nothing but the bound.
``--save`` writes results/benchmarks/bounds.json.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tenfold_grafting.bounds import bound_margins, crown_intervals, margin_spec, relaxations
from tenfold_grafting.domains import BetaSettings, Domains, Problem, beta_crown
from tenfold_grafting.graph import Graph, Normalise, trace
from tenfold_grafting.intervals import Box
from tenfold_grafting.networks import architecture, create_network, mlp
from tenfold_grafting.operations import Activation, Add, Affine
from tenfold_grafting.optimise import Optimised, alpha_crown, alpha_crown_joint
from tenfold_grafting.specification import pixel_box
from tenfold_grafting.zoo import load_images, load_network
from tenfold_shared.checkpoint import write_json
from tenfold_shared.run import forget_peak_memory, peak_memory

METHODS: tuple[Literal["ibp", "crown-ibp", "crown"], ...] = ("ibp", "crown-ibp", "crown")
NETWORKS = {
    "cifar_cnn_a_adv": ("cnn_a", 2 / 255, "images_cifar10_sdp200"),
    "cifar_resnet2b": ("resnet2b", 2 / 255, "images_cifar10_sdp200"),
    "mnist_mlp_6x100": ("", 0.026, "images_mnist_first200"),
}


def problem(name: str, folder: Path | None, batch: int) -> tuple[Graph, Box, Tensor]:
    """Graph, boxes and specification of a network."""
    arch, eps, file = NETWORKS[name]
    if folder is not None:
        model, about = load_network(folder / f"{name}.npz")
        images, labels = load_images(folder / f"{file}.npz")
        graph = trace(model.double(), about["input_shape"])
        images, labels = images[:batch], labels[:batch]
    else:
        torch.manual_seed(0)
        shape = architecture(arch).input_shape if arch else (1, 28, 28)
        network = create_network(arch) if arch else mlp(784, 100, 5)
        graph = trace(nn.Sequential(Normalise([0.5] * shape[0], [0.25] * shape[0]), network).double(), shape)
        images = torch.rand(batch, *shape, dtype=torch.float64)
        labels = graph(images).argmax(1)
    return graph, pixel_box(graph, images, eps), margin_spec(labels, graph.classes)


def dense_crown(graph: Graph, box: Box, spec: Tensor) -> Tensor:
    """CROWN as one writes it first: every neuron, every operation a dense matrix, one image."""
    matrices: dict[int, tuple[Tensor, Tensor]] = {}
    for index, node in enumerate(graph.nodes):
        if isinstance(node, Affine):
            size = torch.Size(node.in_shape).numel()
            basis = torch.eye(size, dtype=torch.float64).view(size, *node.in_shape)
            zero = node.forward(torch.zeros(1, *node.in_shape, dtype=torch.float64))
            matrices[index] = ((node.forward(basis) - zero).flatten(1).T, zero.flatten())

    def bound(start: int, rows: Tensor, lines: dict) -> Tensor:
        pending, c = {start: rows}, rows.new_zeros(len(rows))
        for index in range(start, 0, -1):
            if index not in pending:
                continue
            a, node = pending.pop(index), graph.nodes[index]
            if isinstance(node, Add):
                parts = [(i, a) for i in node.inputs]
            elif isinstance(node, Activation):
                line = lines[index]
                c = c + a.clamp(max=0) @ line.upper_intercept.flatten()
                a = a.clamp(min=0) * line.lower_slope.flatten() + a.clamp(max=0) * line.upper_slope.flatten()
                parts = [(node.inputs[0], a)]
            else:
                matrix, constant = matrices[index]
                c = c + a @ constant
                parts = [(node.inputs[0], a @ matrix)]
            for source, value in parts:
                pending[source] = pending[source] + value if source in pending else value
        return c + pending[0] @ box.centre.flatten() - pending[0].abs() @ box.radius.flatten()

    lines: dict = {}
    for index in graph.activations:
        shape = graph.nodes[index].shape
        eye = torch.eye(torch.Size(shape).numel(), dtype=torch.float64)
        source = graph.nodes[index].inputs[0]
        lower, upper = bound(source, eye, lines).view(1, *shape), -bound(source, -eye, lines).view(1, *shape)
        lines |= relaxations(graph, {index: (lower, torch.maximum(lower, upper))})
    return bound(graph.output, spec[0], lines)


def seconds(call: Callable[[], object], rounds: int) -> float:
    """The best of several, after one that warms up."""
    call()
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best


def _grown(connection: "multiprocessing.connection.Connection", call: Callable[[], object]) -> None:
    forget_peak_memory()
    before = peak_memory()
    call()
    connection.send((peak_memory() - before) / 2**20)


def mebibytes(call: Callable[[], object]) -> float:
    """Growth of the peak memory of a process that does nothing but the call."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_grown, args=(there, call))
    process.start()
    grown = here.recv()
    process.join()
    return grown


def domains_per_second(graph: Graph, box: Box, spec: Tensor) -> float:
    """beta-CROWN of 64 subdomains, ten iterations in single precision."""
    with torch.no_grad():
        intervals, _ = crown_intervals(graph, box)
    single = Problem.make(graph, box, spec[0, 0], 0.0, intervals).single()
    signs = torch.zeros(64, single.size, dtype=torch.int8)
    signs[torch.arange(64), torch.arange(64) % single.size] = 1
    alpha = single.adaptive().expand(64, -1)
    start = Domains(signs, alpha, torch.zeros_like(alpha), torch.full((64,), -torch.inf))
    return 64 / seconds(lambda: beta_crown(single, start, BetaSettings(10)), 1)


def report(name: str, folder: Path | None, batch: int, rounds: int, dense: bool) -> dict[str, Any]:
    """One network's lines."""
    graph, boxes, specs = problem(name, folder, batch)
    box, spec = boxes[:1], specs[:1]
    images = range(len(boxes))
    found: dict[str, Any] = {"network": name, "images": len(boxes), "methods": {}}

    def line(method: str, one: float, more: str) -> None:
        print(f"  {name:<16} {method:<24} {one:10.4f} {more}", flush=True)

    def one_of(bound: Callable[..., Tensor], i: int) -> Tensor:
        return bound(boxes[i : i + 1], specs[i : i + 1])

    def optimised_one(call: Callable[..., Optimised], i: int) -> Optimised:
        return call(graph, boxes[i : i + 1], specs[i : i + 1], alone[i])

    def compared(method: str, single: Callable[[int], object], batched: Callable[[], object], rounds: int) -> None:
        one, memory = seconds(partial(single, 0), rounds), mebibytes(partial(single, 0))
        each = seconds(lambda: [single(i) for i in images], 1) / len(boxes)
        many = seconds(batched, rounds) / len(boxes)
        line(
            method,
            one,
            f"and {memory:.0f} MiB for the first image; all {each:8.4f} one by one, {many:8.4f} batched ({each / many:.1f} x)",
        )
        found["methods"][method] = {
            "first_seconds": one,
            "first_mib": memory,
            "one_by_one_seconds": each,
            "batched_seconds": many,
        }

    with torch.no_grad():
        for method in METHODS:
            single = partial(one_of, partial(bound_margins, graph, method=method))
            compared(method, single, partial(bound_margins, graph, boxes, specs, method), rounds)
        alone = [crown_intervals(graph, boxes[i : i + 1])[0] for i in images]
        every, _ = crown_intervals(graph, boxes)
    calls: list[tuple[str, Callable[..., Optimised]]] = [("alpha-crown, 20", alpha_crown)]
    if name == "mnist_mlp_6x100":
        calls.append(("alpha-crown joint, 20", alpha_crown_joint))
    for title, call in calls:  # after the intermediate bounds
        single_call = partial(optimised_one, call)
        compared(title, single_call, partial(call, graph, boxes, specs, every), 1)
    found["subdomains_per_second"] = domains_per_second(graph, box, spec)
    line("beta-crown", found["subdomains_per_second"], "subdomains a second")
    if dense and name != "cifar_resnet2b":
        with torch.no_grad():
            straightforward = partial(dense_crown, graph, box, spec)
            found["dense_seconds"], found["dense_mib"] = seconds(straightforward, 1), mebibytes(straightforward)
        line("crown, dense matrices", found["dense_seconds"], f"and {found['dense_mib']:.0f} MiB for the first image")
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-dense", action="store_true", help="leave the slow reference out")
    parser.add_argument("--save", action="store_true", help="write results/benchmarks/bounds.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("seconds an image, double precision, nine margins, one thread")
    found = [report(name, args.folder, args.batch, args.rounds, not args.no_dense) for name in args.networks]
    if args.save:
        about = {"torch": torch.__version__, "weights": "random" if args.folder is None else "published", "threads": 1}
        write_json(Path(__file__).parents[1] / "results" / "benchmarks" / "bounds.json", {**about, "networks": found})


if __name__ == "__main__":
    main()
