"""Peak memory of a training step of the CelebA configuration, merged heads beside the graph formulation's edge tensor.

The step runs in a process of its own, so that the peak is its own; the gate is a codebook, since convolutions would
hide the rest.

    python benchmarks/memory.py
"""

import argparse
import resource
import subprocess
import sys

import torch
from mixture import edges
from torch import nn

import tenfold_nid as nid

SIGNALS, POINTS = 256, 256


def run(kind: str) -> None:
    """One step; prints the growth of the peak over the model and its data in MiB, and the largest tensor saved."""
    torch.manual_seed(0)
    shape = {**vars(nid.celeba_config()), "gate": "codebook", "num_signals": SIGNALS}
    model = nid.NeuralDictionary(nid.DictionaryConfig(**shape))
    ids, coords, targets = torch.arange(SIGNALS), nid.lattice((16, 16)), torch.rand(SIGNALS, POINTS, 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    largest = 0

    def note(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        if kind == "merge":
            losses = nid.objective(model(ids, coords), targets, nid.Objective())
            losses.total.backward()
        else:
            gates, bias, _, _ = model.gating(ids)
            preds = edges(model.experts, model.experts.features(coords), gates, bias)
            nn.functional.mse_loss(preds, targets).backward()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{(after - before) / 1024:.0f} {largest * 4 / 2**20:.1f}")


def main() -> None:
    """Print both and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["merge", "edges"], help=argparse.SUPPRESS)
    only = parser.parse_args().only
    if only:
        run(only)
        return
    peaks = {}
    for kind in ("merge", "edges"):
        done = subprocess.run([sys.executable, __file__, "--only", kind], check=True, capture_output=True, text=True)
        peaks[kind], largest = map(float, done.stdout.split())
        print(f"  {kind:6s} peak +{peaks[kind]:.0f} MiB, largest tensor kept for backward {largest:.1f} MiB")
    config = nid.celeba_config()
    tensor = SIGNALS * config.num_topk * POINTS * config.out_dim * 4 / 2**20
    print(f"  one [signals × active, coordinates × channels] tensor would be {tensor:.0f} MiB")
    print(f"  ratio of the peaks {peaks['edges'] / peaks['merge']:.1f}x")


if __name__ == "__main__":
    main()
