"""Density on a grid, surfaces and depth against exact truth (section 9)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from tenfold_augnerf.fields import Samples

DEFAULT_EXTENT, DEFAULT_POINTS = 2.0, 256


def grid_axes(extents: Sequence[float], voxel: float) -> list[np.ndarray]:
    """int(extent / voxel) positions from -extent/2 to extent/2, both included, along x, y and z.

    Extents are (w, h, d) as the released code names them, and there h is along x and w along y.
    """
    w, h, d = extents
    return [np.linspace(-extent / 2, extent / 2, int(extent / voxel)) for extent in (h, w, d)]


@torch.inference_mode()
def density_grid(field: Any, extents: Sequence[float], voxel: float, *, chunk: int = 65536) -> Float[Tensor, "x y z"]:
    """Densities of a field on a grid, asked with a zero view direction.

    Args:
        field: usually the fine one.
        extents: (w, h, d) along y, x and z (see `grid_axes`), about the origin.
        voxel: spacing, by which int(extent / voxel) points are laid.
        chunk: points at a time.

    Returns:
        Values at the points of `grid_axes`.

    """
    x, y, z = (torch.from_numpy(axis) for axis in grid_axes(extents, voxel))
    points = torch.stack(torch.meshgrid(x, y, z, indexing="ij"), -1)
    parameter = next(field.parameters())
    found = [density_at(field, part.to(parameter)) for part in points.view(-1, 3).split(chunk)]
    return torch.cat(found).view(points.shape[:3])


def density_at(field: Any, points: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]:
    """Densities at points."""
    samples = Samples(points[:, None], torch.zeros_like(points[:, None]) if field.extra_edges else None)
    raw = field.heads(field.encode(samples), torch.zeros_like(points))
    return field.activate(raw)[1][:, 0]


def extract_mesh(density: np.ndarray, axes: Sequence[np.ndarray], threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [V, 3] (x, y, z) and triangles [F, 3] where a grid of `density_grid` crosses a threshold.

    `axes` are those of x, y and z. Both are empty where nothing crosses it.
    """
    from skimage.measure import marching_cubes  # noqa: PLC0415 - slow to import

    if not density.min() < threshold < density.max():
        return np.zeros((0, 3)), np.zeros((0, 3), dtype=np.int64)
    spacing = tuple(float(axis[1] - axis[0]) for axis in axes)
    vertices, faces, *_ = marching_cubes(density, threshold, spacing=spacing)
    return vertices + [float(axis[0]) for axis in axes], faces.astype(np.int64)


def write_obj(vertices: np.ndarray, faces: np.ndarray) -> str:
    """The mesh as a Wavefront OBJ text."""
    lines = [f"v {x:.6g} {y:.6g} {z:.6g}" for x, y, z in vertices]
    return "\n".join([*lines, *(f"f {a + 1} {b + 1} {c + 1}" for a, b, c in faces)]) + "\n"


def sample_triangles(vertices: np.ndarray, faces: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """`count` points [count, 3], uniform on the surface of a mesh."""
    generator = np.random.default_rng(seed)
    corner, first, second = (vertices[faces[:, i]] for i in range(3))
    areas = np.linalg.norm(np.cross(first - corner, second - corner), axis=-1)
    chosen = generator.choice(len(faces), size=count, p=areas / areas.sum())
    u, v = generator.random((2, count, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    return corner[chosen] + u * (first - corner)[chosen] + v * (second - corner)[chosen]


def covered(points: np.ndarray, axes: Sequence[np.ndarray]) -> np.ndarray:
    """Those of the points [n, 3] that lie inside a grid of `grid_axes` or on its faces."""
    low, high = np.array([(axis[0], axis[-1]) for axis in axes]).T
    return points[((points >= low) & (points <= high)).all(-1)]


def chamfer(first: np.ndarray, second: np.ndarray) -> float:
    """Mean distance to the nearest point of the other set, both ways, averaged. Sets [n, 3]; nan for an empty one."""
    from scipy.spatial import cKDTree  # noqa: PLC0415 - slow to import

    if not len(first) or not len(second):
        return float("nan")
    there, back = cKDTree(second).query(first)[0], cKDTree(first).query(second)[0]
    return float((there.mean() + back.mean()) / 2)


def median_depth(weights: Float[Tensor, "rays samples"], z: Float[Tensor, "rays samples"]) -> Float[Tensor, " rays"]:
    """The first z at which half of a ray's weight is passed; the last one for rays whose weights sum to less than ½."""
    passed = weights.cumsum(-1) >= 0.5
    last = torch.full_like(passed[:, 0], z.shape[-1] - 1, dtype=torch.long)
    index = torch.where(passed.any(-1), passed.to(torch.uint8).argmax(-1), last)
    return z.gather(-1, index[:, None])[:, 0]


def normals_from_depth(
    depth: Float[Tensor, "height width"],
    origins: Float[Tensor, "height width 3"],
    directions: Float[Tensor, "height width 3"],
) -> Float[Tensor, "height width 3"]:
    """Unit normals towards the camera from differences of neighbouring surface points (central, one-sided at borders)."""
    points = origins + depth[..., None] * directions
    down, right = torch.gradient(points, dim=(0, 1))
    normal = F.normalize(torch.cross(right, down, dim=-1), dim=-1)
    facing = (normal * directions).sum(-1, keepdim=True)
    return torch.where(facing > 0, -normal, normal)


def depth_scores(
    depth: Float[Tensor, " pixels"],
    median: Float[Tensor, " pixels"],
    acc: Float[Tensor, " pixels"],
    truth: Float[Tensor, " pixels"],
) -> dict[str, float]:
    """Errors of depth on the pixels that hit something (finite truth), and of the mask everywhere.

    `depth` is Σ w z; it is divided by acc here, and counts as 0 where acc is.
    """
    hit = truth.isfinite()
    expected = torch.where(acc > 1e-3, depth / acc.clamp(min=1e-3), torch.zeros_like(depth))
    error = (expected - truth)[hit]
    return {
        "depth_mae": float(error.abs().mean()),
        "depth_rmse": float(error.square().mean().sqrt()),
        "median_depth_mae": float((median - truth)[hit].abs().mean()),
        "mask_error": float((acc - hit.to(acc)).abs().mean()),
    }


def normal_error(
    found: Float[Tensor, "height width 3"], truth: Float[Tensor, "height width 3"], valid: Bool[Tensor, "height width"]
) -> float:
    """Mean angle in degrees between normals on the valid pixels; nan where there is none."""
    cosine = (found * truth).sum(-1)[valid].clamp(-1, 1)
    return float(torch.rad2deg(torch.arccos(cosine)).mean())


def total_variation(image: Float[Tensor, "height width"]) -> float:
    """Mean absolute difference between neighbours, down and across."""
    return float((image[1:] - image[:-1]).abs().mean() + (image[:, 1:] - image[:, :-1]).abs().mean())


def grid_variation(density: Float[Tensor, "x y z"]) -> float:
    """Mean absolute difference between neighbouring opacities 1 - exp(-σ Δ) of a grid, with Δ one unit."""
    opacity = 1 - torch.exp(-density)
    return float(sum(opacity.diff(dim=axis).abs().mean() for axis in range(3)))


def ray_entropies(weights: Float[Tensor, "rays samples"]) -> Float[Tensor, " seen"]:
    """Entropy (nats) of the weights along each ray that is not empty, normalised."""
    acc = weights.sum(-1, keepdim=True)
    share = (weights / acc.clamp(min=1e-10)).clamp(min=1e-12)
    entropy = -(share * share.log()).sum(-1)
    return entropy[acc[:, 0] > 1e-3]


def ray_entropy(weights: Float[Tensor, "rays samples"]) -> float:
    """Mean of `ray_entropies`; nan where every ray is empty."""
    return float(ray_entropies(weights).mean())
