"""Whether the size of the random walks explains A5: claims of the fabricated views with other numbers of start nodes.

python studies/walks.py coauthorship-cora --starts 8 --seeds 20      # the release has 128

Writes the test accuracies by split to `results/studies/walks-DATA.json`; those at the released number are in the claim's own
result.
"""

import argparse
import functools
import statistics
from pathlib import Path

from tenfold_hypergcl import augment
from tenfold_hypergcl.recipe import Recipe
from tenfold_hypergcl.train import run_recipe
from tenfold_shared.checkpoint import write_json
from tenfold_shared.claims import Measurement
from tenfold_shared.cli import load_recipe
from tenfold_shared.reproduction import once
from tenfold_shared.run import Run, RunOptions

RESULTS = Path(__file__).parents[1] / "results"


def accuracy(recipe: Recipe, seed: int, name: str, folder: Path) -> Measurement:
    """Test accuracy on one split, per cent."""
    options = RunOptions(output=folder, name=name, seed=seed, quiet=True, resume=True)
    with Run("hypergcl", recipe, options) as run:
        _, result = run_recipe(run, recipe)
    return Measurement(None, extras=result.test)


def main() -> None:
    """Train A5 on every split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["coauthorship-cora", "cora", "citeseer"])
    parser.add_argument("--starts", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("runs/studies"))
    arguments = parser.parse_args()
    augment.WALK_STARTS = arguments.starts
    recipe, found = load_recipe("tenfold_hypergcl", f"{arguments.data}-setgnn", Recipe, method="A5"), []
    for seed in range(arguments.seeds):
        name = f"walks-{arguments.data}-{arguments.starts}-seed{seed}"
        kept = once(name, arguments.folder, functools.partial(accuracy, recipe, seed, name, arguments.folder))
        found.append(kept.extras["accuracy"])
        print(f"{arguments.starts} starts, split {seed}: {found[-1]:.2f} %", flush=True)
    content = {"starts": arguments.starts, "mean": statistics.fmean(found), "values": found}
    write_json(RESULTS / "studies" / f"walks-{arguments.data}.json", content)


if __name__ == "__main__":
    main()
