"""The arms of the claims on data that has to be brought: generated here, few and small."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tenfold_nid import embedded, reproduce, train
from tenfold_nid.recipe import Recipe
from tenfold_nid.signals import DataConfig, Signals
from tenfold_shared.claims import Arm, Measurement, load_claims
from tenfold_shared.cli import load_recipe
from tenfold_shared.run import RunOptions

SMALL = {
    "schedule.epochs": 1,
    "schedule.batch_size": 2,
    "model.num_experts": 24,
    "model.num_topk": 8,
    "model.hidden_dim": 12,
    "model.ffm_map_size": 16,
    "model.gate_hidden": 4,
    "network.hidden_dim": 8,
    "network.num_layers": 3,
    "network.ffm_map_size": 16,
    "latent_dim": 4,
}


def generated(config: DataConfig) -> Signals:
    """Signals of a data set's shape."""
    if config.name == "shapenet":
        fields = embedded.distance_fields(4, 12)
        return Signals(fields[:2], fields[2:], fields[2:])
    slices = torch.rand(4, 16, 16, 1 if config.name == "ct" else 3)
    return Signals(slices[:2], slices[2:], slices[2:], (16, 32) if config.patch else None)


@pytest.mark.parametrize(
    ("claim_id", "metrics"),
    [
        ("celeba-quality-k256", ("PSNR", "SSIM", "LPIPS", "parameters", "throughput")),
        ("ct-few-views", ("PSNR",)),
        ("shapenet-few-points", ("Chamfer distance", "normal consistency")),
    ],
)
def test_every_arm_gives_what_its_claims_compare(
    claim_id: str, metrics: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce, "lpips", lambda preds, truth, released: torch.ones(len(truth)))
    monkeypatch.setattr(reproduce, "load_signals", generated)
    monkeypatch.setattr(train, "load_signals", generated)
    claim = next(c for c in load_claims("tenfold_nid").claims if c.id == claim_id)
    options = RunOptions(output=tmp_path, device="cpu", quiet=True)
    for name, arm in claim.arms.items():
        changes = {**SMALL, "data.views": 9, **arm.options}
        recipe: Recipe = load_recipe("tenfold_nid", str(arm.recipe), Recipe, **changes)
        gate = "codebook" if recipe.model.gate == "codebook" else "conv"
        fraction = 0.1 if recipe.data.name == "shapenet" else 1.0
        changes |= {"fit.steps": min(recipe.fit.steps, 4), "data.fraction": fraction, "model.gate": gate}
        recipe = load_recipe("tenfold_nid", str(arm.recipe), Recipe, **changes)
        extras = reproduce.coded(recipe, 0, options, tmp_path)
        for metric in metrics:
            assert np.isfinite(reproduce.VALUES[metric](extras)), (name, metric)


def test_a_claim_of_speed_sets_two_arms_in_relation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = load_claims("tenfold_nid")
    for claim in claims.claims:
        assert claim.metric.name in {*reproduce.VALUES, reproduce.SPEED_UP}
    claim, options = claims["celeba-speed"], RunOptions(output=tmp_path, device="cpu", quiet=True)
    seconds = {"nid": 0.5, "siren": 75.0}

    def run(arm: Arm, seed: int, options: RunOptions, folder: Path) -> Measurement:
        return Measurement(None, extras={"points": [(0, 0.0, 9.0), (7, seconds[arm.name], 31.0)]})

    monkeypatch.setattr(reproduce, "_run_arm", run)
    found = {
        name: reproduce.measure(claim, arm, 0, options=options, folder=tmp_path).value
        for name, arm in claim.arms.items()
    }
    assert found == {"nid": 150.0, "siren": 1.0}


def test_all_arms_of_a_claim_are_shown_the_same() -> None:
    for claim in load_claims("tenfold_nid").claims:
        data = [load_recipe("tenfold_nid", str(a.recipe), Recipe, **a.options).data for a in claim.arms.values()]
        # a network an image stands beside a dictionary of its patches
        assert len({str(dataclasses.replace(d, patch=0)) for d in data}) == 1, claim.id


def test_a_coarse_field_is_not_the_true_surface() -> None:
    data = DataConfig(name="primitives", size=8, train_subset=1, test_subset=4)
    coarse = embedded.distance_fields(4, 8, seed=1)
    found = reproduce.shape_scores(coarse, coarse, data)
    assert 0.01 < found["chamfer"] < 0.1  # the samples of a lattice of 8, spacing 0.29, and the points between them
    assert 0.8 < found["normal_consistency"] < 0.999
    none = reproduce.shape_scores(torch.ones_like(coarse), coarse, data)
    assert none["chamfer"] > 0.3
    assert none["normal_consistency"] == 0
