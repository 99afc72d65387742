"""Files of meshes and clouds, sampling, voxels (sections 5 and 11). Open3D does the work and is imported when needed."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy import ndarray

from tenfold_shared.checkpoint import atomic_write
from tenfold_shared.errors import UserError

MESHES = (".obj", ".off", ".stl", ".ply")
CLOUDS = (".xyz", ".pcd", ".ply", ".txt", ".npy")


def open3d() -> Any:
    """The library.

    Raises:
        UserError: it cannot be loaded; the message names what is missing.

    """
    try:
        return importlib.import_module("open3d")
    except (ImportError, OSError) as error:
        missing = (
            "the system library libusb-1.0 (apt install libusb-1.0-0)"
            if "usb" in str(error)
            else "it: pip install open3d"
        )
        raise UserError(f"Open3D cannot be loaded ({error}); install {missing}") from error


@dataclass(frozen=True)
class Geometry:
    """What a file holds: vertices or points, triangles (none for a cloud), colours in [0, 1] if there are any."""

    points: Float[ndarray, "n 3"]
    faces: Int[ndarray, "f 3"]
    colours: Float[ndarray, "n 3"] | None = None

    @property
    def is_mesh(self) -> bool:
        """Whether there are triangles."""
        return len(self.faces) > 0


def read_geometry(path: Path) -> Geometry:
    """A mesh (OBJ, OFF, STL, PLY) or a cloud (PLY, PCD, XYZ, TXT, NPY).

    Raises:
        UserError: no such file, another format, unreadable; no points, one point, a coordinate that is not finite, no
            extent, or a mesh format without faces. The file is named.

    """
    if not path.is_file():
        raise UserError(f"no file at {path}")
    suffix = path.suffix.lower()
    if suffix not in (*MESHES, *CLOUDS):
        raise UserError(
            f"{path}: formats are {', '.join(sorted({*MESHES, *CLOUDS}))}, not {suffix or 'a name without one'}"
        )
    colours = None
    faces = np.zeros((0, 3), int)
    if suffix in (".xyz", ".txt", ".npy"):
        points, colours = _table(path)
    elif suffix == ".off":
        points, faces = read_off(path)
    else:
        points, faces, colours = _with_open3d(path, suffix)
    check_geometry(points, str(path))
    if suffix in (".obj", ".off", ".stl") and not len(faces):
        raise UserError(f"{path} is a mesh without faces: give a mesh with triangles, or its vertices as .xyz")
    return Geometry(points, faces, colours)


def check_geometry(points: Float[ndarray, "n 3"], where: str) -> None:
    """Refuse what has no shape; see `read_geometry`."""
    if len(points) < 2:
        raise UserError(f"{where} has {len(points)} points: at least 2 are needed")
    bad = ~np.isfinite(points).all(1)
    if bad.any():
        raise UserError(f"{where}: point {int(bad.argmax())} has a coordinate that is not finite; remove such points")
    if not (points.max(0) - points.min(0)).max() > 0:
        raise UserError(f"{where}: all {len(points)} points are in one place, so it has no extent")


def _table(path: Path) -> tuple[ndarray, ndarray | None]:
    try:
        if path.suffix.lower() == ".npy":
            rows = np.load(path, allow_pickle=False)
        else:
            text = path.read_text(encoding="utf-8").replace(",", " ")
            lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
            rows = np.array(lines, dtype=np.float64).reshape(len(lines), -1) if lines else np.zeros((0, 3))
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no table of numbers with equal rows: {error}") from error
    if rows.ndim != 2 or (len(rows) and rows.shape[1] < 3):
        raise UserError(f"{path} has rows of {rows.shape[-1] if rows.ndim else 0} numbers: x, y and z are needed")
    if not len(rows):
        return np.zeros((0, 3)), None
    colours = rows[:, 3:6] / 255 if rows.shape[1] >= 6 and rows[:, 3:6].max() > 1 and rows[:, 3:6].min() >= 0 else None
    return rows[:, :3].astype(np.float64), colours


def read_off(path: Path) -> tuple[Float[ndarray, "n 3"], Int[ndarray, "f 3"]]:
    """An OFF mesh, also one whose counts are glued to the word OFF (some of ModelNet); polygons are cut into fans.

    Comments, and what follows the coordinates or the corners in a line (colours), are passed over.

    Raises:
        UserError: no OFF file, or truncated.

    """
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = [words for line in text.splitlines() if (words := line.partition("#")[0].split())]
    if not rows or not rows[0][0].upper().startswith("OFF"):
        raise UserError(f"{path} is no OFF file: it must begin with OFF")
    counts = [word for word in (rows[0][0][3:], *rows[0][1:]) if word]
    rows = rows[1:]
    if not counts and rows:
        counts, rows = rows[0], rows[1:]
    try:
        vertices, polygons = int(counts[0]), int(counts[1])
        points = np.array([row[:3] for row in rows[:vertices]], dtype=np.float64).reshape(vertices, 3)
        faces = []
        for row in rows[vertices : vertices + polygons]:
            polygon = [int(v) for v in row[1 : 1 + int(row[0])]]
            if len(polygon) < int(row[0]) or (polygon and not 0 <= min(polygon) <= max(polygon) < vertices):
                raise ValueError("a face ends early or names a vertex that does not exist")
            faces += [(polygon[0], polygon[i], polygon[i + 1]) for i in range(1, len(polygon) - 1)]
        if len(rows) < vertices + polygons:
            raise ValueError(f"{len(rows) - vertices} of {polygons} faces are there")
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} is truncated or corrupted: {error}") from error
    return points, np.array(faces, dtype=int).reshape(-1, 3)


def _with_open3d(path: Path, suffix: str) -> tuple[ndarray, ndarray, ndarray | None]:
    o3d = open3d()
    with o3d.utility.VerbosityContextManager(o3d.utility.VerbosityLevel.Error):
        if suffix != ".pcd":
            mesh = o3d.io.read_triangle_mesh(str(path))
            if len(mesh.triangles):
                colours = np.asarray(mesh.vertex_colors) if mesh.has_vertex_colors() else None
                return np.asarray(mesh.vertices), np.asarray(mesh.triangles), colours
            if suffix != ".ply":
                return np.asarray(mesh.vertices), np.zeros((0, 3), int), None
        cloud = o3d.io.read_point_cloud(str(path), remove_nan_points=False, remove_infinite_points=False)
    colours = np.asarray(cloud.colors) if cloud.has_colors() else None
    return np.asarray(cloud.points), np.zeros((0, 3), int), colours


def _triangle_mesh(geometry: Geometry) -> Any:
    o3d = open3d()
    vertices = o3d.utility.Vector3dVector(geometry.points)
    return o3d.geometry.TriangleMesh(vertices, o3d.utility.Vector3iVector(geometry.faces))


def sample_surface(
    geometry: Geometry, count: int, seed: int = 0
) -> tuple[Float[ndarray, "m 3"], Float[ndarray, "m 3"]]:
    """``count`` points and unit normals: area-weighted on a mesh; of a cloud the points themselves, normals estimated.

    A cloud with more points is thinned at random, one with fewer is sampled with replacement.
    """
    o3d = open3d()
    if geometry.is_mesh:
        o3d.utility.random.seed(seed)
        mesh = _triangle_mesh(geometry)
        mesh.compute_triangle_normals()
        sampled = mesh.sample_points_uniformly(count, use_triangle_normal=True)
        if len(sampled.points) == 0:
            raise UserError("the mesh has no area: all its triangles are degenerate")
        return np.asarray(sampled.points), np.asarray(sampled.normals)
    cloud = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(geometry.points))
    cloud.estimate_normals(o3d.geometry.KDTreeSearchParamKNN(16))
    chosen = np.random.RandomState(seed % 2**32).choice(
        len(geometry.points), count, replace=len(geometry.points) < count
    )
    return np.asarray(cloud.points)[chosen], np.asarray(cloud.normals)[chosen]


def voxelise(
    geometry: Geometry, side: int = 30, frame: Literal["extent", "radius"] = "extent"
) -> UInt8[ndarray, "v v v"]:
    """Occupancy of a cube around the object: its inside (ray parity at the cell centres) and the cells its surface hits.

    Args:
        geometry: a mesh; of a cloud only the cells with points are occupied.
        side: cells per axis.
        frame: the cube's side: the largest extent, as ``binvox -cb`` does, or 1.02 times the bounding diameter, as
            `shapes` does.

    """
    o3d = open3d()
    low, high = geometry.points.min(0), geometry.points.max(0)
    middle, extent = (low + high) / 2, high - low
    length = float(extent.max()) if frame == "extent" else 1.02 * float(np.linalg.norm(extent))
    start, cell = middle - length / 2, length / side
    grid = np.zeros((side, side, side), np.uint8)
    if not geometry.is_mesh:
        index = ((geometry.points - start) / cell).astype(int).clip(0, side - 1)
        grid[tuple(index.T)] = 1
        return grid
    mesh = _triangle_mesh(geometry)
    hit = o3d.geometry.VoxelGrid.create_from_triangle_mesh_within_bounds(mesh, cell, start, start + length)
    for voxel in hit.get_voxels():
        grid[tuple(np.minimum(voxel.grid_index, side - 1))] = 1
    scene = o3d.t.geometry.RaycastingScene()
    scene.add_triangles(o3d.t.geometry.TriangleMesh.from_legacy(mesh))
    ticks = start + (np.arange(side)[:, None] + 0.5) * cell
    centres = np.stack(np.meshgrid(*ticks.T, indexing="ij"), -1).astype(np.float32)
    inside = scene.compute_occupancy(o3d.core.Tensor(centres), nsamples=3).numpy()
    return (grid | (inside > 0.5)).astype(np.uint8)


def write_cloud(path: Path, points: Float[ndarray, "n 3"], colours: Float[ndarray, "n 3"], **scalars: ndarray) -> None:
    """A coloured cloud as text PLY, with further values of each point as properties of their own."""
    rows = [points, np.round(np.clip(colours, 0, 1) * 255), *(np.asarray(v, float)[:, None] for v in scalars.values())]
    properties = [f"property float {axis}" for axis in "xyz"] + [
        f"property uchar {c}" for c in ("red", "green", "blue")
    ]
    properties += [f"property float {name}" for name in scalars]
    header = ["ply", "format ascii 1.0", f"element vertex {len(points)}", *properties, "end_header"]
    formats = ["%.6g"] * 3 + ["%d"] * 3 + ["%.6g"] * len(scalars)
    with atomic_write(path) as file:
        file.write(("\n".join(header) + "\n").encode())
        np.savetxt(file, np.concatenate(rows, 1), fmt=formats)


def write_mesh(path: Path, points: Float[ndarray, "n 3"], faces: Int[ndarray, "f 3"]) -> None:
    """A mesh as OFF or OBJ, by the name's ending.

    Raises:
        UserError: another ending.

    """
    if path.suffix == ".off":
        lines = ["OFF", f"{len(points)} {len(faces)} 0"]
        lines += [" ".join(f"{v:.6g}" for v in p) for p in points] + [f"3 {a} {b} {c}" for a, b, c in faces]
    elif path.suffix == ".obj":
        lines = ["v " + " ".join(f"{v:.6g}" for v in p) for p in points]
        lines += [f"f {a + 1} {b + 1} {c + 1}" for a, b, c in faces]
    else:
        raise UserError(f"{path}: meshes are written as .off or .obj")
    with atomic_write(path) as file:
        file.write(("\n".join(lines) + "\n").encode())
