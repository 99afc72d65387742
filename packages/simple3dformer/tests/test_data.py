"""Loaders in the published layouts, generated data, and files that are not what they should be."""

import json
import math
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from tenfold_shared.errors import UserError
from tenfold_simple3dformer import metrics, shapes
from tenfold_simple3dformer.augment import augment_cloud
from tenfold_simple3dformer.data import clouds, s3dis, sunrgbd, volumes
from tenfold_simple3dformer.data.binvox import Binvox, binvox_bytes, parse_binvox, read_binvox
from tenfold_simple3dformer.data.sets import DataConfig, evaluation_batch, folder_of
from tenfold_simple3dformer.natural import PICTURES, crops, standardised
from tenfold_simple3dformer.rooms import make_room, sun_scene
from tenfold_simple3dformer.solids import Box, Frustum

# -- generated ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("category", shapes.CATEGORIES)
def test_families(category: str) -> None:
    """Points lie on the surface, with unit normals that point out, parts that the family has, voxels inside the cube."""
    rng = np.random.RandomState(5)
    shape = shapes.make_shape(category, rng)
    cloud = shape.points(300, rng)
    assert np.linalg.norm(cloud.normals, axis=1) == pytest.approx(1)
    local = shapes._turn(cloud.xyz, -shape.yaw) + shape.centre
    normals = shapes._turn(cloud.normals, -shape.yaw)
    assert shape.contains(local - 1e-5 * normals).all()
    assert set(cloud.part) <= set(shapes.PARTS[category])
    grid = shape.voxels(40)
    assert 0 < grid.sum() < grid.size / 2
    assert grid[0].sum() == grid[-1].sum() == 0
    low, high = shape.bounds
    assert (local >= low - 1e-6).all()
    assert (local <= high + 1e-6).all()


def test_solid_samples_are_uniform() -> None:
    """Of a cone, the share of side samples below the middle is that of the area; a bored cup has five pieces."""
    cone = Frustum((0, 0), 0, 1, 1.0, 0.5)
    points, normals = cone.sample(4000, np.random.RandomState(0))
    side = normals[:, 2] * np.hypot(*normals[:, :2].T) != 0
    assert (points[side, 2] < 0.5).mean() == pytest.approx(1.75 / 3, abs=0.05)
    ring = math.pi * 1.5 * math.hypot(1, 0.5)  # the side; below it a disc of radius 1, above one of 0.5
    assert cone.area == pytest.approx(ring + math.pi * 1.25)
    assert (normals[:, 2] == -1).mean() == pytest.approx(math.pi / cone.area, abs=0.03)
    cup = Frustum((0, 0), 0, 1, 0.4, 0.5, 0.3, 0.2)
    walls = math.pi * 0.9 * math.hypot(1, 0.1) + 2 * math.pi * 0.3 * 0.8
    assert cup.area == pytest.approx(walls + math.pi * (0.4**2 + (0.5**2 - 0.3**2) + 0.3**2))
    assert not cup.contains(np.array([[0.0, 0, 0.5], [0.6, 0, 0.5]])).any()
    assert cup.contains(np.array([[0.0, 0, 0.1], [0.4, 0, 0.5]])).all()
    assert Box((0, 0, 0), (1, 2, 3)).area == 22


def test_generated_sets_are_deterministic_and_balanced() -> None:
    packed, labels = shapes.voxel_set(20, 4, 12, 0.1, 0.005)
    shapes.voxel_set.cache_clear()
    again, _ = shapes.voxel_set(20, 4, 12, 0.1, 0.005)
    assert np.array_equal(packed, again)
    assert np.bincount(labels).tolist() == [2] * 10
    rows, _, parts = shapes.point_set(10, 4, 64)
    assert rows.shape == (10, 64, 6)
    assert np.linalg.norm(rows[..., :3], axis=2).max() == pytest.approx(1)
    assert parts.max() < sum(map(len, shapes.PARTS.values()))


def test_corruption() -> None:
    full = np.ones((20, 20, 20), np.uint8)
    rng = np.random.RandomState(0)
    assert shapes.corrupt(full, rng, drop=0.25).mean() == pytest.approx(0.75, abs=0.02)
    assert shapes.corrupt(0 * full, rng, noise=0.1).mean() == pytest.approx(0.1, abs=0.02)


def test_rooms() -> None:
    room = make_room(7, 4000)
    assert room.points.shape == (4000, 7)
    assert room.points[:, :3].min() == 0
    assert {0, 1, 2} <= set(room.points[:, 6].astype(int))
    for i, a in enumerate(room.objects):
        for b in room.objects[:i]:
            assert np.linalg.norm(a.centre[:2] - b.centre[:2]) > 0.1
    assert ((room.boxes[:, 7] >= 0) & (room.boxes[:, 7] < 10)).all()
    assert np.array_equal(make_room.__wrapped__(7, 4000).points, room.points)


def test_pictures() -> None:
    found = crops(44, 0)
    assert found.images.shape == (44, 1, 32, 32)
    assert len(found.classes) == len(PICTURES) == 22
    x = standardised(found.images.float())
    assert x.mean((1, 2, 3)).abs().max() < 1e-4
    assert torch.isfinite(standardised(torch.zeros(1, 1, 32, 32))).all()


# -- published layouts ----------------------------------------------------------------------------------------------------


def test_binvox_axes_and_refusals(tmp_path: Path) -> None:
    """An asymmetric grid survives; y is the fastest axis of the file."""
    grid = np.zeros((3, 3, 3), np.uint8)
    grid[0, 1, 0] = 1
    content = binvox_bytes(Binvox(grid, (1.0, 2.0, 3.0), 4.0))
    assert content.partition(b"data\n")[2] == bytes([0, 1, 1, 1, 0, 25])
    read = parse_binvox(content)
    assert np.array_equal(read.grid, grid)
    assert (read.translate, read.scale) == ((1.0, 2.0, 3.0), 4.0)
    long = np.ones((9, 9, 9), np.uint8)
    assert np.array_equal(parse_binvox(binvox_bytes(Binvox(long))).grid, long)
    for broken, word in ((content[:-2], "truncated"), (b"PLY" + content, "#binvox"), (content.replace(b"3 3 3", b"3 3 4"), "cube")):  # fmt: skip
        with pytest.raises(UserError, match=word):
            parse_binvox(broken)
    with pytest.raises(UserError, match="cannot read"):
        read_binvox(tmp_path / "none.binvox")


def test_shapenet_voxels(tmp_path: Path) -> None:
    for synset in ("02", "01"):
        for name in "abcde":
            folder = tmp_path / synset / name / "models"
            folder.mkdir(parents=True)
            content = binvox_bytes(Binvox(np.eye(27, dtype=np.uint8).reshape(9, 9, 9)))
            (folder / "model_normalized.solid.binvox").write_bytes(content)
    (files, labels, classes), (test, _, _) = (volumes.shapenet_files(tmp_path, s) for s in ("train", "test"))
    assert classes == ("01", "02")
    assert (len(files), len(test)) == (8, 2)
    assert not set(files) & set(test)
    assert [classes[i] for i in labels] == [f.parents[2].name for f in files]
    grid, label = volumes.VoxelSet(files, labels, 9)[0]
    assert grid.shape == (9, 9, 9)
    assert int(label) == labels[0]
    with pytest.raises(UserError, match="9 voxels a side, expected 30"):
        volumes.VoxelSet(files, labels, 30)[0]
    with pytest.raises(UserError, match="no grid"):
        volumes.shapenet_files(tmp_path / "none", "train")


def write_rows(file: Path, rows: np.ndarray, delimiter: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(file, rows, delimiter=delimiter, fmt="%.5f")


def test_modelnet_points(tmp_path: Path) -> None:
    (tmp_path / "modelnet40_shape_names.txt").write_text("bed\nnight_stand\n")
    (tmp_path / "modelnet40_train.txt").write_text("bed_0001\nnight_stand_0002\n")
    rng = np.random.RandomState(0)
    for name in ("bed/bed_0001", "night_stand/night_stand_0002"):
        write_rows(tmp_path / f"{name}.txt", rng.rand(50, 6), ",")
    files, labels, _names = clouds.modelnet_clouds(tmp_path, "train")
    assert labels == [0, 1]
    cloud, label = clouds.CloudSet(files, labels, 32, 6)[1]
    assert cloud.shape == (32, 6)
    assert int(label) == 1
    assert float(cloud[:, :3].norm(dim=1).max()) == pytest.approx(1, abs=1e-5)
    with pytest.raises(UserError, match="no lists"):
        clouds.modelnet_clouds(tmp_path, "test")
    files[0].write_text("1,2,nan,0,0,1\n")
    with pytest.raises(UserError, match=r"bed_0001.*row 0"):
        clouds.CloudSet(files, labels, 32, 6)[0]
    files[0].write_text("1,2\n")
    with pytest.raises(UserError, match="2 columns, expected 6"):
        clouds.CloudSet(files, labels, 32, 6)[0]
    (tmp_path / "modelnet40_test.txt").write_text("chair_0001\n")
    with pytest.raises(UserError, match="chair"):
        clouds.modelnet_clouds(tmp_path, "test")


def test_scanobjectnn(tmp_path: Path) -> None:
    file = tmp_path / "main_split" / "test_objectdataset_augmentedrot_scale75.h5"
    file.parent.mkdir()
    with h5py.File(file, "w") as content:
        content["data"], content["label"] = np.random.RandomState(0).rand(3, 40, 3), np.array([0, 14, 2])
    data, label = clouds.scanobjectnn(tmp_path, "test", 16)
    assert data.shape == (3, 16, 3)
    assert label.tolist() == [0, 14, 2]
    with h5py.File(file, "w") as content:
        content["data"], content["label"] = np.zeros((1, 40, 3)), np.array([15])
    with pytest.raises(UserError, match="15 classes"):
        clouds.scanobjectnn(tmp_path, "test", 16)
    with h5py.File(file, "w") as content:
        content["data"], content["label"] = np.zeros((2, 40, 3)), np.array([1])
    with pytest.raises(UserError, match="1 labels"):
        clouds.scanobjectnn(tmp_path, "test", 16)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="truncated"):
        clouds.scanobjectnn(tmp_path, "test", 16)
    with pytest.raises(UserError, match="expected h5_files"):
        clouds.scanobjectnn(tmp_path, "train", 16)


def test_shapenet_parts(tmp_path: Path) -> None:
    (tmp_path / "synsetoffset2category.txt").write_text("Airplane\t02691156\nTable\t04379243\n")
    lists = tmp_path / "train_test_split"
    lists.mkdir()
    for split, names in (("train", ["02691156/a"]), ("val", []), ("test", ["04379243/b"])):
        (lists / f"shuffled_{split}_file_list.json").write_text(json.dumps([f"shape_data/{n}" for n in names]))
    rng = np.random.RandomState(0)
    rows = np.concatenate([rng.rand(20, 6), rng.randint(47, 50, (20, 1))], 1)
    write_rows(tmp_path / "04379243" / "b.txt", rows, " ")
    files, labels, names = clouds.shapenet_parts(tmp_path, ["test"])
    assert names[labels[0]] == "Table"
    sample = clouds.CloudSet(files, labels, 64, 6, categories=16, columns=7, delimiter=None, resample=True)
    cloud, part = sample[0]
    assert cloud.shape == (64, 22)
    assert cloud[:, 6:].argmax(1).eq(15).all()
    assert part.min() >= 47
    assert torch.equal(sample[0][0], cloud)  # evaluation draws the same points again
    assert clouds.portion([0] * 10 + [1] * 3, 0.2, 0) == clouds.portion([0] * 10 + [1] * 3, 0.2, 0)
    assert len(clouds.portion([0] * 10 + [1] * 3, 0.2, 0)) == 3


def test_s3dis_rooms(tmp_path: Path) -> None:
    """Annotations are merged, unknown names are clutter, stray bytes are dropped, a sparse room does not hang."""
    folder = tmp_path / "Area_5" / "hallway_6" / "Annotations"
    folder.mkdir(parents=True)
    (folder / "chair_1.txt").write_bytes(b"1 2 3 10 20 30\n2 2\x10 3 10 20 30\n")
    (folder / "stairs_1.txt").write_text("1 5 3 0 0 255\n")
    room = s3dis.load_rooms(tmp_path, [5])["Area_5/hallway_6"]
    assert room[:, 6].tolist() == [8, 8, 12]
    assert room[:, :3].min() == 0
    assert (folder.parent / "room.npy").exists()
    assert len(s3dis.load_rooms(tmp_path, [5])) == 1
    with pytest.raises(UserError, match="Area_1"):
        s3dis.load_rooms(tmp_path, [1])
    features, labels = s3dis.training_block(room, np.random.RandomState(0), points=16)
    assert features.shape == (16, 9)
    assert set(labels) <= {8, 12}
    for content in ("1 2 3\n", "1 2 3\n4 5 6\n", "1 2 3 nan 5 6\n"):
        (folder / "wall_1.txt").write_text(content)
        with pytest.raises(UserError, match="wall_1"):
            s3dis.read_room(folder.parent)
    (folder.parent / "room.npy").write_bytes((folder.parent / "room.npy").read_bytes()[:-8])
    with pytest.raises(UserError, match=r"room\.npy.*delete it"):
        s3dis.load_rooms(tmp_path, [5])


def test_modelnet_meshes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that lacks a split moves no label; a grid is kept where the folder may be written to, and only there."""
    for part in ("bed/train", "chair/train", "chair/test"):
        (tmp_path / part).mkdir(parents=True)
        (tmp_path / part / f"{part[:2]}.off").write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    (_, labels, classes), (files, test_labels, _) = (volumes.modelnet_files(tmp_path, s) for s in ("train", "test"))
    assert (labels, test_labels, classes) == ([0, 1], [1], ("bed", "chair"))

    def refused(**_: object) -> None:
        raise PermissionError(13, "read-only")

    with monkeypatch.context() as patch:
        patch.setattr("tempfile.mkstemp", refused)
        assert volumes.modelnet_grid(files[0], 6).sum() > 0
    assert not files[0].with_suffix(".binvox").exists()
    assert np.array_equal(volumes.modelnet_grid(files[0], 6), read_binvox(files[0].with_suffix(".binvox")).grid)


def test_whole_scene_covers_every_point() -> None:
    room = make_room(8, 3000).points
    grid = s3dis.whole_scene(room, np.random.RandomState(0), points=128)
    assert set(grid.rows.ravel()) == set(range(3000))
    assert np.isfinite(grid.features).all()
    assert np.array_equal(grid.labels, room[grid.rows, 6])


def test_sunrgbd_files(tmp_path: Path) -> None:
    cloud, rows = sun_scene(9, 500)
    np.savez(tmp_path / "000001_pc.npz", pc=np.concatenate([cloud, cloud], 1))
    np.save(tmp_path / "000001_bbox.npy", rows)
    scenes = sunrgbd.SceneSet(
        [(tmp_path, name) for name in sunrgbd.scene_names(tmp_path)], 100, augment=True, cuboid=50
    )
    points, boxes = scenes[0]
    assert points.shape == (100, 3)
    assert boxes.shape == (sunrgbd.MOST_BOXES, 9)
    rows[0, 7] = 10
    np.save(tmp_path / "000001_bbox.npy", rows)
    with pytest.raises(UserError, match="class outside"):
        sunrgbd.read_scene(tmp_path, "000001")
    rows[0, 7] = 1
    np.save(tmp_path / "000001_bbox.npy", rows)
    for bad in (np.full((4, 6), np.nan), np.zeros((0, 6)), np.zeros(6)):
        np.savez(tmp_path / "000001_pc.npz", pc=bad)
        with pytest.raises(UserError, match="000001"):
            sunrgbd.read_scene(tmp_path, "000001")
    (tmp_path / "000001_pc.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="000001"):
        sunrgbd.read_scene(tmp_path, "000001")
    with pytest.raises(UserError, match="no SUN RGB-D scene"):
        sunrgbd.scene_names(tmp_path / "none")


# -- metrics and augmentation ---------------------------------------------------------------------------------------------


def test_metrics_by_hand() -> None:
    """A class without samples is left out, never divided by; one that only the prediction has counts for the IoU."""
    matrix = metrics.confusion(torch.tensor([0, 0, 1, 3]), torch.tensor([0, 1, 1, 1]), 4)
    assert metrics.overall_accuracy(matrix) == 0.5
    assert metrics.mean_class_accuracy(matrix) == pytest.approx((1 + 1 / 3) / 2)
    assert metrics.mean_iou(matrix) == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert metrics.mean_class_accuracy(0 * matrix) == 0.0
    batches = [torch.tensor([True] * 4), torch.tensor([False])]
    assert metrics.released_overall_accuracy(batches) == 0.5


def test_restricted_argmax() -> None:
    logits = torch.tensor([[[9.0, 1.0, 2.0, 8.0]]])
    assert metrics.restricted_argmax(logits, torch.tensor([1]), [[0, 3], [1, 2]]).tolist() == [[2]]


def test_augmentation_keeps_normals() -> None:
    cloud = np.random.RandomState(0).rand(30, 6).astype(np.float32)
    changed = augment_cloud(cloud, np.random.RandomState(1))
    assert np.array_equal(changed[:, 3:], cloud[:, 3:])
    assert not np.array_equal(changed[:, :3], cloud[:, :3])
    dropped = augment_cloud(cloud, np.random.RandomState(2), dropout=True)
    assert len(np.unique(dropped, axis=0)) <= 30


def test_refused_configurations() -> None:
    with pytest.raises(UserError, match=r"--data\.drop"):
        DataConfig(drop=1.5)
    with pytest.raises(UserError, match=r"--data\.points"):
        DataConfig(points=0)
    for count, world in ((10, 2), (9, 2), (1, 1), (300, 3)):
        size = evaluation_batch(count, 4, world)
        assert size % world == 0
        assert count % size == 0 or count % size >= world


def test_each_missing_set_names_its_own_address(tmp_path: Path) -> None:
    for name in ("ModelNet10", "ModelNet40"):
        with pytest.raises(UserError, match=rf"{name}\.zip.*{tmp_path / name}"):
            folder_of(DataConfig(name=name.lower(), root=tmp_path / name))
