"""Closed-form coding of 64 patches, in CPU seconds, beside the least-squares solver applied to one patch after the
other.

    python benchmarks/fitting.py [--repeats 5] [--save]

``--save`` writes results/benchmarks/fitting.json.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

import tenfold_nid as nid
from tenfold_nid import embedded
from tenfold_shared.checkpoint import write_json


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median processor time of a call, all threads together, after one to warm up."""
    times = []
    for i in range(repeats + 1):
        start = time.process_time()
        work()
        if i:
            times.append(time.process_time() - start)
    return sorted(times)[len(times) // 2]


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write results/benchmarks/fitting.json")
    arguments = parser.parse_args()
    repeats = arguments.repeats
    torch.manual_seed(0)
    config = nid.DictionaryConfig(
        num_experts=256,
        num_topk=64,
        hidden_dim=128,
        ffm_map_size=128,
        ffm_map_scale=2.0,
        gate="strided",
        gate_hidden=64,
        size=(16, 16),
    )
    model = nid.NeuralDictionary(config).eval()
    patches = embedded.photograph_patches("test")
    mask = nid.observe_fraction(64, 256, 0.1, torch.Generator().manual_seed(0)).view(64, 16, 16)
    prior = nid.fit_prior(torch.randn(500, config.code_dim))

    def one_by_one() -> None:
        with torch.no_grad():
            design = model.design(nid.lattice((16, 16))).double()
            _, support = nid.gate_code(model, patches)
            for patch, atoms in zip(patches, support, strict=True):
                columns = torch.cat([atoms, torch.arange(256, 259)])
                extra = (1e-4 * 768) ** 0.5 * torch.eye(67, dtype=torch.float64)[:64]
                left = torch.cat([design[:, columns], extra])
                right = torch.cat([patch.flatten().double(), extra.new_zeros(64)])
                torch.linalg.lstsq(left, right[:, None], driver="gelsd")

    cases: dict[str, Callable[[], object]] = {
        "ridge on the gate's 64 atoms": lambda: nid.fit_codes(model, patches),
        "ridge on all 256 atoms": lambda: nid.fit_codes(model, patches, None, nid.FitOptions(support="all")),
        "ridge, 10 % of the pixels": lambda: nid.fit_codes(model, patches, mask),
        "map, 10 % of the pixels": lambda: nid.fit_codes(
            model, patches, mask, nid.FitOptions(solver="map"), prior=prior
        ),
        "omp, 64 atoms": lambda: nid.fit_codes(model, patches, None, nid.FitOptions(solver="omp")),
        "fista, 100 steps": lambda: nid.fit_codes(model, patches, None, nid.FitOptions(solver="fista")),
        "irls, 20 reweightings": lambda: nid.fit_codes(model, patches, None, nid.FitOptions(solver="irls", steps=20)),
        "adam on the codes, 100 steps": lambda: nid.fit_codes(model, patches, None, nid.FitOptions(solver="adam")),
        "lstsq, one patch after the other": one_by_one,
    }
    print(f"64 patches of 16×16×3, {torch.get_num_threads()} threads, torch {torch.__version__}")
    seconds = {name: cpu_seconds(work, repeats) for name, work in cases.items()}
    base = seconds["ridge on the gate's 64 atoms"]
    for name, value in seconds.items():
        print(f"  {name:34s} {value:7.3f} CPU s ({value / base:5.1f}x)")
    if arguments.save:
        outcome = {
            "patches": 64,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu_seconds": seconds,
        }
        write_json(Path(__file__).parents[1] / "results" / "benchmarks" / "fitting.json", outcome)


if __name__ == "__main__":
    main()
