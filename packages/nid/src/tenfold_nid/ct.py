"""Computed tomography: the projection operator of the paper, exact phantoms, reconstruction (section 5)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .coordinates import lattice
from .dictionary import Mixture, NeuralDictionary, design_from_atoms
from .experts import IndependentExperts, SharedTrunkExperts


def view_angles(num_views: int, *, device: torch.device | None = None) -> Float[Tensor, " views"]:
    """``linspace(0, π, T)``, both ends included, so that the first view and the last coincide up to reversal."""
    if num_views < 1:
        raise ValueError(f"a scan needs at least one view, got {num_views}")
    return torch.linspace(0, math.pi, num_views, dtype=torch.float32, device=device)


def ray_coordinates(size: tuple[int, int], angles: Float[Tensor, " views"]) -> Float[Tensor, "rays samples 2"]:
    """Sample positions of every ray: row i of the pixel lattice turned by θ (section 5).

    ``x' = x cos θ - y sin θ, y' = x sin θ + y cos θ`` with x along rows and y along columns. Rays are ordered by view,
    then row; a ray has one sample a column.
    """
    grid = lattice(size, device=angles.device, dtype=angles.dtype)
    x, y = grid[None, :, 0], grid[None, :, 1]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    turned = torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1)
    return turned.reshape(-1, size[1], 2)


def sinogram(
    images: Float[Tensor, "batch height width channels"], coords: Float[Tensor, "rays samples 2"]
) -> Float[Tensor, "batch rays channels"]:
    """Mean of the image over the samples of each ray: bilinear between pixels, zero outside."""
    planes = images.permute(0, 3, 2, 1)  # grid_sample's first coordinate runs along the last axis: rows go there
    grid = coords.to(images.dtype)[None].expand(len(images), -1, -1, -1)
    return F.grid_sample(planes, grid, align_corners=True, padding_mode="zeros").mean(dim=-1).mT


def ray_features(
    experts: SharedTrunkExperts, coords: Float[Tensor, "rays samples 2"], chunk: int = 1 << 16
) -> Float[Tensor, "rays hidden"]:
    """Trunk features averaged along each ray.

    The heads are linear, so the projection of a mixture is the mixture at the mean feature; the cost of the heads
    falls by the number of samples a ray has. Samples outside [-1, 1]² count, as released.
    """
    rays = max(1, chunk // coords.shape[1])
    return torch.cat([experts.features(part).mean(dim=-2) for part in coords.split(rays)])


def project(
    model: NeuralDictionary,
    signal: Tensor,
    coords: Float[Tensor, "rays samples 2"],
    *,
    dense: bool = False,
) -> Mixture:
    """Projections of the signals along rays, in the place of their values at points (section 5)."""
    experts = model.experts
    if isinstance(experts, IndependentExperts):
        mixture = model(signal, coords.flatten(0, 1), dense=dense)
        preds = mixture.preds.unflatten(1, coords.shape[:2]).mean(dim=2)
        return mixture._replace(preds=preds)
    return model.mixture(signal, ray_features(experts, coords), dense=dense)


def projection_design(
    model: NeuralDictionary, coords: Float[Tensor, "rays samples 2"], chunk: int = 1 << 16
) -> Float[Tensor, "rows code"]:
    """Matrix that takes a code to the sinogram: projections give the same linear system as pixels."""
    experts = model.experts
    if isinstance(experts, SharedTrunkExperts):
        return design_from_atoms(experts.atoms(ray_features(experts, coords, chunk)))
    rays = max(1, chunk // coords.shape[1])
    parts = [experts.atoms(experts.features(part)).mean(dim=1) for part in coords.split(rays)]
    return design_from_atoms(torch.cat(parts))


def pick_views(num_views: int, height: int, keep: int) -> Int[Tensor, " rays"]:
    """Ray indices of ``keep`` views spread evenly over a scan of ``num_views``, the closing one left out.

    Raises:
        ValueError: more views are asked for than there are.

    """
    if not 1 <= keep <= max(num_views - 1, 1):
        raise ValueError(f"{num_views} views include {max(num_views - 1, 1)} distinct ones, got {keep}")
    views = torch.arange(keep) * (num_views - 1) // keep
    return (views[:, None] * height + torch.arange(height)).flatten()


SHEPP_LOGAN = torch.tensor(
    [
        # intensity, semi-axis along x, semi-axis along y, centre x, centre y, angle in degrees
        [1.0, 0.69, 0.92, 0.0, 0.0, 0.0],
        [-0.8, 0.6624, 0.874, 0.0, -0.0184, 0.0],
        [-0.2, 0.11, 0.31, 0.22, 0.0, -18.0],
        [-0.2, 0.16, 0.41, -0.22, 0.0, 18.0],
        [0.1, 0.21, 0.25, 0.0, 0.35, 0.0],
        [0.1, 0.046, 0.046, 0.0, 0.1, 0.0],
        [0.1, 0.046, 0.046, 0.0, -0.1, 0.0],
        [0.1, 0.046, 0.023, -0.08, -0.605, 0.0],
        [0.1, 0.023, 0.023, 0.0, -0.606, 0.0],
        [0.1, 0.023, 0.046, 0.06, -0.605, 0.0],
    ]
)
"""The ten ellipses of the modified Shepp-Logan head phantom (higher contrast, Toft 1996)."""


def random_ellipses(count: int, seed: int = 0, jitter: float = 0.1) -> Float[Tensor, "count ellipses 6"]:
    """Shepp-Logan's ellipses with jittered intensity, axes, centre and angle; the skull keeps its intensity.

    Args:
        count: phantoms.
        seed: of the draw.
        jitter: relative size of the disturbance.

    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(count, len(SHEPP_LOGAN), 6, generator=generator) * 2 - 1
    base = SHEPP_LOGAN.expand(count, -1, -1)
    scaled = base * (1 + jitter * draw)
    moved = base + torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5, 200.0]) * jitter * draw
    ellipses = torch.cat([scaled[..., :3], moved[..., 3:]], dim=-1)
    ellipses[:, :2, 0] = base[:, :2, 0]
    ellipses[:, :2, 1:] = base[:, :2, 1:] * (1 + 0.3 * jitter * draw[:, :1, 1:])
    return ellipses


def render_ellipses(
    ellipses: Float[Tensor, "count ellipses 6"], size: tuple[int, int], supersample: int = 1
) -> Float[Tensor, "count height width 1"]:
    """Phantoms on the pixel lattice over [-1, 1]²; x grows with the column, y decreases with the row.

    Args:
        ellipses: (intensity, semi-axes, centre, angle in degrees) each.
        size: pixels.
        supersample: samples averaged per pixel side.

    """
    height, width = size
    offsets = (torch.arange(supersample) + 0.5) / supersample - 0.5
    rows = (torch.arange(height)[:, None] + offsets).flatten() / max(height - 1, 1) * 2 - 1
    cols = (torch.arange(width)[:, None] + offsets).flatten() / max(width - 1, 1) * 2 - 1
    y, x = torch.meshgrid(-rows, cols, indexing="ij")
    value, a, b, cx, cy, angle = (column[:, :, None, None] for column in ellipses.unbind(-1))
    cos, sin = torch.cos(torch.deg2rad(angle)), torch.sin(torch.deg2rad(angle))
    u = (x - cx) * cos + (y - cy) * sin
    v = (y - cy) * cos - (x - cx) * sin
    inside = (u / a).square() + (v / b).square() <= 1
    fine = (value * inside).sum(dim=1)
    return fine.reshape(-1, height, supersample, width, supersample).mean(dim=(2, 4))[..., None]


def ellipse_line_integrals(
    ellipses: Float[Tensor, "count ellipses 6"], coords: Float[Tensor, "rays samples 2"]
) -> Float[Tensor, "count rays 1"]:
    """Exact mean of a phantom along the segment that each ray samples, from its first sample to its last.

    The closed form that discrete projections of ``render_ellipses`` tend to as pixels shrink.
    """
    start = torch.stack([coords[:, 0, 1], -coords[:, 0, 0]], dim=-1)
    stop = torch.stack([coords[:, -1, 1], -coords[:, -1, 0]], dim=-1)
    value, a, b, cx, cy, angle = (column[:, :, None] for column in ellipses.to(coords.dtype).unbind(-1))
    cos, sin = torch.cos(torch.deg2rad(angle)), torch.sin(torch.deg2rad(angle))

    def to_unit(points: Tensor) -> tuple[Tensor, Tensor]:
        x, y = points[:, 0] - cx, points[:, 1] - cy
        return (x * cos + y * sin) / a, (y * cos - x * sin) / b

    (u0, v0), (u1, v1) = to_unit(start), to_unit(stop)
    du, dv = u1 - u0, v1 - v0
    square, half, rest = du.square() + dv.square(), u0 * du + v0 * dv, u0.square() + v0.square() - 1
    root = (half.square() - square * rest).clamp(min=0).sqrt()
    enter, leave = ((-half - root) / square).clamp(0, 1), ((-half + root) / square).clamp(0, 1)
    return (value * (leave - enter)).sum(dim=1)[..., None]
