"""`eval` of segmenters and detectors: what the training printed, bit for bit; what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from slak_folders import backbone_with_zeros, generate_ade, generate_coco, generate_voc
from slak_processes import evaluate_as_rank

import tenfold_slak.detect
from tenfold_shared.checkpoint import load_weights, save_weights
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions
from tenfold_shared.testing import Conformance, flip
from tenfold_slak.compat import CheckpointError
from tenfold_slak.detect import Detection, train_detector
from tenfold_slak.downstream import load_official_segmenter
from tenfold_slak.evaluate import EvalConfig, EvalData, evaluate, load_model
from tenfold_slak.models.slak import SLaK
from tenfold_slak.segment import Segmentation, train_segmenter
from tenfold_slak.train import Recipe

NARROW = {"dims": [4, 4, 8, 8], "depths": [1, 1, 1, 1]}
RELEASED_SIZES = {
    "depths": (1, 1, 2, 1),
    "dims": (6, 8, 12, 16),
    "kernel_sizes": (21, 13, 7, 5),
    "small_kernel": 3,
    "num_classes": 0,
}
LAYOUT = Path(__file__).parent / "layouts" / "mmsegmentation-upernet.safetensors"


class Command(Conformance):
    """The command inside this process."""

    package = "tenfold_slak"


def options(folder: Path, **changes: Any) -> RunOptions:
    return RunOptions(output=folder, **{"name": "x", "device": "cpu", "quiet": True, **changes})


def train_small_segmenter(folder: Path, **changes: Any) -> float:
    """Two steps on two images of three classes; returns what the training's evaluation said."""
    torch.manual_seed(0)
    generate_ade(folder, classes=3)
    settings = Segmentation(
        root=folder, classes=3, iterations=2, batch_size=2, crop=64, stride=43, channels=8, workers=0, warmup=1, lr=1e-3
    )
    recipe = Recipe(
        task="segment",
        arguments=NARROW,
        segmentation=settings,
        pretrained=backbone_with_zeros(folder / "start.pth", **NARROW),
    )
    with Run("slak", recipe, options(folder, **changes)) as run:
        return train_segmenter(run, recipe)["miou"]


def train_small_detector(folder: Path, **changes: Any) -> dict[str, float]:
    """The same for a detector, of COCO unless it is said otherwise."""
    few: dict[str, Any] = {"epochs": 2, "batch_size": 2, "scales": [64], "samples": 8, "proposals": 8, "channels": 16}
    settings = Detection(**{"root": folder, "workers": 0, **few, **changes})
    (generate_coco if settings.data == "coco" else generate_voc)(folder)
    recipe = Recipe(
        task="detect",
        arguments=NARROW,
        detection=settings,
        pretrained=backbone_with_zeros(folder / "start.pth", **NARROW),
    )
    with Run("slak", recipe, options(folder)) as run:
        return train_detector(run, recipe)


def run_folder(folder: Path) -> Path:
    return folder / "slak" / "x"


def weights_of(folder: Path) -> Path:
    return run_folder(folder) / "checkpoints" / "last.safetensors"


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    folder = tmp_path_factory.mktemp("segmented")
    return folder, train_small_segmenter(folder)


@pytest.fixture(scope="module")
def detected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("detected")
    return folder, train_small_detector(folder)


@pytest.fixture
def printed(capsys: pytest.CaptureFixture) -> Callable[..., dict[str, Any]]:
    """Evaluates, and returns what was printed."""

    def evaluated(config: EvalConfig, asked: RunOptions) -> dict[str, Any]:
        capsys.readouterr()
        evaluate(config, asked)
        return json.loads(capsys.readouterr().out)

    return evaluated


def refused(folder: Path, checkpoint: Path, *words: str, more: tuple[str, ...] = (), verb: str = "eval") -> None:
    done = Command().quick(folder, verb, "--checkpoint", str(checkpoint), *more)
    Command.refused(done, 2, *words)


# -- what is printed ---------------------------------------------------------------------------------------------------


def test_a_segmenter_is_evaluated_to_what_its_training_said(segmented: Any, printed: Any, tmp_path: Path) -> None:
    folder, trained = segmented
    found = printed(EvalConfig(run_folder(folder)), options(tmp_path))
    assert found["miou"] == trained > 0
    assert (found["arch"], found["data"]) == ("slak_tiny", "ade20k")
    state, _ = load_weights(weights_of(folder))
    start = torch.load(folder / "start.pth", weights_only=True)["model"]
    for name, before in start.items():
        if before.ndim in {2, 4} and not name.startswith("head"):
            assert torch.equal(before == 0, state[f"backbone.{name}"] == 0), name  # the zeros, and no others
            assert found["density"][f"backbone.{name}"] == pytest.approx(float((before != 0).float().mean()))
    assert found["parameters_nonzero"] < found["parameters"]
    assert 0 < found["macs_nonzero"] < found["macs"]
    assert printed(EvalConfig(weights_of(folder)), options(tmp_path)) == found
    merged = printed(EvalConfig(run_folder(folder), merge=True), options(tmp_path))
    assert merged["miou"] == pytest.approx(trained, abs=1)  # near ties may fall to the other side
    assert merged["parameters"] == found["parameters"]  # counted before


def test_a_segmenter_is_evaluated_at_its_precision(printed: Any, tmp_path: Path) -> None:
    trained = train_small_segmenter(tmp_path, precision="bf16")
    assert printed(EvalConfig(run_folder(tmp_path)), options(tmp_path, precision="bf16"))["miou"] == trained


@pytest.mark.parametrize("settings", [{}, {"heads": "mask"}, {"heads": "box"}, {"data": "voc2007", "heads": "box"}])
def test_a_detector_is_evaluated_to_what_its_training_said(
    settings: dict[str, str], printed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the precisions alone, which are low after so few steps: box by box."""
    answers = []
    real = tenfold_slak.detect.predictions

    def recorded(*arguments: Any) -> Any:
        answers.append(real(*arguments))
        return answers[-1]

    monkeypatch.setattr(tenfold_slak.detect, "predictions", recorded)
    trained = train_small_detector(tmp_path, **settings)
    found = printed(EvalConfig(run_folder(tmp_path)), options(tmp_path))
    assert {name: found[name] for name in trained} == trained
    assert ("mask_ap" in found) == (settings.get("heads") != "box")
    assert ("map50" in found) == ("data" in settings)
    assert found["data"] == settings.get("data", "coco")
    assert found["parameters_nonzero"] < found["parameters"]
    assert "macs" not in found  # how many regions are judged depends on the image
    (before, after) = answers
    assert len(before) == 2
    assert sum(len(answer["boxes"]) for _, answer in before) > 0
    for (_, one), (_, two) in zip(before, after, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name], name


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_processes_share_the_images(segmented: Any, detected: Any, printed: Any, tmp_path: Path) -> None:
    folders = [str(run_folder(segmented[0])), str(run_folder(detected[0]))]
    mp.spawn(evaluate_as_rank, (str(tmp_path), folders), nprocs=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have it: sums in one order
    try:
        alone = [printed(EvalConfig(Path(folder)), options(tmp_path)) for folder in folders]
    finally:
        torch.set_num_threads(threads)
    assert [json.loads(line) for line in (tmp_path / "rank0.txt").read_text().splitlines()] == alone
    assert (tmp_path / "rank1.txt").read_text() == ""


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_other_folders(segmented: Any, detected: Any, printed: Any, tmp_path: Path) -> None:
    """The data set may have moved, also into the data root; elsewhere there is none, or another one."""
    run, expected = run_folder(segmented[0]), segmented[1]
    root = tmp_path / "data" / "moved"
    root.mkdir(parents=True)
    (segmented[0] / "ADEChallengeData2016").rename(root / "ADEChallengeData2016")
    try:
        refused(tmp_path, run, "ADE20K is not there", str(segmented[0]))
        assert printed(EvalConfig(run, EvalData(root=root)), options(tmp_path))["miou"] == expected
        done = Command().quick(tmp_path, "eval", "--checkpoint", str(run), "--data.root", "moved", "--device", "cpu")
        assert json.loads(done.out)["miou"] == expected
        refused(tmp_path, run, "ADE20K is not there", "nowhere", more=("--data.root", "nowhere"))
    finally:
        (root / "ADEChallengeData2016").rename(segmented[0] / "ADEChallengeData2016")
    generate_ade(tmp_path / "six", classes=6)
    refused(tmp_path, run, "has the label", "3 classes", more=("--data.root", str(tmp_path / "six")))
    refused(tmp_path, run_folder(detected[0]), "COCO 2017 is not there", more=("--data.root", "nowhere"))
    (tmp_path / "coco").mkdir()
    generate_coco(tmp_path / "coco")
    annotations = tmp_path / "coco" / "annotations" / "instances_val2017.json"
    annotations.write_text(annotations.read_text().replace('{"id": 9, "name": "b"}', '{"id": 8, "name": "b"}'))
    root_option = ("--data.root", str(tmp_path / "coco"))
    refused(tmp_path, run_folder(detected[0]), "other categories", str(tmp_path / "coco"), more=root_option)


@pytest.mark.parametrize(
    "more",
    [
        ("--data.name", "digits"),
        ("--data.size", "32"),
        ("--data.validation", "0.5"),
        ("--data.download",),
        ("--data.workers", "1"),
        ("--batch_size", "1"),
        ("--compile",),
    ],
)
def test_options_of_classifiers(segmented: Any, more: tuple[str, ...], tmp_path: Path) -> None:
    refused(tmp_path, run_folder(segmented[0]), f"{more[0]} is not read", "segment", more=more)


def test_an_average_that_is_not_kept(segmented: Any, tmp_path: Path) -> None:
    refused(tmp_path, run_folder(segmented[0]), "keeps no moving average", more=("--weights", "ema"))


@pytest.mark.parametrize("verb", ["erf", "export", "profile"])
def test_verbs_of_classifiers(segmented: Any, verb: str, tmp_path: Path) -> None:
    refused(tmp_path, run_folder(segmented[0]), "a network for segment", "takes a classifier", verb=verb)


def test_damaged_files(segmented: Any, tmp_path: Path) -> None:
    whole = weights_of(segmented[0]).read_bytes()
    file = tmp_path / "broken.safetensors"
    for content in (whole[: len(whole) // 2], flip(whole, len(whole) - len(whole) // 4)):
        file.write_bytes(content)
        refused(tmp_path, file, "broken.safetensors", "corrupted")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": None}, ("does not say how its network is built", "settings missing")),
        ({"task": "transcribe"}, ("network for transcribe",)),
        ({"settings": {"crop": 64, "no_such_setting": 1}}, ("another version", "no_such_setting")),
        ({"arch": "slak_huge"}, ("slak_huge",)),
        ({"arguments": {**NARROW, "dims": [4, 4, 8, 12]}}, ("keys do not fit", "stages.3")),
        ({"settings": {"stride": 0}}, ("stride",)),
        ({"settings": {"crop": 64, "stride": 65}}, ("stride is 65", "leave pixels out")),
    ],
)
def test_files_that_do_not_say_what_they_hold(segmented: Any, change: dict, words: tuple, tmp_path: Path) -> None:
    state, about = load_weights(weights_of(segmented[0]))
    said = {name: value for name, value in {**about, **change}.items() if value is not None}
    save_weights(tmp_path / "other.safetensors", state, said)
    refused(tmp_path, tmp_path / "other.safetensors", *words)


# -- released segmenters -----------------------------------------------------------------------------------------------


def released_segmenter() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A file in mmsegmentation's layout, its heads made by mmsegmentation; and what those heads do to maps."""
    kept = load_file(LAYOUT)
    heads = {name: value for name, value in kept.items() if "_head." in name}
    body = SLaK(**RELEASED_SIZES)
    state = {f"backbone.{name}": value for name, value in body.state_dict().items() if "norm." not in name[:5]}
    for i, width in enumerate(RELEASED_SIZES["dims"]):
        state |= {f"backbone.norm{i}.weight": torch.rand(width), f"backbone.norm{i}.bias": torch.rand(width)}
    state["backbone.stages.0.0.pwconv1.weight"][:3] = 0
    state["backbone.stages.0.0.large_kernel.LoRA1.conv.weight"][:3] = 0
    return {**state, **heads}, {name: value for name, value in kept.items() if name not in heads}


def test_released_segmenters_are_mmsegmentations() -> None:
    """The scores are those that mmsegmentation gave."""
    state, wanted = released_segmenter()
    model = load_official_segmenter({"state_dict": {f"module.{k}": v for k, v in state.items()}, "meta": {}}).eval()
    maps = [wanted[f"maps.{i}"] for i in range(4)]
    with torch.inference_mode():
        torch.testing.assert_close(model.decode_head(maps), wanted["scores"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.auxiliary_head(maps[2]), wanted["auxiliary"], rtol=1e-4, atol=1e-4)
    assert torch.equal(model.backbone.norm2.weight, state["backbone.norm2.weight"])
    model.backbone.stages[0][0].pwconv1.weight.data.fill_(1)
    model.backbone.apply_masks()
    assert (model.backbone.stages[0][0].pwconv1.weight[:4] == 0).all(1).tolist() == [True, True, True, False]
    for absent in ("auxiliary_head.conv_seg.weight", "decode_head.fpn_convs.1.bn.bias", "backbone.stages.2.1.gamma"):
        with pytest.raises(CheckpointError, match="missing"):
            load_official_segmenter({name: value for name, value in state.items() if name != absent})


def test_a_released_segmenter_is_evaluated(printed: Any, tmp_path: Path) -> None:
    state, _ = released_segmenter()
    torch.save({"meta": {"epoch": 1}, "state_dict": state}, tmp_path / "slak_tiny_ade20k.pth")
    generate_ade(tmp_path, classes=7)
    file = tmp_path / "slak_tiny_ade20k.pth"
    found = printed(EvalConfig(file, EvalData(root=tmp_path)), options(tmp_path))
    assert (found["arch"], found["data"]) == ("released", "ade20k")
    assert 0 < found["miou"] < 100
    assert found["parameters_nonzero"] < found["parameters"]
    merged = printed(EvalConfig(file, EvalData(root=tmp_path), merge=True), options(tmp_path))
    assert merged == {**found, "miou": pytest.approx(found["miou"], abs=1)}  # near ties may fall to the other side
    refused(tmp_path, file, "ADE20K is not there")
    assert isinstance(load_model(file)[0], SLaK)  # its backbone, for the other verbs
    with pytest.raises(UserError, match="model_ema"):
        evaluate(EvalConfig(file, weights="ema"), options(tmp_path))
