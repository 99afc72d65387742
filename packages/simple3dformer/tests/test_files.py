"""Files of a user: formats, refusals, conversion, predictions with our networks and the authors', attention."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tenfold_shared.checkpoint import save_weights
from tenfold_shared.cli import as_trained
from tenfold_shared.errors import UserError
from tenfold_shared.run import RunOptions
from tenfold_simple3dformer import predict
from tenfold_simple3dformer.backbone import create_vit, heads
from tenfold_simple3dformer.baselines import PointTransformer, VoxNet
from tenfold_simple3dformer.cli import main
from tenfold_simple3dformer.compat import to_official
from tenfold_simple3dformer.data.binvox import read_binvox
from tenfold_simple3dformer.data.sets import DataConfig
from tenfold_simple3dformer.evaluate import EvalConfig, EvalData, evaluate, load_model
from tenfold_simple3dformer.figures import cell_of
from tenfold_simple3dformer.geometry import Geometry, open3d, read_geometry, sample_surface, voxelise, write_mesh
from tenfold_simple3dformer.models import ModelConfig, build_model
from tenfold_simple3dformer.planner import costs, plan
from tenfold_simple3dformer.point import PointFormer
from tenfold_simple3dformer.predict import PredictConfig
from tenfold_simple3dformer.rooms import make_room, visible
from tenfold_simple3dformer.shapes import CATEGORIES, PARTS, make_shape
from tenfold_simple3dformer.voxel import VoxelFormer


def options(folder: Path) -> RunOptions:
    return RunOptions(output=folder, device="cpu", quiet=True)


def chair(folder: Path) -> Path:
    file = folder / "chair.obj"
    write_mesh(file, *make_shape("chair", np.random.RandomState(0)).triangles())
    return file


def kept(folder: Path, task: str, classes: int, inputs: int, **about: Any) -> Path:
    """A checkpoint of a random network of width 64."""
    torch.manual_seed(0)
    network = {"backbone": "mini", "centres": 64, "queries": 8, "layers": 1}
    model = build_model(ModelConfig(**network), task, classes, inputs)
    file = folder / f"{task}.safetensors"
    names = {"task": task, "network": network, "classes": [f"c{i}" for i in range(classes)], "inputs": inputs}
    save_weights(file, model.state_dict(), {**names, "parts": {}, "voxels": 30, "points": 64, **about})
    return file


@pytest.mark.parametrize("ending", ["off", "obj", "stl", "ply", "pcd", "xyz"])
def test_formats(ending: str, tmp_path: Path) -> None:
    """A cube in every format: its extent, its faces, its voxels."""
    o3d = open3d()
    cube = o3d.geometry.TriangleMesh.create_box(1.0, 1.0, 2.0)
    cube.compute_triangle_normals()
    file = tmp_path / f"cube.{ending}"
    if ending in ("pcd", "xyz"):
        points = cube.sample_points_uniformly(500)
        o3d.io.write_point_cloud(str(file), points)
    else:
        o3d.io.write_triangle_mesh(str(file), cube)
    geometry = read_geometry(file)
    assert geometry.is_mesh == (ending not in ("pcd", "xyz"))
    assert np.ptp(geometry.points, axis=0) == pytest.approx([1, 1, 2], abs=0.1)
    places, normals = sample_surface(geometry, 200)
    assert places.shape == normals.shape == (200, 3)
    assert np.linalg.norm(normals, axis=1) == pytest.approx(1)
    grid = voxelise(geometry, 8)
    if geometry.is_mesh:
        assert grid[2:6, 2:6].all()
        assert not grid[0].any()
        assert not grid[:, 7].any()
    else:
        assert 0 < grid.sum() < 8**3


def test_own_shapes_and_their_meshes_agree(tmp_path: Path) -> None:
    """The voxeliser, on the exported triangles, finds the occupancy that the solids have (plus the surface's cells)."""
    shape = make_shape("bottle", np.random.RandomState(1))
    vertices, faces = shape.triangles()
    exact, found = shape.voxels(16), voxelise(Geometry(vertices, faces), 16, "radius")
    assert (found >= exact).mean() > 0.99
    assert exact.sum() < found.sum() < 3 * exact.sum()


def test_glued_off_header(tmp_path: Path) -> None:
    file = tmp_path / "x.off"
    file.write_text("OFF4 1 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n4 0 1 2 3\n")
    geometry = read_geometry(file)
    file.write_text("OFF\n# made by hand\n4 1 0\n0 0 0\n1 0 0 # second\n1 1 0\n0 1 0\n4 0 1 2 3 255 0 0\n")
    again = read_geometry(file)
    assert np.array_equal(again.points, geometry.points)
    assert np.array_equal(again.faces, geometry.faces)
    assert len(geometry.points) == 4
    assert geometry.faces.tolist() == [[0, 1, 2], [0, 2, 3]]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.xyz", None, "no file"),
        ("empty.xyz", "", "0 points"),
        ("one.xyz", "1 2 3\n", "1 points"),
        ("nan.xyz", "1 2 3\n1 nan 3\n", "point 1 has a coordinate that is not finite"),
        ("flat.xyz", "1 2 3\n1 2 3\n", "no extent"),
        ("ragged.xyz", "1 2 3\n1 2\n", "equal rows"),
        ("short.xyz", "1 2\n3 4\n", "x, y and z"),
        ("faceless.off", "OFF\n3 0 0\n0 0 0\n1 0 0\n0 1 0\n", "mesh without faces"),
        ("truncated.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1\n", "truncated"),
        ("negative.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 -1\n", "does not exist"),
        ("fewer.off", "OFF\n3 2 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n", "1 of 2 faces"),
        ("word.off", "PLY\n", "must begin with OFF"),
        ("picture.gif", "GIF", "formats are"),
    ],
)
def test_refused_files(name: str, content: str | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=words):
        read_geometry(file)


def test_conversion_and_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mesh = tmp_path / "chair.off"
    write_mesh(mesh, *make_shape("chair", np.random.RandomState(0)).triangles())
    for name in ("chair.binvox", "chair.ply", "chair.xyz"):
        predict.convert(mesh, tmp_path / name, voxels=12, points=64)
    assert len(read_geometry(tmp_path / "chair.ply").points) == 64
    with pytest.raises(UserError, match="binvox"):
        predict.convert(mesh, tmp_path / "chair.doc")
    plan("mini", 30, 6)
    found = {cost.tokenizer: cost.macs for cost in costs("mini", 30, 6)}
    assert found["projection"] - found["occupancy2d"] == 25 * (216 - 36) * 64  # cubes and squares of 6, 25 of them
    assert "projection" in capsys.readouterr().out
    weights = tmp_path / "vit.pth"
    torch.save(create_vit("mini").state_dict(), weights)
    predict.show_transfer(str(weights), "procshapes-mini")
    assert "taken" in capsys.readouterr().out


def test_depth_view() -> None:
    """A camera sees some of a room, and points behind an object's front are hidden."""
    room = make_room(3, 3000)
    seen = visible(room, 1)
    assert 0.05 < seen.mean() < 0.9


def test_wrong_checkpoint_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        load_model(tmp_path / "none")


# -- predictions ----------------------------------------------------------------------------------------------------------


def test_the_corner_of_converted_voxels(tmp_path: Path) -> None:
    """Translate and scale carry the cube, which is centred on the object, back to the mesh."""
    file = tmp_path / "box.off"
    places = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 2)], float)
    faces = np.array([[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]])  # fmt: skip
    write_mesh(file, places, faces)
    predict.convert(file, tmp_path / "deep" / "box.binvox", voxels=9)
    read = read_binvox(tmp_path / "deep" / "box.binvox")
    assert (read.translate, read.scale) == ((-0.5, -0.5, 0.0), 2.0)
    centres = np.array(read.translate) + read.scale * (np.argwhere(read.grid) + 0.5) / 9
    assert centres.mean(0) == pytest.approx([0.5, 0.5, 1.0])


def test_refused_conversions(tmp_path: Path) -> None:
    mesh = chair(tmp_path)
    with pytest.raises(UserError, match="--points"):
        predict.convert(mesh, tmp_path / "x.ply", points=0)
    with pytest.raises(UserError, match="cannot write into"):
        predict.convert(mesh, mesh / "x.ply")
    with pytest.raises(UserError, match="cannot write into"):
        predict.predict(PredictConfig(kept(tmp_path, "voxel_cls", 10, 1), mesh, mesh), options(tmp_path))


def test_a_box_is_predicted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "room.xyz"
    np.savetxt(file, make_room(5, 700).points[:, :6], fmt="%.4f")
    predict.predict(
        PredictConfig(kept(tmp_path, "detection", 10, 3, points=512), file, tmp_path / "out", top=8), options(tmp_path)
    )
    boxes = json.loads(capsys.readouterr().out)["boxes"]
    assert len(boxes) > 1
    assert len({tuple(box["centre"]) for box in boxes}) == len(boxes)
    assert [box["score"] for box in boxes] == sorted((box["score"] for box in boxes), reverse=True)


def test_attention_on_what_the_network_was_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts: the category is in the channels. Scenes: blocks with colours, and every point of the room."""
    seen: list[torch.Tensor] = []
    tokens = PointFormer.tokens
    monkeypatch.setattr(PointFormer, "tokens", lambda self, x, *rest: (seen.append(x), tokens(self, x, *rest))[1])
    parts = kept(tmp_path, "part_seg", sum(map(len, PARTS.values())), 6 + len(PARTS), parts=PARTS)
    config = PredictConfig(parts, chair(tmp_path), tmp_path / "out", category="table")
    predict.attention(config, options(tmp_path))
    assert seen[-1][0, :, 6:].argmax(1).eq(CATEGORIES.index("table")).all()
    assert seen[-1][0, :, 6:].sum(1).eq(1).all()
    capsys.readouterr()
    room = make_room(5, 700).points
    np.savetxt(tmp_path / "room.xyz", room[:, :6], fmt="%.4f")
    predict.attention(
        PredictConfig(kept(tmp_path, "scene_seg", 13, 9), tmp_path / "room.xyz", tmp_path / "out"), options(tmp_path)
    )
    cloud = Path(json.loads(capsys.readouterr().out)["cloud"])
    assert len(read_geometry(cloud).points) == 700
    assert float(seen[-1][..., 3:6].max()) <= 1
    assert float(seen[-1][..., 3:6].min()) >= 0


def test_cells_of_voxels() -> None:
    """A border narrower than a cell belongs to the last cells; the hybrid's 6 cells stretch over the whole grid."""
    flat = VoxelFormer(create_vit("mini"), 5, voxels=35, cell=6)
    assert [int(cell_of(np.array([[x, 0, 0]]), 5, flat.cell_side)[0][0]) for x in (5, 6, 29, 34)] == [0, 1, 4, 4]
    hybrid = VoxelFormer(create_vit("mini"), 5, "hybrid", voxels=30)
    assert [int(cell_of(np.array([[x, 0, 0]]), 6, hybrid.cell_side)[0][0]) for x in (4, 5, 29)] == [0, 1, 5]


# -- checkpoints ----------------------------------------------------------------------------------------------------------


def test_the_authors_networks_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Channels, parts and task come from the network where no description comes with the file."""
    np.savetxt(tmp_path / "room.xyz", np.random.RandomState(0).rand(60, 6), fmt="%.4f")
    small: dict[str, Any] = {"stages": 1, "dim": 8, "neighbours": 4}
    networks = {
        "class": PointTransformer(6, 4, "cls", **small),
        "category": PointFormer(create_vit("tiny", depth=1), 22, 50, "seg"),
        "points": PointTransformer(9, 13, "seg", **small),
    }
    for answer, network in networks.items():
        torch.save({"model_state_dict": to_official(network)}, tmp_path / "x.pth")
        file = tmp_path / "room.xyz" if answer == "points" else chair(tmp_path)
        predict.predict(PredictConfig(tmp_path / "x.pth", file, tmp_path / "out", category="Chair"), options(tmp_path))
        assert answer in json.loads(capsys.readouterr().out)
    torch.save(to_official(VoxNet(55)), tmp_path / "x.pth")
    with pytest.raises(UserError, match="55 classes and procshapes 10"):
        evaluate(EvalConfig(tmp_path / "x.pth", EvalData(train_size=10, test_size=10)), options(tmp_path))


def test_what_a_file_of_the_authors_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Heads and tokenizer are asked for by eval, predict and rollout; the released names are taken, others refused."""
    released = "VoxelEmbed_no_average+weight_sharing"
    file = tmp_path / "x.pth"
    torch.save(to_official(VoxelFormer(create_vit("tiny", depth=1), 5, "slices", voxels=18)), file)
    model: Any = load_model(file, heads=6, tokenizer=released)[0]
    assert (model.tokenizer, heads(model.vit)) == ("slices", 6)
    assert build_model(ModelConfig(backbone="mini", tokenizer=released), "voxel_cls", 5, 1).tokenizer == "slices"  # type: ignore[arg-type]
    given: list[dict[str, Any]] = []
    for module in ("evaluate", "predict"):
        monkeypatch.setattr(f"tenfold_simple3dformer.{module}.load_model", lambda _, **asked: given.append(asked))
    common = ["--checkpoint", str(file), "--heads", "6", "--tokenizer"]
    for verb in (["eval"], ["predict", "--input", "x.obj"], ["rollout", "--input", "x.obj"]):
        for name in (released, "stranger"):
            monkeypatch.setattr("sys.argv", ["tenfold-simple3dformer", *verb, *common, name])
            with pytest.raises((SystemExit, TypeError)) as stopped:  # TypeError: there is no network to go on with
                main()
            assert stopped.type is TypeError or (name, stopped.value.code) == ("stranger", 2)
        assert "--tokenizer" in capsys.readouterr().err
    assert given == [{"heads": 6, "tokenizer": released}] * 3


def test_partial_files_of_the_authors_name_what_is_missing(tmp_path: Path) -> None:
    networks = (VoxNet(5), VoxelFormer(create_vit("tiny", depth=1), 5), PointFormer(create_vit("tiny", depth=1), 6, 5))
    lacking = ("mlp.fc2.weight", "voxel_pos_embed", "cls_token")
    for network, name in zip(networks, lacking, strict=True):
        state = to_official(network)
        del state[name]
        torch.save(state, tmp_path / "x.pth")
        with pytest.raises(UserError, match=name):
            load_model(tmp_path / "x.pth")


def test_what_is_given_to_eval_counts_even_where_it_is_a_default() -> None:
    trained = {"name": "modelnet10", "root": "there", "points": 64, "voxels": 12, "drop": 0.3}
    found = as_trained(DataConfig, trained, EvalData(points=1024, drop=0.1))
    assert found == DataConfig(name="modelnet10", root=Path("there"), points=1024, voxels=12, drop=0.1)
    assert as_trained(DataConfig, trained, EvalData(name="procshapes", test_size=7)) == DataConfig(test_size=7)
