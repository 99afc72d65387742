"""Choosing the neurons that are grafted (section 2.3): ranks of instability against ranks of significance."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tenfold_shared.checkpoint import load_pickled
from tenfold_shared.errors import UserError

Rank = Literal["min", "dense", "norank"]
Scope = Literal["global", "local"]
Masks = dict[str, Tensor]

GAMMAS = (2.0, 1.5, 1.0, 0.0)
"""The weight of instability in the four rounds, in which an eighth of all neurons is chosen each."""


def ranked(scores: Float[Tensor, " n"], rule: Rank = "min") -> Float[Tensor, " n"]:
    """Scores as ranks in [0, 1]; 0 throughout where all scores are equal.

    Args:
        scores: of all neurons.
        rule: ``min`` gives equal scores the lowest of their ranks, ``dense`` numbers the distinct scores, ``norank``
            keeps the scores, shifted and scaled.

    Raises:
        UserError: scores that are not finite.

    """
    values = scores.double()
    if not bool(torch.isfinite(values).all()):
        raise UserError("scores of neurons are not finite: the network they come from has diverged")
    if rule == "norank":
        spread = values.max() - values.min()
        return (values - values.min()) / spread if spread > 0 else torch.zeros_like(values)
    distinct, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    if rule == "dense":
        ranks = torch.arange(len(distinct), dtype=torch.float64, device=values.device)
    elif rule == "min":
        ranks = (counts.cumsum(0) - counts).double()
    else:
        raise ValueError(f"there is no tie rule {rule!r}: use min, dense or norank")
    found = ranks[place]
    return found / found.max() if found.max() > 0 else found


def decaying_selection(
    unstable: Float[Tensor, " n"],
    significant: Float[Tensor, " n"],
    ratio: float = 0.5,
    gammas: Sequence[float] = GAMMAS,
) -> Float[Tensor, " n"]:
    """The mask of the neurons with the largest gamma * unstable - significant, in as many rounds as there are gammas.

    Every round chooses the same share of all neurons from those that are left; an infinite gamma looks at instability
    alone.

    Args:
        unstable: r_u, ranks of the instability.
        significant: r_s, ranks of the significance.
        ratio: share of the neurons that is chosen in the end.
        gammas: weights, in the order of the rounds.

    """
    if not 0 <= ratio <= 1 or not gammas:
        raise ValueError(f"the ratio is {ratio} and the gammas are {list(gammas)}: a share and at least one are needed")
    count = len(unstable)
    mask = torch.zeros(count, dtype=torch.float64, device=unstable.device)
    for number, gamma in enumerate(gammas, 1):
        score = unstable.clone() if gamma == float("inf") else gamma * unstable - significant
        score[mask > 0] = -torch.inf
        wanted = round(ratio * count * number / len(gammas)) - int(mask.sum())
        mask[torch.argsort(score, descending=True, stable=True)[:wanted]] = 1
    return mask


def select_neurons(
    instability: Mapping[str, Tensor],
    significance: Mapping[str, Tensor],
    ratio: float = 0.5,
    *,
    gammas: Sequence[float] = GAMMAS,
    rank: Rank = "min",
    scope: Scope = "global",
) -> Masks:
    """The grafting masks of the paper's criterion: activation's name -> mask, 1 on neurons that become lines.

    Args:
        instability: u, of every activation.
        significance: s, of the same.
        ratio: share of grafted neurons.
        gammas: see `decaying_selection`; (0,) is insignificance alone, (inf,) instability alone.
        rank: how scores become ranks.
        scope: ranks and shares over all layers together, or by layer.

    """
    names = list(instability)
    if scope == "local":
        return {name: _select([name], instability, significance, ratio, gammas, rank)[name] for name in names}
    return _select(names, instability, significance, ratio, gammas, rank)


def _select(
    names: Sequence[str],
    instability: Mapping[str, Tensor],
    significance: Mapping[str, Tensor],
    ratio: float,
    gammas: Sequence[float],
    rank: Rank,
) -> Masks:
    unstable = ranked(_flat([instability[name] for name in names]), rank)
    significant = ranked(_flat([significance[name] for name in names]), rank)
    return _split(decaying_selection(unstable, significant, ratio, gammas), names, instability)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _split(mask: Tensor, names: Sequence[str], like: Mapping[str, Tensor]) -> Masks:
    parts = mask.split([like[name].numel() for name in names])
    return {name: part.view(like[name].shape) for name, part in zip(names, parts, strict=True)}


def random_selection(shapes: Mapping[str, Sequence[int]], ratio: float, generator: torch.Generator) -> Masks:
    """Masks that graft a random share of all neurons."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"the ratio is {ratio}, not a share in [0, 1]")
    like = {name: torch.zeros(tuple(shape)) for name, shape in shapes.items()}
    count = sum(tensor.numel() for tensor in like.values())
    mask = torch.zeros(count, dtype=torch.float64)
    mask[torch.randperm(count, generator=generator)[: round(ratio * count)]] = 1
    return _split(mask, list(like), like)


def keep_masks(scores: Mapping[str, Tensor], remain: float, scope: Scope = "global") -> Masks:
    """The released single-score masks, 1 on the int(n * remain) neurons of the largest score, which stay ReLUs."""
    names = list(scores)
    if scope == "local":
        return {name: keep_masks({name: scores[name]}, remain)[name] for name in names}
    flat = _flat([scores[name] for name in names])
    mask = torch.zeros_like(flat)
    count = int(len(flat) * remain)
    if count:
        mask[torch.argsort(flat, stable=True)[-count:]] = 1
    return _split(mask, names, scores)


def overlap(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, float]:
    """Jaccard index of two masks by layer, and of all layers under ``all``."""
    pairs = {name: (first[name].flatten() > 0, second[name].flatten() > 0) for name in first}
    pairs["all"] = (torch.cat([a for a, _ in pairs.values()]), torch.cat([b for _, b in pairs.values()]))
    return {name: float((a & b).sum()) / max(1.0, float((a | b).sum())) for name, (a, b) in pairs.items()}


def load_masks(path: Path, shapes: Mapping[str, Sequence[int]]) -> Masks:
    """The masks of a file for the activations of a network, in forward order.

    Args:
        path: a released ``.pt`` (a list of tensors, one an activation), or a ``.npz`` of packed bits
            (``mask0``, ... and their ``shapes`` as JSON).
        shapes: of the neurons of every activation, in forward order.

    Raises:
        UserError: unreadable, or masks that do not fit the network.

    """
    if not path.is_file():
        raise UserError(f"no mask file at {path}: check the path")
    tensors = _packed_masks(path) if path.suffix == ".npz" else _released_masks(path)
    wanted = [tuple(shape) for shape in shapes.values()]
    found = [tuple(tensor.shape) for tensor in tensors]
    if found != wanted:
        raise UserError(f"{path} has masks of shapes {found}, the network's activations have {wanted}")
    return {name: tensor.float() for name, tensor in zip(shapes, tensors, strict=True)}


def _released_masks(path: Path) -> list[Tensor]:
    content = load_pickled(path)
    if not isinstance(content, list | tuple) or not all(isinstance(item, Tensor) for item in content):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a list of masks")
    return [item.detach() for item in content]


def _packed_masks(path: Path) -> list[Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            shapes = json.loads(str(file["shapes"].reshape(-1)[0]))
            bits = [np.unpackbits(file[f"mask{i}"])[: int(np.prod(shape))] for i, shape in enumerate(shapes)]
        return [torch.from_numpy(m.reshape(shape).astype(np.float32)) for m, shape in zip(bits, shapes, strict=True)]
    except Exception as error:  # numpy raises a different type for each way in which a file can be broken
        raise UserError(f"{path} is no readable mask file ({str(error).partition(chr(10))[0][:120]})") from error


def save_masks(path: Path, masks: Mapping[str, Tensor]) -> None:
    """Write masks in the released layout: a list of float tensors, one an activation, in forward order."""
    torch.save([mask.detach().cpu().float() for mask in masks.values()], path)
