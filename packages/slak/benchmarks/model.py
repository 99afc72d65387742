"""Whole networks: images a second at 224 pixels, training and inference, interleaved in one run, as ratios to SLaK-T.

    python benchmarks/model.py                        CPU: float32, batch 4, 2 threads
    python benchmarks/model.py --device cuda --dtype bfloat16 --batch 128
    python benchmarks/model.py --memory --save results/benchmarks/model-memory-cpu.json    peak memory in place of time

Networks with random weights, all stored ones computed: unstructured zeros cost as much as other weights.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from layer import alone, peak_mib, where
from torch import nn

import tenfold_slak
from tenfold_shared.checkpoint import write_json
from tenfold_slak.layer import Form, merge_large_kernels

Network = Callable[[], nn.Module]


def merged(form: Form) -> nn.Module:
    """SLaK-T for inference."""
    return merge_large_kernels(timm.create_model("slak_tiny"), form)


#: Networks by their names in the table. timm has no RepLKNet: SLaK-T's widths with its dense 31 + 5 kernels stand for it.
NETWORKS: dict[str, Network] = {
    "SLaK-T": partial(timm.create_model, "slak_tiny"),
    "SLaK-T, plain conv2d": partial(timm.create_model, "slak_tiny", backend="conv2d"),
    "ConvNeXt-T (timm)": partial(timm.create_model, "convnext_tiny"),
    "RepLKNet style, dense 31": partial(timm.create_model, "replknet_tiny_31"),
    "RepLKNet style, dense 51": partial(timm.create_model, "replknet_tiny_51"),
}
INFERENCE: dict[str, Network] = {
    "SLaK-T, merged in two": partial(merged, "two"),
    "SLaK-T, merged in one": partial(merged, "one"),
}
#: Also with weights and images in channels-last, which changes what the framework chooses for these.
ALSO_CHANNELS_LAST = ("SLaK-T, plain conv2d", "SLaK-T, merged in two", "ConvNeXt-T (timm)")
CHANNELS_LAST = ", channels-last"


def titles(training: bool) -> list[str]:
    """The rows of a table; the first is what the others are compared with."""
    found = [*NETWORKS, *(() if training else INFERENCE)]
    return found + [title + CHANNELS_LAST for title in found if title in ALSO_CHANNELS_LAST]


class Case:
    """A network and its images, and one timed call on them."""

    def __init__(self, title: str, args: argparse.Namespace, training: bool) -> None:
        build = {**NETWORKS, **INFERENCE}[title.removesuffix(CHANNELS_LAST)]
        form = torch.channels_last if title.endswith(CHANNELS_LAST) else torch.contiguous_format
        self.model = build().to(args.device).to(memory_format=form).train(training)
        self.images = torch.randn(args.batch, 3, args.size, args.size, device=args.device).to(memory_format=form)
        self.args, self.training = args, training

    def __call__(self) -> float:
        """Seconds of a training step's forward and backward, or of a forward."""
        dtype = getattr(torch, self.args.dtype)
        start = time.perf_counter()
        with (
            torch.autocast(self.args.device, dtype, enabled=dtype != torch.float32),
            torch.inference_mode(not self.training),
            torch.set_grad_enabled(self.training),
        ):
            score = self.model(self.images).float().sum()
        if self.training:
            score.backward()
            self.model.zero_grad()
        score.item()  # waits for the device
        return time.perf_counter() - start


def model_peak(title: str, args: argparse.Namespace, training: bool) -> float:
    """MiB of a call beyond the weights and the images; training's hold the gradients of the weights."""
    torch.set_num_threads(args.threads)
    case = Case(title, args, training)
    with torch.no_grad():  # loads the libraries; its maps are small
        case.model(case.images[:1, :, :64, :64])
    return peak_mib(case, args.device)


def images_per_second(args: argparse.Namespace, training: bool) -> dict[str, dict[str, float]]:
    """One table: the median of the rounds, and how many times faster than it SLaK-T is."""
    cases = {title: Case(title, args, training) for title in titles(training)}
    for case in cases.values():
        case()
    times: dict[str, list[float]] = {title: [] for title in cases}
    for _ in range(args.rounds):
        for title, case in cases.items():
            times[title].append(case())
    medians = {title: statistics.median(values) for title, values in times.items()}
    ours = medians["SLaK-T"]
    return {
        title: {"images_per_second": round(args.batch / median, 2), "slak_is_faster_by": round(median / ours, 2)}
        for title, median in medians.items()
    }


def peaks(args: argparse.Namespace, training: bool) -> dict[str, dict[str, float]]:
    """One table: the peak of a call, each in a process of its own, and how many times SLaK-T's it is."""
    found = {title: alone(model_peak, title, args, training) for title in titles(training)}
    ours = found["SLaK-T"]
    return {title: {"peak_mib": round(peak), "times_slak": round(peak / ours, 2)} for title, peak in found.items()}


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--memory", action="store_true", help="peak memory in place of time, one process a network")
    parser.add_argument("--save", type=Path, help="write the tables to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"tenfold-slak {tenfold_slak.__version__}, torch {torch.__version__}, {args.device}, {args.dtype}")
    outcome: dict[str, Any] = {**where(args), "size": args.size}
    for training in (False, True):
        rows = peaks(args, training) if args.memory else images_per_second(args, training)
        outcome["training" if training else "inference"] = rows
        print(f"\n{'training' if training else 'inference'}: {', '.join(rows['SLaK-T'])}")
        for title, row in rows.items():
            print(f"{title:44}" + "".join(f"{value:10.2f}" for value in row.values()))
    if args.save is not None:
        write_json(args.save, outcome)


if __name__ == "__main__":
    main()
