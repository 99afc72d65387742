"""Rendering: rays per second and peak memory, ours against the straightforward implementation, and their difference.

python benchmarks/render.py --rays 256 --threads 2
"""

import argparse
import sys

import torch
from common import MemoryPeak, in_own_process, measure, measured, networks, save, scene
from straightforward import render

from tenfold_gnt.features import FeatureMaps
from tenfold_gnt.projection import source_views
from tenfold_gnt.render import Sampling, Views, rays_per_chunk, readable_maps, render_rays
from tenfold_gnt.sampling import depth_samples

NEAR, FAR = 2.0, 5.0


@torch.inference_mode()
def arm(name: str, options: argparse.Namespace, dtype: torch.dtype = torch.float32, check: bool = False):
    ours, feature_net, network = (x.eval().to(dtype) for x in networks(options.depth, 0.1))
    images, cameras, origins, directions = (
        x.to(dtype) for x in scene(options.views, options.height, options.width, options.rays)
    )
    maps = (
        feature_net(images.permute(0, 3, 1, 2))
        if check
        else torch.randn(options.views, 32, -(-options.height // 16) * 4, -(-options.width // 16) * 4, dtype=dtype)
    )
    cached = readable_maps(FeatureMaps(maps, maps))
    sampling = Sampling(NEAR, FAR, options.samples)

    def straightforward():
        depths = depth_samples(NEAR, FAR, options.rays, options.samples, like=directions)
        parts = torch.arange(options.rays).split(options.chunk)
        return [render(network, maps, images, cameras, origins[p], directions[p], depths[p]) for p in parts]

    def rewritten():
        views = Views(source_views(images, cameras), cached)
        chunk = rays_per_chunk(options.samples, options.views, ours.coarse.width, maps)
        parts = torch.arange(options.rays).split(chunk)
        levels = [render_rays(ours, views, origins[p], directions[p], sampling)[-1] for p in parts]
        return [(level.rgb, level.depth) for level in levels]

    function = straightforward if name == "straightforward" else rewritten
    if check:
        return (torch.cat(column) for column in zip(*function(), strict=True))
    with MemoryPeak() as memory:
        function()
    return (*measure(function, options.repeats), memory.peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for key, value in {
        "rays": 128, "views": 10, "height": 378, "width": 504, "samples": 192, "depth": 4, "chunk": 500,
        "threads": 2, "repeats": 3,
    }.items():  # fmt: skip
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--arm", choices=["straightforward", "ours"])
    parser.add_argument("--save", action="store_true", help="write results/benchmarks/render.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.arm:
        print(*arm(options.arm, options))
        return
    arms = {name: in_own_process(__file__, name, sys.argv[1:]) for name in ("straightforward", "ours")}
    print(f"{options.rays} rays, {options.views} views {options.height}x{options.width}, {options.samples} samples")
    for name, (wall, cpu, peak) in arms.items():
        rate = f"{options.rays / wall:8.1f} rays/s {options.rays / cpu:8.1f} rays per CPU-s"
        print(f"{name:16} {rate} {peak / 2**20:8.0f} MiB")
    ratios = [a / b for a, b in zip(*arms.values(), strict=True)]
    print("ratio            wall {:.2f}x, CPU {:.2f}x, memory {:.2f}x less".format(*ratios))
    found = measured(options, arms, ratios)
    options.rays = min(options.rays, 32)
    for dtype in (torch.float32, torch.float64):
        (rgb, depth), (rgb2, depth2) = (arm(name, options, dtype, check=True) for name in arms)
        differences = (rgb - rgb2).abs().max(), (depth - depth2).abs().max()
        print("largest difference in {}: rgb {:.1e}, depth {:.1e}".format(dtype, *differences))
        found["largest_difference"][str(dtype).removeprefix("torch.")] = max(map(float, differences))
    if options.save:
        save("render", found)


if __name__ == "__main__":
    main()
