"""Cameras, depth samples and projection against loops and exact geometry."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold_gnt.cameras import crop_camera, flip_camera, pack_cameras, pixel_grid, rays_through, resize_camera
from tenfold_gnt.data import packed_cameras
from tenfold_gnt.projection import project, sample_views, source_views
from tenfold_gnt.sampling import depth_samples, importance_samples, points_at
from tenfold_shared.scenes import tabletop_views

pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture(scope="module")
def scene():
    return tabletop_views(2, count=5, size=24)


def test_depth_along_the_ray_is_the_scenes_z_depth(scene):
    """The true depth map times the rays gives points that project back to their pixels at that depth."""
    camera = packed_cameras(scene)[1].double()
    origins, directions = rays_through(camera, pixel_grid(24, 24))
    depth = torch.from_numpy(scene.depth[1]).reshape(-1)
    hit = depth.isfinite()
    points = points_at(origins[hit], directions[hit], depth[hit, None])[:, 0]
    pixels, z = scene.cameras.project(points.numpy())
    np.testing.assert_allclose(pixels[1], pixel_grid(24, 24)[hit].numpy(), atol=1e-4)
    np.testing.assert_allclose(z[1], depth[hit].numpy(), atol=1e-5)
    mine, in_front = project(points, source_views(torch.zeros(5, 24, 24, 3), packed_cameras(scene).double()).projection)
    np.testing.assert_allclose(mine.numpy(), pixels, atol=1e-3)
    assert in_front.all()


def test_projection_and_sampling_against_loops():
    generator = torch.Generator().manual_seed(0)
    scene = tabletop_views(0, count=3, size=20)
    cameras = packed_cameras(scene).double()
    images = torch.rand(3, 20, 20, 3, generator=generator)
    features = torch.rand(3, 4, 8, 8, generator=generator)
    points = torch.rand(4, 3, 3, generator=generator) * 6 - 3
    target = torch.tensor([3.0, 0.5, 1.0])
    found = sample_views(points, target, source_views(images, cameras), features)

    def bilinear(grid: torch.Tensor, u: float, v: float) -> torch.Tensor:
        total = torch.zeros(grid.shape[0])
        for y in (int(np.floor(v)), int(np.floor(v)) + 1):
            for x in (int(np.floor(u)), int(np.floor(u)) + 1):
                if 0 <= x < grid.shape[2] and 0 <= y < grid.shape[1]:
                    total += grid[:, y, x] * (1 - abs(u - x)) * (1 - abs(v - y))
        return total

    for r in range(4):
        for s in range(3):
            for v in range(3):
                p = points[r, s]
                local = torch.linalg.inv(cameras[v, 18:].view(4, 4)) @ torch.cat([p, torch.ones(1)])
                q = cameras[v, 2:18].view(4, 4) @ local
                u, w = float(q[0] / max(q[2], 1e-8)), float(q[1] / max(q[2], 1e-8))
                inside = 0 <= u <= 19 and 0 <= w <= 19 and q[2] > 0
                assert bool(found.mask[r, s, v, 0]) == inside
                if abs(u) < 1e3 and abs(w) < 1e3:
                    torch.testing.assert_close(found.rgb_feat[r, s, v, :3], bilinear(images[v].permute(2, 0, 1), u, w))
                    expected = bilinear(features[v], u * 7 / 19, w * 7 / 19)
                    torch.testing.assert_close(found.rgb_feat[r, s, v, 3:], expected)
                a, b = target - p, cameras[v, 18:].view(4, 4)[:3, 3] - p
                a, b = a / (a.norm() + 1e-6), b / (b.norm() + 1e-6)
                expected = torch.cat([(a - b) / (a - b).norm().clamp(min=1e-6), (a @ b)[None]])
                torch.testing.assert_close(found.ray_diff[r, s, v], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_keep_their_precision_under_autocast(dtype):
    """Rays, pixels, directions and colours are those of full precision; features are their rounded maps there."""
    scene = tabletop_views(0, count=3, size=96)
    cameras = packed_cameras(scene)
    images, features = torch.from_numpy(scene.all_rgb()), torch.rand(3, 4, 24, 24, dtype=torch.float32)

    def found(maps):
        sources = source_views(images[1:], cameras[1:])
        origins, directions = rays_through(cameras[0], pixel_grid(96, 96, 5))
        points = points_at(origins, directions, depth_samples(2.0, 5.0, len(origins), 4, like=directions))
        return [directions, *project(points, sources.projection), *sample_views(points, origins[0], sources, maps)]

    exact = found(features[1:])
    with torch.autocast("cpu", dtype=dtype):
        reduced = found(features[1:].to(dtype))
    for one, other in zip(exact, reduced, strict=True):
        torch.testing.assert_close(other.to(one), one, rtol=1e-5, atol=4e-3 if one is exact[3] else 1e-5)


def test_gradients_reach_features_only():
    scene = tabletop_views(0, count=2, size=20)
    features = torch.rand(2, 4, 8, 8, requires_grad=True)
    points = torch.zeros(1, 2, 3, requires_grad=True)
    sources = source_views(torch.rand(2, 20, 20, 3), packed_cameras(scene).double())
    found = sample_views(points, torch.ones(3), sources, features)
    found.rgb_feat.sum().backward()
    assert features.grad is not None
    assert points.grad is None
    assert not found.ray_diff.requires_grad


def test_crop_flip_and_resize_keep_the_geometry(scene):
    """A world point falls on the same picture content after the change of camera."""
    camera = packed_cameras(scene)[:1].double()
    point = torch.tensor([[[0.1, -0.2, 0.05]]])

    def position(changed):
        return project(point, source_views(torch.zeros(1, 4, 4, 3), changed).projection)[0][0, 0, 0]

    u, v = position(camera)
    torch.testing.assert_close(position(crop_camera(camera, 3, 5, 10, 12)), torch.stack([u - 5, v - 3]))
    torch.testing.assert_close(position(flip_camera(camera)), torch.stack([23 - u, v]))
    torch.testing.assert_close(flip_camera(flip_camera(camera)), camera)
    torch.testing.assert_close(position(resize_camera(camera, 0.5)), torch.stack([u / 2, v / 2]))


@given(st.floats(0.1, 5), st.floats(0.1, 20), st.integers(2, 40), st.booleans(), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_depths_are_ordered_within_bounds(near, extent, samples, inverse, seed):
    generator = torch.Generator().manual_seed(seed)
    like, far = torch.zeros(1, dtype=torch.float64), near + extent
    jitter = torch.rand(3, samples, generator=generator, dtype=torch.float64)
    for chosen in (None, jitter):
        depths = depth_samples(near, far, 3, samples, inverse=inverse, jitter=chosen, like=like)
        assert (depths[:, 1:] >= depths[:, :-1]).all()
        assert depths.min() >= near - 1e-9
        assert depths.max() <= far + 1e-9
    even = depth_samples(near, far, 1, samples, inverse=inverse, like=like)[0]
    steps = (1 / even if inverse else even).diff()
    torch.testing.assert_close(steps, steps.mean().expand_as(steps))


@pytest.mark.parametrize("inverse", [True, False])
def test_importance_samples_against_a_loop(inverse):
    generator = torch.Generator().manual_seed(3)
    depths = depth_samples(2.0, 6.0, 2, 8, inverse=inverse, like=torch.zeros(1))
    weights = torch.rand(2, 8, generator=generator)
    weights[1, 2:5] = 0
    uniform = torch.rand(2, 5, generator=generator)
    found = importance_samples(depths, weights, 5, inverse=inverse, uniform=uniform)
    for r in range(2):
        axis = 1 / depths[r] if inverse else depths[r]
        bins, inner = (axis[1:] + axis[:-1]) / 2, weights[r, 1:-1] + 1e-5
        if inverse:
            bins, inner = bins.flip(0), inner.flip(0)
        share = inner / inner.sum()
        cdf = [float(share[:k].sum()) for k in range(len(share) + 1)]
        drawn = []
        for u in uniform[r].tolist():
            above = sum(u >= c for c in cdf[:-1])
            below = max(above - 1, 0)
            step = cdf[above] - cdf[below]
            t = (u - cdf[below]) / (step if step >= 1e-5 else 1.0)
            drawn.append(float(bins[below] + t * (bins[above] - bins[below])))
        fine = torch.tensor([1 / x if inverse else x for x in drawn])
        torch.testing.assert_close(found[r], torch.cat([depths[r], fine]).sort().values)


def test_importance_samples_go_where_the_weights_are():
    depths = depth_samples(2.0, 6.0, 1, 64, like=torch.zeros(1))
    weights = torch.zeros(1, 64)
    weights[0, 30] = 1.0
    fine = importance_samples(depths, weights, 32)
    near_peak = ((fine - depths[0, 30]).abs() < (depths[0, 31] - depths[0, 29])).sum()
    assert near_peak >= 32


def test_bad_depths_are_refused():
    like = torch.zeros(1)
    with pytest.raises(ValueError, match=r"near 6\.0 and far 2\.0"):
        depth_samples(6.0, 2.0, 1, 4, like=like)
    with pytest.raises(ValueError, match="at least 2 depth samples"):
        depth_samples(2.0, 6.0, 1, 1, like=like)
    with pytest.raises(ValueError, match="at least one source view"):
        source_views(torch.zeros(0, 4, 4, 3), torch.zeros(0, 34))


def test_pack_cameras_layout():
    matrix = torch.tensor([[3.0, 0, 5], [0, 4, 6], [0, 0, 1]])
    camera = pack_cameras(matrix, torch.arange(16.0).view(4, 4), 7, 9)
    assert camera[[0, 1, 2, 4, 7, 8]].tolist() == [7, 9, 3, 5, 4, 6]
    assert camera[18:].tolist() == list(range(16))
