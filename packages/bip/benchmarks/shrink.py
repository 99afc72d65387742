"""Inference of the physically smaller network against the masked one and the dense one, measured in turns in one run.

python benchmarks/shrink.py [--models resnet18 vgg16_bn] [--structure filter] [--keep 0.5] [--batch 16] [--save]

``--save`` writes results/benchmarks/shrink-STRUCTURE.json.
"""

import argparse
from functools import partial

import torch
from iteration import device, measure, save

from tenfold_bip import bake_masks, create_model, flops, prune_parametrize, shrink


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet20s", "resnet18", "vgg16"])
    parser.add_argument("--structure", default="filter", choices=["filter", "channel"])
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's default")
    parser.add_argument("--save", action="store_true", help="write results/benchmarks/shrink-STRUCTURE.json")
    args = parser.parse_args()

    if args.threads:
        torch.set_num_threads(args.threads)
    found = {"structure": args.structure, "keep": args.keep, "batch": args.batch, "rounds": args.rounds, "models": []}
    print(f"{args.structure}s kept {args.keep}, batch {args.batch}, {device()}, {torch.get_num_threads()} threads")
    for name in args.models:
        torch.manual_seed(0)
        inputs = torch.randn(args.batch, 3, 32, 32, device=device())
        model = create_model(name, 10).to(device()).eval()
        for module in model.modules():  # batch norm as after training: zeroed filters emit constants
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.normal_(module.bias, 0.0, 0.2)
        masked = prune_parametrize(model, args.keep, args.structure)
        small = shrink(masked, inputs)
        baked = bake_masks(masked)
        with torch.inference_mode():
            error = float((small(inputs) - baked(inputs)).abs().max() / baked(inputs).abs().max())
            seconds = measure({"masked": partial(baked, inputs), "small": partial(small, inputs)}, args.rounds)
        before, after = flops(baked, inputs).dense, flops(small, inputs).dense
        found["models"].append(
            {
                "model": name,
                "masked_ms": 1e3 * seconds["masked"],
                "small_ms": 1e3 * seconds["small"],
                "faster": seconds["masked"] / seconds["small"],
                "fewer_operations": before / after,
                "relative_difference": error,
            }
        )
        print(
            f"  {name:<10} {1e3 * seconds['masked']:8.2f} -> {1e3 * seconds['small']:8.2f} ms: "
            f"{seconds['masked'] / seconds['small']:.2f} x faster, {before / after:.2f} x fewer operations, "
            f"largest relative difference {error:.1e}"
        )
    if args.save:
        save(f"shrink-{args.structure}", found)


if __name__ == "__main__":
    main()
