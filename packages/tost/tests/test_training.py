"""Every recipe is built and stepped, every mask and technique runs, and a sparse network learns."""

import contextlib
import json
from pathlib import Path

import pytest
import torch

import tenfold_tost.data
from tenfold_shared.checkpoint import load_weights
from tenfold_shared.cli import load_recipe, recipes
from tenfold_shared.errors import RunFailure, UserError
from tenfold_shared.images import ImageSet
from tenfold_shared.run import Run, RunOptions
from tenfold_tost import (
    Ghosts,
    Lrsi,
    MaskKeeper,
    apply_masks,
    create_model,
    erk_masks,
    has_ghosts,
    masks_from_zeros,
    to_official,
)
from tenfold_tost.data import DataConfig, load_data
from tenfold_tost.evaluate import EvalConfig, evaluate, load_model, mean_zero_rates, zero_rates
from tenfold_tost.ghosts import Skips, Soft
from tenfold_tost.maskmaking import MaskConfig
from tenfold_tost.recipe import Recipe
from tenfold_tost.tools import AnalyseConfig, analyse, export, finalize, make_mask
from tenfold_tost.train import make_optimiser, run_recipe, train

SHAPES = {"digits": (1, 8, 8, 10), "cifar10": (3, 32, 32, 10), "cifar100": (3, 32, 32, 100), "folder": (3, 32, 32, 10)}
SHAPES |= {"tiny-imagenet": (3, 64, 64, 200)}


def short(**changes: object) -> Recipe:
    """A few steps of everything."""
    common = {"epochs": 2, "lr": 0.05, "milestones": [1], "batch_size": 250, "lrsi": Lrsi(iters=1)}
    return Recipe(**{**common, "mask": MaskConfig(density=0.2), **changes})


def options(folder: Path, **changes: object) -> RunOptions:
    return RunOptions(output=folder, name="x", device="cpu", quiet=True, **changes)


def run(recipe: Recipe, folder: Path):
    with Run("tost", recipe, options(folder)) as running:
        return run_recipe(running, recipe)


@pytest.mark.parametrize("name", list(recipes("tenfold_tost")))
def test_every_recipe_is_built_and_stepped(name: str) -> None:
    """The recipe's network at its real size takes one masked step on generated images of its data's shape."""
    recipe = load_recipe("tenfold_tost", name, Recipe)
    channels, height, width, classes = SHAPES[recipe.data.name]
    model, plan = create_model(recipe.arch, classes), recipe.plan()
    masks = erk_masks(model, recipe.mask.density)
    apply_masks(model, masks)
    x = torch.randn(2, channels, height, width)
    ghosts = Ghosts(model, plan, x)
    keeper, optimiser = MaskKeeper(model, masks), make_optimiser(model, recipe, plan)
    loss = plan.loss(model(x), torch.tensor([0, classes - 1]), 0.0)
    loss.backward()
    keeper.mask_gradients()
    optimiser.step()
    assert torch.isfinite(loss)
    assert not any(bool((alive & ~masks[name]).any()) for name, alive in masks_from_zeros(model).items())
    if plan.fades:
        ghosts.advance(plan.ghost_fraction)
        ghosts.finalize(masks)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dense"},
        {"method": "random", "scope": "layer"},
        {"method": "magnitude"},
        {"method": "snip", "batches": 2},
        {"method": "grasp"},
        {"method": "taylor"},
        {"method": "synflow"},
        {"method": "erk", "linear": True},
        {"method": "lth", "percent": 0.6},
        {"method": "lth-layerwise", "percent": 0.6, "rewind": "late", "rewind_epoch": 1},
        {"method": "omp", "rewind": "none"},
        {"method": "omp", "rewind": "random"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_every_mask_trains(settings: dict, tmp_path: Path) -> None:
    recipe = short(techniques="soft+ls", epochs=1, milestones=[], mask=MaskConfig(density=0.3, **settings))
    model, result = run(recipe, tmp_path)
    expected = 1.0 if settings["method"] == "dense" else 0.3
    assert result.density == pytest.approx(expected, abs=0.01)
    loaded, about = load_model(tmp_path / "tost" / "x")
    assert about["accuracy"] == result.accuracy
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    trainings = {"lth": 3, "lth-layerwise": 3, "omp": 2}.get(
        settings["method"], 1
    )  # dense, a round of 60 %, the ticket
    assert result.steps == trainings * 4


def test_steps_of_warm_up_leave_the_ticket_alone(tmp_path: Path) -> None:
    """They are a control of the last training: the mask stays that of the other arms."""
    mask = MaskConfig(method="omp", density=0.3)
    found = []
    for warm in (0, 3):
        recipe = short(techniques="vanilla", epochs=1, milestones=[], mask=mask, warmup_steps=warm)
        model, result = run(recipe, tmp_path / str(warm))
        assert result.steps == 2 * 4 + warm
        assert len(result.losses) == 1
        found.append(masks_from_zeros(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_ticket_that_is_drawn_anew_keeps_its_mask(tmp_path: Path) -> None:
    """The control trains other weights under the very mask that was found, however many rounds found it."""
    masks, starts = [], []
    for rewind in ("init", "random"):
        mask = MaskConfig(method="lth", density=0.2, percent=0.5, rewind=rewind)
        recipe = short(techniques="vanilla", epochs=1, milestones=[], batch_size=500, mask=mask)
        model, _ = run(recipe, tmp_path / rewind)
        masks.append(masks_from_zeros(model))
        starts.append(load_weights(tmp_path / rewind / "tost" / "x" / "checkpoints" / "start.safetensors")[0])
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert not torch.equal(starts[0]["model/3.weight"], starts[1]["model/3.weight"])


def test_tickets_of_other_activations_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Soft neurons while the mask is looked for, and another mask; the ticket is trained with ReLU all the same."""
    folders = []
    for activation in ("relu", "mish", "pswish"):
        mask = MaskConfig(method="lth", density=0.3, percent=0.5, rewind="none", activation=activation)
        recipe = short(techniques="vanilla", epochs=1, milestones=[], batch_size=500, mask=mask)
        model, _ = run(recipe, tmp_path / activation)
        assert sum(isinstance(module, torch.nn.ReLU) for module in model.modules()) == 6
        folders.append(str(tmp_path / activation / "tost" / "x"))
    analyse(*folders, config=AnalyseConfig(batch=20), options=options(tmp_path))
    distances = [json.loads(line)["hamming_distance"] for line in capsys.readouterr().out.splitlines()[3:]]
    assert len(distances) == 3
    assert min(distances) > 0.0


def test_the_whole_recipe_ends_in_the_plain_network(tmp_path: Path) -> None:
    recipe = short(techniques="tost", recalibrate=2, warmup_steps=2, decay_norm=False, data=DataConfig(dev=200))
    model, result = run(recipe, tmp_path)
    assert not has_ghosts(model)
    assert list(model.state_dict()) == list(create_model("digits_net").state_dict())
    assert result.parameters["deployed"] == 35_354 < result.parameters["training"]
    kept, total = result.counts["nonzero_conv"]
    assert kept == pytest.approx(0.2 * total, abs=5)
    assert len(result.losses) == 2
    assert result.scales["iterations"] == 1
    assert result.best_dev_accuracy is not None
    assert result.counts["flops_sparse"] < result.counts["flops_dense"]


def test_momentum_outlives_the_ghosts(tmp_path: Path) -> None:
    """The network's parameters go on with their momentum when the skips' are gone."""
    recipe = short(techniques="skip")
    run(recipe, tmp_path)
    state, _ = load_weights(tmp_path / "tost" / "x" / "checkpoints" / "train-ghosts.safetensors")
    momentum = {key for key in state if key.startswith("momentum/")}
    assert momentum == {f"momentum/{name}" for name, _ in create_model("digits_net").named_parameters()}
    assert all(bool(state[key].abs().sum() > 0) for key in momentum)


@pytest.mark.parametrize(
    "changes",
    [
        {"techniques": "soft+skip", "soft": Soft(kind="mish", constant=True), "skip": Skips(constant=True)},
        {"techniques": "soft", "soft": Soft(beta0=2.0, constant=True)},
        {"techniques": "skip", "skip": Skips(kind="identity", constant=True)},
    ],
    ids=["mish and skips", "slope 2", "skips without parameters"],
)
def test_ghosts_that_stay_are_kept_in_the_checkpoint(changes: dict, tmp_path: Path) -> None:
    """Their kind and slope too, which no key tells."""
    model, _ = run(short(epochs=1, milestones=[], **changes), tmp_path)
    loaded, _ = load_model(tmp_path / "tost" / "x")
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    with pytest.raises(UserError, match="keeps its ghosts"):
        finalize(tmp_path / "tost" / "x", tmp_path / "plain.safetensors")


def test_what_the_verbs_write_is_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the authors' layout to ours and to the compact file; each evaluates to the same."""
    model = create_model("digits_net")
    apply_masks(model, erk_masks(model, 0.1))
    torch.save(to_official(model), tmp_path / "model.pth.tar")
    finalize(tmp_path / "model.pth.tar", tmp_path / "plain.safetensors")
    export(tmp_path / "plain.safetensors", tmp_path / "compact.safetensors", batch=2, rounds=1)
    capsys.readouterr()
    lines = []
    for name in ("model.pth.tar", "plain.safetensors", "compact.safetensors"):
        evaluate(EvalConfig(tmp_path / name), options(tmp_path))
        lines.append(json.loads(capsys.readouterr().out))
    assert lines[0] == lines[1] == lines[2]
    assert lines[0]["arch"] == "digits_net"


def test_a_released_network_keeps_its_activation(tmp_path: Path) -> None:
    """No key tells it, so it is said."""
    model, x = create_model("oresnet20", activation="swish").eval(), torch.randn(2, 3, 16, 16)
    torch.save(to_official(model), tmp_path / "model.pth.tar")
    loaded, about = load_model(tmp_path / "model.pth.tar", "oresnet20", "swish")
    assert about["arch"] == "oresnet20"
    assert torch.equal(loaded.eval()(x), model(x))
    torch.save(to_official(create_model("resnet20s")), tmp_path / "zoo.pth.tar")
    with pytest.raises(UserError, match="no other activation than ReLU"):
        load_model(tmp_path / "zoo.pth.tar", "resnet20s", "swish")


def test_zeros_are_counted_on_every_evaluation_image(tmp_path: Path) -> None:
    """In batches as in one."""
    model = create_model("digits_net")
    with Run("tost", short(), options(tmp_path)) as running:
        data = load_data(DataConfig(), 64, running, evaluation_batch=300)
        images = torch.cat([images for images, _ in data.evaluation.epoch(0)])
        assert mean_zero_rates(model, data.evaluation, running) == pytest.approx(zero_rates(model, images))


def test_a_run_keeps_its_result_and_the_gradient_of_every_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its norm is that of the masked gradient that the epoch's last step took."""
    norms, step = [], torch.optim.SGD.step

    def noting(optimiser: torch.optim.SGD, *arguments: object) -> None:
        norms.append(torch.cat([p.grad.flatten() for g in optimiser.param_groups for p in g["params"]]).norm().item())
        step(optimiser, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", noting)
    train(short(techniques="vanilla"), options(tmp_path, seed=3))
    folder = tmp_path / "tost" / "x"
    result = json.loads((folder / "result.json").read_text())
    assert (result["techniques"], result["mask"], result["seed"]) == ("vanilla", "erk", 3)
    assert result["counts"]["flops_sparse"] < result["counts"]["flops_dense"]
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    logged = [line["gradient_norm"] for line in lines if "gradient_norm" in line]
    assert logged == pytest.approx([norms[3], norms[7]], rel=1e-5)
    assert load_model(folder)[1]["accuracy"] == result["accuracy"]


def test_evaluation_takes_as_many_images_at_a_time_as_it_is_told(tmp_path: Path) -> None:
    with Run("tost", short(), options(tmp_path)) as running:
        data = load_data(DataConfig(), 64, running, evaluation_batch=100)
        assert len(next(iter(data.evaluation.epoch(0)))[0]) == 100
        assert len(load_data(DataConfig(), 64, running).evaluation) == 1


def test_batch_norms_of_the_skips_are_decayed_as_the_others_are() -> None:
    recipe, model = short(techniques="skip", decay_norm=False), create_model("digits_net")
    ghosts = Ghosts(model, recipe.plan(), torch.zeros(1, 1, 8, 8))
    groups = make_optimiser(model, recipe, recipe.plan()).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert sum(id(p) in decayed for p in ghosts.parameters()) == 6  # the convolutions of the six skips
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_half_precision(tmp_path: Path) -> None:
    """The forward and backward pass in bfloat16; the mask holds all the same."""
    recipe = short(techniques="soft+skip+ls", epochs=1, milestones=[])
    with Run("tost", recipe, options(tmp_path, precision="bf16")) as running:
        model, result = run_recipe(running, recipe)
    assert result.density == pytest.approx(0.2, abs=1e-3)
    assert next(model.parameters()).dtype == torch.float32


def test_arms_of_a_seed_share_mask_and_start(tmp_path: Path) -> None:
    masks, batches = [], []
    for techniques in ("vanilla", "tost"):
        recipe = short(techniques=techniques, mask=MaskConfig(method="snip", density=0.2))
        model, _ = run(recipe, tmp_path / techniques)
        masks.append(masks_from_zeros(model))
        with Run("tost", recipe, options(tmp_path / f"{techniques}2")) as running:
            batches.append(next(iter(load_data(recipe.data, 50, running).train.epoch(0)))[0])
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert torch.equal(batches[0], batches[1])


def test_a_sparse_network_learns(tmp_path: Path) -> None:
    """Keeping a fifth of the weights on digits, far above the ten per cent of chance."""
    recipe = short(techniques="soft+skip+ls", epochs=6, milestones=[4], batch_size=50, evaluate_every=6)
    _, result = run(recipe, tmp_path)
    assert result.accuracy > 75.0
    assert result.losses[-1] < result.losses[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"techniques": "sfot"}, "sfot"),
        ({"ghost_fraction": 1.2}, "longer than training"),
        ({"epochs": 0}, "epochs"),
        ({"arch": "resnet99"}, "resnet99"),
        ({"arch": "resnet20s"}, "3 channels and digits has 1"),
        ({"mask": lambda: MaskConfig(density=0.0)}, "density"),
        ({"mask": lambda: MaskConfig(method="file")}, "mask.file"),
        ({"mask": lambda: MaskConfig(method="random", density=0.001)}, "no weight in"),
        ({"mask": lambda: MaskConfig(method="lth", percent=1.0)}, "mask.percent"),
        ({"mask": lambda: MaskConfig(method="lth", scope="layer")}, "lth-layerwise"),
        ({"skip": lambda: Skips(lr_factor=-1.0)}, "lr_factor"),
        ({"mask": lambda: MaskConfig(method="lth", rewind="late", rewind_epoch=9)}, "rewind_epoch"),
        ({"mask": lambda: MaskConfig(method="snip", rewind="late")}, "for tickets"),
        ({"mask": lambda: MaskConfig(method="snip", activation="mish")}, "for tickets"),
        ({"mask": lambda: MaskConfig(method="lth", weights=Path("w.pt"))}, "mask.weights"),
        ({"data": lambda: DataConfig(judge="dev")}, "data.dev"),
        ({"data": lambda: DataConfig(dev=2000)}, "2000"),
        ({"data": lambda: DataConfig(dev=3, dev_split="first")}, "lack a class"),
        ({"warmup_steps": -1}, "warmup_steps takes 0 or more"),
        ({"lr": -0.1}, "lr takes 0 or more"),
        ({"milestones": [3, -1]}, "milestones takes epochs from 0 on"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_recipes_are_refused_in_a_sentence(changes: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        run(short(**{key: value() if callable(value) else value for key, value in changes.items()}), tmp_path)


def test_a_mask_of_another_network_is_refused(tmp_path: Path) -> None:
    from tenfold_tost import save_masks  # noqa: PLC0415

    save_masks(tmp_path / "mask.safetensors", erk_masks(create_model("oresnet20"), 0.1))
    recipe = short(mask=MaskConfig(method="file", file=tmp_path / "mask.safetensors"))
    with pytest.raises(UserError, match=r"does not fit DigitsNet: conv1\.weight"):
        run(recipe, tmp_path)


def test_an_imported_ticket_brings_its_weights(tmp_path: Path) -> None:
    """Rewound late, to weights that no seed gives; without their option they are missed aloud."""
    mask, changes = tmp_path / "mask.safetensors", {"techniques": "vanilla", "epochs": 1, "milestones": []}
    late = MaskConfig(method="omp", density=0.3, rewind="late", rewind_epoch=1)
    make_mask(short(**changes, mask=late), options(tmp_path / "m"), mask)
    found, start = [], "tost/x/checkpoints/start.safetensors"
    for name, weights in (("with", mask), ("without", None)):
        recipe = short(**changes, mask=MaskConfig(method="file", file=mask, weights=weights))
        with contextlib.nullcontext() if weights else pytest.warns(UserWarning, match="holds weights beside the mask"):
            run(recipe, tmp_path / name)
        found.append(load_weights(tmp_path / name / start)[0])
    state, _ = load_weights(mask)
    for name in ("0.weight", "3.weight", "20.bias"):
        expected = state[name] * state.get(f"{name}_mask", 1)
        assert torch.equal(found[0][f"model/{name}"], expected)
        assert not torch.equal(found[1][f"model/{name}"], expected)
    torch.save(create_model("oresnet20").state_dict(), tmp_path / "other.pt")
    other = MaskConfig(method="file", file=mask, weights=tmp_path / "other.pt")
    with pytest.raises(UserError, match="does not fit digits_net"):
        run(short(**changes, mask=other), tmp_path / "other")


def test_a_loss_that_turns_nan_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFailure, match="loss became"):
        run(short(techniques="vanilla", lr=1e30), tmp_path)


def test_an_image_folder_trains_without_inner_normalisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coloured images of two classes, pixels in [0, 1] for a network that normalises inside."""
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(64) % 2
    images[labels == 1] //= 4
    monkeypatch.setattr(tenfold_tost.data, "load_images", lambda *a, **k: ImageSet(images, labels, ("light", "dark")))
    data = DataConfig(name="folder", root=tmp_path)
    recipe = short(arch="resnet20s", techniques="ls", epochs=1, milestones=[], batch_size=32, data=data)
    with Run("tost", recipe, options(tmp_path / "raw")) as running:
        batch, _ = next(iter(load_data(data, 32, running, raw=True).train.epoch(0)))
    assert 0.0 <= float(batch.min()) <= float(batch.max()) <= 1.0
    _, result = run(recipe, tmp_path)
    assert result.density == pytest.approx(0.2, abs=1e-3)


def test_the_verbs_around_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mask written and trained with; the network finalised, exported, analysed."""
    mask = tmp_path / "mask.safetensors"
    make_mask(short(mask=MaskConfig(method="snip", density=0.1)), options(tmp_path / "m"), mask)
    assert "10.00 % of the weights remain" in capsys.readouterr().out
    recipe = short(techniques="ls", mask=MaskConfig(method="file", file=mask))
    model, _ = run(recipe, tmp_path)
    folder = tmp_path / "tost" / "x"
    finalize(folder, tmp_path / "plain.pth.tar", official=True)
    loaded, _ = load_model(tmp_path / "plain.pth.tar")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    capsys.readouterr()
    export(folder, tmp_path / "compact.safetensors", batch=2, rounds=1)
    saved = json.loads(capsys.readouterr().out)
    assert saved["bytes_compact"] < saved["bytes_checkpoint"]
    assert saved["largest_difference"] < 1e-3
    analyse(str(folder), str(tmp_path / "plain.pth.tar"), config=AnalyseConfig(batch=50), options=options(tmp_path))
    first, second, distance = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["zero_rates"].keys() == second["zero_rates"].keys()
    assert distance["hamming_distance"] == 0.0
    with pytest.raises(UserError, match="makes no mask"):
        make_mask(short(mask=MaskConfig(method="dense")), options(tmp_path / "n"), mask)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arch": "resnet99"}, "resnet99"),
        ({"mask": MaskConfig(method="omp", density=0.0005)}, "no weight in"),
    ],
    ids=["architecture", "empty layer"],
)
def test_masks_that_cannot_be_made_are_refused_in_a_sentence(changes: dict, words: str, tmp_path: Path) -> None:
    recipe = short(epochs=1, milestones=[], **changes)
    with pytest.raises(UserError, match=words):
        make_mask(recipe, options(tmp_path), tmp_path / "mask.safetensors")


def test_files_are_named_as_they_are_read(tmp_path: Path) -> None:
    """By its name a file is read again; counts below one are refused too."""
    with pytest.raises(UserError, match=r"--file .*mask\.pt: .*\.safetensors"):
        make_mask(short(), options(tmp_path), tmp_path / "mask.pt")
    with pytest.raises(UserError, match=r"--output .*plain\.pth"):
        finalize(tmp_path / "x", tmp_path / "plain.pth")
    with pytest.raises(UserError, match=r"--output .*pth\.tar"):
        finalize(tmp_path / "x", tmp_path / "plain.safetensors", official=True)
    with pytest.raises(UserError, match="rounds take 1"):
        export(tmp_path / "x", tmp_path / "c.safetensors", rounds=0)
