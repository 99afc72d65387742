"""Whole networks: images a second at 224 pixels, training and inference, interleaved in one run, as ratios to SLaK-T.

python benchmarks/model.py                        CPU: float32, batch 4, 2 threads
python benchmarks/model.py --device cuda --dtype bfloat16 --batch 128
"""

import argparse
import statistics
import time

import timm
import torch
from torch import nn

import tenfold_slak
from tenfold_slak.layer import merge_large_kernels

#: Name in the table -> timm name. timm has no RepLKNet, so its style is built from our layer: dense 31 + 5.
NETWORKS = {
    "SLaK-T": "slak_tiny",
    "ConvNeXt-T (timm)": "convnext_tiny",
    "RepLKNet style, dense 31": "replknet_tiny_31",
    "RepLKNet style, dense 51": "replknet_tiny_51",
}


def networks(args: argparse.Namespace, training: bool) -> dict[str, nn.Module]:
    """The networks of one table; inference shows SLaK-T merged in both forms and by plain convolutions too."""
    found = {title: timm.create_model(name) for title, name in NETWORKS.items()}
    found["SLaK-T, plain conv2d"] = timm.create_model("slak_tiny", backend="conv2d")
    if not training:
        found["SLaK-T, merged in two"] = merge_large_kernels(timm.create_model("slak_tiny"), "two")
        found["SLaK-T, merged in one"] = merge_large_kernels(timm.create_model("slak_tiny"), "one")
    return {title: model.to(args.device).train(training) for title, model in found.items()}


def one(model: nn.Module, images: torch.Tensor, args: argparse.Namespace, training: bool) -> float:
    """Seconds of a training step's forward and backward, or of a forward."""
    dtype = getattr(torch, args.dtype)
    start = time.perf_counter()
    with (
        torch.autocast(args.device, dtype, enabled=dtype != torch.float32),
        torch.inference_mode(not training),
        torch.set_grad_enabled(training),
    ):
        score = model(images).float().sum()
    if training:
        score.backward()
        model.zero_grad()
    score.item()  # waits for the device
    return time.perf_counter() - start


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"tenfold-slak {tenfold_slak.__version__}, torch {torch.__version__}, {args.device}, {args.dtype}")
    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    for training in (False, True):
        models = networks(args, training)
        times: dict[str, list[float]] = {title: [] for title in models}
        peaks = {}
        for title, model in models.items():
            if args.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            one(model, images, args, training)
            peaks[title] = torch.cuda.max_memory_allocated() / 2**20 if args.device != "cpu" else None
        for _ in range(args.rounds):
            for title, model in models.items():
                times[title].append(one(model, images, args, training))
        reference = statistics.median(times["SLaK-T"])
        print(f"\n{'training' if training else 'inference'}: images/s, SLaK-T's speed over it, peak MiB")
        for title, values in times.items():
            median = statistics.median(values)
            memory = "" if peaks[title] is None else f"{peaks[title]:10.0f}"
            print(f"{title:28}{args.batch / median:10.1f}{median / reference:9.2f}x{memory}")


if __name__ == "__main__":
    main()
