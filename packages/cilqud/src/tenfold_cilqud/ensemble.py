"""An ensemble of attacks as strong as AutoAttack's parts: APGD on two losses, and Square, which needs no gradient.

APGD and the logit ratio are Croce and Hein's (2020), Square is Andriushchenko et al.'s (2020); FAB is left out.
Each attack gets the images that withstood those before it, so the accuracy left is that under the worst of all.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from tenfold_shared.attacks import input_gradient, project, uniform_start
from tenfold_shared.run import derived_seed

Score = Callable[[Tensor], Tensor]
TARGETS = 3
SQUARE_QUERIES = 5  # times the steps


def withstands_ensemble(
    score: Score, x: Tensor, y: Int[Tensor, " b"], alive: Bool[Tensor, " b"], *, eps: float, steps: int, seed: int
) -> Bool[Tensor, " b"]:
    """Which of the images that are `alive` withstand every attack of the ensemble."""
    alive = alive.clone()
    classes = score(x[:1]).shape[1]
    losses: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [_cross_entropy]
    losses += [_targeted(rank) for rank in range(1, min(TARGETS, classes - 1) + 1)]
    for number, loss in enumerate(losses):
        rows = alive.nonzero().squeeze(1)
        if len(rows):
            draws = torch.Generator().manual_seed(derived_seed(seed, "apgd", number))
            attacked = apgd(score, loss, x[rows], y[rows], eps=eps, steps=steps, generator=draws)
            alive[rows] = score(attacked).argmax(1) == y[rows]
    rows = alive.nonzero().squeeze(1)
    if len(rows):
        draws = torch.Generator().manual_seed(derived_seed(seed, "square"))
        attacked = square(score, x[rows], y[rows], eps=eps, queries=SQUARE_QUERIES * steps, generator=draws)
        alive[rows] = score(attacked).argmax(1) == y[rows]
    return alive


def _cross_entropy(logits: Tensor, y: Tensor, clean: Tensor) -> Tensor:
    return cross_entropy(logits, y, reduction="none")


def _targeted(rank: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The targeted logit ratio -(z_y - z_t) / (z_1 - (z_3 + z_4) / 2), t the class of that rank on the clean image.

    With fewer than four classes the denominator is z_1 - z_last.
    """

    def loss(logits: Tensor, y: Tensor, clean: Tensor) -> Tensor:
        others = clean.scatter(1, y[:, None], -torch.inf)
        target = others.topk(rank, 1).indices[:, -1:]
        ordered = logits.sort(1, descending=True).values
        low = (ordered[:, 2] + ordered[:, 3]) / 2 if logits.shape[1] >= 4 else ordered[:, -1]
        gap = logits.gather(1, y[:, None]) - logits.gather(1, target)
        return -gap.squeeze(1) / (ordered[:, 0] - low + 1e-12)

    return loss


def apgd(
    score: Score,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Float[Tensor, "b c h w"],
    y: Int[Tensor, " b"],
    *,
    eps: float,
    steps: int,
    generator: torch.Generator,
) -> Float[Tensor, "b c h w"]:
    """Auto-PGD: momentum 0.75, step 2 eps, halved at checkpoints where the loss rose in fewer than three quarters of the
    steps or nothing has changed since the last one; then it goes on from the best point. Returns each image's best point.
    """
    with torch.no_grad():
        clean = score(x)

    def values(images: Tensor) -> Tensor:
        return loss(score(images), y, clean)

    now = x + uniform_start(x, eps, generator=generator)
    before = now
    with torch.no_grad():
        current = values(now)
    best, best_value = now.clone(), current.clone()
    size = torch.full_like(current, 2 * eps)
    rises, halved, value_then = torch.zeros_like(current), torch.ones_like(current, dtype=torch.bool), current.clone()
    checkpoints = _checkpoints(steps)
    last = 0
    for step in range(steps):
        gradient = input_gradient(values, now).sign()
        with torch.no_grad():
            z = x + project(x, now + size.view(-1, 1, 1, 1) * gradient - x, eps)
            mixed = z if step == 0 else now + 0.75 * (z - now) + 0.25 * (now - before)
            before, now = now, x + project(x, mixed - x, eps)
            value = values(now)
            rises += value > current
            current = value
            better = value > best_value
            best[better], best_value[better] = now[better], value[better]
            if step + 1 in checkpoints:
                stalled = ~halved & (best_value <= value_then)
                reduce = (rises < 0.75 * (step + 1 - last)) | stalled
                size = torch.where(reduce, size / 2, size)
                now = torch.where(reduce.view(-1, 1, 1, 1), best, now)
                current = torch.where(reduce, best_value, current)
                halved, value_then, rises, last = reduce, best_value.clone(), torch.zeros_like(rises), step + 1
    return best


def _checkpoints(steps: int) -> set[int]:
    """p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), times the steps."""
    found, previous, present = set(), 0.0, 0.22
    while present <= 1.0:
        found.add(max(1, round(present * steps)))
        previous, present = present, present + max(present - previous - 0.03, 0.06)
    return found


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
    """Square: random search over squares set to +-eps, kept where the margin of the true class falls."""
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
        share = 0.8 * 0.5 ** (5 * query / queries)  # of the image, shrinking as the search goes on
        side = max(1, min(height, width, round((share * height * width) ** 0.5)))
        row = int(torch.randint(height - side + 1, (1,), generator=generator))
        column = int(torch.randint(width - side + 1, (1,), generator=generator))
        tried = delta.clone()
        tried[:, :, row : row + side, column : column + side] = eps * signs(len(x), channels, 1, 1)
        tried = project(x, tried, eps)
        found = margin(x + tried)
        better = found < lowest
        delta[better], lowest[better] = tried[better], found[better]
    return x + delta
