"""The protocol (sections 2.1 and 9): class orders, tasks, incremental labels, and the numbers that are reported."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tenfold_shared.errors import UserError

CIFAR10_ORDER = (9, 8, 7, 1, 5, 0, 3, 4, 6, 2)

ByClass = Sequence[Tensor]
"""Images of every class, by its original number: [n_k, c, h, w] each."""


def draws(seed: int) -> np.random.RandomState:
    """NumPy's generator of a seed, of which it takes 32 bits."""
    return np.random.RandomState(seed % 2**32)


def check_order(order: Sequence[int], classes: int, where: str) -> tuple[int, ...]:
    """The order as integers. UserError unless it is a permutation of 0..classes-1."""
    given = tuple(int(value) for value in order)
    if sorted(given) != list(range(classes)):
        missing = sorted(set(range(classes)) - set(given))
        twice = sorted({value for value in given if given.count(value) > 1})
        strange = sorted(set(given) - set(range(classes)))
        what = [f"lacks {missing[:5]}"] * bool(missing) + [f"repeats {twice[:5]}"] * bool(twice)
        what += [f"has {strange[:5]}, which are no classes"] * bool(strange)
        raise UserError(
            f"{where}: the class order is no permutation of 0..{classes - 1}: it {' and '.join(what)}; write every "
            "class once"
        )
    return given


def class_order(choice: str, data: str, classes: int, seed: int) -> tuple[int, ...]:
    """The order in which classes come: `default`, `natural`, `random` (by the seed), numbers such as 3,1,0,2, or a file.

    The default is the released one for CIFAR-10, that of RandomState(1993), usual in the field, for CIFAR-100 (the
    release drew its own unseeded), and random by the seed otherwise. A file holds one number a line, floats allowed.
    """
    if choice == "natural":
        return tuple(range(classes))
    if choice == "default" and data in ("cifar10", "cifar10-jpeg") and classes == 10:
        return CIFAR10_ORDER
    if choice == "default" and data == "cifar100" and classes == 100:
        return tuple(int(k) for k in np.random.RandomState(1993).permutation(100))
    if choice in ("default", "random"):
        return tuple(int(k) for k in draws(seed).permutation(classes))
    try:
        try:  # a list first: one of a hundred classes is too long for the name of a file
            numbers = [float(word) for word in choice.split(",")]
        except ValueError:
            numbers = [float(word) for word in Path(choice).read_text(encoding="utf-8").split()]
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--data.class_order {choice}: default, natural, random, numbers such as 3,1,0,2 or a file with one number a "
            f"line are taken ({error})"
        ) from error
    if not all(number.is_integer() for number in numbers):
        raise UserError(f"--data.class_order {choice}: a class is a whole number")
    return check_order([int(number) for number in numbers], classes, f"--data.class_order {choice}")


def classes_of(order: Sequence[int], task: int, classes_per_task: int) -> tuple[int, ...]:
    """The original classes of a task, in the order of their incremental labels."""
    return tuple(order[task * classes_per_task : (task + 1) * classes_per_task])


class Samples(NamedTuple):
    """Images [n, c, h, w] and their incremental labels [n]."""

    images: Tensor
    labels: Int[Tensor, " n"]

    def __len__(self) -> int:
        return self.images.shape[0]


def task_samples(split: ByClass, order: Sequence[int], first: int, last: int) -> Samples:
    """The images of incremental classes first..last-1, class after class: the incremental label is the position in the
    order. UserError for a class without images.
    """
    empty = [order[label] for label in range(first, last) if len(split[order[label]]) == 0]
    if empty:
        raise UserError(
            f"class {empty[0]} (incremental label {list(order).index(empty[0])}) has no images: its task lacks a class; "
            "check the data set or take fewer classes"
        )
    images = torch.cat([split[order[label]] for label in range(first, last)])
    sizes = torch.tensor([len(split[order[label]]) for label in range(first, last)])
    return Samples(images, torch.arange(first, last).repeat_interleave(sizes))


def new_samples(split: ByClass, order: Sequence[int], task: int, classes_per_task: int) -> Samples:
    """N: a task's own images."""
    return task_samples(split, order, task * classes_per_task, (task + 1) * classes_per_task)


def saved_samples(anchors: ByClass, order: Sequence[int], task: int, classes_per_task: int) -> Samples:
    """A: the anchors of all earlier tasks, in class order, then storage order."""
    return task_samples(anchors, order, 0, task * classes_per_task)


def seen_samples(split: ByClass, order: Sequence[int], task: int, classes_per_task: int) -> Samples:
    """The images of every class seen up to a task, its own included."""
    return task_samples(split, order, 0, (task + 1) * classes_per_task)


# --- what is reported ----------------------------------------------------------------------------------------------------


class Summary(NamedTuple):
    """The figures of an accuracy matrix, in per cent."""

    last: float
    """Mean over the tasks after the last one."""
    average: float
    """Mean over the states of their means: average incremental accuracy."""
    forgetting: float
    """Mean over the earlier tasks of their best accuracy before the end minus that at the end."""
    backward_transfer: float
    """Mean over the earlier tasks of their accuracy at the end minus that right after they were learned."""


def summarise_matrix(matrix: Sequence[Sequence[float]]) -> Summary:
    """From a[t][j], % on task j after task t, j <= t."""
    final, earlier = matrix[-1], range(len(matrix) - 1)
    last = float(np.mean(final))
    average = float(np.mean([np.mean(row) for row in matrix]))
    if not earlier:
        return Summary(last, average, 0.0, 0.0)
    best = [max(matrix[t][j] for t in range(j, len(matrix) - 1)) for j in earlier]
    forgetting = float(np.mean([best[j] - final[j] for j in earlier]))
    backward = float(np.mean([final[j] - matrix[j][j] for j in earlier]))
    return Summary(last, average, forgetting, backward)
