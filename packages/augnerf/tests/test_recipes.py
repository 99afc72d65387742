"""Every recipe is built and stepped, and goes with every method."""

import dataclasses
from pathlib import Path
from typing import get_args

import pytest
import torch

from tenfold_augnerf.data import Data, DataConfig
from tenfold_augnerf.train import Method, Recipe, Trainer
from tenfold_augnerf.views import Views
from tenfold_shared.cli import load_recipe, recipes
from tenfold_shared.run import Run, RunOptions
from tenfold_shared.scenes import blocks_cameras


def generated(config: DataConfig) -> Data:
    """Random pictures seen by the blocks' cameras, with the data set's kind of bounds."""
    cameras = blocks_cameras(3, 36)
    draw = torch.Generator().manual_seed(0)
    turns = torch.from_numpy(cameras.camera_to_world[:, :3, :3]).float() @ torch.linalg.inv(
        torch.from_numpy(cameras.intrinsics[0]).float()
    )
    colours = torch.randint(0, 256, (3, 36, 36, 3), generator=draw, dtype=torch.uint8)
    views = Views(colours, turns, torch.from_numpy(cameras.centres.copy()).float(), 2.0, 6.0)
    return Data(views, views, views, views, config.white)


@pytest.mark.parametrize("name", list(recipes("tenfold_augnerf")))
def test_every_recipe_is_built_and_stepped(name: str, tmp_path: Path) -> None:
    """The recipe's networks at their real size take one step with the perturbations in force."""
    chosen = load_recipe("tenfold_augnerf", name, Recipe)
    attack = dataclasses.replace(chosen.attack, warmup=0.0, ramp=0.0)
    optim = dataclasses.replace(chosen.optim, batch_rays=2)
    chosen = dataclasses.replace(chosen, attack=attack, optim=optim)
    with Run("augnerf", chosen, RunOptions(output=tmp_path, name="x", device="cpu", quiet=True)) as run:
        trainer = Trainer(run, chosen, generated(chosen.data))
        for field in trainer.renderer.children():  # no density is dead at the start
            torch.nn.init.constant_(field.mlp.alpha_linear.bias, 0.5)
        before = trainer.renderer.nerf.mlp.pts_linears[0].weight.detach().clone()
        losses = trainer.step(0)
    assert losses.clean.isfinite()
    assert (losses.adversarial is None) == (chosen.method == "nerf")
    assert not torch.equal(trainer.renderer.nerf.mlp.pts_linears[0].weight, before)


@pytest.mark.parametrize("name", list(recipes("tenfold_augnerf")))
def test_every_method_goes_with_every_recipe(name: str, tmp_path: Path) -> None:
    """`--config NAME --method METHOD` and nothing else: an outer step of each, at a small size, with the attack in force."""
    chosen = load_recipe("tenfold_augnerf", name, Recipe)
    chosen = dataclasses.replace(
        chosen,
        model=dataclasses.replace(chosen.model, depth=2, width=8),
        coarse=4,
        fine=min(chosen.fine, 3),
        attack=dataclasses.replace(chosen.attack, warmup=0.0, ramp=0.0),
        optim=dataclasses.replace(chosen.optim, batch_rays=3),
    )
    data = generated(chosen.data)
    with Run("augnerf", chosen, RunOptions(output=tmp_path, name="x", device="cpu", quiet=True)) as run:
        for method in get_args(Method):
            trainer = Trainer(run, dataclasses.replace(chosen, method=method), data)
            losses = trainer.step(0)
            assert losses.clean.isfinite(), method
            assert (losses.adversarial is None) == (method in ("nerf", "sam")), method
            assert (trainer.renderer.variant.branch == "auxiliary") == (method == "auxiliary")
