"""The paper's claims: which arms are run, which numbers are compared."""

import dataclasses
from pathlib import Path

from tenfold_cilqud.recipe import Recipe
from tenfold_cilqud.train import run_recipe
from tenfold_shared.claims import Arm, Claim, Measurement
from tenfold_shared.cli import load_recipe
from tenfold_shared.reproduction import Request, once, reproduce_claims
from tenfold_shared.run import Run, RunOptions


def reproduce(*claims: str, request: Request, options: RunOptions) -> None:
    """Measure claims of the paper; without arguments the miniature on digits.

    Args:
        claims: their names, as ``tenfold-cilqud claims`` lists them.

    """
    from tenfold_cilqud.figures import figures  # noqa: PLC0415 - plotting is slow to import

    reproduce_claims("cilqud", claims, request, options, measure, figures)


VALUES = {
    "accuracy after the last task": "last",
    "average incremental accuracy": "average",
    "forgetting": "forgetting",
    "robust accuracy after the last task": "robust_last",
    "accuracy under the ensemble after the last task": "final_last",
}
"""Name of a claim's metric -> what of a run it is."""


def measure(claim: Claim, arm: Arm, seed: int, *, options: RunOptions, folder: Path) -> Measurement:
    """What one arm gives with one seed; an arm that several claims share is run once."""
    name = f"{arm.key}-seed{seed}"
    measured = once(name, folder, lambda: run_arm(arm, name, options, folder))
    return dataclasses.replace(measured, value=measured.extras[VALUES[claim.metric.name]])


def run_arm(arm: Arm, name: str, options: RunOptions, folder: Path) -> Measurement:
    """Run an arm's recipe; its folder keeps the networks of all tasks."""
    recipe = load_recipe("tenfold_cilqud", str(arm.recipe), Recipe, **arm.options)
    with Run("cilqud", recipe, dataclasses.replace(options, name=name), parent=folder / "runs") as run:
        result = run_recipe(run, recipe)
        return Measurement(result.last, extras={**dataclasses.asdict(result), "run": name}, **run.usage())
