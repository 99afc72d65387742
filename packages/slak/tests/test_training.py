"""Every recipe is built and stepped, training is exact and learns, and the long-range digits are what they say."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from slak_folders import backbone_with_zeros, generate_ade, generate_coco, generate_voc, photograph

import tenfold_slak.data
import tenfold_slak.export
from tenfold_shared.cli import load_recipe, recipes
from tenfold_shared.errors import RunFailure, UserError
from tenfold_shared.images import ImageSet
from tenfold_shared.run import Run, RunOptions
from tenfold_shared.testing import shapes_alone
from tenfold_slak.compat import to_official
from tenfold_slak.data import DataConfig, embedded_sets, load_data
from tenfold_slak.detect import (
    Coco,
    Detection,
    detector,
    predictions,
    train_detector,
)
from tenfold_slak.evaluate import EvalConfig, EvalData, data_of, erf, evaluate, export, load_model, profile
from tenfold_slak.layer import Branch
from tenfold_slak.models import create_network
from tenfold_slak.models.slak import SLaK, create
from tenfold_slak.segment import Segmentation, segmenter, train_segmenter
from tenfold_slak.train import Mixing, Optimisation, Recipe, Sparsity, mixing, run_recipe

ALL = {name: load_recipe("tenfold_slak", name, Recipe) for name in recipes("tenfold_slak")}
BY_TASK = {
    task: [name for name, recipe in ALL.items() if recipe.task == task] for task in ("classify", "segment", "detect")
}
NARROW = {"dims": [4, 4, 8, 8], "depths": [1, 1, 1, 1]}


def options(folder: Path, **changes: Any) -> RunOptions:
    return RunOptions(output=folder, **{"name": "x", "device": "cpu", "quiet": True, **changes})


def short(**changes: Any) -> Recipe:
    """A few steps of a small network on digits."""
    arguments = {
        "depths": [1, 1],
        "dims": [8, 8],
        "width_factor": 1.3,
        "kernel_sizes": [15, 7],
        "layer_scale_init": 0.1,
    }
    fields: dict[str, Any] = {
        "arguments": arguments,
        "drop_path": 0.1,
        "data": DataConfig(name="digits"),
        "optim": Optimisation(steps=8, batch_size=32, accumulate=2, warmup_epochs=0, warmup_steps=2, ema=0.9),
        "sparse": Sparsity(update_frequency=3),
    }
    return Recipe(**{**fields, **changes})


def classify(recipe: Recipe, folder: Path, **changes: Any) -> tuple[Any, Any]:
    with Run("slak", recipe, options(folder, **changes)) as run:
        return run_recipe(run, recipe)


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", sorted({(recipe.arch, json.dumps(recipe.arguments)) for recipe in ALL.values()}))
def test_every_network_is_built_at_its_size(arch: tuple[str, str]) -> None:
    """Without storage: the recipes' arguments are those of the architecture, and the kernels fit."""
    name, arguments = arch[0], json.loads(arch[1])
    with shapes_alone():
        model = create_network(name, num_classes=10, drop_path_rate=0.1, **arguments)
    assert sum(parameter.numel() for parameter in model.parameters()) > 1000


@pytest.mark.parametrize("name", BY_TASK["classify"])
def test_every_classifier_recipe_is_stepped(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe as it is but narrow, on generated images of its data's kind, two steps and an evaluation."""
    recipe = ALL[name]
    _generate(monkeypatch, tmp_path)
    optim = dataclasses.replace(
        recipe.optim, steps=2, batch_size=4, accumulate=min(2, recipe.optim.accumulate), warmup_epochs=0, warmup_steps=1
    )
    arguments = dict(recipe.arguments)
    if recipe.data.name not in {"row-cue", "digits"} and not recipe.arch.startswith("convnext"):
        arguments |= NARROW
    if recipe.arch.startswith("convnext"):  # timm's, in its smallest form
        recipe = dataclasses.replace(recipe, arch="convnext_atto")
    size = min(recipe.data.size, 32 if recipe.data.name == "imagenet" else 64)
    data = dataclasses.replace(
        recipe.data, size=size, workers=0, root=tmp_path if recipe.data.name == "imagenet" else None
    )
    start = backbone_with_zeros(tmp_path / "start.pth", **NARROW) if recipe.sparse.init == "resume" else None
    recipe = dataclasses.replace(recipe, optim=optim, arguments=arguments, data=data, pretrained=start)
    _, result = classify(recipe, tmp_path)
    assert 0 <= result.accuracy <= 100
    assert (result.costs["macs_nonzero"] < 0.95 * result.costs["macs"]) == (recipe.sparse.sparsity > 0)
    assert (result.accuracy_ema is None) == (recipe.optim.ema == 0)


def _generate(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """CIFAR in memory and an ImageNet of two classes in a folder; small row cues."""

    def images(name: str, *_: Any, **__: Any) -> ImageSet:
        classes = tuple(str(i) for i in range(100 if name == "cifar100" else 10))
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return ImageSet(pixels, torch.arange(12) % 10, classes)

    real = tenfold_slak.data.load_images
    chosen = lambda name, *a, **k: real(name, *a, **k) if name == "digits" else images(name)  # noqa: E731
    monkeypatch.setattr(tenfold_slak.data, "load_images", chosen)
    whole = embedded_sets
    monkeypatch.setattr(tenfold_slak.data, "embedded_sets", lambda *a: tuple(_first(part) for part in whole(*a)))
    for split in ("train", "val"):
        for label in ("n01", "n02"):
            target = folder / "imagenet" / split / label
            target.mkdir(parents=True)
            for number in range(5):
                photograph(48, number).save(target / f"{number}.JPEG")


def _first(part: ImageSet) -> ImageSet:
    return part.subset(torch.arange(0, len(part), max(1, len(part) // 24)))


@pytest.mark.parametrize("name", BY_TASK["segment"])
def test_every_segmenter_recipe_is_stepped(name: str, tmp_path: Path) -> None:
    recipe = ALL[name]
    generate_ade(tmp_path)
    settings = dataclasses.replace(
        recipe.segmentation,
        root=tmp_path,
        iterations=2,
        batch_size=2,
        crop=64,
        stride=43,
        channels=8,
        workers=0,
        warmup=1,
    )
    recipe = dataclasses.replace(recipe, pretrained=None, segmentation=settings, arguments=NARROW)
    with Run("slak", recipe, options(tmp_path)) as run:
        outcome = train_segmenter(run, recipe)
    assert 0 <= outcome["miou"] < 20


@pytest.mark.parametrize("name", BY_TASK["detect"])
def test_every_detector_recipe_is_stepped(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = ALL[name]
    if recipe.detection.data == "coco":
        generate_coco(tmp_path)
        monkeypatch.setattr("tenfold_slak.detect.coco_precision", lambda found, data: {"box_ap": 100.0 * len(found)})
    else:
        generate_voc(tmp_path)
    settings = dataclasses.replace(
        recipe.detection,
        root=tmp_path,
        epochs=1,
        batch_size=2,
        scales=[64],
        samples=8,
        proposals=8,
        channels=16,
        workers=0,
    )
    recipe = dataclasses.replace(recipe, pretrained=None, detection=settings, arguments=NARROW)
    with Run("slak", recipe, options(tmp_path / "out")) as run:
        outcome = train_detector(run, recipe)
    assert outcome.get("box_ap", 200.0) == 200.0
    assert 0 <= outcome.get("map50", 0.0) <= 100


def test_a_convnext_run_becomes_the_backbone_of_the_downstream_recipes(tmp_path: Path) -> None:
    """`imagenet-convnext-tiny-120` trains timm's network; `coco-convnext-tiny-12` starts from it, ADE20K's can."""
    data, arguments = DataConfig(name="digits"), {**NARROW, "ls_init_value": 0.5}
    optim = Optimisation(steps=2, batch_size=8, accumulate=1, warmup_epochs=0, ema=0.5)
    recipe = dataclasses.replace(ALL["imagenet-convnext-tiny-120"], arguments=arguments, data=data, optim=optim)
    classify(recipe, tmp_path)
    run, x = tmp_path / "slak" / "x", torch.randn(1, 1, 64, 96)
    coco, ade = ALL["coco-convnext-tiny-12"], ALL["ade20k-convnext-tiny"]
    arguments = {**NARROW, "in_chans": 1}
    coco = dataclasses.replace(coco, arguments=arguments, detection=dataclasses.replace(coco.detection, channels=8))
    ade = dataclasses.replace(ade, arguments=arguments, segmentation=dataclasses.replace(ade.segmentation, channels=8))
    for path in (run, run / "checkpoints" / "last.safetensors", run / "checkpoints" / "ema.safetensors"):
        trained, about = load_model(path)
        assert about["arch"] == "convnext_tiny"
        expected = trained.eval().forward_features(x)
        segmenting = segmenter(dataclasses.replace(ade, pretrained=path)).backbone
        detecting = detector(dataclasses.replace(coco, pretrained=path), 3).backbone.body
        for backbone in (segmenting.eval(), detecting.eval()):  # their last norm is new
            torch.testing.assert_close(backbone(x)["3"], backbone.norm3(expected), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="keys do not fit"):
        segmenter(dataclasses.replace(ade, pretrained=run, arguments={**arguments, "depths": [1, 1, 2, 1]}))
    classify(dataclasses.replace(recipe, arch="resnet10t", arguments={}), tmp_path / "other")
    with pytest.raises(UserError, match="neither a SLaK nor a ConvNeXt"):
        segmenter(dataclasses.replace(ade, pretrained=tmp_path / "other" / "slak" / "x"))


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("growth", ["random", "gradient"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sparsity_survives_accumulation_precision_and_average(growth: str, precision: str, tmp_path: Path) -> None:
    recipe = short(sparse=Sparsity(update_frequency=2, growth=growth))
    model, result = classify(recipe, tmp_path, precision=precision)
    average, _ = load_model(tmp_path / "slak" / "x", "ema")
    density = result.costs["density"]
    stored = dict(model.named_parameters())
    kept = sum(density[name] * stored[name].numel() for name in density) / sum(stored[n].numel() for n in density)
    assert 0.5 < kept < 0.7
    for name, weight in average.named_parameters():
        if name in density:
            assert torch.count_nonzero(weight) <= torch.count_nonzero(stored[name])


@pytest.mark.parametrize("changes", [{}, {"mixing": Mixing(mixup=0.0, cutmix=0.0)}])
def test_interrupted_in_the_middle_and_resumed(changes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks, average, mixing and schedule go on bit for bit."""
    recipe = short(**changes)
    whole, _ = classify(recipe, tmp_path / "whole")

    class Stop(Exception):
        pass

    steps = Run.steps

    def broken(self: Run, phase: str, total: int, **tracked: Any) -> Any:
        for step in steps(self, phase, total, **tracked):
            if step == 5:
                raise Stop
            yield step

    monkeypatch.setattr(Run, "steps", broken)
    with pytest.raises(Stop):
        classify(recipe, tmp_path / "cut", checkpoint_every=2)
    monkeypatch.setattr(Run, "steps", steps)
    resumed, _ = classify(recipe, tmp_path / "cut", checkpoint_every=2, resume=True)
    for (name, one), two in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    first, second = (load_model(tmp_path / folder / "slak" / "x", "ema")[0] for folder in ("whole", "cut"))
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


def test_it_learns(tmp_path: Path) -> None:
    """Digits, far above the ten per cent of chance, with 40 % of the weights at zero."""
    recipe = dataclasses.replace(ALL["digits-slak"], mixing=Mixing(mixup=0.0, cutmix=0.0))
    recipe = dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, steps=120, warmup_steps=10))
    _, result = classify(recipe, tmp_path)
    assert result.accuracy > 60
    assert result.costs["parameters_nonzero"] < 0.65 * result.costs["parameters"]


def test_finetuning_keeps_zeros_and_takes_a_new_head(tmp_path: Path) -> None:
    trained, _ = classify(short(), tmp_path)
    sparse = Sparsity(init="resume", update_frequency=0)
    optim = Optimisation(steps=3, batch_size=32, accumulate=1, warmup_epochs=0, layer_decay=0.7, ema=0.0)
    recipe = short(pretrained=tmp_path / "slak" / "x", sparse=sparse, optim=optim)
    tuned, _ = classify(recipe, tmp_path / "tuned")
    weights = dict(tuned.named_parameters())
    for name, before in trained.named_parameters():
        if before.ndim == 4 and (before == 0).float().mean() > 0.02:
            assert torch.equal(before == 0, weights[name] == 0), name


def test_a_checkpoint_is_drawn_exported_and_evaluated_merged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    classify(short(), tmp_path)
    run = tmp_path / "slak" / "x"
    erf(run, tmp_path / "erf.png", "row-cue", images=4)
    assert (tmp_path / "erf.png").stat().st_size > 1000
    export(run, tmp_path / "net.pt2", 32)
    program = torch.export.load(tmp_path / "net.pt2").module()
    x = torch.rand(3, 1, 32, 32)
    torch.testing.assert_close(program(x), load_model(run)[0].eval()(x), rtol=1e-4, atol=1e-4)
    assert float(capsys.readouterr().out.split("by ")[1].split()[0]) < 1e-4
    with pytest.raises(UserError, match="ending"):
        export(run, tmp_path / "net.txt", 32)
    with pytest.raises(UserError, match="at least 8 x 8"):
        export(run, tmp_path / "net.pt2", 4)
    profile(checkpoint=run, size=32, batch_size=1, repeats=1)
    capsys.readouterr()
    answers = []
    for merge in (False, True):
        evaluate(EvalConfig(run, merge=merge), options(tmp_path))  # on digits, as it was trained
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["top1"] == pytest.approx(answers[1]["top1"], abs=1)  # a near tie may fall to the other side
    assert answers[0]["data"] == "digits"
    with pytest.raises(UserError, match="channels"):
        evaluate(EvalConfig(run, EvalData(name="pictures", size=64)), options(tmp_path))
    with pytest.raises(UserError, match="one set of weights"):
        load_model(run / "checkpoints" / "last.safetensors", "ema")
    trained = {"data": {"name": "cifar10", "root": None, "size": 32}}
    assert data_of(trained, EvalData()) == DataConfig(name="cifar10", size=32)
    assert data_of(trained, EvalData(name="cifar10", size=224)).size == 224
    assert data_of(trained, EvalData(name="imagenet")) == DataConfig(name="imagenet")
    with pytest.raises(UserError, match=r"--data\.name"):
        data_of({}, EvalData())


def test_a_wrong_merge_is_seen_in_what_was_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not hidden by eval mode, which folds as merging does. ONNX files are run where onnxruntime is installed."""
    reference = pytest.importorskip("onnx.reference", reason="onnx is not installed")
    classify(short(), tmp_path)

    def differences() -> list[float]:
        capsys.readouterr()
        for name in ("net.pt2", "net.onnx"):
            export(tmp_path / "slak" / "x", tmp_path / name, 32)
        return [float(line.rsplit("by ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]

    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # sizes are tensors while a graph is traced
    assert max(differences()) < 1e-5
    run = SimpleNamespace(InferenceSession=lambda path, providers: reference.ReferenceEvaluator(path))
    monkeypatch.setitem(sys.modules, "onnxruntime", run)
    monkeypatch.setattr(tenfold_slak.export, "onnx_runs", lambda: True)
    assert max(differences()) < 1e-5
    monkeypatch.setattr(Branch, "folded", lambda self: (self.conv.weight, torch.zeros(self.conv.out_channels)))
    assert min(differences()) > 1e-4


def test_batches_are_mixed_as_asked() -> None:
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    assert mixing(Mixing(mixup=0.0, cutmix=0.0), 5)(images, labels)[1] is labels
    _, targets = mixing(Mixing(), 5)(images.clone(), labels)
    assert targets.shape == (4, 5)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    with pytest.raises(UserError, match="even"):
        mixing(Mixing(), 5)(images[:3], labels[:3])


def test_a_loss_that_turns_nan_is_named(tmp_path: Path) -> None:
    optim = Optimisation(steps=6, batch_size=32, accumulate=1, lr=1e30, warmup_epochs=0, ema=0.0)
    with pytest.raises(RunFailure, match="loss became"):
        classify(short(optim=optim), tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: Recipe(sparse=Sparsity(sparsity=1.0)), "sparsity"),
        (lambda: Recipe(sparse=Sparsity(sparsity=-0.1)), "sparsity"),
        (lambda: Recipe(drop_path=1.0), "drop_path"),
        (lambda: Recipe(optim=Optimisation(batch_size=0)), "batch_size"),
        (lambda: Recipe(optim=Optimisation(lr=0.0)), "lr"),
        (lambda: short(arguments={"kernel_sizes": [51, 48, 47, 13]}), "odd"),
        (lambda: short(arguments={"kernel_sizes": [3, 3, 3, 3]}), "cannot be decomposed"),
        (lambda: short(arguments={"depth": 3}), "depth"),
        (lambda: short(arguments={"width_factor": -1.0}), "widths"),
        (lambda: short(arguments={"drop_path_rate": 0.2}), "--drop_path"),
        (lambda: Recipe(optim=Optimisation(warmup_epochs=-1)), "warmup_epochs"),
        (lambda: Recipe(optim=Optimisation(layer_decay=-0.5)), "layer_decay"),
        (lambda: Recipe(mixing=Mixing(smoothing=1.5)), "smoothing"),
        (lambda: Recipe(sparse=Sparsity(until=2.0)), "until"),
        (lambda: Recipe(segmentation=Segmentation(lr=1.0)), "segmentation.lr is not read"),
        (lambda: Recipe(task="segment", optim=Optimisation(lr=1.0)), "optim.lr is not read"),
        (lambda: Recipe(task="detect", sparse=Sparsity(growth="gradient")), "sparse.growth is not read"),
        (lambda: Recipe(task="segment", segmentation=Segmentation(stride=0)), "stride"),
        (lambda: Recipe(task="segment", segmentation=Segmentation(crop=64)), "stride is 341 .* leave pixels out"),
        (lambda: Recipe(task="detect", detection=Detection(scales=[])), "scales"),
        (lambda: short(arch="vit_tiny_patch16_224", arguments={}), "vit_tiny_patch16_224"),
        (lambda: short(arch="slak_huge"), "slak_huge"),
        (lambda: short(arguments={"stem_stride": 16}), "at least 128 x 128"),
        (lambda: short(sparse=Sparsity(init="resume")), "no zeros to keep"),
        (lambda: short(sparse=Sparsity(sparsity=0.001, init="uniform")), "99 % dense"),
        (lambda: short(pretrained=Path("slak_tiny_300.pth")), "drive.google.com"),
        (lambda: short(optim=Optimisation(steps=0, epochs=1, batch_size=900, accumulate=8)), "accumulate"),
    ],
)
def test_bad_recipes_are_refused_in_a_sentence(
    change: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENFOLD_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=words):
        classify(change(), tmp_path)


# -- data --------------------------------------------------------------------------------------------------------------


def test_augmentation_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RandAugment, erasing and crops depend on the seed, the epoch and the image alone."""
    _generate(monkeypatch, tmp_path)
    config = DataConfig(name="imagenet", root=tmp_path, size=48, workers=0)
    with Run("slak", Recipe(), options(tmp_path)) as run:
        data = load_data(config, 4, run)
        first, again, other = (next(iter(data.train.epoch(epoch)))[0] for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_evaluation_takes_its_batches_from_the_validation_images_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of as many images as are asked for; ImageNet's training images need not be there."""
    _generate(monkeypatch, tmp_path)
    torch.save(to_official(create("slak_tiny", **NARROW, num_classes=2)), tmp_path / "net.pth")
    shutil.rmtree(tmp_path / "imagenet" / "train")
    sizes, real = [], SLaK.forward
    monkeypatch.setattr(SLaK, "forward", lambda self, x: sizes.append(len(x)) or real(self, x))
    data = EvalData(name="imagenet", root=tmp_path, size=48, workers=0)
    answers = []
    for batch_size in (256, 3):
        evaluate(EvalConfig(tmp_path / "net.pth", data, batch_size=batch_size), options(tmp_path))
        answers.append(json.loads(capsys.readouterr().out))
    assert sizes == [1, 10, 1, 3, 3, 3, 1]  # one image to count the multiply-adds
    assert answers[0]["top1"] == answers[1]["top1"]
    erf(tmp_path / "net.pth", tmp_path / "erf.png", "imagenet", tmp_path, size=64, images=3)
    assert json.loads(capsys.readouterr().out.splitlines()[0])["images"] == 3


@pytest.mark.parametrize("heads", ["cascade", "mask", "box"])
def test_boxes_are_placed_in_single_precision(heads: str, tmp_path: Path) -> None:
    """Bfloat16 knows a place near 1000 pixels to 4 only. Masks are kept as run lengths, which take no room."""
    generate_coco(tmp_path)
    recipe = ALL["coco-slak-tiny-12"]
    settings = dataclasses.replace(recipe.detection, heads=heads, scales=[64], channels=8, samples=8, proposals=8)
    model = detector(dataclasses.replace(recipe, pretrained=None, detection=settings, arguments=NARROW), 3)
    model.roi_heads.score_thresh = 0.0
    with Run("slak", recipe, options(tmp_path / "out", precision="bf16")) as run:
        (_, found), _ = predictions(run.prepare(model), Coco(tmp_path, "val2017", training=False), run)
    boxes = found["boxes"][(found["boxes"] > 1) & (found["boxes"] < 71)]
    assert (boxes != boxes.bfloat16()).any()
    assert all(set(mask) == {"size", "counts"} for mask in found.get("masks", []))
    assert ("masks" in found) == (heads != "box")
