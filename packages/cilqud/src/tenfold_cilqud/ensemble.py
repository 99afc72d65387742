"""An ensemble of AutoAttack's four parts (Croce and Hein 2020, "Reliable evaluation of adversarial robustness").

In AutoAttack's order, each on the images that withstood those before it, so that the accuracy left is that under the
worst of all: Auto-PGD on the cross entropy; Auto-PGD on the targeted logit ratio and FAB towards each of the likeliest
wrong classes; Square, which needs no gradient. At its budget (100 steps, 9 classes, 5,000 queries) this is AutoAttack's
standard version; a smaller budget is a weaker test, and a result says with which it was made.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from tenfold_shared.attacks import apgd, project, targeted_dlr, value_and_gradient
from tenfold_shared.run import derived_seed

Score = Callable[[Tensor], Tensor]
Attack = Callable[..., Tensor]
"""Images [b, c, h, w], labels [b] and a generator to attacked images."""


def withstands_ensemble(
    score: Score,
    x: Float[Tensor, "b c h w"],
    y: Int[Tensor, " b"],
    alive: Bool[Tensor, " b"],
    *,
    eps: float,
    steps: int,
    targets: int,
    queries: int,
    seed: int,
) -> Bool[Tensor, " b"]:
    """Which of the images that are `alive` withstand every attack of the ensemble.

    Args:
        score: images in [0, 1] to logits [b, k].
        x: images.
        y: labels.
        alive: which images are right without an attack.
        eps: radius of the ball.
        steps: of Auto-PGD and of FAB, for each of their targets.
        targets: wrong classes that they aim at, the likeliest ones (all k - 1 where there are no more).
        queries: of Square.
        seed: of the random starts and squares.

    """
    ranks = range(1, min(targets, score(x[:1]).shape[1] - 1) + 1)
    attacks: dict[str, Attack] = {"apgd": partial(apgd_on_cross_entropy, score, eps=eps, steps=steps)}
    attacks |= {f"apgd-{k}": partial(apgd_towards, score, rank=k, eps=eps, steps=steps) for k in ranks}
    attacks |= {f"fab-{k}": partial(fab, score, rank=k, steps=steps, eps=eps) for k in ranks}
    attacks |= {"square": partial(square, score, eps=eps, queries=queries)}
    alive = alive.clone()
    for name, attack in attacks.items():
        rows = alive.nonzero().squeeze(1)
        if len(rows):
            draws = torch.Generator().manual_seed(derived_seed(seed, name))
            alive[rows] = score(attack(x[rows], y[rows], generator=draws)).argmax(1) == y[rows]
    return alive


def apgd_on_cross_entropy(
    score: Score, x: Tensor, y: Int[Tensor, " b"], *, eps: float, steps: int, generator: torch.Generator
) -> Tensor:
    """Auto-PGD on the cross entropy."""
    return apgd(
        lambda images: cross_entropy(score(images), y, reduction="none"), x, eps=eps, steps=steps, generator=generator
    )[0]


def apgd_towards(
    score: Score, x: Tensor, y: Int[Tensor, " b"], *, rank: int, eps: float, steps: int, generator: torch.Generator
) -> Tensor:
    """Auto-PGD on the logit ratio towards the wrong class of a rank."""
    target = wrong_class(score, x, y, rank)
    return apgd(lambda images: targeted_dlr(score(images), y, target), x, eps=eps, steps=steps, generator=generator)[0]


@torch.no_grad()
def wrong_class(score: Score, x: Tensor, y: Int[Tensor, " b"], rank: int) -> Int[Tensor, " b"]:
    """The wrong class that is likeliest on the clean image (rank 1), or the next one."""
    return score(x).scatter(1, y[:, None], -torch.inf).topk(rank, 1).indices[:, -1]


# --- FAB -----------------------------------------------------------------------------------------------------------------

ALPHA_MAX, ETA, BETA = 0.1, 1.05, 0.9  # bias towards the clean image, overshoot, and step back, as in FAB's paper


@torch.no_grad()
def fab(
    score: Score,
    x: Float[Tensor, "b c h w"],
    y: Int[Tensor, " b"],
    *,
    rank: int,
    steps: int,
    eps: float,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b c h w"]:
    """FAB towards one class (Croce and Hein 2020, "Minimally distorted adversarial examples"): looks for the nearest
    image on the other side of the boundary, where the other attacks look for the worst one of the ball.

    In each step the boundary between label and target is linearised at the present point, and both this and the clean
    image are projected onto it within the range of images; the next point is a mean of the two that leans towards the
    clean image. From a point beyond the boundary it steps back. Returns the nearest image found that is not classified
    as `y`, and the clean one where that is farther than `eps`. It starts at the image itself and draws nothing.
    """
    target = wrong_class(score, x, y, rank)

    def ahead(images: Tensor) -> Tensor:
        logits = score(images)
        return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)

    wide = (-1, *(1 for _ in x.shape[1:]))
    now, found = x.clone(), x.clone()
    nearest = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    for _ in range(steps):
        value, gradient = value_and_gradient(ahead, now)
        # The plane {z: <gradient, z - now> + value = 0}, seen from the point and from the image.
        offset = value + (gradient * (x - now)).flatten(1).sum(1)
        from_now, from_image = to_plane(now, gradient, value), to_plane(x, gradient, offset)
        far, near = from_now.flatten(1).abs().amax(1), from_image.flatten(1).abs().amax(1)
        alpha = (far / (far + near).clamp(min=1e-12)).clamp(max=ALPHA_MAX).view(wide)
        now = ((1 - alpha) * (now + ETA * from_now) + alpha * (x + ETA * from_image)).clamp(0.0, 1.0)
        beyond = score(now).argmax(1) != y
        distance = (now - x).flatten(1).abs().amax(1)
        closer = beyond & (distance < nearest)
        nearest, found = torch.where(closer, distance, nearest), torch.where(closer.view(wide), now, found)
        now = torch.where(beyond.view(wide), (1 - BETA) * x + BETA * now, now)
    return torch.where((nearest <= eps).view(wide), found, x)


def to_plane(
    points: Float[Tensor, "b ..."], normal: Float[Tensor, "b ..."], offset: Float[Tensor, " b"]
) -> Float[Tensor, "b ..."]:
    """The shortest delta, in the largest entry, with <normal, delta> + offset = 0 and points + delta within [0, 1].

    Every entry moves by the same length t, along the sign that leads to the plane, or as far as its range lets it; t
    solves an equation that is piecewise linear between the entries' rooms. Where the plane cannot be reached, all room
    is used.
    """
    shape = points.shape
    points, normal = points.flatten(1), normal.flatten(1)
    direction = -offset.sign()[:, None] * normal.sign()
    room = torch.where(direction > 0, 1.0 - points, points).clamp(min=0.0)
    ordered, order = room.sort(1)
    weight = normal.abs().gather(1, order)
    used = (weight * ordered).cumsum(1)  # by the entries that have reached their end, this one included
    left = weight.flip(1).cumsum(1).flip(1)  # weight of the entries that have not, this one included
    reached = used - weight * ordered + left * ordered  # <normal, delta> with t = this entry's room
    wanted = offset.abs()[:, None]
    index = (reached < wanted).sum(1, keepdim=True).clamp(max=reached.shape[1] - 1)  # reached never falls
    before = (used - weight * ordered).gather(1, index)
    length = ((wanted - before) / left.gather(1, index).clamp(min=1e-12)).clamp(min=0.0)
    return (direction * torch.minimum(room, length)).view(shape)


# --- Square --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def square(
    score: Score,
    x: Float[Tensor, "b c h w"],
    y: Int[Tensor, " b"],
    *,
    eps: float,
    queries: int,
    generator: torch.Generator,
) -> Float[Tensor, "b c h w"]:
    """Square (Andriushchenko et al. 2020): random search over squares set to +-eps, kept where the margin of the true
    class falls. The squares' share of the image is halved as the search goes on, at the paper's fractions of it.
    """
    _, channels, height, width = x.shape

    def signs(*shape: int) -> Tensor:
        return (torch.randint(2, shape, generator=generator) * 2 - 1).to(x.device, x.dtype)

    def margin(images: Tensor) -> Tensor:
        logits = score(images)
        own = logits.gather(1, y[:, None]).squeeze(1)
        return own - logits.scatter(1, y[:, None], -torch.inf).amax(1)

    delta = project(x, eps * signs(len(x), channels, 1, width).expand_as(x), eps)
    lowest = margin(x + delta)
    for query in range(queries):
        side = max(1, min(height, width, round((square_share(query / queries) * height * width) ** 0.5)))
        rows = torch.randint(height - side + 1, (len(x),), generator=generator).to(x.device)
        columns = torch.randint(width - side + 1, (len(x),), generator=generator).to(x.device)
        down = torch.arange(height, device=x.device) - rows[:, None]
        across = torch.arange(width, device=x.device) - columns[:, None]
        inside = ((down >= 0) & (down < side))[:, None, :, None] & ((across >= 0) & (across < side))[:, None, None, :]
        tried = project(x, torch.where(inside, eps * signs(len(x), channels, 1, 1), delta), eps)
        found = margin(x + tried)
        better = found < lowest
        delta[better], lowest[better] = tried[better], found[better]
    return x + delta


def square_share(progress: float) -> float:
    """Share of the image that a square covers: 0.8 at first, halved at these fractions of 10,000 queries."""
    return 0.8 * 0.5 ** sum(progress > end / 10_000 for end in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
