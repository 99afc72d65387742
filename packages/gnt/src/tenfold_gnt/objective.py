"""Loss, optimiser and one step of training (section 2.5).

A step renders a batch of rays of one target view. The gradient is exact, but the rays pass through the network a chunk
at a time: forward and backward of a chunk stay in the cache (or within a memory budget), the gradients of the sampled
features are gathered, and go through the sampling and the feature network once.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tenfold_gnt.projection import ViewSamples, sample_views, source_views
from tenfold_gnt.render import Model, Sampling, rays_per_chunk
from tenfold_gnt.sampling import depth_samples, importance_samples, points_at
from tenfold_shared.errors import UserError

# Tensors of a chunk alive in forward plus backward, for a budget given in bytes.
TRAINING_TENSORS = 40


class RayBatch(NamedTuple):
    """Rays of one target view with the sources to render them from.

    Attributes:
        origins: of the rays, all the same.
        directions: not normalised.
        rgb: true colours.
        images: of the source views.
        cameras: of the source views.

    """

    origins: Float[Tensor, "rays 3"]
    directions: Float[Tensor, "rays 3"]
    rgb: Float[Tensor, "rays 3"]
    images: Float[Tensor, "views height width 3"]
    cameras: Float[Tensor, "views 34"]


@dataclass(frozen=True)
class Optimisation:
    """Adam with two learning rates and a schedule; the defaults are the paper's for training from scratch."""

    feature_rate: float = 1e-3
    """Learning rate of the feature network."""
    network_rate: float = 5e-4
    """Learning rate of the rendering network."""
    decay_every: int = 50_000
    """Steps between two decays of the step schedule, or over which the exponential one decays."""
    decay: float = 0.5
    """Factor of a decay."""
    schedule: Literal["step", "exponential", "cosine"] = "step"
    """Halved every so often as in the paper, decayed a little at every step as NeRF is, or a cosine down to a tenth over
    all steps."""

    def __post_init__(self) -> None:
        """Refuse what no optimiser takes."""
        rates = self.feature_rate, self.network_rate, self.decay
        if self.decay_every < 1 or not all(0 <= rate < math.inf for rate in rates):
            raise UserError(
                "--optimisation.decay_every takes 1 or more, --optimisation.feature_rate, network_rate and decay "
                f"numbers of 0 or more, got {self.decay_every} and {', '.join(map(str, rates))}"
            )


def build_optimiser(
    model: Model, settings: Optimisation, steps: int | None = None
) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LRScheduler]:
    """Adam over the rendering networks (first group) and the feature network, and the scheduler, stepped every step.

    Args:
        model: to train.
        settings: rates and schedule.
        steps: of the whole training; the cosine schedule needs it.

    """
    networks = [*model.coarse.parameters(), *(model.fine.parameters() if model.fine is not None else ())]
    groups = [
        {"params": networks, "lr": settings.network_rate},
        {"params": list(model.features.parameters()), "lr": settings.feature_rate},
    ]
    groups = [group for group in groups if group["params"]]
    optimiser = torch.optim.Adam(groups)
    if settings.schedule == "cosine" and steps:

        def factor(step: int) -> float:
            return 0.1 + 0.45 * (1 + math.cos(math.pi * min(step / steps, 1.0)))

        return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    if settings.schedule == "exponential":
        return optimiser, torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: settings.decay ** (step / settings.decay_every)
        )
    return optimiser, torch.optim.lr_scheduler.StepLR(optimiser, settings.decay_every, settings.decay)


def colour_loss(
    rgb: Float[Tensor, "rays 3"], truth: Float[Tensor, "rays 3"], valid: Float[Tensor, " rays"] | None = None
) -> Float[Tensor, ""]:
    """Mean squared error over rays and channels; over the valid rays where a network says which they are."""
    if valid is None:
        return (rgb - truth).square().mean()
    return ((rgb - truth).square() * valid[:, None]).sum() / (valid.sum() * rgb.shape[-1] + 1e-6)


class Gradients(NamedTuple):
    """What `accumulate_gradients` reports, on the device: loss of each pass and rendered colours of the last one."""

    losses: tuple[Float[Tensor, ""], ...]
    rgb: Float[Tensor, "rays 3"]

    @property
    def loss(self) -> Float[Tensor, ""]:
        """Sum over the passes."""
        return torch.stack(self.losses).sum()


def accumulate_gradients(
    model: Model,
    batch: RayBatch,
    sampling: Sampling,
    *,
    jitter: bool = True,
    generator: torch.Generator | None = None,
    memory: int | None = None,
) -> Gradients:
    """Add the gradients of the loss `MSE(coarse) + MSE(fine)` to the parameters' `.grad`.

    The weights of the coarse pass are detached before importance sampling, so the passes are independent.

    Args:
        model: in train mode for dropout.
        batch: rays and sources.
        sampling: the depths.
        jitter: move depths at random within their intervals (and draw importance samples at random).
        generator: of the jitter, on the rays' device; dropout follows the global one.
        memory: budget in bytes for a chunk's activations.

    """
    sources = source_views(batch.images, batch.cameras)
    maps = model.features(sources.images)
    rays, like = len(batch.rgb), batch.directions
    depths = depth_samples(
        sampling.near,
        sampling.far,
        rays,
        sampling.samples,
        inverse=sampling.inverse,
        jitter=torch.rand(rays, sampling.samples, generator=generator, dtype=like.dtype, device=like.device)
        if jitter
        else None,
        like=like,
    )
    passes = [(model.coarse, maps.coarse, sampling.importance > 0)]
    if sampling.importance:
        passes.append((model.for_fine, maps.fine, False))
    losses, sampled, gradients = [], [], []
    rgb = batch.rgb
    for network, features, needs_weights in passes:
        points = points_at(batch.origins, batch.directions, depths)
        samples = sample_views(points, batch.origins[0], sources, features)
        loss, rgb, weights, gradient = _backward_by_chunk(
            network, samples, points, batch, memory, return_weights=needs_weights
        )
        losses.append(loss)
        if gradient is not None:
            sampled.append(samples.rgb_feat)
            gradients.append(gradient)
        if weights is not None:
            uniform = torch.rand(rays, sampling.importance, generator=generator, dtype=like.dtype, device=like.device)
            depths = importance_samples(
                depths, weights, sampling.importance, inverse=sampling.inverse, uniform=uniform if jitter else None
            )
    if sampled:
        torch.autograd.backward(sampled, gradients)
    return Gradients(tuple(losses), rgb)


def _backward_by_chunk(
    network: nn.Module,
    samples: ViewSamples,
    points: Float[Tensor, "rays samples 3"],
    batch: RayBatch,
    memory: int | None,
    *,
    return_weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Forward and backward of the network for all rays; returns loss, colours and weights, all detached, and the
    gradient of what was sampled, if it needs one.
    """
    rays, count, views, _ = samples.rgb_feat.shape
    chunk = rays_per_chunk(count, views, getattr(network, "width", 64), samples.rgb_feat, memory, TRAINING_TENSORS)
    colours, weights, gradients = [], [], []
    loss = torch.zeros((), dtype=batch.rgb.dtype, device=batch.rgb.device)
    for start in range(0, rays, chunk):
        part = slice(start, start + chunk)
        leaf = samples.rgb_feat[part].detach().requires_grad_(samples.rgb_feat.requires_grad)
        rendered = network(
            ViewSamples(leaf, samples.ray_diff[part], samples.mask[part]),
            points[part],
            batch.directions[part],
            return_weights=return_weights,
        )
        share = colour_loss(rendered.rgb, batch.rgb[part]) * (len(rendered.rgb) / rays)
        share.backward()
        loss += share.detach()
        colours.append(rendered.rgb.detach())
        weights.append(rendered.weights)
        if leaf.grad is not None:
            gradients.append(leaf.grad)
    joined = torch.cat([w.detach() for w in weights]) if return_weights else None
    return loss, torch.cat(colours), joined, torch.cat(gradients) if gradients else None


def train_step(
    model: Model,
    batch: RayBatch,
    sampling: Sampling,
    optimiser: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    *,
    jitter: bool = True,
    generator: torch.Generator | None = None,
    memory: int | None = None,
) -> Gradients:
    """One step: zero the gradients, accumulate them, update, advance the schedule."""
    optimiser.zero_grad(set_to_none=True)
    result = accumulate_gradients(model, batch, sampling, jitter=jitter, generator=generator, memory=memory)
    optimiser.step()
    scheduler.step()
    return result


def rays_in_step(rays: int, wanted_views: int, views: int) -> int:
    """int(N_rand · num_source_views / V), at least one: more rays when a step has fewer source views than the recipe
    names.
    """
    return max(1, int(rays * wanted_views / views))


def choose_pixels(
    height: int,
    width: int,
    count: int,
    generator: torch.Generator,
    *,
    centre: float | None = None,
) -> Tensor:
    """`count` distinct pixels (u, v), int64 [count, 2]: of the whole image or of its central part.

    Args:
        height: of the image.
        width: of the image.
        count: at most the number of pixels to draw from; more draws all.
        generator: on the device where the pixels are wanted.
        centre: keep a border of (1 - centre) / 2 of each side free, but for a pixel or two in the middle; 0.8 in the
            released code's "center" mode.

    """
    border = 0.0 if centre is None else (1 - centre) / 2
    top, left = (min(round(side * border), (side - 1) // 2) for side in (height, width))
    rows, columns = height - 2 * top, width - 2 * left
    index = torch.randperm(rows * columns, generator=generator, device=generator.device)[:count]
    return torch.stack([index % columns + left, index // columns + top], -1)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Float[Tensor, ""]:
    """L2 norm of all gradients, for monitoring."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
