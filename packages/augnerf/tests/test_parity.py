"""Numbers of the authors' released implementation: every .npz of TENFOLD_PARITY_DIR, by kind."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tenfold_augnerf import cameras, corruptions, metrics
from tenfold_augnerf.attack import Step, maximise, steps_of
from tenfold_augnerf.encoding import encode, encoded_size
from tenfold_augnerf.fields import NeRF
from tenfold_augnerf.geometry import density_grid
from tenfold_augnerf.objective import Adversary, Batch, Objective, accumulate
from tenfold_augnerf.perturbation import Geometry
from tenfold_augnerf.renderer import RELEASED, RaySampling, Renderer, Rendering, criterion
from tenfold_augnerf.sampling import importance, stratified
from tenfold_augnerf.schedules import learning_rate
from tenfold_augnerf.weights import WeightPerturbation
from tenfold_shared.parity import Fixture, check_parity, parity_files
from tenfold_shared.scenes import normalise_llff, spherical_path, spiral_path


def close(actual: Any, expected: torch.Tensor, absolute: float = 1e-9, relative: float = 1e-7) -> None:
    actual = torch.as_tensor(actual)
    torch.testing.assert_close(
        actual.detach().reshape(expected.shape).to(expected.dtype), expected, atol=absolute, rtol=relative
    )


def check_gradients(case: Fixture, parameters: Mapping[str, torch.Tensor], prefix: str = "grad/") -> None:
    """Those stored, and none on parameters that the reference gave none."""
    for name, parameter in parameters.items():
        if f"{prefix}{name}" in case:
            assert parameter.grad is not None, f"{name} has no gradient"
            close(parameter.grad, case[f"{prefix}{name}"])
        elif case.kind in ("adv", "net_clean"):
            assert parameter.grad is None or not parameter.grad.any(), f"{name} has a gradient"


def embed(case: Fixture) -> None:
    x, octaves = case["in/x"], case.meta["multires"]
    close(encode(x, octaves), case["out/enc"])
    close(encode(x, 0), case["out/identity"])
    assert encoded_size(case.meta["input_dim"], octaves) == int(case["out/dim"])


def field_of(cfg: Mapping[str, Any]) -> NeRF:
    return NeRF(
        cfg.get("depth", cfg.get("netdepth", 8)),
        cfg.get("width", cfg.get("netwidth", 256)),
        cfg.get("multires", 10),
        cfg.get("multires_views", 4),
        viewdirs=cfg["viewdirs"] if isinstance(cfg.get("viewdirs"), bool) else True,
        use_embed=cfg.get("use_embed", True),
        conv_embed=cfg.get("conv_embed", False),
        skips=cfg.get("skips", [4]),
    ).double()


def mlp(case: Fixture) -> None:
    field = field_of(case.meta)
    field.load_state_dict(case.under("state/"))
    points, views = case["in/pts"].requires_grad_(), case["in/dirs"].requires_grad_()
    close(field(points, views), case["out/raw_clean"])
    feature = case["in/adv_feat"].requires_grad_() if "in/adv_feat" in case else None
    raw = field(points, views, feature)
    close(raw, case["out/raw"])
    (raw * case["in/cotangent"]).sum().backward()
    check_gradients(case, dict(field.named_parameters()))
    for name, tensor in (("pts", points), ("dirs", views), ("adv_feat", feature)):
        if f"grad/in_{name}" in case:
            close(tensor.grad, case[f"grad/in_{name}"])


def rays(case: Fixture) -> None:
    cfg, pose = case.meta, case["in/c2w"]
    height, width, focal = cfg["H"], cfg["W"], cfg["focal"]
    matrix = cameras.intrinsics(height, width, focal)
    close(matrix, case["out/K"])
    close(cameras.perspective_rays(height, width, matrix, pose), case["out/persp"])
    close(cameras.orthographic_rays(height, width, matrix, pose), case["out/ortho"])
    origins, directions = cameras.ndc_rays(case["in/o"], case["in/d"], height, width, focal, cfg["ndc_near"])
    close(origins, case["out/ndc_o"])
    close(directions, case["out/ndc_d"])
    angles, offsets = case["in/euler"].requires_grad_(), case["in/tvec"].requires_grad_()
    turned = cameras.transform_rays(case["in/o"], case["in/d"], case["in/cam_ids"], angles, offsets)
    close(turned[0], case["out/tr_o"])
    close(turned[1], case["out/tr_d"])
    (torch.cat(turned, -1) * case["in/cotangent"]).sum().backward()
    close(angles.grad, case["grad/euler"])
    close(offsets.grad, case["grad/tvec"])

    def mapped(u: torch.Tensor, bounds: list[float]) -> torch.Tensor:
        return bounds[0] + (bounds[1] - bounds[0]) * u

    degrees = mapped(case["in/u_r"], cfg["corrupt_degrees"])
    shift = mapped(case["in/u_t"], cfg["corrupt_offset"])
    close(cameras.corrupt_poses(case["in/poses"], torch.deg2rad(degrees), shift), case["out/corrupt"])


def sampling(case: Fixture) -> None:
    cfg = case.meta
    origins, directions = case["in/rays_o"], case["in/rays_d"]
    near, far = case["in/bounds"].split(1, -1)

    def points(z: torch.Tensor) -> torch.Tensor:
        return origins[:, None] + z[..., None] * directions[:, None]

    def coarse(**options: Any) -> torch.Tensor:
        return stratified(near, far, len(near), cfg["N_samples"], inverse=cfg["lindisp"], **options)

    plain = coarse()
    close(plain, case["out/c_z"])
    close(points(plain), case["out/c_pts"])
    moved = plain + case["in/adv_z_c"]
    close(moved, case["out/c_adv_z"])
    close(points(moved) + case["in/adv_pts_c"], case["out/c_adv_pts"])
    jittered = coarse(jitter=case["in/t_rand"])
    close(jittered, case["out/c_jit_z"])
    close(points(jittered), case["out/c_jit_pts"])
    for name, uniform in (("det", None), ("jit", case["in/u"])):
        z, new = importance(jittered, case["in/weights"], cfg["N_importance"], uniform)
        close(z, case[f"out/f_{name}_z"])
        close(new, case[f"out/f_{name}_new"])
        close(points(z), case[f"out/f_{name}_pts"])
    z, _ = importance(jittered, case["in/weights"], cfg["N_importance"])
    moved = z + case["in/adv_z_f"]
    close(moved, case["out/f_adv_z"])
    close(points(moved) + case["in/adv_pts_f"], case["out/f_adv_pts"])


OUTPUTS = ("rgb", "disp", "acc", "weights", "depth")


def render(case: Fixture) -> None:
    cfg, field = case.meta, NeRF(2, 4)
    raw, z, delta = (case[f"in/{name}"].requires_grad_() for name in ("raw", "z", "adv_raw"))
    noise = cfg["raw_noise_std"] * case["in/noise"]
    density_only = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)  # the released code leaves colour inert
    for prefix, values in (("", raw), ("adv_", raw + density_only * delta)):
        shown = field.compose(values, z, case["in/rays_d"], white=cfg["white_bkgd"], noise=noise)
        for name, value in zip(OUTPUTS, shown, strict=True):
            close(value, case[f"out/{prefix}{name}"])
    (shown.rgb * case["in/cotangent"]).sum().backward()
    for name, tensor in (("raw", raw), ("z", z), ("adv_raw", delta)):
        close(tensor.grad, case[f"grad/{name}"])


class Released(Renderer):
    """With the released names of places: a network of one pass calls it the coarse one."""

    def forward(self, rays: cameras.Rays, delta: Mapping[str, torch.Tensor] | None = None, *given: Any, **options: Any):
        if delta and not self.sampling.fine:
            delta = {f"{k[:-2]}_f" if k.endswith("_c") else k: v for k, v in delta.items() if not k.endswith("_f")}
        return super().forward(rays, delta, *given, **options)


def renderer_of(case: Fixture) -> Renderer:
    cfg = case.meta
    state = case.under("state/")
    fields = [field_of(cfg) for _ in range(3 if any(name.startswith("nerf_adv") for name in state) else 2)]
    if not cfg["N_importance"]:
        fields[1] = fields[0]
    renderer = Released(
        *fields,
        sampling=RaySampling(cfg["near"], cfg["far"], cfg["N_samples"], cfg["N_importance"], cfg.get("lindisp", False)),
        white=cfg.get("white_bkgd", False),
        **({"variant": RELEASED} if len(fields) == 3 and cfg.get("branch") == "auxiliary" else {}),
    )
    renderer.load_state_dict(state)
    return renderer.double()


def batch_of(case: Fixture) -> Batch:
    origins, directions = case["in/rays"]
    return Batch(cameras.Rays(origins, directions), case["in/gt"])


def geometry_of(case: Fixture) -> Geometry:
    cfg = case.meta
    coarse = cfg["N_samples"]
    return Geometry(
        cfg["near"], cfg["far"], coarse, coarse + cfg["N_importance"], cfg["netwidth"], cfg["H"], cfg["W"]
    )  # fmt: skip


def check_rendering(case: Fixture, rendering: Rendering) -> None:
    passes = [("", rendering.fine)] if rendering.coarse is None else [("", rendering.fine), ("0", rendering.coarse)]
    for suffix, result in passes:
        for name, value in zip(OUTPUTS, result.shown, strict=True):
            close(value, case[f"out/{name}{suffix}"])
    if rendering.z_std is not None:
        close(rendering.z_std, case["out/z_std"])
    if "out/raw" in case:
        close(rendering.fine.raw, case["out/raw"])


def check_states(case: Fixture, renderer: Renderer) -> None:
    for name, value in renderer.state_dict().items():
        close(value, case[f"out/after/{name}"], 1e-6, 1e-6)


def net_clean(case: Fixture) -> None:
    cfg, renderer, batch = case.meta, renderer_of(case), batch_of(case)
    check_rendering(case, renderer(batch.rays))
    optimiser = torch.optim.Adam(renderer.parameters(), lr=cfg["lr"])
    for step in range(cfg["steps"]):
        optimiser.zero_grad()
        losses = accumulate(renderer, batch, chunk=2)
        close(losses.clean, case["out/losses"][step])
        if step == 0:
            check_gradients(case, dict(renderer.named_parameters()))
        optimiser.step()
        decayed(optimiser, step + 1, cfg)
    check_states(case, renderer)


def decayed(optimiser: torch.optim.Optimizer, step: int, cfg: Mapping[str, Any]) -> None:
    optimiser.param_groups[0]["lr"] = learning_rate(step, cfg["lr"], cfg["decay_rate"], cfg["decay_steps"])


def adv(case: Fixture) -> None:
    renderer, batch = renderer_of(case), batch_of(case)
    delta = {key: case[f"in/delta_{key}"].requires_grad_() for key in case.meta["keys"]}
    rendering = renderer(batch.rays, delta)
    check_rendering(case, rendering)
    close(criterion(rendering, batch.truth, per_ray=True), case["out/loss_none"])
    loss = criterion(rendering, batch.truth)
    close(loss, case["out/loss"])
    loss.backward()
    for key, value in delta.items():
        close(torch.zeros_like(value) if value.grad is None else value.grad, case[f"grad/delta/{key}"])
    check_gradients(case, dict(renderer.named_parameters()))
    clean = renderer(batch.rays)
    close(clean.rgb, case["out/clean_rgb"])
    if clean.coarse is not None:
        close(clean.coarse.shown.rgb, case["out/clean_rgb0"])


def steps_from(case: Fixture) -> dict[str, Step]:
    cfg = case.meta
    return steps_of(
        cfg["keys"],
        geometry_of(case),
        eps=cfg["pgd_eps"],
        alpha=cfg["pgd_alpha"],
        iterations=cfg["pgd_iters"],
        norm=[cfg["norm"]] if isinstance(cfg["norm"], str) else cfg["norm"],
    )


def pgd(case: Fixture) -> None:
    renderer, batch, steps = renderer_of(case), batch_of(case), steps_from(case)
    for key, epsilon in case.meta["epsilons"].items():
        assert steps[key].epsilon == pytest.approx(epsilon, rel=1e-12)
    initial = {key: case[f"in/u_{key}"] * step.epsilon for key, step in steps.items()}
    objective = Objective()

    def losses(delta: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return objective(renderer(batch.rays, delta), batch.truth)

    close(losses(initial).mean(), case["out/loss_init"])
    found = maximise(losses, initial, steps, helpful=case.meta["unadv"])
    for key, value in found.items():
        close(value, case[f"out/delta_{key}"])
    close(losses(found).mean(), case["out/loss_final"])


def train_adv(case: Fixture) -> None:
    cfg, renderer, batch = case.meta, renderer_of(case), batch_of(case)
    adversary = Adversary(steps_from(case) if cfg["keys"] else {}, weight=cfg["adv_lambda"])
    optimiser = torch.optim.Adam(renderer.parameters(), lr=cfg["lr"])
    perturbation = WeightPerturbation(renderer, cfg["awp_gamma"], cfg["awp_lr"]) if cfg["awp"] else None
    for step in range(cfg["steps"]):
        initial = {key: case[f"in/u{step}_{key}"] * s.epsilon for key, s in adversary.steps.items()}

        def starts(number: int, rows: slice, initial=initial) -> dict[str, torch.Tensor]:
            return {key: value[rows] for key, value in initial.items()}

        optimiser.zero_grad()
        moved = None

        def perturb(loss: Callable[[Any], torch.Tensor], step=step) -> None:
            nonlocal moved
            direction = perturbation.direction(renderer, loss)
            if step == 0:
                for name, value in case.under("out/awp_diff0/").items():
                    close(direction[name], value, 1e-6, 1e-6)
            moved = perturbation.applied(renderer, direction)
            moved.__enter__()

        losses = accumulate(renderer, batch, adversary, starts, perturb_weights=perturb if perturbation else None)
        close(losses.clean, case["out/loss_clean"][step], 1e-6 if step else 1e-9, 1e-6)
        close(losses.adversarial, case["out/loss_adv"][step], 1e-6 if step else 1e-9, 1e-6)
        optimiser.step()
        decayed(optimiser, step + 1, cfg)
        if moved is not None:
            moved.__exit__(None, None, None)
    check_states(case, renderer)


def scores(case: Fixture) -> None:
    cfg, first, second = case.meta, case["in/a"], case["in/b"]
    close(metrics.mse(first, second), case["out/mse"])
    close((first - second).square().mean(-1), case["out/mse_per_pixel"])
    close(metrics.psnr(metrics.mse(first, second)), case["out/psnr"])
    close(metrics.ssim(first, second, window=cfg["window"], sigma=cfg["sigma"]), case["out/ssim"], 1e-6, 1e-6)
    for step, rate in zip(case["in/steps"].tolist(), case["out/lr"], strict=True):
        close(torch.tensor(learning_rate(step, cfg["lr"], cfg["decay_rate"], cfg["decay_steps"])), rate)


def poses(case: Fixture) -> None:
    cfg = case.meta
    stored = case["in/poses_bounds"].numpy()
    height, width = cfg["images_hw"]
    for prefix, spherify in (("fwd", False), ("sph", True)):
        found = normalise_llff(stored, cfg["factor"], bound_factor=cfg["bd_factor"], spherify=spherify)
        expected, path = case[f"out/{prefix}_poses"], case[f"out/{prefix}_path"]
        close(found.camera_to_world[:, :3], expected[..., :4], 1e-5, 1e-5)
        close(found.bounds, case[f"out/{prefix}_bounds"], 1e-5, 1e-5)
        close(torch.tensor([height, width, found.focal[0]]), expected[0, :, 4], 1e-5, 1e-5)
        rendered = spherical_path(found, len(path)) if spherify else spiral_path(found, len(path))
        close(rendered[:, :3], path[..., :4], 1e-5, 1e-5)
        if f"out/{prefix}_closest" in case:
            assert found.middle_view == int(case[f"out/{prefix}_closest"])
    close(cameras.ring_poses(case["in/angles"].numpy()), case["out/ring"], 1e-5, 1e-5)


def saltpepper(case: Fixture) -> None:
    image, coordinates = (case[f"in/{name}"].numpy() for name in ("img", "coords"))
    assert len(coordinates) == 2 * int(image.shape[0] * image.shape[1] * case.meta["ratio"] / 2)
    whole = image.dtype == np.uint8  # the release writes 255 whatever the image's range is
    changed = corruptions.salt_and_pepper_at(image if whole else image / 255, coordinates) * (1 if whole else 255)
    expected = case["out/img"].numpy()
    assert np.array_equal(changed, expected) if whole else np.allclose(changed, expected, rtol=1e-6)
    assert (expected != image).any(-1).mean() == pytest.approx(float(case["out/changed_fraction"]), abs=1e-9)


def density(case: Fixture) -> None:
    cfg, field = case.meta, field_of(case.meta)
    field.load_state_dict(case.under(f"state/{cfg['net']}."))
    close(density_grid(field, cfg["extents"], cfg["voxel"], chunk=50), case["out/sigma"])


CHECKS: dict[str, Callable[[Fixture], None]] = {
    "adv": adv,
    "density": density,
    "embed": embed,
    "metrics": scores,
    "mlp": mlp,
    "net_clean": net_clean,
    "pgd": pgd,
    "poses": poses,
    "rays": rays,
    "render": render,
    "saltpepper": saltpepper,
    "sampling": sampling,
    "train_adv": train_adv,
    "train_awp": train_adv,
}


@pytest.mark.parametrize("path", parity_files(__file__), ids=lambda path: path.stem)
def test_parity(path: Path) -> None:
    check_parity(path, CHECKS)
