"""Attacks of AutoAttack's strength on margins (sections 2.6 and 9): APGD with the cross entropy, DLR and its targeted
form, and the verifier's multi-target attack with Adam-signed steps.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tenfold_shared.attacks import apgd, held, input_gradient, pgd, targeted_dlr

Model = Callable[[Tensor], Tensor]


def dlr(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """The difference of logits ratio: -(z_y - max_other) / (z_1st - z_3rd)."""
    ordered = logits.sort(dim=1).values
    own = logits.gather(1, labels[:, None])[:, 0]
    right = ordered[:, -1] == own
    other = torch.where(right, ordered[:, -2], ordered[:, -1])
    return -(own - other) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


def robust_mask(
    model: nn.Module,
    images: Float[Tensor, "batch *input"],
    labels: Int[Tensor, " batch"],
    eps: float,
    *,
    kind: Literal["pgd", "auto"] = "pgd",
    steps: int = 100,
    restarts: int = 5,
    step: float | None = None,
) -> Bool[Tensor, " batch"]:
    """Which images keep their label under every attack of a kind.

    ``pgd`` climbs the cross entropy from several random starts, with steps of eps/4 unless given; ``auto`` runs APGD
    on the cross entropy, on DLR (from three classes on), and on targeted DLR for every other class (from four on). What has fallen is not attacked again.
    """
    with held(model), torch.no_grad():
        robust = model(images).argmax(1) == labels

    def attack(find: Callable[[Tensor, Tensor], Tensor]) -> None:
        (left,) = robust.nonzero(as_tuple=True)
        if len(left):
            bad = find(images[left], labels[left])
            with torch.no_grad():
                robust[left] = model(bad).argmax(1) == labels[left]

    with torch.no_grad():
        classes = model(images[:1]).shape[1]
    length = eps / 4 if step is None else step
    with held(model):
        for _ in range(restarts):
            if kind == "pgd":
                attack(lambda x, y: x + pgd(_loss(model, y), x, eps=eps, step_size=length, steps=steps))
                continue
            attack(
                lambda x, y: apgd(lambda z: cross_entropy(model(z), y, reduction="none"), x, eps=eps, steps=steps)[0]
            )
            if classes >= 3:
                attack(lambda x, y: apgd(lambda z: dlr(model(z), y), x, eps=eps, steps=steps)[0])
        if kind == "auto" and classes >= 4:
            for rank in range(1, classes):
                attack(partial(_targeted, model, eps=eps, steps=steps, rank=rank))
    return robust


def _loss(model: nn.Module, labels: Tensor) -> Model:
    return lambda images: cross_entropy(model(images), labels)


def _targeted(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, rank: int) -> Tensor:
    """APGD towards the wrong class of a rank."""
    with torch.no_grad():
        logits = model(x).scatter(1, y[:, None], -torch.inf)
    target = logits.sort(dim=1, descending=True).indices[:, rank - 1]
    return apgd(lambda z: targeted_dlr(model(z), y, target), x, eps=eps, steps=steps)[0]


def margin_attack(
    margins: Model,
    lower: Float[Tensor, "*input"],
    upper: Float[Tensor, "*input"],
    *,
    steps: int = 100,
    restarts: int = 5,
    step: float | None = None,
    decay: float = 0.99,
    generator: torch.Generator | None = None,
    deadline: float = float("inf"),
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows *input"]]:
    """The smallest margin found for every row of a property over a box, and where: each row is attacked by itself.

    Args:
        margins: inputs [batch, *input] to margins [batch, rows].
        lower: the box.
        upper: the box.
        steps: Adam-signed steps.
        restarts: random starts.
        step: first step length; default: an eighth of the widest side (eps/4 of a ball).
        decay: factor on it after every step.
        generator: of the starts.
        deadline: no step is made once `time.monotonic` is past it.

    """
    with torch.no_grad():
        rows = margins(lower[None]).shape[1]
    length = float((upper - lower).max()) / 8 if step is None else step
    places = torch.arange(rows, device=lower.device).repeat(restarts)
    draws = torch.rand((len(places), *lower.shape), generator=generator, dtype=torch.float64).to(lower)
    x = lower + draws * (upper - lower)
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    best = torch.full((len(places),), torch.inf, dtype=lower.dtype, device=lower.device)
    where = x.clone()
    for i in range(steps + 1):
        seen: list[Tensor] = []

        def objective(z: Tensor, seen: list[Tensor] = seen) -> Tensor:
            value = margins(z).gather(1, places[:, None])[:, 0]
            seen.append(value.detach())
            return -value

        gradient = input_gradient(objective, x)
        better = seen[0] < best
        best = torch.where(better, seen[0], best)
        where = torch.where(better.view(-1, *(1 for _ in lower.shape)), x, where)
        if bool((best < 0).any()) or i == steps or time.monotonic() > deadline:
            break
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        scaled = (first / (1 - 0.9 ** (i + 1))) / ((second / (1 - 0.999 ** (i + 1))).sqrt() + 1e-12)
        x = torch.minimum(torch.maximum(x + length * scaled.sign(), lower), upper)
        length *= decay
    lowest = best.view(restarts, rows).min(0)
    chosen = where.view(restarts, rows, *lower.shape)[lowest.indices, torch.arange(rows, device=lower.device)]
    return lowest.values, chosen
