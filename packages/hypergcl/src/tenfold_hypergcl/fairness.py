"""Fairness of binary predictions with respect to a sensitive attribute (section 9)."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def _rate(predicted: Tensor, among: Tensor, what: str) -> float:
    if not bool(among.any()):
        warnings.warn(f"No test node {what}: the gap is undefined.", stacklevel=3)
        return math.nan
    return float(predicted[among].double().mean())


def statistical_parity(
    predicted: Int[Tensor, "nodes"], sensitive: Int[Tensor, "nodes"] | Float[Tensor, "nodes"]
) -> float:
    """``|P(yhat = 1 | s = 0) - P(yhat = 1 | s = 1)|`` in [0, 1]; NaN with a warning where a group is empty."""
    rates = [_rate(predicted == 1, sensitive == group, f"has the sensitive value {group}") for group in (0, 1)]
    return abs(rates[0] - rates[1])


def equal_opportunity(
    predicted: Int[Tensor, "nodes"],
    labels: Int[Tensor, "nodes"],
    sensitive: Int[Tensor, "nodes"] | Float[Tensor, "nodes"],
) -> float:
    """``|P(yhat = 1 | y = 1, s = 0) - P(yhat = 1 | y = 1, s = 1)|``; NaN with a warning where a group has no positive."""
    rates = [
        _rate(predicted == 1, (sensitive == group) & (labels == 1), f"has label 1 and the sensitive value {group}")
        for group in (0, 1)
    ]
    return abs(rates[0] - rates[1])


def counterfactual_flips(
    predict: Callable[[Tensor], Tensor],
    x: Float[Tensor, "nodes features"],
    sensitive_column: int,
    nodes: Int[Tensor, "test"],
) -> float:
    """The share of ``nodes`` whose prediction changes when the sensitive column ``s`` of *all* nodes becomes ``1 - s``.

    ``predict`` maps features to class ids; the structure does not change.
    """
    flipped = x.clone()
    flipped[:, sensitive_column] = 1 - flipped[:, sensitive_column]
    return float((predict(x)[nodes] != predict(flipped)[nodes]).double().mean())


def binary_scores(logits: Float[Tensor, "nodes 2"], labels: Int[Tensor, "nodes"]) -> dict[str, float]:
    """F1 of class 1, ROC-AUC of its probability and the negative log-likelihood."""
    from sklearn.metrics import f1_score, roc_auc_score  # noqa: PLC0415 - slow to import

    truth = labels.cpu().numpy()
    probability = torch.softmax(logits.double(), 1)[:, 1].cpu().numpy()
    both = bool(np.unique(truth).size == 2)
    return {
        "f1": float(f1_score(truth, logits.argmax(1).cpu().numpy(), zero_division=0)),
        "auc": float(roc_auc_score(truth, probability)) if both else math.nan,
        "nll": float(torch.nn.functional.cross_entropy(logits, labels)),
    }


def rescale(
    features: Float[np.ndarray, "nodes features"], sensitive_column: int
) -> Float[np.ndarray, "nodes features"]:
    """Every column min-max scaled to [-1, 1], but for the sensitive one, which stays raw 0/1 (section 5); constant columns become -1."""
    low, high = features.min(0), features.max(0)
    scaled = 2 * (features - low) / np.where(high > low, high - low, 1) - 1
    scaled[:, sensitive_column] = features[:, sensitive_column]
    return scaled


def nearest_others(features: Float[np.ndarray, "nodes features"], k: int = 5) -> Int[np.ndarray, "2 memberships"]:
    """One hyperedge per person with the ``k`` nearest others (section 5), sorted by hyperedge, then member.

    All ties of the ``(k + 1)``-th nearest, the person counted, stay, and the person is no member. A KD-tree, not an N x N matrix.
    """
    from sklearn.neighbors import KDTree  # noqa: PLC0415 - slow to import

    tree = KDTree(features)
    distance, _ = tree.query(features, k=k + 1)
    # A hair more than the (k + 1)-th distance: ties differ by rounding only.
    members = tree.query_radius(features, distance[:, -1] * (1 + 1e-9) + 1e-12)
    owners = np.repeat(np.arange(len(features)), [len(m) for m in members])
    nodes = np.concatenate(members)
    incidence = np.stack([nodes, owners])[:, nodes != owners]
    return incidence[:, np.lexsort((incidence[0], incidence[1]))]
