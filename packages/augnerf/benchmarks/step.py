"""A training step: ours against a straightforward one, and every mode of attack against a clean step, as ratios.

python benchmarks/step.py                                    # 8 layers of 256, 64 + 128 samples, 128 rays
python benchmarks/step.py --active 1                         # as at the very start, with density in every sample
python benchmarks/step.py --width 512 --fine 64 --rays 128   # the released sizes

`--active` is the share of samples that have a density: the biases are set so. The miniature with a ReLU density is at 0.2
to 0.45 after 200 steps, a fresh network anywhere between 0 and 1. Samples without one have no gradient, and
the backward pass leaves them out (`trunk.py`).

Bars: a clean step >= 1.5x faster than the straightforward one; one-step attack (reuse) <= 2.1 clean steps; head-only
<= 1.4; the straightforward, released kind of step is about 3.3. The floor is the multiply-adds of the linear layers at the
speed of this machine's own matrix product; a step is three forwards of them.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from straightforward import Network, adversarial_step, clean_step

from tenfold_augnerf import Adversary, Batch, ModelConfig, Rays, RaySampling, accumulate, create_model, steps_of
from tenfold_augnerf.evaluate import rays_at_once
from tenfold_augnerf.objective import random_starts
from tenfold_shared.checkpoint import write_json

KEYS = ["pts_c", "pts_f", "feat_c", "feat_f", "raw_c", "raw_f"]
HEADS = KEYS[2:]
EPS = {"pts": 0.25, "feat": 0.03, "raw": 0.15}
ARMS = ("straightforward", "clean", "straightforward adversarial", "plain", "reuse", "heads")


def arm(name: Any, options: argparse.Namespace) -> Callable[[], None]:
    torch.manual_seed(0)
    config = ModelConfig(depth=options.depth, width=options.width)
    sampling = RaySampling(2.0, 6.0, options.coarse, options.fine)
    model = create_model(config, sampling, white=True)
    origins = torch.tensor([0.0, 0.0, 4.0]) + 0.1 * torch.randn(options.rays, 3)
    rays = Rays(origins, torch.tensor([0.0, 0.0, -1.0]) + 0.2 * torch.randn(options.rays, 3))
    for field, which in ((model.nerf, "coarse"), (model.nerf_fine, "fine")):
        with torch.no_grad():
            density = getattr(model(rays), which).raw[..., 3].flatten()
            field.mlp.alpha_linear.bias -= density.kthvalue(max(1, round((1 - options.active) * len(density)))).values
    networks = []
    for field in (model.nerf, model.nerf_fine):
        networks.append(Network(options.depth, options.width, 10, 4))
        networks[-1].load_state_dict(field.state_dict())
    truth = torch.rand(options.rays, 3)
    draw = torch.Generator().manual_seed(0)
    draws = model.draws(options.rays, draw)
    geometry = model.geometry(400, 400)
    keys = HEADS if name == "heads" else KEYS
    eps = [EPS[key.partition("_")[0]] for key in keys]
    steps = steps_of(keys, geometry, eps=eps, alpha=[1.25], relative_alpha=True)
    starts = random_starts(steps, geometry, options.rays, draw, torch.float32, zero=name == "reuse")
    chunk = rays_at_once(model, torch.device("cpu"), training=True)
    batch = Batch(rays, truth, draws)

    def step() -> None:
        model.zero_grad()
        for network in networks:
            network.zero_grad()
        if name == "straightforward":
            clean_step(networks, rays, truth, sampling, draws)
        elif name == "straightforward adversarial":
            adversarial_step(networks, rays, truth, sampling, starts(0, slice(0, options.rays)), steps, draws)
        elif name == "clean":
            accumulate(model, batch, chunk=chunk)
        else:
            accumulate(model, batch, Adversary(steps, cost=name), starts, chunk=chunk)

    return step


def floor(options: argparse.Namespace) -> Callable[[], None]:
    """The products of the trunk alone: three per layer and pass, of the chunk's size."""
    points = options.rays * (2 * options.coarse + options.fine)
    a, b = torch.randn(min(points, 8192), options.width), torch.randn(options.width, options.width)
    repeats = max(1, points // len(a))

    def products() -> None:
        for _ in range(repeats * options.depth):
            a @ b
            a @ b
            a.T @ a

    return products


def measure(function: Callable[[], None], repeats: int) -> tuple[float, float]:
    """(wall, CPU) seconds of the fastest of some calls, after one to warm up."""
    function()
    best = (float("inf"), float("inf"))
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        best = min(best[0], time.perf_counter() - wall), min(best[1], time.process_time() - cpu)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {
        "rays": 128,
        "depth": 8,
        "width": 256,
        "coarse": 64,
        "fine": 128,
        "active": 0.4,
        "threads": 2,
        "repeats": 2,
    }
    for key, value in sizes.items():
        parser.add_argument(f"--{key}", type=type(value), default=value)
    parser.add_argument("--arm", choices=[*ARMS, "floor"])
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.arm:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        function = floor(options) if options.arm == "floor" else arm(options.arm, options)
        wall, cpu = measure(function, options.repeats)
        print(wall, cpu, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
        return
    found = {}
    arguments = [item for key in sizes for item in (f"--{key}", str(getattr(options, key)))]
    for name in (*ARMS, "floor"):
        done = subprocess.run(
            [sys.executable, __file__, "--arm", name, *arguments], check=True, capture_output=True, text=True
        )
        wall, cpu, memory = map(float, done.stdout.split())
        found[name] = {"wall_seconds": wall, "cpu_seconds": cpu, "peak_mib": memory}
        print(f"{name:28} {wall:7.3f} s {cpu:7.3f} CPU-s {memory:7.0f} MiB", flush=True)
    clean = found["clean"]["wall_seconds"]
    ratios = {
        "straightforward / clean": found["straightforward"]["wall_seconds"] / clean,
        "clean / floor": clean / found["floor"]["wall_seconds"],
        "memory: straightforward / clean": found["straightforward"]["peak_mib"] / found["clean"]["peak_mib"],
        **{f"{name} / clean": found[name]["wall_seconds"] / clean for name in ("plain", "reuse", "heads")},
        "straightforward adversarial / straightforward": found["straightforward adversarial"]["wall_seconds"]
        / found["straightforward"]["wall_seconds"],
    }
    for name, ratio in ratios.items():
        print(f"{name:48} {ratio:.2f}")
    if options.json:
        write_json(
            options.json, {"sizes": {key: getattr(options, key) for key in sizes}, "arms": found, "ratios": ratios}
        )


if __name__ == "__main__":
    main()
