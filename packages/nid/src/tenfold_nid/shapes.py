"""Signed distance fields: generation, marching cubes, meshes and the loss on oriented point clouds (sections 5, 6 and
9).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .coordinates import lattice
from .errors import DataError, import_open3d

SYNSETS = {
    "03001627": "chair",
    "02691156": "airplane",
    "04379243": "table",
    "02958343": "car",
    "04256520": "sofa",
    "02933112": "cabinet",
    "02828884": "bench",
    "03211117": "display",
    "04090263": "rifle",
    "03691459": "loudspeaker",
    "03636649": "lamp",
    "04401088": "telephone",
    "04530566": "watercraft",
}
"""ShapeNet categories of the experiments; the first is the default."""


SURFACE_SAMPLES = 10_000
"""Points that stand for a true surface where another is compared with it, as many as a point cloud has (section 5)."""
FINE = 64
"""Samples along each axis at which a field in closed form is taken for the true surface."""


class Mesh(NamedTuple):
    """Triangles with a normal a vertex."""

    vertices: Float[Tensor, "vertices 3"]
    faces: Tensor
    """[faces, 3] vertex indices"""
    normals: Float[Tensor, "vertices 3"]


def marching_cubes(field: Float[Tensor, "depth height width"]) -> Mesh:
    """Surface of level 0 of a field on the lattice over [-1, 1]³ (section 9).

    Raises:
        ValueError: the field does not change sign, so that there is no surface.

    """
    from skimage.measure import marching_cubes as skimage_marching_cubes  # noqa: PLC0415

    values = field.detach().cpu().numpy()
    if not values.min() < 0 < values.max():
        raise ValueError(
            f"the field runs from {values.min():.3g} to {values.max():.3g} "
            "and never crosses 0: there is no surface to extract"
        )
    spacing = tuple(2 / (n - 1) for n in values.shape)
    vertices, faces, normals, _ = skimage_marching_cubes(values, level=0.0, spacing=spacing)
    return Mesh(
        torch.from_numpy(vertices - 1.0).double(),
        torch.from_numpy(faces.astype(np.int64)),
        torch.from_numpy(normals.copy()).double(),
    )


def extract_mesh(
    field: Callable[[Tensor], Tensor],
    resolution: int = 128,
    *,
    device: torch.device | None = None,
    chunk: int = 1 << 16,
) -> Mesh:
    """Sample a field ``[points, 3] -> [points, 1]`` on a lattice, chunk by chunk, and extract its surface."""
    coords = lattice((resolution,) * 3, device=device)
    with torch.inference_mode():
        values = torch.cat([field(part).squeeze(-1) for part in coords.split(chunk)])
    return marching_cubes(values.view(resolution, resolution, resolution).float())


def save_mesh(mesh: Mesh, path: str | Path) -> None:
    """Write a mesh through Open3D in the format that the suffix names (.ply, .obj, .stl, .off, .glb).

    Raises:
        DataError: the file cannot be written in that format.

    """
    o3d = import_open3d()
    out = o3d.geometry.TriangleMesh(
        o3d.utility.Vector3dVector(mesh.vertices.double().numpy()), o3d.utility.Vector3iVector(mesh.faces.int().numpy())
    )
    out.vertex_normals = o3d.utility.Vector3dVector(mesh.normals.double().numpy())
    if not o3d.io.write_triangle_mesh(str(path), out):
        raise DataError(f"{path}: Open3D cannot write this file; use a suffix it knows, such as .ply or .obj")


def normalise_vertices(vertices: Float[Tensor, "vertices 3"]) -> Float[Tensor, "vertices 3"]:
    """Centre on the mean vertex, then scale by the global smallest and largest coordinate to [-1, 1] (section 5)."""
    centred = vertices - vertices.mean(dim=0)
    low, high = centred.min(), centred.max()
    return (centred - low) / (high - low) * 2 - 1


def read_mesh(path: str | Path) -> Mesh:
    """A watertight mesh in any format of Open3D, centred and scaled to [-1, 1] (section 5).

    Raises:
        DataError: the file holds no triangles, or they do not enclose a volume.

    """
    o3d = import_open3d()
    mesh = o3d.io.read_triangle_mesh(str(path))
    if not len(mesh.triangles):
        raise DataError(f"{path}: no triangles could be read")
    mesh.remove_duplicated_vertices()
    if not mesh.is_watertight():
        raise DataError(
            f"{path}: the mesh is not watertight, so inside and outside are undefined; close its holes "
            "(for example with ManifoldPlus) and try again"
        )
    mesh.compute_vertex_normals()
    vertices, faces, normals = (
        torch.from_numpy(np.array(x)) for x in (mesh.vertices, mesh.triangles, mesh.vertex_normals)
    )
    return Mesh(normalise_vertices(vertices), faces.long(), normals)


def sdf_from_mesh(mesh: Mesh | str | Path, resolution: int = 128) -> Float[Tensor, "depth height width"]:
    """Signed distance on the lattice over [-1, 1]³ by ray casting, negative inside (section 5).

    Args:
        mesh: watertight, in [-1, 1]³, or a file that ``read_mesh`` brings there.
        resolution: samples along each axis.

    Raises:
        DataError: the file holds no triangles, or they do not enclose a volume.

    """
    o3d = import_open3d()
    vertices, faces, _ = mesh if isinstance(mesh, Mesh) else read_mesh(mesh)
    scene = o3d.t.geometry.RaycastingScene()
    scene.add_triangles(o3d.core.Tensor(vertices.float().numpy()), o3d.core.Tensor(faces.numpy().astype(np.uint32)))
    points = o3d.core.Tensor(lattice((resolution,) * 3).numpy())
    distances = scene.compute_signed_distance(points).numpy()
    return torch.from_numpy(distances).view(resolution, resolution, resolution)


def primitive_sdf(kind: str, points: Float[Tensor, "*points 3"]) -> Float[Tensor, "*points"]:
    """Closed-form signed distance of a primitive of about unit size centred at the origin.

    Raises:
        ValueError: the primitive is unknown.

    """
    radial = points[..., :2].norm(dim=-1)
    height = points[..., 2]
    if kind == "sphere":
        return points.norm(dim=-1) - 0.6
    if kind == "box":
        outside = points.abs() - 0.5
        return outside.clamp(min=0).norm(dim=-1) + outside.amax(dim=-1).clamp(max=0)
    if kind == "cylinder":
        both = torch.stack([radial - 0.45, height.abs() - 0.55], dim=-1)
        return both.clamp(min=0).norm(dim=-1) + both.amax(dim=-1).clamp(max=0)
    if kind == "torus":
        return torch.stack([radial - 0.5, height], dim=-1).norm(dim=-1) - 0.2
    raise ValueError(f"unknown primitive {kind!r}; there are {', '.join(PRIMITIVES)}")


PRIMITIVES = ("sphere", "box", "cylinder", "torus")


def random_shapes(count: int, resolution: int, seed: int = 0) -> Float[Tensor, "count depth height width 1"]:
    """Signed distances of primitives under a random rotation and isotropic scale: exact, with no mesh in between.

    A further random anisotropic stretch would make the closed form a bound only, so the boxes and cylinders alone vary
    in shape through their rotation.
    """
    generator = torch.Generator().manual_seed(seed)
    coords = lattice((resolution,) * 3)
    fields = []
    for i in range(count):
        rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator))
        scale = 0.7 + 0.5 * float(torch.rand((), generator=generator))
        kind = (
            PRIMITIVES[int(torch.randint(len(PRIMITIVES), (), generator=generator))]
            if i >= len(PRIMITIVES)
            else PRIMITIVES[i]
        )
        fields.append(primitive_sdf(kind, coords @ rotation / scale) * scale)
    return torch.stack(fields).view(count, resolution, resolution, resolution, 1)


class PointCloudLoss(NamedTuple):
    """Terms of the loss on an oriented point cloud, weighted."""

    total: Float[Tensor, ""]
    on_surface: Float[Tensor, ""]
    off_surface: Float[Tensor, ""]
    normals: Float[Tensor, ""] | None
    eikonal: Float[Tensor, ""] | None


def point_cloud_loss(
    field: Callable[[Tensor], Tensor],
    on_surface: Float[Tensor, "points 3"],
    normals: Float[Tensor, "points 3"],
    off_surface: Float[Tensor, "others 3"],
    *,
    loss_norm: bool = True,
) -> PointCloudLoss:
    """Signed distance from points: zero on the surface, not elsewhere, gradients along normals and of unit length
    (section 6).

    ``3000·mean|f(on)| + 100·mean exp(-100|f(off)|) + 100·mean(1 - cos(∇f, n)) + 50·mean|‖∇f‖ - 1|``, the last two on
    the surface and only with ``loss_norm``.
    """
    on_surface = on_surface.detach().requires_grad_(loss_norm)
    values = field(on_surface)
    on_term = 3000 * values.abs().mean()
    off_term = 100 * torch.exp(-100 * field(off_surface).abs()).mean()
    if not loss_norm:
        return PointCloudLoss(on_term + off_term, on_term, off_term, None, None)
    (gradient,) = torch.autograd.grad(values.sum(), on_surface, create_graph=True)
    normal_term = 100 * (1 - F.cosine_similarity(gradient, normals, dim=-1)).mean()
    eikonal_term = 50 * (gradient.norm(dim=-1) - 1).abs().mean()
    total = on_term + off_term + normal_term + eikonal_term
    return PointCloudLoss(total, on_term, off_term, normal_term, eikonal_term)


def sample_surface(mesh: Mesh, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Points drawn uniformly on the triangles [count, 3] and the face normals there [count, 3]."""
    corners = mesh.vertices[mesh.faces].double()
    cross = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = cross.norm(dim=-1)
    face = torch.multinomial(area, count, replacement=True, generator=generator)
    u, v = torch.rand(2, count, 1, generator=generator, dtype=torch.float64)
    root = u.sqrt()
    points = (1 - root) * corners[face, 0] + root * (1 - v) * corners[face, 1] + root * v * corners[face, 2]
    return points, F.normalize(cross[face], dim=-1)


def open3d_primitives() -> dict[str, Any]:
    """Open3D's triangle meshes of simple solids by name, for trying the mesh route without any data."""
    mesh = import_open3d().geometry.TriangleMesh
    return {
        "box": mesh.create_box(),
        "sphere": mesh.create_sphere(),
        "cylinder": mesh.create_cylinder(),
        "cone": mesh.create_cone(),
        "torus": mesh.create_torus(),
    }
