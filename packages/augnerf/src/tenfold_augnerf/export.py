"""Pictures, depth, density grids, meshes and data sets as files (sections 9 and 11)."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from tenfold_augnerf.compat import to_official
from tenfold_augnerf.data import (
    BLOCKS,
    TEST_OFFSET,
    VALIDATION_OFFSET,
    Data,
    DataConfig,
    corrupted_scene,
    load_data,
    spread,
    write_prepared,
)
from tenfold_augnerf.evaluate import OtherData, Rendered, data_of, load_renderer, placed, render_view, views_of
from tenfold_augnerf.geometry import (
    chamfer,
    covered,
    density_grid,
    extract_mesh,
    grid_axes,
    grid_variation,
    sample_triangles,
    write_obj,
)
from tenfold_augnerf.views import Views
from tenfold_shared.checkpoint import atomic_write, write_text
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions
from tenfold_shared.scenes import Scene, blocks, blocks_views, write_blender, write_image, write_llff

SURFACE_POINTS = 20000


@dataclasses.dataclass
class RenderConfig:
    """What to render."""

    checkpoint: Path
    """A run's folder or a checkpoint file, ours or of the released layouts."""
    data: OtherData = dataclasses.field(default_factory=OtherData)
    """The pictures whose cameras and bounds are used."""
    split: str = "test"
    """Views to render: test, validation, train, or path: the video's cameras. LLFF captures have a spiral (spherified: a
    circle), prepared rays their own path, other data a circle around the origin."""
    frames: int = 0
    """Frames of the path; 0: 120 for LLFF, 40 for others, and all of a prepared path."""


def render(config: RenderConfig, options: RunOptions) -> None:
    """Write `<i>.png` (clipped to [0, 1], 8 bit), `depth_<i>.png` (16 bit, near to far) and `depth_<i>.npy`."""
    if config.frames and config.split != "path":
        raise UserError(f"--frames {config.frames} is for --split path: the split {config.split} has its own views")
    data = load_data(data_of(config.checkpoint, config.data))
    views = path_views(data, config.frames) if config.split == "path" else views_of(data, config.split)
    renderer, _ = load_renderer(config.checkpoint, data)
    folder = options.output / "augnerf" / (options.name or f"render-{config.split}")
    with Run.evaluation("augnerf", options) as run:
        renderer, views = placed(renderer, run).eval(), views.to(run.device)
        for view in range(len(views)):
            write_picture(folder, view, render_view(renderer, views, view), views.near, views.far)
    print(f"{len(views)} views written to {folder}")


def write_picture(folder: Path, view: int, found: Rendered, near: float, far: float) -> None:
    """The three files of a view; depth is divided by opacity, 0 where the ray is empty."""
    from PIL import Image  # noqa: PLC0415 - slow to import

    expected = torch.where(found.acc > 1e-3, found.depth / found.acc.clamp(min=1e-3), torch.zeros_like(found.depth))
    depth = expected.cpu().numpy()
    write_image(folder / f"{view:03d}.png", found.rgb.cpu().numpy())
    np.save(folder / f"depth_{view:03d}.npy", depth)
    scaled = np.clip((depth - near) / (far - near), 0, 1) * 65535
    Image.fromarray((scaled + 0.5).astype(np.uint16)).save(folder / f"depth_{view:03d}.png")


def path_views(data: Data, frames: int) -> Views:
    """The cameras of the data's video.

    Raises:
        UserError: prepared rays without a path, or another number of frames than the path has.

    """
    if data.path is None:
        raise UserError("--split path needs cameras, or prepared rays with rays_exhibit.npy")
    return data.path(frames)


@dataclasses.dataclass
class ExportConfig:
    """What to write of a field."""

    checkpoint: Path
    """A run's folder or a checkpoint file, ours or of the released layouts."""
    data: OtherData = dataclasses.field(default_factory=OtherData)
    """The pictures, for the bounds."""
    extents: list[float] = dataclasses.field(default_factory=lambda: [2.0, 2.0, 2.0])
    """Size of the grid in world units: along y, x and z, as the released code orders them."""
    points: int = 256
    """Points of the grid along its first extent."""
    threshold: float = 10.0
    """Density of the surface."""
    step: int = 0
    """Step to write into the released checkpoint."""


def export(config: ExportConfig, options: RunOptions) -> None:
    """Write `density.npy`, `mesh.obj` and `<step>.ckpt` in the released layout; print the grid's total variation and,
    for blocks, the Chamfer distance in world units to the part of their surface that the grid covers.
    """
    if len(config.extents) != 3 or not all(0 < e < math.inf for e in config.extents) or config.points < 2:
        raise UserError(
            f"--extents takes three positive sizes and --points 2 or more, got {config.extents}, {config.points}"
        )
    if min(config.threshold, config.step) < 0:
        raise UserError(f"--threshold and --step take 0 or more, got {config.threshold:g} and {config.step}")
    voxel = config.extents[0] / config.points * (1 - 1e-9)  # a quotient rounded down would lose a point
    if min(int(extent / voxel) for extent in config.extents) < 2:
        raise UserError(
            f"--extents {config.extents} and --points {config.points}: the shortest side has less than two points, take more"
        )
    data = load_data(data_of(config.checkpoint, config.data))
    renderer, _ = load_renderer(config.checkpoint, data)
    folder = options.output / "augnerf" / (options.name or "export")
    with Run.evaluation("augnerf", options) as run:
        field = placed(renderer, run).nerf_fine
        with run.accelerator.autocast():
            grid = density_grid(field, config.extents, voxel).float().cpu()
    density = grid.numpy()
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "density.npy", density)
    axes = grid_axes(config.extents, voxel)
    vertices, faces = extract_mesh(density, axes, config.threshold)
    write_text(folder / "mesh.obj", write_obj(vertices, faces))
    with atomic_write(folder / f"{config.step:08d}.ckpt") as file:
        torch.save(to_official(renderer.cpu(), step=config.step), file)
    line = f"{len(vertices)} vertices, {len(faces)} triangles, grid {density.shape}, total variation {grid_variation(grid):.4g}"
    if data.scene and len(faces):
        truth = covered(blocks().sample_surface(SURFACE_POINTS), axes)  # the mesh ends where the grid does
        distance = chamfer(sample_triangles(vertices, faces, SURFACE_POINTS), truth)
        line += f", Chamfer distance {distance:.4f}"
    print(f"{line}; written to {folder}")


def corrupted_capture(scene: Scene, config: DataConfig) -> Scene:
    """A capture whose training views, all but every `test_skip`-th, are corrupted."""
    trained = np.arange(len(scene)) % config.test_skip != 0
    images = [scene.rgb(view, float(config.white)) for view in range(len(scene))]
    poses = scene.cameras.camera_to_world.copy()
    if trained.any():
        found = corrupted_scene(scene.subset(np.flatnonzero(trained)), config)
        poses[trained] = found.cameras.camera_to_world
        for view, image in zip(np.flatnonzero(trained), found.images, strict=True):
            images[view] = image
    return dataclasses.replace(scene, images=images, cameras=dataclasses.replace(scene.cameras, camera_to_world=poses))


@dataclasses.dataclass
class PrepareConfig:
    """What to write."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The data set; corruptions, the median and views count, for the training views."""
    layout: Literal["rays", "blender", "llff"] = "rays"
    """The released cache of rays, or the exact blocks in a published layout."""
    folder: Path = Path("prepared")
    """Where to write it."""


def prepare(config: PrepareConfig) -> None:
    """Write a data set as the released cache of rays, or the blocks as a Blender or LLFF folder."""
    data, folder = config.data, config.folder
    if config.layout == "rays":
        write_prepared(folder, load_data(data))
    elif data.name not in BLOCKS:
        raise UserError(
            f"--layout {config.layout} writes the exact blocks scene; --data.name is one of {', '.join(BLOCKS)}"
        )
    else:
        if data.near is not None or (config.layout == "llff" and data.views):
            raise UserError(
                f"--layout {config.layout} holds the scene's own bounds, and llff one capture without splits: leave "
                "--data.near, far and (for llff) views out"
            )
        changed = data.corruption != "none" or data.denoise or data.pose_offset or data.pose_degrees
        size, *counts = BLOCKS[data.name]
        if config.layout == "llff":
            scene = blocks_views(counts[0], size, forward=True)
            write_llff(folder, corrupted_capture(scene, data) if changed else scene)
        else:
            offsets = (0.0, VALIDATION_OFFSET, TEST_OFFSET)
            for split, count, offset in zip(("train", "val", "test"), counts, offsets, strict=True):
                scene = blocks_views(count, size, offset)
                if split == "train" and data.views:
                    scene = scene.subset(spread(data.views, len(scene), scene.name))
                write_blender(folder, corrupted_scene(scene, data) if split == "train" and changed else scene, split)
    print(f"{data.name} written to {folder}")
