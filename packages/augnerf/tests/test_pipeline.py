"""Encoding, sampling, compositing and rendering against slow, obvious references and their own invariances."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold_augnerf import KEYS, MODELS, Draws, NeRF, Rays, RaySampling, Renderer, create_model
from tenfold_augnerf.cameras import euler_rotation, transform_rays
from tenfold_augnerf.compositing import composite, intervals
from tenfold_augnerf.encoding import encode, encode_gaussian
from tenfold_augnerf.fields import Samples
from tenfold_augnerf.mip import MipNeRF
from tenfold_augnerf.sampling import importance, invert_cdf, stratified
from tenfold_augnerf.views import Views
from tenfold_shared.errors import UserError
from tenfold_shared.scenes import blocks_views

PARAMETERS = {
    "nerf": (595_844, 1_191_688, 1_787_532),
    "reference": (2_305_796, 4_611_592, 6_917_388),
    "nerf-without-views": (494_084, None, None),
    "reference-without-views": (1_905_668, None, None),
    "reference-identity": (2_238_212, None, None),
    "reference-conv": (2_319_980, None, None),
}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", list(MODELS))
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, RaySampling(2.0, 6.0))
        if name not in PARAMETERS:
            assert count(model) > 0
            return
        one, two, three = PARAMETERS[name]
        assert count(model.nerf) == one
        assert count(model) == (two or 2 * one)
        if three:
            third = NeRF(8, MODELS[name].width)
            assert count(model) + count(third) == three


def test_without_fine_samples_the_fine_network_is_the_coarse_one() -> None:
    model = create_model("tiny", RaySampling(2.0, 6.0, 8, 0))
    assert model.nerf_fine is model.nerf
    names = list(create_model("nerf", RaySampling(2.0, 6.0, 8, 0)).state_dict())
    assert len(names) == 48
    rendering = model(rays(3))
    assert rendering.coarse is None
    assert rendering.z_std is None


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(UserError, match="no model 'nerff'"):
        create_model("nerff", RaySampling(2.0, 6.0))


def rays(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Rays:
    draw = torch.Generator().manual_seed(seed)
    origins = torch.tensor([0.0, 0.0, 4.0]) + 0.1 * torch.randn(n, 3, generator=draw)
    directions = torch.tensor([0.0, 0.0, -1.0]) + 0.3 * torch.randn(n, 3, generator=draw)
    return Rays(origins.to(dtype), directions.to(dtype), torch.arange(n) % 2, torch.full((n, 1), 0.01, dtype=dtype))


def test_encoding_by_loops() -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    for point, encoded in zip(x.tolist(), encode(x, 4).tolist(), strict=True):
        expected = list(point)
        for k in range(4):
            expected += [math.sin(2**k * v) for v in point] + [math.cos(2**k * v) for v in point]
        assert encoded == pytest.approx(expected, abs=1e-12)


def test_integrated_encoding_is_the_expectation() -> None:
    draw = torch.Generator().manual_seed(0)
    mean, variance = torch.tensor([0.3, -0.2, 0.5]), torch.tensor([0.02, 0.1, 0.05])
    drawn = mean + variance.sqrt() * torch.randn(200_000, 3, generator=draw)
    waves = torch.cat([torch.cat([f(2**k * drawn) for k in range(3)], -1) for f in (torch.sin, torch.cos)], -1).mean(0)
    torch.testing.assert_close(encode_gaussian(mean, variance, 3), waves, atol=0.01, rtol=0)


def test_frustum_moments_by_monte_carlo() -> None:
    """Mean and variance along and across a cone between two edges, from points drawn uniformly in its volume."""
    field = MipNeRF(2, 8, 4)
    direction, radius = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.3]])
    samples = field.locate(Rays(torch.zeros(1, 3), direction, None, radius), torch.tensor([[1.0, 2.0]]))
    draw = torch.Generator().manual_seed(0)
    t = (1 + 7 * torch.rand(400_000, generator=draw)) ** (1 / 3)  # density of a cone grows with t²
    r = 0.3 * t * torch.rand(400_000, generator=draw).sqrt()
    angle = 2 * math.pi * torch.rand(400_000, generator=draw)
    points = torch.stack([r * angle.cos(), r * angle.sin(), t], -1)
    torch.testing.assert_close(samples.points[0, 0], points.mean(0), atol=5e-3, rtol=0)
    torch.testing.assert_close(samples.spread[0, 0], points.var(0), atol=2e-3, rtol=0.02)


def test_compositing_by_loops() -> None:
    draw = torch.Generator().manual_seed(0)
    colour, sigma = torch.rand(4, 7, 3, generator=draw), 3 * torch.rand(4, 7, generator=draw)
    z, directions = torch.rand(4, 7, generator=draw).sort(-1).values + 2, torch.randn(4, 3, generator=draw)
    found = composite(colour, sigma, intervals(z, directions), z, white=True)
    for ray in range(4):
        passed, rgb, depth, acc = 1.0, [0.0] * 3, 0.0, 0.0
        for i in range(7):
            step = float(z[ray, i + 1] - z[ray, i]) if i < 6 else 1e10
            alpha = 1 - math.exp(-float(sigma[ray, i]) * step * float(directions[ray].norm()))
            weight = passed * alpha
            rgb = [c + weight * float(colour[ray, i, k]) for k, c in enumerate(rgb)]
            depth, acc, passed = depth + weight * float(z[ray, i]), acc + weight, passed * (1 - alpha)
        assert found.rgb[ray].tolist() == pytest.approx([c + 1 - acc for c in rgb], abs=1e-5)
        assert float(found.depth[ray]) == pytest.approx(depth, abs=1e-5)
        assert float(found.acc[ray]) == pytest.approx(acc, abs=1e-5)


def test_empty_rays_have_no_poisoned_gradients() -> None:
    sigma, z = torch.zeros(2, 5, requires_grad=True), torch.linspace(2, 6, 5).expand(2, 5)
    shown = composite(torch.rand(2, 5, 3), sigma, intervals(z, torch.ones(2, 3)), z, white=True)
    assert shown.depth.tolist() == [[1e10], [1e10]]
    (shown.rgb.sum() + shown.depth.sum() + shown.disparity.sum()).backward()
    assert sigma.grad.isfinite().all()


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 30), st.booleans(), st.integers(0, 10_000))
def test_stratified_samples_stay_ordered_and_inside(samples: int, inverse: bool, seed: int) -> None:
    jitter = torch.rand(4, samples, generator=torch.Generator().manual_seed(seed))
    z = stratified(torch.tensor([[2.0]]), torch.tensor([[6.0]]), 4, samples, inverse=inverse, jitter=jitter)
    assert z.min() >= 2 - 1e-5
    assert z.max() <= 6 + 1e-5
    assert (z.diff() >= -1e-6).all()


@settings(deadline=None, max_examples=20)
@given(st.integers(3, 20), st.integers(1, 20), st.integers(0, 10_000))
def test_importance_samples_lie_between_the_middles(samples: int, count_: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    z, weights = (2 + torch.rand(3, samples, generator=draw)).sort(-1).values, torch.rand(3, samples, generator=draw)
    union, new = importance(z, weights, count_, torch.rand(3, count_, generator=draw))
    assert union.shape == (3, samples + count_)
    assert (union.diff() >= 0).all()
    middle = (z[:, 1:] + z[:, :-1]) / 2
    assert (new >= middle[:, :1] - 1e-5).all()
    assert (new <= middle[:, -1:] + 1e-5).all()


def test_importance_follows_the_weights() -> None:
    bins, weights = torch.linspace(0, 1, 5)[None], torch.tensor([[1.0, 0.0, 0.0, 3.0]])
    drawn = invert_cdf(bins, weights, 4000, torch.rand(1, 4000, generator=torch.Generator().manual_seed(0)))
    assert float((drawn > 0.75).float().mean()) == pytest.approx(0.75, abs=0.03)


def test_new_samples_carry_no_gradient_and_coarse_ones_do() -> None:
    z = torch.linspace(2, 6, 6)[None].clone().requires_grad_()
    weights = torch.rand(1, 6, requires_grad=True)
    union, new = importance(z, weights, 3)
    assert not new.requires_grad
    union.sum().backward()
    assert z.grad.tolist() == [[1.0] * 6]
    assert weights.grad is None


def test_chunks_do_not_change_the_rendering() -> None:
    torch.manual_seed(0)
    model, batch = create_model("tiny", RaySampling(2.0, 6.0, 6, 5), white=True), rays(10)
    whole = model(batch)
    parts = torch.cat([model(batch.chosen(slice(i, i + 3))).rgb for i in range(0, 10, 3)])
    torch.testing.assert_close(whole.rgb, parts, atol=1e-6, rtol=0)


def test_fused_heads_are_the_layers_one_by_one() -> None:
    torch.manual_seed(0)
    field = NeRF(6, 16, 4, 2).double()
    mlp, h, views = field.mlp, torch.randn(5, 3, 16).double(), torch.randn(5, 3).double()
    encoded = encode(views, 2)[:, None].expand(-1, 3, -1)
    hidden = torch.relu(mlp.views_linears[0](torch.cat([mlp.feature_linear(h), encoded], -1)))
    expected = torch.cat([mlp.rgb_linear(hidden), mlp.alpha_linear(h)], -1)
    torch.testing.assert_close(field.heads(h, views), expected)
    points = torch.randn(5, 3, 3).double()
    x = encode(points, 4)
    h = x
    for i, linear in enumerate(mlp.pts_linears):
        h = torch.relu(linear(torch.cat([x, h], -1) if i == 5 else h))
    torch.testing.assert_close(field.encode(Samples(points)), h)


def test_five_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="5 layers"):
        NeRF(5, 16)


def test_cameras_move_before_directions_and_ndc_come() -> None:
    torch.manual_seed(0)
    model, batch = create_model("tiny", RaySampling(2.0, 6.0, 4, 4), white=True).double(), rays(4, dtype=torch.float64)
    angles, offsets = 0.1 * torch.randn(2, 3).double(), 0.1 * torch.randn(2, 3).double()
    found = model(batch, {"cam_r": angles, "cam_t": offsets})
    turned = (euler_rotation(angles)[batch.cameras] @ batch.directions[..., None])[..., 0]
    expected = model(batch._replace(origins=batch.origins + offsets[batch.cameras], directions=turned))
    torch.testing.assert_close(found.rgb, expected.rgb)
    with pytest.raises(UserError, match="camera of every ray"):
        model(batch._replace(cameras=None), {"cam_r": angles, "cam_t": offsets})


def test_cameras_move_in_full_precision_under_autocast() -> None:
    given, angles = rays(4), torch.full((2, 3), 0.01)
    exact = transform_rays(given.origins, given.directions, given.cameras, angles, angles)
    with torch.autocast("cpu", torch.bfloat16):
        found = transform_rays(given.origins, given.directions, given.cameras, angles, angles)
    assert all(torch.equal(one, other) for one, other in zip(exact, found, strict=True))


def test_rotation_order() -> None:
    angles = torch.tensor([0.3, -0.4, 0.5], dtype=torch.float64)
    x, y, z = (euler_rotation(angles * torch.eye(3, dtype=torch.float64)[i]) for i in range(3))
    torch.testing.assert_close(euler_rotation(angles), x @ y @ z)
    assert float((euler_rotation(angles) @ euler_rotation(angles).T - torch.eye(3)).abs().max()) < 1e-12


def test_ndc_points_are_projections() -> None:
    """A point on a warped ray is the projection of the same point of the unwarped one."""
    model = Renderer(NeRF(2, 8, 2, 1), sampling=RaySampling(0.0, 1.0, 4, 0, ndc=(20, 30, 25.0)))
    origins, directions = torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([[0.2, -0.1, -1.0]])
    placed = model(Rays(origins, directions)).rays
    t = 0.4
    warped = placed.origins + t * placed.directions
    depth = -1 / (1 - t) if t < 1 else -math.inf  # near plane at z = -1 after the shift
    start = origins + (-(1 + origins[:, 2:]) / directions[:, 2:]) * directions
    point = start + (depth - start[:, 2:]) / directions[:, 2:] * directions
    expected = torch.stack(
        [-2 * 25 / 30 * point[:, 0] / point[:, 2], -2 * 25 / 20 * point[:, 1] / point[:, 2], 1 + 2 / point[:, 2]], -1
    )
    torch.testing.assert_close(warped, expected, atol=1e-5, rtol=1e-5)


def test_pixel_convention_of_the_exact_scene() -> None:
    """A dense field of the scene's own signed distance has the pictures' silhouettes: no half-pixel shift."""
    scene = blocks_views(1, 24)
    views = Views.from_scene(scene, 2.4, 5.6, white=True)
    pixels = views.pixels_of(0)
    batch = views.rays(pixels)
    z = torch.linspace(2.4, 5.6, 400)
    points = batch.origins[:, None] + z[:, None] * batch.directions[:, None]
    from tenfold_shared.scenes import blocks  # noqa: PLC0415

    inside = blocks().signed_distance(points.reshape(-1, 3).double().numpy()).reshape(len(pixels), 400) < 0
    hit = torch.from_numpy(inside.any(1))
    alpha = torch.from_numpy(np.ascontiguousarray(scene.alpha(0))).reshape(-1)
    assert float((hit == (alpha > 0.5)).float().mean()) > 0.98
    first = torch.from_numpy(inside.argmax(1))
    error = (z[first] - views.depth.reshape(-1))[hit & views.depth.reshape(-1).isfinite()]
    assert float(error.abs().median()) < 0.02


def test_two_coarse_samples_leave_nothing_between_them() -> None:
    """A fine pass needs an inner one; mip-NeRF's two intervals are enough."""
    with pytest.raises(UserError, match="2 coarse samples leave the fine pass nothing to draw from: take 3"):
        create_model("tiny", RaySampling(2.0, 6.0, 2, 4))
    for kind, coarse, fine in (("tiny", 3, 4), ("tiny", 2, 0), ("mip-nerf", 2, 4)):
        model = create_model(kind, RaySampling(2.0, 6.0, coarse, fine))
        assert model(rays(3)).rgb.isfinite().all()


def test_mip_resampling_is_the_inverse_of_widened_and_padded_weights() -> None:
    """Interval k has (max(w[k-1], w[k]) + max(w[k], w[k+1])) / 2 + 0.01 of the probability, before it sums to 1."""
    model = create_model("mip-nerf", RaySampling(2.0, 6.0, 8, 6))
    edges, weights = torch.linspace(2, 6, 9).double()[None], torch.tensor([[0.0, 0, 0.4, 0, 0, 0, 0.1, 0.5]]).double()
    w = [0.0, *weights[0].tolist(), 0.5]  # the ends stand for their missing neighbours
    mass = np.array([(max(w[k - 1], w[k]) + max(w[k], w[k + 1])) / 2 + 0.01 for k in range(1, 9)])
    cdf = np.concatenate([[0], np.cumsum(mass / mass.sum())])
    expected = np.interp(np.linspace(0, 1, 7), cdf, edges[0].numpy())
    found, _ = model.resample(edges, weights, None)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-3)


def test_cones_in_ndc_are_refused() -> None:
    with pytest.raises(UserError, match=r"leave --data\.ndc out"):
        create_model("mip-nerf", RaySampling(0.0, 1.0, 4, 4, ndc=(20, 30, 25.0)))


def test_mip_renderer_has_intervals_of_its_own() -> None:
    torch.manual_seed(0)
    model = create_model("mip-nerf", RaySampling(2.0, 6.0, 8, 6), white=True)
    rendering = model(rays(5), draws=model.draws(5, torch.Generator().manual_seed(0)))
    assert rendering.fine.z.shape == (5, 7)
    assert rendering.fine.shown.weights.shape == (5, 6)
    assert (rendering.fine.z.diff() >= 0).all()
    assert (rendering.fine.z >= 2).all()
    assert (rendering.fine.z <= 6).all()
    with pytest.raises(UserError, match="radii"):
        model(rays(5)._replace(radii=None))


@pytest.mark.parametrize("kind", ["tiny", "mip-nerf"])
def test_every_key_changes_the_rendering(kind: str) -> None:
    torch.manual_seed(0)
    model, batch = create_model(kind, RaySampling(2.0, 6.0, 5, 4), white=True), rays(6)
    geometry = model.geometry(10, 12, cameras=2)
    clean = model(batch)
    for key in KEYS:
        keys = [key] if not key.startswith("cam") else ["cam_r", "cam_t"]
        model.check(keys)
        delta = {name: 0.2 * torch.randn(geometry.shape(name, 6)) for name in keys}
        changed = model(batch, delta)
        both = [changed.rgb - clean.rgb, changed.coarse.shown.rgb - clean.coarse.shown.rgb]
        assert max(float(difference.abs().max()) for difference in both) > 1e-5, key


def test_draws_are_used() -> None:
    torch.manual_seed(0)
    model, batch = create_model("tiny", RaySampling(2.0, 6.0, 5, 4), white=True), rays(6)
    plain = model(batch).rgb
    drawn = model.draws(6, torch.Generator().manual_seed(0), noise_std=1.0)
    for name in Draws._fields:
        assert not torch.equal(
            model(batch, draws=Draws(**{name: getattr(drawn, name)})).coarse.shown.rgb, plain
        ) or not torch.equal(model(batch, draws=Draws(**{name: getattr(drawn, name)})).rgb, plain)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"near": 6.0, "far": 2.0}, "near < far"), ({"near": 2.0, "far": 6.0, "coarse": 1}, "2 or more"),
     ({"near": 0.0, "far": 6.0, "inverse": True}, "near > 0")],
)  # fmt: skip
def test_impossible_sampling_is_refused(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        RaySampling(**options)
