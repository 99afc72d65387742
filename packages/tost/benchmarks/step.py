"""Cost of a training step with ghosts, as ratios measured in turns within one run.

    python benchmarks/step.py [--arch resnet18] [--batch 16] [--rounds 5] [--threads 1] [--save]

The arms: the plain masked step (1.0), with soft neurons, with ghost skips, with both, after both have faded, and with both
in the straightforward way: skips as alpha * BN(jump(x)), swish as x * sigmoid(beta * x), masks derived from the weights
at every step. The floor is what the skips' 1x1 convolutions multiply, relative to the network's own operations.
``--save`` writes results/benchmarks/step-ARCH.json.
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from tenfold_shared.checkpoint import write_json
from tenfold_tost import (
    GhostActivation,
    Ghosts,
    GhostSkip,
    MaskKeeper,
    Skips,
    Soft,
    SparseRecipe,
    apply_masks,
    create_model,
    erk_masks,
    has_ghosts,
)


def measure(arms: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Shortest processor seconds of each arm. The arms take turns, so that a busy machine disturbs all of them alike."""
    clock = time.process_time if not torch.accelerator.is_available() else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, arm in arms.items():
            synchronize()
            start = clock()
            arm()
            synchronize()
            if turn:  # the first turn warms up
                times[name].append(clock() - start)
    return {name: min(values) for name, values in times.items()}


def save(name: str, found: dict[str, Any]) -> None:
    """Write results/benchmarks/NAME.json, with what it was measured on."""
    about = {"torch": torch.__version__, "device": str(device()), "threads": torch.get_num_threads()}
    write_json(Path(__file__).parents[1] / "results" / "benchmarks" / f"{name}.json", {**about, **found})


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def device() -> torch.device:
    """The accelerator, if there is one."""
    return (torch.accelerator.is_available() and torch.accelerator.current_accelerator()) or torch.device("cpu")


def step_of(model: nn.Module, recipe: SparseRecipe, x: Tensor, y: Tensor, keeper: MaskKeeper) -> Callable[[], None]:
    """One masked SGD step."""
    optimiser = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=2e-4)

    def step() -> None:
        loss = recipe.loss(model(x), y, 0.1)
        optimiser.zero_grad()
        loss.backward()
        keeper.mask_gradients()
        optimiser.step()
        keeper.mask_weights()

    return step


def plain_skip(skip: Any) -> Callable[[Tensor], Tensor]:
    """Alpha BN(jump(x)), term by term."""
    return lambda x: skip.alpha * skip.norm(skip.jump(x))


def plain_swish(neuron: Any) -> Callable[[Tensor], Tensor]:
    """X sigmoid(beta x), term by term."""
    return lambda x: x * torch.sigmoid(neuron.beta * x)


def straightforward(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """The same step with both ghosts, written as one would at first."""
    for module in model.modules():
        if isinstance(module, GhostSkip):
            module.__dict__["forward"] = plain_skip(module)
        if isinstance(module, GhostActivation):
            module.__dict__["forward"] = plain_swish(module)
    optimiser = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=2e-4)
    convolutions = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]

    def step() -> None:
        loss = cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        for weight in convolutions:
            assert weight.grad is not None
            weight.grad *= (weight.detach().abs() > 0).to(weight.dtype)
        optimiser.step()

    return step


def operations(model: nn.Module, x: Tensor) -> int:
    """Floating-point operations of a forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model)(x)
    return counter.get_total_flops()


def kept(arm: Callable[[], object]) -> int:
    """Bytes that the forward pass of a step keeps for its backward pass, parameters apart."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        arm()
    return sum(storages.values())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--save", action="store_true", help="write results/benchmarks/step-ARCH.json")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    size = (1, 8, 8) if args.arch == "digits_net" else (3, 32, 32)
    x, y = torch.randn(args.batch, *size, device=device()), torch.randint(0, 10, (args.batch,), device=device())
    recipes = {
        "plain": SparseRecipe(None, None, None, None),
        "soft neurons": SparseRecipe(Soft(), None, None, None),
        "ghost skips": SparseRecipe(None, Skips(), None, None),
        "both": SparseRecipe(Soft(), Skips(), None, None),
        "both, faded": SparseRecipe(Soft(), Skips(), None, None),
    }
    arms: dict[str, Callable[[], object]] = {}
    floor = 1.0
    for name, recipe in recipes.items():
        model = create_model(args.arch).to(device())
        masks = erk_masks(model, args.density)
        apply_masks(model, masks)
        own = operations(model, x)
        ghosts = Ghosts(model, recipe, x)
        ghosts.advance(1.0 if name.endswith("faded") else 0.1)
        assert has_ghosts(model) == (name not in ("plain", "both, faded"))
        if name == "ghost skips":
            floor = operations(model, x) / own
        arms[name] = step_of(model, recipe, x, y, MaskKeeper(model, masks))
        if name == "both":
            arms["both, straightforward"] = straightforward(copy.deepcopy(model), x, y)
    seconds = measure(arms, args.rounds)
    print(f"{args.arch}, batch {args.batch}, {device()}, {torch.get_num_threads()} threads, density {args.density}")
    for name, value in seconds.items():
        print(f"  {name:<24} {1e3 * value:9.2f} ms   {value / seconds['plain']:5.2f} x plain")
    print(f"  floor of the skips: {floor:.2f} x the plain step's operations")
    memory = {name: kept(arm) for name, arm in arms.items()}
    shown = ", ".join(f"{name} {value / memory['plain']:.2f} x" for name, value in memory.items())
    print(f"  kept for the backward pass: {shown}")
    if args.save:
        sizes = {"arch": args.arch, "batch": args.batch, "density": args.density, "rounds": args.rounds}
        times = {name: 1e3 * value for name, value in seconds.items()}
        save(f"step-{args.arch}", {**sizes, "ms": times, "kept_bytes": memory, "skips_operations": floor})


if __name__ == "__main__":
    main()
