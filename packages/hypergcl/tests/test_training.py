"""Training: every recipe, every method, what a seed fixes, and what is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tenfold_hypergcl import data as loaders
from tenfold_hypergcl.attacks import remove_random
from tenfold_hypergcl.baselines import CliqueNet
from tenfold_hypergcl.compat import CheckpointError, export_state, load_official_checkpoint
from tenfold_hypergcl.data import DataConfig, Dataset
from tenfold_hypergcl.evaluate import EvalConfig, evaluate
from tenfold_hypergcl.hypergraph import Hypergraph
from tenfold_hypergcl.models import MODELS
from tenfold_hypergcl.recipe import Generator, Recipe, create
from tenfold_hypergcl.setgnn import EncoderConfig, SetGNN
from tenfold_hypergcl.train import run_recipe
from tenfold_shared.cli import load_recipe, recipes
from tenfold_shared.errors import RunFailure, UserError
from tenfold_shared.run import Run, RunOptions

SHAPES = {
    "digits": (64, 10),
    "cocitation/cora": (1433, 7),
    "coauthorship/cora": (1433, 7),
    "cocitation/citeseer": (3703, 6),
    "cocitation/pubmed": (500, 3),
    "coauthorship/dblp": (1425, 6),
    "zoo": (16, 7),
    "20newsW100": (100, 4),
    "Mushroom": (22, 2),
    "NTU2012": (100, 67),
    "ModelNet40": (100, 40),
    "yelp": (1862, 9),
    "house-committees": (100, 2),
    "walmart-trips": (100, 11),
    "german": (27, 2),
    "bail": (18, 2),
    "credit": (13, 2),
}


def clustered(features=8, classes=3, nodes=150, sensitive=None, name="clusters") -> Dataset:
    """Noisy features of some classes, and hyperedges that mostly stay within one; sparse where there are many features."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(nodes) % classes
    x = torch.randn(nodes, features, generator=generator) + 4 * torch.eye(classes, features)[labels]
    if features > 1000:
        x = x * (torch.rand(nodes, features, generator=generator) < 0.02)
    if sensitive is not None:
        x[:, sensitive] = (torch.rand(nodes, generator=generator) < 0.5).float()
    hyperedges = []
    for _ in range(nodes):
        same = torch.nonzero(labels == torch.randint(classes, (), generator=generator)).flatten()
        hyperedges.append(same[torch.randperm(same.numel(), generator=generator)[:4]].tolist())
    return loaders.make_dataset(
        name, Hypergraph.from_hyperedges(hyperedges, nodes), x, labels, sensitive_column=sensitive
    )


@pytest.fixture
def generated(monkeypatch):
    """Data sets of the published numbers of features and classes, made up and small."""

    def load(name, root, feature_noise=1.0):
        features, classes = SHAPES.get(name, (8, 3))
        nodes = 150 if name in loaders.FAIR or name not in SHAPES else max(60, 4 * classes)
        return clustered(features, classes, nodes, 0 if name in loaders.FAIR else None, name)

    monkeypatch.setattr(loaders, "load", load)


def run(recipe, folder, seed=0, **options):
    """Train and return the network and the result."""
    options = RunOptions(output=folder, name=f"r{seed}", seed=seed, device="cpu", quiet=True, **options)
    with Run("hypergcl", recipe, options) as session:
        return run_recipe(session, recipe)


SMALL = Recipe(
    encoder=EncoderConfig(hidden=16), projection=16, epochs=25, lr=1e-2, data=DataConfig(name="clusters", label_rate=0.2)
)  # fmt: skip


@pytest.mark.parametrize("name", sorted(recipes("tenfold_hypergcl")))
def test_every_recipe_builds_and_steps(name, tmp_path, generated, monkeypatch):
    monkeypatch.setattr(Run, "save_weights", lambda *_, **__: None)
    recipe = load_recipe("tenfold_hypergcl", name, Recipe, epochs=1)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, label_rate=0.5))
    model, result = run(recipe, tmp_path)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(0 <= value <= 100 for key, value in result.test.items() if key != "nll")
    if recipe.data.name in loaders.FAIR:
        assert {"f1", "auc", "statistical_parity", "equal_opportunity", "counterfactual"} <= result.test.keys()


@pytest.mark.parametrize("method", ["supervised", "A0", "A1", "A2", "A3", "A4", "A5", "A6", "clique", "adapt"])
def test_learning_beats_chance(method, tmp_path, generated):
    _, result = run(dataclasses.replace(SMALL, method=method), tmp_path)
    assert result.test["accuracy"] > 50  # chance is 33
    assert bool(result.drop_ratio) == (method == "A6")


@pytest.mark.parametrize("model", [name for name in MODELS if name != "setgnn"])
def test_baselines_beat_chance(model, tmp_path, generated):
    encoder = EncoderConfig(hidden=16, heads=2 if model in {"ce-gat", "unigcnii"} else 1)
    _, result = run(dataclasses.replace(SMALL, method="supervised", model=model, encoder=encoder, epochs=60), tmp_path)
    assert result.test["accuracy"] > 50  # chance is 33


@pytest.mark.parametrize("method", ["A2", "A6"])
def test_a_seed_fixes_the_run_whatever_ran_before(method, tmp_path, generated):
    recipe = dataclasses.replace(SMALL, method=method, epochs=4)
    first, _ = run(recipe, tmp_path / "a")
    run(recipe, tmp_path / "b", seed=1)
    second, _ = run(recipe, tmp_path / "c")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("views", ["a2-gen", "clean-gen", "gen-gen"])
@pytest.mark.parametrize("hard", [True, False])
def test_the_generators_options(views, hard, tmp_path, generated):
    options = Generator(views=views, hard=hard, steps=2, objective="drop" if hard else "vhgae", drop_weight=0.5)
    _, result = run(dataclasses.replace(SMALL, method="A6", generator=options, loss="jsd"), tmp_path)
    assert len(result.drop_ratio) == SMALL.epochs
    assert all(0 < ratio < 1 for ratio in result.drop_ratio)
    assert result.test["accuracy"] > 50  # chance is 33


def test_the_objective_of_the_drop_ratio_reaches_it(tmp_path, generated):
    ends = {}
    for objective in ("drop", "vhgae"):
        options = Generator(objective=objective, contrast_weight=10.0 * (objective == "vhgae"), steps=5, lr=1e-2)
        _, result = run(dataclasses.replace(SMALL, method="A6", generator=options), tmp_path / objective)
        ends[objective] = result.drop_ratio[-1]
    assert abs(ends["drop"] - 0.3) < 0.1 < abs(ends["vhgae"] - 0.3)


@pytest.mark.parametrize(("method", "task"), [("A6", "nodes"), ("clique", "nodes"), ("A2", "memberships")])
def test_large_hypergraphs_are_contrasted_in_part(method, task, tmp_path, generated):
    recipe = dataclasses.replace(SMALL, method=method, task=task, sub_size=40)
    model, result = run(recipe, tmp_path)
    assert max(result.test.values()) > 50  # chance is 33, and 50 of the AUC
    whole, _ = run(dataclasses.replace(recipe, sub_size=150), tmp_path / "whole")  # as many as there are
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_batches_of_sampled_neighbourhoods_learn(tmp_path, generated):
    recipe = dataclasses.replace(SMALL, batch_size=64, epochs=12)
    model, result = run(recipe, tmp_path)
    assert result.test["accuracy"] > 50  # chance is 33
    logged = [json.loads(line) for line in (tmp_path / "hypergcl/r0/metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["supervised"] < logged[0]["supervised"]
    assert logged[-1]["contrastive"] < logged[0]["contrastive"]
    for method, loss in (("A3", "info_nce"), ("A3", "jsd"), ("A2", "triplet"), ("A5", "triplet")):  # one node is left
        small = dataclasses.replace(recipe, batch_size=149, epochs=4, method=method, loss=loss)
        assert all(torch.isfinite(p).all() for p in run(small, tmp_path / f"{method}-{loss}")[0].parameters())
    other, _ = run(dataclasses.replace(recipe, loss="jsd"), tmp_path / "jsd")
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(RunFailure, match="became"):
        run(dataclasses.replace(recipe, lr=1e38), tmp_path / "nan")


def test_epochs_of_contrast_alone_come_first_and_stay_on_resuming(tmp_path, generated):
    recipe = dataclasses.replace(SMALL, pretrain_epochs=20)
    _, result = run(recipe, tmp_path)
    assert result.test["accuracy"] > 50  # chance is 33
    logged = [json.loads(line) for line in (tmp_path / "hypergcl/r0/metrics.jsonl").read_text().splitlines()]
    contrast = [line["contrastive"] for line in logged if line["phase"] == "pretrain"]
    assert len(contrast) == 20
    assert contrast[-1] < contrast[0]
    _, again = run(recipe, tmp_path, resume=True)
    assert again.test == result.test


def test_heads_of_an_earlier_run_are_carried_over(tmp_path, generated):
    first, _ = run(dataclasses.replace(SMALL, epochs=2), tmp_path / "first")
    recipe = dataclasses.replace(SMALL, epochs=1, lr=0.0, carry_heads=tmp_path / "first" / "hypergcl" / "r0")
    second, _ = run(recipe, tmp_path / "second")
    same = {key for key, value in first.state_dict().items() if torch.equal(value, second.state_dict()[key])}
    assert {"proj_head.lins.0.weight", "linear.weight", "decoder.0.weight"} <= same
    assert "V2EConvs.0.f_enc.lins.0.weight" not in same
    with pytest.raises(UserError, match="heads do not fit"):
        run(dataclasses.replace(recipe, projection=8), tmp_path / "third")


def test_the_clique_encoder_has_the_recipes_dropout_and_norm(tmp_path, generated, monkeypatch):
    made = []
    monkeypatch.setattr("tenfold_hypergcl.train.CliqueNet", lambda *a, **k: made.append(CliqueNet(*a, **k)) or made[-1])
    encoder = EncoderConfig(hidden=16, dropout=0.5, norm="none")
    run(dataclasses.replace(SMALL, method="clique", encoder=encoder, epochs=1), tmp_path)
    assert made[0].p == 0.5
    assert not list(made[0].normalizations.parameters())


def test_the_split_is_the_seeds_or_the_one_that_is_named():
    data = clustered()
    by_seed = loaders.split_of(DataConfig("clusters"), data, 1)
    named = loaders.split_of(DataConfig("clusters", split=1), data, 7)
    assert torch.equal(by_seed.train, named.train)
    with pytest.raises(UserError, match="counts from 0"):
        loaders.split_of(DataConfig("clusters"), data, -1)


def test_hypergcn_is_wider_on_citeseer():
    widths = {
        name: create(Recipe("supervised", model="hypergcn", data=DataConfig(name)), clustered()).layers[0].bias.numel()
        for name in ("cocitation/cora", "cocitation/citeseer")
    }
    assert widths == {"cocitation/cora": 16, "cocitation/citeseer": 64}


def test_half_precision_follows_single(tmp_path, generated):
    recipe = dataclasses.replace(SMALL, method="A6")
    _, result = run(recipe, tmp_path, precision="bf16")
    assert result.test["accuracy"] > 50
    with pytest.raises(UserError, match="bf16"):
        run(recipe, tmp_path / "other", precision="fp16")


def test_checkpoints_evaluate_to_what_training_said(tmp_path, generated, capsys):
    model, result = run(dataclasses.replace(SMALL, epochs=5, data=DataConfig("clusters")), tmp_path, seed=2)
    options = RunOptions(device="cpu", quiet=True)
    capsys.readouterr()
    evaluate(EvalConfig(tmp_path / "hypergcl" / "r2"), options)
    own = json.loads(capsys.readouterr().out)
    assert own["test"]["accuracy"] == pytest.approx(result.test["accuracy"])
    # The same network under the released names, recognised by its keys; the split is that of --seed.
    torch.save(export_state(model), tmp_path / "official.pt")
    evaluate(EvalConfig(tmp_path / "official.pt", data="clusters"), dataclasses.replace(options, seed=2))
    assert json.loads(capsys.readouterr().out)["test"] == own["test"]
    with pytest.raises(UserError, match="8 features"):
        evaluate(EvalConfig(tmp_path / "official.pt", data="digits"), options)
    torch.save(export_state(SetGNN(8, 5, SMALL.encoder)), tmp_path / "five.pt")
    with pytest.raises(UserError, match="5 classes and clusters has 3"):
        evaluate(EvalConfig(tmp_path / "five.pt", data="clusters"), options)
    evaluate(EvalConfig(tmp_path / "hypergcl" / "r2"), dataclasses.replace(options, seed=7))
    assert "split of the training, 2, not on --seed 7" in capsys.readouterr().err


def test_hypergcn_is_evaluated_on_the_operator_it_was_trained_on(tmp_path, generated, capsys):
    recipe = dataclasses.replace(SMALL, method="supervised", model="hypergcn", epochs=40)
    _, result = run(recipe, tmp_path, seed=1)
    evaluate(EvalConfig(tmp_path / "hypergcl" / "r1"), RunOptions(device="cpu", quiet=True))
    found = json.loads(capsys.readouterr().out)
    assert found["test"]["accuracy"] == pytest.approx(result.test["accuracy"])
    assert found["valid"]["accuracy"] == pytest.approx(result.valid)


def test_predicted_memberships_are_evaluated_to_what_training_said(tmp_path, generated, capsys):
    _, result = run(dataclasses.replace(SMALL, task="memberships", epochs=3), tmp_path)
    evaluate(EvalConfig(tmp_path / "hypergcl" / "r0"), RunOptions(device="cpu", quiet=True))
    found = json.loads(capsys.readouterr().out)
    assert found["test"]["auc"] == pytest.approx(result.test["auc"])
    assert found["valid"]["auc"] == pytest.approx(result.valid)


@pytest.mark.parametrize(
    "config",
    [
        EncoderConfig(hidden=8, layers=2),
        EncoderConfig(hidden=8, mlp_layers=1, norm="none"),
        EncoderConfig(hidden=8, norm="bn", mlp_layers=3),
        EncoderConfig(hidden=8, attention=True, heads=4),
        EncoderConfig(hidden=8, attention=True, norm="bn"),
        EncoderConfig(hidden=8, attention=True, norm="none"),
        EncoderConfig(hidden=8, mlp_layers=1, input_norm=False),
        EncoderConfig(hidden=8, gpr=True, input_norm=False),
    ],
)
def test_released_networks_are_recognised_by_their_keys(config, tmp_path):
    model = SetGNN(5, 3, config, 6, head_layers=2)
    torch.save(export_state(model), tmp_path / "state.pt")
    again = load_official_checkpoint(tmp_path / "state.pt")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"V2EConvs.*fc\.weight"):
        load_official_checkpoint(tmp_path / "other.pt")


def test_poisoned_structure_from_a_pair_list(tmp_path, generated):
    h = loaders.load("zoo", tmp_path).hypergraph
    node, edge = h.incidence[:, : h.num_real]
    pairs = torch.stack([node, edge + h.num_nodes])[:, 5:]
    (tmp_path / "attack").mkdir()
    np.savez(tmp_path / "attack" / "zoo_minmax_pairs.npz", pairs=pairs.numpy())
    poisoned = loaders.load_data(DataConfig("zoo", tmp_path, attack="minmax")).hypergraph
    assert poisoned.num_real == h.num_real - 5
    assert poisoned.num_hyperedges - poisoned.num_real_hyperedges == h.num_nodes
    with pytest.raises(UserError, match="zoo_net_pairs"):
        loaders.load_data(DataConfig("zoo", tmp_path, attack="net"))
    torch.manual_seed(0)
    removed = loaders.load_data(DataConfig("zoo", tmp_path, attack="remove")).hypergraph
    torch.manual_seed(0)
    assert removed.num_real == remove_random(h).num_real < h.num_real


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 0}, "--epochs"),
        ({"ratio": 1.0}, "--ratio"),
        ({"temperature": 0.0}, "--temperature"),
        ({"lr": -1.0}, "--lr"),
        ({"pretrain_epochs": 5, "method": "A6"}, "--pretrain_epochs 5"),
        ({"model": "hgnn", "method": "A2"}, "--model hgnn"),
        ({"batch_size": 64, "method": "A6"}, "--batch_size 64"),
        ({"task": "memberships", "method": "A6"}, "--task memberships"),
        ({"task": "memberships", "carry_heads": Path("there")}, "--carry_heads there"),
        ({"task": "memberships", "select": "nll"}, "--select nll"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"pretrain_lr": -1.0, "pretrain_epochs": 1}, "--pretrain_lr"),
        ({"batch_size": -5}, "--batch_size"),
    ],
)
def test_recipes_that_cannot_be_run_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        Recipe(**changes)


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 0), ("lr", -1.0), ("contrast_weight", float("nan")), ("drop_weight", -0.1)]
)
def test_generators_that_are_none_are_refused(name, value):
    with pytest.raises(UserError, match=f"--generator.{name}"):
        Generator(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("layers", 0), ("hidden", 0), ("dropout", 1.0), ("dropout", -0.1)])
def test_encoders_that_are_none_are_refused(name, value):
    with pytest.raises(UserError, match=f"--encoder.{name}"):
        EncoderConfig(**{name: value})


def test_data_that_does_not_fit_is_refused(tmp_path, generated):
    with pytest.raises(UserError, match=r"--data\.label_rate"):
        DataConfig(label_rate=0.0)
    with pytest.raises(UserError, match=r"--data\.feature_noise"):
        DataConfig(feature_noise=-1.0)
    with pytest.raises(UserError, match="raise it"):
        run(dataclasses.replace(SMALL, data=DataConfig("clusters", label_rate=0.001)), tmp_path)
    with pytest.raises(UserError, match=r"label_rate 0\.95 leaves no test node among the 150"):
        run(dataclasses.replace(SMALL, data=DataConfig("clusters", label_rate=0.95)), tmp_path)
    with pytest.raises(UserError, match="leaves no valid node"):
        loaders.split_of(DataConfig(label_rate=0.2), clustered(nodes=5), 0)
    fair = clustered(classes=2, sensitive=0)
    with pytest.raises(UserError, match="leaves no train node"):
        loaders.split_of(DataConfig(label_rate=0.001), fair, 0)
    with pytest.raises(UserError, match="at most half"):
        loaders.split_of(DataConfig(label_rate=0.6), fair, 0)
    with pytest.warns(UserWarning, match="no training node of class"):
        loaders.split_of(DataConfig("clusters", label_rate=0.01), clustered(), 0)
    with pytest.raises(UserError, match="--select auc is for two classes"):
        run(dataclasses.replace(SMALL, select="auc"), tmp_path / "select")
    with pytest.raises(UserError, match="heads"):
        run(dataclasses.replace(SMALL, encoder=EncoderConfig(hidden=16, heads=3, attention=True)), tmp_path / "heads")
