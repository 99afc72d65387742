"""Every recipe is built and stepped, every task trains and is evaluated, predictions on files, and it learns."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tenfold_shared.cli import load_recipe, recipes
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions
from tenfold_simple3dformer import predict
from tenfold_simple3dformer.backbone import create_vit, heads, image_parameters
from tenfold_simple3dformer.data.sets import DataConfig, _Checked, _source, held_out, load_data
from tenfold_simple3dformer.evaluate import EvalConfig, evaluate, load_model, scene_votes
from tenfold_simple3dformer.geometry import read_geometry, write_mesh
from tenfold_simple3dformer.models import ModelConfig, build_model
from tenfold_simple3dformer.optim import Optim, build_optimiser, rate, set_norm_momentum
from tenfold_simple3dformer.predict import PredictConfig
from tenfold_simple3dformer.rooms import make_room
from tenfold_simple3dformer.shapes import make_shape, voxel_set
from tenfold_simple3dformer.train import (
    Forgetting,
    Recipe,
    Result,
    class_weights,
    image_folder,
    image_stream,
    measure_retention,
    prepared,
    run_recipe,
    task_loss,
)
from tenfold_simple3dformer.tuning import train_image_path
from tenfold_simple3dformer.voxel import VoxelFormer
from tenfold_simple3dformer.weights import vit_from_weights

CLASSES = {"modelnet10": 10, "modelnet40": 40, "modelnet40-points": 40, "scanobjectnn": 15, "shapenet": 55, "shapenetpart": 50, "s3dis": 13, "procrooms": 13, "sunrgbd": 10, "procshapes": 10, "natural2d": 22}  # fmt: skip


def options(folder: Path, name: str = "x", **changes: object) -> RunOptions:
    return RunOptions(output=folder, name=name, device="cpu", quiet=True, **changes)


def batch_of(recipe: Recipe, classes: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Channels of a point, and a generated batch of the shapes that the recipe's data has."""
    torch.manual_seed(0)
    data = recipe.data
    if recipe.task == "voxel_cls":
        labels = torch.tensor([0, classes - 1][: 1 if data.voxels > 64 else 2])
        return 1, (torch.rand(len(labels), data.voxels, data.voxels, data.voxels) < 0.1).float(), labels
    if recipe.task == "image_cls":
        return 1, torch.rand(2, 1, 32, 32) * 255, torch.tensor([0, classes - 1])
    if recipe.task == "detection":
        rows = torch.zeros(2, 64, 9)
        rows[:, 0] = torch.tensor([1.0, 1.0, 0.5, 0.3, 0.3, 0.5, 0.4, 3.0, 1.0])
        return 3, torch.rand(2, data.points, 3) * 3, rows
    inputs = {"point_cls": 6 if data.normals and data.name != "scanobjectnn" else 3, "part_seg": 22, "scene_seg": 9}[recipe.task]  # fmt: skip
    shape = (2,) if recipe.task == "point_cls" else (2, data.points)
    return inputs, torch.rand(2, data.points, inputs), torch.randint(classes, shape)


@pytest.mark.parametrize("name", list(recipes("tenfold_simple3dformer")))
def test_every_recipe_is_built_and_stepped(name: str, tmp_path: Path) -> None:
    """The recipe's network, its depth cut to one block, takes one step on generated data of its data's shape.

    Full depth is asserted by the parameter counts; large grids and clouds are cut to what a small machine takes.
    """
    recipe = load_recipe("tenfold_simple3dformer", name, Recipe)
    small = dataclasses.replace(
        recipe.data, points=min(recipe.data.points, 2048 if recipe.task == "detection" else 256)
    )
    network = dataclasses.replace(recipe.model, depth=1, centres=min(recipe.model.centres, 128), reduce=min(recipe.model.reduce, 128), queries=min(recipe.model.queries, 16), layers=1)  # fmt: skip
    recipe = dataclasses.replace(recipe, data=small, model=network)
    classes = CLASSES[recipe.data.name] if recipe.task != "detection" else 10
    inputs, x, y = batch_of(recipe, classes)
    model = build_model(recipe.model, recipe.task, classes, inputs, recipe.data.voxels).train()
    optimiser = build_optimiser(recipe.optim, model)
    set_norm_momentum(model, recipe.optim, 0)
    with Run.evaluation("simple3dformer", options(tmp_path)) as run:
        loss, _ = task_loss(model, recipe.task, x, y, run, None)
    loss.backward()
    optimiser.step()
    assert torch.isfinite(loss)


TASKS = {
    "procshapes-mini": {"model.tokenizer": "group"},
    "natural2d-mini": {"data.train_size": 44, "data.test_size": 22},
    "procshapes-points-mini": {"data.points": 64, "data.select": "heldout"},
    "procshapes-parts-mini": {"data.points": 64, "data.portion": 0.5},
    "procrooms-mini": {"data.points": 512, "data.select": "test"},
    "procrooms-detection-mini": {"data.points": 512, "model.centres": 64, "model.queries": 8, "model.layers": 1},
}


@pytest.mark.parametrize("name", list(TASKS))
def test_every_task_trains_evaluates_and_predicts(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"data.train_size": 20, "data.test_size": 10} if "shapes" in name else {}
    sizes |= {"data.train_size": 2, "data.test_size": 1} if "rooms" in name else {}
    recipe = load_recipe("tenfold_simple3dformer", name, Recipe, **{**sizes, **TASKS[name]}, steps=3, batch_size=2)
    if recipe.task == "scene_seg":
        recipe = dataclasses.replace(recipe, steps=0, epochs=1, batch_size=64)
    with Run("simple3dformer", recipe, options(tmp_path)) as run:
        _, result = run_recipe(run, recipe)
    assert all(0 <= value <= 100 for value in result.metrics.values())
    assert len(result.drift) in (0, 3)
    evaluate(EvalConfig(run.directory), options(tmp_path))
    found = json.loads(capsys.readouterr().out)
    for metric, value in result.metrics.items():
        assert found[metric] == pytest.approx(value)
    if recipe.task == "image_cls":
        return
    rng = np.random.RandomState(0)
    file = tmp_path / ("room.xyz" if "rooms" in name else "shape.obj")
    if "rooms" in name:
        points = make_room(5, 2000).points
        if recipe.task == "scene_seg":  # a few blocks of a room
            points = points[(points[:, :2] < 1.6).all(1)]
        np.savetxt(file, points[:, :6], fmt="%.4f")
    else:
        write_mesh(file, *make_shape("chair", rng).triangles())
    predict.predict(PredictConfig(run.directory, file, tmp_path / "out"), options(tmp_path))
    answer = json.loads(capsys.readouterr().out)
    assert Path(answer["picture"]).read_bytes().startswith(b"\x89PNG")
    if recipe.task in ("part_seg", "scene_seg"):
        assert read_geometry(Path(answer["cloud"])).colours is not None
        assert sum(answer["points"].values()) == (64 if recipe.task == "part_seg" else len(points))
    if recipe.task == "detection":
        assert answer["boxes"]
        return
    predict.attention(PredictConfig(run.directory, file, tmp_path / "out"), options(tmp_path))
    shown = json.loads(capsys.readouterr().out)
    assert Path(shown["picture"]).read_bytes().startswith(b"\x89PNG")
    assert len(read_geometry(Path(shown["cloud"])).points) > 10


def test_learning_beats_chance(tmp_path: Path) -> None:
    """Ten families of shapes, 60 steps: chance is 10 %; and the image term keeps what it is there to keep."""
    pictures = load_recipe("tenfold_simple3dformer", "natural2d-mini", Recipe, **{"data.train_size": 220, "data.test_size": 44, "steps": 30, "batch_size": 32})  # fmt: skip
    with Run("simple3dformer", pictures, options(tmp_path, "pictures")) as run:
        run_recipe(run, pictures)
    start = {"weights": str(run.directory), "lwf.teacher": str(run.directory)}
    values = {"data.test_size": 50, "data.drop": 0.0, "data.noise": 0.0, "steps": 60, **start}
    kept = {}
    for lam in (0.0, 1.0):
        recipe = load_recipe("tenfold_simple3dformer", "procshapes-mini", Recipe, **values, **{"lwf.lam": lam})
        with Run("simple3dformer", recipe, options(tmp_path, f"lam{lam}")) as run:
            _, result = run_recipe(run, recipe)
        assert result.value > 30
        kept[lam] = result.retention
        report = (run.directory / "transfer.txt").read_text()
        assert "taken" in report
        assert "new" in report
    assert kept[1.0] > kept[0.0] + 5


def test_attention_examples_are_test_shapes(tmp_path: Path) -> None:
    """The first of the test set as it is evaluated, its deleted and added voxels included."""
    few = {"data.train_size": 10, "data.test_size": 10, "steps": 1, "data.test_seed": 7}
    run_of(load_recipe("tenfold_simple3dformer", "procshapes-mini", Recipe, **few), tmp_path, "a")
    shown = predict.voxel_examples(tmp_path / "simple3dformer" / "a", "x", 2)
    packed, _ = voxel_set(10, 7, 30, 0.1, 0.005)
    for (title, grid, weights), bits in zip(shown, packed, strict=False):
        assert np.array_equal(grid.flatten(), np.unpackbits(bits, count=30**3))
        assert weights.shape == (5, 5, 5)
        assert title.startswith("x: ")


def test_refused_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="teacher"):
        Recipe(lwf=Forgetting(lam=0.1))
    with pytest.raises(UserError, match="image path"):
        Recipe(task="part_seg", lwf=Forgetting(lam=0.1), weights="x")
    with pytest.raises(UserError, match="image path"):
        Recipe(task="part_seg", lwf=Forgetting(teacher="x"))
    for task, network in (("detection", ModelConfig(preset="3DViT_LWF")), ("voxel_cls", ModelConfig(arch="voxnet"))):
        with pytest.raises(UserError, match="voxel and point networks"):
            Recipe(task=task, model=network, lwf=Forgetting(lam=0.1), weights="x")
    with pytest.raises(UserError, match="give --weights"):
        Recipe(inflate="average")
    with pytest.raises(UserError, match="no voxel embedding"):
        Recipe(task="point_cls", positions_from="resize2d", weights="x")
    with pytest.raises(UserError, match="--tune frozen"):
        Recipe(model=ModelConfig(arch="voxnet"), tune="frozen")
    with pytest.raises(UserError, match="--reweighted"):
        Recipe(task="part_seg", reweighted=True)
    for task, network in (("detection", ModelConfig(start="random")), ("point_cls", ModelConfig(arch="pointnet2", start="random")), ("voxel_cls", ModelConfig(tokens="local_op"))):  # fmt: skip
        with pytest.raises(UserError, match=r"--model\.start and --model\.tokens"):
            Recipe(task=task, model=network)
    with pytest.raises(UserError, match="voxel_cls, not point_cls"):
        build_model(ModelConfig(arch="voxnet"), "point_cls", 5, 6)
    with (
        pytest.raises(UserError, match="no labels for part_seg"),
        Run.evaluation("simple3dformer", options(tmp_path)) as run,
    ):
        run_recipe(run, Recipe(task="part_seg", data=DataConfig(name="modelnet40")))
    labelled = torch.utils.data.TensorDataset(torch.zeros(2, 3), torch.tensor([0, 7]))
    checked = _Checked(labelled, 5, "these")
    assert int(checked[0][1]) == 0
    with pytest.raises(UserError, match=r"sample 1 of these has labels 7\.\.7"):
        checked[1]


def run_of(recipe: Recipe, folder: Path, name: str = "x") -> Result:
    with Run("simple3dformer", recipe, options(folder, name)) as run:
        return run_recipe(run, recipe)[1]


def test_refused_data(tmp_path: Path) -> None:
    """Options that the data cannot obey are not passed over."""
    few = {"data.train_size": 1, "data.test_size": 1}
    with pytest.raises(UserError, match=r"--data\.portion"):
        run_of(
            load_recipe("tenfold_simple3dformer", "procrooms-mini", Recipe, **few, **{"data.portion": 0.5}), tmp_path
        )
    with pytest.raises(UserError, match=r"--data\.normals"):
        run_of(load_recipe("tenfold_simple3dformer", "procshapes-parts-mini", Recipe, **few, **{"data.normals": False}), tmp_path)  # fmt: skip
    with pytest.raises(UserError, match="choose mini"):
        run_of(load_recipe("tenfold_simple3dformer", "natural2d-mini", Recipe, **few, **{"model.backbone": "tiny"}), tmp_path)  # fmt: skip


def test_depth_view_of_labelled_rooms(tmp_path: Path) -> None:
    """What one camera sees of a room, to label as well as to detect in."""
    with Run.evaluation("simple3dformer", options(tmp_path)) as run:
        whole, seen = (
            load_data(DataConfig(name="procrooms", points=128, train_size=1, test_size=1, depth_view=v), "scene_seg", 4, run).rooms[0]
            for v in (False, True)
        )  # fmt: skip
    assert 100 < len(seen) != len(whole)
    assert seen[:, :3].min() == 0


@pytest.mark.parametrize("images", ["natural2d", "folder"])
def test_image_stream_of_a_colour_network(images: str, tmp_path: Path) -> None:
    """Grey crops become three channels, files get the backbone's size; fewer files than a batch are enough.

    Of three files one is held out.
    """
    colour: dict[str, Any] = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 24, "depth": 1}
    model = VoxelFormer(create_vit("tiny", **colour), 4, voxels=12, cell=6)
    teacher = create_vit("tiny", **colour)
    for i in range(3):
        Image.new("RGB", (40, 50), (90 * i, 20, 30)).save(tmp_path / f"{i}.png")
    config = Forgetting(images=images, root=tmp_path, batch_size=4)
    with Run.evaluation("simple3dformer", options(tmp_path)) as run:
        pictures = prepared(next(image_stream(config, run, 32, training=True).epoch(0))[0], config, 3)
        assert pictures.shape == (4 if images == "natural2d" else 2, 3, 32, 32)
        assert 0 <= measure_retention(model, teacher, config, run) <= 100


def test_retention_is_measured_on_images_that_are_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every 20th file, as ImageNet is evaluated; the folder is the data root's unless it is given."""
    monkeypatch.setenv("TENFOLD_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"image-net\.org.*imagenet.val"):
        image_folder(Forgetting(images="folder"))
    folder = tmp_path / "imagenet" / "val"
    folder.mkdir(parents=True)
    for i in range(41):
        Image.new("RGB", (40, 40), (6 * i, 0, 0)).save(folder / f"{i:02}.png")
    config = Forgetting(images="folder", batch_size=38)
    with Run.evaluation("simple3dformer", options(tmp_path)) as run:
        seen, held = (
            sorted(round(float(v), 3) for batch, _ in image_stream(config, run, 32, training=t).epoch(0) for v in batch[:, 0, 16, 16])
            for t in (True, False)
        )  # fmt: skip
    assert (len(seen), len(held)) == (38, 3)
    assert not set(seen) & set(held)
    dark, light = ((v / 255 - 0.485) / 0.229 for v in (0, 240))
    assert held == pytest.approx([dark, (dark + light) / 2, light], abs=1e-3)


def test_the_image_path_is_trained_where_it_is_random(tmp_path: Path) -> None:
    """What image weights were given for stays (section 2.5), but for the positions of a point network."""
    torch.save(create_vit("mini").state_dict(), tmp_path / "vit.pth")
    few = {"data.train_size": 10, "data.test_size": 10, "steps": 1, "lwf.teacher": str(tmp_path / "vit.pth")}
    for weights in ("none", str(tmp_path / "vit.pth")):
        recipe = load_recipe("tenfold_simple3dformer", "procshapes-mini", Recipe, **few, **{"lwf.lam": 0.1, "weights": weights})  # fmt: skip
        with Run("simple3dformer", recipe, options(tmp_path, Path(weights).stem)) as run:
            model: Any = run_recipe(run, recipe)[0]
        assert {p.requires_grad for p in image_parameters(model.vit)} == {weights == "none"}
    points = build_model(ModelConfig(backbone="mini", preset="3DViT_1_layer"), "point_cls", 5, 6)
    train_image_path(points, [f"vit.{name}" for name, _ in create_vit("mini").named_parameters()])
    assert [n for n, p in points.vit.named_parameters() if p.requires_grad and n.startswith(("pos", "patch", "head"))] == ["pos_embed"]  # fmt: skip


def test_rooms_are_held_out_whole(tmp_path: Path) -> None:
    """Blocks of one room overlap: an epoch chosen on those of a room that is trained on would be chosen for its memory."""
    held, kept = held_out([0, 0, 1, 2, 2, 2, 1], 3)
    assert sorted(held + kept) == list(range(7))
    assert held in ([0, 1], [2, 6], [3, 4, 5])
    assert held_out(range(30), 1)[0] == torch.randperm(30, generator=torch.Generator().manual_seed(1)).tolist()[:3]
    config = DataConfig(name="procrooms", points=512, train_size=2, test_size=1, select="heldout")
    rooms = _source(config, "scene_seg").groups
    with Run.evaluation("simple3dformer", options(tmp_path)) as run:
        data = load_data(config, "scene_seg", 4, run)
        with pytest.raises(UserError, match="two or more"):
            load_data(dataclasses.replace(config, train_size=1), "scene_seg", 4, run)
    assert data.selection is not None
    assert {data.selection.samples, data.train.samples} == {rooms.count(0), rooms.count(1)}


def test_teachers_that_do_not_fit(tmp_path: Path) -> None:
    """Refused before training, not after it."""
    torch.save(create_vit("mini").state_dict(), tmp_path / "vit.pth")
    few = {"data.train_size": 10, "data.test_size": 10, "steps": 1, "lwf.teacher": str(tmp_path / "vit.pth")}
    with pytest.raises(UserError, match=r"lacks head\.weight"):  # a random head would teach noise
        run_of(load_recipe("tenfold_simple3dformer", "procshapes-mini", Recipe, **few, **{"model.image_classes": 5}), tmp_path)  # fmt: skip
    with pytest.raises(UserError, match="colour images"):
        run_of(load_recipe("tenfold_simple3dformer", "procshapes-mini", Recipe, **few, **{"lwf.images": "folder"}), tmp_path)  # fmt: skip


def test_both_the_selected_and_the_last_epoch_are_reported(tmp_path: Path) -> None:
    few = {"data.train_size": 20, "data.test_size": 10, "steps": 2, "batch_size": 18}
    assert run_of(load_recipe("tenfold_simple3dformer", "procshapes-mini", Recipe, **few), tmp_path, "a").last is None
    chosen = load_recipe("tenfold_simple3dformer", "procshapes-mini", Recipe, **few, **{"data.select": "heldout"})
    found = run_of(chosen, tmp_path, "b")
    assert found.last is not None
    assert found.last.keys() == found.metrics.keys()


def test_the_best_of_low_rank_training_loads_by_itself(tmp_path: Path) -> None:
    few = {"data.train_size": 20, "data.test_size": 10, "steps": 2, "batch_size": 18}
    recipe = load_recipe("tenfold_simple3dformer", "procshapes-mini", Recipe, **few, **{"data.select": "heldout", "tune": "lora"})  # fmt: skip
    run_of(recipe, tmp_path)
    folder = tmp_path / "simple3dformer" / "x" / "checkpoints"
    best, last = (load_model(folder / f"{name}.safetensors")[0].state_dict() for name in ("best", "last"))
    assert all(torch.equal(best[name], last[name]) for name in last)


def test_heads_of_our_checkpoints(tmp_path: Path) -> None:
    """The same weights split into other heads are another network: the teacher gets its own, another student is refused."""
    few = {"data.train_size": 22, "data.test_size": 22, "steps": 1}
    pictures = load_recipe("tenfold_simple3dformer", "natural2d-mini", Recipe, **few, **{"model.heads": 2})
    run_of(pictures, tmp_path, "pictures")
    trained = str(tmp_path / "simple3dformer" / "pictures")
    assert heads(vit_from_weights("mini", trained)[0]) == 2
    recipe = load_recipe("tenfold_simple3dformer", "procshapes-mini", Recipe, **few, weights=trained)
    with pytest.raises(UserError, match=r"trained with 2 attention heads and the network has 4: set --model\.heads 2"):
        run_of(recipe, tmp_path, "four")
    run_of(dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, heads=2)), tmp_path, "two")


def test_released_schedule() -> None:
    """The warm-up is stepped once an epoch: 5.0e-7 at epoch 0, 1.0005e-5 at epochs 19 and 39, 3.1e-6 at 99."""
    config = Optim(name="adam", lr=1e-3, schedule="released_voxel")
    found = [rate(config, 1e-3, epoch * 10, 10, 1000) for epoch in (0, 19, 39, 99)]
    assert found == pytest.approx([5.0e-7, 1.0005e-5, 1.0005e-5, 3.1e-6], rel=0.01)


def test_schedules() -> None:
    ours = Optim(lr=1.0, warmup_epochs=2)
    assert rate(ours, 1.0, 0, 10, 100) == pytest.approx(1 / 20)
    assert rate(ours, 1.0, 20, 10, 100) == pytest.approx(1)
    assert rate(ours, 1.0, 99, 10, 100) < 0.01
    low = Optim(lr=1.0, warmup_epochs=2, floor=0.5)
    assert [rate(low, 1.0, step, 10, 100) for step in (0, 20, 99)] == pytest.approx([0.525, 1, 0.5], abs=1e-3)
    assert load_recipe("tenfold_simple3dformer", "sunrgbd-3detr", Recipe).optim.floor == 1e-6
    drops = Optim(schedule="step", step_epochs=20, gamma=0.5, floor=1e-2)
    assert rate(drops, 1.0, 400, 10, 0) == 0.25
    assert rate(drops, 1.0, 4000, 10, 0) == 1e-2
    model = torch.nn.BatchNorm1d(3)
    set_norm_momentum(model, Optim(bn_momentum=0.9), 40)
    assert model.momentum == pytest.approx(0.225)
    set_norm_momentum(model, Optim(bn_momentum=0.9), 400)
    assert model.momentum == 0.01


@pytest.mark.parametrize("name", ["weight_decay", "momentum", "step_epochs", "bn_epochs", "clip", "lr"])
def test_refused_optimisers(name: str) -> None:
    with pytest.raises(UserError, match=name):
        Optim(**{name: -1})


def test_refused_networks() -> None:
    """Heads that do not divide the width, negative sizes, one sample to take a batch's statistics of."""
    for options in ({"heads": 5}, {"depth": -1}, {"heads": -1}):
        with pytest.raises(UserError):
            build_model(ModelConfig(backbone="mini", **options), "voxel_cls", 5, 1)
    network = build_model(ModelConfig(arch="pointnet"), "point_cls", 5, 6).train()
    with pytest.raises(UserError, match="--batch_size"):
        network(torch.rand(1, 32, 6))


def test_positions_that_start_at_zero() -> None:
    """The released scripts' recipes have the release's positions, and its image term."""
    for name in ("modelnet40-projection-small-released", "shapenet-group-base-released"):
        recipe = load_recipe("tenfold_simple3dformer", name, Recipe)
        assert recipe.model.positions == "zero"
        assert (recipe.lwf.lam, recipe.lwf.backbone, recipe.lwf.batch_size) == (0.1, "base", recipe.batch_size)
    zero = build_model(ModelConfig(backbone="mini", positions="zero"), "voxel_cls", 5, 1)
    assert torch.equal(zero.pos_embed, torch.zeros(1, 26, 64))
    assert zero.pos_embed.requires_grad


def test_class_weights() -> None:
    weights = class_weights([0, 0, 0, 1], 3)
    assert weights.mean() == pytest.approx(1)
    assert weights[0] < weights[1] < weights[2]


def test_voting_sees_every_point() -> None:
    room = make_room(6, 900).points
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone="mini"), "scene_seg", 13, 9).eval()
    votes = scene_votes(model, room, 128, 13, torch.device("cpu"))
    assert votes.shape == (900, 13)
    assert (votes.abs().sum(1) > 0).all()
    assert torch.equal(votes, scene_votes(model, room, 128, 13, torch.device("cpu")))
