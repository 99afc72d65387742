"""What a network is worth (section 9): scores of judged views, and of checkpoints."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold_gnt.baselines import mean_view, nearest_view
from tenfold_gnt.cameras import pixel_grid, rays_through
from tenfold_gnt.compat import load_official_checkpoint, refuse_misfits
from tenfold_gnt.data import TargetViews
from tenfold_gnt.experiments import DataConfig, Target, judged_targets
from tenfold_gnt.metrics import constant_depth_error, depth_scores, lpips, psnr, ssim
from tenfold_gnt.models import NetworkConfig, create_model
from tenfold_gnt.projection import source_views
from tenfold_gnt.render import Model, Picture, prepare_views, render_picture
from tenfold_gnt.sampling import refuse_few_samples
from tenfold_shared.checkpoint import load_weights
from tenfold_shared.errors import RunFailure, UserError
from tenfold_shared.run import Run, RunOptions, seed_everything

RAYS_AT_ONCE = 2**16  # of the mean view


@dataclasses.dataclass
class Scores:
    """Scores of one view, or their means; NaN where there is no truth to compare with or it was not asked for."""

    psnr: float
    """dB, of colours clipped to [0, 1]."""
    ssim: float
    """Structural similarity in the published convention."""
    foreground_psnr: float
    """dB on the pixels that the scene covers."""
    nearest_psnr: float
    """dB of the floor: a copy of the nearest source view."""
    depth_error: float
    """Mean absolute error of the depth on the pixels that meet a surface."""
    depth_correlation: float
    """Correlation of the depth with the truth there."""
    constant_depth_error: float
    """The error that the best constant depth has."""
    lpips: float = math.nan
    """LPIPS (VGG)."""
    lpips_01: float = math.nan
    """LPIPS as the published numbers were made, on images in the wrong range."""
    mean_psnr: float = math.nan
    """dB of the other floor: the sources' mean colour at the true depth, or on a plane where none is known."""
    untrained_depth_error: float = math.nan
    """`depth_error` of the network before training."""
    untrained_depth_correlation: float = math.nan
    """`depth_correlation` of the network before training."""

    def sentence(self) -> str:
        """The scores that exist, in words."""
        floors = f"nearest view {self.nearest_psnr:.2f}, mean view {self.mean_psnr:.2f}"
        parts = [f"PSNR {self.psnr:.2f} dB ({floors}), SSIM {self.ssim:.3f}"]
        if not math.isnan(self.depth_error):
            parts.append(
                f"depth error {self.depth_error:.3f} (a constant {self.constant_depth_error:.3f}, untrained "
                f"{self.untrained_depth_error:.3f}), correlation {self.depth_correlation:.2f} (untrained "
                f"{self.untrained_depth_correlation:.2f})"
            )
        return ", ".join(parts)


@dataclasses.dataclass
class EvalConfig:
    """What to evaluate."""

    checkpoint: Path
    """A run's folder, a .safetensors file of ours, or an authors' model_<step>.pth."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The judged views."""
    samples: int = 192
    """Depths a ray."""
    importance: int = 0
    """Further depths of a second pass."""
    stride: int = 1
    """Every n-th pixel of both directions: 1 is the full protocol, 2 the one behind the published numbers."""
    lpips: bool = False
    """Also LPIPS, both ways; its VGG weights are fetched by torchmetrics."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.importance < 0 or self.stride < 1:
            raise UserError("--importance takes 0 or more, --stride 1 or more")
        refuse_few_samples(self.samples, self.importance, "--samples")


def evaluate(config: EvalConfig, options: RunOptions) -> None:
    """Print the mean scores of a checkpoint with the protocol they are of, as one JSON line."""
    model, about = load_model(config.checkpoint)
    refuse_idle_network(model, config.importance, config.checkpoint)
    if options.compile:
        model.compile_networks()
    targets = judged_targets(config.data)
    with Run.evaluation("gnt", options) as run:
        table = score_targets(
            run,
            model.to(run.device),
            targets,
            sources=config.data.sources,
            samples=config.samples,
            importance=config.importance,
            inverse=about.get("inverse", True),
            stride=config.stride,
            with_lpips=config.lpips,
            untrained=untrained_model(NetworkConfig(**about["network"]), options.seed).to(run.device),
        )
        if run.is_main:
            scores = mean_scores(table, [target.scene.name for target in targets])
            found = {k: v for k, v in dataclasses.asdict(scores).items() if not math.isnan(v)}
            protocol = {
                "data": config.data.judged_name,
                "scene": config.data.scene or "all",
                "split": config.data.judged_split,
                "judged_views": len(targets),
                "sources": config.data.sources,
                "samples": config.samples,
                "importance": config.importance,
                "protocol": {1: "full (stride 1)", 2: "official (stride 2)"}.get(
                    config.stride, f"stride {config.stride}"
                ),
            }
            print(json.dumps({**about, **protocol, **found}))


def checkpoint_file(checkpoint: Path) -> Path:
    """The file of a checkpoint's weights; of a run's folder, those that it ended with."""
    return checkpoint / "checkpoints" / "last.safetensors" if checkpoint.is_dir() else checkpoint


def load_model(checkpoint: Path) -> tuple[Model, dict[str, Any]]:
    """The network of a checkpoint, and what the checkpoint says about itself.

    Raises:
        UserError: unreadable, or of no known network (the keys that do not fit are named).

    """
    path = checkpoint_file(checkpoint)
    if path.suffix in (".pth", ".pt"):
        official = load_official_checkpoint(path)
        coarse = official.coarse
        config = NetworkConfig(
            width=coarse.width, depth=coarse.depth, channels=coarse.feature_channels, fine=official.fine is not None
        )
        released = {"step": official.step, "inverse": True, "network": dataclasses.asdict(config)}
        return Model(official.features, coarse, official.fine), released
    state, about = load_weights(path)
    known = {field.name for field in dataclasses.fields(NetworkConfig)}
    network = about.get("network")
    if not isinstance(network, dict) or not network.keys() <= known:
        raise UserError(f"{path} does not say which network it holds: it was not written by tenfold-gnt")
    model = create_model(NetworkConfig(**network))
    refuse_misfits(state, model.state_dict(), str(path), f"{network.get('name')} network that it names")
    model.load_state_dict(state)
    return model, about


def untrained_model(network: NetworkConfig, seed: int) -> Model:
    """The network as training from scratch starts it: an error of depth says little unless beside that of this one."""
    seed_everything(seed, "init")
    return create_model(network)


def refuse_idle_network(model: Model, importance: int, checkpoint: Path) -> None:
    """Refuse to leave out the second network of a checkpoint.

    Raises:
        UserError: it has one, and no importance pass is asked for.

    """
    if model.fine is not None and not importance:
        raise UserError(
            f"{checkpoint} holds a second network, for the importance pass: add --importance, as many as it was "
            "trained with (and as many --samples)"
        )


def score_targets(
    run: Run,
    model: Model,
    targets: Sequence[Target],
    *,
    sources: int,
    samples: int,
    importance: int = 0,
    inverse: bool = True,
    stride: int = 1,
    with_lpips: bool = False,
    untrained: Model | None = None,
) -> list[Scores]:
    """Scores of every target, shared out over the processes.

    Raises:
        RunFailure: a rendering is not finite.

    """
    names = [field.name for field in dataclasses.fields(Scores)]
    table = torch.zeros(len(targets), len(names), dtype=torch.float64, device=run.device)
    for number in range(run.rank, len(targets), run.world):
        target = targets[number]
        views = target.views(sources).to(run.device)
        with run.accelerator.autocast():
            picture = render_target(model, views, samples, importance, inverse=inverse, stride=stride)
        if not (picture.rgb.isfinite().all() and picture.depth.isfinite().all()):  # no score to leave out of a mean
            raise RunFailure(
                f"the rendering of view {target.view} of {target.scene.name} is not finite: the network's weights are "
                "damaged, or --precision is too low for them"
            )
        found = score_picture(picture, target, views, stride, with_lpips=with_lpips)
        if untrained is not None and (true_depth := depth_of_target(target, stride)) is not None:
            with run.accelerator.autocast():
                picture = render_target(untrained, views, samples, importance, inverse=inverse, stride=stride)
            scores = depth_scores(picture.depth.to(views.rgb), true_depth.to(views.rgb))
            found["untrained_depth_error"], found["untrained_depth_correlation"] = scores
        for column, name in enumerate(names):
            table[number, column] = found.get(name, math.nan)
    return [Scores(**dict(zip(names, row, strict=True))) for row in run.reduce(table).tolist()]


@torch.inference_mode()
def render_target(
    model: Model,
    views: TargetViews,
    samples: int,
    importance: int = 0,
    *,
    inverse: bool = True,
    stride: int = 1,
    occlusion: bool = False,
) -> Picture:
    """The target as the network sees it from its sources."""
    prepared = prepare_views(model, views.images, views.cameras)
    sampling = views.sampling(samples, importance, inverse=inverse)
    return render_picture(model, prepared, views.camera, sampling, stride=stride, occlusion=occlusion)


def score_picture(
    picture: Picture, target: Target, views: TargetViews, stride: int = 1, *, with_lpips: bool = False
) -> dict[str, Tensor]:
    """A rendering against the true view, every `stride`-th pixel; `Scores` as tensors on the device."""
    truth = views.rgb[::stride, ::stride]
    rgb, depth = picture.rgb.to(truth), picture.depth.to(truth)
    row = {
        "psnr": psnr(rgb, truth),
        "ssim": ssim(rgb, truth),
        "nearest_psnr": psnr(nearest_view(views.camera, views.images, views.cameras)[::stride, ::stride], truth),
    }
    true_depth = depth_of_target(target, stride)
    row["mean_psnr"] = psnr(mean_picture(views, stride, true_depth), truth)
    alpha = target.scene.alpha(target.view)
    if alpha is not None and (covered := alpha[::stride, ::stride] > 0).any():
        row["foreground_psnr"] = psnr(rgb, truth, torch.from_numpy(covered).to(truth))
    if true_depth is not None:
        true_depth = true_depth.to(truth)
        row["depth_error"], row["depth_correlation"] = depth_scores(depth, true_depth)
        row["constant_depth_error"] = constant_depth_error(true_depth)
    if with_lpips:
        row["lpips"], row["lpips_01"] = lpips(rgb, truth), lpips(rgb, truth, as_published=True)
    return row


def depth_of_target(target: Target, stride: int = 1) -> Tensor | None:
    """The true depth of every `stride`-th pixel [H, W], inf where nothing is met; None where it is not known."""
    if target.scene.depth is None:
        return None
    return torch.from_numpy(target.scene.depth[target.view][::stride, ::stride])


def mean_picture(views: TargetViews, stride: int = 1, true_depth: Tensor | None = None) -> Tensor:
    """The floor `mean_view` for every `stride`-th pixel, [H, W, 3].

    Args:
        views: the target and its sources.
        stride: every n-th pixel of both directions.
        true_depth: of these pixels; where it is not finite, the farthest depth. None takes the plane in the middle of
            the inverse depths.

    """
    rgb = views.rgb[::stride, ::stride]
    if true_depth is None:
        depth = torch.full(rgb.shape[:2], 2 / (1 / views.near + 1 / views.far)).to(rgb)
    else:
        depth = true_depth.to(rgb).nan_to_num(posinf=views.far)
    height, width = views.rgb.shape[:2]
    origins, directions = rays_through(views.camera, pixel_grid(height, width, stride).to(rgb.device))
    sources = source_views(views.images, views.cameras)
    parts = zip(*(x.split(RAYS_AT_ONCE) for x in (origins, directions, depth.flatten())), strict=True)
    return torch.cat([mean_view(o, d, z, sources) for o, d, z in parts]).view(rgb.shape)


def mean_scores(table: Sequence[Scores], scenes: Sequence[str]) -> Scores:
    """Means over the views of a scene, then over the scenes; of every score, over those that have it.

    Args:
        table: scores of views.
        scenes: the scene of each.

    """
    fields = [field.name for field in dataclasses.fields(Scores)]
    columns = torch.tensor([[getattr(row, name) for name in fields] for row in table], dtype=torch.float64)
    of_scenes = [columns[[scene == one for scene in scenes]].nanmean(0) for one in dict.fromkeys(scenes)]
    return Scores(**dict(zip(fields, torch.stack(of_scenes).nanmean(0).tolist(), strict=True)))
