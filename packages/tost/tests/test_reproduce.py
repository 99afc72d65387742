"""What the claims measure and compare."""

import dataclasses
from pathlib import Path

import pytest

from tenfold_shared.claims import Measurement, load_claims
from tenfold_shared.cli import load_recipe
from tenfold_shared.run import RunOptions
from tenfold_tost import reproduce, ticket_rounds
from tenfold_tost.recipe import Recipe


def test_rounds_of_the_tickets_of_the_recipes_and_claims() -> None:
    """As many as the paper's sparsities have, none for the last thousandth: 2.8 % after sixteen, 10.7 % after ten."""
    mask = load_recipe("tenfold_tost", "cifar100-resnet18-tickets", Recipe).mask
    assert len(ticket_rounds(mask.density, mask.percent)) == 16
    arms = [arm for claim in load_claims("tenfold_tost").claims for arm in claim.arms.values()]
    tickets = [arm.options["mask.density"] for arm in arms if arm.options.get("mask.method") == "lth"]
    assert tickets
    assert all(len(ticket_rounds(density)) == 10 for density in tickets)


def test_a_gain_is_over_the_vanilla_arm_even_where_that_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`reproduce tickets-gain --arms tost`."""
    claim = load_claims("tenfold_tost")["tickets-gain"]
    values = {"tost": 71.0, "vanilla": 69.5}
    monkeypatch.setattr(reproduce, "_measured", lambda arm, *_: Measurement(0.0, extras={"accuracy": values[arm.name]}))
    alone = dataclasses.replace(claim, arms={"tost": claim.arms["tost"]})
    measured = reproduce.measure(alone, claim.arms["tost"], 0, options=RunOptions(output=tmp_path), folder=tmp_path)
    assert measured.value == 1.5


def test_what_the_claims_compare_besides_accuracies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gains over vanilla training at the arm's own sparsity; zeros, averaged over the activations."""
    claims, accuracies = load_claims("tenfold_tost"), {("tost", 0.02): 80.0, ("vanilla", 0.02): 85.0}

    def measured(arm, *_: object) -> Measurement:
        at = arm.options["techniques"], arm.options["mask.density"]
        return Measurement(0.0, extras={"accuracy": accuracies.get(at, 96.0), "zero_rates": {"1": 0.5, "2": 0.25}})

    monkeypatch.setattr(reproduce, "_measured", measured)
    for name, expected in (("mini-erk-growth", -5.0), ("mini-erk-95-zeros", 37.5)):
        claim = claims[name]
        arm = claim.arms[claim.method]
        assert reproduce.measure(claim, arm, 0, options=RunOptions(output=tmp_path), folder=tmp_path).value == expected
