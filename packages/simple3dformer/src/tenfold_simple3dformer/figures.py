"""Pictures of voxels, points and scenes with matplotlib, without a display."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy import ndarray

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """A figure that no window belongs to."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import

    return Figure(figsize=(width, height), layout="constrained")


def colour_map(values: Float[ndarray, " n"], name: str = "viridis") -> Float[ndarray, "n 3"]:
    """RGB of values, the smallest and largest at the ends of the map."""
    import matplotlib as mpl  # noqa: PLC0415

    low, high = float(values.min()), float(values.max())
    return mpl.colormaps[name]((values - low) / (high - low or 1.0))[:, :3]


def cell_of(places: Int[ndarray, "p 3"], n: int, cell: float) -> tuple[ndarray, ...]:
    """Index, among n^3 cells of side ``cell``, of the cell that each voxel lies in; a border belongs to the last cells."""
    return tuple(np.minimum((places / cell).astype(int), n - 1).T)


def draw_voxels(
    axes: Any, grid: UInt8[ndarray, "v v v"], weights: Float[ndarray, "n n n"], cell: float | None = None
) -> None:
    """Occupied voxels as dots, coloured and made opaque by the weight of the cell that they lie in.

    ``cell``: side of a cell in voxels; default: as many as divide the grid.
    """
    x, y, z = np.nonzero(grid)
    value = weights[cell_of(np.stack([x, y, z], 1), len(weights), cell or float(len(grid) // len(weights)))]
    value = value / (value.max() if len(value) and value.max() > 0 else 1.0)
    colours = np.concatenate([colour_map(value), 0.15 + 0.85 * value[:, None]], 1) if len(value) else None
    axes.scatter(x, y, z, c=colours, s=6, depthshade=False, linewidths=0)
    _bare(axes, np.stack([x, y, z], 1))


def draw_points(axes: Any, points: Float[ndarray, "n 3"], colours: Float[ndarray, "n 3"], size: float = 4.0) -> None:
    """A cloud with a colour for every point."""
    axes.scatter(*points.T, c=colours, s=size, depthshade=False, linewidths=0)
    _bare(axes, points)


def _bare(axes: Any, points: ndarray) -> None:
    if len(points):
        axes.set_box_aspect(np.maximum(np.ptp(points, axis=0), 1e-6))
    axes.set_axis_off()


def draw_plan(
    axes: Any,
    points: Float[ndarray, "n 3"],
    boxes: Float[ndarray, "b 4 2"],
    scores: Float[ndarray, " b"],
    truth: Float[ndarray, "t 4 2"] | None = None,
) -> None:
    """A scene from above: points by height, boxes' footprints by score, true ones in green."""
    axes.scatter(points[:, 0], points[:, 1], c=points[:, 2], s=1, cmap="Greys", linewidths=0)
    colours = colour_map(scores, "autumn_r") if len(scores) else np.zeros((0, 3))
    for corners, colour in zip(boxes, colours, strict=True):
        axes.add_patch(_outline(corners, tuple(colour), 1.5))
    for corners in truth if truth is not None else ():
        axes.add_patch(_outline(corners, (0.1, 0.6, 0.2), 1.5))
    axes.set_aspect("equal")
    axes.set_xlabel("x, m")
    axes.set_ylabel("y, m")


def _outline(corners: ndarray, colour: tuple[float, ...], width: float) -> Any:
    from matplotlib.patches import Polygon  # noqa: PLC0415

    return Polygon(corners, closed=True, fill=False, edgecolor=colour, linewidth=width)


def save(figure: "Figure", path: Path) -> None:
    """Write a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
