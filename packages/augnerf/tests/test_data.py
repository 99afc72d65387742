"""The layouts, the corruptions, the batches, and what is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold_augnerf.corruptions import CORRUPTIONS, corrupt_view, denoise, pose_noise, salt_and_pepper, view_generator
from tenfold_augnerf.data import BLOCKS, DataConfig, load_data, load_to_choose, write_prepared
from tenfold_augnerf.export import PrepareConfig, path_views, prepare
from tenfold_augnerf.views import RayBatches, Views
from tenfold_shared.errors import UserError
from tenfold_shared.scenes import (
    blocks_views,
    normalise_llff,
    spherical_path,
    spiral_path,
    write_blender,
    write_image,
    write_llff,
)

SIZE = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The blocks in every published layout."""
    root = tmp_path_factory.mktemp("data")
    for split, count, offset in (("train", 3, 0.0), ("val", 9, 23.0), ("test", 17, 68.0)):
        write_blender(root / "nerf_synthetic" / "blocks", blocks_views(count, SIZE, offset), split)
        scene = blocks_views(count, SIZE, offset)
        write_blender(root / "linemod" / "blocks", scene, split)
        path = root / "linemod" / "blocks" / f"transforms_{split}.json"
        meta = json.loads(path.read_text())
        meta |= {"near": 2.3 if split == "train" else 2.1, "far": 5.7 if split == "train" else 5.2}
        for frame in meta["frames"]:
            frame["file_path"] += ".png"
            frame["intrinsic_matrix"] = scene.cameras.intrinsics[0].tolist()
        path.write_text(json.dumps(meta))
    write_llff(root / "nerf_llff_data" / "blocks", blocks_views(9, SIZE, forward=True))
    for split, count in (("train", 3), ("validation", 9), ("test", 9)):
        scene = blocks_views(count, SIZE)
        base = root / "deepvoxels" / split / "blocks"
        for i in range(count):
            write_image(base / "rgb" / f"{i:06d}.png", scene.rgb(i))
            (base / "pose").mkdir(exist_ok=True)
            pose = " ".join(map(str, scene.cameras.camera_to_world[i].ravel()))
            (base / "pose" / f"{i:06d}.txt").write_text(pose)
    focal = blocks_views(1, SIZE).cameras.intrinsics[0, 0, 0]
    (root / "deepvoxels" / "train" / "blocks" / "intrinsics.txt").write_text(
        f"{focal} {SIZE / 2} {SIZE / 2} 0\n0 0 0\n1\n1\n{SIZE} {SIZE}\n"
    )
    return root


@pytest.mark.parametrize("name", ["blender", "linemod", "deepvoxels"])
def test_layouts_give_the_same_rays_and_colours(name: str, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENFOLD_DATA", str(folders))
    data = load_data(DataConfig(name=name, scene="blocks"))
    exact = Views.from_scene(blocks_views(3, SIZE), 2.0, 6.0, white=True)
    pixels = torch.arange(3 * SIZE * SIZE)
    for found, expected in zip(data.train.rays(pixels)[:2], exact.rays(pixels)[:2], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert float((data.train.truth(pixels) - exact.truth(pixels)).abs().max()) <= 2 / 255
    assert (data.train.near, data.train.far) == {
        "blender": (2.0, 6.0), "linemod": (2, 6), "deepvoxels": pytest.approx((3.0, 5.0))
    }[name]  # fmt: skip
    counts = len(data.train), len(data.validation), len(data.test)
    assert counts == {"blender": (3, 2, 3), "linemod": (3, 9, 17), "deepvoxels": (3, 2, 2)}[name]


def test_llff_holds_out_every_eighth(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENFOLD_DATA", str(folders))
    data = load_data(DataConfig(name="llff", scene="blocks", factor=1, white=False))
    assert (len(data.train), len(data.test)) == (7, 2)
    assert data.train.near == pytest.approx(0.9 / 0.75, rel=1e-5)  # the nearest bound is scaled to 1 / 0.75
    warped = load_data(DataConfig(name="llff", scene="blocks", factor=1, white=False, ndc=True))
    assert warped.ndc is not None
    assert (warped.train.near, warped.train.far) == (0.0, 1.0)
    reduced = load_data(DataConfig(name="llff", scene="blocks", factor=2, white=False))
    assert reduced.train.size == (SIZE // 2, SIZE // 2)


def test_values_are_not_chosen_on_test_views(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 8th training view is held out where validation and test are the same; other data stay as they are."""
    monkeypatch.setenv("TENFOLD_DATA", str(folders))
    own = DataConfig(name="llff", scene="blocks", factor=1, white=False, corruption="saltpepper")
    data, found = load_data(own), load_to_choose(own)
    assert (len(found.train), len(found.clean), len(found.validation), len(found.test)) == (6, 6, 1, 2)
    for views, of, rows in ((found.train, data.train, slice(1, None)), (found.validation, data.clean, slice(1))):
        assert torch.equal(views.colours, of.colours[rows])
        assert torch.equal(views.turns, of.turns[rows])
        assert torch.equal(views.centres, of.centres[rows])
    assert torch.equal(found.test.colours, data.test.colours)
    exact = load_to_choose(DataConfig(name="blocks-tiny"))
    assert (len(exact.train), len(exact.validation)) == BLOCKS["blocks-tiny"][1:3]
    with pytest.raises(UserError, match="one training view"):
        load_to_choose(dataclasses.replace(own, views=1))


def test_half_resolution(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENFOLD_DATA", str(folders))
    data = load_data(DataConfig(name="blender", scene="blocks", half_res=True))
    assert data.train.size == data.test.size == (SIZE // 2, SIZE // 2)


def test_prepared_rays_round_trip(tmp_path: Path) -> None:
    data = load_data(DataConfig(name="blocks-tiny", views=2))
    write_prepared(tmp_path / "cache", data)
    again = load_data(DataConfig(name="prepared", root=tmp_path / "cache"))
    pixels = torch.tensor([0, 5, 40, 1500])
    for place in (0, 1, 3):  # origins, directions and the radii of cones
        torch.testing.assert_close(
            again.train.rays(pixels)[place], data.train.rays(pixels)[place], rtol=1e-4, atol=1e-6
        )
    assert torch.equal(again.test.colours, data.test.colours)
    noisy = load_data(DataConfig(name="prepared", root=tmp_path / "cache", corruption="saltpepper"))
    assert not torch.equal(noisy.train.colours, noisy.clean.colours)
    (tmp_path / "cache" / "rgbs_test.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"rgbs_test.npy is damaged"):
        load_data(DataConfig(name="prepared", root=tmp_path / "cache"))
    meta = tmp_path / "cache" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"near": 7.0}))
    with pytest.raises(UserError, match="near < far"):
        load_data(DataConfig(name="prepared", root=tmp_path / "cache"))
    for content, words in (("[1]", "no dictionary"), ('{"near": "a", "far": 1}', "something else where a number")):
        meta.write_text(content)
        with pytest.raises(UserError, match=words):
            load_data(DataConfig(name="prepared", root=tmp_path / "cache"))


@pytest.mark.parametrize("layout", ["blender", "llff"])
def test_exported_blocks_are_corrupted_as_asked(layout: str, tmp_path: Path) -> None:
    """The training views of an exported folder are those that the same options give when the clean one is read."""
    own = {"corruption": "saltpepper", "corruption_seed": 3, "pose_degrees": 2.0}
    for name, changes in (("clean", {}), ("noisy", own)):
        prepare(PrepareConfig(DataConfig(name="blocks-tiny", **changes), layout, tmp_path / name))
    read = {"name": layout, "root": tmp_path, "factor": 1, "test_skip": 4}
    if layout == "llff":  # every eighth view is clean, and its cameras are normalised together
        own.pop("pose_degrees")
        prepare(PrepareConfig(DataConfig(name="blocks-tiny", **own), layout, tmp_path / "noisy"))
        read["test_skip"] = 8
    found, expected = load_data(DataConfig(scene="noisy", **read)), load_data(DataConfig(scene="clean", **read, **own))
    for one, other in ((found.train, expected.train), (found.test, expected.test)):
        assert int((one.colours.int() - other.colours.int()).abs().max()) <= 2  # of transparency in 8 bit
    assert not torch.equal(found.train.colours, expected.clean.colours)
    torch.testing.assert_close(found.train.turns, expected.train.turns)
    with pytest.raises(UserError, match="own bounds"):
        prepare(PrepareConfig(DataConfig(name="blocks-tiny", near=2.5, far=5.0), layout, tmp_path / "x"))


def test_prepared_rays_take_the_options_of_the_pictures(tmp_path: Path) -> None:
    """Views, bounds, corruption and the median do what they do to the data set that was prepared."""
    write_prepared(tmp_path, load_data(DataConfig(name="blocks-tiny")))
    noisy = {"views": 3, "corruption": "saltpepper", "near": 2.5, "far": 5.5}
    pixels = torch.tensor([0, 700, 3071])
    for changes in (noisy, {**noisy, "denoise": True}, {"denoise": True}):
        found = load_data(DataConfig(name="prepared", root=tmp_path, **changes))
        expected = load_data(DataConfig(name="blocks-tiny", **changes))
        assert torch.equal(found.train.colours, expected.train.colours)
        assert torch.equal(found.clean.colours, expected.clean.colours)
        for one, other in zip(found.train.rays(pixels)[:3], expected.train.rays(pixels)[:3], strict=True):
            torch.testing.assert_close(one, other)
        for split in ("train", "clean", "validation", "test"):
            views, others = getattr(found, split), getattr(expected, split)
            assert (views.near, views.far) == (others.near, others.far)
    with pytest.raises(UserError, match="write them with `prepare`"):
        load_data(DataConfig(name="prepared", root=tmp_path / "elsewhere"))
    for changes, words in (
        ({"ndc": True}, "data with cameras"),
        ({"pose_degrees": 1.0}, "data with cameras"),
        ({"pose_offset": 0.1}, "data with cameras"),
        ({"views": 11}, "10 training views"),
    ):
        with pytest.raises(UserError, match=words):
            load_data(DataConfig(name="prepared", root=tmp_path, **changes))


def test_the_video_of_a_layout(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spiral for LLFF, a circle for spherified captures and for other layouts; a cache keeps its rays."""
    monkeypatch.setenv("TENFOLD_DATA", str(folders))
    llff = load_data(DataConfig(name="llff", scene="blocks", factor=1, white=False))
    spiral = llff.path(0)
    raw = np.load(folders / "nerf_llff_data" / "blocks" / "poses_bounds.npy")
    capture = normalise_llff(raw, 1.0)
    expected = spiral_path(capture)
    assert len(spiral) == 120
    torch.testing.assert_close(spiral.centres, torch.from_numpy(expected[:, :3, 3]).float(), atol=1e-5, rtol=1e-5)
    middle = SIZE * SIZE // 2 + SIZE // 2  # looks along the optical axis, -z of the OpenGL pose
    ahead = spiral.rays(torch.arange(120) * SIZE * SIZE + middle).directions
    torch.testing.assert_close(ahead, torch.from_numpy(-expected[:, :3, 2]).float(), atol=1e-4, rtol=1e-4)
    corner = spiral.rays(torch.tensor([0])).directions[0] @ torch.from_numpy(expected[0, :3, :3]).float()
    off = SIZE / 2 / float(raw[0, 14])
    torch.testing.assert_close(corner, torch.tensor([-off, off, -1.0]), atol=1e-4, rtol=1e-4)
    warped = load_data(DataConfig(name="llff", scene="blocks", factor=1, white=False, ndc=True)).path(5)
    assert (warped.near, warped.far, len(warped)) == (0.0, 1.0, 5)

    around = load_data(DataConfig(name="llff", scene="blocks", factor=1, white=False, spherify=True)).path(7)
    circle = spherical_path(normalise_llff(raw, 1.0, spherify=True), 7)
    torch.testing.assert_close(around.centres, torch.from_numpy(circle[:, :3, 3]).float(), atol=1e-4, rtol=1e-4)

    blender = load_data(DataConfig(name="blender", scene="blocks"))
    ring = blender.path(0)
    assert len(ring) == 40
    torch.testing.assert_close(ring.centres.norm(dim=-1), torch.full((40,), 4.0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ring.centres[:, 2], torch.full((40,), 2.0), atol=1e-4, rtol=1e-4)

    write_prepared(tmp_path / "cache", llff)
    assert np.load(tmp_path / "cache" / "rays_exhibit.npy").shape == (120, SIZE, SIZE, 2, 3)
    assert np.load(tmp_path / "cache" / "rgbs_exhibit.npy").shape == (120, SIZE, SIZE, 3)
    cached = load_data(DataConfig(name="prepared", root=tmp_path / "cache"))
    pixels = torch.tensor([0, middle, 119 * SIZE * SIZE])
    for one, other in zip(cached.path(0).rays(pixels)[:2], spiral.rays(pixels)[:2], strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(UserError, match="has 120 frames"):
        cached.path(7)
    write_prepared(tmp_path / "again", cached)
    for name in ("meta.json", "rays_exhibit.npy", "rgbs_test.npy"):
        assert (tmp_path / "again" / name).stat().st_size == (tmp_path / "cache" / name).stat().st_size
    (tmp_path / "cache" / "rays_exhibit.npy").unlink()
    with pytest.raises(UserError, match=r"rays_exhibit.npy"):
        path_views(load_data(DataConfig(name="prepared", root=tmp_path / "cache")), 0)
    with pytest.raises(UserError, match="0 or more"):
        blender.path(-1)
    with pytest.raises(UserError, match=r"leave --data\.ndc out"):
        write_prepared(
            tmp_path / "ndc", load_data(DataConfig(name="llff", scene="blocks", factor=1, white=False, ndc=True))
        )


def test_the_circle_of_blender_scenes_has_the_published_radius(tmp_path: Path) -> None:
    """However far away the scene's own cameras are."""
    for split in ("train", "val", "test"):
        scene = blocks_views(2, SIZE)
        poses = scene.cameras.camera_to_world.copy()
        poses[:, :3, 3] *= 1.1
        cameras = dataclasses.replace(scene.cameras, camera_to_world=poses)
        write_blender(tmp_path / "far", dataclasses.replace(scene, cameras=cameras), split)
    data = load_data(DataConfig(name="blender", root=tmp_path, scene="far"))
    torch.testing.assert_close(data.train.centres.norm(dim=-1), torch.full((2,), 4.4), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(data.path(3).centres.norm(dim=-1), torch.full((3,), 4.0), atol=1e-4, rtol=1e-4)


def test_broken_layouts_are_named(folders: Path, tmp_path: Path) -> None:
    import shutil  # noqa: PLC0415

    scene = tmp_path / "blocks"
    shutil.copytree(folders / "nerf_synthetic" / "blocks", scene)
    config = DataConfig(name="blender", root=tmp_path, scene="blocks")
    picture = scene / "train" / "r_1.png"
    content = picture.read_bytes()
    picture.unlink()
    with pytest.raises(UserError, match=r"r_1.png does not exist, though its pose is listed"):
        load_data(config)
    picture.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"r_1.png cannot be decoded"):
        load_data(config)
    picture.write_bytes(content)
    (scene / "transforms_train.json").write_text("{")
    with pytest.raises(UserError, match=r"transforms_train.json is not valid JSON"):
        load_data(config)
    for name, licence in (("blender", "variants of Creative Commons"), ("llff", "for research use")):
        with pytest.raises(UserError, match=rf"drive\.google\.com\S+ \(.*{licence}"):
            load_data(DataConfig(name=name, root=tmp_path, scene="lego"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"near": 6.0, "far": 2.0}, "near < far"),
        ({"near": 6.0}, "come together"),
        ({"pose_offset": -1.0}, "0 or more"),
        ({"factor": 0}, "1 or more"),
        ({"near": 1.0, "far": float("inf")}, "both finite"),
        ({"corruption_seed": -1}, "0 or more"),
    ],
)
def test_bad_configurations_are_refused(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        DataConfig(**options)


def test_configurations_that_do_not_fit_the_data() -> None:
    with pytest.raises(UserError, match="10 training views"):
        load_data(DataConfig(name="blocks-tiny", views=11))
    with pytest.raises(UserError, match="forward-facing"):
        load_data(DataConfig(name="blocks-tiny", ndc=True))
    for changes, words in (
        ({"name": "llff", "ndc": True, "spherify": True}, "not for spherified"),
        ({"name": "llff", "ndc": True, "near": 1.0, "far": 2.0}, "go from 0 to 1"),
        ({"spherify": True}, "LLFF captures, not for blocks-tiny"),
        ({"half_res": True}, "Blender scenes, not for blocks-tiny"),
    ):
        with pytest.raises(UserError, match=words):
            load_data(DataConfig(**changes))
    with pytest.raises(UserError, match="saltpepper takes 0 to 1"):
        load_data(DataConfig(name="blocks-tiny", corruption="saltpepper", amount=3.0))


def test_only_training_views_are_corrupted() -> None:
    noisy, clean = (load_data(DataConfig(name="blocks-tiny", corruption=kind)) for kind in ("saltpepper", "none"))
    assert torch.equal(noisy.clean.colours, clean.train.colours)
    assert torch.equal(noisy.test.colours, clean.test.colours)
    assert torch.equal(noisy.validation.colours, clean.validation.colours)
    share = (noisy.train.colours != noisy.clean.colours).any(-1).float().mean()
    assert 0.1 < float(share) < 0.27  # most of the background is white already
    again = load_data(DataConfig(name="blocks-tiny", corruption="saltpepper"))
    assert torch.equal(again.train.colours, noisy.train.colours)
    other = load_data(DataConfig(name="blocks-tiny", corruption="saltpepper", corruption_seed=1))
    assert not torch.equal(other.train.colours, noisy.train.colours)
    assert [BLOCKS["blocks-tiny"][i] for i in (1, 2, 3)] == [len(noisy.train), len(noisy.validation), len(noisy.test)]


def test_corrupted_cameras_turn_and_shift() -> None:
    moved = load_data(DataConfig(name="blocks-tiny", pose_offset=0.1, pose_degrees=5.0))
    shift = (moved.train.centres - moved.clean.centres).abs()
    assert 0 < float(shift.max()) <= 0.1 + 1e-6
    assert not torch.allclose(moved.train.turns, moved.clean.turns)
    torch.testing.assert_close(moved.train.turns.norm(dim=1), moved.clean.turns.norm(dim=1), atol=1e-5, rtol=1e-5)
    offsets, angles = pose_noise(4, 0.1, 5.0, view_generator(0, 0))
    assert np.abs(offsets).max() <= 0.1
    assert np.abs(angles).max() <= np.deg2rad(5)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(sorted(CORRUPTIONS)), st.integers(0, 50), st.integers(0, 5))
def test_corruptions_stay_in_range_and_repeat(kind: str, seed: int, view: int) -> None:
    amount = {"jpeg": 30, "poisson": 50.0, "blur": 1.5}.get(kind, 0.3)
    image = np.random.default_rng(9).random((14, 11, 3)).astype(np.float32)
    kept = image.copy()
    found = corrupt_view(image, kind, amount, seed, view)
    assert found.shape == image.shape
    assert found.min() >= 0
    assert found.max() <= 1
    assert np.array_equal(image, kept)
    assert np.array_equal(found, corrupt_view(image, kind, amount, seed, view))


def test_a_median_removes_salt_and_pepper() -> None:
    image = np.full((40, 40, 3), 0.5, np.float32)
    noisy = salt_and_pepper(image, 0.3, view_generator(0, 0))
    assert 0.2 < (noisy != 0.5).any(-1).mean() < 0.3
    assert np.abs(denoise(noisy) - image).mean() < 0.2 * np.abs(noisy - image).mean()


def test_an_unknown_corruption_is_named() -> None:
    with pytest.raises(UserError, match="it is one of saltpepper"):
        corrupt_view(np.zeros((2, 2, 3)), "snow", 0.1, 0, 0)


# -- batches --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def views() -> Views:
    return load_data(DataConfig(name="blocks-tiny", views=2)).train


def test_a_pool_goes_through_every_ray_once(views: Views) -> None:
    batches = RayBatches(views, 300, seed=3)
    epoch = torch.cat([batches.pixels(step) for step in range(batches.steps)])
    assert len(batches.pixels(batches.steps - 1)) == 2048 % 300
    assert torch.equal(epoch.sort().values, torch.arange(2048))
    assert not torch.equal(batches.pixels(batches.steps), batches.pixels(0))
    assert torch.equal(RayBatches(views, 300, seed=3).pixels(9), batches.pixels(9))


def test_processes_share_a_batch(views: Views) -> None:
    whole = RayBatches(views, 101, seed=3)[2]
    parts = [RayBatches(views, 101, seed=3, rank=rank, world=3)[2] for rank in range(3)]
    torch.testing.assert_close(torch.cat([part.truth for part in parts]), whole.truth)
    assert [part.rows.stop for part in parts] == [33, 67, 101]
    several = [RayBatches(views, 1023, seed=3, rank=rank, world=3) for rank in range(3)]  # two rays are left over
    assert min(len(batches[step].truth) for batches in several for step in range(5)) > 0
    assert len(RayBatches(views, 1023, seed=3)[2].truth) == 2
    with pytest.raises(UserError, match="a ray each"):
        RayBatches(views, 2, seed=3, world=3)


def test_one_view_a_step_and_the_central_crop(views: Views) -> None:
    batches = RayBatches(views, 200, seed=0, mode="view", precrop_steps=5)
    for step in range(8):
        pixels = batches.pixels(step)
        assert len(set(pixels.tolist())) == 200
        assert len((pixels // 1024).unique()) == 1
        row, column = pixels // 32 % 32, pixels % 32
        inside = ((row >= 8) & (row < 24) & (column >= 8) & (column < 24)).all()
        assert bool(inside) == (step < 5)
    with pytest.raises(UserError, match="256 pixels only"):
        RayBatches(views, 257, seed=0, mode="view", precrop_steps=5)


@pytest.mark.parametrize("layout", ["rays", "blender", "llff"])
def test_prepared_folders(layout: str, tmp_path: Path) -> None:
    prepare(PrepareConfig(DataConfig(name="blocks-tiny"), layout, tmp_path / "made"))
    names = {"rays": "meta.json", "blender": "transforms_train.json", "llff": "poses_bounds.npy"}
    assert (tmp_path / "made" / names[layout]).is_file()
