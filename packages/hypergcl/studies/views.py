"""Why two fabricated views lie off the paper's values: the size of A5's random walks, and what A0's two views differ by.

python studies/views.py walks coauthorship-cora --starts 8 --seeds 20      # A5; the release has 128
python studies/views.py equal coauthorship-cora --seeds 20                 # A0 without dropout in the contrast

Writes the test accuracies by split to `results/studies/WHAT-DATA.json`; those of the recipe are in the claim's own result.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tenfold_hypergcl import augment, train
from tenfold_hypergcl.recipe import Recipe
from tenfold_shared.checkpoint import write_json
from tenfold_shared.claims import Measurement
from tenfold_shared.cli import load_recipe
from tenfold_shared.reproduction import once
from tenfold_shared.run import Run, RunOptions

RESULTS = Path(__file__).parents[1] / "results"


def without_dropout(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same contrast of what the encoder gives in evaluation mode."""

    def contrast(model: nn.Module, *arguments: Any, **options: Any) -> Tensor:
        model.eval()
        value = loss(model, *arguments, **options)
        model.train()
        return value

    return contrast


def accuracy(recipe: Recipe, seed: int, name: str, folder: Path) -> Measurement:
    """Test accuracy on one split, per cent."""
    options = RunOptions(output=folder, name=name, seed=seed, quiet=True, resume=True)
    with Run("hypergcl", recipe, options) as run:
        _, result = train.run_recipe(run, recipe)
    return Measurement(None, extras=result.test)


def main() -> None:
    """Train on every split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["walks", "equal"])
    parser.add_argument("data", choices=["coauthorship-cora", "cora", "citeseer"])
    parser.add_argument("--starts", type=int, default=8, help="start nodes of the walks")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("runs/studies"))
    arguments = parser.parse_args()
    about: dict[str, Any] = {}
    if arguments.what == "walks":
        augment.WALK_STARTS = about["starts"] = arguments.starts
    else:
        train.contrastive_loss = without_dropout(train.contrastive_loss)
    method = "A5" if arguments.what == "walks" else "A0"
    recipe, found = load_recipe("tenfold_hypergcl", f"{arguments.data}-setgnn", Recipe, method=method), []
    for seed in range(arguments.seeds):
        name = "-".join([arguments.what, arguments.data, *map(str, about.values()), f"seed{seed}"])
        kept = once(name, arguments.folder, functools.partial(accuracy, recipe, seed, name, arguments.folder))
        found.append(kept.extras["accuracy"])
        print(f"{name}: {found[-1]:.2f} %", flush=True)
    content = {**about, "mean": statistics.fmean(found), "values": found}
    write_json(RESULTS / "studies" / f"{arguments.what}-{arguments.data}.json", content)


if __name__ == "__main__":
    main()
