"""What both benchmarks need: a scene, equal weights for both implementations, measurements in own processes."""

import argparse
import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from straightforward import FeatureNet, Network

from tenfold_gnt.cameras import pack_cameras, pixel_grid, rays_through
from tenfold_gnt.compat import load_official_state
from tenfold_gnt.features import ResUNet
from tenfold_gnt.network import GNT
from tenfold_gnt.render import Model
from tenfold_shared.scenes import tabletop_cameras


def networks(depth: int, dropout: float):
    """(ours, straightforward feature net, straightforward network) with the same weights."""
    torch.manual_seed(0)
    feature_net, network = FeatureNet(), Network(depth=depth, dropout=dropout)
    features, ours = ResUNet(), GNT(depth=depth, dropout=dropout)
    load_official_state(features, feature_net.state_dict())
    load_official_state(ours, network.state_dict())
    return Model(features, ours), feature_net, network


def scene(views: int, height: int, width: int, rays: int):
    """Random pictures seen by cameras around a table: images, cameras [views, 34], and rays of one more camera."""
    torch.manual_seed(1)
    cameras = tabletop_cameras(views + 1, size=width)
    matrices = torch.from_numpy(cameras.intrinsics).float()
    matrices[:, 1, 2] = height / 2
    packed = pack_cameras(matrices, torch.from_numpy(cameras.camera_to_world).float(), height, width)
    smooth = torch.rand(views, 3, height // 6, width // 6)
    images = torch.nn.functional.interpolate(smooth, size=(height, width), mode="bilinear").permute(0, 2, 3, 1)
    grid = pixel_grid(height, width)
    pixels = grid[torch.randperm(len(grid))[:rays]]
    return images.contiguous(), packed[:-1], *rays_through(packed[-1], pixels)


class MemoryPeak:
    """Largest resident set while the block runs, in bytes, above what was resident before it."""

    def __enter__(self):
        self.start, self.peak, self.running = resident(), 0, True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self):
        while self.running:
            self.peak = max(self.peak, resident() - self.start)
            time.sleep(0.002)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()


def resident() -> int:
    """Bytes resident now."""
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * resource.getpagesize()


def measure(function, repeats: int) -> tuple[float, float]:
    """(wall seconds, CPU seconds) of the fastest of `repeats` calls."""
    best = (float("inf"), float("inf"))
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        best = min(best, (time.perf_counter() - wall, time.process_time() - cpu))
    return best


def in_own_process(script: str, arm: str, arguments: list[str]) -> list[float]:
    """Run one arm alone, so that neither inherits the other's memory; its last line holds the numbers."""
    command = [sys.executable, script, "--arm", arm, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(x) for x in done.stdout.split("\n")[-2].split()]


def measured(options: argparse.Namespace, arms: dict[str, list[float]], ratios: list[float]) -> dict[str, Any]:
    """What --save writes: sizes, each arm's figures, and how many times less ours takes."""
    names = ("wall_seconds", "cpu_seconds", "peak_bytes")
    sizes = {key: value for key, value in vars(options).items() if isinstance(value, int) and key != "save"}
    found = {name.replace(" ", "_"): dict(zip(names, values, strict=True)) for name, values in arms.items()}
    less = dict(zip(names, ratios, strict=True))
    return {"torch": torch.__version__, **sizes, **found, "times_less": less, "largest_difference": {}}


def save(name: str, found: dict[str, Any]) -> None:
    """Write results/benchmarks/NAME.json."""
    folder = Path(__file__).parents[1] / "results" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
