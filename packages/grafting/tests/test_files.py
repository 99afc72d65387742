"""Checkpoints in the authors' layout, ONNX and VNN-LIB out and in, certification to JSON lines, recipes."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tenfold_grafting import cli
from tenfold_grafting.certify import load_graph
from tenfold_grafting.compat import CheckpointError, load_official_checkpoint, official_names, to_official
from tenfold_grafting.data import Data, DataConfig, Split, load_data
from tenfold_grafting.evaluate import Evaluation, load_model
from tenfold_grafting.grafting import activation_shapes, graft, grafted_masks
from tenfold_grafting.graph import Normalise, trace
from tenfold_grafting.networks import architecture, create_network
from tenfold_grafting.reproduce import VALUES
from tenfold_grafting.scores import instability, significance
from tenfold_grafting.selection import save_masks
from tenfold_grafting.specification import Property
from tenfold_grafting.train import (
    Recipe,
    Selection,
    Session,
    _masks,
    base_network,
    fine_tuned,
    objective,
    run_recipe,
    save,
)
from tenfold_grafting.vnnlib import write_vnnlib
from tenfold_grafting.zoo import load_network
from tenfold_shared.claims import Measurement, load_claims, summarise
from tenfold_shared.cli import load_recipe, recipes
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions


def grafted(name: str):
    model = create_network(name)
    shapes = activation_shapes(model, architecture(name).input_shape)
    return graft(model, {layer: (torch.rand(shape) < 0.5).float() for layer, shape in shapes.items()})


@pytest.mark.parametrize("name", ["cnn_b", "mnist_8x200", "mnist_8x200_bn", "resnet4b", "resnet2b"])
def test_authors_layout_round_trip(name: str, tmp_path: Path) -> None:
    for model in (create_network(name), grafted(name)):
        torch.save(to_official(model, epoch=3, best_sa=80.0), tmp_path / "c.pth.tar")
        again = load_official_checkpoint(tmp_path / "c.pth.tar")
        for key, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], tensor)


def test_authors_names() -> None:
    names = official_names(grafted("cnn_b"))
    assert names["1.weight"] == "layer1.weight"
    assert {v.split(".")[0] for v in names.values() if v.startswith("linear_")} == {
        f"linear_masked_relu{i}" for i in (2, 4, 7)
    }
    names = official_names(grafted("resnet4b"))
    assert names["conv1.weight"] == "conv1.weight"
    assert {v.split(".")[0] for v in names.values() if v.startswith("linear_")} == {
        f"linear_masked_relu{i}" for i in range(1, 11)
    }
    assert set(official_names(create_network("cnn_b")).values()) >= {"1.weight", "8.bias"}


def test_a_normalisation_is_no_part_of_the_authors_layout() -> None:
    network = create_network("cnn_b")
    whole = torch.nn.Sequential(Normalise([0.5] * 3, [0.2] * 3), network)
    assert list(to_official(whole)["state_dict"]) == list(network.state_dict())


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = to_official(create_network("cnn_b"))["state_dict"]
    state.pop("3.bias")
    torch.save(state, tmp_path / "partial.pth")
    with pytest.raises(CheckpointError, match=r"missing 3\.bias"):
        load_official_checkpoint(tmp_path / "partial.pth")
    (tmp_path / "broken.pth").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"broken\.pth is truncated or corrupted"):
        load_official_checkpoint(tmp_path / "broken.pth")
    torch.save([{"a": 1}], tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no state dict"):
        load_official_checkpoint(tmp_path / "other.pth")


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["tenfold-grafting", *arguments])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    return int(leaving.value.code or 0)


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """A small random network in the verification layout, and digits to certify it on."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 12), torch.nn.ReLU(), torch.nn.Linear(12, 10))
    with torch.no_grad():  # a network that knows one class per bright row, so that some images are right
        model[1].weight.mul_(0.2)
    meta = {
        "arch": [["flatten"], ["linear", 64, 12], ["relu"], ["linear", 12, 10]],
        "input_shape": [1, 8, 8], "mean": [0.0], "std": [1.0], "eps": 0.05, "classes": 10,
    }  # fmt: skip
    arrays = {f"w/{key}": tensor.numpy() for key, tensor in model.state_dict().items()}
    np.savez(tmp_path / "net.npz", meta=np.array([json.dumps(meta)]), **arrays)
    return tmp_path / "net.npz"


CERTIFY = ["--eps", "0.01", "--end", "12", "--verify.timeout", "30", "--device", "cpu", "--quiet"]


def test_certify_resumes_and_shards(network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ["certify", "--model", str(network), *CERTIFY, "--name", "whole"]
    assert run(monkeypatch, tmp_path, *whole) == 0
    results = tmp_path / "runs" / "grafting" / "whole" / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(12))
    assert all({"status", "seconds"} <= set(line) for line in lines)
    assert run(monkeypatch, tmp_path, *whole) == 2
    cut = results.read_text().splitlines(keepends=True)
    results.write_text("".join(cut[:5]) + cut[5][:10])
    assert run(monkeypatch, tmp_path, *whole, "--resume") == 0
    again = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["index"], line["status"]) for line in again] == [(line["index"], line["status"]) for line in lines]
    found = {}
    for shard in (0, 1):
        arguments = [*whole[:-1], "parts", "--shard", str(shard), "--shards", "2"]
        assert run(monkeypatch, tmp_path, *arguments) == 0
        file = results.parent.parent / "parts" / f"results-{shard}of2.jsonl"
        found |= {line["index"]: line["status"] for line in map(json.loads, file.read_text().splitlines())}
    assert found == {line["index"]: line["status"] for line in lines}
    assert run(monkeypatch, tmp_path, *whole[:-1], "pool", "--jobs", "2") == 0
    pooled = (results.parent.parent / "pool" / "results.jsonl").read_text().splitlines()
    assert {line["index"]: line["status"] for line in map(json.loads, pooled)} == found
    counted, together = (
        json.loads((results.parent.parent / name / "summary.json").read_text()) for name in ("whole", "parts")
    )
    assert together["images"] == 12
    assert together["statuses"] == counted["statuses"]
    assert {"time_limit", "eps", "environment"} <= set(together)
    part = [*whole[:-1], "parts", "--shard", "0", "--resume"]  # with other jobs it goes on, and nothing else may differ
    assert run(monkeypatch, tmp_path, *part, "--shards", "2", "--jobs", "2") == 0
    assert run(monkeypatch, tmp_path, *part, "--shards", "3") == 2
    assert run(monkeypatch, tmp_path, *part, "--shards", "2", "--verify.method", "crown") == 2
    assert run(monkeypatch, tmp_path, *part[:-3]) == 2
    counted = json.loads((results.parent.parent / "parts" / "summary.json").read_text())
    assert (counted["images"], counted["statuses"]) == (12, together["statuses"])


def test_certify_bisects_the_radius(network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    x = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8), dtype=np.uint8)
    with torch.no_grad():
        y = load_network(network)[0](torch.from_numpy(x).float() / 255).argmax(1)
    np.savez(tmp_path / "x.npz", x=x, y=y.numpy())
    images = ["--data.name", "arrays", "--data.file", "x.npz", "--eps", "0.5", "--bisections", "4", "--name", "radii"]
    quick = ["--verify.method", "crown", "--device", "cpu", "--quiet"]
    assert run(monkeypatch, tmp_path, "certify", "--model", str(network), *images, *quick) == 0
    text = (tmp_path / "runs" / "grafting" / "radii" / "results.jsonl").read_text()
    radii = [json.loads(line)["radius"] for line in text.splitlines()]
    assert all(radius in [k / 32 for k in range(17)] for radius in radii)
    assert max(radii) > 0
    assert run(monkeypatch, tmp_path, "certify", "--model", str(network), *images, "--property", "p.vnnlib") == 2
    assert "--bisections" in capsys.readouterr().err


def test_an_image_beyond_the_memory_is_undecided(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(graph, prop, settings):
        return torch.empty(1 << 55)

    monkeypatch.setattr("tenfold_grafting.certify.verify", greedy)
    assert run(monkeypatch, tmp_path, "certify", "--model", str(network), *CERTIFY, "--name", "greedy") == 0
    file = tmp_path / "runs" / "grafting" / "greedy" / "results.jsonl"
    statuses = [json.loads(line)["status"] for line in file.read_text().splitlines()]
    assert len(statuses) == 12
    assert set(statuses) <= {"wrong", "memory"}


def test_export_then_certify(network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    arguments = ["export", "--model", str(network), "--folder", "out", "--images", "1", "--eps", "0.01"]
    assert run(monkeypatch, tmp_path, *arguments) == 0
    arguments = ["certify", "--model", "out/network.onnx", "--property", "out/property-0.vnnlib", "--device", "cpu"]
    assert run(monkeypatch, tmp_path, *arguments, "--verify.timeout", "30", "--quiet", "--name", "vnn") == 0
    line = json.loads((tmp_path / "runs" / "grafting" / "vnn" / "results.jsonl").read_text())
    images, labels = load_data(DataConfig()).test.pixels(1)
    right = int(load_network(network)[0].double()(images).argmax()) == int(labels[0])
    assert right or line["status"] == "attacked"


def test_certified_networks_are_folded_in_double_precision(tmp_path: Path) -> None:
    """Batch norms and normalisation meet the stored weights unrounded: the claim is about them."""
    model = create_network("mnist_8x200_bn")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.1, 2)
    torch.save(to_official(model), tmp_path / "net.pth.tar")
    np.savez(tmp_path / "x.npz", x=np.full((1, 1, 28, 28), 90, np.uint8), y=np.zeros(1, np.int64))
    graph = load_graph(tmp_path / "net.pth.tar", DataConfig("arrays", file=tmp_path / "x.npz"))
    x = torch.rand(5, 1, 28, 28).double()
    torch.testing.assert_close(graph(x), model.double().eval()(x).detach(), rtol=0, atol=1e-12)


def test_released_networks_are_normalised_as_they_were_trained(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The set that an architecture was released with, the data set's, or what is asked for, whatever the file says."""
    cifar, released = DataConfig("cifar10"), tmp_path / "net.pth"
    for arch, data, mean, std in (
        ("cnn_b", cifar, 0.4914, 0.2023),
        ("cnn_b", DataConfig("svhn"), 0.4377, 0.1201),
        ("cnn_a", cifar, 125.3 / 255, 63.0 / 255),
        ("resnet2b", cifar, 0.4914, 0.2471),
        ("oval_deep", cifar, 0.485, 0.225),
        ("cnn_a", DataConfig("cifar10", normalisation="resnet"), 0.4914, 0.2471),
        ("cnn_a", DataConfig("cifar10", normalisation="none"), 0.0, 1.0),
        ("mnist_8x200", DataConfig("mnist"), 0.0, 1.0),
    ):
        torch.save(create_network(arch).state_dict(), released)
        (first, _), about = load_model(released, data)
        assert about["arch"] == arch
        assert (float(first.mean[0]), float(first.std[0])) == (mean, std)
        trace(torch.nn.Sequential(first, create_network(arch)), architecture(arch).input_shape)
    capsys.readouterr()
    np.savez(tmp_path / "x.npz", x=np.zeros((1, 3, 32, 32), np.uint8), y=np.zeros(1, np.int64))
    torch.save(create_network("cnn_a").state_dict(), released)
    on_images = ["--data.name", "arrays", "--data.file", "x.npz", "--device", "cpu", "--evaluation.attack_steps", "1"]
    assert run(monkeypatch, tmp_path, "eval", "--checkpoint", str(released), *on_images) == 0
    told = capsys.readouterr()
    assert "cnn_a with the normalisation sdp" in told.err
    line = json.loads(told.out)
    assert "seconds_per_call" in line
    assert line["unr_images"] == "all"
    with pytest.raises(UserError, match="oval is of 3 channels, the network takes 1"):
        load_model(network, DataConfig(normalisation="oval"))


def test_defaults_of_evaluation_are_the_papers() -> None:
    """PGD-100 with restarts and alpha-CROWN before branching; what was measured with fewer says so in its recipe."""
    e = Evaluation()
    assert (e.attack_steps, e.attack_restarts, e.verify.alpha.iterations) == (100, 5, 100)
    for name in recipes("tenfold_grafting"):
        recipe = load_recipe("tenfold_grafting", name, Recipe)
        wanted = 20 if name.startswith("published") else 10 if name == "digits-cnn" else 100
        assert recipe.evaluation.verify.alpha.iterations == wanted, name


@pytest.mark.parametrize("verb", [["certify", "--model"], ["eval", "--checkpoint"]])
def test_nothing_is_measured_in_half_precision(
    verb: list[str], network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    assert run(monkeypatch, tmp_path, *verb, str(network), "--precision", "bf16", "--device", "cpu") == 2
    assert "--precision bf16 is for training" in capsys.readouterr().err


def test_claims_hold_of_their_own_numbers() -> None:
    """What is published, measured anew, is judged reproduced; every metric is measured, and every arm's options load."""
    for claim in load_claims("tenfold_grafting").claims:
        assert claim.metric.name in VALUES, claim.id
        for arm in claim.arms.values():
            load_recipe("tenfold_grafting", str(arm.recipe), Recipe, **arm.options)
        papers = {name: arm.paper for name, arm in claim.arms.items() if arm.paper is not None}
        if len(papers) < 2:
            continue
        arms = {name: arm for name, arm in claim.arms.items() if name in papers}
        found = {name: [Measurement(value + step) for step in (-0.1, 0.0, 0.1)] for name, value in papers.items()}
        outcome = summarise(dataclasses.replace(claim, arms=arms), found, range(3), environment={})
        assert outcome.verdict == "reproduced", (claim.id, outcome.reason)


def test_a_network_trained_in_half_precision_is_measured_in_single(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the training has wrapped around the network is off before its accuracies are measured."""
    seen = []

    def measured(model, images, labels, evaluation, record):
        model[1][0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        model(images[:2].float())
        return {}

    monkeypatch.setattr("tenfold_grafting.train.measure_network", measured)
    options = {"method": "base", "base.epochs": 1}
    recipe = load_recipe("tenfold_grafting", "digits-cnn", Recipe, **options)
    with Run("grafting", recipe, RunOptions(output=tmp_path, device="cpu", precision="bf16", quiet=True)) as started:
        run_recipe(started, recipe)
    assert seen == [torch.float32]


def test_a_run_keeps_the_normalisation_of_what_it_starts_from(tmp_path: Path) -> None:
    """Through both phases, and in its own checkpoint."""
    torch.save(create_network("resnet2b").state_dict(), tmp_path / "net.pth")
    options = {"method": "graft", "arch": "resnet2b", "selection.criterion": "random", "data.name": "cifar10"}
    recipe = load_recipe(
        "tenfold_grafting", "cifar10-resnet4b", Recipe, pretrained=str(tmp_path / "net.pth"), **options
    )
    images = Split(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), 255)
    with Run("grafting", recipe, RunOptions(output=tmp_path, device="cpu", quiet=True)) as run:
        session = Session(run, recipe, Data(images, None, images, 10))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("tenfold_grafting.train.fit", lambda *a: None)
            model = fine_tuned(session, base_network(session))
        again, _ = load_model(save(session, model, "last", {}))
    assert again[0].std.tolist() == [0.2471, 0.2435, 0.2616]
    assert sum(int(mask.sum()) for mask in grafted_masks(again).values()) == 3122


def test_a_box_outside_of_the_pixels_is_refused(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """A checkpoint takes pixels; a property that leaves their range is one of other inputs."""
    outside = Property(
        torch.full((1, 8, 8), -0.5), torch.ones(1, 8, 8), torch.eye(10)[:1] - torch.eye(10)[1:2], torch.zeros(1)
    )
    write_vnnlib(outside, tmp_path / "outside.vnnlib")
    assert run(monkeypatch, tmp_path, "certify", "--model", str(network), "--property", "outside.vnnlib") == 2
    assert "[-0.5, 1]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        ("--eps", "0"),
        ("--verify.timeout", "0"),
        ("--shard", "3"),
        ("--model", "missing.npz"),
        ("--verify.alpha.iterations", "0"),
        ("--verify.beta.iterations", "0"),
        ("--start", "500"),
        ("--output", "net.npz"),
    ],
)
def test_certify_refuses(network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option, capsys) -> None:
    assert run(monkeypatch, tmp_path, "certify", "--model", str(network), *option) == 2
    assert option[0].rpartition(".")[2].lstrip("-").split("_")[0] in capsys.readouterr().err or "missing" in option[1]


def test_a_refused_call_does_not_take_the_name(network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder has the model's name by default; the corrected command goes into the same one."""
    arguments = ["certify", "--model", str(network), *CERTIFY]
    assert run(monkeypatch, tmp_path, *arguments, "--data.name", "cifar10", "--data.root", "nowhere") == 2
    assert run(monkeypatch, tmp_path, *arguments) == 0
    assert run(monkeypatch, tmp_path, *arguments) == 2


@pytest.mark.parametrize("verb", [["certify", "--model"], ["export", "--model"], ["eval", "--checkpoint"]])
def test_labels_beyond_the_logits_are_refused(
    verb: list[str], network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    pytest.importorskip("onnx")
    np.savez(tmp_path / "x.npz", x=np.zeros((1, 1, 8, 8), np.uint8), y=np.array([11]))
    assert run(monkeypatch, tmp_path, *verb, str(network), "--data.name", "arrays", "--data.file", "x.npz") == 2
    assert "the network gives 10 logits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--training.eps", "-1"), "training.eps takes 0 or more"),
        (("--training.beta", "-1"), "training.beta takes 0 or more"),
        (("--training.kappa", "2"), "training.kappa is a share"),
        (("--base.lr", "-1"), "base.lr takes 0 or more"),
        (("--finetune.milestones", "10,-1"), "finetune.milestones takes epochs"),
        (("--selection.gammas", "1,-1"), "selection.gammas takes one weight of 0 or more"),
        (("--selection.score_eps", "-1"), "selection.score_eps 0 or more"),
        (("--evaluation.verify.alpha.decay", "0"), "a factor on it above 0"),
        (("--evaluation.verify.beta.decay", "-1"), "a factor on them above 0"),
        (("--method", "prune", "--selection.train_weights", "false"), "nothing to train"),
        (("--selection.criterion", "file", "--selection.file", "none.pt"), "no mask file"),
        (("--evaluation.attack_step", "-1"), "attack_step"),
        (("--validation_steps", "0"), "validation_steps"),
    ],
)
def test_training_refuses_before_it_starts(
    options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("tenfold_grafting.train.fit", None)  # nothing is trained
    assert run(monkeypatch, tmp_path, "train", "--config", "digits-cnn", "--device", "cpu", *options) == 2
    assert message in capsys.readouterr().err


def test_a_mask_file_lies_in_the_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the recipe of the released mask names it."""
    monkeypatch.setenv("TENFOLD_DATA", str(tmp_path))
    model = create_network("digits_cnn")
    masks = {name: torch.ones(shape) for name, shape in activation_shapes(model, (1, 8, 8)).items()}
    (tmp_path / "verification").mkdir()
    save_masks(tmp_path / "verification" / "mask.pt", masks)
    settings = Selection(criterion="file", file=Path("verification/mask.pt"))
    found = _masks(Recipe(arch="digits_cnn"), settings, load_data(DataConfig()), model)
    assert {name: int(mask.sum()) for name, mask in found.items()} == {n: m.numel() for n, m in masks.items()}


def test_scores_follow_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Significance on training images alone, of what is asked for; instability on those of the split."""
    seen: dict[str, torch.Tensor] = {}
    scores = {"significance": significance, "instability": instability}

    def spied(name: str):
        def call(model, images, *rest, **options):
            found = scores[name](model, images, *rest, **options)
            seen.update(
                {f"{name} of": images if name == "instability" else images[0][0], name: next(iter(found.values()))}
            )
            return found

        return call

    for name in scores:
        monkeypatch.setattr(f"tenfold_grafting.train.{name}", spied(name))
    data, model = load_data(DataConfig()), create_network("digits_cnn")
    found = {}
    for split, after in (("train", False), ("test", True)):
        settings = Selection(images=20, bounds="ibp", split=split, post_activation=after)
        _masks(Recipe(arch="digits_cnn"), settings, data, model)
        found[split] = dict(seen)
    assert torch.equal(found["test"]["instability of"], data.test.pixels(20)[0].float())
    assert torch.equal(found["train"]["instability of"], found["train"]["significance of"])
    assert torch.equal(found["train"]["significance of"], found["test"]["significance of"])
    assert not torch.equal(found["train"]["significance"], found["test"]["significance"])


@pytest.mark.parametrize("name", [n for n in recipes("tenfold_grafting") if not n.startswith("published")])
def test_every_recipe_steps(name: str, tmp_path: Path) -> None:
    """Built at full size and stepped once on generated images of the right shape."""
    recipe = load_recipe("tenfold_grafting", name, Recipe)
    model = create_network(recipe.arch)
    shape = architecture(recipe.arch).input_shape
    if "17m" in name:
        recipe.training.grad_align = 0.0  # its second derivatives take a while
    x, y = torch.rand(2, *shape), torch.tensor([0, 1])
    with Run("grafting", recipe, RunOptions(output=tmp_path, device="cpu", quiet=True)) as run:
        session = Session(run, recipe, load_data(DataConfig()))  # the loss does not look at the images of the session
        loss = objective(session, model, model, x, y, torch.Generator().manual_seed(0), 0.9)
        loss.backward()
    assert torch.isfinite(loss)
    assert any(float(p.grad.abs().sum()) > 0 for p in model.parameters() if p.grad is not None)
