"""A user's own files: predictions, attention, conversion, and what a network takes from an image network."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor, nn

from tenfold_shared.checkpoint import atomic_write
from tenfold_shared.cli import load_recipe
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions
from tenfold_simple3dformer import shapes
from tenfold_simple3dformer.attention import point_rollout, voxel_rollout
from tenfold_simple3dformer.data.binvox import Binvox, binvox_bytes, read_binvox
from tenfold_simple3dformer.data.clouds import unit_sphere
from tenfold_simple3dformer.data.s3dis import CLASSES as SCENE_CLASSES
from tenfold_simple3dformer.data.s3dis import whole_scene
from tenfold_simple3dformer.detection.average_precision import select
from tenfold_simple3dformer.detection.boxes import box_corners
from tenfold_simple3dformer.evaluate import load_model, scene_votes
from tenfold_simple3dformer.figures import cell_of, colour_map, draw_plan, draw_points, draw_voxels, new_figure, save
from tenfold_simple3dformer.geometry import Geometry, read_geometry, sample_surface, voxelise, write_cloud
from tenfold_simple3dformer.metrics import restricted_argmax
from tenfold_simple3dformer.models import ModelConfig, build_model
from tenfold_simple3dformer.point import PointFormer
from tenfold_simple3dformer.tokenizers import ReleasedTokenizer, TokenizerName
from tenfold_simple3dformer.train import Recipe
from tenfold_simple3dformer.voxel import VoxelFormer
from tenfold_simple3dformer.weights import check_heads, read_image_weights
from tenfold_simple3dformer.weights import transfer as put_weights


@dataclasses.dataclass
class PredictConfig:
    """What to predict on."""

    checkpoint: Path
    """A run's folder, a .safetensors file of ours, or a file of the authors' layout."""
    input: Path
    """A mesh or cloud (OBJ, PLY, OFF, STL, XYZ, PCD), or voxels (BINVOX)."""
    into: Path = Path("predictions")
    """Folder for the picture and the labelled cloud."""
    category: str = ""
    """Part segmentation: the object's category; default: the one whose parts are the most likely."""
    up: str = "z"
    """Axis of the file that points up: x, y or z."""
    top: int = 3
    """Classes shown, or boxes drawn at most."""
    heads: int = 0
    """Attention heads of an authors' file; 0: 3 for tiny and base, 6 for small, as released."""
    tokenizer: Literal["", TokenizerName, ReleasedTokenizer] = ""
    """Tokenizer of an authors' voxel file, where two fit; the released names are taken, too."""

    def __post_init__(self) -> None:
        """Refuse unknown axes."""
        if self.up not in ("x", "y", "z") or self.top < 1:
            raise UserError(f"--up takes x, y or z and --top 1 or more, got {self.up} and {self.top}")


def upright(geometry: Geometry, up: str) -> Geometry:
    """The object turned so that z points up, by a cyclic exchange of the axes."""
    shift = {"z": 0, "x": 2, "y": 1}[up]
    return dataclasses.replace(geometry, points=np.roll(geometry.points, shift, axis=1))


def _check_folder(folder: Path) -> None:
    """Make an output folder and see that it can be written to, before anything is computed for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; choose another folder") from error


def voxel_input(path: Path, about: dict[str, Any], up: str) -> Float[Tensor, "1 1 v v v"]:
    """The grid that a network was trained on: the file's own, or voxelised in the frame of the training data.

    Raises:
        UserError: a grid of another side, or an empty one.

    """
    side = int(about["voxels"])
    if path.suffix.lower() == ".binvox":
        grid = read_binvox(path).grid
        if len(grid) != side:
            raise UserError(f"{path} has {len(grid)} voxels a side, and the network takes {side}")
    else:
        frame = "radius" if about.get("data", {}).get("name") == "procshapes" else "extent"
        grid = voxelise(upright(read_geometry(path), up), side, frame)  # type: ignore[arg-type]
    if not grid.any():
        raise UserError(f"{path} has no occupied voxel")
    return torch.from_numpy(grid).float()[None, None]


def cloud_input(
    path: Path, about: dict[str, Any], up: str, count: int, seed: int
) -> tuple[Float[ndarray, "n 3"], Float[ndarray, "n 6"]]:
    """Sampled places in the file's units (z up), and unit-sphere coordinates with normals."""
    geometry = upright(read_geometry(path), up)
    places, normals = sample_surface(geometry, count, seed)
    return places, np.concatenate([unit_sphere(places), normals], 1).astype(np.float32)


def predict(config: PredictConfig, options: RunOptions) -> None:
    """Print the prediction as JSON, and write a picture and, for labels of points, a coloured PLY."""
    model, about = load_model(config.checkpoint, heads=config.heads, tokenizer=config.tokenizer)
    _check_folder(config.into)
    with Run.evaluation("simple3dformer", options) as run:
        model = run.prepare(model).eval()
        task = about["task"]
        job = {
            "voxel_cls": _classify,
            "point_cls": _classify,
            "part_seg": _segment,
            "scene_seg": _label,
            "detection": _detect,
        }
        if task not in job:
            raise UserError(f"{config.checkpoint} is a network for {task}: predict takes networks for 3D data")
        with torch.inference_mode():
            answer = job[task](model, about, config, run)
    print(json.dumps(answer))


def _names(about: dict[str, Any], count: int) -> list[str]:
    return about.get("classes") or [f"class {i}" for i in range(count)]


def _classify(model: nn.Module, about: dict[str, Any], config: PredictConfig, run: Run) -> dict[str, Any]:
    figure = new_figure(4, 4)
    axes = figure.add_subplot(projection="3d")
    if about["task"] == "voxel_cls":
        voxels = voxel_input(config.input, about, config.up)
        logits = model(voxels.to(run.device))
        grid = voxels[0, 0].numpy().astype(np.uint8)
        draw_voxels(axes, grid, np.ones((1, 1, 1)))
    else:
        places, rows = cloud_input(config.input, about, config.up, about.get("points", 1024), run.options.seed)
        logits = model(torch.from_numpy(rows[None, :, : about["inputs"]]).to(run.device))
        draw_points(axes, places, np.full((len(places), 3), 0.4))
    probability = logits.float().softmax(1)[0].cpu()
    best = probability.topk(min(config.top, len(probability)))
    names = _names(about, len(probability))
    found = {names[i]: round(float(p), 4) for p, i in zip(best.values, best.indices.tolist(), strict=True)}
    axes.set_title(f"{next(iter(found))} ({100 * next(iter(found.values())):.0f} %)")
    picture = config.into / f"{config.input.stem}.png"
    save(figure, picture)
    return {"class": next(iter(found)), "probabilities": found, "picture": str(picture)}


def _segment(model: nn.Module, about: dict[str, Any], config: PredictConfig, run: Run) -> dict[str, Any]:
    places, rows = cloud_input(config.input, about, config.up, about.get("points", 1024), run.options.seed)
    category, labels, _ = _parts_of(model, about, config, rows, run.device)
    parts = about["parts"]
    names = _names(about, int(max(max(p) for p in parts.values())) + 1)
    counts = {names[k]: int((labels == k).sum()) for k in parts[category] if (labels == k).any()}
    return {"category": category, "points": counts, **_coloured(places, labels, config, colour_labels(labels))}


def _parts_of(
    model: nn.Module, about: dict[str, Any], config: PredictConfig, rows: Float[ndarray, "n 6"], device: torch.device
) -> tuple[str, ndarray, Float[Tensor, "1 n d"]]:
    """The category given, or else the one whose parts are the most likely; the points' parts; the network's input."""
    parts: dict[str, list[int]] = about["parts"]
    categories = list(parts)
    if about["inputs"] != 6 + len(categories):
        raise UserError(
            f"{config.checkpoint} does not say which parts belong to which category, and is not ShapeNetPart's"
        )
    if config.category and config.category not in parts:
        raise UserError(f"--category {config.category}: the network knows {', '.join(categories)}")
    best_score, category, labels, inputs = -np.inf, "", np.zeros(0, int), torch.zeros(0)
    for name in [config.category] if config.category else categories:
        hot = np.zeros((len(rows), len(categories)), np.float32)
        hot[:, categories.index(name)] = 1
        given = torch.from_numpy(np.concatenate([rows, hot], 1))[None].to(device)
        logits = model(given).float().cpu()
        score = float(logits.log_softmax(-1)[..., parts[name]].logsumexp(-1).mean())
        if score > best_score:
            index = torch.tensor([categories.index(name)])
            best_score, category, inputs = score, name, given
            labels = restricted_argmax(logits, index, list(parts.values()))[0].numpy()
    return category, labels, inputs


def colour_labels(labels: ndarray) -> Float[ndarray, "n 3"]:
    """A colour for every label."""
    import matplotlib as mpl  # noqa: PLC0415

    return mpl.colormaps["tab20"](labels % 20)[:, :3]


def _coloured(places: ndarray, labels: ndarray, config: PredictConfig, colours: ndarray) -> dict[str, str]:
    figure = new_figure(5, 5)
    draw_points(figure.add_subplot(projection="3d"), places, colours)
    picture, cloud = (config.into / f"{config.input.stem}.{ending}" for ending in ("png", "ply"))
    save(figure, picture)
    write_cloud(cloud, places, colours, label=labels)
    return {"picture": str(picture), "cloud": str(cloud)}


def _label(model: nn.Module, about: dict[str, Any], config: PredictConfig, run: Run) -> dict[str, Any]:
    points, room = _room(config, run.options.seed)
    votes = scene_votes(model, room, about.get("points", 4096), len(SCENE_CLASSES), run.device)
    labels = votes.argmax(1).cpu().numpy()
    counts = {name: int((labels == k).sum()) for k, name in enumerate(SCENE_CLASSES) if (labels == k).any()}
    return {"points": counts, **_coloured(points, labels, config, colour_labels(labels))}


def _room(config: PredictConfig, seed: int) -> tuple[Float[ndarray, "n 3"], Float[ndarray, "n 7"]]:
    """Places in the file's units, and the rows of a room of S3DIS without labels; grey where there is no colour."""
    geometry = upright(read_geometry(config.input), config.up)
    colours = geometry.colours if geometry.colours is not None and not geometry.is_mesh else None
    points = sample_surface(geometry, 20_000, seed)[0] if geometry.is_mesh else geometry.points
    room = np.zeros((len(points), 7), np.float32)
    room[:, :3] = points - points.min(0)
    room[:, 3:6] = 127.5 if colours is None else 255 * colours
    return points, room


def _detect(model: nn.Module, about: dict[str, Any], config: PredictConfig, run: Run) -> dict[str, Any]:
    geometry = upright(read_geometry(config.input), config.up)
    count = about.get("points", 20_000)
    points = sample_surface(geometry, count, run.options.seed)[0].astype(np.float32)
    cloud = torch.from_numpy(points)[None].to(run.device)
    prediction = model(cloud)[-1]
    found = select(prediction, list(cloud))
    classes = prediction.logits.shape[-1] - 1
    best = found.score.view(-1, classes).argmax(1)  # average precision scores a box for every class, a reader wants one
    rows = torch.arange(len(best)) * classes + best
    order = rows[found.score[rows].argsort(descending=True)[: config.top]]
    boxes = [
        {
            "class": _names(about, 10)[int(found.label[i])],
            "score": round(float(found.score[i]), 4),
            "centre": [round(float(v), 4) for v in found.centre[i]],
            "size": [round(float(v), 4) for v in found.size[i]],
            "angle": round(float(found.angle[i]), 4),
        }
        for i in order
    ]
    corners = box_corners(found.centre[order], found.size[order], found.angle[order])[:, :4]
    footprints = torch.stack([corners[..., 0], corners[..., 2]], -1).numpy()
    figure = new_figure(6, 6)
    draw_plan(figure.add_subplot(), points, footprints.astype(float), found.score[order].numpy().astype(float))
    picture = config.into / f"{config.input.stem}.png"
    save(figure, picture)
    return {"boxes": boxes, "picture": str(picture)}


# -- attention ------------------------------------------------------------------------------------------------------------


def attention(config: PredictConfig, options: RunOptions) -> None:
    """Write what the class token looks at: a picture, and a PLY with the weight of every voxel or point."""
    model, about = load_model(config.checkpoint, heads=config.heads, tokenizer=config.tokenizer)
    _check_folder(config.into)
    picture, cloud = (config.into / f"{config.input.stem}-attention.{ending}" for ending in ("png", "ply"))
    figure = new_figure(5, 5)
    axes = figure.add_subplot(projection="3d")
    with Run.evaluation("simple3dformer", options) as run:
        model = model.to(run.device).eval()
        if isinstance(model, VoxelFormer):
            voxels = voxel_input(config.input, about, config.up)
            weights = voxel_rollout(model, voxels.to(run.device))[0].cpu().numpy()
            grid = voxels[0, 0].numpy().astype(np.uint8)
            draw_voxels(axes, grid, weights, model.cell_side)
            places = np.argwhere(grid)
            values = weights[cell_of(places, len(weights), model.cell_side)]
            places = places.astype(float)
        elif isinstance(model, PointFormer):
            places, values = _point_attention(model, about, config, run)
            draw_points(axes, places, colour_map(values))
        else:
            raise UserError(
                f"{config.checkpoint} ({type(model).__name__}): roll-out is for Simple3D-Former on voxels or points"
            )
    write_cloud(cloud, places, colour_map(values), attention=values)
    save(figure, picture)
    print(json.dumps({"picture": str(picture), "cloud": str(cloud)}))


def _point_attention(
    model: PointFormer, about: dict[str, Any], config: PredictConfig, run: Run
) -> tuple[Float[ndarray, "n 3"], Float[ndarray, " n"]]:
    """Places and weights, from the channels that the network was trained on; of a scene, the mean over its blocks."""
    if about["task"] == "scene_seg":
        places, room = _room(config, run.options.seed)
        grid = whole_scene(room, np.random.RandomState(0), about.get("points", 4096))
        total, seen = np.zeros(len(room)), np.zeros(len(room))
        for start in range(0, len(grid.rows), 8):
            features, rows = grid.features[start : start + 8], grid.rows[start : start + 8]
            found = point_rollout(model, torch.from_numpy(features).float().to(run.device)).cpu().numpy()
            np.add.at(total, rows, found)
            np.add.at(seen, rows, 1)
        values = total / seen
        return places, values / values.max()
    places, clouds = cloud_input(config.input, about, config.up, about.get("points", 1024), run.options.seed)
    given = torch.from_numpy(clouds[None, :, : model.inputs]).to(run.device)
    if about["task"] == "part_seg":
        with torch.inference_mode():
            given = _parts_of(model, about, config, clouds, run.device)[2]
    return places, point_rollout(model, given)[0].cpu().numpy()


def voxel_examples(run: Path, name: str, count: int = 3) -> list[tuple[str, ndarray, ndarray]]:
    """Title, grid and attention of the first test shapes; nothing for other data and for networks without attention."""
    model, about = load_model(run)
    data = about.get("data", {})
    if not isinstance(model, VoxelFormer) or data.get("name") != "procshapes":
        return []
    packed, labels = shapes.voxel_set(count, data["test_seed"], model.voxels, data["drop"], data["noise"])
    grids = np.stack([np.unpackbits(p, count=model.voxels**3).reshape((model.voxels,) * 3) for p in packed])
    weights = voxel_rollout(model, torch.from_numpy(grids).float()[:, None]).numpy()
    return [(f"{name}: {shapes.CATEGORIES[labels[i]]}", grids[i], weights[i]) for i in range(count)]


# -- files ----------------------------------------------------------------------------------------------------------------


def convert(input: Path, output: Path, voxels: int = 30, points: int = 1024, seed: int = 0) -> None:
    """Write a mesh or cloud as voxels (.binvox) or as sampled points with normals (.ply, .xyz).

    Args:
        input: a mesh or a cloud.
        output: the file; its ending says what is written.
        voxels: side length of the grid.
        points: how many are sampled.
        seed: of the sampling.

    """
    geometry = read_geometry(input)
    ending = output.suffix.lower()
    if ending not in (".binvox", ".ply", ".xyz"):
        raise UserError(f"--output {output}: write .binvox, .ply or .xyz")
    if voxels < 1 or points < 1:
        raise UserError(f"--voxels and --points take 1 or more, got {voxels} and {points}")
    _check_folder(output.parent)
    if ending == ".binvox":
        grid = voxelise(geometry, voxels)
        low, high = geometry.points.min(0), geometry.points.max(0)
        extent = float((high - low).max())
        corner = (low + high - extent) / 2  # of the cube, which is centred on the object
        with atomic_write(output) as file:
            file.write(binvox_bytes(Binvox(grid, tuple(corner.tolist()), extent)))
        print(f"{output}: {int(grid.sum())} of {grid.size} voxels are occupied")
        return
    places, normals = sample_surface(geometry, points, seed)
    if ending == ".xyz":
        with atomic_write(output) as file:
            np.savetxt(file, np.concatenate([places, normals], 1), fmt="%.6g")
    else:
        write_cloud(output, places, 0.5 + 0.5 * normals, nx=normals[:, 0], ny=normals[:, 1], nz=normals[:, 2])
    print(f"{output}: {len(places)} points")


def show_transfer(weights: str, recipe: str = "modelnet40-projection-small") -> None:
    """Print where every tensor of a recipe's network would come from, given image weights.

    Args:
        weights: image weights, as for ``train --weights``.
        recipe: whose network.

    """
    wanted = load_recipe("tenfold_simple3dformer", recipe, Recipe)
    classes, inputs = {"part_seg": (50, 22), "scene_seg": (13, 9), "detection": (10, 3), "image_cls": (22, 1)}.get(
        wanted.task, (40, 6)
    )
    config: ModelConfig = wanted.model
    model = build_model(config, wanted.task, classes, inputs, wanted.data.voxels)
    state, source = read_image_weights(weights)
    report = put_weights(model, state, source=source, inflate=wanted.inflate, positions=wanted.positions_from)
    check_heads(model, weights)
    print(report.table())
