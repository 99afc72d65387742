"""The evaluation protocol of the paper: splits, selection by validation, summaries over runs (sections 5 and 9)."""

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Node ids for training, validation and test."""

    train: Int[Tensor, "train"]
    valid: Int[Tensor, "valid"]
    test: Int[Tensor, "test"]

    def to(self, device: torch.device | str) -> "Split":
        """The split on another device."""
        return Split(self.train.to(device), self.valid.to(device), self.test.to(device))


def split_permutation(permutation: Int[Tensor, "labelled"], label_rate: float) -> Split:
    """The paper's split of a permutation of the labelled nodes (section 5).

    Up to a rate of 10 % training has the first ``int(N * rate)`` nodes, validation positions ``int(.1 N)`` to ``int(.2 N)``, test the
    rest; above, validation follows the training nodes up to ``int((rate + .1) N)``.
    """
    if not 0 < label_rate < 1:
        raise ValueError(f"A label rate lies between 0 and 1, not {label_rate}.")
    n = permutation.numel()
    train = int(n * label_rate)
    if label_rate <= 0.1:
        start, stop = int(0.1 * n), int(0.2 * n)
    else:
        start, stop = train, int((label_rate + 0.1) * n)
    return Split(permutation[:train], permutation[start:stop], permutation[stop:])


def random_splits(labels: Int[Tensor, "nodes"], label_rate: float, count: int, seed: int = 123) -> list[Split]:
    """``count`` independent splits of the labelled nodes (label -1 = none), drawn once from ``seed``.

    They are not stratified: at low rates a class may be absent from training, which is the protocol; a warning says so.

    Raises:
        ValueError: if a split would have no training node.
    """
    generator = torch.Generator().manual_seed(seed)
    labelled = torch.nonzero(labels.cpu() >= 0).squeeze(1)
    splits, lacking = [], 0
    classes = torch.unique(labels.cpu()[labelled])
    for _ in range(count):
        split = _draw(labelled, label_rate, generator)
        lacking += int(torch.unique(labels.cpu()[split.train]).numel() < classes.numel())
        splits.append(split)
    if lacking:
        warnings.warn(f"{lacking} of {count} splits have no training node of at least one class.", stacklevel=2)
    return splits


def numbered_split(labels: Int[Tensor, "nodes"], label_rate: float, number: int, seed: int = 123) -> Split:
    """The last of ``random_splits(labels, label_rate, number + 1, seed)``, without those before it in memory.

    Raises:
        ValueError: if it would have no training node.
    """
    generator = torch.Generator().manual_seed(seed)
    labelled = torch.nonzero(labels.cpu() >= 0).squeeze(1)
    for _ in range(number):
        torch.randperm(labelled.numel(), generator=generator)
    return _draw(labelled, label_rate, generator)


def _draw(labelled: Int[Tensor, "labelled"], label_rate: float, generator: torch.Generator) -> Split:
    split = split_permutation(labelled[torch.randperm(labelled.numel(), generator=generator)], label_rate)
    if split.train.numel() == 0:
        raise ValueError(
            f"A label rate of {label_rate} leaves none of the {labelled.numel()} labelled nodes for training: raise it."
        )
    return split


def stratified_split(labels: Int[Tensor, "nodes"], label_rate: float, generator: torch.Generator) -> Split:
    """The split of the fairness experiments (section 9): of each class the first ``label_rate`` train, 50-75 % validate, 75-100 % test.

    Raises:
        ValueError: for a rate at which training nodes would be validated on.
    """
    if not 0 < label_rate <= 0.5:
        raise ValueError(
            f"A stratified split trains on at most half of each class (the rest is held out), not on {label_rate}."
        )
    parts: list[list[Tensor]] = [[], [], []]
    for label in torch.unique(labels[labels >= 0]):
        nodes = torch.nonzero(labels == label).squeeze(1).cpu()
        nodes = nodes[torch.randperm(nodes.numel(), generator=generator)]
        n = nodes.numel()
        bounds = ((0, int(label_rate * n)), (int(0.5 * n), int(0.75 * n)), (int(0.75 * n), n))
        for part, (start, stop) in zip(parts, bounds, strict=True):
            part.append(nodes[start:stop])
    train, valid, test = (torch.cat(part) for part in parts)
    return Split(train, valid, test)


def accuracy(logits: Float[Tensor, "nodes classes"], labels: Int[Tensor, "nodes"]) -> Float[Tensor, ""]:
    """The share of nodes whose largest logit is their label's."""
    return (logits.argmax(1) == labels).to(torch.float64).mean()
