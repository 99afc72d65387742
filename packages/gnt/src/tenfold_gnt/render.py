"""Rendering: depths, samples of the source views and the network for a batch of rays; pictures chunk by chunk."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tenfold_gnt.cameras import pixel_grid, pose_of, rays_through, resize_camera
from tenfold_gnt.features import FeatureMaps
from tenfold_gnt.network import RenderedRays, confidence_of, depth_of, occlusion_of
from tenfold_gnt.projection import SourceViews, sample_views, source_views
from tenfold_gnt.sampling import depth_samples, importance_samples, points_at

# On a CPU a chunk's [rays, samples, views, width] tensors should stay in the cache: beyond it every one of the many
# passes over them goes to memory, which costs several times the arithmetic.
CACHE_BYTES = 4 * 2**20
# How many tensors of that size are alive at the peak of a forward pass, measured.
LIVE_TENSORS = 6


@dataclass(frozen=True)
class Sampling:
    """How depths are chosen along a ray.

    Attributes:
        near: depth of the first sample.
        far: depth of the last sample.
        samples: of the coarse pass; 64 in training and 192 at evaluation in the paper.
        importance: further samples for the fine pass, 0 for none (all published configurations).
        inverse: uniform in inverse depth.

    """

    near: float
    far: float
    samples: int = 64
    importance: int = 0
    inverse: bool = True


class Model(nn.Module):
    """The feature network with the network(s) that render rays.

    Args:
        features: images [views, 3, H, W] to `FeatureMaps`.
        coarse: a `GNT` or one of its alternatives.
        fine: for the importance pass; None renders it with `coarse` (single_net).

    """

    def __init__(self, features: nn.Module, coarse: nn.Module, fine: nn.Module | None = None) -> None:
        super().__init__()
        self.features, self.coarse, self.fine = features, coarse, fine

    @property
    def for_fine(self) -> nn.Module:
        """The network of the importance pass."""
        return self.coarse if self.fine is None else self.fine

    def compile_networks(self) -> None:
        """Have torch.compile make what renders rays, at its first call."""
        for network in (self.coarse, self.fine):
            if network is not None:
                network.compile()


class Level(NamedTuple):
    """One pass over rays: colours, weights of the samples, their expected depth, the depths, weights of the views."""

    rgb: Float[Tensor, "rays 3"]
    weights: Float[Tensor, "rays samples"] | None
    depth: Float[Tensor, " rays"] | None
    depths: Float[Tensor, "rays samples"]
    view_weights: Float[Tensor, "rays samples views"] | None


class Views(NamedTuple):
    """Source views with their feature maps: all that is needed to render from them, computed once a set of sources."""

    sources: SourceViews
    maps: FeatureMaps


def prepare_views(
    model: Model, images: Float[Tensor, "views height width 3"], cameras: Float[Tensor, "views 34"]
) -> Views:
    """Source views and their features; keep the result for all rays, pictures and frames from these sources."""
    sources = source_views(images, cameras)
    maps = model.features(sources.images)
    if torch.is_grad_enabled():
        return Views(sources, maps)
    return Views(sources, readable_maps(maps))


def readable_maps(maps: FeatureMaps) -> FeatureMaps:
    """The maps with a pixel's channels side by side: on a CPU they are sampled several times faster, but not with their
    gradient. Half precision becomes single here, once: `sample_views` needs it.
    """

    def readable(x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous(memory_format=torch.channels_last)

    coarse = readable(maps.coarse)
    return FeatureMaps(coarse, coarse if maps.fine is maps.coarse else readable(maps.fine))


def render_level(
    network: nn.Module,
    views: SourceViews,
    features: Float[Tensor, "views channels h w"],
    origins: Float[Tensor, "rays 3"],
    directions: Float[Tensor, "rays 3"],
    depths: Float[Tensor, "rays samples"],
    *,
    return_weights: bool = False,
    return_view_weights: bool = False,
) -> Level:
    """One pass of `network` over rays of one target camera, at given depths."""
    points = points_at(origins, directions, depths)
    samples = sample_views(points, origins[0], views, features)
    rays: RenderedRays = network(
        samples, points, directions, return_weights=return_weights, return_view_weights=return_view_weights
    )
    depth = None if rays.weights is None else depth_of(rays.weights, depths)
    return Level(rays.rgb, rays.weights, depth, depths, rays.view_weights)


def render_rays(
    model: Model,
    views: Views,
    origins: Float[Tensor, "rays 3"],
    directions: Float[Tensor, "rays 3"],
    sampling: Sampling,
    *,
    return_weights: bool = True,
    return_view_weights: bool = False,
) -> list[Level]:
    """The coarse pass and, if `sampling.importance`, the fine pass, with deterministic depths.

    Args:
        model: in the mode (train or eval) to render in.
        views: from `prepare_views`.
        origins: of the rays, all the same: one target camera.
        directions: as `rays_through` gives them.
        sampling: the depths.
        return_weights: read out attention along rays and depth; implied by an importance pass.
        return_view_weights: read out attention over views.

    """
    depths = depth_samples(
        sampling.near, sampling.far, len(origins), sampling.samples, inverse=sampling.inverse, like=directions
    )
    wanted = return_weights or sampling.importance > 0
    rays = origins, directions
    levels = [
        render_level(
            model.coarse,
            views.sources,
            views.maps.coarse,
            *rays,
            depths,
            return_weights=wanted,
            return_view_weights=return_view_weights,
        )
    ]
    if sampling.importance:
        weights = levels[0].weights
        assert weights is not None
        depths = importance_samples(depths, weights, sampling.importance, inverse=sampling.inverse)
        levels.append(
            render_level(
                model.for_fine,
                views.sources,
                views.maps.fine,
                *rays,
                depths,
                return_weights=return_weights,
                return_view_weights=return_view_weights,
            )
        )
    return levels


def rays_per_chunk(
    samples: int, views: int, width: int, like: Tensor, memory: int | None = None, tensors: int = LIVE_TENSORS
) -> int:
    """How many rays to render at once.

    Args:
        samples: depths a ray, of both passes.
        views: source views.
        width: of the network.
        like: gives device and element size.
        memory: budget in bytes for all that is alive; by default the cache on CPUs, half of what is free on GPUs.
        tensors: how many [rays, samples, views, width] tensors are alive.

    """
    a_ray = samples * views * width * like.element_size()
    if like.is_cuda:
        free = torch.cuda.mem_get_info(like.device)[0] // 2
        budget = min(free, memory or free) // tensors
    else:
        budget = CACHE_BYTES if memory is None else min(CACHE_BYTES, memory // tensors)
    return max(1, budget // a_ray)


class Picture(NamedTuple):
    """A rendered view.

    Attributes:
        rgb: clipped to [0, 1], [H, W, 3].
        depth: expected z-depth under the attention along the ray, [H, W].
        confidence: 1 - normalised entropy of that attention, [H, W] in [0, 1].
        occlusion: the source view that most samples of the ray attend to, int64 [H, W]; None unless asked for.

    """

    rgb: Float[Tensor, "height width 3"]
    depth: Float[Tensor, "height width"]
    confidence: Float[Tensor, "height width"]
    occlusion: Int[Tensor, "height width"] | None


@torch.inference_mode()
def render_pixels(
    model: Model,
    views: Views,
    camera: Float[Tensor, "34"],
    pixels: Int[Tensor, "rays 2"],
    sampling: Sampling,
    *,
    occlusion: bool = False,
    memory: int | None = None,
) -> tuple[Float[Tensor, "rays 3"], Float[Tensor, " rays"], Float[Tensor, " rays"], Int[Tensor, " rays"] | None]:
    """Colours (clipped), depth, confidence and, if asked for, occlusion labels of pixels, whatever the chunk size."""
    origins, directions = rays_through(camera, pixels)
    width = getattr(model.coarse, "width", 64)
    chunk = rays_per_chunk(
        sampling.samples + sampling.importance, len(views.sources.centres), width, views.maps.coarse, memory
    )
    parts: list[tuple[Tensor, ...]] = []
    for part in torch.arange(len(pixels), device=pixels.device).split(chunk):
        level = render_rays(model, views, origins[part], directions[part], sampling, return_view_weights=occlusion)[-1]
        assert level.weights is not None
        assert level.depth is not None
        found = (level.rgb.clamp(0, 1), level.depth, confidence_of(level.weights))
        parts.append((*found, occlusion_of(level.view_weights)) if level.view_weights is not None else found)
    rgb, depth, confidence, *labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return rgb, depth, confidence, labels[0] if labels else None


@torch.inference_mode()
def render_picture(
    model: Model,
    views: Views,
    camera: Float[Tensor, "34"],
    sampling: Sampling,
    *,
    stride: int = 1,
    resize: float = 1.0,
    occlusion: bool = False,
    memory: int | None = None,
) -> Picture:
    """A whole view, in evaluation mode.

    Args:
        model: switched to evaluation for the call.
        views: from `prepare_views`.
        camera: the target.
        sampling: the depths.
        stride: render every n-th pixel of both directions only: 2 in the published protocol, 1 for the full picture.
        resize: render the picture at another size.
        occlusion: also label the source views.
        memory: budget in bytes for what is alive at once.

    """
    camera = resize_camera(camera, resize) if resize != 1 else camera
    height, width = (int(x) for x in camera[:2].tolist())
    pixels = pixel_grid(height, width, stride).to(camera.device)
    was_training = model.training
    model.eval()
    try:
        rgb, depth, confidence, labels = render_pixels(
            model, views, camera, pixels, sampling, occlusion=occlusion, memory=memory
        )
    finally:
        model.train(was_training)
    shape = (-(-height // stride), -(-width // stride))
    return Picture(
        rgb.view(*shape, 3),
        depth.view(shape),
        confidence.view(shape),
        None if labels is None else labels.view(shape),
    )


def surface_points(
    depth: Float[Tensor, "height width"], camera: Float[Tensor, "34"], stride: int = 1
) -> Float[Tensor, "pixels 3"]:
    """World points at the depths of a picture's pixels, row by row."""
    height, width = (int(x) for x in camera[:2].tolist())
    origins, directions = rays_through(camera, pixel_grid(height, width, stride).to(camera.device))
    return origins + depth.reshape(-1, 1).to(origins) * directions


def target_centre(camera: Float[Tensor, "34"]) -> Float[Tensor, "3"]:
    """Centre of the target camera."""
    return pose_of(camera)[:3, 3]
