"""Floors: a copy of the nearest source view, and the mean of the source colours at given depths."""

from jaxtyping import Float
from torch import Tensor

from tenfold_gnt.cameras import pose_of
from tenfold_gnt.projection import SourceViews, sample_views
from tenfold_gnt.sampling import points_at


def nearest_view(
    target: Float[Tensor, "34"], images: Float[Tensor, "views height width 3"], cameras: Float[Tensor, "views 34"]
) -> Float[Tensor, "height width 3"]:
    """The source picture whose camera centre is nearest to the target's, as it is."""
    distances = (pose_of(cameras)[:, :3, 3] - pose_of(target)[:3, 3]).norm(dim=-1)
    return images[distances.argmin()]


def mean_view(
    origins: Float[Tensor, "rays 3"],
    directions: Float[Tensor, "rays 3"],
    depths: Float[Tensor, " rays"],
    sources: SourceViews,
) -> Float[Tensor, "rays 3"]:
    """Mean colour of the source views that see the point at each ray's depth; white where none does."""
    points = points_at(origins, directions, depths[:, None])
    samples = sample_views(points, origins[0], sources, sources.images[:, :0])
    colours, mask = samples.rgb_feat[:, 0], samples.mask[:, 0]
    seen = mask.sum(-2)
    return (colours * mask).sum(-2) / seen.clamp(min=1) + (seen == 0)
