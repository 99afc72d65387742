"""Evaluating and training a mixture: merged heads against the straightforward ways, in one run.

The hot loop is head mixing and rendering, ``B·E·C·d + N·B·C·d`` multiply-adds merged against ``N·d·E·C + B·E·N·C``
dense. The floor is the time a matrix product of the merged counts takes on the machine, measured here too.

    python benchmarks/mixture.py [--repeats 5] [--save]

``--save`` writes results/benchmarks/mixture.json.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tenfold_nid as nid
from tenfold_shared.checkpoint import write_json


def median_ms(work: Callable[[], object], repeats: int, device: str) -> float:
    """Median time of a call after one to warm up: processor time on CPU (a busy machine disturbs it less), else
    wall.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    times = []
    for i in range(repeats + 1):
        start = clock()
        work()
        if device != "cpu":
            torch.accelerator.synchronize()
        if i:
            times.append(1000 * (clock() - start))
    return sorted(times)[len(times) // 2]


def edges(experts: nid.SharedTrunkExperts, features: Tensor, gates: nid.Gates, bias: Tensor) -> Tensor:
    """Every atom everywhere, then one message [N, C] for each signal and active atom: the graph formulation."""
    atoms = experts.atoms(features).transpose(0, 1)
    assert gates.support is not None
    assert gates.value is not None
    messages = atoms[gates.support.flatten()] * gates.value.flatten()[:, None, None]
    out = messages.new_zeros(len(bias), *messages.shape[1:])
    owner = torch.arange(len(bias), device=bias.device).repeat_interleave(gates.support.shape[1])
    return out.index_add(0, owner, messages) + bias[:, None]


def routes(device: str, repeats: int) -> dict[str, Any]:
    """Forward and backward of every route at 1024 experts, 128 active, 1024 coordinates and 16 signals."""
    experts = nid.SharedTrunkExperts(nid.NetworkConfig(ffm_map_size=64), 1024).to(device)
    features = torch.randn(1024, 256, device=device, requires_grad=True)
    code = torch.randn(16, 1024, device=device, requires_grad=True)
    bias = torch.zeros(16, 3, device=device)

    def evaluate(route: str) -> Tensor:
        gates = nid.top_k_gates(code, 128)
        if route == "edges":
            return edges(experts, features, gates, bias)
        return experts.mix(features, gates, bias, route)  # type: ignore[arg-type]

    def there_and_back(route: str) -> None:
        evaluate(route).square().sum().backward()

    with torch.no_grad():
        reference = evaluate("dense")
        for route in ("merge", "bag", "edges"):
            error = float((evaluate(route) - reference).abs().max() / reference.abs().max())
            print(f"  {route:6s} differs from dense by {error:.1e} relative")
        forward = {r: median_ms(partial(evaluate, r), repeats, device) for r in ("dense", "merge", "bag", "edges")}
    both = {r: median_ms(partial(there_and_back, r), repeats, device) for r in ("dense", "merge", "bag", "edges")}
    with torch.no_grad():
        left, right = torch.randn(16, 1024, device=device), torch.randn(1024, 768, device=device)
        tall, wide = torch.randn(1024, 256, device=device), torch.randn(256, 48, device=device)
        floor = median_ms(lambda: (left @ right, tall @ wide), repeats, device)
    print(f"  floor (two matrix products) {floor:.2f} ms; merge is {forward['merge'] / floor:.1f}x the floor")
    for route, ahead in forward.items():
        print(
            f"  {route:6s} forward {ahead:8.2f} ms ({ahead / forward['merge']:5.1f}x merge)   "
            f"forward+backward {both[route]:8.2f} ms ({both[route] / both['merge']:5.1f}x merge)"
        )
    return {
        "forward_ms": forward,
        "forward_backward_ms": both,
        "floor_ms": floor,
        "dense_over_merge": {
            "forward": forward["dense"] / forward["merge"],
            "forward_backward": both["dense"] / both["merge"],
        },
    }


def straightforward_step(
    model: nid.NeuralDictionary, optimizer: torch.optim.Optimizer, ids: Tensor, coords: Tensor, targets: Tensor
) -> None:
    """The same step with every atom evaluated, one message an edge, and one optimiser call a parameter."""
    gates, bias, importance, usage = model.gating(ids)
    assert usage is not None
    assert isinstance(model.experts, nid.SharedTrunkExperts)
    preds = edges(model.experts, model.experts.features(coords), gates, bias)
    loss = nn.functional.mse_loss(preds, targets) + 0.01 * (nid.cv_squared(usage) + nid.cv_squared(importance))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def step(device: str, repeats: int) -> dict[str, float]:
    """One training step at the sizes of the released scripts: 64-pixel images, 16 signals, 1024 coordinates.

    Ours keeps the embedding of half the lattice and takes each point together with its antipode.
    """
    config = nid.DictionaryConfig(gate="codebook", num_signals=500)
    points = torch.cat([half := torch.randperm(2048)[:512], 4095 - half])
    coords, ids = nid.lattice((64, 64), device=device)[points], torch.arange(16, device=device)
    targets = torch.rand(16, 1024, 3, device=device)
    torch.manual_seed(0)
    plain = nid.NeuralDictionary(config).to(device)
    one_by_one = torch.optim.Adam(plain.parameters(), lr=1e-4, foreach=False, fused=False)
    model = nid.NeuralDictionary(config).to(device)
    sampled, optimizer = nid.Sampled(model, "antipodal"), nid.adam(list(model.parameters()))
    kept = model.experts.map(nid.lattice((64, 64), device=device)[:2048])
    pick = points[:512].to(device)
    times = {
        "edges": median_ms(lambda: straightforward_step(plain, one_by_one, ids, coords, targets), repeats, device),
        "merge": median_ms(
            lambda: nid.training_step(sampled, optimizer, ids, kept[pick], targets, nid.Objective()), repeats, device
        ),
    }
    print(
        f"  training step: straightforward {times['edges']:.1f} ms, ours {times['merge']:.1f} ms, "
        f"{times['edges'] / times['merge']:.1f}x"
    )
    return {"straightforward_ms": times["edges"], "ours_ms": times["merge"], "ratio": times["edges"] / times["merge"]}


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", action="store_true", help="write results/benchmarks/mixture.json")
    arguments = parser.parse_args()
    print(f"{arguments.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    outcome = {
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "mixture": routes(arguments.device, arguments.repeats),
        "training_step": step(arguments.device, arguments.repeats),
    }
    if arguments.save:
        write_json(Path(__file__).parents[1] / "results" / "benchmarks" / "mixture.json", outcome)


if __name__ == "__main__":
    main()
