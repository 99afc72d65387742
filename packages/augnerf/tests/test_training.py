"""Every method and option runs, and Aug-NeRF learns."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tenfold_augnerf import Losses, export, sharpness, train
from tenfold_augnerf.data import DataConfig, load_data
from tenfold_augnerf.evaluate import (
    EvalConfig,
    OtherData,
    data_of,
    evaluate,
    load_renderer,
    placed,
    render_view,
    scores_of,
)
from tenfold_augnerf.export import ExportConfig, RenderConfig
from tenfold_augnerf.geometry import grid_axes, grid_variation
from tenfold_augnerf.models import ModelConfig
from tenfold_augnerf.reproduce import sweep
from tenfold_augnerf.train import Attack, Optimisation, Recipe, Trainer, budget_of, build, run_recipe
from tenfold_shared.checkpoint import save_weights
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions
from tenfold_shared.scenes import blocks, blocks_views, write_blender, write_llff

TINY = ModelConfig(depth=3, width=16, octaves=4, view_octaves=1, density="softplus")
DATA = DataConfig(name="blocks-tiny", near=2.4, far=5.6, views=2)
SAME = OtherData("blocks-tiny", near=2.4, far=5.6)
KEYS = ["zval_f", "pts_c", "pts_f", "feat_c", "feat_f", "raw_c", "raw_f", "rgb"]


def recipe(method: str = "aug", *, steps: int = 2, rays: int = 24, loss: str = "mse", **attack: object) -> Recipe:
    settings = {"keys": KEYS, "eps": [0.1], **attack}
    optim = Optimisation(steps=steps, batch_rays=rays, lr=5e-3, lr_every=steps, loss=loss)
    return Recipe(method=method, data=DATA, model=TINY, coarse=6, fine=5, attack=Attack(**settings), optim=optim)


def options(folder: Path, name: str = "x", **changes: object) -> RunOptions:
    return RunOptions(output=folder, name=name, device="cpu", quiet=True, **changes)


VARIANTS = {
    "nerf": recipe("nerf"),
    "random": recipe("random"),
    "unadv": recipe("unadv"),
    "awp": recipe("awp"),
    "awp-aug": recipe("awp-aug", cost="reuse"),
    "sam": recipe("sam"),
    "auxiliary": recipe("auxiliary"),
    "plain l_2": recipe(norm=["l_2"], iterations=[2], restarts=2),
    "reuse": recipe(cost="reuse", start="zero"),
    "heads": recipe(cost="heads", levels=["features", "samples"]),
    "free": recipe(replays=3),
    "ratio": recipe(target_ratio=1.3),
    "cameras": recipe(keys=["cam_r", "cam_t"], eps=[1.0, 0.02]),
    "huber": recipe(loss="huber"),
    "trimmed": recipe(loss="trimmed"),
    "additive": recipe(mix="additive", every=2),
    "mip-nerf": dataclasses.replace(recipe(), model=ModelConfig("mip-nerf", 3, 16, 4, 1)),
    "one interval": dataclasses.replace(recipe(), model=ModelConfig("mip-nerf", 3, 16, 4, 1), fine=1),
    "one pass": dataclasses.replace(recipe(keys=["pts_f", "raw_f"]), fine=0),
}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_method_and_option_runs(name: str, tmp_path: Path) -> None:
    chosen = VARIANTS[name]
    with Run("augnerf", chosen, options(tmp_path)) as run:
        trainer = Trainer(run, chosen, load_data(chosen.data))
        before = {n: p.detach().clone() for n, p in trainer.renderer.named_parameters()}
        for step in range(2):
            losses = trainer.step(step)
            assert losses.clean.isfinite()
    moved = {n for n, p in trainer.renderer.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in before if n.startswith("nerf.mlp")} <= moved


def test_both_kinds_of_perturbations_together(tmp_path: Path) -> None:
    """`awp-aug` without radii has the gradients of AWP, and without γ those of Aug-NeRF; with both it has neither."""
    found = {}
    for name, method, changes in (
        ("awp", "awp", {}),
        ("no-radii", "awp-aug", {"eps": [0.0]}),
        ("warmup", "awp-aug", {"warmup": 1.0}),
        ("aug", "aug", {}),
        ("no-gamma", "awp-aug", {"awp_gamma": 0.0}),
        ("both", "awp-aug", {}),
    ):
        chosen = recipe(method, **changes)
        with Run("augnerf", chosen, options(tmp_path, name)) as run:
            trainer = Trainer(run, chosen, load_data(DATA))
            trainer.step(0)
        found[name] = torch.cat([p.grad.flatten() for p in trainer.renderer.parameters() if p.grad is not None])
    for one, other in (("awp", "no-radii"), ("awp", "warmup"), ("aug", "no-gamma")):
        torch.testing.assert_close(found[one], found[other], rtol=1e-3, atol=1e-6)
    for other in ("awp", "aug"):
        assert float((found["both"] - found[other]).norm()) > 1e-3 * float(found[other].norm())


def test_the_budget_names_what_is_perturbed(tmp_path: Path) -> None:
    for method, levels, expected in (
        ("aug", ["features"], ["feat_c", "feat_f"]),
        ("random", ["samples"], ["raw_c", "raw_f", "rgb"]),
        ("aug", [], KEYS),
        ("awp", [], []),
    ):
        chosen = recipe(method, levels=levels, eps=[0.1 * (1 + i) for i in range(len(KEYS))])
        with Run("augnerf", chosen, options(tmp_path, f"{method}{len(levels)}{len(expected)}")) as run:
            lines = budget_of(Trainer(run, chosen, load_data(DATA)))
        assert [line.partition(":")[0] for line in lines] == expected
        if levels == ["features"]:
            assert lines[1] == "feat_f: 0.5 of a feature"


def test_auxiliary_training_of_the_evaluated_networks_is_plain_training(tmp_path: Path) -> None:
    """As released: whatever the radii, the networks that are evaluated never hear of the perturbations."""
    ends = []
    for name, eps in (("a", 0.0), ("b", 0.5)):
        chosen = recipe("auxiliary", eps=[eps])
        with Run("augnerf", chosen, options(tmp_path, name)) as run:
            trainer = Trainer(run, chosen, load_data(DATA))
            for step in range(2):
                trainer.step(step)
        ends.append(trainer.renderer.state_dict())
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]) or key.startswith("nerf_adv."), key
    assert any(not torch.equal(value, ends[1][key]) for key, value in ends[0].items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keys": ["pts"]}, "no perturbation"),
        ({"levels": ["colours"]}, "levels are coordinates"),
        ({"eps": [-1.0]}, "0 or more"),
        ({"cost": "heads"}, "moves samples"),
        ({"levels": ["features"], "keys": ["pts_c"]}, "leaves no key"),
        ({"warmup": 0.9, "ramp": 0.9}, "fractions"),
        ({"cost": "reuse", "start": "zero", "weight": 1.0}, "lambda 1 gives no weight"),
        ({"replays": 2, "method": "random"}, "attack of its own"),
        ({"replays": 2, "method": "awp"}, "attack of its own"),
        ({"replays": 2, "restarts": 2}, "attack of its own"),
        ({"replays": 2, "cost": "reuse"}, "attack of its own"),
        ({"replays": 2, "iterations": [2]}, "attack of its own"),
        ({"cost": "heads", "method": "auxiliary"}, "no features to share"),
        ({"cost": "reuse"}, "start zero"),
        ({"target_ratio": -1.0}, "target_ratio"),
        ({"awp_lr": -1.0}, "awp_lr"),
        ({"weight": float("nan")}, "weight nan"),
        ({"alpha": [float("inf")]}, "0 or more"),
        ({"warmup": float("nan")}, "fractions"),
    ],
)
def test_bad_attacks_are_refused(changes: dict, words: str, tmp_path: Path) -> None:
    def attempt() -> None:
        chosen = recipe(**changes)
        with Run("augnerf", chosen, options(tmp_path)) as run:
            Trainer(run, chosen, load_data(DATA))

    with pytest.raises(UserError, match=words):
        attempt()


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (Optimisation, {"lr_every": 0}, "lr_every"),
        (Optimisation, {"lr_factor": -0.1}, "lr_factor"),
        (Optimisation, {"lr": float("nan")}, "positive numbers"),
        (Optimisation, {"noise_std": -1.0}, "noise_std"),
        (Optimisation, {"validate_every": -1}, "validate_every"),
        (Optimisation, {"precrop_steps": 5}, "batching view"),
        (ModelConfig, {"octaves": -1}, "take 0 to"),
        (ModelConfig, {"view_octaves": 200}, "take 0 to"),
        (ModelConfig, {"kind": "mip-nerf", "octaves": 0}, "take 1 to"),
        (ModelConfig, {"kind": "mip-nerf", "viewdirs": False}, "are for --model.kind nerf"),
    ],
)
def test_values_that_no_training_takes_are_refused(kind: type, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        kind(**changes)


@pytest.mark.parametrize(
    ("verb", "config", "words"),
    [
        (sharpness.sharpness, sharpness.SharpnessConfig(Path("x"), rays=0), "--rays 0"),
        (sharpness.sharpness, sharpness.SharpnessConfig(Path("x"), iterations=0), "--iterations 0"),
        (export.render, RenderConfig(Path("x"), frames=3), "is for --split path"),
        (export.export, ExportConfig(Path("x"), extents=[2.0, 0.01, 2.0]), "less than two points"),
        (export.export, ExportConfig(Path("x"), threshold=-1.0), "threshold and --step take 0 or more"),
    ],
)
def test_verbs_refuse_what_gives_nothing(verb: Callable, config: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        verb(config, options(tmp_path))


def test_half_precision_without_range_is_refused(tmp_path: Path) -> None:
    chosen = recipe("nerf")
    with Run("augnerf", chosen, options(tmp_path)) as run:
        run.options.precision = "fp16"
        with pytest.raises(UserError, match="fp16"):
            Trainer(run, chosen, load_data(DATA))


@pytest.mark.parametrize(
    ("method", "changes"), [("awp", {}), ("aug", {"keys": ["cam_r", "cam_t"]}), ("nerf", {"loss": "trimmed"})]
)
def test_what_needs_all_rays_is_refused_in_several_processes(method: str, changes: dict, tmp_path: Path) -> None:
    chosen = recipe(method, **changes)
    with Run("augnerf", chosen, options(tmp_path)) as run:
        run.world = 2
        with pytest.raises(UserError, match="in one process"):
            Trainer(run, chosen, load_data(DATA))


def test_bfloat16_follows_single_precision(tmp_path: Path) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        chosen = recipe()
        with Run("augnerf", chosen, options(tmp_path, precision, precision=precision)) as run:
            losses.append(Trainer(run, chosen, load_data(DATA)).step(0))
    assert float(losses[1].clean) == pytest.approx(float(losses[0].clean), rel=0.05)


def test_aug_nerf_learns(tmp_path: Path) -> None:
    """A few hundred cheap steps end far above an empty rendering, and every verb works on the run."""
    chosen = dataclasses.replace(
        recipe(steps=150, rays=64, cost="reuse", start="zero", eps=[0.05], warmup=0.3), coarse=10
    )
    chosen = dataclasses.replace(chosen, optim=dataclasses.replace(chosen.optim, lr=1e-2, validate_every=75))
    data = load_data(chosen.data)
    with Run("augnerf", chosen, options(tmp_path)) as run:
        _, result = run_recipe(run, chosen, data)
    white = -10 * torch.log10((1 - data.train.colours.float() / 255).square().mean())
    assert result.train_psnr > float(white) + 3
    assert not result.collapsed
    assert len(result.history) == 2
    assert len(result.budget) == len(KEYS)
    loaded, about = load_renderer(tmp_path / "augnerf" / "x", data)
    assert about["method"] == "aug"
    assert scores_of(loaded, data.test)["psnr"] == pytest.approx(result.test["psnr"], abs=1e-4)

    run_folder, out = tmp_path / "augnerf" / "x", tmp_path / "out"
    export.render(RenderConfig(run_folder, split="path", frames=2), RunOptions(output=out, device="cpu"))
    assert len(list((out / "augnerf" / "render-path").glob("depth_*.npy"))) == 2
    config = ExportConfig(run_folder, points=59, extents=[3.0, 2.0, 1.0], threshold=1.0, step=150)
    export.export(config, RunOptions(output=out, device="cpu"))
    assert {p.name for p in (out / "augnerf" / "export").iterdir()} == {"density.npy", "mesh.obj", "00000150.ckpt"}
    assert np.load(out / "augnerf" / "export" / "density.npy").shape == (39, 59, 19)
    probe = sharpness.SharpnessConfig(out / "augnerf" / "export" / "00000150.ckpt", SAME, rays=32)
    sharpness.sharpness(probe, RunOptions(output=out, device="cpu"))
    assert (out / "augnerf" / "sharpness" / "sharpness.png").is_file()


@pytest.mark.parametrize("extents", [[2.0, 2.0, 2.0], [1.2, 1.6, 1.4]])
def test_a_mesh_is_compared_with_the_surface_inside_its_grid(
    extents: list[float], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scene's own signed distance, cut at any extents, is as near to the truth as its samples are to one another."""
    untrained = build(recipe("nerf"), load_data(DATA)).state_dict()
    save_weights(tmp_path / "x.safetensors", untrained, {"sizes": dataclasses.asdict(TINY), "samples": [6, 5]})

    def exact(field: object, extents: list[float], voxel: float) -> torch.Tensor:
        points = np.stack(np.meshgrid(*grid_axes(extents, voxel), indexing="ij"), -1)
        return torch.from_numpy(-blocks().signed_distance(points.reshape(-1, 3)).reshape(points.shape[:3]))

    monkeypatch.setattr(export, "density_grid", exact)
    config = ExportConfig(tmp_path / "x.safetensors", SAME, extents=extents, points=50, threshold=0.0)
    export.export(config, options(tmp_path, "out"))
    out = capsys.readouterr().out
    assert float(re.search(r"Chamfer distance ([\d.]+)", out)[1]) < 0.02
    density = torch.from_numpy(np.load(tmp_path / "augnerf" / "out" / "density.npy"))
    assert f"total variation {grid_variation(density):.4g}," in out


def test_worst_case_curves_rise_above_random_ones() -> None:
    torch.manual_seed(0)
    data = load_data(DATA)
    from tenfold_augnerf import RaySampling, create_model  # noqa: PLC0415

    model = create_model(TINY, RaySampling(2.4, 5.6, 6, 5), white=True)
    rows = sharpness.curves(model, data.test, rays=48, radii={"features": (0.0, 0.1), "samples": (0.2,)})
    nothing, some = rows["levels"]["features"]
    assert nothing["worst"] == pytest.approx(rows["clean"], rel=1e-5)
    assert some["worst"] > max(some["random"], rows["clean"])


def test_a_collapsed_run_is_noticed(tmp_path: Path) -> None:
    """A field without density: every score says that the scene is empty."""
    chosen = dataclasses.replace(recipe("nerf"), model=dataclasses.replace(TINY, density="relu"))
    data = load_data(DATA)
    with Run("augnerf", chosen, options(tmp_path)) as run:
        trainer = Trainer(run, chosen, data)
    for field in (trainer.renderer.nerf, trainer.renderer.nerf_fine):
        torch.nn.init.constant_(field.mlp.alpha_linear.bias, -100.0)
    assert scores_of(trainer.renderer, data.test, exact=True)["collapsed"]


def test_a_collapse_is_told_of_whenever_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, at the next look: after the first one too, and in a run that was resumed beyond it."""
    step = Trainer.step

    def emptied(self: Trainer, number: int) -> Losses:
        return step(self, number)._replace(acc=torch.tensor(float(number < 3)))

    monkeypatch.setattr(Trainer, "step", emptied)
    monkeypatch.setattr(train, "GUARD_STEPS", 2)
    chosen = recipe("nerf", steps=8)
    with Run("augnerf", chosen, options(tmp_path)) as run:
        run_recipe(run, chosen)
    (told,) = caplog.messages
    assert told.startswith("the scene is empty after 4 steps: start again with another --seed")


def test_checkpoints_are_read_in_the_precision_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_data(DATA)
    compiled: list[object] = []

    def noted(function):
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", noted)
    for precision, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        asked = options(tmp_path, precision=precision, compile=precision == "bf16")
        with Run.evaluation("augnerf", asked) as run:
            renderer = placed(build(recipe("nerf"), data), run)
            assert renderer(data.test.rays(torch.arange(3))).fine.raw.dtype == expected
    assert len(compiled) == 2


def test_entropy_along_rays_does_not_depend_on_chunks(tmp_path: Path) -> None:
    """Rays that meet nothing have none, and count in no chunk."""
    torch.manual_seed(0)
    data = load_data(DATA)
    renderer = build(dataclasses.replace(recipe("nerf"), model=dataclasses.replace(TINY, density="relu")), data)
    for name in ("nerf", "nerf_fine"):  # half of the rays meet something
        highest = renderer(data.test.rays(torch.arange(1024))).fine.raw[..., 3].amax(-1).median().detach()
        getattr(renderer, name).mlp.alpha_linear.bias.data -= highest
        getattr(renderer, name).mlp.alpha_linear.weight.data *= 30
        getattr(renderer, name).mlp.alpha_linear.bias.data *= 30
    acc = render_view(renderer, data.test, 0).acc
    assert 0.05 < float((acc > 1e-3).float().mean()) < 0.95
    found = [render_view(renderer, data.test, 0, chunk).entropy for chunk in (1024, 90)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_partial_checkpoint_is_refused_by_its_keys(tmp_path: Path) -> None:
    chosen, data = recipe("nerf"), load_data(DATA)
    state = build(chosen, data).state_dict()
    del state["nerf.mlp.rgb_linear.bias"]
    about = {"sizes": dataclasses.asdict(TINY), "samples": [6, 5]}
    save_weights(tmp_path / "x.safetensors", state, about)
    with pytest.raises(UserError, match=r"missing nerf\.mlp\.rgb_linear\.bias"):
        load_renderer(tmp_path / "x.safetensors", data)


def test_more_processes_than_views(tmp_path: Path) -> None:
    """Every process adds a table of the same shape to the sum; one without a view adds zeros."""
    torch.manual_seed(0)
    data = load_data(dataclasses.replace(DATA, views=1))
    renderer, train = build(recipe("nerf"), data), data.train
    tables = []

    class Process(Run):
        world, rank, device = 3, 0, torch.device("cpu")

        def __init__(self, rank: int, total: torch.Tensor | None = None) -> None:
            self.rank, self.total = rank, total  # and nothing of a run

        def reduce(self, table: torch.Tensor) -> torch.Tensor:
            tables.append(table)
            return table if self.total is None else self.total

    for rank in range(3):
        scores_of(renderer, train, exact=True, run=Process(rank))
    assert tables[0].shape == tables[1].shape == tables[2].shape
    assert not tables[1].any()
    assert not tables[2].any()
    alone = scores_of(renderer, train, exact=True)
    for rank in range(3):
        assert scores_of(renderer, train, exact=True, run=Process(rank, sum(tables[:3]))) == alone


def test_sweeps_are_judged_on_validation_views(tmp_path: Path) -> None:
    sweep(recipe("nerf", steps=1), options(tmp_path, "grid"), {"optim.lr": [1e-3, 1e-2]}, seeds=1, jobs=1)
    found = json.loads((tmp_path / "augnerf" / "sweep-grid" / "sweep.json").read_text())
    assert found["metric"] == "validation PSNR, dB"
    assert len(found["points"]) == 2


def test_sweeps_of_captures_hold_training_views_out(tmp_path: Path) -> None:
    write_llff(tmp_path / "capture", blocks_views(9, 12, forward=True))  # two test views
    own = DataConfig(name="llff", root=tmp_path, scene="capture", factor=1, white=False)
    swept = dataclasses.replace(recipe("nerf", steps=1), data=own)
    sweep(swept, options(tmp_path, "grid"), {"optim.lr": [1e-3]}, seeds=1, jobs=1)
    (arm,) = (tmp_path / "augnerf" / "sweep-grid" / "arms").rglob("*.json")
    kept = json.loads(arm.read_text())
    assert len(kept["extras"]["validation"]["mse"]) == 1
    assert kept["value"] == kept["extras"]["validation"]["psnr"]


def test_a_run_is_judged_on_the_data_it_was_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder in the Blender layout is what `eval` of a run on it reads, unless told otherwise."""
    monkeypatch.chdir(tmp_path)
    for split, count, offset in (("train", 2, 0.0), ("val", 1, 23.0), ("test", 2, 68.0)):
        write_blender(tmp_path / "sets" / "made", blocks_views(count, 12, offset), split)
    own = DataConfig(name="blender", root=Path("sets"), scene="made", test_skip=1, near=2.4, far=5.6)
    with Run("augnerf", recipe("nerf"), options(tmp_path)) as run:
        _, result = run_recipe(run, dataclasses.replace(recipe("nerf"), data=own))
    folder = tmp_path / "augnerf" / "x"

    def judged(*, checkpoint: Path = folder, **asked: object) -> dict:
        capsys.readouterr()
        evaluate(EvalConfig(checkpoint, **asked), options(tmp_path))
        return json.loads(capsys.readouterr().out)

    found = judged()
    assert found["data"] == "blender made"
    assert found["psnr"] == pytest.approx(result.test["psnr"], abs=1e-5)
    (tmp_path / "sets").rename(tmp_path / "moved")
    moved = judged(data=OtherData(root=tmp_path / "moved"))
    assert moved == found
    asked = OtherData(near=2.0, far=6.0, test_skip=DataConfig.test_skip)  # a default counts where it is given
    assert data_of(folder, asked) == dataclasses.replace(own, near=2.0, far=6.0, test_skip=DataConfig.test_skip)
    other = judged(data=SAME)
    assert other["data"] == "blocks-tiny"
    assert other["psnr"] != found["psnr"]

    export.export(ExportConfig(folder, SAME, points=8, threshold=0.1), options(tmp_path, "out"))
    assert judged(checkpoint=tmp_path / "augnerf" / "out" / "00000000.ckpt", samples=[6, 5])["data"] == "blocks-tiny"


def test_what_a_checkpoint_was_trained_on_is_guessed_only_where_there_is_one(tmp_path: Path, capsys) -> None:
    """A path that was mistyped is answered with one sentence, which `load_renderer` says."""
    path = tmp_path / "x.ckpt"
    for message in ("", f"{path} does not say what it was trained on: blocks-tiny is taken, or name it by --data\n"):
        assert data_of(path, OtherData()) == DataConfig()
        assert capsys.readouterr().err == message
        path.touch()
