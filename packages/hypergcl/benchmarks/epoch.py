"""One fabricated (A2) epoch against a straightforward implementation, and the memory of a growing hypergraph.

    python benchmarks/epoch.py [--nodes 12311] [--hidden 512] [--projection 128] [--epochs 2] [--save]
    python benchmarks/epoch.py --scaling [--save]       # up to a million memberships, in mini-batches

Each measurement runs in a process of its own and prints CPU seconds an epoch and the peak resident memory; the floor is the time that
the machine's matrix products alone would take for the multiplications that cannot be avoided. ``--save`` writes
results/benchmarks/{epoch,scaling}.json.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import straightforward
import torch

from tenfold_hypergcl.data import Dataset
from tenfold_hypergcl.hypergraph import Hypergraph
from tenfold_hypergcl.minibatch import HypergraphSampler, train_on_batches
from tenfold_hypergcl.recipe import Recipe
from tenfold_hypergcl.setgnn import EncoderConfig, SetGNN
from tenfold_hypergcl.steps import receptive_field
from tenfold_hypergcl.train import Session, fabricated_epoch
from tenfold_shared.checkpoint import write_json


def synthetic(
    nodes: int, hyperedges: int, memberships: int, features: int, classes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memberships, features and labels of a random hypergraph."""
    torch.manual_seed(0)
    size = memberships // hyperedges
    edge = torch.arange(hyperedges).repeat_interleave(size)
    # Distinct members within each hyperedge: a random start and a random stride.
    start, stride = torch.randint(nodes, (hyperedges,)), torch.randint(1, nodes // size, (hyperedges,))
    node = (start[:, None] + stride[:, None] * torch.arange(size)).flatten() % nodes
    return torch.stack([node, edge]), torch.randn(nodes, features), torch.randint(classes, (nodes,))


def measure(what: str, options: argparse.Namespace) -> None:
    """Run ``options.epochs`` epochs after one to warm up and print a JSON line."""
    incidence, x, labels = synthetic(options.nodes, options.hyperedges, options.memberships, 100, 40)
    train = torch.randperm(options.nodes)[: options.nodes // 10]
    if what == "straightforward":
        own = torch.stack([torch.arange(options.nodes), torch.arange(options.nodes) + options.hyperedges])
        model = straightforward.Model(100, options.hidden, options.projection, 40)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        arguments = (
            torch.cat([incidence, own], 1),
            options.hyperedges + options.nodes,
            incidence.shape[1],
            labels,
            train,
        )

        def epoch() -> None:
            straightforward.epoch(model, optimizer, x, *arguments)

    elif what == "ours":
        h = Hypergraph.from_incidence(incidence, options.nodes, options.hyperedges).with_singletons()
        ours = SetGNN(100, 40, EncoderConfig(hidden=options.hidden), options.projection)
        optimizer = torch.optim.Adam(ours.parameters(), lr=1e-3, fused=True)
        field = receptive_field(h, x, train, 1)
        recipe = Recipe("A2", encoder=ours.config, projection=options.projection)
        data = Dataset("synthetic", h, x, labels, 40)
        session = Session(recipe, data, ours, optimizer, field, labels[train])

        def epoch() -> None:
            fabricated_epoch(session)

    else:
        h = Hypergraph.from_incidence(incidence, options.nodes, options.hyperedges).with_singletons()
        ours = SetGNN(100, 40, EncoderConfig(hidden=options.hidden), options.projection)
        optimizer = torch.optim.Adam(ours.parameters(), lr=1e-3)
        sampler = HypergraphSampler(h, x, batch_size=options.batch_size)

        def epoch() -> None:
            train_on_batches(ours, optimizer, sampler, labels, train, "A2", 0.3, 0.1, 0.3)

    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    epoch()
    start, wall = time.process_time(), time.perf_counter()
    for _ in range(options.epochs):
        epoch()
    result = {
        "cpu_seconds": (time.process_time() - start) / options.epochs,
        "wall_seconds": (time.perf_counter() - wall) / options.epochs,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "before_training_gib": base / 2**20,
    }
    print(json.dumps(result))


def floor_seconds(options: argparse.Namespace) -> float:
    """CPU seconds of the unavoidable matrix products, at the rate this machine reaches on them."""
    n, m, d, p = options.nodes, options.hyperedges, options.hidden, options.projection
    a, b = torch.randn(4096, d), torch.randn(d, d)
    a @ b
    start = time.process_time()
    for _ in range(10):
        a @ b
    rate = 10 * 2 * 4096 * d * d / (time.process_time() - start)
    rows = (
        2 * 3 * ((100 + d) * n + 4 * d * (m + n) + 2 * d * n) * d * 2
    )  # both views, forward and two backward products
    contrast = 3 * 2 * (2 * n) ** 2 / 2 * p  # half of the similarities of both views, and two backward products of them
    return (rows + contrast) / rate


def run(what: str, options: argparse.Namespace) -> dict[str, float]:
    """One measurement in a process of its own."""
    flags = [f"--{key.replace('_', '-')}={getattr(options, key)}" for key in SIZES]
    command = [sys.executable, __file__, "--measure", what, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


SIZES = {
    "nodes": 12311,
    "hyperedges": 12311,
    "memberships": 61555,
    "hidden": 512,
    "projection": 128,
    "epochs": 2,
    "batch_size": 4096,
}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """An epoch of ours and of the straightforward implementation."""
    found: dict[str, Any] = {}
    for what in ("ours", "straightforward"):
        found[what] = run(what, options)
        print(f"{what:<15} {json.dumps(found[what])}", flush=True)
    floor = floor_seconds(options)
    print(f"floor           {floor:.2f} CPU seconds of matrix products")
    ratios = {key: found["straightforward"][key] / found["ours"][key] for key in ("cpu_seconds", "peak_gib")}
    print(f"CPU time: {ratios['cpu_seconds']:.2f} times less; peak memory: {ratios['peak_gib']:.2f} times less")
    return {**found, "floor_cpu_seconds": floor, "times_less": ratios}


def scale(options: argparse.Namespace) -> dict[str, Any]:
    """An epoch of mini-batches on hypergraphs of 62,500 to a million memberships."""
    options.hidden, options.projection, options.epochs = 64, 64, 1
    rows = []
    for memberships in (62_500, 125_000, 250_000, 500_000, 1_000_000):
        options.memberships, options.nodes, options.hyperedges = memberships, memberships // 5, memberships // 5
        rows.append({"memberships": memberships, "nodes": options.nodes, **run("batches", options)})
        print(json.dumps(rows[-1]), flush=True)
    return {"rows": rows}


def main() -> None:
    """Compare, or show the scaling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, value in SIZES.items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--measure", choices=["ours", "straightforward", "batches"], help=argparse.SUPPRESS)
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--save", action="store_true", help="write results/benchmarks")
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options)
        return
    name, work = ("scaling", scale) if options.scaling else ("epoch", compare)
    found = work(options)
    about = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **{key: getattr(options, key) for key in SIZES},
    }
    if options.scaling:
        about = {key: value for key, value in about.items() if key not in {"nodes", "hyperedges", "memberships"}}
    if options.save:
        write_json(Path(__file__).parents[1] / "results" / "benchmarks" / f"{name}.json", {**about, **found})


if __name__ == "__main__":
    main()
