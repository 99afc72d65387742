"""Source selection, augmentation, scores, and every data set's reader on generated data in its published layout."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold_gnt.collections import (
    COLLECTIONS,
    read_google_scene,
    read_ibrnet_scene,
    read_llff_scene,
    read_nmr_scene,
    read_realestate_scene,
    read_shiny_scene,
    read_spaces_scene,
    realestate_scenes,
    scene_folders,
)
from tenfold_gnt.data import Mixture, TrainingViews, evaluation_views, packed_cameras
from tenfold_gnt.metrics import constant_depth_error, depth_scores, psnr, visible_share
from tenfold_gnt.projection import project, source_views
from tenfold_gnt.views import SOURCE_RULES, crop_window, nearest_views, rectify, window_views, with_target_sometimes
from tenfold_shared.errors import UserError
from tenfold_shared.scenes import look_at, tabletop_cameras, tabletop_views, write_blender, write_image, write_llff


@pytest.fixture(scope="module")
def scene():
    return tabletop_views(0, count=9, size=24)


def assert_same_world(left, right, scale: float = 1.0) -> None:
    """Two scenes see a world point at the same pixels."""
    points = np.array([[0.1, 0.2, 0.0], [-0.3, 0.1, 0.2]])
    np.testing.assert_allclose(left.cameras.project(points)[0], right.cameras.project(points)[0] * scale, atol=1e-6)


# --- sources ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.sampled_from(sorted(SOURCE_RULES)), st.integers(2, 10))
@settings(max_examples=40, deadline=None)
def test_drawn_sources_are_distinct_near_and_not_the_target(seed, name, count):
    generator = np.random.default_rng(seed)
    poses = tabletop_cameras(40, 8).camera_to_world
    target = int(generator.integers(40))
    rule = SOURCE_RULES[name]
    chosen = rule.draw(generator, poses[target], poses, count, target)
    assert len(set(chosen)) == len(chosen)
    assert target not in chosen
    assert count + rule.spread[0] <= len(chosen) <= count + rule.spread[1]
    pool = nearest_views(
        poses[target], poses, min(count * max(rule.factors), rule.most or 99), rule.method, target_index=target
    )
    assert set(chosen) <= set(pool)


def test_one_source_at_least_is_drawn():
    poses = tabletop_cameras(12, 8).camera_to_world
    rule = SOURCE_RULES["llff"]  # draws up to two fewer than are wanted
    drawn = {len(rule.draw(np.random.default_rng(seed), poses[0], poses, 1, 0)) for seed in range(30)}
    assert min(drawn) == 1


def test_nearest_views_are_ordered_by_their_distance():
    poses = tabletop_cameras(12, 8).camera_to_world
    order = nearest_views(poses[3], poses, 11, "dist", target_index=3)
    lengths = np.linalg.norm(poses[order, :3, 3] - poses[3, :3, 3], axis=1)
    assert (np.diff(lengths) >= 0).all()
    assert 3 not in order
    with pytest.raises((ValueError, TypeError), match="colour"):  # the tests' type checker may be the first to object
        nearest_views(poses[0], poses, 3, "colour")
    with pytest.raises(ValueError, match="index 12 is none of the 12"):
        nearest_views(poses[0], poses, 3, "dist", target_index=12)


def test_too_few_views_are_named(scene):
    poses = scene.cameras.camera_to_world
    with pytest.raises(ValueError, match="10 source views were asked for, and the scene has 8"):
        SOURCE_RULES["llff"].draw(np.random.default_rng(0), poses[0], poses, 10, 0)
    with pytest.raises(UserError, match="10 source views were asked for"):
        evaluation_views(scene, 0, 10, "vector")
    with pytest.raises(UserError, match="no scenes"):
        TrainingViews("llff", [])


def test_windows_stay_near_the_frame():
    generator = np.random.default_rng(0)
    with_target = 0
    for _ in range(300):
        chosen = window_views(generator, 50, 200, 8)
        assert len(set(chosen)) == 8
        assert np.abs(chosen - 50).max() <= 33
        with_target += 50 in chosen
    assert with_target < 10
    assert len(window_views(generator, 0, 4, 10)) <= 4


def test_the_target_is_rarely_among_the_sources():
    generator = np.random.default_rng(0)
    hits = sum(9 in with_target_sometimes(generator, np.arange(5), 9) for _ in range(4000))
    assert 5 <= hits <= 45


@given(st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_crops_fit(seed):
    window = crop_window(np.random.default_rng(seed), 756, 1008)
    if window is None:
        return
    top, left, height, width = window
    assert 0 <= top <= 756 - height
    assert 0 <= left <= 1008 - width
    assert height % 2 == width % 2 == 0
    assert 240_000 - 2 * height < height * width <= 240_000
    assert crop_window(np.random.default_rng(seed), 100, 100) is None


def test_training_items_keep_the_geometry():
    """After crop and flip a world point shows the same colour in the target as before."""
    scene = tabletop_views(0, count=9, size=24)
    views = TrainingViews("llff", [scene], sources=4)
    generator = np.random.default_rng(1)
    point = torch.zeros(1, 1, 3)
    for _ in range(6):
        item = views.draw(generator)
        assert 2 <= len(item.images) <= 6
        pixels, _ = project(point, source_views(item.rgb[None], item.camera[None]).projection)
        u, v = pixels[0, 0, 0].round().long().tolist()
        original = [scene.rgb(i) for i in range(9)]
        assert any(
            np.abs(item.rgb[v, u].numpy() - picture[b, a]).max() < 1e-6
            for picture in original
            for b in range(24)
            for a in range(24)
        )
        flipped = item.camera[2] < 0
        match = next(i for i in range(9) if np.allclose(packed_cameras(scene)[i, 18:], item.camera[18:]))
        expected = original[match][:, ::-1] if flipped else original[match]
        np.testing.assert_allclose(item.rgb.numpy(), expected, atol=1e-6)


def test_every_set_draws_items(scene):
    for name in ("llff", "google", "realestate", "spaces", "nerf_synthetic", "ibrnet_collected", "own"):
        item = TrainingViews(name, [scene, scene], sources=4).draw(np.random.default_rng(0))
        assert item.images.shape[1:] == (24, 24, 3)
        assert item.cameras.shape == (len(item.images), 34)
        assert (item.near, item.far) == (2.0, 5.0)
    mixture = Mixture([TrainingViews("llff", [scene], 3), TrainingViews("google", [scene], 3)], [0.0, 1.0])
    assert len(mixture.draw(np.random.default_rng(0)).images) == 3


def test_evaluation_never_sees_the_target(scene):
    item = evaluation_views(scene, 4, 8, "vector")
    assert not any(torch.allclose(camera, item.camera) for camera in item.cameras)
    test = tabletop_views(0, count=3, size=24, offset=0.29)
    crossed = evaluation_views(test, 1, 9, "vector", scene)
    assert len(crossed.images) == 9


def test_rectification_turns_only_what_is_turned():
    poses = tabletop_cameras(4, 8).camera_to_world
    spin = np.eye(4)
    spin[:2, :2] = [[0, -1], [1, 0]]
    turned = rectify(poses[0], np.stack([poses[0], poses[0] @ spin]))
    np.testing.assert_allclose(turned[0], poses[0])
    np.testing.assert_allclose(turned[1], poses[0], atol=1e-9)


# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores():
    image = torch.rand(8, 9, 3)
    assert float(psnr(image, image)) == pytest.approx(60, abs=1e-4)
    assert float(psnr(image, image + 0.1)) == pytest.approx(-10 * np.log10(0.01 + 1e-6), abs=1e-3)
    truth = torch.tensor([1.0, 2.0, 3.0, torch.inf])
    error, correlation = depth_scores(torch.tensor([1.5, 2.5, 3.5, 9.0]), truth)
    assert float(error) == pytest.approx(0.5)
    assert float(correlation) == pytest.approx(1.0)
    assert float(constant_depth_error(truth)) == pytest.approx(2 / 3)
    visibility = torch.tensor([[True, False], [False, True], [True, False]])
    assert float(visible_share(torch.tensor([0, 0, 0]), visibility)) == pytest.approx(2 / 3)


# --- data sets -------------------------------------------------------------------------------------------------------


def test_llff_and_ibrnet(tmp_path, scene):
    write_llff(tmp_path, scene)
    (tmp_path / "images").rename(tmp_path / "images_4")
    near, far = read_llff_scene(tmp_path).cameras.bounds
    assert near == pytest.approx(0.9 / 0.75, rel=1e-5)
    (tmp_path / "images_4").rename(tmp_path / "images_2")
    collected = read_ibrnet_scene(tmp_path).cameras.bounds
    assert collected[1] / far == pytest.approx(1.5 / 1.6)


def test_shiny(tmp_path, scene):
    write_llff(tmp_path / "llff", scene)
    raw = np.load(tmp_path / "llff" / "poses_bounds.npy")
    rows = raw[:, :15].reshape(-1, 3, 5)
    (tmp_path / "llff" / "images").rename(tmp_path / "images_8")
    np.save(tmp_path / "poses_bounds.npy", np.concatenate([rows[:, :, :4].reshape(-1, 12), raw[:, 15:]], 1))
    focal = rows[0, 2, 4] * 8
    np.save(tmp_path / "hwf_cxcy.npy", np.array([24 * 8, 24 * 8, focal, focal, 11 * 8, 12 * 8]))
    cameras = read_shiny_scene(tmp_path).cameras
    np.testing.assert_allclose(cameras.intrinsics[0, :2], [[focal / 8, 0, 11], [0, focal / 8, 12]], rtol=1e-6)
    np.testing.assert_allclose(cameras.near[0], 0.9 / 0.75, rtol=1e-5)
    (tmp_path / "hwf_cxcy.npy").unlink()
    with pytest.raises(UserError, match="hwf_cxcy"):
        read_shiny_scene(tmp_path)


def test_google(tmp_path, scene, monkeypatch):
    assert_google_skips_small_objects(tmp_path, scene)
    monkeypatch.setattr("tenfold_gnt.collections.GOOGLE_VIEWS", 9)
    back = read_google_scene(tmp_path)
    assert_same_world(scene, back)
    depth = np.linalg.inv(scene.cameras.camera_to_world)[:, 2, 3]
    np.testing.assert_allclose(back.cameras.far, depth + 0.5 * np.sqrt(2) * 1.1)
    (tmp_path / "pose" / "004.txt").write_text("1 2")
    with pytest.raises(UserError, match=r"004\.txt does not hold a 4x4"):
        read_google_scene(tmp_path)


def assert_google_skips_small_objects(folder, scene):
    for view in range(len(scene)):
        write_image(folder / "rgb" / f"{view:03d}.png", scene.rgb(view))
        matrix = np.eye(4)
        matrix[:3, :3] = scene.cameras.intrinsics[view]
        for name, value in (("pose", scene.cameras.camera_to_world[view]), ("intrinsics", matrix)):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"{view:03d}.txt").write_text(" ".join(map(repr, value.ravel().tolist())))
    assert read_google_scene(folder) is None


def test_realestate(tmp_path, scene):
    base = tmp_path / "RealEstate10K-subset"
    with pytest.raises(UserError, match="camera files are not in"):
        realestate_scenes(tmp_path)
    lines = ["https://example.org/video"]
    for view in range(3):
        pose = np.linalg.inv(scene.cameras.camera_to_world[view])[:3]
        matrix = scene.cameras.intrinsics[view] / 24
        numbers = [1000 + view, matrix[0, 0], matrix[1, 1], 0.5, 0.5, 0, 0, *pose.ravel()]
        lines.append(" ".join(map(repr, map(float, numbers))).replace("1000.0", "1000"))
        if view != 1:
            write_image(base / "frames" / "abc" / f"{1000 + view}.png", scene.rgb(view))
    (base / "cameras").mkdir()
    for name in ("abc", "gone"):  # a whole video disappears as well
        (base / "cameras" / f"{name}.txt").write_text("\n".join(lines))
    (back,) = realestate_scenes(tmp_path)
    assert back.cameras.names == ("1000", "1002")
    assert back.rgb(0).shape == (450, 800, 3)
    assert back.cameras.bounds == (1.0, 100.0)
    kept = scene.cameras[[0, 2]].resized(450, 800)
    np.testing.assert_allclose(back.cameras.intrinsics, kept.intrinsics)
    np.testing.assert_allclose(back.cameras.camera_to_world, kept.camera_to_world, atol=1e-9)
    (base / "cameras" / "abc.txt").write_text("x\n1 2 3")
    with pytest.raises(UserError, match="every line needs 19 numbers"):
        read_realestate_scene(base / "cameras" / "abc.txt", base / "frames" / "abc")


def test_spaces_centres_small_views(tmp_path, scene):
    views = []
    for view in range(2):
        picture = scene.rgb(view)[: 24 - 4 * view]
        write_image(tmp_path / f"cam{view}.png", picture)
        views.append(
            {
                "relative_path": f"cam{view}.png",
                "position": [view, 0, 0],
                "orientation": [0, 0.1 * view, 0],
                "focal_length": 30.0,
                "pixel_aspect_ratio": 1.0,
                "principal_point": [12.0, 12.0],
                "width": 24.0,
                "height": float(picture.shape[0]),
            }
        )
    (tmp_path / "models.json").write_text(json.dumps([views]))
    back = read_spaces_scene(tmp_path)
    assert back.rgb(1).shape == (24, 24, 3)
    assert back.images[1] is back.images[1]
    np.testing.assert_allclose(back.rgb(1)[:2], 1)
    np.testing.assert_allclose(back.rgb(1)[2:22], scene.rgb(1)[:20], atol=1 / 255)
    assert back.cameras.intrinsics[1, 1, 2] == 14.0
    expected = look_at(np.zeros(3), np.array([-np.sin(0.1), 0, np.cos(0.1)]), up=(0, -1, 0))
    np.testing.assert_allclose(back.cameras.camera_to_world[1, :3, :3], expected[:3, :3], atol=1e-12)
    (tmp_path / "models.json").write_text("[[{}]]")
    with pytest.raises(UserError, match=r"models\.json does not hold"):
        read_spaces_scene(tmp_path)


def test_nmr(tmp_path, scene):
    stored = {}
    for view in range(3):
        write_image(tmp_path / "image" / f"{view:04d}.png", scene.rgb(view))
        stored[f"world_mat_{view}"] = np.linalg.inv(scene.cameras.camera_to_world[view])
        camera = np.eye(4)
        camera[[0, 1], [0, 1]] = scene.cameras.intrinsics[view, 0, 0] / 12
        stored[f"camera_mat_{view}"] = camera
    np.savez(tmp_path / "cameras.npz", **stored)
    back = read_nmr_scene(tmp_path)
    assert_same_world(scene.subset([0, 1, 2]), back)
    assert back.cameras.bounds == (2.0, 4.0)
    whole = (tmp_path / "cameras.npz").read_bytes()
    np.savez(tmp_path / "cameras.npz", nothing=1)
    with pytest.raises(UserError, match="world_mat_i"):
        read_nmr_scene(tmp_path)
    (tmp_path / "cameras.npz").write_bytes(whole[:500])
    with pytest.raises(UserError, match="not a zip file"):
        read_nmr_scene(tmp_path)


def test_collections_name_their_source(tmp_path, scene):
    for name, collection in COLLECTIONS.items():
        with pytest.raises(UserError, match="get it from https://"):
            scene_folders(tmp_path, name)
        assert collection.licence
    with pytest.raises(UserError, match="there is no data set nothing"):
        scene_folders(tmp_path, "nothing")
    for name in ("fern2", "data3_orchid"):
        (tmp_path / "real_iconic_noface" / name).mkdir(parents=True)
    assert [path.name for path in scene_folders(tmp_path, "llff")] == ["fern2"]
    write_blender(tmp_path / "nerf_synthetic" / "lego", scene)
    (lego,) = scene_folders(tmp_path, "nerf_synthetic")
    assert len(COLLECTIONS["nerf_synthetic"].read(lego)) == 9
