"""The verbs beside training: query, audit, repeat, sweep, and what eval refuses."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tenfold_cilqud import PreActResNet, to_official
from tenfold_cilqud.data import NORMALISATION, DataConfig, load_data
from tenfold_cilqud.evaluate import EvalConfig, Evaluation, evaluate
from tenfold_cilqud.models import create_model
from tenfold_cilqud.pools import SOURCES, PoolConfig
from tenfold_cilqud.recipe import QueryConfig, Recipe
from tenfold_cilqud.studies import repeat, sweep
from tenfold_cilqud.tools import AuditTool, QueryTool, _only_shape, audit, query
from tenfold_shared.checkpoint import save_weights
from tenfold_shared.errors import UserError
from tenfold_shared.run import RunOptions


def options(folder: Path) -> RunOptions:
    return RunOptions(output=folder, name="x", device="cpu", quiet=True)


def pictures(folder: Path, count: int, seed: int) -> Path:
    folder.mkdir()
    draw = np.random.RandomState(seed)
    for i in range(count):
        Image.fromarray(draw.randint(256, size=(20, 24, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    return folder


def test_a_query_on_folders(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.manual_seed(0)
    to_official(PreActResNet(2, 2, width=2), tmp_path / "net.pt")
    anchors, pool = pictures(tmp_path / "anchors", 3, 0), pictures(tmp_path / "pool", 10, 1)
    query(QueryTool(tmp_path / "net.pt", anchors, pool, per_anchor=2, into=tmp_path / "out"), options(tmp_path))
    content = json.loads((tmp_path / "out" / "query.json").read_text())
    assert len(set(content["indices"])) == 6
    assert content["anchor"] == [0, 0, 1, 1, 2, 2]
    assert "data:image/png" in (tmp_path / "out" / "query.html").read_text()
    assert "6 of 10 images" in capsys.readouterr().out


def test_a_query_normalises_as_a_released_network_was_trained(tmp_path: Path) -> None:
    """Ten classes of colour images are CIFAR-10's; the distances are those of the normalised images' features."""
    torch.manual_seed(0)
    net = PreActResNet(2, 5, width=2, mean=NORMALISATION["cifar10"][0], std=NORMALISATION["cifar10"][1]).eval()
    to_official(net, tmp_path / "net.pt")
    anchors, pool = pictures(tmp_path / "a+b", 2, 0), pictures(tmp_path / "pool", 3, 1)
    query(QueryTool(tmp_path / "net.pt", anchors, pool, per_anchor=1, into=tmp_path / "out"), options(tmp_path))
    content = json.loads((tmp_path / "out" / "query.json").read_text())
    features = [
        net.features(SOURCES["folder"](str(folder), _only_shape((3, 32, 32)), 0)[torch.arange(n)].float() / 255)
        for folder, n in ((anchors, 2), (pool, 3))
    ]
    distance = (features[0][0] - features[1][content["indices"][0]]).square().sum().item()
    assert content["squared_distance"][0] == pytest.approx(distance, rel=1e-3)
    with pytest.raises(UserError, match="none: no image files"):
        query(QueryTool(tmp_path / "net.pt", tmp_path / "none", pool), options(tmp_path))
    with pytest.raises(UserError, match="--per_anchor"):
        QueryTool(tmp_path / "net.pt", anchors, pool, per_anchor=0)


def test_an_audit_lists_what_to_exclude(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Once excluded, they are counted no more."""
    data = DataConfig()
    test = torch.cat(list(load_data(data, 0).test))[:3]
    np.save(tmp_path / "pool.npy", torch.cat([255 - test, test]).mul(255).round().byte().permute(0, 2, 3, 1).numpy())
    source = PoolConfig(source=f"npy:{tmp_path}/pool.npy")
    audit(AuditTool(data, source, show="indices"), options(tmp_path))
    listed = capsys.readouterr().out
    assert listed.split() == ["3", "4", "5"]
    (tmp_path / "some.txt").write_text(listed)
    source.exclude = tmp_path / "some.txt"
    audit(AuditTool(data, source), options(tmp_path))
    assert json.loads(capsys.readouterr().out)["test_images_in_it"] == 0


def test_an_audit_counts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for data, source in ((DataConfig(held_back=5), "split+patches:20"), (DataConfig(), "split:0.2")):
        audit(AuditTool(data, PoolConfig(source=source)), options(tmp_path))
        assert json.loads(capsys.readouterr().out)["test_images_in_it"] == 0


def short(**changes: object) -> Recipe:
    data = DataConfig(tasks=2, per_class=8, held_back=2, anchors=2, **changes)
    recipe = Recipe(
        steps=2, batch_size=8, sub_batch=8, sampler="joined", width=2, data=data, query=QueryConfig(per_anchor=2)
    )
    recipe.pool.source = "split"
    return recipe


def test_a_recipe_over_seeds_and_orders(tmp_path: Path) -> None:
    repeat(short(), options(tmp_path), seeds=2, jobs=1)
    (row,) = json.loads((tmp_path / "cilqud" / "repeat-x" / "repeat.json").read_text())["points"]
    assert row["last"]["n"] == 2
    assert row["last"]["low"] <= row["last"]["mean"] <= row["last"]["high"]
    with pytest.raises(UserError, match="--seeds"):
        repeat(short(), options(tmp_path), seeds=0)


def test_a_sweep_looks_at_validation_images_only(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="evaluate_on validation"):
        sweep(short(), options(tmp_path), grid={"lr": [0.1]})
    held_out = short(validation=4, evaluate_on="validation")
    sweep(held_out, options(tmp_path), grid={"lr": [0.1, 0.001]}, seeds=1, jobs=1)
    rows = json.loads((tmp_path / "cilqud" / "sweep-x" / "sweep.json").read_text())["points"]
    assert sorted(row["lr"] for row in rows) == [0.001, 0.1]


def test_evaluation_of_a_released_state(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A network for grey images of two tasks of five classes, as the released layout has it."""
    torch.manual_seed(0)
    to_official(PreActResNet(5, 2, width=2, in_channels=1), tmp_path / "net.pt")
    test = Evaluation(attack="pgd", final="ensemble", steps=1, targets=1, queries=1, images=3)
    evaluate(EvalConfig(tmp_path / "net.pt", DataConfig(), test, seen=1), options(tmp_path))
    found = json.loads(capsys.readouterr().out)
    assert found["seen"] == len(found["per_task"]) == len(found["robust_per_task"]) == len(found["final_per_task"]) == 1
    # Every digit has as many test images.
    assert len(found["per_class"]) == 5
    assert sum(found["per_class"].values()) / 5 == pytest.approx(found["pooled_accuracy"])
    assert found["pooled_accuracy"] == pytest.approx(found["accuracy"])
    with pytest.raises(UserError, match="3 tasks are asked for"):
        evaluate(EvalConfig(tmp_path / "net.pt", seen=3), options(tmp_path))
    to_official(PreActResNet(2, 2, width=2, in_channels=1), tmp_path / "net.pt")
    with pytest.raises(UserError, match="4 classes"):
        evaluate(EvalConfig(tmp_path / "net.pt"), options(tmp_path))
    to_official(PreActResNet(5, 2, width=2), tmp_path / "colour.pt")
    with pytest.raises(UserError, match=r"images of \(3, 8, 8\)"):
        evaluate(EvalConfig(tmp_path / "colour.pt"), options(tmp_path))
    with pytest.raises(UserError, match="no checkpoint"):
        evaluate(EvalConfig(tmp_path / "none.pt"), options(tmp_path))


def test_a_network_for_images_of_another_size_is_refused(tmp_path: Path) -> None:
    about = {"arch": "small", "width": 2, "shape": [1, 28, 28], "mean": [0.0], "std": [1.0]}
    about |= {"classes_per_task": 2, "tasks": 5, "seen": 5}
    save_weights(
        tmp_path / "net.safetensors", create_model("small", 2, 5, shape=(1, 28, 28), width=2).state_dict(), about
    )
    with pytest.raises(UserError, match=r"images of \(1, 28, 28\) .* those of digits are \(1, 8, 8\)"):
        evaluate(EvalConfig(tmp_path / "net.safetensors"), options(tmp_path))


def test_a_released_file_is_tested_on_the_tasks_of_its_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Its later heads are untrained; how the file is read stands in the result."""
    torch.manual_seed(0)
    net = PreActResNet(2, 5, width=2, in_channels=1)
    with torch.no_grad():
        net.linear_main[2].bias += 100.0
    to_official(net, tmp_path / "task1_best_model.pt")
    loud = dataclasses.replace(options(tmp_path), quiet=False)
    for asked, seen in ((0, 2), (5, 5)):
        evaluate(EvalConfig(tmp_path / "task1_best_model.pt", seen=asked), loud)
        out, told = capsys.readouterr()
        found = json.loads(out)
        assert found["seen"] == len(found["per_task"]) == seen
        assert ("task1_best_model.pt has seen 2 of 5 tasks" in told) == (not asked)
        layout = {"classes_per_task": 2, "tasks": 5, "width": 2, "block": "basic", "pruned": False}
        assert layout.items() <= found["layout"].items()
    to_official(net, tmp_path / "task7_best_model.pt")
    with pytest.raises(UserError, match="8 tasks are asked for"):
        evaluate(EvalConfig(tmp_path / "task7_best_model.pt"), options(tmp_path))
