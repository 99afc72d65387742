"""Experiments as a user runs them: every recipe, the networks by name, judging, rendering paths, what is refused."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tenfold_gnt.compat import save_official_checkpoint
from tenfold_gnt.evaluate import (
    EvalConfig,
    Scores,
    depth_of_target,
    evaluate,
    load_model,
    mean_picture,
    mean_scores,
    score_picture,
    untrained_model,
)
from tenfold_gnt.experiments import OFFSETS, UNSEEN, DataConfig, capture, judged_targets, training_set
from tenfold_gnt.models import NetworkConfig, create_model
from tenfold_gnt.network import parameter_count
from tenfold_gnt.objective import Optimisation
from tenfold_gnt.render import Picture
from tenfold_gnt.reproduce import measure
from tenfold_gnt.train import Rays, Recipe, run_recipe
from tenfold_gnt.video import RenderConfig, claim_folder, path_frames, read_poses, render, write_ply, write_video
from tenfold_shared.checkpoint import load_weights, save_weights
from tenfold_shared.claims import Metric, load_claims
from tenfold_shared.cli import load_recipe, recipes
from tenfold_shared.errors import RunFailure, UserError
from tenfold_shared.run import Run, RunOptions
from tenfold_shared.scenes import (
    LLFFPoses,
    opencv_from_opengl,
    opengl_from_opencv,
    read_llff,
    spiral_path,
    tabletop_views,
    write_blender,
    write_image,
    write_llff,
)

TINY = DataConfig(sources=3, scenes=1, views=6, size=20, unseen=False)
RAYS = Rays(count=8, samples=6, judged_samples=6, inverse=False)


def trained(folder: Path, name: str = "run", **changes) -> Path:
    """A run of two steps on a tiny table; its folder."""
    values = {"data": TINY, "rays": RAYS, "steps": 2, "judge_every": 1, **changes}
    recipe = dataclasses.replace(load_recipe("tenfold_gnt", "tabletop-single-gnt", Recipe), **values)
    with Run("gnt", recipe, RunOptions(output=folder, name=name, device="cpu", quiet=True)) as run:
        run_recipe(run, recipe)
        return run.directory


@pytest.mark.parametrize("name", sorted(recipes("tenfold_gnt")))
def test_every_recipe_is_built_and_stepped(name: str, tmp_path: Path) -> None:
    """On one small table in place of its data: the networks at their full size, one step, judged."""
    recipe = load_recipe("tenfold_gnt", name, Recipe)
    rays = dataclasses.replace(
        recipe.rays, count=4, samples=10, judged_samples=10, importance=min(recipe.rays.importance, 4)
    )
    small = dataclasses.replace(recipe, data=TINY, rays=rays, steps=1, judge_every=1, judge_stride=4)
    with Run("gnt", small, RunOptions(output=tmp_path, name="run", device="cpu", quiet=True)) as run:
        before = create_model(small.network)
        model, result = run_recipe(run, small)
    assert np.isfinite(result.scores.psnr)
    assert result.history[-1][0] == 1
    assert model.state_dict().keys() == before.state_dict().keys()


@pytest.mark.parametrize(
    ("config", "features", "network"),
    [
        (NetworkConfig(depth=4), 8_877_056, 444_739),
        (NetworkConfig(depth=8), 8_877_056, 882_691),
        (NetworkConfig(depth=4, fine=True), 8_917_120, 444_739),
        (NetworkConfig(width=32, depth=2, features="small"), 69_936, 59_891),
        (NetworkConfig(name="ibrnet"), 8_877_056, 20_136),
    ],
)
def test_parameter_counts(config: NetworkConfig, features: int, network: int) -> None:
    """Those of the description."""
    model = create_model(config)
    assert parameter_count(model.features) == features
    assert parameter_count(model.coarse) == network


def test_volume_rendering_has_the_options_of_its_tokens() -> None:
    """The arm differs from GNT in the ray transformer alone, whatever the view transformer's options."""
    config = NetworkConfig(width=16, depth=3, features="small", position_every=1, double_projection=False)
    arms = [create_model(dataclasses.replace(config, name=name)).coarse for name in ("gnt", "volren")]
    mlps = [sorted(arm.position_mlps) for arm in arms]
    assert mlps == [["0", "1", "2"]] * 2
    assert not any(block.attention.double_projection for arm in arms for block in arm.view_blocks)


def test_what_is_judged_is_never_trained_on() -> None:
    """Scenes and poses for training, for choosing values and for the test are apart."""
    assert not set(UNSEEN["test"]) & set(UNSEEN["validation"])
    assert min(UNSEEN["validation"]) >= DataConfig().scenes
    assert len({0.0, *OFFSETS.values()}) == 3
    target = judged_targets(TINY)[0]
    poses = training_set(TINY).scenes[0].cameras.camera_to_world
    own = target.scene.cameras.camera_to_world[target.view]
    assert np.abs(poses - own).max(axis=(1, 2)).min() > 1e-3


@pytest.mark.parametrize("layout", ["blender", "llff"])
def test_a_capture_is_read_in_its_layout(layout: str, tmp_path: Path) -> None:
    """A folder that one writes is trained on as it is."""
    scene = tabletop_views(0, 16, 20)
    if layout == "blender":
        for split, views in (("train", range(12)), ("test", range(12, 16))):
            write_blender(tmp_path, scene.subset(list(views)), split)
    else:
        write_llff(tmp_path, scene)
    config = DataConfig(name="capture", root=tmp_path, sources=3, factor=1)
    train, test = capture(config)
    assert len(train) + len(test) == 16
    assert len(judged_targets(config)) == len(test)
    assert trained(tmp_path, data=config, judge_stride=8).is_dir()


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (DataConfig, {"sources": 1}, r"data\.sources"),
        (DataConfig, {"near": 3.0, "far": 2.0}, "near < far"),
        (DataConfig, {"specular": -0.1}, r"data\.specular take 0 or more"),
        (DataConfig, {"factor": -1}, r"data\.factor"),
        (DataConfig, {"scenes": 51}, "50 or fewer"),
        (Optimisation, {"decay_every": 0}, r"optimisation\.decay_every"),
        (Optimisation, {"network_rate": -1.0}, "network_rate"),
        (Recipe, {"network": NetworkConfig(fine=True)}, r"rays\.importance"),
        (NetworkConfig, {"width": 12}, "multiple of 8"),
        (NetworkConfig, {"dropout": 1.0}, "dropout"),
        (Rays, {"samples": 1}, r"rays\.samples takes 2"),
        (Rays, {"samples": 2, "importance": 3}, r"rays\.samples takes 3 or more with importance"),
        (Rays, {"judged_samples": 2, "importance": 3}, r"rays\.judged_samples takes 3"),
        (EvalConfig, {"checkpoint": Path("x"), "samples": 2, "importance": 3}, "--samples takes 3"),
        (RenderConfig, {"checkpoint": Path("x"), "samples": 2, "importance": 3}, "--samples takes 3"),
        (Rays, {"centre": 1.5}, "centre"),
        (Recipe, {"steps": 0}, "steps"),
        (RenderConfig, {"checkpoint": Path("x"), "path": "poses"}, "--poses"),
        (RenderConfig, {"checkpoint": Path("x"), "resize": 0.0}, "resize"),
        (RenderConfig, {"checkpoint": Path("x"), "elevation": 90.0}, "elevation"),
        (RenderConfig, {"checkpoint": Path("x"), "radius": 0.0}, "radius"),
        (RenderConfig, {"checkpoint": Path("x"), "importance": -1}, "importance"),
        (RenderConfig, {"checkpoint": Path("x"), "confident": 2.0}, "confident"),
    ],
)
def test_configurations_that_cannot_be(kind: type, values: dict, words: str) -> None:
    """Refused when they are read, by the option's name."""
    with pytest.raises(UserError, match=words):
        kind(**values)


def test_too_few_views_for_the_sources(tmp_path: Path) -> None:
    """More sources than the scene has views, and pictures too small for the features."""
    few = dataclasses.replace(TINY, sources=9)
    with pytest.raises(UserError, match=r"9 source views .* has 6 .* lower --data\.sources"):
        judged_targets(few)
    with pytest.raises(UserError, match="source views"):
        trained(tmp_path, data=few)
    assert not (tmp_path / "gnt" / "run").exists()  # refused before a step
    with pytest.raises(UserError, match="at least 5 pixels for these features, got 4x4"):
        trained(tmp_path, data=dataclasses.replace(TINY, size=4))


def test_scores_are_averaged_over_the_views_that_have_them() -> None:
    """A view without true depth does not spoil the mean of the others."""
    nan = float("nan")
    rows = [Scores(20.0, 0.5, 18.0, 15.0, nan, nan, nan), Scores(22.0, 0.7, 20.0, 17.0, 0.3, 0.5, 0.4)]
    mean = mean_scores(rows, ["a", "a"])
    assert mean.psnr == 21.0
    assert mean.depth_error == 0.3
    assert "correlation 0.50 (untrained" in mean.sentence()
    uneven = mean_scores([rows[0], rows[1], rows[1]], ["a", "b", "b"])  # every scene counts once
    assert uneven.psnr == 21.0
    assert uneven.depth_error == 0.3


def test_published_rows_are_of_their_own_metric() -> None:
    """A row of SSIM or LPIPS quotes no decibels; users' runs of the released file are the realistic target."""
    claims = load_claims("tenfold_gnt")
    for claim in claims.claims:
        if claim.scale == "paper" and claim.metric.name != "PSNR":
            assert "dB" not in claim.statement, claim.id
    assert claims["released-llff-psnr"].arms["gnt"].paper == 25.53
    assert "below GPNR .880" in claims["cross-llff-ssim-ibrnet"].statement


def test_renderings_that_are_no_numbers_are_no_score(tmp_path: Path) -> None:
    """They would be left out of the mean: the evaluation fails instead."""
    model = create_model(NetworkConfig(width=16, depth=1, features="small"))
    torch.nn.init.constant_(model.coarse.to_rgb.bias, float("nan"))
    about = {"network": {"width": 16, "depth": 1, "features": "small"}}
    save_weights(tmp_path / "w.safetensors", model.state_dict(), about)
    with pytest.raises(RunFailure, match=r"the rendering of view 0 of .* is not finite"):
        evaluate(EvalConfig(tmp_path / "w.safetensors", TINY, samples=4), RunOptions(output=tmp_path, device="cpu"))


def test_a_view_without_foreground_has_no_foreground_score() -> None:
    """An empty mask has no error, which is not 60 dB."""
    target = judged_targets(TINY)[0]
    views = target.views(3)
    picture = Picture(views.rgb, torch.ones(20, 20), torch.ones(20, 20), None)
    assert "foreground_psnr" in score_picture(picture, target, views)
    transparent = [np.concatenate([image[..., :3], np.zeros_like(image[..., :1])], -1) for image in target.scene.images]
    bare = target._replace(scene=dataclasses.replace(target.scene, images=transparent))
    assert "foreground_psnr" not in score_picture(picture, bare, views)


def test_fine_tuning_starts_from_a_checkpoint(tmp_path: Path) -> None:
    """Ours starts where it was; another network is refused."""
    first = trained(tmp_path, "first")
    still = {"feature_rate": 0.0, "network_rate": 0.0}
    recipe = load_recipe("tenfold_gnt", "tabletop-single-gnt", Recipe)
    second = trained(tmp_path, "second", init=first, optimisation=dataclasses.replace(recipe.optimisation, **still))
    one, two = (load_model(run)[0].state_dict() for run in (first, second))
    assert all(torch.equal(one[key], two[key]) for key in one)
    with pytest.raises(
        UserError, match=r"--init .* does not fit the recipe's network; missing: .* and \d+ more"
    ) as told:
        trained(tmp_path, "third", init=first, network=NetworkConfig(width=16, depth=4, features="small"))
    assert len(str(told.value)) < 2000
    single = dataclasses.replace(recipe.network, double_projection=False)
    with pytest.raises(UserError, match=r"needs --network\.double_projection true"):
        trained(tmp_path, "fourth", init=first, network=single)


@pytest.mark.parametrize("network", ["slak", {"kind": "x"}, {"width": 16, "features": "small"}])
def test_files_of_other_networks_are_refused(network: object, tmp_path: Path) -> None:
    """Another package's weights, or ours under a wrong name."""
    save_weights(tmp_path / "w.safetensors", {"a": torch.zeros(2)}, {"network": network})
    with pytest.raises(UserError, match=r"w\.safetensors does not (say|fit).*") as told:
        load_model(tmp_path / "w.safetensors")
    assert len(str(told.value)) < 1000


def test_rendering_is_resumed_by_tile(tmp_path: Path) -> None:
    """Pictures, depth, points and video of a circle; a frame and a tile that are there are not rendered again."""
    run = trained(tmp_path)
    config = RenderConfig(run, TINY, path="circle", frames=3, samples=6, tile_rows=7, confident=0.0)
    options = RunOptions(output=tmp_path, name="film", device="cpu", quiet=True)
    render(config, options)
    folder = tmp_path / "gnt" / "film"
    assert len(list((folder / "rgb").glob("*.png"))) == len(list((folder / "depth").glob("*.png"))) == 3
    assert (folder / "video.gif").stat().st_size > 0
    header = (folder / "points.ply").read_bytes().split(b"end_header\n")
    assert b"element vertex 1200" in header[0]
    assert len(b"end_header\n".join(header[1:])) == 1200 * 15
    with pytest.raises(UserError, match="--resume"):
        render(config, options)
    whole = dict(np.load(folder / "frames" / "0001.npz"))
    (folder / "frames" / "0001.npz").unlink()
    marked = {key: np.full_like(value[:7].reshape(140, *value.shape[2:]), 3) for key, value in whole.items()}
    np.savez(folder / "tiles" / "0001-00000.npz", **marked)
    again = dataclasses.replace(options, resume=True)
    render(config, again)
    resumed = np.load(folder / "frames" / "0001.npz")
    assert (resumed["rgb"][:7] == 3).all()
    np.testing.assert_array_equal(resumed["rgb"][7:], whole["rgb"][7:])
    with pytest.raises(UserError, match="differs"):
        render(dataclasses.replace(config, samples=7), again)
    with pytest.raises(UserError, match="or the precision given"):
        render(config, dataclasses.replace(again, precision="bf16"))
    file = run / "checkpoints" / "last.safetensors"
    state, about = load_weights(file)
    save_weights(file, {name: 2 * tensor for name, tensor in state.items()}, about)
    with pytest.raises(UserError, match="the weights"):
        render(config, again)


def test_the_authors_checkpoint_is_rendered(tmp_path: Path) -> None:
    """A file of the released layout, along given poses; poses that are none are refused."""
    model = create_model(NetworkConfig(width=16, depth=1))
    file = tmp_path / "model_000100.pth"
    save_official_checkpoint(file, model.coarse, model.features)
    poses = tmp_path / "poses.npy"
    np.save(poses, tabletop_views(0, 6, 20).cameras.camera_to_world[:1])
    options = RunOptions(output=tmp_path, name="given", device="cpu", quiet=True)
    render(RenderConfig(file, TINY, path="poses", poses=poses, samples=4), options)
    assert (tmp_path / "gnt" / "given" / "rgb" / "0000.png").is_file()
    np.save(poses, np.zeros((3, 3)))
    with pytest.raises(UserError, match="4, 4"):
        render(RenderConfig(file, TINY, path="poses", poses=poses), dataclasses.replace(options, name="other"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (np.zeros((3, 3)), "4, 4"),
        (np.zeros((0, 4, 4)), "at least one"),
        (np.stack([np.eye(4), 2 * np.eye(4)]), "view 001 has a pose whose .* not a rotation"),
        (np.full((1, 4, 4), np.nan), "not finite"),
        (np.full((1, 4, 4), "a"), "of numbers"),
        ({"poses": np.eye(4)[None]}, "of numbers"),
    ],
)
def test_poses_that_are_none(content: object, words: str, tmp_path: Path) -> None:
    """The file is named, and what is wrong with it."""
    file = tmp_path / "poses.npy"
    with file.open("wb") as opened:
        np.savez(opened, **content) if isinstance(content, dict) else np.save(opened, content)
    with pytest.raises(UserError, match=rf"poses\.npy.*{words}"):
        read_poses(file)


def test_the_spiral_is_that_of_the_captures_bounds(tmp_path: Path) -> None:
    """Not of those that the sampler is given, which are wider; the video's far depth is 1.5 times the capture's."""
    folder = tmp_path / "nerf_llff_data" / "fern"
    write_llff(folder, tabletop_views(0, 16, 20))
    data = DataConfig(name="llff_test", root=tmp_path, scene="fern", sources=3, factor=1)
    frames = path_frames(RenderConfig(Path("x"), data, path="spiral", frames=5))
    scene = read_llff(folder, 1)
    bounds, cameras = np.array(scene.cameras.bounds), scene.cameras
    poses = LLFFPoses(opengl_from_opencv(cameras.camera_to_world), np.tile(bounds, (16, 1)), np.ones(16))
    expected = opencv_from_opengl(spiral_path(poses, 5))
    np.testing.assert_allclose([frame.camera[18:].view(4, 4).numpy() for frame in frames], expected, atol=1e-5)
    np.testing.assert_allclose([frames[0].near, frames[0].far], bounds * [0.9, 1.5], rtol=1e-6)
    assert frames[0].pool.cameras.names == tuple(np.delete(cameras.names, poses.middle_view))  # judged views among them
    assert path_frames(RenderConfig(Path("x"), dataclasses.replace(data, sources=15), path="spiral", frames=1))
    with pytest.raises(UserError, match="16 source views were asked for, and fern has 15"):
        path_frames(RenderConfig(Path("x"), dataclasses.replace(data, sources=16), path="spiral", frames=1))
    cross = RenderConfig(Path("x"), dataclasses.replace(data, name="cross-scene"), path="spiral", frames=5)
    assert torch.equal(path_frames(cross)[3].camera, frames[3].camera)
    capture_data = dataclasses.replace(data, name="capture", root=folder)
    own = path_frames(RenderConfig(Path("x"), capture_data, path="spiral", frames=1))
    assert len(own[0].pool) == 15


class SecondOfTwo(Run):
    """A run as the second of two processes has it."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.rank, self.world, self.is_main = 1, 2, False


def test_a_second_process_renders_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the folder that the first has begun; folders and sizes that cannot be are refused before."""
    run = trained(tmp_path)
    config = RenderConfig(run, TINY, path="circle", frames=2, samples=4, video="none")
    options = RunOptions(output=tmp_path, name="shared", device="cpu", quiet=True)
    claim_folder(tmp_path / "gnt" / "shared", config, "fp32", resume=False)
    with monkeypatch.context() as patched:
        patched.setattr("tenfold_gnt.video.Run", SecondOfTwo)
        render(config, options)
    assert [path.name for path in (tmp_path / "gnt" / "shared" / "frames").iterdir()] == ["0001.npz"]
    with pytest.raises(UserError, match="choose another --output"):
        render(config, dataclasses.replace(options, output=run / "config.yaml"))
    with pytest.raises(UserError, match=r"--resize 0\.01 leaves no pixel of 20x20"):
        render(dataclasses.replace(config, resize=0.01), dataclasses.replace(options, name="none"))


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_videos(suffix: str, tmp_path: Path) -> None:
    """Frames of an odd size make a file in either format."""
    frames = [np.full((21, 23, 3), value, dtype=np.uint8) for value in (0, 120, 240)]
    write_video(tmp_path / f"v.{suffix}", frames, 12)
    assert (tmp_path / f"v.{suffix}").stat().st_size > 100


def test_points_file(tmp_path: Path) -> None:
    """Positions and colours, one after the other."""
    write_ply(tmp_path / "p.ply", np.array([[1.0, 2.0, 3.0]]), np.array([[4, 5, 6]], dtype=np.uint8))
    body = (tmp_path / "p.ply").read_bytes().split(b"end_header\n", 1)[1]
    assert np.frombuffer(body[:12], "<f4").tolist() == [1.0, 2.0, 3.0]
    assert list(body[12:]) == [4, 5, 6]


def test_evaluation_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the protocol that the numbers are of."""
    run = trained(tmp_path)
    capsys.readouterr()
    evaluate(EvalConfig(run, TINY, samples=6, stride=2), RunOptions(output=tmp_path, device="cpu"))
    told = json.loads(capsys.readouterr().out)
    assert told["protocol"] == "official (stride 2)"
    assert told["judged_views"] == 3
    assert (told["split"], told["importance"]) == ("test", 0)
    assert np.isfinite(told["psnr"])
    assert 5 < told["mean_psnr"] < 30  # the floors and what depth is worth without training stand beside the scores
    before = untrained_model(NetworkConfig(**told["network"]), 0)
    save_weights(tmp_path / "before.safetensors", before.state_dict(), {"network": told["network"], "inverse": False})
    evaluate(EvalConfig(tmp_path / "before.safetensors", TINY, samples=6, stride=2), RunOptions(device="cpu"))
    start = json.loads(capsys.readouterr().out)
    assert told["untrained_depth_error"] == start["depth_error"] == start["untrained_depth_error"]
    assert told["untrained_depth_correlation"] == start["depth_correlation"]
    assert told["depth_error"] != start["depth_error"]
    assert dataclasses.replace(TINY, judge="validation").judged_split == "validation"
    cross = DataConfig(name="cross-scene", judged="nerf_synthetic")
    assert (cross.judged_name, cross.judged_split) == ("nerf_synthetic", "every 8th view of val")
    assert DataConfig(name="llff_test", scene="fern").judged_split == "held-out views"


def test_the_mean_view_is_a_floor(tmp_path: Path) -> None:
    """Better at the true depth than on a plane; an arm of that name reads it from what another run measured."""
    target = judged_targets(TINY)[0]
    views = target.views(3)
    errors = [
        float((mean_picture(views, 2, depth) - views.rgb[::2, ::2]).square().mean())
        for depth in (depth_of_target(target, 2), None)
    ]
    assert errors[0] < errors[1]
    claim = load_claims("tenfold_gnt")["tables-unseen"]
    small = {"steps": 1, "judge_every": 1, "data.size": 20, "data.views": 7, "rays.count": 8, "rays.judged_samples": 6}
    arms = [dataclasses.replace(claim.arms[name], options=small) for name in ("gnt", "mean")]
    options = RunOptions(output=tmp_path, device="cpu", quiet=True)
    learned, floor = (measure(claim, arm, 0, options=options, folder=tmp_path) for arm in arms)
    assert floor.value == learned.extras["scores"]["mean_psnr"]
    assert learned.extras["run"] == floor.extras["run"]


@pytest.mark.parametrize("name", ["nmr", "deepvoxels"])
def test_objects_are_judged_on_held_out_views(name: str, tmp_path: Path) -> None:
    """The extra sets of objects, in their layouts; sources are chosen by the angle seen from the object."""
    scene = tabletop_views(0, 9, 20)
    folders = {"nmr": ["nmr/chair"], "deepvoxels": [f"deepvoxels/{split}/chair" for split in ("train", "test")]}[name]
    matrices = {f"world_mat_{i}": pose for i, pose in enumerate(np.linalg.inv(scene.cameras.camera_to_world))}
    for folder in (tmp_path / part for part in folders):
        for view in range(9):
            write_image(folder / {"nmr": "image"}.get(name, "rgb") / f"{view}.png", scene.rgb(view))
            (folder / "pose").mkdir(exist_ok=True)
            np.savetxt(folder / "pose" / f"{view}.txt", scene.cameras.camera_to_world[view])
        (folder / "intrinsics.txt").write_text("30 10 10\n0 0 0\n1\n1\n20 20\n")
        np.savez(folder / "cameras.npz", **matrices, **{f"camera_mat_{i}": np.eye(4) for i in range(9)})
    config = DataConfig(name=name, root=tmp_path, scene="chair", sources=3)
    targets, training = judged_targets(config), training_set(config)
    assert len(targets) == 2  # every 8th of nine
    assert len(training) == (7 if name == "nmr" else 9)
    assert {target.method for target in targets} == {training.rule.method} == {"vector"}
    assert trained(tmp_path, data=config, judge_stride=8).is_dir()


def test_a_second_network_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint with one is judged and rendered with an importance pass or not at all; --compile is of both."""
    network = NetworkConfig(name="nerf", fine=True)
    run = trained(tmp_path, network=network, rays=dataclasses.replace(RAYS, importance=4))
    options = RunOptions(output=tmp_path, device="cpu", quiet=True)
    compiled: list[torch.nn.Module] = []

    def record(network: torch.nn.Module) -> None:
        compiled.append(network)

    monkeypatch.setattr(torch.nn.Module, "compile", record)
    evaluate(EvalConfig(run, TINY, samples=4, importance=2), dataclasses.replace(options, compile=True))
    render(RenderConfig(run, TINY, samples=4, importance=2, video="none"), dataclasses.replace(options, compile=True))
    assert len(compiled) == 4
    with pytest.raises(UserError, match="add --importance"):
        evaluate(EvalConfig(run, TINY, samples=6), options)
    with pytest.raises(UserError, match="add --importance"):
        render(RenderConfig(run, TINY, samples=6), options)


def test_lpips_is_measured_from_the_kept_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are not needed for training; without them the sentence says where they belong."""
    known = load_claims("tenfold_gnt").select(["mini-one-table"], None)[0]
    small = {"steps": 2, "judge_every": 2, "data.size": 20, "data.views": 6, "rays.count": 8, "rays.judged_samples": 6}
    arm = dataclasses.replace(known.arms["gnt"], options={**known.arms["gnt"].options, **small})
    claim = dataclasses.replace(known, metric=Metric("LPIPS", higher_is_better=False))
    options = RunOptions(output=tmp_path, device="cpu", quiet=True)

    def offline(*_, **__) -> torch.Tensor:
        raise OSError("no network")

    library = SimpleNamespace(learned_perceptual_image_patch_similarity=offline)
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", library)
    with pytest.raises(UserError, match=r"vgg16-397923af\.pth"):
        measure(claim, arm, 0, options=options, folder=tmp_path)
    library.learned_perceptual_image_patch_similarity = lambda *_, normalize, **__: torch.tensor(0.5 - normalize / 4)
    measured = measure(claim, arm, 0, options=options, folder=tmp_path)
    assert measured.value == 0.5
    assert measured.extras["scores"]["lpips"] == 0.25
    assert len(measured.extras["history"]) == 1
