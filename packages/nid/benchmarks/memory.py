"""Memory of a training step of the CelebA configuration, merged heads beside the straightforward graph formulation.

Two measurements. The largest tensor that any operation of the forward and the backward pass makes: for the whole
configuration, its residual gate and batch of 256 signals included, on the meta device, where only shapes are computed.
And the peak of the resident memory: each step in a process of its own, with a codebook as the gate, since the
activations of the convolutions would hide the rest.

    python benchmarks/memory.py [--save]

``--save`` writes results/benchmarks/memory.json.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from mixture import edges
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tenfold_nid as nid
from tenfold_shared.checkpoint import write_json

SIGNALS, POINTS = 256, 256
MIB = 2**20


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation gives; views of smaller ones, such as expanded ones, do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.shape: tuple[int, ...] = ()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do the operation and look at what it gives."""
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() > self.bytes:
                self.shape, self.bytes = tuple(tensor.shape), tensor.untyped_storage().nbytes()
        return found


Prepared = tuple[nid.NeuralDictionary, Tensor, Tensor, Tensor]


def prepare(gate: str, device: str) -> Prepared:
    """The configuration's model, a batch of signals or their ids, the coordinates, the values there."""
    torch.manual_seed(0)
    shape = {**vars(nid.celeba_config()), "gate": gate, "num_signals": SIGNALS}
    with torch.device(device):
        model = nid.NeuralDictionary(nid.DictionaryConfig(**shape))
        signal = torch.arange(SIGNALS) if gate == "codebook" else torch.rand(SIGNALS, 16, 16, 3)
        return model, signal, nid.lattice((16, 16)).to(device), torch.rand(SIGNALS, POINTS, 3)


def step(kind: str, model: nid.NeuralDictionary, signal: Tensor, coords: Tensor, targets: Tensor) -> None:
    """Forward and backward pass: heads merged, or a message for each signal and active atom."""
    if kind == "merge":
        nid.objective(model(signal, coords), targets, nid.Objective()).total.backward()
        return
    assert isinstance(model.experts, nid.SharedTrunkExperts)
    gates, bias, _, _ = model.gating(signal)
    preds = edges(model.experts, model.experts.features(coords), gates, bias)
    nn.functional.mse_loss(preds, targets).backward()


def largest(kind: str) -> tuple[list[int], float]:
    """Shape and MiB of the largest tensor of the whole configuration's step."""
    prepared = prepare("resnet", "meta")
    with Largest() as seen:
        step(kind, *prepared)
    return list(seen.shape), seen.bytes / MIB


def peak(kind: str) -> float:
    """MiB by which a step in a process of its own raises the peak of the resident memory."""
    command = [sys.executable, __file__, "--only", kind]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Print both, as ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["merge", "edges"], help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help="write results/benchmarks/memory.json")
    arguments = parser.parse_args()
    if arguments.only:
        prepared = prepare("codebook", "cpu")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step(arguments.only, *prepared)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
        return
    config = nid.celeba_config()
    forbidden = [SIGNALS * config.num_topk, POINTS * config.out_dim]
    outcome: dict[str, Any] = {
        "configuration": "celeba: 4096 atoms, 256 active, 256 signals, 256 coordinates, 3 channels, float32",
        "forbidden_tensor": {"shape": forbidden, "mib": forbidden[0] * forbidden[1] * 4 / MIB},
        "torch": torch.__version__,
    }
    peaks = {kind: peak(kind) for kind in ("merge", "edges")}  # first: a process starts from its parent's peak
    for kind, growth in peaks.items():
        shape, mib = largest(kind)
        outcome[kind] = {"peak_growth_mib": growth, "largest_tensor": {"shape": shape, "mib": mib}}
    outcome["peak_ratio"] = peaks["edges"] / peaks["merge"]
    print(json.dumps(outcome, indent=1))
    if arguments.save:
        write_json(Path(__file__).parents[1] / "results" / "benchmarks" / "memory.json", outcome)


if __name__ == "__main__":
    main()
