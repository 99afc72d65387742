"""Runs: phases, exact resume, failure and interruption, the tracker."""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from tenfold_shared.checkpoint import load_state
from tenfold_shared.claims import Arm, Claim, Measurement, Metric, Outcome
from tenfold_shared.errors import Interrupted, RunFailure, UserError
from tenfold_shared.provenance import environment
from tenfold_shared.reproduction import Request, compare_points, reproduce_claims
from tenfold_shared.run import Run, RunOptions, derived_seed, peak_memory

sys.path.insert(0, str(Path(__file__).parent / "toy"))

from tenfold_toy.processes import batch_norm_of_half, far_from_zero, killed_in_the_baseline
from tenfold_toy.train import figures


@dataclasses.dataclass
class Recipe:
    """A recipe."""

    width: int = 3


def options(folder: Path, **changes: object) -> RunOptions:
    settings = {"name": "x", "device": "cpu", "quiet": True, "checkpoint_every": 1, **changes}
    return RunOptions(output=folder, **settings)


def fit(run: Run, steps: int, stop_at: int = -1, bad_at: int = -1) -> nn.Module:
    """A noisy descent with dropout, so that random numbers matter."""
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimiser = torch.optim.Adam(model.parameters(), 0.1)
    model, optimiser = run.prepare(model, optimiser)
    for step in run.steps("train", steps, model=model, optimiser=optimiser):
        loss = model(torch.randn(4, 3)).square().mean() * (float("inf") if step == bad_at else 1.0)
        optimiser.zero_grad()
        run.backward(loss)
        optimiser.step()
        run.log(loss=loss)
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
    run.complete("train", model, note="done")
    return model


def test_a_stopped_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    with Run("demo", Recipe(), options(tmp_path / "a")) as run:
        whole = fit(run, 12).state_dict()
    with pytest.raises(Interrupted), Run("demo", Recipe(), options(tmp_path / "b")) as run:
        fit(run, 12, stop_at=4)
    spent = load_state(tmp_path / "b/demo/x/checkpoints/state.pt")["seconds"]
    with Run("demo", Recipe(), options(tmp_path / "b", resume=True)) as run:
        assert run.usage()["seconds"] >= spent > 0
        resumed = fit(run, 12).state_dict()
        assert len(run.logged("train", "loss")) == 12
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no way here to forget a process's peak")
def test_the_peak_memory_is_that_of_the_run(tmp_path: Path) -> None:
    held = torch.ones(50_000_000)
    before = peak_memory()
    del held
    with Run("demo", Recipe(), options(tmp_path)) as run:
        assert run.usage()["peak_memory_bytes"] < before - 100e6


def test_a_closed_phase_is_not_done_again(tmp_path: Path) -> None:
    with Run("demo", Recipe(), options(tmp_path)) as run:
        model = fit(run, 3)
    with Run("demo", Recipe(), options(tmp_path, resume=True)) as run:
        again = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        assert list(run.steps("train", 3, model=again)) == []
        assert run.complete("train", again) == {"note": "done"}
    assert torch.equal(again[0].weight, model[0].weight)


def test_a_closed_phase_keeps_its_log(tmp_path: Path) -> None:
    """A run that ends after a phase was closed, before another checkpoint, loses no line of that phase on resume."""
    with Run("toy", Recipe(), options(tmp_path, checkpoint_every=2)) as run:
        fit(run, 5)
    with Run("toy", Recipe(), options(tmp_path, checkpoint_every=2, resume=True)) as run:
        assert len(run.logged("train", "loss")) == 5


def test_an_ended_phase_is_not_done_again_though_nothing_closed_it(tmp_path: Path) -> None:
    """Whatever --checkpoint-every says, and whatever is logged or closed under another name after it."""
    model = nn.Linear(2, 2)
    with Run("toy", Recipe(), options(tmp_path, checkpoint_every=0)) as run:
        for step in run.steps("train", 3, model=model):
            nn.init.constant_(model.weight, float(step))
            run.log(loss=float(step))
        run.log(test=1.0)
        run.complete("best", model)
    with Run("toy", Recipe(), options(tmp_path, checkpoint_every=0, resume=True)) as run:
        assert list(run.steps("train", 3, model=nn.Linear(2, 2))) == []
        assert run.logged("train", "loss") == [0, 1, 2]
        assert run.logged("train", "test") == [1.0]


def test_a_phase_closed_in_this_life_was_not_closed_in_an_earlier_one(tmp_path: Path) -> None:
    """With ``resume`` too: a process that comes to `complete` after another one has written must not leave the others."""
    with Run("toy", Recipe(), options(tmp_path, resume=True)) as run:
        fit(run, 2)
        assert not run.completed("train")
    with Run("toy", Recipe(), options(tmp_path, resume=True)) as run:
        assert run.completed("train")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    with (
        pytest.raises(RunFailure, match="loss became inf at step 5 of phase train"),
        Run("demo", Recipe(), options(tmp_path)) as run,
    ):
        fit(run, 12, bad_at=5)
    state = torch.load(tmp_path / "demo" / "x" / "checkpoints" / "state.pt", weights_only=True)
    assert state["step"] == 5
    assert all(torch.isfinite(tensor).all() for tensor in state["tracked"]["model"].values())


def test_the_folder_is_refused_when_it_is_another_runs(tmp_path: Path) -> None:
    with Run("demo", Recipe(), options(tmp_path)) as run:
        fit(run, 2)
        with pytest.raises(UserError, match="in use"), Run("demo", Recipe(), options(tmp_path, resume=True)):
            pass
    with pytest.raises(UserError, match="--resume"), Run("demo", Recipe(), options(tmp_path)):
        pass
    with pytest.raises(UserError, match="differs"), Run("demo", Recipe(width=4), options(tmp_path, resume=True)):
        pass
    for name, value in (("seed", 7), ("precision", "bf16")):
        changed = options(tmp_path, resume=True, **{name: value})
        with pytest.raises(UserError, match=f"begun with --{name}"), Run("demo", Recipe(), changed):
            pass


def width_of(claim: Claim, arm: Arm, seed: int, *, options: RunOptions, folder: Path) -> Measurement:
    """Stands in for a training: the recipe's width, times ten at the point that says so."""
    width = yaml.safe_load(Path(str(arm.recipe)).read_text())["width"]
    return Measurement(width * (10.0 if arm.options else 1.0))


def test_a_sweep_measures_the_recipe_it_is_given(tmp_path: Path) -> None:
    request = Request(seeds=1, jobs=1)

    def sweep(width: int, **changes: object) -> list[float]:
        metric = Metric("width")
        points = [{}, {"wide": True}]
        compare_points("demo", "sweep", Recipe(width), points, metric, request, options(tmp_path, **changes), width_of)
        return [point["mean"] for point in json.loads((tmp_path / "demo/sweep-x/sweep.json").read_text())["points"]]

    assert sweep(3) == [30, 3]
    with pytest.raises(UserError, match="--resume"):
        sweep(4)
    assert sweep(4, resume=True) == [40, 4]
    with pytest.raises(UserError, match=r"measured in fp32 on cpu, not in bf16 on cpu.*--name"):
        sweep(4, resume=True, precision="bf16")
    assert sweep(4, resume=True) == [40, 4]


@pytest.mark.parametrize(("points", "seeds"), [([], 1), ([{}], 0)])
def test_a_sweep_of_nothing_is_refused(points: list, seeds: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one point and one seed or more"):
        compare_points(
            "demo", "sweep", Recipe(), points, Metric("w"), Request(seeds=seeds), options(tmp_path), width_of
        )
    assert not list(tmp_path.iterdir())


def reproduce(folder: Path, **changes: object) -> list[Outcome]:
    request = Request(seeds=2, **changes)
    return reproduce_claims("toy", ["norm-helps"], request, options(folder), killed_in_the_baseline, figures)


def test_a_process_that_is_killed_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(RunFailure, match="--resume and fewer --jobs"):
        reproduce(tmp_path, jobs=2)


def test_a_claim_without_its_baselines_is_inconclusive(tmp_path: Path) -> None:
    """The method's value alone is not what is claimed, however good it is."""
    (outcome,) = reproduce(tmp_path, jobs=1, arms=["norm"])
    assert (outcome.verdict, outcome.reason) == ("inconclusive", "no baseline was run (--arms)")
    assert "no baseline was run" in (tmp_path / "toy" / "x" / "report.html").read_text()


def test_a_recipe_that_is_refused_leaves_its_name_free(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match="no such data"), Run("demo", Recipe(), options(tmp_path)):
            raise UserError("no such data")
    with Run("demo", Recipe(), options(tmp_path)) as run:
        fit(run, 2)
    with pytest.raises(UserError, match="gone"), Run("demo", Recipe(), options(tmp_path, resume=True)):
        raise UserError("the data are gone")
    assert (tmp_path / "demo" / "x" / "checkpoints" / "train.safetensors").exists()
    assert (tmp_path / "demo" / "x" / "config.yaml").exists()


def test_a_tracker_that_is_refused_leaves_the_name_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--tracker none"), Run("demo", Recipe(), options(tmp_path, tracker="wandb")):
        pass
    with Run("demo", Recipe(), options(tmp_path)) as run:
        fit(run, 1)


def test_a_tracker_that_does_not_begin_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is an optional extra")

    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    with (
        pytest.raises(UserError, match=r"no API key.*WANDB_MODE=offline"),
        Run("demo", Recipe(), options(tmp_path, tracker="wandb")),
    ):
        pass
    assert not list(tmp_path.rglob("config.yaml"))


def test_a_log_that_fills_the_disk_is_told_of(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="not on every platform")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def count() -> None:
        with Run("demo", Recipe(), options(tmp_path, checkpoint_every=0)) as run:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
            for step in run.steps("count", 50):
                run.log(a=step)

    try:
        with pytest.raises(RunFailure, match=r"metrics.jsonl: the disk is full.*--resume"):
            count()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    with Run("demo", Recipe(), options(tmp_path, resume=True)) as run:  # its lock is given back
        assert run.logged("count", "a") == []


@pytest.mark.parametrize("changes", [{"name": "a/b"}, {"checkpoint_every": -1}])
def test_options_are_checked(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(UserError, match="--"):
        options(tmp_path, **changes)


def test_values_logged_in_one_step_are_one_line(tmp_path: Path) -> None:
    with Run("demo", Recipe(), options(tmp_path)) as run:
        for step in run.steps("count", 3):
            run.log(a=step)
            run.log(b=2 * step)
    lines = [json.loads(line) for line in (tmp_path / "demo" / "x" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["a"], line["b"]) for line in lines] == [(0, 0, 0), (1, 1, 2), (2, 2, 4)]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is an optional extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with Run("demo", Recipe(), options(tmp_path, tracker="wandb")) as run:
        fit(run, 3)
    assert list((tmp_path / "demo" / "x" / "wandb").glob("offline-run-*/*.wandb"))
    identity = (tmp_path / "demo" / "x" / "wandb-id").read_text()
    time.sleep(1)  # wandb names the folder of a life by its second
    with Run("demo", Recipe(), options(tmp_path, tracker="wandb", resume=True)) as run:
        fit(run, 4)
    assert len(list((tmp_path / "demo" / "x" / "wandb").glob(f"offline-run-*-{identity}"))) == 2


def test_precision_bf16_runs(tmp_path: Path) -> None:
    with Run("demo", Recipe(), options(tmp_path, precision="bf16")) as run:
        assert fit(run, 2)[0].weight.dtype == torch.float32


def test_derived_seeds_are_fixed_and_apart() -> None:
    seeds = {derived_seed(seed, phase, step) for seed in range(3) for phase in "ab" for step in range(50)}
    assert len(seeds) == 300
    assert derived_seed(0, "a", 1) == derived_seed(0, "a", 1) < 2**63
    assert derived_seed(1, 11) != derived_seed(11, 1)


def test_batch_norm_over_processes_is_that_of_one(tmp_path: Path) -> None:
    """Outputs, gradients and running statistics, with shares of 2 and 4 samples."""
    torch.multiprocessing.spawn(batch_norm_of_half, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3).double()
    inputs = torch.randn(6, 3, 4, 4, dtype=torch.float64).requires_grad_()
    outputs = layer(inputs)
    (outputs * torch.arange(6.0, dtype=torch.float64)[:, None, None, None]).sum().backward()
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(torch.cat([share[0] for share in shares]), outputs.detach())
    torch.testing.assert_close(torch.cat([share[1] for share in shares]), inputs.grad)
    for share in shares:
        torch.testing.assert_close(share[2], layer.running_mean)
        torch.testing.assert_close(share[3], layer.running_var)
    halves = [torch.load(tmp_path / f"far-{rank}.pt") for rank in range(2)]
    for number, images in enumerate(far_from_zero()):
        layer = nn.BatchNorm2d(3)
        expected = layer(images).detach()
        torch.testing.assert_close(torch.cat([half[number] for half in halves]), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(halves[0][number + 2], layer.running_var)


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/opt/bin/tenfold-toy", "train", "--output", "/some/where", "--seed", "1"], "tenfold-toy train --seed 1"),
        (["/lib/tenfold_toy/__main__.py", "train", "--output=/some/where"], "python -m tenfold_toy train"),
    ],
)
def test_the_environment_tells_the_command_but_not_the_folder(argv, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    assert environment(torch.device("cpu"))["command"] == command
