"""What a trained field is worth (section 9): novel views, geometry, and whether noise was memorised."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tenfold_augnerf.compat import convert, load_official_checkpoint, load_state
from tenfold_augnerf.data import Data, DataConfig, DataName, load_data
from tenfold_augnerf.geometry import (
    depth_scores,
    median_depth,
    normal_error,
    normals_from_depth,
    ray_entropies,
    total_variation,
)
from tenfold_augnerf.metrics import lpips, mse, psnr, psnr_mean, psnr_of_mean_mse, ssim, ssim_standard
from tenfold_augnerf.models import ModelConfig, create_model
from tenfold_augnerf.renderer import RaySampling, Renderer, Variant
from tenfold_augnerf.views import Views
from tenfold_shared.checkpoint import load_pickled_tensors, load_weights
from tenfold_shared.cli import as_trained
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions
from tenfold_shared.scenes import blocks

COLLAPSED = 1e-3  # a mean opacity below this is an empty scene
BYTES_A_VALUE = 4
CPU_WORKING_SET = 8 << 20  # bytes of one layer's activations that stay in the processor's cache


def rays_at_once(renderer: Renderer, device: torch.device, *, training: bool = False) -> int:
    """How many rays to render at a time: what the cache holds on a CPU, a quarter of the free memory on a GPU."""
    samples = renderer.sampling.coarse + renderer.fine_samples
    a_layer = samples * renderer.nerf.width * BYTES_A_VALUE
    if device.type == "cuda":
        layers = 24 if training else 4  # those alive at once
        return max(64, torch.cuda.mem_get_info(device)[0] // 4 // (a_layer * layers))
    return max(16, CPU_WORKING_SET // a_layer)


def compile_networks(renderer: Renderer) -> None:
    """Have torch.compile make encodings and trunks, at their first call."""
    for field in {renderer.nerf, renderer.nerf_fine}:
        field.encode = torch.compile(field.encode)


def placed(renderer: Renderer, run: Run) -> Renderer:
    """The renderer of a verb that only reads a checkpoint: on the run's device, in its precision, compiled if asked."""
    if run.options.compile:
        compile_networks(renderer)
    # As Accelerate prepares a network; compiled are its parts alone.
    renderer.forward = run.accelerator.autocast()(renderer.forward)  # type: ignore[method-assign]
    return renderer.to(run.device)


class Rendered(NamedTuple):
    """A whole view: colours [H, W, 3] as they are (not clipped), Σ w z, opacity, median depth, and entropy along rays."""

    rgb: Float[Tensor, "height width 3"]
    depth: Float[Tensor, "height width"]
    acc: Float[Tensor, "height width"]
    median: Float[Tensor, "height width"]
    entropy: float


@torch.inference_mode()
def render_view(renderer: Renderer, views: Views, view: int, chunk: int = 0) -> Rendered:
    """A view as its camera sees it, without jitter and noise, a chunk of rays at a time."""
    height, width = views.size
    pixels = views.pixels_of(view)
    size = chunk or rays_at_once(renderer, pixels.device)
    parts: list[tuple[Tensor, ...]] = []
    entropies: list[Tensor] = []
    for part in pixels.split(size):
        rendering = renderer(views.rays(part))
        shown, z = rendering.fine.shown, rendering.fine.z
        places = z if z.shape == shown.weights.shape else (z[:, 1:] + z[:, :-1]) / 2
        parts.append((shown.rgb, shown.depth[:, 0], shown.acc[:, 0], median_depth(shown.weights, places)))
        entropies.append(ray_entropies(shown.weights))
    rgb, depth, acc, median = (torch.cat(column) for column in zip(*parts, strict=True))
    entropy = torch.cat(entropies)
    mean = float(entropy.mean()) if len(entropy) else 0.0
    shape = height, width
    return Rendered(rgb.view(*shape, 3), depth.view(shape), acc.view(shape), median.view(shape), mean)


def truth_of(views: Views, view: int) -> Float[Tensor, "height width 3"]:
    """The colours of a view in [0, 1]."""
    return views.colours[view].float() / 255


def view_scores(
    renderer: Renderer, views: Views, view: int, *, exact: bool, perceptual: bool = False, chunk: int = 0
) -> dict[str, float]:
    """All scores of one view; `exact` adds those against the blocks' true normals."""
    found = render_view(renderer, views, view, chunk)
    truth = truth_of(views, view)
    scores = {
        "mse": float(mse(found.rgb, truth)),
        "ssim": float(ssim(found.rgb, truth)),
        "acc": float(found.acc.mean()),
        "ray_entropy": found.entropy,
    }
    if min(truth.shape[:2]) >= 11:
        scores["ssim_standard"] = float(ssim_standard(found.rgb, truth))
    if perceptual:
        scores |= {"lpips": float(lpips(found.rgb, truth)), "lpips_ref": float(lpips(found.rgb, truth, reference=True))}
    expected = torch.where(found.acc > 1e-3, found.depth / found.acc.clamp(min=1e-3), torch.zeros_like(found.depth))
    scores["depth_tv"] = total_variation(expected)
    if views.depth is not None:
        scores |= depth_scores(*(x.flatten() for x in (found.depth, found.median, found.acc, views.depth[view])))
    if exact:
        rays = views.rays(views.pixels_of(view))
        origins, directions = (x.view(*views.size, 3) for x in (rays.origins, rays.directions))
        hit = blocks().trace(*(x.reshape(-1, 3).double().cpu().numpy() for x in (origins, directions)))
        normals = torch.from_numpy(hit.normal).to(expected).view(*views.size, 3)
        seen = torch.from_numpy(hit.surface >= 0).to(expected.device).view(views.size)
        scores["normal_error"] = normal_error(normals_from_depth(expected, origins, directions), normals, seen)
    return scores


def scores_of(
    renderer: Renderer, views: Views, *, exact: bool = False, perceptual: bool = False, run: Run | None = None
) -> dict[str, Any]:
    """Scores over views: totals, both kinds of mean PSNR, and every view's error; processes share the views.

    A process without a view of its own scores one that counts elsewhere, to know the scores that it adds zeros to.
    """
    was_training = renderer.training
    renderer.eval()
    rank, world = (run.rank, run.world) if run else (0, 1)
    seen = range(rank, len(views), world) or [rank % len(views)]
    rows = {v: view_scores(renderer, views, v, exact=exact, perceptual=perceptual) for v in seen}
    if run and world > 1:
        names = sorted(rows[seen[0]])
        table = torch.zeros(len(views), len(names), dtype=torch.float64, device=run.device)
        for view in range(rank, len(views), world):
            table[view] = torch.tensor([rows[view][name] for name in names], dtype=torch.float64)
        table = run.reduce(table)
        rows = {v: dict(zip(names, table[v].tolist(), strict=True)) for v in range(len(views))}
    renderer.train(was_training)
    ordered = [rows[v] for v in range(len(views))]
    errors = [row["mse"] for row in ordered]
    means = {name: float(np.mean([row[name] for row in ordered])) for name in ordered[0] if name != "mse"}
    return {
        "psnr": psnr_mean(errors),
        "psnr_of_mean_mse": psnr_of_mean_mse(errors),
        **means,
        "collapsed": means["acc"] < COLLAPSED,
        "mse": errors,
    }


def memorised(renderer: Renderer, data: Data) -> dict[str, float]:
    """PSNR of the training views against what was trained on and against the clean pictures: noise that is learnt by
    heart shows as a high first number.
    """
    errors = []
    for view in range(len(data.train)):
        rgb = render_view(renderer, data.train, view).rgb
        errors.append(torch.stack([mse(rgb, truth_of(views, view)) for views in (data.train, data.clean)]))
    given, clean = psnr(torch.stack(errors).mean(0)).tolist()
    return {"train_psnr": given, "train_clean_psnr": clean}


# -- checkpoints ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class OtherData:
    """What is to differ from the data that a checkpoint was trained on; None: nothing."""

    name: DataName | None = None
    """The data set; default: the one of the training, or blocks-tiny for a checkpoint that does not say."""
    scene: str | None = None
    """Scene of the data set, a folder's name."""
    root: Path | None = None
    """Folder of the data set."""
    factor: int | None = None
    """LLFF: how much smaller than the originals the pictures are."""
    half_res: bool | None = None
    """Blender: halve the pictures by area averaging."""
    white: bool | None = None
    """Composite transparent pictures on white, and render on it."""
    ndc: bool | None = None
    """LLFF: sample in normalised device coordinates instead of world space."""
    spherify: bool | None = None
    """LLFF: a capture around an object."""
    test_skip: int | None = None
    """Keep every n-th validation and test view of Blender and DeepVoxels; LLFF tests every n-th view."""
    near: float | None = None
    """Smallest ray parameter."""
    far: float | None = None
    """Largest ray parameter."""


@dataclasses.dataclass
class EvalConfig:
    """What to evaluate."""

    checkpoint: Path
    """A run's folder, a .safetensors file of ours, or a .ckpt or .tar file of the released layouts."""
    data: OtherData = dataclasses.field(default_factory=OtherData)
    """The pictures."""
    split: str = "test"
    """Views to evaluate on: test, validation or train."""
    samples: list[int] = dataclasses.field(default_factory=list)
    """Coarse and fine samples; empty: the checkpoint's own, or 64 and 64."""
    lpips: bool = False
    """Also give LPIPS, which needs AlexNet's weights."""


def weights_file(checkpoint: Path) -> Path:
    """The weights of a run's folder, or the file itself."""
    return checkpoint / "checkpoints" / "last.safetensors" if checkpoint.is_dir() else checkpoint


def data_of(checkpoint: Path, asked: OtherData) -> DataConfig:
    """The data of the checkpoint's training, changed in what is asked for; another data set begins at its defaults.

    A checkpoint that does not say what it was trained on, as those of other programs, gets the smallest blocks, with a
    message.

    Raises:
        UserError: the checkpoint is not there or damaged.

    """
    path = weights_file(checkpoint)
    trained = load_weights(path)[1].get("data", {}) if path.suffix == ".safetensors" else {}
    if asked.name is None and not trained and path.is_file():
        print(
            f"{path} does not say what it was trained on: blocks-tiny is taken, or name it by --data", file=sys.stderr
        )
    return as_trained(DataConfig, trained, asked)


def load_renderer(checkpoint: Path, data: Data, samples: list[int] | None = None) -> tuple[Renderer, dict[str, Any]]:
    """The renderer of a checkpoint for the bounds of a data set, and what the checkpoint says about itself.

    Raises:
        UserError: unreadable, or of no known layout (the keys are named).

    """
    if samples and len(samples) != 2:
        raise UserError(f"--samples takes two numbers, coarse and fine, got {samples}")
    path = weights_file(checkpoint)
    near, far = data.train.near, data.train.far
    if path.suffix != ".safetensors":
        if not path.is_file():
            raise UserError(f"no checkpoint at {path}: give a run's folder, a .safetensors, a .ckpt or a .tar file")
        coarse, fine = samples or (64, 64)
        convert(load_pickled_tensors(path), str(path))
        sampling = RaySampling(near, far, coarse, fine, ndc=data.ndc)
        return load_official_checkpoint(path, sampling, white=data.white), {"checkpoint": "released layout"}
    state, about = load_weights(path)
    if "sizes" not in about or "samples" not in about:
        raise UserError(f"{path} does not say which model it holds: it is no checkpoint of this package")
    coarse, fine = samples or about["samples"]
    sampling = RaySampling(near, far, coarse, fine, about.get("inverse", False), data.ndc)
    model = create_model(ModelConfig(**about["sizes"]), sampling, white=data.white, variant=Variant())
    load_state(model, {name: value for name, value in state.items() if not name.startswith("nerf_adv.")})
    return model, about


def views_of(data: Data, split: str) -> Views:
    """The views of a split.

    Raises:
        UserError: there is no such split.

    """
    splits = {"test": data.test, "validation": data.validation, "train": data.clean}
    if split not in splits:
        raise UserError(f"--split {split}: it is one of {', '.join(splits)}")
    return splits[split]


def perceptual_scores_work() -> bool:
    """Whether LPIPS has its weights, fetched by torchvision and torchmetrics where they may be; says so if not."""
    grey = torch.full((64, 64, 3), 0.5)
    try:
        lpips(grey, grey)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        print(f"LPIPS is left out: AlexNet's weights are not there and cannot be fetched ({error})", file=sys.stderr)
        return False
    return True


def evaluate(config: EvalConfig, options: RunOptions) -> None:
    """Print the scores of a checkpoint as one JSON line."""
    chosen = data_of(config.checkpoint, config.data)
    data = load_data(chosen)
    perceptual = config.lpips and perceptual_scores_work()
    views = views_of(data, config.split)
    renderer, about = load_renderer(config.checkpoint, data, config.samples or None)
    with Run.evaluation("augnerf", options) as run:
        scores = scores_of(
            placed(renderer, run), views.to(run.device), exact=bool(data.scene), perceptual=perceptual, run=run
        )
        if run.is_main:
            seen = {"data": f"{chosen.name} {chosen.scene}".strip(), "split": config.split}
            print(json.dumps({**about, **seen, **{name: value for name, value in scores.items() if name != "mse"}}))
