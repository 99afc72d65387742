"""The large-kernel layer at the four stages of SLaK-T: every way to compute it, interleaved in one run, as ratios.

    python benchmarks/layer.py                           CPU: float32, batch 4, 2 threads
    python benchmarks/layer.py --device cuda --dtype bfloat16 --batch 64 --save results/benchmarks/layer-cuda.json
    python benchmarks/layer.py --memory --save results/benchmarks/layer-memory-cpu.json    peak memory in place of time

With ATEN_CPU_CAPABILITY=avx2, ONEDNN_MAX_CPU_ISA=AVX2 and MKL_ENABLE_INSTRUCTIONS=AVX2 in the environment, PyTorch and
its libraries compute as on a processor without AVX-512.

Two tables: inference, and training (forward and backward with gradients for the map and all kernels). Methods that give
only the summed map cannot feed the three batch norms of training; they are marked "1 map". The last line of each table
is the sum over the 3, 3, 9, 3 blocks, and how many times faster than each peer our form is. The floor is the time of
the multiply-adds that do not meet padding, at the rate of the matrix product measured in the same run.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold_shared.checkpoint import write_json
from tenfold_slak.large_kernel import CHANNELS_LAST, large_kernel_dwconv, large_kernel_pair

#: channels, height = width, kernel, blocks
STAGES = [(124, 56, 51, 3), (249, 28, 49, 3), (499, 14, 47, 9), (998, 7, 13, 3)]
SMALL = 5
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Layer = Callable[..., list[Tensor]]


def plain(x: Tensor, tall: Tensor, wide: Tensor, small: Tensor) -> list[Tensor]:
    """Three framework convolutions: what a port would write."""
    return [large_kernel_dwconv(x, kernel, "conv2d") for kernel in (tall, wide, small)]


def three_maps(backend: str) -> Layer:
    """Our training form: one map a branch."""
    return lambda x, *kernels: [large_kernel_dwconv(x, kernel, backend) for kernel in kernels]


def folded(backend: str) -> Layer:
    """Our inference form: the small kernel inside the tall one, two convolutions, one map."""

    def run(x: Tensor, tall: Tensor, wide: Tensor, small: Tensor) -> list[Tensor]:
        margin = (tall.shape[2] - SMALL) // 2
        tall = tall + F.pad(small, (0, 0, margin, margin))
        return [large_kernel_pair(x, tall, wide, backend)]

    return run


def merged(backend: str) -> Layer:
    """One dense M x M kernel, one map."""

    def run(x: Tensor, tall: Tensor, wide: Tensor, small: Tensor) -> list[Tensor]:
        margin, inner = (tall.shape[2] - SMALL) // 2, (tall.shape[2] - SMALL) // 2
        kernel = F.pad(tall, (margin, margin)) + F.pad(wide, (0, 0, margin, margin)) + F.pad(small, (inner,) * 4)
        return [large_kernel_dwconv(x, kernel, backend)]

    return run


def methods(device: str, training: bool) -> dict[str, tuple[Layer, bool]]:
    """Name -> function, whether it is given channels-last maps. The first is ours."""
    found: dict[str, tuple[Layer, bool]] = {
        "ours": (three_maps("auto"), False) if training else (folded("auto"), device == "cpu" and CHANNELS_LAST),
        "conv2d contiguous": (plain, False),
        "conv2d channels-last": (plain, True),
        "FFT, 1 map": (folded("fft"), False),
        "Toeplitz GEMM, 1 map": (folded("toeplitz"), False),
        "dense kernel by FFT, 1 map": (merged("fft"), False),
    }
    if device != "cpu":
        found["Triton"] = (three_maps("triton") if training else folded("triton"), False)
        found["Toeplitz GEMM"] = (three_maps("toeplitz") if training else folded("toeplitz"), False)
        found["dense kernel by conv2d, 1 map"] = (merged("conv2d"), False)
    return found


class Case:
    """Inputs of one stage, and one timed call on them."""

    def __init__(self, stage: int, args: argparse.Namespace, layer: Layer, channels_last: bool) -> None:
        channels, size, k, _ = STAGES[stage]
        options = {"device": args.device, "dtype": getattr(torch, args.dtype)}
        form = torch.channels_last if channels_last else torch.contiguous_format
        generator = torch.Generator(args.device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, **options)

        self.x = draw(args.batch, channels, size, size).contiguous(memory_format=form).requires_grad_(args.training)
        shapes = [(k, SMALL), (SMALL, k), (SMALL, SMALL)]
        self.kernels = [draw(channels, 1, *shape).requires_grad_(args.training) for shape in shapes]
        self.grad = draw(args.batch, channels, size, size).contiguous(memory_format=form)
        self.layer, self.args = layer, args

    def __call__(self) -> float:
        if self.args.device != "cpu":
            torch.cuda.synchronize()
        start = CLOCKS[self.args.clock]()
        with torch.set_grad_enabled(self.args.training), torch.inference_mode(not self.args.training):
            maps = self.layer(self.x, *self.kernels)
            if self.args.training:
                torch.autograd.grad(maps, (self.x, *self.kernels), [self.grad] * len(maps))
        if self.args.device != "cpu":
            torch.cuda.synchronize()
        return CLOCKS[self.args.clock]() - start


def useful_macs(size: int, kernel: int, batch: int, channels: int) -> int:
    """Multiply-adds of the three branches that do not meet padding."""

    def pairs(taps: int) -> int:  # (output, tap) pairs inside a line of `size`
        return sum(min(taps, size - o + taps // 2, o + taps // 2 + 1, size) for o in range(size))

    return batch * channels * (2 * pairs(kernel) * pairs(SMALL) + pairs(SMALL) ** 2)


def matmul_rate(args: argparse.Namespace) -> float:
    """Multiply-adds a second of a large matrix product."""
    n = 1024 if args.device == "cpu" else 8192
    a = torch.randn(n, n, device=args.device, dtype=getattr(torch, args.dtype))
    times = []
    for _ in range(7):
        if args.device != "cpu":
            torch.cuda.synchronize()
        start = CLOCKS[args.clock]()
        a @ a
        if args.device != "cpu":
            torch.cuda.synchronize()
        times.append(CLOCKS[args.clock]() - start)
    return n**3 / min(times)


def peak_mib(call: Callable[[], Any], device: str) -> float:
    """MiB that a call needs at its peak beyond what is held before it: of the process (Linux), or of the GPU."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        held = _resident("VmRSS")
        call()
        return _resident("VmHWM") - held
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def _resident(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def alone(function: Callable[..., float], *args: Any) -> float:
    """What a function of a module returns in a fresh process."""
    # glibc gives the memory of a tensor back as soon as it is freed, so that the peak is what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def layer_peak(name: str, args: argparse.Namespace) -> float:
    """`peak_mib` of a method at stage 1, whose maps are the largest."""
    torch.set_num_threads(args.threads)
    method = methods(args.device, args.training)[name]
    Case(len(STAGES) - 1, args, *method)()  # loads the libraries; its maps are small
    return peak_mib(Case(0, args, *method), args.device)


def memory_table(args: argparse.Namespace) -> dict[str, float]:
    """Measure and print the peaks of all methods, one process each; returns MiB beyond the inputs."""
    print(f"\n{_kind(args)}, stage 1: peak memory beyond the inputs, MiB")
    peaks = {name: round(alone(layer_peak, name, args), 1) for name in methods(args.device, args.training)}
    for name, peak in peaks.items():
        print(f"{name:32}{peak:10.1f}{peak / peaks['ours']:9.2f}x")
    return peaks


def _kind(args: argparse.Namespace) -> str:
    return "training (forward + backward)" if args.training else "inference"


def table(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure one table, print it, and return milliseconds by stage, their sum and its ratio to ours."""
    names = methods(args.device, args.training)
    totals = dict.fromkeys(names, 0.0)
    floor = 0.0
    rate = matmul_rate(args)
    print(f"\n{_kind(args)}, median ms of {args.rounds} rounds")
    columns = "".join(f"{f'{c} x {s}x{s}, {k}':>18}" for c, s, k, _ in STAGES)
    print(f"{'':32}{columns}{'sum of blocks':>16}{'ours is':>12}")
    cells: dict[str, list[float]] = {name: [] for name in names}
    for stage, (channels, size, kernel, blocks) in enumerate(STAGES):
        cases = {name: Case(stage, args, *method) for name, method in names.items()}
        times: dict[str, list[float]] = {name: [] for name in names}
        for case in cases.values():
            case()
        for _ in range(args.rounds):
            for name, case in cases.items():
                times[name].append(case())
        for name, values in times.items():
            cells[name].append(statistics.median(values))
            totals[name] += blocks * cells[name][-1]
        # Backward holds two products of the same size, for the map and for the kernels.
        floor += blocks * useful_macs(size, kernel, args.batch, channels) * (3 if args.training else 1) / rate
    ours = next(iter(totals.values()))
    rows: dict[str, dict[str, Any]] = {}
    for name, values in cells.items():
        row = "".join(f"{1e3 * value:18.2f}" for value in values)
        print(f"{name:32}{row}{1e3 * totals[name]:16.1f}{totals[name] / ours:11.2f}x")
        stages, total, ratio = [round(1e3 * value, 2) for value in values], 1e3 * totals[name], totals[name] / ours
        rows[name] = {"stages_ms": stages, "sum_of_blocks_ms": round(total, 1), "ours_is_faster_by": round(ratio, 2)}
    rows["floor"] = {"sum_of_blocks_ms": round(1e3 * floor, 1)}
    print(f"{'floor':32}{'':{18 * len(STAGES)}}{1e3 * floor:16.1f}{floor / ours:11.2f}x")
    return rows


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--clock", default="wall", choices=list(CLOCKS), help="cpu: for busy machines, with --threads 1"
    )
    parser.add_argument("--memory", action="store_true", help="peak memory in place of time, one process a method")
    parser.add_argument("--save", type=Path, help="write the tables to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    outcome = where(args)
    for args.training in (False, True):
        measured = memory_table(args) if args.memory else table(args)
        outcome["training" if args.training else "inference"] = measured
    if args.save is not None:
        write_json(args.save, outcome)


def where(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers of a run depend on."""
    cpu = args.device == "cpu"
    name = f"CPU, {args.threads} threads" if cpu else torch.cuda.get_device_name()
    found = {"device": name, "torch": torch.__version__, "dtype": args.dtype, "batch": args.batch}
    return {**found, "instructions": torch.backends.cpu.get_cpu_capability()} if cpu else found


if __name__ == "__main__":
    main()
