"""Cost of an incremental step: passes merged as here against one pass for every term, and attacks together against apart.

    python benchmarks/step.py [--width 16] [--batch 64] [--rounds 5]

The floor of the standard step are its four forward-backward passes; the straightforward one has five, as released. The
robust step's floor is one attack on all its images. All arms are measured in turns within one run.
"""

import argparse
import copy
import time
from collections.abc import Callable

import torch

from tenfold_cilqud import (
    Answered,
    Labelled,
    Robust,
    Weights,
    balanced_term,
    create_model,
    distillation_terms,
    labelled_attack,
    random_term,
    rkd_attack,
    worst_cases,
)


def measure(arms: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Shortest seconds of each arm; they take turns, so that a busy machine disturbs all alike."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    where = (torch.accelerator.is_available() and torch.accelerator.current_accelerator()) or torch.device("cpu")
    net = create_model("preact18", 2, 5, width=args.width).to(where).train()
    x = torch.rand(args.batch, 3, 32, 32, device=where)
    y, half, weights = torch.arange(args.batch, device=where) % 4, args.batch // 2, Weights()
    whole, old, new = Labelled(x, y, args.batch), Labelled(x[:half], y[:half], half), Labelled(x[half:], y[half:], half)
    teacher = copy.deepcopy(net).eval()
    with torch.no_grad():
        features = teacher.features(x)
        answered = Answered(x, teacher.logits(features, 1), teacher.logits(features, 1, "aux"), features, args.batch)

    def step(apart: bool) -> None:
        net.zero_grad()
        loss = random_term(net, whole, 2, weights)[0] + balanced_term(net, [(0.5, new), (0.5, old)], 2, weights)
        for heads in (("aux",), ("main",)) if apart else (("aux", "main"),):
            loss = loss + torch.stack(list(distillation_terms(net, answered, 1, weights, heads).values())).sum()
        loss.backward()

    settings = Robust(adv="madry", lwf="attacked", steps=3)
    noise = 2 * torch.rand_like(x) - 1
    attacks = [
        labelled_attack(net, whole, 2, ("aux",), settings, noise),
        labelled_attack(net, new, 2, ("main",), settings, noise[:half]),
        labelled_attack(net, old, 2, ("main",), settings, noise[:half]),
        rkd_attack(net, answered, 1, 2.0, noise),
    ]
    seconds = measure(
        {
            "step, unlabeled images passed once": lambda: step(False),
            "step, passed once a head": lambda: step(True),
            "attacks together": lambda: worst_cases(net, attacks, settings),
            "attacks apart": lambda: [worst_cases(net, [attack], settings) for attack in attacks],
        },
        args.rounds,
    )
    print(f"preact18 of width {args.width}, batch {args.batch}, {where}, {torch.get_num_threads()} threads")
    base = seconds["step, unlabeled images passed once"]
    for name, value in seconds.items():
        print(f"  {name:<36} {1e3 * value:9.1f} ms   {value / base:5.2f} x the step")


if __name__ == "__main__":
    main()
