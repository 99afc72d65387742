"""Cost of one BiP iteration, as ratios measured in turns within one run.

    python benchmarks/iteration.py [--model resnet20s] [--batch 128] [--rounds 7] [--save]

Compares with a dense training step (the floor of an iteration is two of them: two forward-backward passes) and with the
released trainer's iteration (four forward, three backward passes); and the masks' selection with a full sort. ``--save``
writes results/benchmarks/iteration-MODEL-BATCH.json.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tenfold_bip import bilevel_iteration, create_model, prune_parametrize, split_parameters
from tenfold_bip.projections import keep_count, project_global
from tenfold_bip.released import released_bilevel_step, released_optimizer
from tenfold_shared.checkpoint import write_json


def measure(arms: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each arm. The arms take turns, so that a busy machine disturbs all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, arm in arms.items():
            synchronize()
            start = time.perf_counter()
            arm()
            synchronize()
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def save(name: str, found: dict[str, Any]) -> None:
    """Write results/benchmarks/NAME.json, with what it was measured on."""
    about = {"torch": torch.__version__, "device": str(device()), "threads": torch.get_num_threads()}
    write_json(Path(__file__).parents[1] / "results" / "benchmarks" / f"{name}.json", {**about, **found})


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def device() -> torch.device:
    """The accelerator, if there is one."""
    return (torch.accelerator.is_available() and torch.accelerator.current_accelerator()) or torch.device("cpu")


def sorted_masks(importances: list[Tensor], keep: float) -> list[Tensor]:
    """The straightforward projection: sort everything, write ones behind the cut."""
    flat = torch.cat([importance.flatten() for importance in importances])
    mask = torch.zeros_like(flat, dtype=torch.uint8)
    mask[flat.argsort()[flat.numel() - keep_count(keep, flat.numel()) :]] = 1
    return list(mask.split([importance.numel() for importance in importances]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20s")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's default")
    parser.add_argument("--save", action="store_true", help="write results/benchmarks/iteration-MODEL-BATCH.json")
    args = parser.parse_args()

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    inputs = torch.randn(args.batch, 3, 32, 32, device=device())
    targets = torch.randint(0, 10, (args.batch,), device=device())
    batch = (inputs, targets)
    dense = create_model(args.model, 10).to(device())
    masked = prune_parametrize(copy.deepcopy(dense), args.keep)
    released = prune_parametrize(copy.deepcopy(dense), args.keep)
    dense_optimizer = torch.optim.SGD(dense.parameters(), 0.01, 0.9, weight_decay=1e-4)
    theta, scores = split_parameters(masked)
    theta_optimizer = torch.optim.SGD(theta, 0.01, 0.9, weight_decay=1e-4)
    score_optimizer = torch.optim.SGD(scores, 0.1, 0.9, weight_decay=1e-4)
    released_optimizers = released_optimizer(released, 0.01), released_optimizer(released, 0.1)

    def dense_step(model: nn.Module = dense) -> None:
        dense_optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        dense_optimizer.step()

    def two_dense_steps() -> None:  # as long as an iteration, so that a disturbance is as likely in either
        dense_step()
        dense_step()

    seconds = measure(
        {
            "two dense steps": two_dense_steps,
            "BiP iteration": lambda: bilevel_iteration(masked, [batch], batch, theta_optimizer, score_optimizer),
            "released iteration": lambda: released_bilevel_step(released, batch, batch, *released_optimizers),
        },
        args.rounds,
    )
    print(f"{args.model}, batch {args.batch}, {device()}, {torch.get_num_threads()} threads")
    for name, value in seconds.items():
        print(f"  {name:<22} {1e3 * value:9.2f} ms   {2 * value / seconds['two dense steps']:5.2f} x dense step")
    found: dict[str, Any] = {
        "model": args.model,
        "batch": args.batch,
        "keep": args.keep,
        "rounds": args.rounds,
        "dense_step_ms": 1e3 * seconds["two dense steps"] / 2,
        "bip_ms": 1e3 * seconds["BiP iteration"],
        "released_ms": 1e3 * seconds["released iteration"],
        "bip_over_dense": 2 * seconds["BiP iteration"] / seconds["two dense steps"],
        "released_over_dense": 2 * seconds["released iteration"] / seconds["two dense steps"],
        "selection": [],
    }

    importances = [score.detach().abs() for score in scores]
    total = sum(importance.numel() for importance in importances)
    for keep in (0.05, 0.5, 0.9):
        seconds = measure(
            {
                "full sort": partial(sorted_masks, importances, keep),
                "selection": partial(project_global, importances, keep),
            },
            args.rounds,
        )
        ratio = seconds["full sort"] / seconds["selection"]
        found["selection"].append({"weights": total, "keep": keep, "ms": 1e3 * seconds["selection"], "sort": ratio})
        print(
            f"  masks of {total} weights at keep {keep}: {1e3 * seconds['selection']:.2f} ms, sort {ratio:.1f} x that"
        )
    if args.save:
        save(f"iteration-{args.model}-{args.batch}", found)


if __name__ == "__main__":
    main()
