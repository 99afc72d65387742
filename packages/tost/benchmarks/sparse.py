"""What the zeros of a trained network save: bytes of the file, and the time of a batch, as ratios within one run.

python benchmarks/sparse.py [--archs oresnet32 resnet18 vgg16_bn] [--densities 0.1 0.05 0.02] [--batch 16] [--save]

``--save`` writes results/benchmarks/sparse.json.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
from step import measure, save

from tenfold_tost import apply_masks, create_model, erk_masks, save_compact, sparsify


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=["oresnet32", "resnet18", "vgg16_bn"])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.1, 0.05, 0.02])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--save", action="store_true", help="write results/benchmarks/sparse.json")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    rows = []
    print(f"batch {args.batch}, cpu, {torch.get_num_threads()} threads")
    for arch in args.archs:
        for density in args.densities:
            torch.manual_seed(0)
            model = create_model(arch).eval()
            apply_masks(model, erk_masks(model, density))
            sparse = sparsify(model)
            x = torch.randn(args.batch, *((1, 8, 8) if arch == "digits_net" else (3, 32, 32)))
            with tempfile.TemporaryDirectory() as folder:
                save_compact(Path(folder) / "compact.safetensors", model, arch=arch)
                compact = (Path(folder) / "compact.safetensors").stat().st_size
            dense = sum(t.numel() * t.element_size() for t in model.state_dict().values())
            with torch.inference_mode():
                error = float((model(x) - sparse(x)).abs().max() / model(x).abs().max())
                seconds = measure({"dense": partial(model, x), "sparse": partial(sparse, x)}, args.rounds)
            print(
                f"  {arch:<12} density {density:4.2f}: file {dense / compact:5.1f} x smaller, "
                f"{1e3 * seconds['dense']:8.2f} -> {1e3 * seconds['sparse']:8.2f} ms: "
                f"{seconds['dense'] / seconds['sparse']:5.2f} x as fast, largest relative difference {error:.0e}"
            )
            rows.append(
                {
                    "arch": arch,
                    "density": density,
                    "file_smaller": dense / compact,
                    "ms": {name: 1e3 * value for name, value in seconds.items()},
                    "faster": seconds["dense"] / seconds["sparse"],
                    "relative_difference": error,
                }
            )
    if args.save:
        save("sparse", {"batch": args.batch, "rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
