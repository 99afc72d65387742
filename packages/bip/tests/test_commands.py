"""The verbs beside train and reproduce, through the command line; what they refuse, in a sentence and with its code."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tenfold_bip.data
from tenfold_bip import create_model, get_masks, keep_ratio, prune_parametrize, to_official
from tenfold_bip.cli import COMMANDS
from tenfold_bip.evaluate import load_model
from tenfold_bip.recipe import Bilevel, Phase, Recipe
from tenfold_bip.train import run_recipe
from tenfold_shared.checkpoint import save_weights
from tenfold_shared.cli import run_command
from tenfold_shared.images import ImageSet
from tenfold_shared.run import Run, RunOptions

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """A verb with its arguments: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            run_command("bip", COMMANDS, [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


def refused(answer: tuple[int, str, str], words: str, code: int = 2) -> None:
    """One sentence, and no more, on stderr."""
    assert answer[0] == code
    assert re.search(words, answer[2]), answer[2]
    assert "Traceback" not in answer[2]
    assert len(answer[2].strip().splitlines()) == 1


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Filter-wise and unstructured runs on digits, and a released file of filters and one of all weights."""
    folder = tmp_path_factory.mktemp("runs")
    for name, structure in (("filter", "filter"), ("weights", "global")):
        recipe = Recipe(
            "omp", keep=0.5, structure=structure, rewind_epoch=1, dense=Phase(epochs=2), sparse=Phase(epochs=2)
        )
        how = RunOptions(output=folder, name=name, device="cpu", quiet=True)
        with Run("bip", recipe, how) as run:
            run_recipe(run, recipe)
    torch.manual_seed(0)
    for name, structure in (("filter", "filter"), ("scored", "global")):
        model = prune_parametrize(create_model("resnet20s", 10), 0.5, structure, scores_init="random")
        torch.save(to_official(model, arch="resnet20s"), folder / f"{name}.pth.tar")
    model = prune_parametrize(create_model("digits_cnn"), 0.5, "filter", scores_init="random")
    torch.save(to_official(model, arch="digits_cnn"), folder / "digits.pth.tar")
    torch.save(create_model("digits_cnn").state_dict(), folder / "dense.pt")
    return folder


def test_sweep(command: Command, tmp_path: Path) -> None:
    """Every point is judged on held-out images, and one that trains densely otherwise has its own dense network."""
    short = ["--dense.epochs", 2, "--sparse.epochs", 2, "--rewind_epoch", 1, "--method", "omp", "--keep", 0.5]
    how = ["--output", tmp_path, "--device", "cpu", "--quiet", "true", "--seeds", 1, "--jobs", 1, "--name", "s"]
    sweep = ["sweep", "--config", "digits-cnn", *short, *how, "--grid", '{"dense.lr": [0.1, 0.02]}']
    refused(command(*sweep), "--data.validation")
    code, out, err = command(*sweep, "--data.validation", 0.2)
    assert code == 0, err
    assert "dense.lr" in out
    folder = tmp_path / "bip" / "sweep-s"
    points = json.loads((folder / "sweep.json").read_text())["points"]
    assert sorted(point["dense.lr"] for point in points) == [0.02, 0.1]
    assert len(list((folder / "runs").glob("dense-*"))) == 2


def test_compare_masks(command: Command, runs: Path, tmp_path: Path) -> None:
    first, second = (runs / "bip" / name for name in ("filter", "weights"))
    code, out, _ = command("compare-masks", first, second)
    assert code == 0
    overlap = re.search(r"IoU (0\.\d+)  by chance (0\.\d+)", out)
    assert overlap
    assert 0.2 < float(overlap[1]) < 0.9
    assert re.search(r"^  3\.weight  IoU [01]\.\d+$", out, re.MULTILINE)
    refused(command("compare-masks", first), "two or more")
    refused(command("compare-masks", first, first), "two or more different")
    refused(command("compare-masks", first, runs / "scored.pth.tar"), r"scored\.pth\.tar has scores .*: give --keep")
    refused(command("compare-masks", first, runs / "scored.pth.tar", "--keep", 0.5), "different layers")
    torch.save(create_model("digits_cnn", 20).state_dict(), tmp_path / "twenty.pt")
    refused(command("compare-masks", first, tmp_path / "twenty.pt"), r"\(10, 32\) and \(20, 32\)")


def test_shrink(command: Command, runs: Path, tmp_path: Path) -> None:
    output = tmp_path / "small.pt2"
    code, out, err = command("shrink", "--checkpoint", runs / "bip" / "filter", "--output", output)
    assert code == 0, err
    after, before = map(int, re.findall(r": (\d+) of (\d+) parameters", out)[0])
    assert before == 14458  # 14,288 prunable weights, 80 batch norms, the head's biases
    assert after < before / 2
    small = torch.export.load(output).module()
    large, _ = tenfold_model(runs / "bip" / "filter")
    images = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(small(images), large(images), rtol=1e-4, atol=1e-4)


def tenfold_model(checkpoint: Path) -> tuple[torch.nn.Module, dict]:
    model, about = load_model(checkpoint)
    return model.eval(), about


def test_shrink_of_a_released_file(command: Command, runs: Path, tmp_path: Path) -> None:
    given = ["shrink", "--checkpoint", runs / "filter.pth.tar", "--output", tmp_path / "small.pt2"]
    refused(command(*given, "--keep", 0.5, "--structure", "filter"), "--data: say which images")
    code, out, err = command(*given, "--keep", 0.5, "--structure", "filter", "--data", "cifar10")
    assert code == 0, err
    after, before = map(int, re.findall(r": (\d+) of (\d+) parameters", out)[0])
    assert after < 0.6 * before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "cifar10"], "1 channels and cifar10 has 3"),
        (["--data", "nonsense"], "nonsense"),
        (["--output", "/nonexistent/x.pt2"], "no folder /nonexistent"),
        (["--keep", "1.5"], "--keep"),
    ],
)
def test_shrink_refuses(arguments: list[str], words: str, command: Command, runs: Path) -> None:
    refused(command("shrink", "--checkpoint", runs / "bip" / "filter", *arguments), words)


def test_shrink_names_what_it_cannot_follow(
    command: Command, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Doubled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) * self.conv(x)

    monkeypatch.setattr("tenfold_bip.evaluate.load_model", lambda *a, **k: (Doubled(), {"shape": [1, 8, 8]}))
    given = ["shrink", "--checkpoint", runs, "--output", tmp_path / "small.pt2"]
    refused(command(*given), "Channels cannot be followed through .*mul")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--checkpoint", "{}/scored.pth.tar", "--keep", "1.5"], "--keep"),
        (["--checkpoint", "{}/scored.pth.tar", "--keep", "0.00001"], "would be empty"),
        (["--checkpoint", "{}/bip/weights", "--arch", "nonsense"], "nonsense"),
        (["--checkpoint", "{}/bip/weights", "--keep", "0.1"], "--keep and --structure are of an authors' checkpoint"),
        (["--checkpoint", "{}/dense.pt", "--keep", "0.1"], r"dense\.pt has no scores"),
        (["--checkpoint", "{}/scored.pth.tar", "--keep", "0.5"], "3 channels and digits has 1"),
        (["--checkpoint", "{}/filter.pth.tar", "--keep", "0.5"], "'filter' or 'channel'"),
        (["--checkpoint", "{}/bip/weights", "--batch_size", "0"], "--batch_size"),
        (["--checkpoint", "{}/bip/weights", "--data.official_split", "true"], "official_split.*digits"),
    ],
)
def test_eval_refuses(arguments: list[str], words: str, command: Command, runs: Path) -> None:
    refused(command("eval", "--device", "cpu", *(argument.format(runs) for argument in arguments)), words)


@pytest.mark.parametrize(("options", "keep"), [(["--keep", 0.5, "--structure", "filter"], 0.5), ([], 1.0)])
def test_released_files_of_filters_are_evaluated(
    options: list[object], keep: float, command: Command, runs: Path
) -> None:
    """Only convolutions have scores there, so the command is told which masks they give; or evaluates it dense."""
    code, out, err = command("eval", "--device", "cpu", "--checkpoint", runs / "digits.pth.tar", *options)
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert found["keep"] == pytest.approx(keep)
    assert 0.0 <= found["accuracy"] <= 100.0


@pytest.mark.parametrize("classes", [2, 20])
def test_a_network_of_other_classes_is_refused(classes: int, command: Command, tmp_path: Path) -> None:
    torch.save(create_model("digits_cnn", classes).state_dict(), tmp_path / "other.pt")
    words = f"tells {classes} classes apart and digits has 10"
    given = ["--device", "cpu", "--quiet", "true"]
    refused(command("eval", "--checkpoint", tmp_path / "other.pt", *given), words)
    train = ["train", "--config", "digits-cnn", "--pretrained", tmp_path / "other.pt", "--output", tmp_path, *given]
    refused(command(*train), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bilevel.lower_steps", "0"], "--bilevel.lower_steps takes 1 or more, got 0"),
        (["--score_batches", "0"], "--score_batches takes 1 or more"),
        (["--bilevel.gamma", "0"], "--bilevel.gamma takes a value above 0"),
        (["--prune_rate", "1.5"], r"--prune_rate takes a fraction in \(0, 1\)"),
        (["--dense.lr", "-1"], "--dense.lr takes 0 or more"),
        (["--bilevel.momentum", "1"], "--bilevel.momentum takes a value in"),
        (["--finetune.epochs", "-1"], "--finetune.epochs takes 0 or more"),
        (["--bilevel.trainer", "released", "--bilevel.lower_steps", "2"], "--bilevel.lower_steps: the released"),
        (
            ["--bilevel.trainer", "released", "--bilevel.ig", "none"],
            "--bilevel.ig none: the released .* --bilevel.lr2 0",
        ),
        (["--method", "dense", "--pretrained", "x"], "--pretrained: dense starts from the initialisation"),
        (["--method", "snip", "--pretrained", "x"], "--pretrained: snip starts from the initialisation"),
        (["--method", "finetune", "--finetune.epochs", "1"], "--method finetune: give the pruned network"),
        (["--method", "finetune", "--pretrained", "x"], "--method finetune: .* and --finetune.epochs"),
        (["--method", "imp", "--structure", "2:4"], "--structure 2:4: IMP cuts more in every round"),
        (["--bilevel.tie_scores", "true", "--bilevel.scores_init", "random"], "--bilevel.scores_init random"),
        (["--data.official_split", "true"], "--data.official_split is a split of tiny-imagenet"),
        *(
            (["--method", method, "--keep", "0.0001"], "leaves 2 for 4 layers")
            for method in ("bip", "imp", "omp", "hydra", "random", "snip", "grasp", "synflow")
        ),
    ],
)
def test_train_refuses_before_it_trains(arguments: list[str], words: str, command: Command, tmp_path: Path) -> None:
    given = ["--output", tmp_path, "--device", "cpu", "--quiet", "true"]
    refused(command("train", "--config", "digits-cnn", *arguments, *given), words)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_finetune_refuses_a_network_that_is_not_pruned(command: Command, runs: Path, tmp_path: Path) -> None:
    train = ["train", "--config", "digits-cnn", "--method", "finetune", "--finetune.epochs", 1, "--output", tmp_path]
    dense = pretrained_with_a_weak_layer(tmp_path, "digits_cnn", "3.weight")
    refused(command(*train, "--pretrained", dense, "--quiet"), "finetune takes a pruned network")
    refused(command(*train, "--pretrained", runs / "dense.pt", "--quiet"), "no scores to make a mask of")


@pytest.mark.parametrize("method", ["omp", "imp", "hydra", "bip"])
def test_a_network_that_a_cut_takes_apart_is_named(method: str, command: Command, runs: Path, tmp_path: Path) -> None:
    """A layer of tiny weights is emptied by a global ranking: where nothing goes around it, the run fails and says so."""
    dense = pretrained_with_a_weak_layer(tmp_path, "digits_cnn", "3.weight")
    epochs = [f for name in ("sparse", "hydra", "bilevel") for f in (f"--{name}.epochs", 1)]
    train = ["train", "--config", "digits-cnn", "--method", method, "--keep", 0.64, "--pretrained", dense, *epochs]
    given = [*train, "--output", tmp_path, "--device", "cpu", "--quiet", "true"]
    refused(command(*given, "--name", "x"), r"leaves no weight in 3\.weight, so that .* --keep.*--min_keep", code=1)
    assert (dense / "checkpoints" / "last.safetensors").exists()
    code, _, err = command(*given, "--name", "y", "--min_keep", 20)
    assert code == 0, err


def test_eval_counts_a_layer_that_kept_all_its_weights(command: Command, tmp_path: Path) -> None:
    """It is part of the keep ratio, as in the run; the ratio over all parameters has batch norms and biases in it."""
    dense = pretrained_with_a_weak_layer(tmp_path, "digits_cnn", "6.weight", 1e6)
    train = ["train", "--config", "digits-cnn", "--method", "omp", "--keep", 0.7, "--pretrained", dense]
    given = ["--sparse.epochs", 1, "--output", tmp_path, "--name", "x", "--device", "cpu", "--quiet", "true"]
    code, out, err = command(*train, *given)
    assert code == 0, err
    assert "70.00 % of the weights kept" in out
    kept = json.loads((tmp_path / "bip" / "x" / "result.json").read_text())
    assert (kept["method"], kept["seed"], kept["layers_emptied"]) == ("omp", 0, [])
    assert kept["costs"]["kept_per_layer"]["6.weight"] == [9216, 9216]
    _, out, err = command("eval", "--checkpoint", tmp_path / "bip" / "x", "--device", "cpu")
    found = json.loads(out.splitlines()[-1])
    assert found["kept_per_layer"]["6.weight"] == [9216, 9216]
    assert found["keep"] == pytest.approx(0.7, abs=1e-3)
    assert found["keep_of_all_parameters"] == pytest.approx(1 - 0.3 * 14288 / 14458, abs=1e-3)


def pretrained_with_a_weak_layer(folder: Path, arch: str, layer: str, scale: float = 1e-6) -> Path:
    """A dense run's folder, as far as pruning reads it."""
    torch.manual_seed(0)
    state = create_model(arch).state_dict()
    state[layer] *= scale
    for name in ("last", "rewind"):
        save_weights(folder / "dense" / "checkpoints" / f"{name}.safetensors", state, {"arch": arch, "classes": 10})
    return folder / "dense"


def test_a_layer_that_the_network_goes_around_may_be_emptied(
    command: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Residual networks lose a block that way and still work: a warning, and the layers in the result."""
    dense = pretrained_with_a_weak_layer(tmp_path, "resnet20s", "layer2.1.conv1.weight")
    images = ImageSet(
        torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8), torch.arange(20) % 10, tuple("abcdefghij")
    )
    monkeypatch.setattr(tenfold_bip.data, "load_images", lambda *a, **k: images)
    recipe = Recipe(
        "omp", "resnet20s", keep=0.3, batch_size=10, pretrained=dense, sparse=Phase(epochs=1), bilevel=Bilevel(epochs=1)
    )
    recipe.data.name = "cifar10"
    with Run("bip", recipe, RunOptions(output=tmp_path, name="x", device="cpu", quiet=True)) as run:
        model, result = run_recipe(run, recipe)
    assert result.layers_emptied == ["layer2.1.conv1.weight"]
    assert "leaves no weight in layer2.1.conv1.weight" in caplog.text
    assert int(get_masks(model)["layer2.1.conv1.weight"].sum()) == 0
    assert keep_ratio(model) == pytest.approx(0.3, abs=1e-4)
