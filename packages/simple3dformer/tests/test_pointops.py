"""Sampling and neighbourhoods against loops, and their properties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold_shared.errors import UserError
from tenfold_simple3dformer import pointops
from tenfold_simple3dformer.abstraction import SetAbstraction
from tenfold_simple3dformer.pointops import (
    ball_query,
    batch_clouds,
    check_points,
    farthest_point_sampling,
    interpolate,
    nearest_neighbours,
    normalise_points,
    spread,
    squared_distances,
)


def cloud(n: int, seed: int, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=8)
@given(st.integers(2, 30), st.integers(0, 1000))
def test_farthest_points_against_a_loop(n: int, seed: int) -> None:
    xyz = cloud(n, seed)
    count = 1 + seed % n
    start = torch.tensor([seed % n, (seed // 7) % n])
    found = farthest_point_sampling(xyz, count, start)
    for b in range(2):
        chosen = [int(start[b])]
        while len(chosen) < count:
            distance = [min(float((p - xyz[b, c]).square().sum()) for c in chosen) for p in xyz[b]]
            chosen.append(int(np.argmax(distance)))
        assert found[b].tolist() == chosen


def test_all_points_are_a_permutation() -> None:
    """Where every point is kept, the fast path and the sampled order have the same set."""
    xyz = cloud(20, 1)
    assert farthest_point_sampling(xyz, 20).sort(1).values.tolist() == [list(range(20))] * 2
    ordered = farthest_point_sampling(xyz, 20, torch.tensor([0, 0]))
    assert ordered.sort(1).values.tolist() == [list(range(20))] * 2


def test_abstraction_does_not_depend_on_the_order_of_centres() -> None:
    layer = SetAbstraction(0, 4, [5, 8, 8]).double().eval()
    xyz, features = cloud(20, 2), torch.rand(2, 20, 2, dtype=torch.float64)
    fast_xyz, fast = layer(xyz, features)
    slow_xyz, slow = layer(xyz, features, torch.tensor([0, 0]))
    for b in range(2):
        index = squared_distances(slow_xyz, fast_xyz)[b].argmin(1)
        torch.testing.assert_close(fast[b, index], slow[b])


@settings(deadline=None, max_examples=8)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 1000))
def test_neighbours_against_sorting(n: int, k: int, seed: int) -> None:
    xyz = cloud(n, seed)
    distance, index = nearest_neighbours(xyz[:, :5], xyz, k)
    expected = (xyz[:, :5, None] - xyz[:, None]).square().sum(-1).sort(2)
    assert torch.equal(index, expected.indices[:, :, :k])
    torch.testing.assert_close(distance, expected.values[:, :, :k])


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    xyz = cloud(50, 3)
    whole = nearest_neighbours(xyz, xyz, 5)[1], ball_query(xyz, xyz, 0.3, 5)
    monkeypatch.setattr(pointops, "CHUNK", 300)
    assert torch.equal(nearest_neighbours(xyz, xyz, 5)[1], whole[0])
    assert torch.equal(ball_query(xyz, xyz, 0.3, 5), whole[1])


def test_ball_query_against_a_loop() -> None:
    xyz = cloud(30, 4)
    centres = torch.cat([xyz[:, :6], torch.full((2, 1, 3), 9.0, dtype=torch.float64)], 1)
    found = ball_query(centres, xyz, 0.4, 5)
    for b in range(2):
        for s in range(7):
            inside = [i for i in range(30) if float((xyz[b, i] - centres[b, s]).square().sum()) <= 0.16][:5]
            inside = inside or [0]  # nothing near the far centre
            assert found[b, s].tolist() == inside + [inside[0]] * (5 - len(inside))


def test_interpolation_of_equal_points_is_exact() -> None:
    coarse = cloud(8, 5)
    features = torch.rand(2, 8, 3, dtype=torch.float64)
    torch.testing.assert_close(interpolate(coarse, coarse, features), features, atol=1e-6, rtol=0)
    one = interpolate(coarse, coarse[:, :1], features[:, :1])
    torch.testing.assert_close(one, features[:, :1].expand(-1, 8, -1))


def test_duplicates_give_no_nan() -> None:
    """After point dropout most points are copies of one."""
    layer = SetAbstraction(6, 4, [3, 4, 4])
    xyz = torch.zeros(2, 10, 3)
    xyz[:, 0] = 1.0
    places, features = layer(xyz)
    assert torch.isfinite(places).all()
    assert torch.isfinite(features).all()
    assert torch.isfinite(interpolate(xyz, places, features)).all()


def test_half_precision_measures_in_float32() -> None:
    xyz = (1000 + cloud(9, 6)).to(torch.bfloat16)
    assert squared_distances(xyz, xyz).dtype == torch.float32


def test_normalised_points() -> None:
    points = normalise_points(5 + 3 * cloud(40, 7))
    assert points.norm(dim=-1).amax(1) == pytest.approx(1)
    assert points.mean(1).abs().max() < 1e-12
    assert torch.isfinite(normalise_points(torch.ones(1, 4, 3))).all()


def test_refused_clouds() -> None:
    with pytest.raises(UserError, match="row 2"):
        check_points(torch.tensor([[[0.0] * 3, [1.0] * 3, [0.0, float("nan"), 0.0]]]))
    with pytest.raises(UserError, match="0 points"):
        check_points(torch.zeros(1, 0, 3))
    with pytest.raises(UserError, match="5 of 4"):
        farthest_point_sampling(torch.zeros(1, 4, 3), 5)


def test_clouds_of_several_sizes() -> None:
    """Each is the same alone and in company; every point of a large one gets its nearest sampled point's value."""
    sizes = [cloud(n, n, 1)[0] for n in (3, 16, 40)]
    batch = batch_clouds(sizes, 16)
    assert batch.shape == (3, 16, 3)
    torch.testing.assert_close(batch[2:], batch_clouds(sizes[2:], 16))
    assert torch.equal(batch[0, 3:6], sizes[0])
    values = torch.arange(48.0, dtype=torch.float64).view(3, 16, 1)
    back = spread(sizes, batch, values)
    assert [len(v) for v in back] == [3, 16, 40]
    assert (back[0][:, 0] % 3).tolist() == [0, 1, 2]  # of a repeated point, any copy
    assert torch.equal(back[1], values[1])
    nearest = (sizes[2][:, None] - batch[2][None]).square().sum(-1).argmin(1)
    assert torch.equal(back[2], values[2][nearest])
    with pytest.raises(UserError, match="0 points"):
        batch_clouds([torch.zeros(0, 3)], 4)
