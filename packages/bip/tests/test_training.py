"""Every recipe is built and stepped, every method runs, and BiP learns."""

import contextlib
import dataclasses
import itertools
import shutil
import time
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

import tenfold_bip.data
import tenfold_bip.ledger
import tenfold_bip.train
import tenfold_shared.images
from tenfold_bip import (
    create_model,
    get_masks,
    keep_ratio,
    m_step,
    prune_parametrize,
    split_parameters,
    theta_step,
    to_official,
)
from tenfold_bip.data import EVALUATION_BATCH, DataConfig, load_data, load_evaluation
from tenfold_bip.evaluate import load_model
from tenfold_bip.masking import masked_layers
from tenfold_bip.recipe import Bilevel, Phase, Recipe
from tenfold_bip.released import released_bilevel_step, released_optimizer
from tenfold_bip.reproduce import dense_run, measure
from tenfold_bip.train import METHODS, run_recipe
from tenfold_shared.checkpoint import load_weights
from tenfold_shared.claims import Arm, Measurement, load_claims
from tenfold_shared.cli import load_recipe, recipes
from tenfold_shared.errors import RunFailure, UserError
from tenfold_shared.images import ImageSet, split_train_validation
from tenfold_shared.run import Run, RunOptions, derived_seed

SHAPES = {"digits": (1, 8, 8, 10), "cifar10": (3, 32, 32, 10), "cifar100": (3, 32, 32, 100), "folder": (3, 32, 32, 10)}
SHAPES |= {"tiny-imagenet": (3, 64, 64, 200), "imagenet": (3, 64, 64, 1000)}


def short(method: str, **changes: object) -> Recipe:
    """Every phase in an epoch or two."""
    phase = Phase(epochs=1)
    common = {"dense": Phase(epochs=2), "sparse": phase, "hydra": phase, "bilevel": Bilevel(epochs=1), "keep": 0.5}
    return Recipe(method=method, rewind_epoch=1, **{**common, **changes})


def options(folder: Path, **changes: object) -> RunOptions:
    return RunOptions(output=folder, name="x", device="cpu", quiet=True, **changes)


@pytest.mark.parametrize("name", list(recipes("tenfold_bip")))
def test_every_recipe_is_built_and_stepped(name: str) -> None:
    """The recipe's network at its real size takes one iteration of the recipe's trainer, with its options, on generated
    images of its data's shape.
    """
    recipe = load_recipe("tenfold_bip", name, Recipe)
    settings = recipe.bilevel
    channels, height, width, classes = SHAPES[recipe.data.name]
    model = prune_parametrize(
        create_model(recipe.arch, classes),
        recipe.keep,
        recipe.structure,
        min_keep=recipe.min_keep,
        scores_init=settings.scores_init,
        tie_scores=settings.tie_scores,
    )
    batch = torch.randn(2, channels, height, width), torch.tensor([0, classes - 1])
    layer = masked_layers(model)[0]
    before = layer.theta.detach().clone()
    assert (layer.theta.data_ptr() == layer.masking.scores.data_ptr()) is settings.tie_scores
    assert (settings.trainer == "released") is name.endswith("-released")
    if settings.trainer == "released":
        lower, upper = (
            released_optimizer(model, rate, settings.momentum, settings.weight_decay)
            for rate in (settings.alpha, settings.beta)
        )
        loss, outputs = released_bilevel_step(model, batch, batch, lower, upper, lr2=settings.lr2)
    else:
        weights, scores = split_parameters(model)
        lower, upper = (
            torch.optim.SGD(parameters, rate, settings.momentum, weight_decay=settings.weight_decay)
            for parameters, rate in ((weights, settings.alpha), (scores, settings.beta))
        )
        for _ in range(settings.lower_steps):
            theta_step(model, batch, lower)
        loss, outputs = m_step(model, batch, upper, gamma=settings.gamma, ig=settings.ig, lr2=settings.lr2)
    assert torch.isfinite(loss)
    assert outputs.shape == (2, classes)
    assert not torch.equal(layer.theta, before)
    assert torch.equal(layer.theta, layer.masking.scores) is settings.tie_scores


@pytest.mark.parametrize("method", [method for method in METHODS if method != "finetune"])
def test_every_method_ends_at_its_keep_ratio(method: str, tmp_path: Path) -> None:
    with Run("bip", short(method), options(tmp_path)) as run:
        model, result = run_recipe(run, short(method))
    assert result.keep == pytest.approx(1.0 if method == "dense" else 0.5, abs=1e-3)
    per_phase = {"dense": 0, "bip": 2, "imp": 4}.get(method, 1)  # IMP comes to a half in four rounds: .8 .64 .512 .5
    scoring = {"snip": 1, "grasp": 2, "synflow": 100}.get(method, 0)
    assert result.passes == per_phase * (1000 // 64) + scoring
    assert result.history[-1]["passes"] == result.passes
    samples = 64 * per_phase * (1000 // 64) + scoring * (1 if method == "synflow" else 64)
    assert result.training_flops == 3 * samples * result.costs["flops_dense"]
    assert result.layers_emptied == []
    loaded, about = load_model(tmp_path / "bip" / "x")
    assert about["accuracy"] == result.accuracy
    images = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(loaded.eval()(images), model.eval()(images))


def test_imp_takes_over_the_rounds_of_a_run_that_cuts_less(tmp_path: Path) -> None:
    """In a reproduction the rounds two keep ratios have in common are trained once, and nothing else changes."""
    claim = load_claims("tenfold_bip").select(["mini-keep-5"], None)[0]
    alike = {"method": "imp", "dense.epochs": 1, "sparse.epochs": 1, "rewind_epoch": 1}

    def imp(keep: float, folder: Path) -> Measurement:
        arm = Arm("imp", recipe="digits-cnn", options={**alike, "keep": keep})
        return measure(claim, arm, 0, options=RunOptions(device="cpu", quiet=True, resume=True), folder=folder)

    alone = imp(0.4, tmp_path / "alone")
    first, second = imp(0.5, tmp_path / "both"), imp(0.4, tmp_path / "both")
    steps = {
        len((tmp_path / "both" / "runs" / m.extras["run"] / "metrics.jsonl").read_text().splitlines())
        for m in (first, second)
    }
    assert steps == {4 * (1000 // 64), 2 * (1000 // 64)}  # .8 .64 .512 .5, then only .4096 .4
    assert first.seconds is not None
    assert second.seconds is not None
    rounds = [phase["seconds"] for phase in first.extras["history"]]
    assert [phase["seconds"] for phase in second.extras["history"]][:3] == rounds[:3]
    assert second.seconds > sum(rounds[:3])
    for key in ("accuracy", "passes", "keep"):
        assert second.extras[key] == alone.extras[key]
    weights = [
        load_model(tmp_path / where / "runs" / m.extras["run"])[0].state_dict()
        for where, m in (("both", second), ("alone", alone))
    ]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


def test_arms_start_from_the_dense_network_of_their_own_recipe(tmp_path: Path) -> None:
    """What dense training reads tells one dense network from another; what only pruning reads does not."""
    recipe = short("omp", dense=Phase(epochs=2))
    others = {
        "dense.lr": dataclasses.replace(recipe, dense=Phase(epochs=2, lr=0.02)),
        "batch_size": dataclasses.replace(recipe, batch_size=50),
        "data.upper": dataclasses.replace(recipe, data=DataConfig(upper="heldout")),
        "data.validation": dataclasses.replace(recipe, data=DataConfig(validation=0.5)),
        "rewind_epoch": dataclasses.replace(recipe, rewind_epoch=0),
    }
    alike = dataclasses.replace(recipe, method="bip", keep=0.1, bilevel=Bilevel(alpha=0.2), sparse=Phase(epochs=7))
    how = RunOptions(device="cpu", quiet=True, resume=True)
    first = dense_run(recipe, 0, how, tmp_path)
    assert dense_run(alike, 0, how, tmp_path) == first
    folders = {name: dense_run(other, 0, how, tmp_path) for name, other in others.items()}
    assert len({first, *folders.values()}) == 1 + len(others)
    weights = {name: load_model(folder)[0].state_dict()["0.weight"] for name, folder in folders.items()}
    assert not torch.equal(weights["dense.lr"], load_model(first)[0].state_dict()["0.weight"])


@pytest.mark.parametrize(
    "changes", [{"structure": "filter"}, {"structure": "channel"}, {"structure": "2:4"}, {"min_keep": 9}]
)
@pytest.mark.parametrize("method", ["bip", "omp"])
def test_structures(method: str, changes: dict, tmp_path: Path) -> None:
    recipe = short(method, **changes)
    with Run("bip", recipe, options(tmp_path)) as run:
        _, result = run_recipe(run, recipe)
    assert 0.3 < result.keep < 0.8
    assert all(kept > 0 for kept, _ in result.costs["kept_per_layer"].values())


@pytest.mark.parametrize(
    "settings", [{"trainer": "released", "tie_scores": True, "ig": "released"}, {"ig": "none", "lower_steps": 2}]
)
def test_variants_of_the_bilevel_loop(settings: dict, tmp_path: Path) -> None:
    recipe = short("bip", bilevel=Bilevel(epochs=1, **settings))
    with Run("bip", recipe, options(tmp_path)) as run:
        _, result = run_recipe(run, recipe)
    assert result.passes == 3 * (1000 // 64)


def test_a_pruned_network_is_fine_tuned_under_its_masks(tmp_path: Path) -> None:
    """Its own masks, whatever ratio the recipe has; those of an authors' file are at that ratio."""
    torch.manual_seed(0)
    released = prune_parametrize(create_model("digits_cnn"), 0.3)
    torch.save(to_official(released, arch="digits_cnn"), tmp_path / "released.pth.tar")
    recipe = short("omp", keep=0.3)
    with Run("bip", recipe, options(tmp_path)) as run:
        pruned, _ = run_recipe(run, recipe)
    for path, before in ((tmp_path / "bip" / "x", pruned), (tmp_path / "released.pth.tar", released)):
        keep = 0.5 if path.is_dir() else 0.3
        recipe = short("finetune", keep=keep, pretrained=path, finetune=Phase(epochs=2))
        with Run("bip", recipe, dataclasses.replace(options(tmp_path), name=f"tuned-{path.name}")) as run:
            model, result = run_recipe(run, recipe)
        masks = get_masks(before)
        assert all(torch.equal(mask, masks[name]) for name, mask in get_masks(model).items())
        assert not torch.equal(masked_layers(model)[0].theta, masked_layers(before)[0].theta)
        assert result.passes == 2 * (1000 // 64)
        assert [entry["phase"] for entry in result.history] == ["finetune"]
    assert Recipe().finetune.lr == Recipe().sparse.lr  # 0.1, as every other phase's


@pytest.mark.parametrize("settings", [{}, {"trainer": "released", "ig": "released"}])
def test_a_held_out_upper_level_shortens_no_epoch(settings: dict, tmp_path: Path) -> None:
    recipe = short("bip", bilevel=Bilevel(epochs=1, **settings), data=DataConfig(upper="heldout"))
    with Run("bip", recipe, options(tmp_path)) as run:
        _, result = run_recipe(run, recipe)
    assert result.passes == (3 if settings else 2) * (900 // 64)


def test_hydra_trains_in_bf16_and_the_released_trainer_says_at_once_that_it_does_not(tmp_path: Path) -> None:
    """Hydra leaves the weights as they were trained, in any precision, and fine-tuning trains them again."""
    how = options(tmp_path, precision="bf16")
    recipe = short("hydra", hydra=Phase(epochs=2), finetune=Phase(epochs=2))
    with Run("bip", recipe, how) as run:
        run_recipe(run, recipe)
    folder = tmp_path / "bip" / "x" / "checkpoints"
    dense, pruned, tuned = (load_weights(folder / f"{name}.safetensors")[0] for name in ("dense", "prune", "finetune"))
    original = "3.parametrizations.weight.original"
    assert torch.equal(dense["3.weight"], pruned[original])
    assert not torch.equal(pruned["3.parametrizations.weight.0.scores"], pruned[original])
    assert not torch.equal(tuned[original], pruned[original])
    released = short("bip", bilevel=Bilevel(trainer="released", ig="released"))
    with (
        pytest.raises(UserError, match="trainer released runs in one"),
        Run("bip", released, dataclasses.replace(how, name="y")) as run,
    ):
        run_recipe(run, released)
    assert not (tmp_path / "bip" / "y").exists()


def test_statistics_are_gathered_under_the_final_mask(tmp_path: Path) -> None:
    """The weights stay; a resumed run ends with the same statistics. Scores may decay otherwise than weights."""
    recipe = short("bip", bilevel=Bilevel(epochs=2, score_decay=0.1), recalibrate=4)
    for resume in (False, True):
        with Run("bip", recipe, options(tmp_path, resume=resume)) as run:
            model, result = run_recipe(run, recipe)
        folder = tmp_path / "bip" / "x" / "checkpoints"
        before, after = (load_weights(folder / f"{name}.safetensors")[0] for name in ("prune", "recalibrate"))
        assert torch.equal(before["3.parametrizations.weight.original"], after["3.parametrizations.weight.original"])
        assert not torch.equal(before["4.running_mean"], after["4.running_mean"])
        assert torch.equal(model.state_dict()["4.running_mean"], after["4.running_mean"])
        assert [entry["phase"] for entry in result.history] == ["dense", "prune", "recalibrate"]
    plain = short("bip", bilevel=Bilevel(epochs=2))
    with Run("bip", plain, dataclasses.replace(options(tmp_path), name="y")) as run:
        run_recipe(run, plain)
    scores = "3.parametrizations.weight.0.scores"
    other = load_weights(tmp_path / "bip" / "y" / "checkpoints" / "prune.safetensors")[0]
    assert before[scores].norm() < 0.99 * other[scores].norm()


def test_the_best_epoch_is_of_the_phase_that_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathering statistics has no epochs of its own."""
    falling = itertools.count(90, -1)
    monkeypatch.setattr(tenfold_bip.train, "accuracy", lambda *_: torch.tensor(float(next(falling))))
    recipe = short("bip", recalibrate=1)  # two epochs and the end of dense training; one epoch, its end; statistics
    with Run("bip", recipe, options(tmp_path)) as run:
        _, result = run_recipe(run, recipe)
    assert (result.accuracy, result.best_accuracy) == (85.0, 87.0)


def test_an_interrupted_phase_keeps_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand seconds pass in the first life of a run, which ends in the middle of a phase."""
    step, count, late = tenfold_bip.train.m_step, itertools.count(1), 0.0

    def interrupted(*arguments: object, **settings: object) -> object:
        nonlocal late
        if (number := next(count)) == 2:
            late = 1000.0
        if number == 4:
            raise KeyboardInterrupt
        return step(*arguments, **settings)

    clock = types.SimpleNamespace(perf_counter=lambda: time.perf_counter() + late)
    monkeypatch.setattr(tenfold_bip.ledger, "time", clock)
    monkeypatch.setattr(tenfold_bip.train, "m_step", interrupted)
    for resume in (False, True):
        late = 0.0
        with (
            contextlib.nullcontext() if resume else pytest.raises(KeyboardInterrupt),
            Run("bip", short("bip"), options(tmp_path, resume=resume, checkpoint_every=1)) as run,
        ):
            _, result = run_recipe(run, short("bip"))
    dense, prune = (phase["seconds"] for phase in result.history)
    assert dense < 1000 < prune < 2000


def test_random_scores_are_drawn_alike_after_a_resume(tmp_path: Path) -> None:
    """A run that was killed right after its dense training draws the scores of one that was not."""
    recipe = short("bip", bilevel=Bilevel(epochs=2, scores_init="random"))
    with Run("bip", recipe, options(tmp_path / "whole")) as run:
        run_recipe(run, recipe)
    whole, killed = (tmp_path / name / "bip" / "x" for name in ("whole", "killed"))
    (killed / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "checkpoints/dense.safetensors", "checkpoints/rewind.safetensors"):
        shutil.copy(whole / name, killed / name)
    with Run("bip", recipe, options(tmp_path / "killed", resume=True)) as run:
        run_recipe(run, recipe)
    weights = [load_model(folder)[0].state_dict() for folder in (whole, killed)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_only_the_epoch_that_was_kept_is_rewound_to(tmp_path: Path) -> None:
    dense = dense_run(short("omp"), 0, RunOptions(device="cpu", quiet=True), tmp_path)
    recipe = short("omp", pretrained=dense)
    for epoch in (1, 2):
        given = dataclasses.replace(recipe, rewind_epoch=epoch)
        with (
            contextlib.nullcontext() if epoch == 1 else pytest.raises(UserError, match="kept the weights of epoch 1"),
            Run("bip", given, dataclasses.replace(options(tmp_path), name=f"rewind{epoch}")) as run,
        ):
            run_recipe(run, given)


@pytest.mark.parametrize("upper", ["train", "heldout"])
def test_levels_see_different_batches(upper: str, tmp_path: Path) -> None:
    """The two levels never see the same batch; a held-out upper level shares no image with the lower one."""
    with Run("bip", Recipe(), options(tmp_path)) as run:
        data = load_data(DataConfig(upper=upper), 50, run)
    lower = torch.cat([images.flatten(1) for images, _ in data.lower.epoch(0)])
    first = next(iter(data.upper.epoch(0)))[0].flatten(1)
    assert not torch.equal(lower[:50], first)
    if upper == "heldout":
        stored = [{tuple(image.flatten().tolist()) for image in part.images} for part in (data.lower, data.upper)]
        assert len(data.lower.images) == 900
        assert len(stored[0] & stored[1]) <= 2  # a few digits are drawn twice in the data itself


def test_masks_are_scored_on_the_same_whole_batches_in_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two processes trains on its half of a batch, and scores on all of it: masks made apart must agree."""
    with Run("bip", Recipe(), options(tmp_path)) as run:
        alone = load_data(DataConfig(), 50, run)
        monkeypatch.setattr(run, "rank", 1)
        monkeypatch.setattr(run, "world", 2)
        second = load_data(DataConfig(), 50, run)
    (images, labels), (own, _) = (next(iter(data.lower.epoch(0))) for data in (alone, second))
    assert (len(images), len(own)) == (50, 25)
    assert torch.equal(own, images[25:])
    scored = next(iter(second.scoring.epoch(0)))
    assert torch.equal(scored[0], images)
    assert torch.equal(scored[1], labels)


def test_validation_replaces_the_test_images(tmp_path: Path) -> None:
    with Run("bip", Recipe(), options(tmp_path)) as run:
        data = load_data(DataConfig(validation=0.2), 50, run)
    assert (data.lower.samples, data.evaluation.samples) == (800, 200)


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """Five images of each of two classes to train with, one to test with, in ImageNet's layout; each of its own grey."""
    for split, count in (("train", 5), ("val", 1)):
        for label, wnid in enumerate(("n01440764", "n01443537")):
            folder = tmp_path / "set" / split / wnid
            folder.mkdir(parents=True)
            for i in range(count):
                grey = 100 * label + 10 * i + (5 if split == "val" else 0)
                Image.new("RGB", (240, 230), (grey, grey, grey)).save(folder / f"{i}.png")
    return tmp_path / "set"


@pytest.mark.parametrize("upper", ["train", "heldout"])
@pytest.mark.parametrize("validation", [0.0, 0.2])
def test_streamed_images_are_held_out_as_those_in_memory_are(
    validation: float, upper: str, imagenet: Path, tmp_path: Path
) -> None:
    """The greys that each part of ImageNet shows: with a validation part nothing is judged on the evaluation images."""
    config = DataConfig("imagenet", root=imagenet, validation=validation, upper=upper, workers=0)
    with Run("bip", Recipe(), options(tmp_path)) as run:
        data = load_data(config, 1, run)
        alone = load_evaluation(config, 2, run)

    def greys(batches: object) -> list[int]:
        return sorted(round(255 * (0.485 + 0.229 * float(image[0].mean()))) for x, _ in batches.epoch(0) for image in x)

    judged, lower, seen = greys(data.evaluation), greys(data.lower), greys(data.upper)
    assert greys(alone.evaluation) == judged
    assert (data.classes, alone.classes) == (2, 2)
    training = [100 * label + 10 * i for label in (0, 1) for i in range(5)]
    assert judged == [5, 105] if validation == 0 else len(judged) == 2 and set(judged) < set(training)
    rest = [grey for grey in training if grey not in judged]
    if upper == "train":
        assert lower == seen == rest
    else:
        assert len(seen) == 1
        assert sorted(lower + seen) == rest
    grey = ImageSet(torch.tensor(training, dtype=torch.uint8).view(-1, 1, 1, 1), torch.arange(10) // 5, ("a", "b"))
    if validation:
        held_out = split_train_validation(grey, validation, derived_seed(0, "validation"))[1]
        assert sorted(held_out.images.flatten().tolist()) == judged


def test_evaluation_reads_its_own_split_in_batches_of_the_size_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(
        tenfold_bip.data, "load_images", lambda *a, **k: read.append(a[2]) or tenfold_shared.images.load_images(*a, **k)
    )
    with Run("bip", Recipe(), options(tmp_path)) as run:
        found = load_evaluation(DataConfig(), 100, run)
        assert read == ["test"]
        assert [len(labels) for _, labels in found.evaluation.epoch(0)] == [100] * 7 + [97]
        for config in (DataConfig(), DataConfig(validation=0.2)):
            pairs = zip(
                load_evaluation(config, EVALUATION_BATCH, run).evaluation.epoch(0),
                load_data(config, 64, run).evaluation.epoch(0),
                strict=True,
            )
            assert all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


def test_bip_learns(tmp_path: Path) -> None:
    """Keeping a fifth of the weights on digits, far above the ten per cent of chance."""
    recipe = Recipe(keep=0.2, dense=Phase(epochs=6), bilevel=Bilevel(epochs=6, alpha=0.1, beta=0.03))
    with Run("bip", recipe, options(tmp_path)) as run:
        model, result = run_recipe(run, recipe)
    assert result.accuracy > 85.0
    assert keep_ratio(model) == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (lambda: Recipe(keep=0.0), "keep"),
        (lambda: Recipe(keep=1.5), "keep"),
        (lambda: Recipe(arch="resnet99"), "resnet99"),
        (lambda: Recipe(keep=0.0001), "empty"),
        (lambda: Recipe(structure="filter", keep=0.001, pretrained=None, dense=Phase(epochs=2)), ""),
        (lambda: Recipe(rewind_epoch=40), "rewind_epoch"),
        (lambda: Recipe(method="synflow", structure="filter"), "synflow"),
        (lambda: Recipe(batch_size=0), "batch_size"),
        (lambda: Recipe(arch="resnet20s"), "3 channels and digits has 1"),
    ],
)
def test_bad_recipes_are_refused_in_a_sentence(recipe, words: str, tmp_path: Path) -> None:
    def attempt() -> None:
        given = dataclasses.replace(recipe(), dense=Phase(epochs=2))
        with Run("bip", given, options(tmp_path)) as run:
            run_recipe(run, given)

    if not words:
        attempt()  # the smallest keep ratio still leaves one filter in every layer
        return
    with pytest.raises(UserError, match=words):
        attempt()


def test_a_loss_that_turns_nan_is_named(tmp_path: Path) -> None:
    recipe = short("dense", dense=Phase(epochs=2, lr=1e30))
    with pytest.raises(RunFailure, match="loss became"), Run("bip", recipe, options(tmp_path)) as run:
        run_recipe(run, recipe)


@pytest.mark.parametrize("broken", ["one class", "unreadable"])
def test_bad_image_folders_are_refused(broken: str, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in ("a",) if broken == "one class" else ("a", "b"):
            (tmp_path / "set" / split / label).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / "set" / split / label / "0.png")
    if broken == "unreadable":
        (tmp_path / "set" / "train" / "b" / "1.png").write_bytes(b"no image")
    config = DataConfig(name="folder", root=tmp_path / "set")
    with (
        pytest.raises(UserError, match="class" if broken == "one class" else r"1\.png"),
        Run("bip", Recipe(), options(tmp_path)) as run,
    ):
        load_data(config, 2, run)


def test_an_image_folder_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coloured images of two classes, through the same recipe as CIFAR-10."""
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(64) % 2
    images[labels == 1] //= 4
    monkeypatch.setattr(tenfold_bip.data, "load_images", lambda *a, **k: ImageSet(images, labels, ("light", "dark")))
    recipe = short("omp", arch="resnet20s", batch_size=32, data=DataConfig(name="folder", root=tmp_path))
    with Run("bip", recipe, options(tmp_path)) as run:
        model, result = run_recipe(run, recipe)
    assert result.keep == pytest.approx(0.5, abs=1e-3)
    assert torch.isfinite(cross_entropy(model(images[:4].float()), labels[:4]))
