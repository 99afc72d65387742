"""Whether the size of the random walks explains A5: `coauthorship-cora-fabricated` with other numbers of start nodes.

python studies/walks.py --starts 8 --seeds 20      # the release has 128

Writes test accuracies by split to `results/studies/walks.json`, beside the released number's and the supervised encoder's.
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
from tenfold_shared.reproduction import committed_outcomes, once
from tenfold_shared.run import Run, RunOptions

RESULTS = Path(__file__).parents[1] / "results"


def accuracy(recipe: Recipe, seed: int, folder: Path) -> Measurement:
    """Test accuracy on one split, per cent."""
    options = RunOptions(output=folder, name=f"walks-{augment.WALK_STARTS}-{seed}", seed=seed, quiet=True, resume=True)
    with Run("hypergcl", recipe, options) as run:
        _, result = run_recipe(run, recipe)
    return Measurement(result.test["accuracy"])


def main() -> None:
    """Train A5 on every split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("runs/studies"))
    arguments = parser.parse_args()
    measured = {outcome.claim: outcome for outcome in committed_outcomes("tenfold_hypergcl")}
    values = {
        "supervised": measured["coauthorship-cora-supervised"].arms["supervised"].values,
        f"{augment.WALK_STARTS} starts": measured["coauthorship-cora-fabricated"].arms["A5"].values,
    }
    augment.WALK_STARTS = arguments.starts
    recipe, found = load_recipe("tenfold_hypergcl", "coauthorship-cora-setgnn", Recipe, method="A5"), []
    for seed in range(arguments.seeds):
        measure = functools.partial(accuracy, recipe, seed, arguments.folder)
        found.append(once(f"walks-{arguments.starts}-seed{seed}", arguments.folder, measure).value)
        print(f"{arguments.starts} starts, split {seed}: {found[-1]:.2f} %", flush=True)
    values[f"{arguments.starts} starts"] = tuple(found)
    rows = {name: [value for value in row[: len(found)] if value is not None] for name, row in values.items()}
    table = {name: {"mean": statistics.fmean(row), "values": row} for name, row in rows.items()}
    write_json(RESULTS / "studies" / "walks.json", table)


if __name__ == "__main__":
    main()
