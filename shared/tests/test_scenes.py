"""Cameras, layouts and analytic scenes, against exact geometry and round trips."""

import json
import pickle

import numpy as np
import pytest

from tenfold_shared.errors import UserError
from tenfold_shared.scenes import (
    CameraSet,
    ImageFiles,
    Scene,
    blocks,
    blocks_cameras,
    blocks_views,
    normalise_llff,
    read_blender,
    read_colmap,
    read_deepvoxels,
    read_image,
    read_llff,
    read_nerfstudio,
    spherical_path,
    spiral_path,
    tabletop,
    tabletop_cameras,
    tabletop_views,
    views,
    write_blender,
    write_colmap,
    write_image,
    write_llff,
    write_nerfstudio,
)
from tenfold_shared.scenes.views import to_uint8


@pytest.fixture(scope="module")
def table() -> Scene:
    return tabletop_views(0, count=6, size=24)


def composited(scene: Scene, view: int) -> np.ndarray:
    image = scene.images[view]
    return image[..., :3] * image[..., 3:] + 1 - image[..., 3:]


def assert_same_cameras(left: CameraSet, right: CameraSet, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(left.camera_to_world, right.camera_to_world, rtol=0, atol=tolerance)
    np.testing.assert_allclose(left.intrinsics, right.intrinsics, rtol=0, atol=tolerance * 100)
    assert (left.height, left.width) == (right.height, right.width)


# --- analytic scenes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "mean", "hits", "depth", "pixel", "pixel_depth"),
    [
        (
            0,
            (0.780337, 0.715003, 0.738374),
            986,
            (2.715975, 3.294720, 4.322096),
            (0.118525, 0.238119, 0.129363),
            3.151616,
        ),
        (
            100,
            (0.788313, 0.787818, 0.807042),
            1016,
            (2.715975, 3.205444, 4.536723),
            (0.279043, 0.360903, 0.771771),
            3.301028,
        ),
    ],
)
def test_tabletop_is_the_published_scene(seed, mean, hits, depth, pixel, pixel_depth):
    views = tabletop_views(seed)
    np.testing.assert_allclose(views.cameras.centres[0], (2.847991, 0.451077, 1.801521), atol=1e-6)
    met = views.depth[0][np.isfinite(views.depth[0])]
    assert met.size == hits
    np.testing.assert_allclose((met.min(), met.mean(), met.max()), depth, atol=1e-6)
    np.testing.assert_allclose(composited(views, 0).mean((0, 1)), mean, atol=1e-6)
    np.testing.assert_allclose(composited(views, 0)[24, 24], pixel, atol=1e-6)
    assert views.depth[0][24, 24] == pytest.approx(pixel_depth, abs=1e-6)


def test_true_surface_points_have_one_albedo_in_all_views_that_see_them():
    """A surface point has one colour wherever it is visible (without highlights, nothing depends on the view)."""
    scene = tabletop(3, specular=0.0)
    cameras = tabletop_cameras(5, 64)
    points = scene.sample_surface(400)
    pixels, _ = cameras.project(points)
    colours, seen = [], []
    for view in range(len(cameras)):
        origins, directions = cameras.rays(view, pixels[view])
        colours.append(scene.colour(origins, directions, scene.trace(origins, directions)))
        seen.append(scene.visible(points, cameras.centres[view]))
    checked = 0
    for a in range(5):
        for b in range(a):
            both = seen[a] & seen[b]
            # A point on the edge of a texture may fall to either side by rounding; none of the others may differ.
            same = np.abs(colours[a][both] - colours[b][both]).max(-1) < 1e-6
            assert same.mean() > 0.99
            checked += both.sum()
    assert checked > 500


def test_depth_is_z_depth_and_lies_on_the_surface():
    for scene, cameras in ((tabletop(1), tabletop_cameras(2, 32)), (blocks(), blocks_cameras(2, 32))):
        origins, directions = (x.reshape(-1, 3) for x in cameras.rays(1))
        hit = scene.trace(origins, directions)
        met = np.isfinite(hit.depth)
        points = origins[met] + hit.depth[met, None] * directions[met]
        assert met.sum() > 100
        np.testing.assert_allclose(scene.signed_distance(points), 0, atol=1e-12)
        np.testing.assert_allclose(cameras.project(points)[1][1], hit.depth[met], atol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(hit.normal[met], axis=-1), 1, atol=1e-12)
        assert ((hit.normal[met] * directions[met]).sum(-1) <= 1e-9).all()


def test_normals_are_the_gradient_of_the_distance():
    scene = blocks()
    cameras = blocks_cameras(1, 24)
    origins, directions = (x.reshape(-1, 3) for x in cameras.rays(0))
    hit = scene.trace(origins, directions)
    met = np.isfinite(hit.depth)
    points = origins[met] + hit.depth[met, None] * directions[met]
    step = 1e-6
    gradient = [scene.signed_distance(points + step * e) - scene.signed_distance(points - step * e) for e in np.eye(3)]
    agree = np.abs(np.stack(gradient, -1) / (2 * step) - hit.normal[met]).max(-1) < 1e-4
    assert agree.mean() > 0.97  # not where surfaces meet


def test_surface_samples_lie_outside_all_solids_and_on_the_surface():
    for scene in (blocks(), tabletop(2)):
        points = scene.sample_surface(500, seed=1)
        assert points.shape == (500, 3)
        np.testing.assert_allclose(scene.signed_distance(points), 0, atol=1e-9)
    np.testing.assert_array_equal(blocks().sample_surface(50, 3), blocks().sample_surface(50, 3))


def test_blocks_cameras_and_pixels():
    views = blocks_views(3, 16)
    np.testing.assert_allclose(np.linalg.norm(views.cameras.centres, axis=1), 4)
    elevation = np.rad2deg(np.arcsin(views.cameras.centres[:, 2] / 4))
    np.testing.assert_allclose(elevation, [25, 45, 65])
    # The box's top face faces the light by the z-component of the light direction.
    scene = blocks()
    origin, down = np.array([[-0.7, -0.5, 3.0]]), np.array([[0.0, 0.0, -1.0]])
    hit = scene.trace(origin, down)
    light = np.array([0.4, -0.3, 0.85]) / np.linalg.norm([0.4, -0.3, 0.85])
    np.testing.assert_allclose(hit.depth, 2.75)
    expected = np.array([0.9, 0.95, 0.9]) * (0.35 + 0.65 * light[2])
    np.testing.assert_allclose(scene.colour(origin, down, hit)[0], np.clip(expected, 0, 1))
    # Transparency and straight colour give back the mean over 3 x 3 rays on white.
    grid = views.cameras.pixel_grid()
    total = np.zeros((16, 16, 3))
    for dv in (-1 / 3, 0, 1 / 3):
        for du in (-1 / 3, 0, 1 / 3):
            origins, directions = (x.reshape(-1, 3) for x in views.cameras.rays(2, grid + np.array([du, dv])))
            total += scene.colour(origins, directions, scene.trace(origins, directions)).reshape(16, 16, 3) / 9
    np.testing.assert_allclose(composited(views, 2), total, atol=1e-12)


def test_visibility_sees_occluders():
    scene = blocks()
    point = np.array([[0.68, 0.5, 0.2]])  # top of the blue sphere
    assert scene.visible(point, np.array([0.68, 0.5, 4.0]))[0]
    assert not scene.visible(point, np.array([-4.0, -0.8, 0.3]))[0]
    assert not scene.visible(np.array([[0.68, 0.5, -0.4]]), np.array([0.68, 0.5, 4.0]))[0]


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_blender_round_trip(tmp_path, table):
    write_blender(tmp_path / "scene", table, "val")
    back = read_blender(tmp_path / "scene", "val")
    assert_same_cameras(back.cameras, table.cameras)
    assert back.cameras.bounds == table.cameras.bounds
    np.testing.assert_array_equal(back.depth, table.depth)
    for view in range(len(table)):
        np.testing.assert_array_equal(back.images[view], to_uint8(table.images[view]))
        np.testing.assert_allclose(back.rgb(view), composited(table, view), atol=1 / 255)
    assert len(read_blender(tmp_path / "scene", "val", skip=4)) == 2
    half = read_blender(tmp_path / "scene", "val", size=(12, 12))
    assert half.rgb(0).shape == (12, 12, 3)
    np.testing.assert_allclose(half.cameras.intrinsics[:, :2], table.cameras.intrinsics[:, :2] / 2)


def test_blender_defaults_without_intrinsics(tmp_path, table):
    write_blender(tmp_path, table, "train")
    meta = json.loads((tmp_path / "transforms_train.json").read_text())
    frames = [{k: f[k] for k in ("file_path", "transform_matrix")} for f in meta["frames"]]
    (tmp_path / "transforms_train.json").write_text(
        json.dumps({"camera_angle_x": meta["camera_angle_x"], "frames": frames})
    )
    back = read_blender(tmp_path)
    assert_same_cameras(back.cameras, table.cameras)
    assert back.cameras.bounds == (2.0, 6.0)


def similarity_between(source: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
    """The scale s and rigid [4, 4] motion G of least squares with `target = s * (G source)` for poses [N, 4, 4].

    Rotation from the orientations (their mean relative rotation), scale and translation from the centres; three or more
    views at different positions are needed for the scale.
    """
    relative = (target[:, :3, :3] @ source[:, :3, :3].transpose(0, 2, 1)).sum(0)
    left, _, right = np.linalg.svd(relative)
    rotation = left @ np.diag([1.0, 1.0, np.linalg.det(left @ right)]) @ right
    start, end = source[:, :3, 3] @ rotation.T, target[:, :3, 3]
    spread_start, spread_end = start - start.mean(0), end - end.mean(0)
    scale = float((spread_start * spread_end).sum() / (spread_start**2).sum())
    motion = np.eye(4)
    motion[:3, :3] = rotation
    motion[:3, 3] = end.mean(0) / scale - start.mean(0)
    return scale, motion


def test_llff_gives_the_same_cameras_up_to_a_similarity(tmp_path):
    scene = blocks_views(8, 24, forward=True)
    write_llff(tmp_path / "llff", scene)
    write_blender(tmp_path / "blender", scene)
    left, right = read_blender(tmp_path / "blender"), read_llff(tmp_path / "llff", factor=1)
    scale, motion = similarity_between(left.cameras.camera_to_world, right.cameras.camera_to_world)
    moved = left.cameras.transformed(motion, scale)
    assert_same_cameras(moved, right.cameras, 1e-5)
    np.testing.assert_allclose(right.cameras.near.min(), 1 / 0.75, rtol=1e-6)
    finite = np.isfinite(scene.depth[0])
    np.testing.assert_allclose(right.cameras.near[0] / scale, np.percentile(scene.depth[0][finite], 1), rtol=1e-5)
    np.testing.assert_allclose(right.rgb(0), left.rgb(0), atol=1.501 / 255)  # three roundings of half a step at most
    train, test = right.split(4)
    assert (len(train), len(test)) == (6, 2)
    assert test.cameras.names == ("0000", "0004")


def test_llff_without_reduced_images_reduces_them(tmp_path, table):
    write_llff(tmp_path, table)
    back = read_llff(tmp_path, factor=4)
    assert back.rgb(2).shape == (6, 6, 3)
    np.testing.assert_allclose(back.cameras.intrinsics[0, 0, 0], table.cameras.intrinsics[0, 0, 0] / 4, rtol=1e-6)
    np.testing.assert_allclose(back.rgb(2), table.rgb(2).reshape(6, 4, 6, 4, 3).mean((1, 3)), atol=2 / 255)


def test_llff_paths_look_where_they_should(tmp_path, table):
    write_llff(tmp_path, table)
    poses = normalise_llff(np.load(tmp_path / "poses_bounds.npy"))
    path = spiral_path(poses, frames=30)
    np.testing.assert_allclose(
        path[:, :3, :3] @ path[:, :3, :3].transpose(0, 2, 1), np.tile(np.eye(3), (30, 1, 1)), atol=1e-6
    )
    # All optical axes meet in the focus point.
    axes = path[:, :3, 2]
    across = np.eye(3) - axes[:, :, None] * axes[:, None, :]
    meeting = np.linalg.solve(across.sum(0), (across @ path[:, :3, 3:]).sum(0))
    np.testing.assert_allclose(across @ (path[:, :3, 3:] - meeting), 0, atol=1e-6)
    round_ = normalise_llff(np.load(tmp_path / "poses_bounds.npy"), spherify=True)
    assert np.square(round_.camera_to_world[:, :3, 3]).sum(1).mean() == pytest.approx(1, abs=1e-6)
    circle = spherical_path(round_)
    np.testing.assert_allclose(np.linalg.norm(circle[:, :3, 3], axis=1), 1, atol=1e-6)


def test_nerfstudio_round_trip(tmp_path, table):
    write_nerfstudio(tmp_path, table)
    back = read_nerfstudio(tmp_path)
    assert_same_cameras(back.cameras, table.cameras)
    assert back.cameras.bounds == (2.0, 5.0)
    meta = json.loads((tmp_path / "transforms.json").read_text())
    assert meta["frames"][0]["cx"] == 12.5  # pixel centres at half-integers there
    meta["train_filenames"] = ["images/frame_00003.png"]
    (tmp_path / "transforms.json").write_text(json.dumps(meta))
    assert len(read_nerfstudio(tmp_path, "train")) == 1
    with pytest.raises(UserError, match="val_filenames"):
        read_nerfstudio(tmp_path, "val")
    (tmp_path / "transforms.json").write_text(json.dumps(meta | {"k1": 0.1}))
    with pytest.raises(UserError, match="distortion"):
        read_nerfstudio(tmp_path)


@pytest.mark.parametrize("binary", [True, False])
def test_colmap_round_trip(tmp_path, table, binary):
    points = tabletop(0).sample_surface(200)
    write_colmap(tmp_path, table, binary=binary, points=points)
    back = read_colmap(tmp_path)
    assert_same_cameras(back.cameras, table.cameras, 1e-9)
    depth = table.cameras.project(points)[1]
    np.testing.assert_allclose(back.cameras.near, np.percentile(depth, 1, axis=1))
    np.testing.assert_allclose(back.cameras.far, np.percentile(depth, 99, axis=1))
    write_colmap(tmp_path / "bare", table, binary=binary)
    assert read_colmap(tmp_path / "bare").cameras.near is None


def test_colmap_text_and_binary_agree(tmp_path, table):
    points = tabletop(0).sample_surface(20)
    write_colmap(tmp_path / "a", table, points=points)
    write_colmap(tmp_path / "b", table, points=points, binary=False)
    assert_same_cameras(read_colmap(tmp_path / "a").cameras, read_colmap(tmp_path / "b").cameras)


def test_colmap_refuses_distortion_and_truncation(tmp_path, table):
    write_colmap(tmp_path, table, binary=False)
    cameras = tmp_path / "sparse" / "0" / "cameras.txt"
    text = cameras.read_text()
    rows = text.splitlines()
    cameras.write_text("\n".join(row.replace("PINHOLE", "OPENCV") + " 0.1 0 0 0" for row in rows))
    with pytest.raises(UserError, match="distortion"):
        read_colmap(tmp_path)
    cameras.write_text("\n".join(row.replace("PINHOLE", "OPENCV") + " 0 0 0 0" for row in rows))
    assert_same_cameras(read_colmap(tmp_path).cameras, table.cameras, 1e-9)
    cameras.write_text("\n".join(row.replace("PINHOLE", "FOV") for row in rows))
    with pytest.raises(UserError, match="FOV"):
        read_colmap(tmp_path)
    write_colmap(tmp_path / "bin", table)
    images = tmp_path / "bin" / "sparse" / "0" / "images.bin"
    images.write_bytes(images.read_bytes()[:-20])
    with pytest.raises(UserError, match="damaged"):
        read_colmap(tmp_path / "bin")
    with pytest.raises(UserError, match="no COLMAP model"):
        read_colmap(tmp_path / "nowhere")


def test_deepvoxels(tmp_path, table):
    for split in ("train", "test"):
        base = tmp_path / split / "cube"
        for view in range(3):
            write_image(base / "rgb" / f"{view:06d}.png", table.rgb(view))
            (base / "pose").mkdir(exist_ok=True)
            (base / "pose" / f"{view:06d}.txt").write_text(
                " ".join(map(str, table.cameras.camera_to_world[view].ravel()))
            )
    focal = table.cameras.intrinsics[0, 0, 0] * 2
    (tmp_path / "train" / "cube" / "intrinsics.txt").write_text(f"{focal} 24 24 0\n0 0 0\n1\n1\n48 48\n")
    back = read_deepvoxels(tmp_path, "cube", "test")
    assert_same_cameras(back.cameras, table.cameras[:3])
    np.testing.assert_allclose(back.cameras.bounds, (2.4, 4.4))
    (tmp_path / "train" / "cube" / "intrinsics.txt").write_text("1 2")
    with pytest.raises(UserError, match=r"intrinsics\.txt is damaged"):
        read_deepvoxels(tmp_path, "cube")


def test_missing_and_damaged_files_are_named(tmp_path, table):
    with pytest.raises(UserError, match=r"transforms_train\.json does not exist"):
        read_blender(tmp_path)
    write_blender(tmp_path, table)
    picture = tmp_path / "train" / "r_3.png"
    content = picture.read_bytes()
    write_image(picture, np.zeros((5, 7, 3)))
    with pytest.raises(UserError, match=r"r_0\.png is 24x24 and r_3\.png is 7x5"):
        read_blender(tmp_path)
    picture.write_bytes(content[:-200])
    with pytest.raises(UserError, match=r"r_3\.png cannot be decoded"):
        read_blender(tmp_path).rgb(3)
    picture.unlink()
    with pytest.raises(UserError, match=r"r_3\.png does not exist, though its pose is listed"):
        read_blender(tmp_path)
    (tmp_path / "transforms_train.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_blender(tmp_path)
    (tmp_path / "transforms_train.json").write_text('{"frames": []}')
    with pytest.raises(UserError, match="no frames"):
        read_blender(tmp_path)
    write_llff(tmp_path / "llff", table)
    (tmp_path / "llff" / "images" / "0000.png").unlink()
    with pytest.raises(UserError, match="6 poses and 5 images"):
        read_llff(tmp_path / "llff", 1)
    (tmp_path / "llff" / "poses_bounds.npy").write_bytes(b"none")
    with pytest.raises(UserError, match=r"poses_bounds\.npy is damaged"):
        read_llff(tmp_path / "llff", 1)
    with pytest.raises(UserError, match=r"\[N, 17\]"):
        normalise_llff(np.zeros((3, 15)))


def test_camera_files_of_other_content_are_named(tmp_path, table):
    write_blender(tmp_path, table)
    write_nerfstudio(tmp_path, table)
    for name, read in (("transforms_train", read_blender), ("transforms", read_nerfstudio)):
        file = tmp_path / f"{name}.json"
        meta = json.loads(file.read_text())
        for content in ([1], {"frames": 3}, {"frames": [3]}):
            file.write_text(json.dumps(content))
            with pytest.raises(UserError, match=rf"{name}\.json holds no dictionary with a list of frames"):
                read(tmp_path)
        meta["frames"][2]["transform_matrix"][1][2] = "x"
        file.write_text(json.dumps(meta))
        with pytest.raises(UserError, match=rf"{name}\.json has something else where a number belongs"):
            read(tmp_path)


def test_llff_refuses_cameras_it_cannot_hold(tmp_path, table):
    moved = table.cameras.intrinsics.copy()
    moved[:, 0, 2] += 3
    cameras = CameraSet(moved, table.cameras.camera_to_world, 24, 24)
    with pytest.raises(UserError, match="principal point in the middle"):
        write_llff(tmp_path, Scene("x", cameras, table.images))
    plain = CameraSet(table.cameras.intrinsics, table.cameras.camera_to_world, 24, 24)
    with pytest.raises(UserError, match="near and far"):
        write_llff(tmp_path, Scene("x", plain, table.images))


def test_images_are_decoded_once_and_travel_to_workers(tmp_path, table):
    write_blender(tmp_path, table)
    images = read_blender(tmp_path).images
    assert images[1] is images[1]
    copy = pickle.loads(pickle.dumps(images))
    np.testing.assert_array_equal(copy[2], images[2])
    with pytest.raises(IndexError):
        images[6]
    strict = ImageFiles([tmp_path / "train" / "r_0.png"], (8, 8))
    with pytest.raises(UserError, match="24x24, its camera says 8x8"):
        strict[0]


def test_the_oldest_pictures_are_forgotten(tmp_path, table, monkeypatch):
    write_blender(tmp_path, table)
    monkeypatch.setattr(views, "_KEPT", views._Kept())
    monkeypatch.setattr(views, "KEPT_BYTES", 3 * 24 * 24 * 4)  # of all scenes together
    one, other = read_blender(tmp_path).images, read_blender(tmp_path).images
    first, second = one[0], one[1]
    assert other[0] is not first
    assert one[0] is first  # three are kept; the one asked for again is no longer the oldest
    other[1]
    assert one[0] is first
    assert one[1] is not second
    np.testing.assert_array_equal(one[1], second)


def test_scene_counts_must_match(table):
    with pytest.raises(UserError, match="6 poses and 5 images"):
        Scene("x", table.cameras, table.images[:5])


def test_alpha_and_backgrounds(table):
    np.testing.assert_array_equal(table.alpha(0) > 0, np.isfinite(table.depth[0]))
    missing = ~np.isfinite(table.depth[0])
    np.testing.assert_allclose(table.rgb(0, background=0.25)[missing], 0.25)
    assert table.all_rgb().shape == (6, 24, 24, 3)


def test_grey_and_rgb_pictures_are_read_as_three_channels(tmp_path):
    from PIL import Image  # noqa: PLC0415 - the test of an optional dependency

    Image.fromarray(np.full((3, 4), 77, np.uint8)).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), np.full((3, 4, 3), 77))
