"""Training: every recipe, mixed precision, networks from scratch."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import call, keep

import tenfold_nid as nid
from tenfold_nid import train
from tenfold_nid.evaluate import Observed, trajectory, warm_up
from tenfold_nid.networks import NetworkConfig
from tenfold_nid.optimisation import Objective
from tenfold_nid.recipe import UNTRAINED, Linear, Meta, Method, Recipe, Schedule
from tenfold_nid.signals import DataConfig, DataName, Signals, observation
from tenfold_shared.cli import load_recipe, recipes
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions


def generated(config: DataConfig) -> Signals:
    """Signals of a data set's shape, few and small where nothing bakes the size in."""
    side = config.patch or min(config.size or 25, 32)
    channels = 1 if config.name in {"faces", "olivetti", "yale", "phantoms", "ct", "primitives", "shapenet"} else 3
    spatial = (8,) * 3 if config.name in {"primitives", "shapenet"} else (side, side)
    if config.name == "photographs":
        spatial = (16, 16)
    train, test = torch.rand(3, *spatial, channels), torch.rand(2, *spatial, channels)
    return Signals(train, test, test)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (Meta, {"inner_steps": 0}, "meta.inner_steps takes 1 or more"),
        (Meta, {"rate": -1.0}, "meta.rate positive"),
        (Linear, {"sparsity": 0}, "linear.sparsity takes 1 or more"),
        (Recipe, {"latent_lr": 0.0}, "latent_lr a positive number"),
        (Objective, {"l1_cap": -1.0}, "l1_cap must not be negative"),
        (NetworkConfig, {"ffm_map_scale": -1.0}, "must not be negative"),
    ],
)
def test_settings_that_mean_nothing_are_refused(kind: type, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kind(**options)


@pytest.mark.parametrize("name", recipes("tenfold_nid"))
def test_every_recipe_is_built_at_full_size_and_stepped(name: str, tmp_path: Path, monkeypatch) -> None:
    recipe: Recipe = load_recipe("tenfold_nid", name, Recipe)
    monkeypatch.setattr(train, "load_signals", generated)
    monkeypatch.setattr(train.Plan, "steps", property(lambda self: 1, lambda self, value: None), raising=False)
    if recipe.finetune:
        shape = dataclasses.asdict(recipe.model) | {
            "size": (16, 16),
            "hidden_dim": 16,
            "ffm_map_size": 16,
            "gate": "conv",
        }
        recipe = dataclasses.replace(recipe, pretrained=keep(tmp_path, **shape))
    data = dataclasses.replace(recipe.data, views=min(recipe.data.views, 5), test_views=min(recipe.data.test_views, 4))
    schedule = dataclasses.replace(
        recipe.schedule, epochs=1, batch_size=1 if recipe.model.gate == "resnet" else 2, chunk_size=32
    )
    linear = dataclasses.replace(recipe.linear, components=2, sparsity=1, iterations=1)
    recipe = dataclasses.replace(recipe, data=data, schedule=schedule, linear=linear)
    with Run("nid", recipe, RunOptions(output=tmp_path, device="cpu", quiet=True)) as run:
        if recipe.method in UNTRAINED:
            with pytest.raises(UserError, match="learns nothing"):
                train.run_recipe(run, recipe)
            return
        model, _ = train.run_recipe(run, recipe)
        values = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(list(v.values())[3:]).all() for v in values)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_small_dictionary_learns_faces(tmp_path: Path) -> None:
    recipe: Recipe = load_recipe("tenfold_nid", "faces-nid", Recipe)
    recipe = dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, epochs=40, warmup_epochs=10))
    with Run("nid", recipe, RunOptions(output=tmp_path, device="cpu", quiet=True)) as run:
        model, signals = train.run_recipe(run, recipe)
    assert isinstance(model, nid.NeuralDictionary)
    with torch.no_grad():
        shown = model.render(model.sparse_code(signals.test), nid.lattice((25, 25))).view_as(signals.test)
    blind = signals.train.mean(dim=0).expand_as(signals.test)
    gain = nid.psnr(shown, signals.test).mean() - nid.psnr(blind, signals.test).mean()
    assert float(gain) > 1  # dB over the mean face, which knows nothing of the signal


def test_training_in_mixed_precision(tmp_path: Path) -> None:
    recipe: Recipe = load_recipe("tenfold_nid", "faces-nid", Recipe)
    recipe = dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, epochs=2, warmup_epochs=1))
    with Run("nid", recipe, RunOptions(output=tmp_path, device="cpu", quiet=True, precision="bf16")) as run:
        model, _ = train.run_recipe(run, recipe)
        losses = run.logged("train", "loss")
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("chunk", [1024, 7])
@pytest.mark.parametrize(
    "data", [{"name": "phantoms", "size": 8, "views": 5, "test_views": 1}, {"name": "faces", "fraction": 0.3}], ids=str
)
def test_networks_from_scratch_learn_from_what_is_observed(data: dict, chunk: int, tmp_path: Path, monkeypatch) -> None:
    config = DataConfig(**data)
    images = torch.rand(2, 8, 8, 1)
    if config.name == "phantoms":  # the one view sums along the rows, so that their order there does not matter
        others = images.flip(2)
    else:
        mask = observation(images, config.fraction, 0)
        assert mask is not None
        others = torch.where(mask[..., None], images, 7.0)
    recipe = Recipe(
        method="scratch",
        data=config,
        network=nid.NetworkConfig(hidden_dim=6, pos_emb="Id", act_type="sine"),
        schedule=Schedule(epochs=3, chunk_size=chunk, lr=1e-2),
    )
    learned = []
    for name, test in (("first", images), ("other", others)):
        monkeypatch.setattr(train, "load_signals", lambda config, test=test: Signals(test, test, test))
        with Run("nid", recipe, RunOptions(output=tmp_path, name=name, device="cpu", quiet=True)) as run:
            learned.append(list(train.run_recipe(run, recipe)[0].parameters()))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*learned, strict=True))


def test_an_arm_is_the_same_whatever_its_process_measured_before() -> None:
    recipe = load_recipe("tenfold_nid", "photographs-siren", Recipe, **{"network.hidden_dim": 8, "fit.steps": 2})
    patches = torch.rand(2, 16, 16, 3)
    observed = Observed(patches, patches, None, None, None, None)
    values = []
    for first in (True, False):
        if first:
            warm_up.cache_clear()
        torch.manual_seed(0)
        values.append([point.psnr for point in trajectory(None, recipe, observed, (0, 1, 2))[0]])
    assert values[0] == values[1]


@pytest.mark.parametrize("change", [{"weight_decay": 10.0}, {"schedule": "cosine"}], ids=str)
@pytest.mark.parametrize(
    ("method", "data"), [("scratch", "faces"), ("maml", "faces"), ("latent", "faces"), ("scratch", "pointcloud")]
)
def test_baselines_take_the_whole_schedule(
    method: Method, data: DataName, change: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "load_signals", generated)
    learned = []
    for name, options in (("plain", {}), ("other", change)):
        recipe = Recipe(
            method=method,
            data=DataConfig(name=data),
            network=nid.NetworkConfig(hidden_dim=4, pos_emb="Id", act_type="sine"),
            schedule=Schedule(epochs=3, lr=1e-2, **options),
        )
        with Run("nid", recipe, RunOptions(output=tmp_path, name=name, device="cpu", quiet=True)) as run:
            learned.append([p.detach().clone() for p in train.run_recipe(run, recipe)[0].parameters()])
    assert not all(torch.equal(a, b) for a, b in zip(*learned, strict=True))


def test_a_start_that_diverges_is_not_kept(tmp_path: Path) -> None:
    tiny = ["--network.hidden_dim", "4", "--network.pos_emb", "Id", "--schedule.epochs", "1", "--quiet"]
    code, _, err = call(
        tmp_path,
        "train",
        "--method",
        "reptile",
        "--data.name",
        "faces",
        "--meta.inner_lr",
        "1e12",
        *tiny,
        "--name",
        "r",
    )
    assert code == 1
    assert "moved became" in err
    assert not (tmp_path / "runs/nid/r/checkpoints/last.safetensors").exists()
