"""Time and memory of the query against the size of the pool, beside a straightforward implementation and the floor.

    python benchmarks/query.py [--sizes 10000 50000 150000 500000] [--anchors 200] [--width 512] [--rounds 3]

Straightforward is what the released code does: the whole distance matrix, and a full sort of it for every anchor. It is
left out where its matrix would pass a gigabyte. The floor is the one matrix product that any exact search needs.
All three are measured in turns within one run. Memory is what the search holds beside the features.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tenfold_cilqud import approximate_query, query
from tenfold_cilqud.query import MEMORY


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


def measure(arms: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Shortest seconds of each arm; they take turns, so that a busy machine disturbs all alike."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 50_000, 150_000, 500_000])
    parser.add_argument("--anchors", type=int, default=200)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--per-anchor", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{args.anchors} anchors, {args.width} features, {args.per_anchor} each, {device()}")
    for size in args.sizes:
        pool = torch.randn(size, args.width, device=device())
        anchors = torch.randn(args.anchors, args.width, device=device())
        arms: dict[str, Callable[[], object]] = {
            "floor": lambda pool=pool, anchors=anchors: product(anchors, pool),  # type: ignore[misc]
            "query": lambda pool=pool, anchors=anchors: query(anchors, pool, args.per_anchor),  # type: ignore[misc]
        }
        matrix = args.anchors * size * 4
        if matrix < 1 << 30:
            arms["straightforward"] = lambda pool=pool, anchors=anchors: straightforward(anchors, pool, args.per_anchor)  # type: ignore[misc]
        seconds = measure(arms, args.rounds)
        slow = f"{seconds['straightforward'] / seconds['query']:.1f} x" if "straightforward" in seconds else "-"
        rows = max(1, MEMORY // (size * 4))
        held = min(rows, args.anchors) * size * 4 / 2**20
        print(
            f"  pool {size:>8}: {seconds['query']:7.2f} s, {seconds['query'] / seconds['floor']:5.1f} x the product; "
            f"straightforward {slow} that; holds {held:.0f} MiB of distances, straightforward {matrix / 2**20:.0f} MiB"
        )
    _, recall = approximate_query(anchors, pool, args.per_anchor, dimensions=64)
    print(
        f"  approximate search on 64 components of these features (unstructured, its worst case): recall {recall:.2f}"
    )


if __name__ == "__main__":
    main()
