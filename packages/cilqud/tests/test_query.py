"""The query against a loop over everything, and what must not change it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold_cilqud import SmallNet, approximate_query, query
from tenfold_cilqud.pools import Pool
from tenfold_cilqud.query import most_confident, random_choice
from tenfold_cilqud.session import pool_features
from tenfold_shared.errors import UserError


def drawn(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slow(anchors, pool, k, rounds=False, forbidden=()):
    """Every anchor sorts the whole pool."""
    taken, order = set(forbidden), []
    visits = (
        [(i, 1) for _ in range(k) for i in range(len(anchors))] if rounds else [(i, k) for i in range(len(anchors))]
    )
    for i, number in visits:
        distance = (pool - anchors[i]).square().sum(1).tolist()
        free = sorted((value, j) for j, value in enumerate(distance) if j not in taken)[:number]
        taken |= {j for _, j in free}
        order += [j for _, j in free]
    return order


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 6), st.integers(0, 999), st.booleans(), st.booleans())
def test_it_is_the_greedy_search(a, p, k, seed, rounds, small) -> None:
    anchors, pool = drawn(a, 3, seed), drawn(p, 3, seed + 1)
    order = "round_robin" if rounds else "stored"
    found = query(anchors, pool, k, order=order, memory=1 if small else 1 << 20)
    assert found.indices.tolist() == slow(anchors, pool, k, rounds)
    assert len(set(found.indices.tolist())) == len(found.indices) == min(p, a * k)


def test_a_pool_of_several_chunks_is_searched_whole() -> None:
    anchors, pool = drawn(3, 3, 0), drawn(2 * 8192 + 100, 3, 1)
    assert query(anchors, pool, 4).indices.tolist() == slow(anchors, pool, 4)


def test_features_of_a_pool_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more images at a time than a chunk, and the features of them all."""
    monkeypatch.setattr("tenfold_cilqud.session.CHUNK", 4)
    torch.manual_seed(0)
    net, images, asked = SmallNet(2, 2, width=2).train(), torch.rand(10, 1, 8, 8), []

    def read(indices: torch.Tensor) -> torch.Tensor:
        asked.append(len(indices))
        return images[indices]

    found = pool_features(net, Pool(10, read, "generated"))
    assert asked == [4, 4, 2]
    assert net.training
    torch.testing.assert_close(found, net.eval().features(images).detach())


def test_anchors_that_are_the_same_get_different_images() -> None:
    anchors = drawn(1, 4, 0).repeat(2, 1)
    assert len(set(query(anchors, drawn(20, 4, 1), 5).indices.tolist())) == 10


def test_equal_distances_go_to_the_lower_index() -> None:
    pool = torch.ones(9, 2, dtype=torch.float64)
    assert query(torch.zeros(1, 2, dtype=torch.float64), pool, 4).indices.tolist() == [0, 1, 2, 3]


def test_single_precision_far_from_the_origin() -> None:
    """The expansion of the square loses its digits there unless the features are centred first."""
    anchors, pool = drawn(6, 8, 0) + 1000, drawn(200, 8, 1) + 1000
    assert query(anchors.float(), pool.float(), 5).chosen.tolist() == query(anchors, pool, 5).chosen.tolist()
    assert (query(anchors.float(), pool.float(), 5).distance >= 0).all()


def test_limits_and_exclusions() -> None:
    anchors, pool = drawn(4, 3, 0), drawn(30, 3, 1)
    barred = torch.arange(0, 30, 2)
    found = query(anchors, pool, 3, exclude=barred)
    assert found.indices.tolist() == slow(anchors, pool, 3, forbidden=barred.tolist())
    assert len(query(anchors, pool, 3, max_total=7).indices) == 7
    assert query(anchors, pool, 3).counts.tolist() == [3, 6, 9, 12]


def test_cosine_ignores_lengths() -> None:
    anchors, pool = drawn(3, 5, 0), drawn(40, 5, 1)
    longer = pool * torch.rand(40, 1, dtype=torch.float64).add(0.1)
    assert (
        query(anchors, longer, 4, metric="cosine").indices.tolist()
        == query(anchors, pool, 4, metric="cosine").indices.tolist()
    )


@pytest.mark.parametrize(
    ("anchors", "pool", "k", "exclude"),
    [(0, 5, 2, None), (3, 5, 0, None), (3, 5, 2, torch.arange(5))],
)
def test_an_empty_query_is_refused(anchors, pool, k, exclude) -> None:
    with pytest.raises(UserError, match="query is empty"):
        query(drawn(anchors, 2, 0), drawn(pool, 2, 1), k, exclude=exclude)


def test_alternatives() -> None:
    draws = torch.Generator().manual_seed(0)
    chosen = random_choice(20, 8, draws, torch.arange(10))
    assert len(chosen) == 8
    assert int(chosen.min()) >= 10
    logits = torch.tensor([[0.0, 9.0], [0.0, 1.0], [5.0, 0.0], [0.0, 0.0]])
    assert most_confident(logits, 2).tolist() == [0, 2]
    assert most_confident(logits, 2, torch.tensor([0])).tolist() == [1, 2]


def test_the_approximate_search_reports_its_recall() -> None:
    """With all components it is exact; with one of many it is not."""
    anchors, pool = drawn(10, 16, 0), drawn(300, 16, 1)
    draws = torch.Generator().manual_seed(0)
    found, recall = approximate_query(anchors, pool, 5, dimensions=16, generator=draws)
    assert recall == 1.0
    assert found.chosen.tolist() == query(anchors, pool, 5).chosen.tolist()
    assert approximate_query(anchors, pool, 5, dimensions=1, generator=draws)[1] < 0.9
    # Components are of what is left without the mean: features in a plane far from the origin need two.
    plane = drawn(2, 16, 2)
    flat, far = drawn(10, 2, 3) @ plane + 100, drawn(300, 2, 4) @ plane + 100
    assert approximate_query(flat, far, 5, dimensions=2, generator=draws)[1] == 1.0


def test_the_approximate_search_obeys_the_same_options() -> None:
    """With all components it is the exact one, whatever that is asked for."""
    anchors, pool = drawn(6, 4, 0), drawn(30, 4, 1) * torch.rand(30, 1, dtype=torch.float64)
    for how in ({"metric": "cosine"}, {"order": "round_robin"}, {"max_total": 7}, {"exclude": torch.arange(26)}):
        found, recall = approximate_query(anchors, pool, 5, dimensions=4, **how)
        assert found.indices.tolist() == query(anchors, pool, 5, **how).indices.tolist()
        assert recall == 1.0


def test_without_replacement_also_where_distances_overflow() -> None:
    """Half features are compared in single precision; what is not finite there is refused."""
    anchors, pool = 300 * drawn(2, 3, 0), 300 * drawn(10, 3, 1)
    assert len(set(query(anchors.half(), pool.half(), 5).indices.tolist())) == 10
    for bad in (float("nan"), float("inf"), 1e25):
        spoilt = pool.float().clone()
        spoilt[3, 1] = bad
        for metric in ("l2", "cosine"):
            with pytest.raises(UserError, match="not finite"):
                query(anchors.float(), spoilt, 5, metric=metric)
    with pytest.raises(UserError, match="max_total"):
        query(anchors, pool, 5, max_total=-1)


def test_features_with_gradients_are_searched() -> None:
    anchors, pool = drawn(2, 3, 0).requires_grad_(), drawn(10, 3, 1).requires_grad_()
    assert query(anchors, pool, 2).indices.tolist() == slow(anchors, pool, 2)
