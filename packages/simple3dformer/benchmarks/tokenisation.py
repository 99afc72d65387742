"""Points and voxels to tokens: time and memory against a straightforward implementation, as ratios within one run.

    python benchmarks/tokenisation.py [--points 1024] [--batch 16] [--rounds 15] [--threads 1] [--save]

Straightforward are: farthest points one cloud at a time; neighbours by sorting all distances
out of a (B, S, N, 3) tensor; cells by a strided 3D convolution, averaged over z afterwards. Tokens are rows of a
(B, tokens, C) tensor, as the blocks read them. The floor of the projection is reading the grid once: one pass over its
bytes. Grids are generated shapes, clean and corrupted as in the miniature, and random ones: each voxel with probability .1.
``--save`` writes results/benchmarks/tokenisation-THREADS.json.
"""

import argparse
import itertools
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tenfold_shared.checkpoint import write_json
from tenfold_simple3dformer.pointops import farthest_point_sampling, gather_points, nearest_neighbours
from tenfold_simple3dformer.shapes import voxel_set
from tenfold_simple3dformer.tokenizers import InflatedEmbedding


def slow_farthest(xyz: Tensor, count: int) -> Tensor:
    """One cloud at a time, with the running distance to the chosen points."""
    rows = []
    for cloud in xyz:
        chosen, nearest = [0], torch.full((len(cloud),), 1e10)
        for _ in range(count - 1):
            nearest = torch.minimum(nearest, ((cloud - cloud[chosen[-1]]) ** 2).sum(-1))
            chosen.append(int(nearest.argmax()))
        rows.append(torch.tensor(chosen))
    return torch.stack(rows)


def slow_neighbours(centres: Tensor, xyz: Tensor, k: int) -> Tensor:
    """Sort all of them."""
    return ((centres[:, :, None] - xyz[:, None]) ** 2).sum(-1).argsort(-1)[:, :, :k]


def slow_groups(xyz: Tensor, count: int, k: int) -> Tensor:
    """Neighbourhoods, straightforwardly."""
    centres = gather_points(xyz, slow_farthest(xyz, count))
    return gather_points(xyz, slow_neighbours(centres, xyz, k)) - centres[:, :, None]


def groups(xyz: Tensor, count: int, k: int) -> Tensor:
    """Neighbourhoods as the networks make them."""
    centres = gather_points(xyz, farthest_point_sampling(xyz, count))
    return gather_points(xyz, nearest_neighbours(centres, xyz, k)[1]) - centres[:, :, None]


def convolved(embed: InflatedEmbedding, voxels: Tensor, *, mean: bool) -> Tensor:
    """Conv3d, then the mean over z."""
    tokens = F.conv3d(voxels, embed.weight, embed.bias, stride=embed.cell).permute(0, 2, 3, 4, 1)
    return (tokens.mean(3) if mean else tokens).flatten(1, -2).contiguous()


def multiplied(embed: InflatedEmbedding, voxels: Tensor, *, mean: bool) -> Tensor:
    """As the networks do it."""
    return embed(voxels, mean_over_z=mean).flatten(1, -2)


def grids(kind: str, count: int, side: int) -> Tensor:
    """(B, 1, V, V, V)."""
    if kind == "random":
        return (torch.rand(count, 1, side, side, side) < 0.1).float()
    drop, noise = (0.1, 0.005) if kind == "corrupted" else (0.0, 0.0)
    packed, _ = voxel_set(count, 3, side, drop, noise)
    return torch.from_numpy(np.unpackbits(packed, axis=1, count=side**3)).view(count, 1, side, side, side).float()


def shortest(arms: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Shortest seconds of each arm; they take turns, so that a busy machine disturbs all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def _measured(connection: "multiprocessing.connection.Connection", arm: Callable[[], object]) -> None:
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.inference_mode():
        arm()
    connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def megabytes(arm: Callable[[], object]) -> float:
    """Growth of the peak memory of a process that does nothing but the arm."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_measured, args=(there, arm))
    process.start()
    grown = here.recv()
    process.join()
    return grown / (1e6 if sys.platform == "darwin" else 1e3)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--save", action="store_true", help="write results/benchmarks/tokenisation-THREADS.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    xyz, count = torch.rand(args.batch, args.points, 3), args.points // 4
    # What is done, to how many of what, by which arms, and what the table says of it.
    cases: list[tuple[str, int, str, dict[str, Callable[[], object]], dict[str, Any]]] = [
        (
            f"{args.points} points to {count} neighbourhoods of 16",
            xyz[..., 0].numel(),
            "points",
            {"straightforward": partial(slow_groups, xyz, count, 16), "ours": partial(groups, xyz, count, 16)},
            {"task": "groups", "points": args.points, "batch": args.batch},
        ),
        (
            f"neighbours alone, {args.points} among {args.points}",
            xyz[..., 0].numel(),
            "points",
            {
                "straightforward": partial(slow_neighbours, xyz, xyz, 16),
                "ours": lambda: nearest_neighbours(xyz, xyz, 16),
            },
            {"task": "neighbours", "points": args.points, "batch": args.batch},
        ),
    ]
    for (side, cell), kind in itertools.product(((30, 6), (128, 9)), ("shapes", "corrupted", "random")):
        voxels = grids(kind, max(1, args.batch // (1 if side < 64 else 8)), side)
        embed, occupied = InflatedEmbedding(384, cell).requires_grad_(False), float(voxels.mean())
        for mean in (False, True):
            task = "projection" if mean else "naive"
            arms: dict[str, Callable[[], object]] = {
                "straightforward": partial(convolved, embed, voxels, mean=mean),
                "ours": partial(multiplied, embed, voxels, mean=mean),
            }
            if mean:
                arms["floor: read once"] = voxels.sum
            title = f"{side}^3 voxels, cells of {cell}^3, {task}, {kind}, {occupied:.1%} occupied"
            about = {"task": task, "side": side, "cell": cell, "kind": kind, "occupied": occupied, "batch": len(voxels)}
            cases.append((title, voxels.numel(), "voxels", arms, about))
    memory = [{name: megabytes(arm) for name, arm in arms.items()} for _, _, _, arms, _ in cases]
    torch.set_num_threads(args.threads)
    print(f"batch {args.batch}, {args.threads} threads; ratios to the straightforward implementation")
    found = []
    for (title, samples, unit, arms, about), grown in zip(cases, memory, strict=True):
        with torch.inference_mode():
            seconds = shortest(arms, args.rounds)
        print(title)
        for name, value in seconds.items():
            speed = seconds["straightforward"] / value
            print(f"  {name:<17} {samples / value / 1e6:9.2f} M {unit}/s  {speed:6.2f} x   +{grown[name]:7.1f} MB")
        times = {name: 1e3 * value for name, value in seconds.items()}
        found.append({**about, "ms": times, "faster": seconds["straightforward"] / seconds["ours"], "grown_mb": grown})
    if args.save:
        file = Path(__file__).parents[1] / "results" / "benchmarks" / f"tokenisation-{args.threads}.json"
        write_json(file, {"torch": torch.__version__, "threads": args.threads, "rounds": args.rounds, "cases": found})


if __name__ == "__main__":
    main()
