"""The claims: what they compare, and what they look at."""

import dataclasses

import pytest

from tenfold_augnerf.reproduce import VALUES
from tenfold_augnerf.train import Recipe
from tenfold_shared.claims import load_claims
from tenfold_shared.cli import load_recipe, recipes


def test_the_papers_recipes_look_at_held_out_views_as_published() -> None:
    chosen = [load_recipe("tenfold_augnerf", name, Recipe) for name in recipes("tenfold_augnerf")]
    looks = [r.optim.validate_every for r in chosen if r.data.name in ("llff", "blender") and r.optim.steps == 500_000]
    assert looks == [50_000] * 26


def test_every_claim_is_about_a_score_of_a_run() -> None:
    for claim in load_claims("tenfold_augnerf").claims:
        assert claim.metric.name in VALUES, claim.id


def test_the_means_of_the_other_papers_are_claims() -> None:
    """Section 7, in the measures that a run gives."""
    claims = load_claims("tenfold_augnerf")
    for name, baseline, psnr, ssim in (
        ("blender-mean", "nerf", 31.01, 0.947),
        ("llff-mean", "nerf", 26.50, 0.811),
        ("blender-mip", "mip-nerf", 33.09, 0.961),
    ):
        for metric, value in (("PSNR", psnr), ("SSIM", ssim)):
            claim = claims[f"{name}-{metric.lower()}"]
            assert (claim.metric.name, claim.provenance) == (f"test {metric}", "recalled")
            assert claim.arms[baseline].paper == value


@pytest.mark.parametrize("noise", ["clean", "saltpepper"])
def test_the_released_behaviour_has_a_control_of_its_own(noise: str) -> None:
    """Plain NeRF that has no jitter either, and nothing else changed."""
    arms = load_claims("tenfold_augnerf")[f"tiny-{noise}-controls"].arms
    released, control = (
        load_recipe("tenfold_augnerf", str(arms[name].recipe), Recipe, **arms[name].options)
        for name in ("auxiliary", "nerf-no-jitter")
    )
    assert not control.optim.jitter
    optim = dataclasses.replace(control.optim, jitter=True)
    assert dataclasses.replace(control, method="auxiliary", attack=released.attack, optim=optim) == released
