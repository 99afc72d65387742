"""The released implementation's numbers: every `*.npz` of `$TENFOLD_PARITY_DIR` (default: the selection here)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tenfold_gnt.baselines.volume import composite
from tenfold_gnt.cameras import pixel_grid, pose_of, rays_through, resize_camera, resize_nearest
from tenfold_gnt.collections import inverse_depth_planes, realestate_camera, spaces_camera
from tenfold_gnt.compat import (
    load_official_state,
    official_block_key,
    official_block_state,
    official_feature_key,
    official_feature_state,
    official_network_key,
    official_network_state,
)
from tenfold_gnt.encoding import encode
from tenfold_gnt.features import FeatureMaps, ResUNet
from tenfold_gnt.metrics import mse, psnr, ssim
from tenfold_gnt.network import GNT, depth_of
from tenfold_gnt.objective import Optimisation, RayBatch, build_optimiser, train_step
from tenfold_gnt.projection import ViewSamples, project, sample_views, source_views
from tenfold_gnt.ray_transformer import RayAttention, RayBlock
from tenfold_gnt.render import Model, Sampling, Views, render_rays
from tenfold_gnt.sampling import depth_samples, importance_samples, points_at
from tenfold_gnt.view_transformer import SubtractionAttention, ViewBlock
from tenfold_gnt.views import crop, flip, nearest_views, rectify, views_by_direction
from tenfold_shared.parity import Fixture, check_parity, parity_files
from tenfold_shared.scenes import normalise_llff, spherical_path, spiral_path
from tenfold_shared.scenes.blender import blender_cameras
from tenfold_shared.scenes.llff import llff_cameras


def close(actual, expected, tolerance: float, what: str = "") -> None:
    if isinstance(expected, torch.Tensor):
        expected = expected.numpy()
    if isinstance(actual, torch.Tensor):
        actual = actual.detach().numpy()
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance, err_msg=what)


def formula_weights(state: dict[str, torch.Tensor], words: str) -> dict[str, torch.Tensor]:
    """The weights that a sentence like "formula seed 9" stands for, in the order of the released modules."""
    seed = int(words.rsplit(maxsplit=1)[-1])
    weights = {}
    for index, (key, value) in enumerate(state.items()):
        draw = np.random.RandomState(seed * 1000 + index).standard_normal(value.numel()).reshape(tuple(value.shape))
        if value.ndim == 1:
            draw = 0.1 * draw + (1 if key.endswith("weight") else 0)
        else:
            draw = draw * np.sqrt(2 / (value.numel() / value.shape[0]))
        weights[key] = torch.from_numpy(draw)
    return weights


def check_gradients(fixture: Fixture, named: dict[str, torch.Tensor | None], tolerance: float) -> None:
    """Gradients (`grad/<name>`) and their norms (`grad/norm.<name>`) under released names."""
    for key, expected in fixture.under("grad/").items():
        whole = key in named  # the network has a module called norm, too
        name = key if whole else key.removeprefix("norm.")
        assert name in named, f"the file has a gradient for {name}, which we do not know"
        gradient = named[name]
        assert gradient is not None, f"no gradient reaches {name}"
        close(gradient if whole else gradient.norm(), expected, tolerance, key)


def gradients_of(module: nn.Module, rename) -> dict[str, torch.Tensor | None]:
    return {rename(key): p.grad for key, p in module.named_parameters()}


def posenc(f: Fixture) -> None:
    close(encode(f["in/x"]), f["out/y"], 1e-12)


def leaves(f: Fixture, *names: str) -> list[torch.Tensor]:
    return [f[f"in/{name}"].requires_grad_() for name in names]


def view_attention(f: Fixture) -> None:
    attention = SubtractionAttention(f.meta["dim"]).eval()
    prefix = "attention."
    names = {official_block_key(prefix + key).removeprefix("attn."): key for key in attention.state_dict()}
    attention.load_state_dict({names[key]: value for key, value in f.under("state/").items()})
    q, k, pos = leaves(f, "q", "k", "pos")
    y = attention(q, k, pos, f["in/mask"]).values
    close(y, f["out/y"], 1e-10)
    close(attention(q, k, pos).values, f["out/y_nomask"], 1e-10)
    (y * f["in/cot"]).sum().backward()
    found = gradients_of(attention, lambda key: official_block_key(prefix + key).removeprefix("attn."))
    check_gradients(f, found | {"in.q": q.grad, "in.k": k.grad, "in.pos": pos.grad}, 1e-10)


def view_transformer(f: Fixture) -> None:
    block = ViewBlock(f.meta["dim"], SubtractionAttention(f.meta["dim"]), hidden=f.meta["ff_hid"]).eval()
    load_official_state(block, f.under("state/"))
    assert list(official_block_state(block)) == list(f.under("state/"))
    q, k, pos = leaves(f, "q", "k", "pos")
    y = block(q, k, pos, f["in/mask"]).values
    close(y, f["out/y"], 1e-10)
    close(block(q, k, pos).values, f["out/y_nomask"], 1e-10)
    (y * f["in/cot"]).sum().backward()
    found = gradients_of(block, official_block_key) | {"in.q": q.grad, "in.k": k.grad, "in.pos": pos.grad}
    check_gradients(f, found, 1e-10)


def ray_transformer(f: Fixture) -> None:
    cfg = f.meta
    attention = RayAttention(cfg["dim"], heads=cfg["heads"], mode=cfg["mode"], position_width=cfg["pos_dim"])
    block = RayBlock(cfg["dim"], attention).eval()
    load_official_state(block, f.under("state/"))
    inputs = dict(zip(("x", "pos"), leaves(f, *(["x", "pos"] if "in/pos" in f else ["x"])), strict=False))
    rays = block(*inputs.values(), return_weights=True)
    close(rays.tokens, f["out/y"], 1e-10)
    close(rays.weights, f["out/attn"], 1e-10)
    ((rays.tokens * f["in/cot"]).sum() + (rays.weights * f["in/cot_attn"]).sum()).backward()
    found = {f"in.{name}": value.grad for name, value in inputs.items()}
    check_gradients(f, gradients_of(block, official_block_key) | found, 1e-10)


def network_for(cfg: dict, state: dict[str, torch.Tensor], weights: str = "state") -> GNT:
    network = GNT(cfg["netwidth"], cfg["trans_depth"], cfg["in_feat_ch"]).eval()
    if state:
        assert list(official_network_state(network)) == list(state)
    load_official_state(network, state or formula_weights(official_network_state(network), weights))
    return network


def gnt(f: Fixture) -> None:
    network = network_for(f.meta, f.under("state/"), f.meta["weights"])
    inputs = dict(zip(names := ("rgb_feat", "ray_diff", "pts", "ray_d"), leaves(f, *names), strict=True))
    samples = ViewSamples(inputs["rgb_feat"], inputs["ray_diff"], f["in/mask"])
    rays = network(samples, inputs["pts"], inputs["ray_d"], return_weights=f.meta["ret_alpha"])
    y = torch.cat([rays.rgb, rays.weights], -1) if f.meta["ret_alpha"] else rays.rgb
    close(y, f["out/y"], 1e-9)
    (y * f["in/cot"]).sum().backward()
    found = {f"in.{name}": value.grad for name, value in inputs.items()}
    check_gradients(f, gradients_of(network, official_network_key) | found, 1e-9)


def feature_net(f: Fixture) -> None:
    cfg = f.meta
    network = ResUNet(cfg["coarse_out_ch"], cfg["fine_out_ch"], single_net=cfg["single_net"])
    state = f.under("state/") or formula_weights(official_feature_state(network), cfg["weights"])
    load_official_state(network, state)
    if "n_params" in cfg:
        assert sum(p.numel() for p in network.parameters()) == cfg["n_params"]
    loss = torch.zeros(())
    for name in f.under("in/x"):
        maps = network(f[f"in/x{name}"])
        for pass_, map_ in zip(("coarse", "fine"), maps, strict=True):
            if f"out/{pass_}{name}" in f:
                close(map_, f[f"out/{pass_}{name}"], 1e-9)
        if f"in/cot{name}" in f:
            for pass_map in maps[: 1 if cfg["single_net"] else 2]:
                loss = loss + (pass_map * f[f"in/cot{name}"]).sum()
    loss.backward()
    # Biases ahead of an instance norm have no effect: their gradients are rounding noise in both implementations, on
    # the scale of the others.
    found = gradients_of(network, official_feature_key)
    largest = max(float(g.norm()) for g in found.values() if g is not None)
    for key, expected in f.under("grad/").items():
        gradient = found[key.removeprefix("norm.")]
        actual = gradient.norm() if key.startswith("norm.") else gradient
        np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-8 * largest * 1e-3, err_msg=key)


def projector(f: Fixture) -> None:
    sources = source_views(f["in/src_rgbs"], f["in/src_cameras"])
    samples = sample_views(f["in/pts"], pose_of(f["in/camera"])[:3, 3], sources, f["in/featmaps"])
    for name, value in samples._asdict().items():
        close(value, f[f"out/{name}"], 1e-10, name)
    pixels, in_front = project(f["in/pts"], sources.projection)
    close(pixels, f["out/pixel"], 1e-10)
    assert (in_front == f["out/in_front"]).all()


def depth_sampling(f: Fixture) -> None:
    origins, directions, bounds = f["in/ray_o"], f["in/ray_d"], f["in/depth_range"].ravel()
    samples, count = f.meta["n_samples"], f.meta["n_importance"]
    for suffix in f.under("out/det_z_"):
        inverse = suffix.endswith("1")
        arguments = (float(bounds[0]), float(bounds[1]), len(origins), samples)
        depths = depth_samples(*arguments, inverse=inverse, like=origins)
        close(depths, f[f"out/det_z_{suffix}"], 1e-10)
        close(points_at(origins, directions, depths), f[f"out/det_pts_{suffix}"], 1e-10)
        jittered = depth_samples(*arguments, inverse=inverse, jitter=f[f"in/t_rand_{suffix}"], like=origins)
        close(jittered, f[f"out/rand_z_{suffix}"], 1e-10)
        weights = f[f"in/weights_{suffix}"]
        before = weights.clone()
        start = f[f"out/det_z_{suffix}"]
        fine = importance_samples(start, weights, count, inverse=inverse)
        close(fine, f[f"out/fine_det_z_{suffix}"], 1e-10)
        close(points_at(origins, directions, fine), f[f"out/fine_det_pts_{suffix}"], 1e-10)
        random = importance_samples(start, weights, count, inverse=inverse, uniform=f[f"in/u_{suffix}"])
        close(random, f[f"out/fine_rand_z_{suffix}"], 1e-10)
        assert torch.equal(weights, before)


def volume_rendering(f: Fixture) -> None:
    for suffix in f.under("out/rgb_"):
        rays = composite(f["in/raw"][..., :3], f["in/raw"][..., 3], f["in/mask"], white=suffix.endswith("1"))
        close(rays.rgb, f[f"out/rgb_{suffix}"], 1e-12)
        close(rays.weights, f[f"out/weights_{suffix}"], 1e-12)
        close(rays.alpha, f[f"out/alpha_{suffix}"], 1e-12)
        close(depth_of(rays.weights, f["in/z_vals"]), f[f"out/depth_{suffix}"], 1e-12)
        assert torch.equal(rays.valid, f[f"out/mask_{suffix}"])


def render(f: Fixture) -> None:
    cfg = f.meta
    assert cfg["det"], "only deterministic depths are recorded"
    coarse = network_for(cfg, f.under("state/coarse."))
    fine = network_for(cfg, f.under("state/fine.")) if f.under("state/fine.") else None
    model = Model(nn.Identity(), coarse, fine)
    maps = FeatureMaps(f["in/featmaps_coarse"], f["in/featmaps_fine"])
    views = Views(source_views(f["in/src_rgbs"], f["in/src_cameras"]), maps)
    origins, directions = rays_through(f["in/camera"], f["in/pixels_xy"])
    close(origins, f["in/ray_o"], 1e-10)
    close(directions, f["in/ray_d"], 1e-10)
    near, far = f["in/depth_range"].ravel().tolist()
    sampling = Sampling(near, far, cfg["n_samples"], cfg["n_importance"], cfg["inv_uniform"])
    levels = render_rays(model, views, origins, directions, sampling)
    for name, level in zip(("coarse", "fine"), levels, strict=False):
        close(level.rgb, f[f"out/{name}_rgb"], 1e-8)
        close(level.weights, f[f"out/{name}_weights"], 1e-8)
        close(level.depth, f[f"out/{name}_depth"], 1e-8)
    assert len(levels) == 1 + ("out/fine_rgb" in f)


def train_steps(f: Fixture) -> None:
    cfg = f.meta
    state = f.under("state/")
    channels = state["rgbfeat_fc.0.weight"].shape[1] - 3
    features = ResUNet(channels)
    load_official_state(features, formula_weights(official_feature_state(features), cfg["feature_weights"]))
    network = network_for({**cfg, "in_feat_ch": channels}, state)
    model = Model(features, network).eval()  # dropout is off in the recording
    settings = Optimisation(cfg["lr_feature"], cfg["lr_gnt"], cfg["step_size"], cfg["gamma"])
    optimiser, scheduler = build_optimiser(model, settings)
    sampling = Sampling(*cfg["near_far"], cfg["n_samples"], cfg["n_importance"], cfg["inv_uniform"])
    for step in range(cfg["steps"]):
        rays = rays_through(f["in/camera"], f["in/pixels_xy"][step])
        batch = RayBatch(*rays, f["in/rgb"][step], f["in/src_rgbs"], f["in/src_cameras"])
        result = train_step(model, batch, sampling, optimiser, scheduler, jitter=False)
        close(result.loss, f["out/loss"][step], 1e-9)
        if step == 0:
            named = gradients_of(features, lambda key: f"feature.{official_feature_key(key)}")
            named |= gradients_of(network, lambda key: f"gnt.{official_network_key(key)}")
            check_gradients(f, named, 1e-9)
        close(torch.tensor([group["lr"] for group in optimiser.param_groups]), f["out/lr_after"][step], 1e-12)
    for key, value in f.under("out/gnt.").items():
        close(official_network_state(network)[key], value, 1e-7, key)
    found = official_feature_state(features)
    for key, value in f.under("out/feature.").items():
        close(found[key], value, 1e-7, key)
    for key, value in f.under("out/feature_sum.").items():
        close(found[key].sum(), value, 1e-7 * found[key].numel() ** 0.5, key)


def rays(f: Fixture) -> None:
    camera, rgb, cfg = f["in/camera"], f["in/rgb"], f.meta

    def check(camera: torch.Tensor, stride: int, suffix: str) -> None:
        height, width = (int(x) for x in camera[:2])
        origins, directions = rays_through(camera, pixel_grid(height, width, stride))
        close(origins, f[f"out/o{suffix}"], 1e-5)
        close(directions, f[f"out/d{suffix}"], 1e-5)

    check(camera, cfg["render_stride"], "")
    resized = resize_camera(camera, cfg["resize_factor"])
    height, width = f["out/HW_resized"].tolist()
    assert resized[:2].tolist() == [height, width]
    expected = len(f["out/o_resized"])
    stride = 1 if expected == height * width else cfg["render_stride"]
    check(resized, stride, "_resized")
    colours = resize_nearest(rgb, height, width)[::stride, ::stride].reshape(-1, 3)
    close(colours, f["out/rgb_resized"], 1e-5)


def llff(f: Fixture) -> None:
    cfg = f.meta
    height, width = (side // cfg["factor"] for side in cfg["full_hw"])
    variants = {"_norecenter": {"recentre": False}, "_nobd": {"bound_factor": None}, "": {}}
    for key in f.under("out/poses"):
        poses = normalise_llff(f["in/poses_bounds"].numpy(), cfg["factor"], spherify=cfg["spherify"], **variants[key])
        close(poses.camera_to_world[:, :3], f[f"out/poses{key}"][..., :4], 2e-5)
        close(poses.bounds, f[f"out/bds{key}"], 2e-5)
        assert poses.middle_view == int(f[f"out/i_test{key}"])
        cameras = llff_cameras(poses, height, width)
        close(cameras.camera_to_world, f[f"out/c2w{key}"], 2e-5)
        close(cameras.intrinsics, f[f"out/K{key}"][:, :3, :3], 2e-5)
        expected = f[f"out/render_poses{key}"]
        path = spherical_path(poses, len(expected)) if cfg["spherify"] else spiral_path(poses, len(expected))
        close(path[:, :3], expected[..., :4], 2e-5)
        close(expected[0, :, 4], torch.tensor([height, width, poses.focal[0]]), 2e-5)


def blender_poses(f: Fixture) -> None:
    cameras = blender_cameras(f.meta["transforms"], f.meta["h"], f.meta["w"])
    close(cameras.camera_to_world, f["out/c2w"], 1e-10)
    close(cameras.intrinsics, f["out/K"][:, :3, :3], 1e-10)


def views(f: Fixture) -> None:
    cfg = f.meta
    reference, target = f["in/ref"].numpy(), f["in/tar"].numpy()
    for name in f.under("out/ids_"):
        method, count, index = name.split("_")
        number = int(index) if int(index) >= 0 else None
        pose = target if number is None else reference[number]
        centre = np.array(cfg["scene_center"])
        found = nearest_views(pose, reference, int(count), method, target_index=number, scene_centre=centre)
        assert found.tolist() == f[f"out/ids_{name}"].tolist(), name
    (height, width), (row, column) = cfg["crop"], cfg["crop_center"]
    window = (row - height // 2, column - width // 2, height, width)
    close(crop(f["in/rgb"], f["in/camera"], window)[0], f["out/crop_rgb"], 1e-10)
    close(crop(f["in/rgb"], f["in/camera"], window)[1], f["out/crop_camera"], 1e-10)
    sources = crop(f["in/src_rgbs"], f["in/src_cameras"], window)
    close(sources[0], f["out/crop_src"], 1e-10)
    close(sources[1], f["out/crop_src_cameras"], 1e-10)
    rgb, camera = flip(f["in/rgb"], f["in/camera"])
    close(rgb, f["out/flip_rgb"], 1e-10)
    close(camera, f["out/flip_camera"], 1e-10)
    images, cameras = flip(f["in/src_rgbs"], f["in/src_cameras"])
    close(images[0], f["out/flip_src0"], 1e-10)
    close(cameras, f["out/flip_src_cameras"], 1e-10)
    close(rectify(target, f["in/rect_src"].numpy()), f["out/rectified"], 1e-10)


def metrics(f: Fixture) -> None:
    a, b, mask = f["in/a"], f["in/b"], f["in/mask"]
    close(mse(a, b), f["out/mse"], 1e-10)
    close(psnr(a, b), f["out/psnr"], 1e-10)
    close(mse(a, b, mask), f["out/mse_masked"], 1e-10)
    close(psnr(a, b, mask), f["out/psnr_masked"], 1e-10)
    close(psnr(a, a), f["out/psnr_identical"], 1e-10)
    close(ssim(a, b), f["out/ssim"], 1e-6)
    close(ssim(a, a), f["out/ssim_self"], 1e-6)


def realestate_spaces(f: Fixture) -> None:
    for key in f.under("out/re10k_K_"):
        height, width = (int(x) for x in key.split("x"))
        matrix, pose = realestate_camera(f["in/re10k_entry"].numpy(), height, width)
        close(matrix, f[f"out/re10k_K_{key}"], 1e-10)
        close(pose, f["out/re10k_c2w"], 1e-10)
    pairs = [spaces_camera(view) for view in f.meta["spaces_views"]]
    close(np.stack([matrix for matrix, _ in pairs]), f["out/spaces_K"], 1e-10)
    close(np.stack([pose for _, pose in pairs]), f["out/spaces_c2w"], 1e-10)
    order = views_by_direction(f["in/query"].numpy(), f["in/poses"].numpy())
    assert order.tolist() == f["out/angle_order"].tolist()
    planes = f["out/inv_depths"]
    close(inverse_depth_planes(float(planes[-1]), float(planes[0]), len(planes)), planes, 1e-10)


CHECKS = {
    check.__name__: check
    for check in (
        posenc, view_attention, view_transformer, ray_transformer, gnt, feature_net, projector, depth_sampling,
        volume_rendering, render, train_steps, rays, blender_poses, views, metrics, realestate_spaces,
    )
} | {"llff_poses": llff, "llff_spherify": llff}  # fmt: skip


@pytest.mark.usefixtures("double")
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("path", parity_files(__file__), ids=lambda path: path.stem)
def test_parity(path: Path) -> None:
    check_parity(path, CHECKS)
