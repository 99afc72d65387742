"""What a reproduction draws, and what its arms are."""

from pathlib import Path

import pytest

from tenfold_bip.recipe import Recipe
from tenfold_bip.reproduce import figures, winning_tickets
from tenfold_shared.claims import Measurement, load_claims, summarise
from tenfold_shared.cli import load_recipe


def test_every_network_has_its_own_curves(tmp_path: Path) -> None:
    """Claims of two networks at the same sparsity, and a failed seed of one arm."""
    accuracies = {"resnet20s": 80.0, "resnet18": 90.0}
    claims = load_claims("tenfold_bip").select(["jpeg-resnet20s-keep-26", "jpeg-resnet18-keep-26"], None)
    outcomes = []
    for claim in claims:
        extras = {"keep": 0.262, "passes": 10, "history": []}
        good = Measurement(accuracies[claim.model], extras=extras)
        results = {arm: [Measurement(None, error="NaN") if arm == "imp" else good, good] for arm in claim.arms}
        outcomes.append(summarise(claim, results, [0, 1], environment={}))
    drawn = figures(claims, outcomes, tmp_path)
    curves = {f.caption.partition(" on ")[0]: f.figure.axes[0] for f in drawn if f.title == "Accuracy against sparsity"}
    assert list(curves) == list(accuracies)
    for network, axes in curves.items():
        heights = {float(y) for line in axes.get_lines() for y in line.get_ydata()}
        assert accuracies[network] in heights
        assert not heights & (set(accuracies.values()) - {accuracies[network]})


def test_winning_tickets_are_not_below_the_dense_network() -> None:
    """A dense network of 89 and 91 %; other metrics than accuracy do not count."""
    claims = load_claims("tenfold_bip")
    means = {"mini-ticket": (91.0, 0.262), "mini-keep-11": (90.0, 0.1074), "mini-keep-5": (89.5, 0.055)}
    outcomes = []
    for claim in claims.select([*means, "mini-cost"], None):
        mean, keep = means.get(claim.id, (900.0, 0.01))
        extras = {"keep": keep, "passes": 10, "history": []}
        values = {arm: [mean, mean] if arm == "bip" else [80.0, 80.0] for arm in claim.arms} | {"dense": [89.0, 91.0]}
        results = {arm: [Measurement(value, extras=extras) for value in values[arm]] for arm in claim.arms}
        outcomes.append(summarise(claim, results, [0, 1], environment={}))
    lines = [line.partition("; ")[0] for line in winning_tickets(claims, outcomes)]
    best = "bip best 91.00 % with 26.20 % of the weights, sparsest"
    assert lines == [
        f"winning tickets, digits_cnn on digits, 90.00 % (dense): {best} 10.74 %",
        f"winning tickets, digits_cnn on digits, 88.59 % (dense less one standard deviation): {best} 5.50 %",
    ]
    assert "imp none" in winning_tickets(claims, outcomes)[0]


@pytest.mark.parametrize("claim", load_claims("tenfold_bip").claims, ids=lambda claim: claim.id)
def test_arms_are_what_they_are_called(claim) -> None:
    """An arm's method is the one it is named after, the best of the paper's is the claim's, and Hydra is fine-tuned."""
    published = {arm.name: arm.paper for arm in claim.arms.values() if arm.paper is not None}
    assert not published or published[claim.method] == max(
        published.values()
    )  # each is judged in the paper's direction
    for arm in claim.arms.values():
        recipe = load_recipe("tenfold_bip", str(arm.recipe), Recipe, **arm.options)
        assert recipe.method == {"no-implicit-term": "bip"}.get(arm.name, arm.name)
        assert recipe.method != "hydra" or recipe.finetune.epochs >= recipe.hydra.epochs
