"""Time and memory of the query against the size of the pool, beside a straightforward implementation and the floor.

    python benchmarks/query.py [--sizes 10000 50000 200000 500000] [--anchors 200] [--width 512] [--output FILE]

*search* is the query on features that are there, *pipeline* the whole of it from images that are read a thousand at a
time: features by a small network (16 of them), then the search. *straightforward* is what the released code does: the
whole distance matrix, and a full sort of it for every anchor; it is left out where its matrix would pass a gigabyte. The
*floor* is the one matrix product that any exact search needs. Each size and arm is a process of its own, so that the
greatest resident memory is its own as well; "beside the features" is by how much that grew during the search.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold_cilqud import approximate_query, create_model, query
from tenfold_cilqud.pools import Pool
from tenfold_cilqud.session import features_of, pool_features

MIB = 2**20
SHAPE = (3, 32, 32)
SLOW_LIMIT = 1 << 30  # bytes of the straightforward search's matrix


def device() -> torch.device:
    """The accelerator, if there is one."""
    return (torch.accelerator.is_available() and torch.accelerator.current_accelerator()) or torch.device("cpu")


def straightforward(anchors: Tensor, pool: Tensor, per_anchor: int) -> Tensor:
    """The whole matrix, a full sort for every anchor."""
    distance = torch.cdist(anchors, pool)
    chosen = []
    for row in range(len(anchors)):
        order = distance[row].argsort()[:per_anchor]
        distance[:, order] = torch.inf
        chosen.append(order)
    return torch.cat(chosen)


def product(anchors: Tensor, pool: Tensor) -> Tensor:
    """The matrix product alone, in chunks."""
    return torch.stack([(anchors @ rows.T).amax() for rows in pool.split(8192)]).amax()


def generated(size: int, width: int) -> Tensor:
    """Features in clusters [size, width], made without a second copy of them."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(100, width, generator=draw)
    out = torch.empty(size, width, device=device())
    for rows in out.split(8192):
        noise = torch.randn(len(rows), width, generator=draw)
        rows.copy_(centres[torch.randint(100, (len(rows),), generator=draw)] + noise)
    return out


def images(size: int) -> Pool:
    """A pool of random images that exist only while they are read."""

    def read(indices: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(int(indices[0]))
        return torch.randint(256, (len(indices), *SHAPE), generator=draw, dtype=torch.uint8)

    return Pool(size, read, "random images")


def peak() -> float:
    """Greatest resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MIB if sys.platform == "darwin" else 1024)


def shortest(run: Callable[[], object], rounds: int) -> float:
    """Seconds."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def searched(size: int, anchors: int, width: int, per_anchor: int, rounds: int, threads: int) -> dict[str, Any]:
    """The query on features that are there, and afterwards the floor."""
    torch.set_num_threads(threads)
    pool, asking = generated(size, width), generated(anchors, width) + 0.1
    before = peak()
    seconds = shortest(lambda: query(asking, pool, per_anchor), rounds)
    found = {"seconds": seconds, "peak_mib": peak(), "grown_mib": peak() - before}
    return found | {"floor_seconds": shortest(lambda: product(asking, pool), rounds)}


def sorted_fully(size: int, anchors: int, width: int, per_anchor: int, rounds: int, threads: int) -> dict[str, Any]:
    """The straightforward search."""
    torch.set_num_threads(threads)
    pool, asking = generated(size, width), generated(anchors, width) + 0.1
    before = peak()
    seconds = shortest(lambda: straightforward(asking, pool, per_anchor), rounds)
    return {"seconds": seconds, "peak_mib": peak(), "grown_mib": peak() - before}


def from_images(size: int, anchors: int, width: int, per_anchor: int, rounds: int, threads: int) -> dict[str, Any]:
    """The pipeline, once."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = create_model("small", classes_per_task=2, tasks=5, shape=SHAPE, width=4).to(device())
    asking = images(anchors)[torch.arange(anchors)]
    seconds = shortest(lambda: query(features_of(net, asking), pool_features(net, images(size)), per_anchor), rounds=1)
    return {"seconds": seconds, "peak_mib": peak()}


def approximate(size: int, anchors: int, width: int, per_anchor: int, dimensions: int, threads: int) -> dict[str, Any]:
    """The search on principal components: its time and its recall."""
    torch.set_num_threads(threads)
    pool, asking = generated(size, width), generated(anchors, width) + 0.1
    start = time.perf_counter()
    found, recall = approximate_query(
        asking, pool, per_anchor, dimensions=dimensions, generator=torch.Generator().manual_seed(0)
    )
    whole = time.perf_counter() - start
    return {
        "pool": size,
        "dimensions": dimensions,
        "recall": recall,
        "search_seconds": found.seconds,
        "with_recall_seconds": whole,
    }


def apart(work: Callable[..., dict[str, Any]], *values: Any) -> dict[str, Any]:
    """A measurement in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *values).result()


def main() -> None:
    """Print a table, and write it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 50_000, 200_000, 500_000])
    parser.add_argument("--anchors", type=int, default=200)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--per-anchor", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dimensions", type=int, default=64, help="of the approximate search; 0 leaves it out")
    parser.add_argument("--approximate-at", type=int, default=20_000, help="its pool's size")
    parser.add_argument("--output", type=Path, default=None, help="a JSON file for the numbers")
    args = parser.parse_args()
    options = (args.anchors, args.width, args.per_anchor)
    print(f"{args.anchors} anchors, {args.width} features, {args.per_anchor} each, {device()}, {args.threads} threads")
    where = {
        "torch": torch.__version__,
        "device": str(device()),
        "threads": args.threads,
        "machine": platform.machine(),
    }
    found: dict[str, Any] = {"anchors": args.anchors, "width": args.width, "per_anchor": args.per_anchor}
    found |= {"environment": where, "rows": []}

    def keep() -> None:
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    for size in args.sizes:
        arms = {"search": searched, "pipeline": from_images}
        arms |= {"straightforward": sorted_fully} if args.anchors * size * 4 < SLOW_LIMIT else {}
        row = {name: apart(arm, size, *options, args.rounds, args.threads) for name, arm in arms.items()}
        found["rows"].append({"pool": size, "features_mib": size * args.width * 4 / MIB, **row})
        keep()
        search, slow = row["search"], row.get("straightforward")
        beside = f"{slow['seconds'] / search['seconds']:.1f} x, +{slow['grown_mib']:.0f} MiB" if slow else "left out"
        print(
            f"  pool {size:>7}: search {search['seconds']:6.2f} s ({search['seconds'] / search['floor_seconds']:.1f} x the "
            f"product), peak {search['peak_mib']:.0f} MiB, beside the features +{search['grown_mib']:.0f} MiB; "
            f"straightforward {beside}; pipeline from images {row['pipeline']['seconds']:.1f} s, peak "
            f"{row['pipeline']['peak_mib']:.0f} MiB",
            flush=True,
        )
    if args.dimensions:
        found["approximate"] = apart(approximate, args.approximate_at, *options, args.dimensions, args.threads)
        keep()
        print(f"  approximate search: {json.dumps(found['approximate'])}")


if __name__ == "__main__":
    main()
