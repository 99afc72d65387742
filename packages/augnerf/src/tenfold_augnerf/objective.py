"""The outer step's gradients (section 2.4): clean and worst-case loss, in the modes of cost of section 10.

Every function here adds gradients to the weights' `.grad` and returns the losses; none moves a weight. Batches are
cut into chunks of rays, each with its own forward and backward pass, so memory does not grow with the batch and what a
backward pass reads is still in the cache.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold_augnerf.attack import Step, ascend, attack, start
from tenfold_augnerf.cameras import Rays
from tenfold_augnerf.perturbation import KEYS, Geometry
from tenfold_augnerf.renderer import Draws, Renderer, Rendering
from tenfold_shared.errors import UserError

Cost = Literal["plain", "reuse", "heads"]
Backward = Callable[[Tensor], None]


@dataclass(frozen=True)
class Adversary:
    """Who perturbs, how, and how much it counts.

    Attributes:
        steps: radius, step size, iterations and norm of every key.
        mode: "worst" maximises the loss, "random" only draws the start, "helpful" minimises ("unadv").
        weight: λ.
        mix: "convex": (1 - λ) clean + λ worst, as released; "additive": clean + λ worst, as in the paper's figure.
        restarts: of the attack.
        cost: "plain": attack, then both renderings. "reuse" (one step from zero): the clean pass's own backward pass
            gives the attack's gradient; exact FGSM. "heads": keys at the features or above share the clean pass's
            samples and features (`resample = shared`).
        zero_start: start at zero instead of a random point of the ball.

    """

    steps: Mapping[str, Step] = field(default_factory=dict)
    mode: Literal["worst", "random", "helpful"] = "worst"
    weight: float = 0.5
    mix: Literal["convex", "additive"] = "convex"
    restarts: int = 1
    cost: Cost = "plain"
    zero_start: bool = False

    def __post_init__(self) -> None:
        """Refuse modes of cost that the attack does not allow."""
        if not 0 <= self.weight <= (1 if self.mix == "convex" else math.inf) or self.restarts < 1:
            raise UserError(
                f"lambda {self.weight} and {self.restarts} restarts: take 0 <= lambda (<= 1) and 1 or more restarts"
            )
        if self.cost == "reuse":
            if self.mode != "worst" or self.restarts > 1 or any(step.iterations != 1 for step in self.steps.values()):
                raise UserError(
                    "cost reuse is one ascent step from zero: use mode worst, one iteration and one restart"
                )
            if not self.clean_weight:
                raise UserError(
                    "cost reuse takes the attack's gradient from the clean loss, to which lambda 1 gives no weight"
                )
            moved = [key for key in self.steps if KEYS[key].leading == "cameras"]
            if moved:
                raise UserError(f"cost reuse takes no camera keys such as {moved[0]}: use cost plain")
        if self.cost == "heads":
            low = [key for key in self.steps if KEYS[key].level == "coordinates" and not key.startswith("dir")]
            if low:
                raise UserError(
                    f"{low[0]} moves samples: cost heads is for keys at the features and above, use cost plain"
                )

    @property
    def clean_weight(self) -> float:
        """The clean loss's factor."""
        return 1 - self.weight if self.mix == "convex" else 1.0

    def scaled(self, factor: float) -> "Adversary":
        """The same with radii and step sizes `factor` times as large."""
        return replace(self, steps={key: step.scaled(factor) for key, step in self.steps.items()})


class Losses(NamedTuple):
    """Mean losses of a batch, detached; the worst-case one is None without an adversary."""

    clean: Tensor
    adversarial: Tensor | None
    psnr: Tensor
    acc: Tensor


def photometric(
    difference: Float[Tensor, "rays 3"], kind: Literal["mse", "huber", "trimmed"] = "mse"
) -> Float[Tensor, " rays"]:
    """The loss of each ray from rgb - y: squared, or a robust rival.

    "huber" is quadratic below 0.1 and linear above (same curvature as the squared loss); "trimmed" leaves the worst 30 %
    of the rays it is given out.
    """
    squared = difference.square()
    if kind == "huber":
        size = difference.abs()
        return torch.where(size < 0.1, squared, 0.2 * size - 0.01).mean(-1)
    loss = squared.mean(-1)
    if kind == "trimmed":
        limit = loss.detach().quantile(0.7)
        return torch.where(loss <= limit, loss, torch.zeros_like(loss))
    return loss


class Objective:
    """Loss of every ray of a rendering against its pixels: item 7 of section 2.1, or a robust rival."""

    def __init__(self, coarse_weight: float = 1.0, kind: Literal["mse", "huber", "trimmed"] = "mse") -> None:
        self.coarse_weight, self.kind = coarse_weight, kind

    def __call__(self, rendering: Rendering, truth: Float[Tensor, "rays 3"]) -> Float[Tensor, " rays"]:
        """Fine plus weighted coarse loss."""
        loss = photometric(rendering.rgb - truth, self.kind)
        if rendering.coarse is not None:
            loss = loss + self.coarse_weight * photometric(rendering.coarse.shown.rgb - truth, self.kind)
        return loss


class Batch(NamedTuple):
    """Rays and the colours of their pixels; `total` is the size of the batch over all processes."""

    rays: Rays
    truth: Float[Tensor, "rays 3"]
    draws: Draws = Draws()
    total: int | None = None

    @property
    def rays_of_all(self) -> int:
        """Rays of the whole batch, over all chunks and processes."""
        return self.total or len(self.truth)

    def part(self, rows: slice) -> "Batch":
        """Some of the rays, as a part of the same whole."""
        return Batch(self.rays.chosen(rows), self.truth[rows], self.draws.chosen(rows), self.rays_of_all)


Starts = Callable[[int, slice], Mapping[str, Tensor]]
"""(number of the restart, rays of the chunk) -> where the attack starts."""


def random_starts(
    steps: Mapping[str, Step],
    geometry: Geometry,
    rays: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    zero: bool,
) -> Starts:
    """One draw a key in the order of the keys, for the whole batch; chunks take their rays of it."""

    def draw() -> dict[str, Tensor]:
        shapes = {key: geometry.shape(key, rays) for key in steps}
        if zero:
            return {key: torch.zeros(shape, dtype=dtype, device=generator.device) for key, shape in shapes.items()}
        return {key: start(shapes[key], step, generator, dtype) for key, step in steps.items()}

    drawn: list[dict[str, Tensor]] = []

    def starts(number: int, rows: slice) -> Mapping[str, Tensor]:
        while len(drawn) <= number:
            drawn.append(draw())
        return {key: x[rows] if KEYS[key].leading == "rays" else x for key, x in drawn[number].items()}

    return starts


def chunks(rays: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` rays."""
    for first in range(0, rays, size):
        yield slice(first, min(rays, first + size))


def at_once(batch: Batch, adversary: Adversary | None, objective: "Objective", chunk: int) -> int:
    """Rays whose graph is alive at once: the chunk, or all (0 too) for keys of cameras and the trimmed loss."""
    cameras = adversary is not None and any(KEYS[key].leading == "cameras" for key in adversary.steps)
    return chunk if chunk and not cameras and objective.kind != "trimmed" else max(1, len(batch.truth))


def accumulate(
    renderer: Renderer,
    batch: Batch,
    adversary: Adversary | None = None,
    starts: Starts | None = None,
    *,
    objective: Objective | None = None,
    chunk: int = 0,
    backward: Backward = Tensor.backward,
    perturb_weights: Callable[[Callable], None] | None = None,
) -> Losses:
    """Gradients of the outer loss, added to the weights' `.grad`.

    Args:
        renderer: as it is trained.
        batch: rays, colours, and the jitter and noise of the clean rendering. The attack and the perturbed rendering
            have neither, except with cost reuse, where the perturbed rendering repeats the clean one's.
        adversary: None for the plain loss.
        starts: where attacks start.
        objective: loss of rays; the squared one with the renderer's coarse weight by default.
        chunk: rays at a time, 0 for all. Keys of cameras and the trimmed loss need all.
        backward: differentiates a loss.
        perturb_weights: called with the loss of a model under the perturbations before the outer renderings (AWP);
            needs all rays at a time.

    Raises:
        UserError: chunks where the whole batch is needed.

    """
    objective = objective or Objective(renderer.coarse_weight)
    noted = []
    for rows in chunks(len(batch.truth), at_once(batch, adversary, objective, 0 if perturb_weights else chunk)):
        part = batch.part(rows)
        begin = None if starts is None else lambda number, rows=rows: starts(number, rows)
        if adversary is None:
            values = _clean(renderer, part, objective, backward)
        else:
            assert begin is not None, "an adversary needs a start"
            values = MODES[adversary.cost](renderer, part, adversary, begin, objective, backward, perturb_weights)
        noted.append(values)
    return _means(noted, len(batch.truth))


def _means(noted: Sequence[Mapping[str, Tensor]], rays: int) -> Losses:
    mean = {name: torch.stack([values[name].detach() for values in noted]).sum() / rays for name in noted[0]}
    return Losses(mean["clean"], mean.get("adversarial"), -10 * torch.log10(mean["squares"]), mean["acc"])


def _note(rendering: Rendering, batch: Batch, clean: Tensor, adversarial: Tensor | None = None) -> dict[str, Tensor]:
    noted = {
        "clean": clean.sum(),
        "squares": (rendering.rgb.detach() - batch.truth).square().mean(-1).sum(),
        "acc": rendering.acc.detach().sum(),
    }
    return noted if adversarial is None else {**noted, "adversarial": adversarial.sum()}


def _clean(renderer: Renderer, batch: Batch, objective: Objective, backward: Backward) -> dict[str, Tensor]:
    rendering = renderer(batch.rays, draws=batch.draws)
    loss = objective(rendering, batch.truth)
    backward(loss.sum() / batch.rays_of_all)
    return _note(rendering, batch, loss)


def perturbation_of(
    renderer: Renderer,
    batch: Batch,
    adversary: Adversary,
    starts: Callable[[int], Mapping[str, Tensor]],
    objective: Objective,
    fixed: Rendering | None = None,
) -> dict[str, Tensor]:
    """The adversary's δ for a batch: section 2.3, or only the start in mode random."""
    if adversary.mode == "random" or not adversary.steps:
        return dict(starts(0))

    def loss(delta: Mapping[str, Tensor]) -> Tensor:
        return objective(renderer(batch.rays, delta, fixed=fixed), batch.truth)

    with frozen(renderer):
        return attack(loss, starts, adversary.steps, restarts=adversary.restarts, helpful=adversary.mode == "helpful")


@contextlib.contextmanager
def frozen(renderer: Renderer) -> Iterator[None]:
    """Weights that nothing is differentiated by: a graph that is built meanwhile leaves their gradients out."""
    trained = [parameter for parameter in renderer.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


def _plain(
    renderer: Renderer,
    batch: Batch,
    adversary: Adversary,
    starts: Callable[[int], Mapping[str, Tensor]],
    objective: Objective,
    backward: Backward,
    perturb_weights: Callable[[Callable], None] | None,
) -> dict[str, Tensor]:
    delta = perturbation_of(renderer, batch, adversary, starts, objective)
    if perturb_weights is not None:
        perturb_weights(lambda model: objective(model(batch.rays, delta), batch.truth).mean())
    perturbed = objective(renderer(batch.rays, delta), batch.truth)
    backward(adversary.weight * perturbed.sum() / batch.rays_of_all)
    rendering = renderer(batch.rays, draws=batch.draws)
    loss = objective(rendering, batch.truth)
    backward(adversary.clean_weight * loss.sum() / batch.rays_of_all)
    return _note(rendering, batch, loss, perturbed)


def _reuse(
    renderer: Renderer,
    batch: Batch,
    adversary: Adversary,
    starts: Callable[[int], Mapping[str, Tensor]],
    objective: Objective,
    backward: Backward,
    perturb_weights: Callable[[Callable], None] | None,
) -> dict[str, Tensor]:
    """The clean backward pass differentiates by the places of the perturbations too: six F instead of eight."""
    variant = renderer.variant
    other = variant.branch == "auxiliary" or variant.inert_colour or not variant.white_in_adversarial
    if other or perturb_weights is not None:
        raise UserError(
            "cost reuse is for the shared branch with all of raw perturbed on the clean background, without AWP: "
            "use cost plain"
        )
    rendering = renderer(batch.rays, draws=batch.draws, taps=adversary.steps)
    loss = objective(rendering, batch.truth)
    backward(adversary.clean_weight * loss.sum() / batch.rays_of_all)
    delta = {}
    for key, step in adversary.steps.items():
        gradient = rendering.sites[key].grad
        assert gradient is not None
        gradient = gradient.to(
            torch.promote_types(gradient.dtype, batch.truth.dtype)
        )  # of half precision under autocast
        delta[key] = ascend(torch.zeros_like(gradient), gradient, step)
    noted = _note(rendering, batch, loss)
    del rendering, loss
    perturbed = objective(renderer(batch.rays, delta, draws=batch.draws), batch.truth)
    backward(adversary.weight * perturbed.sum() / batch.rays_of_all)
    return {**noted, "adversarial": perturbed.sum()}


def _heads(
    renderer: Renderer,
    batch: Batch,
    adversary: Adversary,
    starts: Callable[[int], Mapping[str, Tensor]],
    objective: Objective,
    backward: Backward,
    perturb_weights: Callable[[Callable], None] | None,
) -> dict[str, Tensor]:
    """Attack and perturbed rendering ask the heads alone; the trunk goes forward and backward once for both losses."""
    if renderer.variant.branch == "auxiliary" or perturb_weights is not None:
        raise UserError("cost heads shares features of the shared branch, without AWP: use cost plain")
    rendering = renderer(batch.rays, draws=batch.draws, keep_features=True)
    loss = objective(rendering, batch.truth)
    delta = perturbation_of(renderer, batch, adversary, starts, objective, detached(rendering))
    perturbed = objective(renderer(batch.rays, delta, fixed=rendering), batch.truth)
    backward((adversary.clean_weight * loss.sum() + adversary.weight * perturbed.sum()) / batch.rays_of_all)
    return _note(rendering, batch, loss, perturbed)


def detached(rendering: Rendering) -> Rendering:
    """The same samples and features without their history."""

    def cut(old):
        features = None if old.features is None else old.features.detach()
        return old._replace(z=old.z.detach(), raw=old.raw.detach(), features=features)

    return replace(
        rendering, fine=cut(rendering.fine), coarse=None if rendering.coarse is None else cut(rendering.coarse)
    )


MODES = {"plain": _plain, "reuse": _reuse, "heads": _heads}


def free_replay(
    renderer: Renderer,
    batch: Batch,
    adversary: Adversary,
    delta: Mapping[str, Tensor],
    *,
    objective: Objective | None = None,
    chunk: int = 0,
    backward: Backward = Tensor.backward,
) -> tuple[Losses, dict[str, Tensor]]:
    """One replay of "free" training: the backward pass that trains the weights also moves δ for the next replay.

    Returns the losses and the next δ; the weights' gradients are those of the outer loss at the given δ. Chunks as in
    `accumulate`.
    """
    objective = objective or Objective(renderer.coarse_weight)
    noted, moved = [], []
    for rows in chunks(len(batch.truth), at_once(batch, adversary, objective, chunk)):
        own = {key: value[rows] if KEYS[key].leading == "rays" else value for key, value in delta.items()}
        values, following = _replay(renderer, batch.part(rows), adversary, own, objective, backward)
        noted.append(values)
        moved.append(following)
    joined = {key: torch.cat([part[key] for part in moved]) for key in delta}
    return _means(noted, len(batch.truth)), joined


def _replay(
    renderer: Renderer,
    batch: Batch,
    adversary: Adversary,
    delta: Mapping[str, Tensor],
    objective: Objective,
    backward: Backward,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    total = batch.rays_of_all
    leaves = {key: value.detach().requires_grad_() for key, value in delta.items()}
    perturbed = objective(renderer(batch.rays, leaves), batch.truth)
    backward(adversary.weight * perturbed.sum() / total)
    sign = -1.0 if adversary.mode == "helpful" else 1.0
    following = {}
    for key, leaf in leaves.items():
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        following[key] = ascend(leaf.detach(), sign * gradient, adversary.steps[key])
    rendering = renderer(batch.rays, draws=batch.draws)
    loss = objective(rendering, batch.truth)
    backward(adversary.clean_weight * loss.sum() / total)
    return _note(rendering, batch, loss, perturbed), following
