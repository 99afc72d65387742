"""The tasks of the paper on a trained dictionary and one's own data: each a verb of the command line (sections 1 and 11)."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold_shared.batches import generator
from tenfold_shared.checkpoint import atomic_write
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions, seed_everything

from .baselines.classical import fbp, median_background, rpca, tv
from .baselines.networks import NetworkBatch
from .checkpoints import load_dictionary, load_model
from .coordinates import lattice
from .corruptions import occlude, occluded_pixels
from .data import frames as read_frames
from .data import read_images
from .dictionary import DictionaryConfig, NeuralDictionary
from .embedded import TEST_PHOTOGRAPHS, distance_fields, moving_discs, photograph
from .errors import refusals, refuse_precision
from .evaluate import check_fit, code_prior, dictionary_system, observe
from .export import pack_codes, save_onnx, single_signal
from .fitting import CodePrior, fit_prior, posterior, system
from .gates import CodebookGate
from .metrics import psnr, surface_distance
from .overrides import OtherData, data_of
from .shapes import (
    FINE,
    SURFACE_SAMPLES,
    Mesh,
    extract_mesh,
    marching_cubes,
    read_mesh,
    sample_surface,
    save_mesh,
    sdf_from_mesh,
)
from .signals import PROJECTED, DataConfig, load_signals, observation
from .solvers import FitOptions, PatchModel, inpaint, residual_outliers, solve
from .video import background_dictionary, mask_scores, separate


def folder_of(options: RunOptions, verb: str) -> Path:
    """Where a verb, which computes in fp32, writes; it is made.

    Raises:
        UserError: it cannot be, or other arithmetic is asked for.

    """
    refuse_precision(options, verb, networks=False)
    folder = options.output / "nid" / (options.name or verb)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --output") from error
    return folder


def stems(files: list[Path]) -> list[str]:
    """Names for what is written of each file.

    Raises:
        UserError: two files have the same.

    """
    names = [file.stem for file in files]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(f"{files[names.index(name)]} and {files[i]} would both be written as {name}: rename one")
    return names


def save_image(path: Path, image: Tensor) -> None:
    """Write [height, width, 1 or 3] in [0, 1] as an image file."""
    from PIL import Image  # noqa: PLC0415

    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    with atomic_write(path) as file:
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, path.suffix[1:])


def report(**values: Any) -> None:
    """Print what came out as one JSON line."""
    print(json.dumps(values))


def given_images(files: list[Path], model: NeuralDictionary, option: str = "--images") -> list[tuple[str, Tensor]]:
    """Named images [height, width, channels], or the embedded test photographs when none is given.

    Raises:
        UserError: the dictionary is not one of images, or a file is damaged.

    """
    if model.config.in_dim != 2:
        raise UserError(f"the dictionary represents {model.config.in_dim}-D signals, not images")
    if files:
        named = zip(stems(files), files, strict=True)
        return [(name, read_images([file], model.config.out_dim)[0]) for name, file in named]
    if model.config.out_dim != 3:
        raise UserError(f"the dictionary has {model.config.out_dim} channel: name what to code with {option}")
    return [(name, photograph(name)) for name in TEST_PHOTOGRAPHS]


def prior_for(model: NeuralDictionary, options: FitOptions, data: DataConfig, device: torch.device) -> CodePrior | None:
    """The distribution of the training codes, where the solver asks for it."""
    return code_prior(model, load_signals(data).to(device)) if options.solver == "map" else None


def without_prior(*chosen: FitOptions) -> None:
    """Refuse the solver that asks for the distribution of the training codes, where no training signals are named."""
    if any(options.solver == "map" for options in chosen):
        raise UserError(
            "the solver map learns its prior from training signals, which fit, ct, sdf and eval have: take another"
        )


# -- images ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class FitConfig:
    """Which images to code, and how."""

    checkpoint: Path
    """A run's folder, a .safetensors file of ours, or a .ckpt file of the authors' layout."""
    images: list[Path] = dataclasses.field(default_factory=list)
    """Image files of any size; default: the embedded test photographs."""
    fraction: float = 1.0
    """Part of the pixels that is used, drawn at random."""
    stride: int = 0
    """Distance of neighbouring patches, which are blended where they overlap; 0 tiles without overlap."""
    scale: int = 1
    """Resolution of the output, as a multiple of that of the input."""
    data: OtherData = dataclasses.field(default_factory=OtherData)
    """Training signals whose codes are the prior of the solver map; default: those of the dictionary's training."""
    fit: FitOptions = dataclasses.field(default_factory=FitOptions)
    """How codes are found."""


def fit(config: FitConfig, options: RunOptions) -> None:
    """Code images patch by patch; write each from its codes, and the codes as bytes."""
    model, about = load_dictionary(config.checkpoint)
    folder = folder_of(options, "fit")
    if config.scale < 1:
        raise UserError(f"--scale takes 1 or more, got {config.scale}")
    with Run.evaluation("nid", options) as run, refusals():
        model = model.to(run.device)
        patched = PatchModel(model, config.stride or None)
        prior = prior_for(model, config.fit, data_of(about, config.data), run.device)
        for name, image in given_images(config.images, model):
            images = image[None].to(run.device)
            mask = observation(images, config.fraction, options.seed)
            codes = patched.codes(images, mask, config.fit, prior=prior)
            size = (images.shape[1], images.shape[2])
            save_image(folder / f"{name}.png", patched.render(codes, size, config.scale)[0])
            active = int((codes[:, : model.config.num_experts] != 0).sum(dim=1).max())
            packed = pack_codes(codes, model.config.num_experts, max(active, 1))
            with atomic_write(folder / f"{name}.npz") as file:
                np.savez(file, gaps=packed.gaps, value=packed.value, step=packed.step, num_experts=packed.num_experts)
            quality = float(psnr(patched.render(codes, size), images)[0])
            report(image=name, psnr=quality, patches=len(codes), atoms=active, bytes=packed.num_bytes)
    print(f"written to {folder}")


@dataclasses.dataclass
class InpaintConfig:
    """Which images to repair, and how."""

    checkpoint: Path
    """A run's folder, a .safetensors file of ours, or a .ckpt file of the authors' layout."""
    images: list[Path] = dataclasses.field(default_factory=list)
    """Image files; default: the embedded test photographs, spoilt by a square of stripes."""
    mask: Path | None = None
    """An image that is white where a pixel can be trusted; without one, what a robust fit takes for outliers is replaced."""
    known: bool = False
    """Tell the solver where the embedded photographs were spoilt."""
    stride: int = 0
    """Distance of neighbouring patches; 0 tiles without overlap."""
    fit: FitOptions = dataclasses.field(default_factory=FitOptions)
    """How codes are found where it is known what can be trusted."""
    robust: FitOptions = dataclasses.field(default_factory=lambda: FitOptions(solver="irls", steps=20))
    """How codes are found where it is not."""


def inpaint_images(config: InpaintConfig, options: RunOptions) -> None:
    """Fill hidden pixels, or find and replace what does not belong."""
    model, _ = load_dictionary(config.checkpoint)
    folder = folder_of(options, "inpaint")
    without_prior(config.fit, config.robust)
    given = None if config.mask is None else read_images([config.mask], 1)[0, ..., 0] > 0.5
    with Run.evaluation("nid", options) as run, refusals():
        model = model.to(run.device)
        for number, (name, image) in enumerate(given_images(config.images, model)):
            truth, spoilt, mask = None, image, given
            if not config.images:
                side = min(24, min(image.shape[:2]) // 2)
                truth, spoilt = image, occlude(image, number, size=side)
                mask = ~occluded_pixels(image, number, size=side) if config.known else given
            if mask is not None and mask.shape != image.shape[:2]:
                raise UserError(f"the mask is {tuple(mask.shape)} pixels, {name} is {tuple(image.shape[:2])}")
            inputs = spoilt[None].to(run.device)
            trusted = None if mask is None else mask[None].to(run.device)
            chosen = config.robust if trusted is None else config.fit
            clean, hidden = inpaint(model, inputs, trusted, chosen, stride=config.stride or None)
            save_image(folder / f"{name}.png", clean[0])
            save_image(folder / f"{name}-replaced.png", hidden[0, ..., None].float())
            found: dict[str, Any] = {"image": name, "replaced": float(hidden.float().mean())}
            if truth is not None:
                save_image(folder / f"{name}-spoilt.png", spoilt)
                found |= {"psnr_before": float(psnr(spoilt[None], truth[None])[0])}
                found |= {"psnr": float(psnr(clean.cpu(), truth[None])[0])}
            report(**found)
    print(f"written to {folder}")


# -- video ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class SeparateConfig:
    """Which video to take apart, and with which dictionary."""

    frames: Path | None = None
    """Folder of images in the order of their names; default: a photograph with moving discs, whose truth is known."""
    checkpoint: Path | None = None
    """A dictionary of the scene that is trained already, as by the recipe video-nid; default: one is learned."""
    model: DictionaryConfig = dataclasses.field(
        default_factory=lambda: DictionaryConfig(
            num_experts=64, num_topk=64, hidden_dim=128, ffm_map_size=256, ffm_map_scale=6.0, gate="codebook"
        )
    )
    """The dictionary of the scene; it is learned from the video itself."""
    steps: int = 1000
    """Optimiser steps."""
    lr: float = 1e-3
    """Their size."""
    background_atoms: int = 4
    """Atoms, from the cheapest on, that make up the background."""


def separate_video(config: SeparateConfig, options: RunOptions) -> None:
    """Learn a dictionary of the video and take it apart; robust PCA and the median beside it where the truth is known."""
    folder = folder_of(options, "separate")
    video = None if config.frames else moving_discs()
    trained = None if config.checkpoint is None else load_dictionary(config.checkpoint)[0]
    atoms = (config.model if trained is None else trained.config).num_experts
    if trained is not None and (trained.config.in_dim, trained.config.out_dim) != (2, 3):
        raise UserError(f"{config.checkpoint} is no dictionary of frames: those have 2 dimensions and 3 channels")
    if config.steps < 1 or not 1 <= config.background_atoms <= atoms:
        raise UserError("--steps takes 1 or more, --background_atoms between 1 and the number of atoms")
    with Run.evaluation("nid", options) as run, refusals():
        frames = (read_frames(config.frames) if video is None else video.frames).to(run.device)  # type: ignore[arg-type]
        if trained is None:
            model = background_dictionary(frames, config.model, steps=config.steps, lr=config.lr, seed=options.seed)
        else:
            model = trained.to(run.device)
        parts = separate(model, frames, background_atoms=config.background_atoms)
        for i, (background, mask) in enumerate(zip(parts.background, parts.mask, strict=True)):
            save_image(folder / f"background-{i:05d}.png", background)
            save_image(folder / f"foreground-{i:05d}.png", torch.where(mask[..., None], frames[i], 0.0))
        report(method="nid", foreground=float(parts.mask.float().mean()), **_scores(parts.mask, video))
        if video is not None:
            low = rpca(video.frames.flatten(1)).low_rank.view_as(video.frames)
            report(method="rpca", **_scores(residual_outliers(video.frames, low), video))
            still = median_background(video.frames).expand_as(video.frames)
            report(method="median", **_scores(residual_outliers(video.frames, still), video))
    print(f"written to {folder}")


def _scores(mask: Tensor, video: Any) -> dict[str, float]:
    if video is None:
        return {}
    return dict(zip(("precision", "recall", "f1"), mask_scores(mask.cpu(), video.mask), strict=True))


# -- tomography -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class TomographyConfig:
    """Which slices to reconstruct, and from what."""

    checkpoint: Path
    """A run's folder, a .safetensors file of ours, or a .ckpt file of the authors' layout."""
    data: DataConfig = dataclasses.field(
        default_factory=lambda: DataConfig(name="phantoms", train_subset=200, test_subset=8, test_views=8)
    )
    """The slices, and how many views of them are seen; training slices give the prior of the solver map. Without a size
    phantoms are drawn at that of the dictionary's."""
    noise: float = 0.0
    """Standard deviation of the noise on the projections."""
    tv_weight: float = 3e-5
    """Weight of the total variation beside which the dictionary is shown; noise asks for more."""
    fit: FitOptions = dataclasses.field(default_factory=lambda: FitOptions(solver="map", penalty=1e-5))
    """How codes are found; the gate, which looks at images, takes no part."""


def tomography(config: TomographyConfig, options: RunOptions) -> None:
    """Reconstruct slices from few views, beside filtered back-projection and total variation."""
    model, _ = load_dictionary(config.checkpoint)
    folder = folder_of(options, "ct")
    if config.data.name not in PROJECTED:
        raise UserError(f"--data.name {config.data.name}: tomography takes phantoms or ct")
    if config.noise < 0 or config.tv_weight < 0:
        raise UserError("--noise and --tv_weight take 0 or more")
    with Run.evaluation("nid", options) as run, refusals():
        data = config.data
        if data.name == "phantoms" and not data.size:
            data = dataclasses.replace(data, size=model.config.size[0])
        signals = load_signals(data).to(run.device)
        check_fit(model, signals, data.name)
        model = model.to(run.device)
        observed = observe(signals, data, options.seed)
        assert observed.rays is not None
        assert observed.angles is not None
        seed_everything(options.seed, "noise")
        problem = dictionary_system(model, observed)
        scans = observed.targets()
        scans = scans + config.noise * torch.randn_like(scans)
        problem = problem._replace(targets=scans.flatten(1))
        coords, size = lattice(observed.spatial, device=run.device), (observed.spatial[0], observed.spatial[1])
        prior = code_prior(model, signals) if config.fit.solver == "map" else None
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            code = solve(model, problem, config.fit, prior=prior)
            found["nid"] = model.render(code, coords).view_as(observed.truth)
            if prior is not None:
                spread = posterior(problem, prior, config.fit.penalty).deviation(model.design(coords))
                save_image(folder / "nid-deviation.png", (spread / spread.max()).view(*size, 1))
        if size[0] == size[1]:  # all that filtered back-projection takes
            found["fbp"] = fbp(scans, observed.angles, size[0])
        found["tv"] = tv(scans, observed.rays, size, weight=config.tv_weight)
        for method, slices in found.items():
            for i, image in enumerate(slices):
                save_image(folder / f"{method}-{i:05d}.png", image)
            report(method=method, psnr=float(psnr(slices, observed.truth).mean()), views=len(observed.angles))
    print(f"written to {folder}")


# -- shapes ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class ShapeConfig:
    """Which shapes to fit, and from what."""

    checkpoint: Path
    """A run's folder, a .safetensors file of ours, or a .ckpt file of the authors' layout; or networks of single shapes, as
    the recipe pointcloud-siren trains them, whose surfaces are written as they are."""
    meshes: list[Path] = dataclasses.field(default_factory=list)
    """Watertight meshes in any format of Open3D; default: embedded primitives."""
    count: int = 4
    """How many of the embedded primitives."""
    points: int = 2000
    """Samples of the distance field that are seen, at random places of the lattice."""
    resolution: int = 64
    """Samples along each axis for marching cubes."""
    suffix: str = ".ply"
    """Format of the meshes that are written."""
    fit: FitOptions = dataclasses.field(default_factory=lambda: FitOptions(penalty=1e-5))
    """How codes are found; the gate takes no part. The solver map takes the codebook's rows as its prior."""


def shapes_to_meshes(config: ShapeConfig, options: RunOptions) -> None:
    """Fit distance fields from few samples, extract their surfaces and write them as meshes."""
    model, _ = load_model(config.checkpoint)
    if isinstance(model, NetworkBatch) and (model.config.in_dim, model.config.out_dim) == (3, 1):
        _networks_to_meshes(model, config, options)
        return
    model, _ = load_dictionary(config.checkpoint)
    folder = folder_of(options, "sdf")
    if model.config.in_dim != 3:
        raise UserError(f"the dictionary represents {model.config.in_dim}-D signals, not shapes")
    if config.points < 1 or config.resolution < 2 or config.count < 1:
        raise UserError("--points and --count take 1 or more, --resolution 2 or more")
    with Run.evaluation("nid", options) as run, refusals():
        model = model.to(run.device)
        side = model.config.size[0]
        if config.meshes:
            names, truths = stems(config.meshes), [read_mesh(file) for file in config.meshes]
            fields = torch.stack([sdf_from_mesh(mesh, side) for mesh in truths])
        else:
            names = [f"shape-{i}" for i in range(config.count)]
            truths = [marching_cubes(field[..., 0]) for field in distance_fields(config.count, FINE, seed=1)]
            fields = distance_fields(config.count, side, seed=1)
        coords = lattice((side,) * 3)
        seed_everything(options.seed, "points")
        chosen = torch.randperm(len(coords))[: config.points]
        targets = fields.view(len(fields), -1, 1)[:, chosen].to(run.device)
        prior = None
        if config.fit.solver == "map":
            if not isinstance(model.gate_generator, CodebookGate):
                raise UserError("the prior of the solver map is that of a codebook, which this dictionary has not")
            prior = fit_prior(model.gate_generator.codebook.weight.detach())
        with torch.no_grad():
            problem = system(model.design(coords[chosen].to(run.device)), targets)
            codes = solve(model, problem, config.fit, prior=prior)
        for name, truth, code in zip(names, truths, codes, strict=True):
            shape = single_signal(model, code) if model.config.atoms == "shared" else _rendered(model, code)
            mesh = _surface(shape, config.resolution, name, run.device)
            save_mesh(mesh, folder / f"{name}{config.suffix}")
            points, normals = sample_surface(truth, SURFACE_SAMPLES, generator(options.seed))
            distance = surface_distance(mesh.vertices, points, mesh.normals, normals)
            report(
                shape=name,
                vertices=len(mesh.vertices),
                chamfer=float(distance.chamfer),
                hausdorff=float(distance.hausdorff),
                normal_consistency=None if distance.normal_consistency is None else float(distance.normal_consistency),
            )
    print(f"written to {folder}")


def _networks_to_meshes(networks: NetworkBatch, config: ShapeConfig, options: RunOptions) -> None:
    """Write the surface of each network of a single shape."""
    if config.resolution < 2:
        raise UserError("--resolution takes 2 or more")
    folder = folder_of(options, "sdf")
    with Run.evaluation("nid", options) as run, refusals():
        for i in range(networks.weights[0].shape[0]):
            mesh = _surface(networks.single(i).to(run.device), config.resolution, f"shape-{i}", run.device)
            save_mesh(mesh, folder / f"shape-{i}{config.suffix}")
            report(shape=f"shape-{i}", vertices=len(mesh.vertices))
    print(f"written to {folder}")


def _rendered(model: NeuralDictionary, code: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda points: model.render(code[None], points)[0]


def _surface(field: Callable[[Tensor], Tensor], resolution: int, name: str, device: torch.device) -> Mesh:
    try:
        return extract_mesh(field, resolution, device=device)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


# -- export ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class ExportConfig:
    """Which signal to export."""

    checkpoint: Path
    """A run's folder, a .safetensors file of ours, or a .ckpt file of the authors' layout."""
    image: Path | None = None
    """An image of the dictionary's size; default: an embedded test photograph's patch, or a row of the codebook."""
    index: int = 0
    """Which patch of the image, row by row, or which row of the codebook."""
    fit: FitOptions = dataclasses.field(default_factory=FitOptions)
    """How its code is found."""


def export(config: ExportConfig, options: RunOptions) -> None:
    """Write one signal as a small network of its own in ONNX; where onnxruntime is installed, its values are compared."""
    model, _ = load_dictionary(config.checkpoint)
    folder = folder_of(options, "export")
    without_prior(config.fit)
    with refusals():
        if isinstance(model.gate_generator, CodebookGate) and config.image is None:
            rows = len(model.gate_generator.codebook.weight)
            if not 0 <= config.index < rows:
                raise UserError(f"--index {config.index}: the codebook has {rows} rows")
            code = model.sparse_code(torch.tensor([config.index])).detach()[0]
        else:
            name, image = given_images([] if config.image is None else [config.image], model, "--image")[0]
            codes = PatchModel(model).codes(image[None], None, config.fit)
            if not 0 <= config.index < len(codes):
                raise UserError(f"--index {config.index}: {name} has {len(codes)} patches")
            code = codes[config.index]
        network = single_signal(model, code)
        path = folder / "signal.onnx"
        save_onnx(network, path)
    coords = lattice((16,) * model.config.in_dim)
    with torch.no_grad():
        expected = model.render(code[None], coords)[0]
        difference = float((network(coords) - expected).abs().max())
    numbers = sum(p.numel() for p in network.parameters())
    report(file=str(path), numbers=numbers, folded_differs_by=difference, **_runtime(path, coords, expected))


def _runtime(path: Path, coords: Tensor, expected: Tensor) -> dict[str, float]:
    try:
        import onnxruntime  # noqa: PLC0415 - an optional check
    except ImportError:
        return {}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (values,) = session.run(None, {"coords": coords.numpy()})
    return {"onnx_differs_by": float(np.abs(values - expected.numpy()).max())}
