"""The command `render`: pictures, depth, confidence and occlusion along a path of cameras, a point cloud, a video.

Every tile of a frame is kept as soon as it is rendered, so that an interrupted call goes on where it was. The feature map
of a source image is computed once, whatever the number of frames.
"""

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tenfold_gnt.cameras import pack_cameras, pixel_grid, resize_camera
from tenfold_gnt.collections import LLFF_FAR, LLFF_NEAR, LLFF_VIDEO_FAR
from tenfold_gnt.data import packed_cameras, refuse_few_views
from tenfold_gnt.evaluate import checkpoint_file, load_model, refuse_idle_network
from tenfold_gnt.experiments import DataConfig, Target, judged_targets, whole_capture
from tenfold_gnt.features import FeatureMaps
from tenfold_gnt.projection import source_views
from tenfold_gnt.render import Model, Sampling, Views, readable_maps, render_pixels, surface_points
from tenfold_gnt.sampling import refuse_few_samples
from tenfold_gnt.views import Distance, nearest_views
from tenfold_shared.checkpoint import atomic_write, write_json
from tenfold_shared.errors import UserError
from tenfold_shared.progress import Progress
from tenfold_shared.run import Run, RunOptions
from tenfold_shared.scenes import (
    CameraSet,
    LLFFPoses,
    Scene,
    circle_path,
    opencv_from_opengl,
    opengl_from_opencv,
    spiral_path,
    write_image,
)
from tenfold_shared.scenes.views import to_uint8

FAR_QUANTILES = (0.02, 0.98)  # of the depths shown, so that a few outliers do not take the whole range of colours


@dataclasses.dataclass
class RenderConfig:
    """What to render."""

    checkpoint: Path
    """A run's folder, a .safetensors file of ours, or an authors' model_<step>.pth."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The scene whose views are the sources."""
    path: Literal["judged", "spiral", "circle", "poses"] = "judged"
    """Cameras: the judged views; a spiral before a forward-facing scene; a circle around the origin; or given poses."""
    poses: Path | None = None
    """For poses: a .npy file of OpenCV camera-to-world matrices [N, 4, 4]."""
    frames: int = 120
    """Frames of a spiral or a circle."""
    radius: float = 4.0
    """Radius of the circle."""
    elevation: float = 30.0
    """Elevation of the circle, degrees."""
    samples: int = 192
    """Depths a ray."""
    importance: int = 0
    """Further depths of a second pass."""
    resize: float = 1.0
    """Render at this multiple of the size of the scene's pictures."""
    tile_rows: int = 64
    """Rows of a frame that are kept at a time."""
    memory_mb: int = 0
    """Bound on the memory of a chunk of rays, MB; 0: the processor's cache, or half of the free GPU memory."""
    video: Literal["none", "gif", "mp4"] = "gif"
    """Video of the frames; mp4 needs the extra `video`."""
    fps: int = 24
    """Frames a second."""
    points: bool = True
    """Write the surface points of all frames as points.ply."""
    confident: float = 0.2
    """Least confidence, in [0, 1], of a surface point that is kept."""

    def __post_init__(self) -> None:
        """Refuse what cannot be rendered."""
        if self.frames < 1 or self.tile_rows < 1 or self.fps < 1:
            raise UserError("--frames, --tile_rows and --fps take 1 or more")
        if self.importance < 0 or self.memory_mb < 0:
            raise UserError(f"--importance and --memory_mb take 0 or more, got {self.importance} and {self.memory_mb}")
        refuse_few_samples(self.samples, self.importance, "--samples")
        if self.resize <= 0 or self.radius <= 0:
            raise UserError(f"--resize and --radius are positive, got {self.resize} and {self.radius}")
        if not -90 < self.elevation < 90:
            raise UserError(f"--elevation lies between -90 and 90 degrees, got {self.elevation}: no side is up there")
        if not 0 <= self.confident <= 1:
            raise UserError(f"--confident lies in [0, 1], got {self.confident}")
        if self.path == "poses" and self.poses is None:
            raise UserError("--path poses needs --poses FILE, a .npy of OpenCV camera-to-world matrices [N, 4, 4]")


class Frame(NamedTuple):
    """A camera of the path with the depths between which to look, and the views to render it from."""

    camera: Tensor
    near: float
    far: float
    pool: Scene
    method: Distance


class SourceCache:
    """Feature maps of a scene's pictures, each computed when it is first needed."""

    def __init__(self, model: Model, pool: Scene, device: torch.device) -> None:
        self.model, self.pool, self.device = model, pool, device
        self.cameras = packed_cameras(pool).to(device)
        self.images: dict[int, Tensor] = {}
        self.maps: dict[int, FeatureMaps] = {}

    @torch.inference_mode()
    def views(self, chosen: np.ndarray) -> Views:
        """The chosen views, ready to render from; instance norm makes a view's map independent of the others."""
        for i in map(int, chosen):
            if i not in self.maps:
                self.images[i] = torch.from_numpy(self.pool.rgb(i)).to(self.device)
                self.maps[i] = readable_maps(self.model.features(self.images[i].permute(2, 0, 1)[None]))
        picked = [int(i) for i in chosen]
        sources = source_views(torch.stack([self.images[i] for i in picked]), self.cameras[picked])
        coarse, fine = (torch.cat([self.maps[i][level] for i in picked]) for level in (0, 1))
        return Views(sources, FeatureMaps(coarse, fine))


def render(config: RenderConfig, options: RunOptions) -> None:
    """Render a path of cameras with a checkpoint."""
    model, about = load_model(config.checkpoint)
    refuse_idle_network(model, config.importance, config.checkpoint)
    if options.compile:
        model.compile_networks()
    frames = path_frames(config)
    folder = options.output / "gnt" / (options.name or f"render-{config.path}")
    with Run.evaluation("gnt", options) as run:
        if run.is_main:
            claim_folder(folder, config, options.precision, resume=options.resume)
        run.accelerator.wait_for_everyone()
        model = model.to(run.device).eval()
        progress = Progress(enabled=run.is_main and not options.quiet)
        progress.start("frames", len(frames))
        caches: dict[int, SourceCache] = {}
        for number in range(run.rank, len(frames), run.world):
            frame = frames[number]
            cache = caches.setdefault(id(frame.pool), SourceCache(model, frame.pool, run.device))
            with run.accelerator.autocast():
                render_frame(model, cache, frame, folder, number, config, inverse=about.get("inverse", True))
            progress.advance()
        progress.close()
        run.accelerator.wait_for_everyone()
        if run.is_main:
            written = assemble(folder, frames, config)
            print(f"{len(frames)} frames in {folder}: rgb, depth, confidence, occlusion{written}")


def claim_folder(folder: Path, config: RenderConfig, precision: str, *, resume: bool) -> None:
    """Start a folder, or go on with one of the same configuration, weights and precision.

    Raises:
        UserError: it cannot be used, holds frames and `resume` is off, or holds frames of another configuration.

    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use {folder}: {error.strerror}; choose another --output") from error
    about = folder / "render.json"
    text: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    # A path to weights stays the same when a longer training writes others there.
    weights = hashlib.sha256(checkpoint_file(config.checkpoint).read_bytes()).hexdigest()
    text |= {"weights": weights, "precision": precision}
    if about.exists():
        if not resume:
            raise UserError(f"{folder} holds frames already; add --resume to go on with them or choose another --name")
        if json.loads(about.read_text(encoding="utf-8")) != text:
            raise UserError(
                f"{about} differs from the configuration, the weights or the precision given; choose another --name"
            )
    write_json(about, text)


def path_frames(config: RenderConfig) -> list[Frame]:
    """The cameras to render.

    Raises:
        UserError: the poses are no file of matrices, or the scene has fewer views than sources are asked for.

    """
    if config.path == "spiral":
        return _spiral_frames(config)
    targets = judged_targets(config.data)
    if config.path == "judged":
        return [_judged_frame(target, config) for target in targets]
    if config.path == "circle":
        path = circle_path(config.frames, config.radius, config.elevation)
    else:
        path = read_poses(config.poses)
    pool = targets[0].pool
    return _frames(path, _bounds(pool), pool, targets[0].method, config)


def _spiral_frames(config: RenderConfig) -> list[Frame]:
    """The layout's video: a path that follows from the whole capture, rendered from all of its views but the middle one."""
    whole = whole_capture(config.data)
    near, far = own = _bounds(whole)
    if config.data.judged_name in ("llff_test", "shiny"):
        # The path follows from the capture's bounds, not the sampler's.
        own = near / LLFF_NEAR, far / LLFF_FAR
        far = own[1] * LLFF_VIDEO_FAR
    cameras = whole.cameras
    poses = LLFFPoses(
        opengl_from_opencv(cameras.camera_to_world), np.tile(own, (len(whole), 1)), cameras.intrinsics[:, 0, 0]
    )
    pool = whole.subset(np.delete(np.arange(len(whole)), poses.middle_view))
    refuse_few_views(pool, config.data.sources)
    path = opencv_from_opengl(spiral_path(poses, config.frames))
    return _frames(path, (near, far), pool, "dist", config)


def _bounds(scene: Scene) -> tuple[float, float]:
    bounds = scene.cameras.bounds
    assert bounds is not None
    return bounds


def _frames(
    path: np.ndarray, bounds: tuple[float, float], pool: Scene, method: Distance, config: RenderConfig
) -> list[Frame]:
    """Frames at the poses of a path with the intrinsics of the pool's first view."""
    cameras = pool.cameras
    matrix = torch.from_numpy(cameras.intrinsics[:1]).float().expand(len(path), 3, 3)
    packed = pack_cameras(matrix, torch.from_numpy(path).float(), cameras.height, cameras.width)
    return [Frame(_resized(camera, config), *bounds, pool, method) for camera in packed]


def _judged_frame(target: Target, config: RenderConfig) -> Frame:
    cameras = target.scene.cameras
    assert cameras.near is not None
    assert cameras.far is not None
    near, far = float(cameras.near[target.view]), float(cameras.far[target.view])
    camera = _resized(packed_cameras(target.scene)[target.view], config)
    return Frame(camera, near, far, target.pool, target.method)


def _resized(camera: Tensor, config: RenderConfig) -> Tensor:
    resized = resize_camera(camera, config.resize) if config.resize != 1 else camera
    if resized[:2].min() < 1:
        raise UserError(f"--resize {config.resize} leaves no pixel of {int(camera[1])}x{int(camera[0])}: take more")
    return resized


def read_poses(path: Path | None) -> np.ndarray:
    """OpenCV camera-to-world matrices [N, 4, 4] of a .npy file."""
    assert path is not None
    try:
        poses = np.asarray(np.load(path, allow_pickle=False), dtype=np.float64)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"--poses {path} is no readable .npy file of numbers ({error})") from error
    if poses.ndim != 3 or poses.shape[1:] != (4, 4):
        raise UserError(f"--poses {path} needs matrices [N, 4, 4], got an array of shape {poses.shape}")
    try:
        return CameraSet(np.tile(np.eye(3), (len(poses), 1, 1)), poses, 1, 1).camera_to_world
    except UserError as error:
        raise UserError(f"--poses {path}: {error}") from error


def render_frame(
    model: Model, cache: SourceCache, frame: Frame, folder: Path, number: int, config: RenderConfig, *, inverse: bool
) -> None:
    """Render a frame tile by tile into ``frames/NNNN.npz``; tiles and frames that are there are kept."""
    done = folder / "frames" / f"{number:04d}.npz"
    if done.exists():
        return
    pool, pose = frame.pool.cameras.camera_to_world, frame.camera[18:34].reshape(4, 4).double().numpy()
    chosen = np.arange(len(pool))
    if len(pool) > config.data.sources:
        chosen = nearest_views(pose, pool, config.data.sources, frame.method)
    views = cache.views(chosen)
    camera, sampling = frame.camera.to(cache.device), Sampling(frame.near, frame.far, config.samples, config.importance)
    sampling = dataclasses.replace(sampling, inverse=inverse)
    height, width = (int(x) for x in frame.camera[:2].tolist())
    tiles = [folder / "tiles" / f"{number:04d}-{top:05d}.npz" for top in range(0, height, config.tile_rows)]
    for pixels, tile in zip(_tiles(height, width, config.tile_rows), tiles, strict=True):
        if tile.exists():
            continue
        rgb, depth, confidence, labels = render_pixels(
            model,
            views,
            camera,
            pixels.to(cache.device),
            sampling,
            occlusion=True,
            memory=config.memory_mb * 2**20 or None,
        )
        # The label is an index into the frame's sources; what is kept names the view of the scene.
        seen = np.full(len(depth), -1) if labels is None else chosen[labels.cpu().numpy()]
        kept = {"depth": depth.float().cpu().numpy(), "confidence": confidence.float().cpu().numpy()}
        with atomic_write(tile) as file:
            np.savez(file, rgb=to_uint8(rgb.float().cpu().numpy()), occlusion=seen, **kept)  # type: ignore[arg-type]
    loaded = [np.load(tile, allow_pickle=False) for tile in tiles]
    whole = {key: np.concatenate([tile[key] for tile in loaded]) for key in loaded[0].files}
    with atomic_write(done) as file:
        shaped = {key: value.reshape(height, width, *value.shape[1:]) for key, value in whole.items()}
        np.savez(file, **shaped)  # type: ignore[arg-type]
    for tile in tiles:
        tile.unlink()


def _tiles(height: int, width: int, rows: int) -> Iterator[Tensor]:
    return iter(pixel_grid(height, width).split(rows * width))


def assemble(folder: Path, frames: list[Frame], config: RenderConfig) -> str:
    """Pictures, point cloud and video from the finished frames; returns what was written besides the pictures."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import, needed once the frames are done

    depths, labels = mpl.colormaps["turbo"], mpl.colormaps["tab20"]
    pictures, points, colours = [], [], []
    for number, frame in enumerate(frames):
        found = np.load(folder / "frames" / f"{number:04d}.npz", allow_pickle=False)
        rgb, depth, confidence = found["rgb"], found["depth"], found["confidence"]
        low, high = np.quantile(depth, FAR_QUANTILES)
        shade = np.clip((depth - low) / max(high - low, 1e-6), 0, 1)
        write_image(folder / "rgb" / f"{number:04d}.png", rgb)
        write_image(folder / "depth" / f"{number:04d}.png", depths(1 - shade)[..., :3])
        write_image(folder / "confidence" / f"{number:04d}.png", np.repeat(confidence[..., None], 3, -1))
        write_image(folder / "occlusion" / f"{number:04d}.png", labels(found["occlusion"] % 20)[..., :3])
        pictures.append(rgb)
        sure = confidence.ravel() >= config.confident
        points.append(surface_points(torch.from_numpy(depth), frame.camera).numpy()[sure])
        colours.append(rgb.reshape(-1, 3)[sure])
    written = ""
    if config.points:
        write_ply(folder / "points.ply", np.concatenate(points), np.concatenate(colours))
        written += f", points.ply ({sum(map(len, points))} points)"
    if config.video != "none" and len(pictures) > 1:
        file = folder / f"video.{config.video}"
        write_video(file, pictures, config.fps)
        written += f", {file.name}"
    return written


def write_ply(path: Path, points: np.ndarray, colours: np.ndarray) -> None:
    """Points [N, 3] with colours [N, 3] (uint8) as a binary PLY file."""
    table = np.empty(len(points), dtype=[("p", "<f4", 3), ("c", "u1", 3)])
    table["p"], table["c"] = points, colours
    names = [*(f"float {axis}" for axis in "xyz"), *(f"uchar {colour}" for colour in ("red", "green", "blue"))]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}"]
    with atomic_write(path) as file:
        file.write("\n".join([*header, *(f"property {name}" for name in names), "end_header\n"]).encode())
        file.write(table.tobytes())


def write_video(path: Path, pictures: list[np.ndarray], fps: int) -> None:
    """Pictures [H, W, 3] (uint8) as an animated GIF or an MP4.

    Raises:
        UserError: MP4 without its encoder.

    """
    if path.suffix == ".gif":
        from PIL import Image  # noqa: PLC0415 - with the first picture

        first, *rest = (Image.fromarray(picture) for picture in pictures)
        first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
        return
    try:
        import imageio_ffmpeg  # noqa: PLC0415 - optional
    except ImportError as error:
        raise UserError("--video mp4 needs an encoder: pip install 'tenfold-gnt[video]', or use gif") from error
    height, width = (side - side % 2 for side in pictures[0].shape[:2])  # the codec takes even sides only
    writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=fps, macro_block_size=2)
    writer.send(None)
    for picture in pictures:
        writer.send(np.ascontiguousarray(picture[:height, :width]))
    writer.close()
