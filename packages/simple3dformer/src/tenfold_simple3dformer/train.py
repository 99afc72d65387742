"""Training: one loop for all tasks, with the image stream and its teacher beside it where asked for (section 2.5)."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from tenfold_shared.batches import Batches, Stream, StreamedBatches
from tenfold_shared.checkpoint import load_weights, save_weights
from tenfold_shared.download import data_root, missing
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions, derived_seed, seed_everything
from tenfold_simple3dformer import natural
from tenfold_simple3dformer.data.sets import Data, DataConfig, Task, evaluation_batch, load_data
from tenfold_simple3dformer.data.sunrgbd import boxes_of
from tenfold_simple3dformer.detection.criterion import Criterion
from tenfold_simple3dformer.detection.detector import bounds
from tenfold_simple3dformer.evaluate import PRIMARY, evaluate_model
from tenfold_simple3dformer.lwf import Mode, lwf_loss, retention, teach
from tenfold_simple3dformer.models import ModelConfig, build_model
from tenfold_simple3dformer.optim import Optim, build_optimiser, set_norm_momentum, set_rates
from tenfold_simple3dformer.tuning import Mode as TuningMode
from tenfold_simple3dformer.tuning import merge_low_rank, merged_state, set_trainable, train_image_path
from tenfold_simple3dformer.weights import (
    Inflation,
    Positions,
    TransferReport,
    block_drift,
    check_heads,
    read_image_weights,
    transfer,
    vit_from_weights,
)


@dataclasses.dataclass
class Forgetting:
    """Learning without forgetting: the image stream and its teacher."""

    lam: float = 0.0
    """Weight lambda of the image term; 0: none (the paper's is 0.1)."""
    teacher: str = ""
    """Weights of the teacher, as of --weights; default: those of --weights. Where given, retention is measured."""
    backbone: str = ""
    """Backbone of the teacher; default: the network's. The released voxel script always takes base."""
    images: Literal["natural2d", "folder"] = "natural2d"
    """Image stream: crops of scikit-image's pictures, or a folder of images such as ImageNet's validation set."""
    root: Path | None = None
    """The folder of images; default: imagenet/val in the data root ($TENFOLD_DATA or the platform's cache). Every 20th
    file is kept out of training, for retention to be measured on."""
    batch_size: int = 32
    """Images a step."""
    mode: Mode = "hard"
    """Cross entropy with the teacher's decision, or a symmetric Kullback-Leibler divergence."""
    temperature: float = 1.0
    """Temperature of the divergence."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.lam < 0 or self.batch_size < 1 or self.temperature <= 0:
            raise UserError(
                f"--lwf takes lam >= 0, batch_size >= 1, temperature > 0, got {self.lam}, {self.batch_size}, {self.temperature}"
            )


@dataclasses.dataclass
class Recipe:
    """One experiment."""

    task: Task = "voxel_cls"
    """What is learned."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The data."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """The network."""
    weights: str = "none"
    """Image weights of the backbone: none, timm:NAME, or a local file or run."""
    inflate: Inflation = "random"
    """Voxel embedding: random (the paper), or inflated from the patch embedding (average, center)."""
    positions_from: Positions = "random"
    """Voxel positions: random, or from the image's (resize2d, replicate_z)."""
    tune: TuningMode = "full"
    """What is trained: full, frozen (no blocks), norm, lora."""
    lwf: Forgetting = dataclasses.field(default_factory=Forgetting)
    """Learning without forgetting."""
    optim: Optim = dataclasses.field(default_factory=Optim)
    """Optimiser."""
    epochs: int = 100
    """Passes over the training samples."""
    steps: int = 0
    """Steps in place of epochs; 0: epochs count."""
    batch_size: int = 64
    """Samples a step, over all processes."""
    reweighted: bool = False
    """Class weights 1 / log(1 + (1 + frequency)), normalised to mean 1."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if self.epochs < 1 or self.batch_size < 1 or self.steps < 0:
            raise UserError(
                f"--epochs and --batch_size take 1 or more and --steps 0 or more, got {self.epochs}, {self.batch_size}, {self.steps}"
            )
        if self.lwf.lam > 0 and self.weights == "none" and not self.lwf.teacher:
            raise UserError("--lwf.lam needs a teacher: give --weights, or --lwf.teacher")
        if self.lwf.lam > 0 or self.lwf.teacher:
            self._check_image_path()
        if (self.inflate, self.positions_from) != ("random", "random"):
            if self.weights == "none":
                raise UserError("--inflate and --positions_from need image weights to take from: give --weights")
            if self.task != "voxel_cls":
                raise UserError(f"--inflate and --positions_from are for voxel_cls: {self.task} has no voxel embedding")
        if self.tune != "full" and (self.model.arch != "simple3dformer" or self.task == "image_cls"):
            raise UserError(f"--tune {self.tune} is for the 3D networks of --model.arch simple3dformer")
        points = self.model.arch == "simple3dformer" and self.task in ("point_cls", "part_seg", "scene_seg")
        if (self.model.start, self.model.tokens) != ("first", "abstraction") and not points:
            raise UserError(
                "--model.start and --model.tokens are for the point networks of --model.arch simple3dformer"
            )
        if self.reweighted and self.task not in ("voxel_cls", "point_cls", "image_cls"):
            raise UserError(f"--reweighted weighs the classes of whole samples, which {self.task} does not have")

    def _check_image_path(self) -> None:
        """The image term and the measurement of retention need a network that still takes images."""
        if self.model.arch != "simple3dformer" or self.task in ("detection", "image_cls"):
            raise UserError(
                f"--lwf.lam and --lwf.teacher are for the voxel and point networks of --model.arch simple3dformer, not for "
                f"{self.model.arch} on {self.task}"
            )
        if self.task != "voxel_cls" and self.model.preset == "3DViT":
            raise UserError(
                "--lwf.lam and --lwf.teacher need a network with its image path: choose --model.preset 3DViT_LWF or "
                "3DViT_1_layer"
            )


@dataclasses.dataclass
class Result:
    """What a run ends with; shares in per cent."""

    metrics: dict[str, float]
    """On the test samples, after the last epoch, or at the selected one."""
    value: float
    """The task's first metric."""
    retention: float | None
    """Held-out images on which the image head still decides as the teacher does."""
    drift: dict[int, float]
    """1 - cosine of each block's weights before and after training."""
    parameters: int
    """Of the network."""
    last: dict[str, float] | None = None
    """Where an epoch was selected: the metrics after the last one."""


class Best:
    """The best value at the end of an epoch so far; travels with the checkpoints."""

    def __init__(self) -> None:
        self.value, self.epoch = float("-inf"), -1

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"value": self.value, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The same again."""
        self.value, self.epoch = float(state["value"]), int(state["epoch"])


HELD_OUT = 20
"""One in so many of a folder's sorted images is never trained on: retention is measured there."""


class _ImageFiles(Dataset[tuple[Tensor, int]]):
    """Images of a folder at any depth, sorted, without labels: those to train on, augmented, or those held out."""

    def __init__(self, root: Path, size: int, *, training: bool):
        from tenfold_shared.images import imagenet_transform  # noqa: PLC0415

        files = sorted(f for f in root.rglob("*") if f.suffix.lower() in (".jpeg", ".jpg", ".png"))
        if len(files) < 2:
            raise UserError(
                f"{root} has {len(files)} images: give --lwf.root a folder of JPEG or PNG files such as ImageNet's val"
            )
        self.files = [f for i, f in enumerate(files) if (i % HELD_OUT > 0) == training]
        self.transform = imagenet_transform(training, size)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image  # noqa: PLC0415

        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("RGB")), 0


def image_stream(config: Forgetting, run: Run, size: int, *, training: bool) -> Batches | StreamedBatches:
    """Images of ``size`` pixels: 3,000 grey crops, or files as ImageNet is augmented; held out: 400 others, or other files.

    Fewer images than a batch give batches of all of them. Of those held out each comes once.

    Raises:
        UserError: the folder is not there, or holds too few images.

    """
    images: Any
    if config.images == "folder":
        images = _ImageFiles(image_folder(config), size, training=training)
    else:
        images = natural.crops(3000, 0, size) if training else natural.crops(400, 9, size)
    batch = evaluation_batch(len(images), 50 * run.world, run.world)
    if training:
        batch = min(config.batch_size, len(images) // run.world * run.world)
    common: dict[str, Any] = {"seed": derived_seed(run.options.seed, "images"), "drop_last": training, "rank": run.rank, "world": run.world, "device": run.device}  # fmt: skip
    if config.images == "folder":
        return StreamedBatches(images, batch, workers=4, **common)
    return Batches(images.images, images.labels, batch, std=(1 / 255,), **common)


def image_folder(config: Forgetting) -> Path:
    """The folder of the image stream.

    Raises:
        UserError: it is not there: where to get ImageNet's validation set and where to put it.

    """
    folder = config.root or data_root() / "imagenet" / "val"
    if not folder.is_dir():
        raise missing(
            "ImageNet's validation set (its terms ask for an account)",
            "https://image-net.org/download.php",
            f"{folder}/**/*.JPEG, or give --lwf.root another folder of images",
        )
    return folder


def prepared(images: Tensor, config: Forgetting, channels: int) -> Tensor:
    """Images as the teacher takes them; grey crops are repeated for a network of three channels."""
    if config.images != "natural2d":
        return images
    grey = natural.standardised(images)
    return grey.expand(-1, channels, -1, -1) if channels > 1 else grey


def train(recipe: Recipe, options: RunOptions) -> None:
    """Run a recipe and keep its network."""
    with Run("simple3dformer", recipe, options) as run:
        _, result = run_recipe(run, recipe)
        if run.is_main:
            shown = ", ".join(f"{name} {value:.2f}" for name, value in list(result.metrics.items())[:4])
            kept = "" if result.retention is None else f", 2D retention {result.retention:.2f} %"
            if result.last is not None:
                first = PRIMARY[recipe.task]
                shown += f" (selected epoch; after the last one {first} {result.last[first]:.2f})"
            print(f"{recipe.task} {recipe.model.arch} on {recipe.data.name}: {shown}{kept}; {run.directory}")


def class_weights(labels: list[int], classes: int) -> Tensor:
    """1 / log(1 + (1 + frequency)) of the classes, normalised to mean 1."""
    counts = torch.bincount(torch.tensor(labels), minlength=classes).double()
    weights = 1 / torch.log1p(1 + counts)
    return (weights / weights.mean()).float()


def start_model(recipe: Recipe, data: Data, run: Run) -> tuple[nn.Module, TransferReport]:
    """The network with its image weights; the report of where each tensor comes from is written to the run's folder, too.

    Raises:
        UserError: the weights do not fit.

    """
    model = build_model(recipe.model, recipe.task, len(data.classes), data.inputs, recipe.data.voxels)
    if recipe.task == "image_cls" and _image_shape(model) != (32, 1):
        raise UserError(
            f"{recipe.data.name} has grey crops of 32 pixels, and --model.backbone {recipe.model.backbone} takes other "
            "images: choose mini"
        )
    if recipe.weights == "none":
        return model, TransferReport("none")
    state, source = read_image_weights(recipe.weights)
    report = transfer(model, state, source=source, inflate=recipe.inflate, positions=recipe.positions_from)
    check_heads(model, recipe.weights)
    if run.is_main:
        (run.directory / "transfer.txt").write_text(report.table() + "\n", encoding="utf-8")
    return model, report


def run_recipe(run: Run, recipe: Recipe) -> tuple[nn.Module, Result]:
    """Train as the recipe says; returns the network and what it is worth.

    Raises:
        UserError: the recipe does not fit the data, the weights or the architecture.
        RunFailure: the loss is no longer finite.

    """
    seed_everything(run.options.seed, "init")
    data = load_data(recipe.data, recipe.task, recipe.batch_size, run)
    model, report = start_model(recipe, data, run)
    before = _backbone_state(model)
    if recipe.task != "image_cls":
        set_trainable(model, recipe.tune)
    if recipe.lwf.lam > 0:
        train_image_path(model, [name for name, status in report.status.items() if status in ("taken", "resized")])
    about = describe(recipe, data)
    teacher = _teacher(recipe, run, model)
    side, channels = _image_shape(model)
    images = Stream(image_stream(recipe.lwf, run, side, training=True)) if recipe.lwf.lam > 0 else None
    optimiser: Any = build_optimiser(recipe.optim, model)
    plain = model
    model, optimiser = run.prepare(model, optimiser)
    weights = class_weights(list(data.train_labels), len(data.classes)).to(run.device) if recipe.reweighted else None
    stream, best, per_epoch = Stream(data.train), Best(), len(data.train)
    total = recipe.steps or recipe.epochs * per_epoch
    for step in run.steps("train", total, model=model, optimiser=optimiser, best=best):
        epoch = step // per_epoch
        set_rates(optimiser, recipe.optim, step, per_epoch, total)
        set_norm_momentum(plain, recipe.optim, epoch)
        model.train()
        inputs, target = stream[step]
        if images is not None:
            assert teacher is not None
            pictures = prepared(images[step][0], recipe.lwf, channels)
            logits, image_logits = model(inputs[:, None] if recipe.task == "voxel_cls" else inputs, pictures)
            loss, terms = lwf_loss(
                logits.flatten(0, -2), target.flatten(), image_logits, teach(teacher, pictures), lam=recipe.lwf.lam,
                mode=recipe.lwf.mode, temperature=recipe.lwf.temperature, weight=weights,
            )  # fmt: skip
        else:
            loss, terms = task_loss(model, recipe.task, inputs, target, run, weights)
        optimiser.zero_grad()
        run.backward(loss)
        if recipe.optim.clip:
            run.accelerator.clip_grad_norm_(model.parameters(), recipe.optim.clip)
        optimiser.step()
        run.log(loss=run.reduce(loss.detach(), "mean"), **{k: run.reduce(v, "mean") for k, v in terms.items()})
        if (step + 1) % per_epoch == 0 and data.selection is not None:
            value = evaluate_model(model, data.selection, data, recipe.task, run)[PRIMARY[recipe.task]]
            run.log(selection=value)
            if value > best.value:
                best.value, best.epoch = value, epoch
                if run.is_main:
                    save_weights(run.directory / "checkpoints" / "best.safetensors", merged_state(plain), about)
    return plain, _finish(run, recipe, data, plain, teacher, best, before, about)


def task_loss(
    model: nn.Module, task: Task, inputs: Tensor, target: Tensor, run: Run, weights: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The 3D loss of a batch, and its terms."""
    if task == "detection":
        truth = boxes_of(target)
        boxes = run.reduce(truth.present.sum().float(), "mean")
        return Criterion()(model(inputs), truth, bounds(inputs), boxes)
    if task == "image_cls":
        inputs = natural.standardised(inputs)
    logits = model(inputs[:, None] if task == "voxel_cls" else inputs)
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), weights), {}


def describe(recipe: Recipe, data: Data) -> dict[str, Any]:
    """What a checkpoint says about itself: enough to build the network again."""
    return {
        "task": recipe.task,
        "network": dataclasses.asdict(recipe.model),
        "classes": list(data.classes),
        "inputs": data.inputs,
        "parts": {name: list(members) for name, members in data.parts.items()},
        "voxels": recipe.data.voxels,
        "points": recipe.data.points,
        "data": {
            **dataclasses.asdict(recipe.data),
            "root": None if recipe.data.root is None else str(recipe.data.root),
        },
    }


def _finish(
    run: Run,
    recipe: Recipe,
    data: Data,
    plain: nn.Module,
    teacher: nn.Module | None,
    best: Best,
    before: dict[str, Tensor],
    about: dict[str, Any],
) -> Result:
    last = None
    if data.selection is not None and best.epoch >= 0:
        last = evaluate_model(plain, data.test, data, recipe.task, run)
        if recipe.tune == "lora":
            merge_low_rank(plain)
        run.accelerator.wait_for_everyone()
        tensors, _ = load_weights(run.directory / "checkpoints" / "best.safetensors")
        plain.load_state_dict(tensors)
    if recipe.tune == "lora":
        merge_low_rank(plain)
    metrics = evaluate_model(plain, data.test, data, recipe.task, run)
    kept = None
    if teacher is not None and hasattr(plain, "forward_images"):
        kept = measure_retention(plain, teacher, recipe.lwf, run)
    after = _backbone_state(plain)
    drift = block_drift(before, after) if before else {}
    count = sum(p.numel() for p in plain.parameters())
    result = Result(metrics, metrics[PRIMARY[recipe.task]], kept, drift, count, last)
    run.save_weights("last", plain, **about, value=result.value)
    return result


def _teacher(recipe: Recipe, run: Run, model: nn.Module) -> nn.Module | None:
    source = recipe.lwf.teacher or (recipe.weights if recipe.lwf.lam > 0 else "")
    if not source:
        return None
    classes = recipe.model.image_classes or None
    depth = 0 if recipe.lwf.backbone else recipe.model.depth
    vit, report = vit_from_weights(recipe.lwf.backbone or recipe.model.backbone, source, classes=classes, depth=depth)
    lacking = [name for name, status in report.status.items() if status == "new"]
    if lacking:
        raise UserError(
            f"{report.source} is no teacher: it lacks {', '.join(lacking)} of this shape, which would be random; give "
            "weights with a head for the network's image classes"
        )
    head, own = getattr(vit, "num_classes", 0), getattr(getattr(model, "vit", None), "num_classes", 0)
    if head != own:
        raise UserError(f"the teacher has {head} classes and the network's image head {own}: they must be the same")
    if _image_shape(vit) != _image_shape(model):
        raise UserError(
            f"the teacher takes images of {_image_shape(vit)[0]} pixels in {_image_shape(vit)[1]} channels and the network "
            f"of {_image_shape(model)[0]} in {_image_shape(model)[1]}: choose another --lwf.backbone"
        )
    if recipe.lwf.images == "folder":
        if _image_shape(model)[1] != 3:
            raise UserError("--lwf.images folder gives colour images and the backbone takes grey ones: use natural2d")
        for training in (True, False):  # what cannot be read is refused before training
            image_stream(recipe.lwf, run, _image_shape(model)[0], training=training)
    return vit.to(run.device).eval().requires_grad_(False)


@torch.inference_mode()
def measure_retention(model: nn.Module, teacher: nn.Module, config: Forgetting, run: Run) -> float:
    """Per cent of the held-out images on which model and teacher agree: 400 crops, or every 20th of a folder's files."""
    side, channels = _image_shape(model)
    batches = image_stream(config, run, side, training=False)
    model.eval()
    agree, count = torch.zeros((), device=run.device), torch.zeros((), device=run.device)
    for images, _ in batches.epoch(0):
        pictures = prepared(images, config, channels)
        agree += retention(model.forward_images(pictures), teach(teacher, pictures)) * len(pictures)  # type: ignore[operator]
        count += len(pictures)
    return float(100 * run.reduce(agree) / run.reduce(count))


def _image_shape(model: nn.Module) -> tuple[int, int]:
    """Side and channels of the images that the backbone takes."""
    embed = getattr(getattr(model, "vit", model), "patch_embed", None)
    if embed is None or not hasattr(embed, "img_size"):
        return 32, 1
    return int(embed.img_size[0]), int(embed.proj.in_channels)


def _backbone_state(model: nn.Module) -> dict[str, Tensor]:
    vit = getattr(model, "vit", None)
    if vit is None:
        return {}
    return {k: v.detach().cpu().clone() for k, v in vit.state_dict().items() if k.startswith("blocks.")}
