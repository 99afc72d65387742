"""Classical solutions of the tasks: interpolation, filtered back-projection, total variation, robust PCA, median
(section 8).
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..coordinates import lattice


def interpolate(
    images: Float[Tensor, "batch height width channels"], mask: Bool[Tensor, "batch height width"]
) -> Float[Tensor, "batch height width channels"]:
    """Linear interpolation of scattered pixels on a Delaunay triangulation, nearest pixel outside their hull."""
    from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator  # noqa: PLC0415
    from scipy.spatial import QhullError  # noqa: PLC0415

    grid = lattice(images.shape[1:3]).numpy()
    filled = []
    for image, seen in zip(images.detach().cpu().flatten(1, 2).numpy(), mask.cpu().flatten(1).numpy(), strict=True):
        nearest = NearestNDInterpolator(grid[seen], image[seen])(grid)
        try:
            linear = LinearNDInterpolator(grid[seen], image[seen])(grid)
        except QhullError:  # fewer than three pixels, or all on a line
            linear = np.full_like(nearest, np.nan)
        filled.append(np.where(seen[:, None], image, np.where(np.isnan(linear), nearest, linear)))
    return torch.from_numpy(np.stack(filled)).to(images).view_as(images)


def fbp(
    sinograms: Float[Tensor, "batch rays 1"], angles: Float[Tensor, " views"], size: int
) -> Float[Tensor, "batch size size 1"]:
    """Filtered back-projection with the ramp filter (scikit-image) of square images.

    Args:
        sinograms: means along the rays, ordered by view, then row.
        angles: θ of each view; a closing view at π repeats the one at 0 and is left out.
        size: pixels along a side, and rays a view.

    Raises:
        ValueError: the rays are not those of these views of square images.

    """
    if sinograms.shape[1] != len(angles) * size:
        raise ValueError(
            f"{len(angles)} views of {size} rays are {len(angles) * size} projections, got {sinograms.shape[1]}"
        )
    from skimage.transform import iradon  # noqa: PLC0415

    distinct = angles.cpu() < math.pi - 1e-4 if len(angles) > 1 else torch.ones(1, dtype=torch.bool)
    theta = angles.cpu()[distinct].numpy().astype(np.float64)
    views = sinograms.detach().cpu().view(len(sinograms), -1, size)[:, distinct].numpy() * size
    # scikit-image turns about pixel size // 2, the lattice about (size - 1) / 2: resample each view by the difference.
    rows = np.arange(size)
    offset = (0.5 if size % 2 == 0 else 0.0) * (np.cos(theta) + np.sin(theta) - 1)
    degrees = np.rad2deg(theta) - 90
    images = []
    for scan in views:
        shifted = [np.interp(rows + d, rows, view, left=0, right=0) for d, view in zip(offset, scan, strict=True)]
        images.append(
            iradon(np.stack(shifted, axis=1), theta=degrees, filter_name="ramp", circle=False, output_size=size)
        )
    return torch.from_numpy(np.stack(images))[..., None].to(sinograms)


def projection_matrix(size: tuple[int, int], coords: Float[Tensor, "rays samples 2"]) -> Tensor:
    """Sparse [rays, pixels] matrix of ``ct.sinogram``: bilinear weights of every sample, averaged along its ray."""
    rays, samples, _ = coords.shape
    scale = torch.tensor([size[0] - 1, size[1] - 1], dtype=torch.float64)
    place = (coords.double().cpu() + 1) / 2 * scale
    corner = place.floor()
    fraction = place - corner
    ray = torch.arange(rays)[:, None].expand(rays, samples)
    indices, values = [], []
    for down in (0, 1):
        for right in (0, 1):
            row, col = corner[..., 0].long() + down, corner[..., 1].long() + right
            weight = (fraction[..., 0] if down else 1 - fraction[..., 0]) * (
                fraction[..., 1] if right else 1 - fraction[..., 1]
            )
            inside = (row >= 0) & (row < size[0]) & (col >= 0) & (col < size[1]) & (weight > 0)
            indices.append(torch.stack([ray[inside], row[inside] * size[1] + col[inside]]))
            values.append(weight[inside] / samples)
    shape = (rays, size[0] * size[1])
    return torch.sparse_coo_tensor(torch.cat(indices, 1), torch.cat(values), shape, check_invariants=True).coalesce()


def tv(
    sinograms: Float[Tensor, "batch rays 1"],
    coords: Float[Tensor, "rays samples 2"],
    size: tuple[int, int],
    *,
    weight: float = 1e-3,
    steps: int = 300,
) -> Float[Tensor, "batch height width 1"]:
    """``min ½ ‖A x - b‖² · pixels/rays + weight · TV(x)``, x >= 0, by the primal-dual method of Chambolle and Pock.

    Args:
        sinograms: b, means along the rays.
        coords: samples of the rays.
        size: (height, width).
        weight: of the isotropic total variation.
        steps: iterations.

    """
    height, width = size
    balance = math.sqrt(height * width / coords.shape[0])
    weights = (projection_matrix(size, coords) * balance).to(sinograms)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        matrix, adjoint = weights.to_sparse_csr(), weights.T.to_sparse_csr()
    observed = sinograms.squeeze(-1).T * balance
    probe = torch.ones(matrix.shape[1], 1).to(sinograms)
    for _ in range(20):
        probe = adjoint @ (matrix @ probe)
        norm = probe.norm()
        probe = probe / norm
    # The image enters scaled, so that projections (means) and differences are of the same size.
    step = 0.99 / math.sqrt(float(norm) + 8)
    x = torch.zeros(matrix.shape[1], observed.shape[1]).to(sinograms)
    ahead, dual = x, torch.zeros_like(observed)
    slope = x.new_zeros(2, height, width, x.shape[1])
    for _ in range(steps):
        dual = (dual + step * (matrix @ ahead - observed)) / (1 + step)
        slope = slope + step * _gradient(ahead.view(height, width, -1))
        if weight > 0:
            slope = slope / (slope.norm(dim=0, keepdim=True) / weight).clamp(min=1)
        else:
            slope = torch.zeros_like(slope)
        after = (x - step * (adjoint @ dual - _divergence(slope).view_as(x))).clamp(min=0)
        ahead, x = 2 * after - x, after
    return x.T.reshape(-1, height, width, 1)


def _gradient(image: Tensor) -> Tensor:
    down, right = torch.zeros_like(image), torch.zeros_like(image)
    down[:-1] = image[1:] - image[:-1]
    right[:, :-1] = image[:, 1:] - image[:, :-1]
    return torch.stack([down, right])


def _divergence(slope: Tensor) -> Tensor:
    down, right = slope
    total = torch.zeros_like(down)
    total[:-1] += down[:-1]
    total[1:] -= down[:-1]
    total[:, :-1] += right[:, :-1]
    total[:, 1:] -= right[:, :-1]
    return total


class LowRankSparse(NamedTuple):
    """A matrix as low rank plus sparse."""

    low_rank: Float[Tensor, "rows cols"]
    sparse: Float[Tensor, "rows cols"]


def rpca(matrix: Float[Tensor, "rows cols"], *, tolerance: float = 1e-7, max_steps: int = 500) -> LowRankSparse:
    """Principal component pursuit (Candès et al. 2011), augmented Lagrangian, λ = 1/√max(m, n), μ = mn/(4‖M‖₁)."""
    rows, cols = matrix.shape
    norm = matrix.abs().sum()
    if not bool(norm > 0):
        return LowRankSparse(matrix.clone(), torch.zeros_like(matrix))
    penalty, mu = 1 / math.sqrt(max(rows, cols)), rows * cols / (4 * norm)
    scale = matrix.norm()
    sparse, dual = torch.zeros_like(matrix), torch.zeros_like(matrix)
    for _ in range(max_steps):
        u, s, v = torch.linalg.svd(matrix - sparse + dual / mu, full_matrices=False)
        low_rank = (u * (s - 1 / mu).clamp(min=0)) @ v
        rest = matrix - low_rank + dual / mu
        sparse = rest.sign() * (rest.abs() - penalty / mu).clamp(min=0)
        gap = matrix - low_rank - sparse
        dual = dual + mu * gap
        if bool(gap.norm() <= tolerance * scale):
            break
    return LowRankSparse(low_rank, sparse)


def median_background(frames: Float[Tensor, "frames height width channels"]) -> Float[Tensor, "height width channels"]:
    """Median over time of every pixel."""
    return frames.median(dim=0).values
