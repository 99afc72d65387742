"""Class orders, tasks, the reported figures, anchors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold_cilqud import class_order, herding, k_center, nearest_mean, summarise_matrix
from tenfold_cilqud.anchors import choose_anchors, class_means, random_anchors
from tenfold_cilqud.protocol import CIFAR10_ORDER, classes_of, new_samples, saved_samples, seen_samples
from tenfold_shared.errors import UserError


def test_orders() -> None:
    assert class_order("default", "cifar10", 10, 3) == CIFAR10_ORDER
    assert class_order("default", "cifar100", 100, 3)[:5] == (68, 56, 78, 8, 23)  # the usual order of the field
    assert class_order("natural", "cifar10", 10, 0) == tuple(range(10))
    assert class_order("random", "folder", 6, 1) != class_order("random", "folder", 6, 2)
    assert class_order("3,1,0,2", "folder", 4, 0) == (3, 1, 0, 2)


def test_a_list_of_a_hundred_classes_is_an_order() -> None:
    assert class_order(",".join(map(str, range(100))), "cifar100", 100, 0) == tuple(range(100))


@pytest.mark.parametrize("seed", [-1, 10**6, 2**40])
def test_any_seed_draws(seed: int) -> None:
    assert sorted(class_order("random", "folder", 6, seed)) == list(range(6))
    assert len(random_anchors(9, 4, seed, 3)) == 4


def test_an_order_from_a_file_may_have_floats(tmp_path: Path) -> None:
    (tmp_path / "order.txt").write_text("2.0\n0.0\n1.0\n")
    assert class_order(str(tmp_path / "order.txt"), "folder", 3, 0) == (2, 0, 1)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("0,1,1", "lacks \\[2\\] and repeats \\[1\\]"),
        ("0,1,5", "which are no classes"),
        ("0,1.5,2", "whole"),
        ("a,b,c", "numbers"),
        ("nan,1,2", "whole"),
        ("inf,1,2", "whole"),
    ],
)
def test_what_is_no_permutation_is_refused(choice: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        class_order(choice, "folder", 3, 0)


def test_incremental_labels_are_positions_in_the_order() -> None:
    split = [torch.full((2 + label, 1, 2, 2), label) for label in range(4)]
    order = (2, 0, 3, 1)
    assert [classes_of(order, task, 2) for task in range(2)] == [(2, 0), (3, 1)]
    new = new_samples(split, order, 1, 2)
    assert new.labels.tolist() == [2] * 5 + [3] * 3
    assert new.images[:, 0, 0, 0].tolist() == [3] * 5 + [1] * 3
    assert saved_samples(split, order, 1, 2).labels.tolist() == [0] * 4 + [1] * 2
    assert seen_samples(split, order, 1, 2).labels.tolist() == [0] * 4 + [1] * 2 + [2] * 5 + [3] * 3


def test_a_task_that_lacks_a_class_is_refused() -> None:
    split = [torch.zeros(2, 1, 2, 2), torch.zeros(0, 1, 2, 2)]
    with pytest.raises(UserError, match="class 1"):
        new_samples(split, (0, 1), 0, 2)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(0, 99))
def test_figures_of_a_matrix(tasks: int, seed: int) -> None:
    draw = np.random.RandomState(seed)
    matrix = [[float(value) for value in 100 * draw.rand(t + 1)] for t in range(tasks)]
    found = summarise_matrix(matrix)
    assert found.last == pytest.approx(sum(matrix[-1]) / tasks)
    assert found.average == pytest.approx(sum(sum(row) / len(row) for row in matrix) / tasks)
    lost, moved = [], []
    for j in range(tasks - 1):
        lost.append(max(matrix[t][j] for t in range(j, tasks - 1)) - matrix[-1][j])
        moved.append(matrix[-1][j] - matrix[j][j])
    assert found.forgetting == pytest.approx(sum(lost) / max(1, len(lost)))
    assert found.backward_transfer == pytest.approx(sum(moved) / max(1, len(moved)))
    assert found.forgetting >= -found.backward_transfer - 1e-9


def test_herding_against_a_loop() -> None:
    features = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unit = features / (features.norm(dim=1, keepdim=True) + 1e-8)
    chosen: list[int] = []
    for k in range(1, 9):
        gaps = {
            i: float((unit.mean(0) - (unit[i] + unit[chosen].sum(0)) / k).norm()) for i in range(30) if i not in chosen
        }
        chosen.append(min(gaps, key=gaps.__getitem__))
    assert herding(features, 8).tolist() == chosen
    assert len(herding(features[:3], 8)) == 3


def test_k_center_covers() -> None:
    clusters = torch.cat([torch.randn(10, 2) * 0.01 + 10 * torch.tensor([[float(i), float(i % 2)]]) for i in range(4)])
    assert {int(i) // 10 for i in k_center(clusters, 4)} == {0, 1, 2, 3}


def test_k_center_takes_no_image_twice() -> None:
    assert sorted(k_center(torch.ones(4, 2), 3).tolist()) == [0, 1, 2]
    assert len(k_center(torch.ones(4, 2), 0)) == 0


def test_random_anchors_are_the_first_of_a_permutation() -> None:
    assert random_anchors(20, 5, 3, 4).tolist() == np.random.RandomState(7).permutation(20)[:5].tolist()
    assert choose_anchors("random", 20, 5, 3, 4).tolist() == random_anchors(20, 5, 3, 4).tolist()


def test_nearest_mean_takes_the_nearest() -> None:
    features, labels = torch.tensor([[1.0, 0.1], [0.9, 0.0], [0.0, 2.0]]), torch.tensor([0, 0, 1])
    means = class_means(features, labels, 2)
    torch.testing.assert_close(means.norm(dim=1), torch.ones(2))
    assert nearest_mean(torch.tensor([[5.0, 1.0], [0.1, 0.3]]), means).argmax(1).tolist() == [0, 1]
