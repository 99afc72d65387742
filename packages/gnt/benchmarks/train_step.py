"""A training step: time and peak memory, ours against the straightforward one, and the gradients' difference.

python benchmarks/train_step.py --rays 128 --samples 192 --threads 2
python benchmarks/train_step.py --rays 512 --samples 64 --threads 2     # nearer to the paper's proportions
"""

import argparse
import sys

import torch
from common import MemoryPeak, in_own_process, measure, measured, networks, save, scene
from straightforward import render

from tenfold_gnt.compat import official_feature_key, official_network_key
from tenfold_gnt.objective import Optimisation, RayBatch, accumulate_gradients, build_optimiser, train_step
from tenfold_gnt.render import Sampling
from tenfold_gnt.sampling import depth_samples

NEAR, FAR = 2.0, 5.0


def arm(name: str, options: argparse.Namespace, dtype: torch.dtype = torch.float32, check: bool = False):
    ours, feature_net, network = (x.to(dtype) for x in networks(options.depth, 0.0 if check else 0.1))
    images, cameras, origins, directions = (
        x.to(dtype) for x in scene(options.views, options.height, options.width, options.rays)
    )
    truth = torch.rand(options.rays, 3, dtype=dtype)
    sampling = Sampling(NEAR, FAR, options.samples)
    batch = RayBatch(origins, directions, truth, images, cameras)

    def gradients():
        jitter = None if check else torch.rand(options.rays, options.samples, dtype=dtype)
        depths = depth_samples(NEAR, FAR, options.rays, options.samples, jitter=jitter, like=directions)
        maps = feature_net(images.permute(0, 3, 1, 2))
        rgb, _ = render(network, maps, images, cameras, origins, directions, depths)
        ((rgb - truth) ** 2).mean().backward()

    if check:
        if name == "straightforward":
            gradients()
            both = {**dict(feature_net.named_parameters("features")), **dict(network.named_parameters("network"))}
            return {key: p.grad for key, p in both.items()}
        accumulate_gradients(ours, batch, sampling, jitter=False)
        found = {f"features.{official_feature_key(k)}": p.grad for k, p in ours.features.named_parameters()}
        return found | {f"network.{official_network_key(k)}": p.grad for k, p in ours.coarse.named_parameters()}

    if name == "straightforward":
        groups = [{"params": network.parameters(), "lr": 5e-4}, {"params": feature_net.parameters(), "lr": 1e-3}]
        optimiser = torch.optim.Adam(groups)

        def step():
            optimiser.zero_grad()
            gradients()
            optimiser.step()
    else:
        optimiser, scheduler = build_optimiser(ours, Optimisation())

        def step():
            train_step(ours, batch, sampling, optimiser, scheduler)

    with MemoryPeak() as memory:
        step()
    return (*measure(step, options.repeats), memory.peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for key, value in {
        "rays": 128, "views": 10, "height": 378, "width": 504, "samples": 192, "depth": 4, "threads": 2, "repeats": 2,
    }.items():  # fmt: skip
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--arm", choices=["straightforward", "ours"])
    parser.add_argument("--save", action="store_true", help="write results/benchmarks/train-step-RAYSxSAMPLES.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.arm:
        print(*arm(options.arm, options))
        return
    arms = {name: in_own_process(__file__, name, sys.argv[1:]) for name in ("straightforward", "ours")}
    print(f"{options.rays} rays, {options.views} views {options.height}x{options.width}, {options.samples} samples")
    for name, (wall, cpu, peak) in arms.items():
        print(f"{name:16} {wall:7.2f} s {cpu:7.2f} CPU-s a step {peak / 2**20:8.0f} MiB")
    ratios = [a / b for a, b in zip(*arms.values(), strict=True)]
    print("ratio            wall {:.2f}x, CPU {:.2f}x, memory {:.2f}x less".format(*ratios))
    found, name = measured(options, arms, ratios), f"train-step-{options.rays}x{options.samples}"
    options.rays, options.height, options.width = 16, 96, 128
    for dtype in (torch.float32, torch.float64):
        theirs, mine = (arm(name, options, dtype, check=True) for name in arms)
        largest = max(float(g.abs().max()) for g in theirs.values())
        difference = max(float((theirs[key] - mine[key]).abs().max()) for key in theirs)
        print(f"largest difference of gradients in {dtype}: {difference:.1e} (largest gradient {largest:.1e})")
        found["largest_difference"][str(dtype).removeprefix("torch.")] = difference
    if options.save:
        save(name, found)


if __name__ == "__main__":
    main()
