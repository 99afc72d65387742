"""Metrics and geometry against surfaces whose truth is known."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tenfold_augnerf import Samples, metrics
from tenfold_augnerf.geometry import (
    chamfer,
    density_at,
    density_grid,
    depth_scores,
    extract_mesh,
    grid_axes,
    grid_variation,
    median_depth,
    normal_error,
    normals_from_depth,
    ray_entropy,
    sample_triangles,
    total_variation,
    write_obj,
)


class Ball(nn.Module):
    """A field whose density is 20 (0.6 - |x - centre|)."""

    extra_edges, width = 0, 1

    def __init__(self) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.tensor([0.1, -0.2, 0.05]))

    def encode(self, samples: Samples) -> torch.Tensor:
        return 20 * (0.6 - (samples.points - self.centre).norm(dim=-1, keepdim=True))

    def heads(self, features: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(features).expand(-1, -1, 3), features], -1)

    def activate(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return raw[..., :3].sigmoid(), raw[..., 3].relu()


def test_mesh_of_a_ball_is_the_ball() -> None:
    field = Ball()
    density = density_grid(field, [2.0, 2.5, 2.25], 0.0625).numpy()
    assert density.shape == (40, 32, 36)  # x has the second extent, y the first
    axes = grid_axes([2.0, 2.5, 2.25], 0.0625)
    vertices, faces = extract_mesh(density, axes, 1.0)
    distance = np.linalg.norm(vertices - field.centre.detach().numpy(), axis=-1)
    assert distance == pytest.approx(0.55, abs=0.02)
    surface = sample_triangles(vertices, faces, 4000)
    draw = np.random.default_rng(0).standard_normal((4000, 3))
    exact = field.centre.detach().numpy() + 0.55 * draw / np.linalg.norm(draw, axis=-1, keepdims=True)
    assert chamfer(surface, exact) < 0.04
    assert chamfer(surface, exact + np.array([0.2, 0, 0])) > 0.07
    text = write_obj(vertices, faces)
    assert text.count("\nf ") == len(faces)
    assert max(int(n) for n in text.rstrip().rpartition("\n")[2].split()[1:]) <= len(vertices)


def test_an_empty_grid_has_no_mesh() -> None:
    vertices, faces = extract_mesh(np.zeros((4, 4, 4)), grid_axes([1, 1, 1], 0.25), 1.0)
    assert len(vertices) == len(faces) == 0
    assert math.isnan(chamfer(vertices, np.zeros((3, 3))))


def test_density_of_points() -> None:
    field = Ball()
    torch.testing.assert_close(density_at(field, field.centre.detach()[None]), torch.tensor([12.0]))


def test_normals_of_a_plane() -> None:
    """A tilted plane seen by a pinhole camera."""
    v, u = torch.meshgrid(torch.linspace(-0.3, 0.3, 12), torch.linspace(-0.3, 0.3, 12), indexing="ij")
    directions = torch.stack([u, v, torch.ones_like(u)], -1)
    normal = torch.nn.functional.normalize(torch.tensor([0.3, -0.2, -1.0]), dim=0)
    depth = (normal @ torch.tensor([0.0, 0.0, 3.0])) / (directions @ normal)
    found = normals_from_depth(depth, torch.zeros_like(directions), directions)
    assert normal_error(found, normal.expand_as(found), torch.ones(12, 12, dtype=torch.bool)) < 0.1
    tilted = torch.nn.functional.normalize(torch.tensor([0.3, 0.2, -1.0]), dim=0)
    angle = math.degrees(math.acos(float(normal @ tilted)))
    assert normal_error(found, tilted.expand_as(found), torch.ones(12, 12, dtype=torch.bool)) == pytest.approx(
        angle, abs=0.2
    )


def test_depth_scores_by_hand() -> None:
    truth = torch.tensor([2.0, 3.0, math.inf])
    scores = depth_scores(
        torch.tensor([1.1, 3.0, 0.5]), torch.tensor([2.0, 3.5, 6.0]), torch.tensor([0.5, 1.0, 0.1]), truth
    )
    assert scores["depth_mae"] == pytest.approx(0.1)
    assert scores["depth_rmse"] == pytest.approx(0.2 / math.sqrt(2), abs=1e-6)
    assert scores["median_depth_mae"] == pytest.approx(0.25)
    assert scores["mask_error"] == pytest.approx((0.5 + 0.0 + 0.1) / 3, abs=1e-6)


def test_median_depth() -> None:
    weights = torch.tensor([[0.2, 0.2, 0.2, 0.4], [0.6, 0.1, 0.0, 0.0], [0.1, 0.0, 0.0, 0.0]])
    z = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(3, 4)
    assert median_depth(weights, z).tolist() == [3.0, 1.0, 4.0]


def test_smoothness_measures() -> None:
    flat, rough = torch.zeros(6, 6), torch.tensor([[0.0, 1.0] * 3, [1.0, 0.0] * 3] * 3)
    assert total_variation(flat) == 0
    assert total_variation(rough) == 2
    assert grid_variation(torch.zeros(3, 3, 3)) == 0
    assert grid_variation(100 * torch.eye(3)[None].expand(3, 3, 3)) > 0.5
    assert ray_entropy(torch.tensor([[0.0, 1.0, 0.0]])) == pytest.approx(0, abs=1e-6)
    assert ray_entropy(torch.full((2, 4), 0.25)) == pytest.approx(math.log(4))


def test_scores_of_pictures() -> None:
    draw = torch.Generator().manual_seed(0)
    truth = torch.rand(24, 20, 3, generator=draw)
    noisy = truth + 0.1 * torch.randn(24, 20, 3, generator=draw)
    assert float(metrics.ssim(truth, truth)) == pytest.approx(1)
    assert 0.5 < float(metrics.ssim(noisy, truth)) < 1
    assert float(metrics.ssim_standard(truth, truth)) == pytest.approx(1)
    errors = [0.01, 0.1]
    assert metrics.psnr_mean(errors) == pytest.approx(15)
    assert metrics.psnr_of_mean_mse(errors) == pytest.approx(-10 * math.log10(0.055))
