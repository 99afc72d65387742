"""The objective of CIL-QUD (section 2.4): class-balanced and random cross entropy, and learning without forgetting.

    min  E_CB[CE(main(x), y)] + E_RS[CE(aux(x), y)] + lambda [L_LwF(theta, main) + L_LwF(theta, aux)]

Losses are values a sample, so that any split of a batch over processes adds up to the same mean.
"""

import dataclasses
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, log_softmax, pad, softmax

from tenfold_cilqud.models import Head, IncrementalNet, counted_twice

Terms = dict[str, Tensor]
"""Weighted terms of a loss by name; the loss is their sum."""
Distance = Literal["l2", "mse", "cosine", "l1"]


class Labelled(NamedTuple):
    """Labelled images of this process; `total` is the size of the whole batch over the number of processes."""

    x: Float[Tensor, "b c h w"]
    y: Int[Tensor, " b"]
    total: float
    attacked: Float[Tensor, "b c h w"] | None = None
    """Worst-case images, where the loss compares them with the clean ones (TRADES)."""


class Answered(NamedTuple):
    """Unlabeled images with the frozen previous model's answers: raw logits of both heads, old classes, and features."""

    x: Float[Tensor, "b c h w"]
    main: Float[Tensor, "b k"]
    aux: Float[Tensor, "b k"]
    features: Float[Tensor, "b d"]
    total: float


# --- learning without forgetting ---------------------------------------------------------------------------------------


def knowledge_distillation(
    student: Float[Tensor, "b m"], teacher: Float[Tensor, "b k"], temperature: float = 2.0, factor: float | None = None
) -> Float[Tensor, " b"]:
    """KD(s, q; T) = -T^2 sum_j softmax(q/T)_j log_softmax(s/T)_j, a value a sample (section 2.2).

    A cross entropy, not a divergence: its minimum is T^2 H(softmax(q/T)). A student with more columns than the teacher
    is compared with the teacher's probabilities padded by zeros. `factor` replaces T^2. No gradient reaches the teacher.
    """
    target = softmax(teacher.detach() / temperature, 1)
    target = pad(target, (0, student.shape[1] - teacher.shape[1]))
    scale = temperature**2 if factor is None else factor
    return -scale * (target * log_softmax(student / temperature, 1)).sum(1)


def feature_transfer(
    student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"], distance: Distance = "mse"
) -> Float[Tensor, " b"]:
    """FT(phi(theta, x), phi(theta_hat, x)), a value a sample: the backbone alone is held (section 2.4)."""
    teacher = teacher.detach()
    if distance == "cosine":
        return 1 - cosine_similarity(student, teacher, dim=1)
    difference = student - teacher
    if distance == "l1":
        return difference.abs().sum(1)
    squared = difference.square()
    return squared.sum(1) if distance == "l2" else squared.mean(1)


# --- balance -----------------------------------------------------------------------------------------------------------


class Composition(NamedTuple):
    """Sizes of an incremental step's batches, and the weights of the class-balanced loss's two parts."""

    sub_batch: int
    new: int
    old: int
    weight_new: float
    weight_old: float


def batch_composition(batch_size: int, old_tasks: int, sub_batch: int = 0) -> Composition:
    """Batches of a step with `old_tasks` tasks learned before: s = batch_size // 4 unless `sub_batch` is given.

    b_new = floor(s / (1 + t)) and b_old = floor(s t / (1 + t)), weighted by b/s. The floors make the weights add up to
    less than 1 where s does not divide; a part that would be empty gets one sample. ValueError where s is 0.
    """
    size = sub_batch or batch_size // 4
    if size < 1:
        raise ValueError(f"a quarter of a batch of {batch_size} is no image: take 4 or more, or a sub_batch")
    new, old = size // (1 + old_tasks), size * old_tasks // (1 + old_tasks)
    new, old = max(new, 1), max(old, 1)
    return Composition(size, new, old, new / size, old / size)


@dataclasses.dataclass(frozen=True)
class Weights:
    """What the terms of an incremental step are multiplied with; the released code's by default."""

    aux: float = 1.0
    main: float = 0.5
    lwf: float = 1.0
    temperature: float = 2.0
    kd_factor: float | None = None
    """What distillation is multiplied with in place of T^2."""
    distance: Distance = "mse"
    trades: float = 6.0


def classification(
    net: IncrementalNet, batch: Labelled, tasks: int, head: Head, trades: float = 6.0
) -> tuple[Tensor, Float[Tensor, "b k"]]:
    """Mean cross entropy over a batch, and the logits; with worst-case images beside the clean ones the TRADES loss
    CE(clean) + beta KL(clean || attacked).
    """
    logits = net(batch.x, tasks, head)
    loss = cross_entropy(logits, batch.y, reduction="sum")
    if batch.attacked is not None:
        loss = loss + trades * consistency(logits, net(batch.attacked, tasks, head)).sum()
    return loss / batch.total, logits


def consistency(clean: Float[Tensor, "b k"], attacked: Float[Tensor, "b k"]) -> Float[Tensor, " b"]:
    """KL(softmax(clean) || softmax(attacked)), a value a sample."""
    log_clean = log_softmax(clean, 1)
    return (log_clean.exp() * (log_clean - log_softmax(attacked, 1))).sum(1)


# --- the objective -----------------------------------------------------------------------------------------------------


def first_task_terms(net: IncrementalNet, batch: Labelled, trades: float = 6.0) -> tuple[Terms, Float[Tensor, "b k"]]:
    """Task 0: CE(main(x), y) + CE(aux(x), y) on the same batch, which counts twice in the batch norms' statistics.

    Returns the terms and the primary logits.
    """
    with counted_twice(net):
        features = net.features(batch.x)
    logits = net.logits(features, 1, "main")
    main = cross_entropy(logits, batch.y, reduction="sum")
    aux = cross_entropy(net.logits(features, 1, "aux"), batch.y, reduction="sum")
    if batch.attacked is not None:
        attacked = net.features(batch.attacked)
        main = main + trades * consistency(logits, net.logits(attacked, 1, "main")).sum()
        answers = net.logits(features, 1, "aux")
        aux = aux + trades * consistency(answers, net.logits(attacked, 1, "aux")).sum()
    return {"main": main / batch.total, "aux": aux / batch.total}, logits


def random_term(
    net: IncrementalNet, batch: Labelled, tasks: int, weights: Weights
) -> tuple[Tensor, Float[Tensor, "b k"]]:
    """L_rs: cross entropy of the auxiliary head on a random batch of new data and anchors."""
    loss, logits = classification(net, batch, tasks, "aux", weights.trades)
    return weights.aux * loss, logits


def balanced_term(net: IncrementalNet, parts: list[tuple[float, Labelled]], tasks: int, weights: Weights) -> Tensor:
    """L_cb: cross entropy of the primary head on class-balanced data, a weighted sum over separately passed parts."""
    losses = [share * classification(net, batch, tasks, "main", weights.trades)[0] for share, batch in parts]
    return weights.main * torch.stack(losses).sum()


def distillation_terms(
    net: IncrementalNet, batch: Answered, old_tasks: int, weights: Weights, heads: tuple[Head, ...] = ("aux", "main")
) -> Terms:
    """L_LwF by KD on unlabeled images, both heads: the student's logits are cut to the old classes before the softmax.

    One pass serves both heads and counts twice in the batch norms' statistics, as the two passes of the release do.
    """
    if len(heads) == 2:
        with counted_twice(net):
            features = net.features(batch.x)
    else:
        features = net.features(batch.x)
    terms: Terms = {}
    for head in heads:
        answers = batch.aux if head == "aux" else batch.main
        student = net.logits(features, old_tasks, head)
        values = knowledge_distillation(student, answers, weights.temperature, weights.kd_factor)
        scale = weights.lwf * (weights.aux if head == "aux" else weights.main)
        terms[f"kd_{head}"] = scale * values.sum() / batch.total
    return terms


def transfer_term(net: IncrementalNet, batch: Answered, weights: Weights) -> Tensor:
    """L_LwF by FT on unlabeled images."""
    values = feature_transfer(net.features(batch.x), batch.features, weights.distance)
    return weights.lwf * values.sum() / batch.total
