"""The released checkpoint layout: loading, refusing, exporting."""

import os
from pathlib import Path

import pytest
import torch

from tenfold_bip import (
    CheckpointError,
    bake_masks,
    create_model,
    dense_state,
    fix_masks,
    get_masks,
    load_official_checkpoint,
    mask_iou,
    model_names,
    prune_parametrize,
    to_official,
)
from tenfold_bip.compat import layerwise_dense_state, load_official_state, official_state, recognise_architecture
from tenfold_shared.errors import UserError


def masked(keep: float = 0.3, structure: str = "global") -> torch.nn.Module:
    torch.manual_seed(0)
    return prune_parametrize(create_model("resnet20s"), keep, structure, scores_init="random").eval()


@pytest.mark.parametrize("arch", model_names())
def test_every_architecture_is_recognised(arch: str) -> None:
    for options in ({}, {"legacy_sub_block": True}) if arch.startswith("wrn") else ({},):
        with torch.device("meta"):
            state = create_model(arch, 37, **options).state_dict()
        assert recognise_architecture(state) == arch


def test_key_names_and_order_of_the_release() -> None:
    keys = list(official_state(masked()))
    assert keys[:3] == ["conv1.weight", "conv1.popup_scores", "bn1.weight"]
    assert keys[-3:] == ["fc.weight", "fc.bias", "fc.popup_scores"]
    names = set(official_state(create_model("resnet18")))
    assert {"layer2.0.shortcut.0.weight", "layer2.0.shortcut.1.running_mean", "linear.bias"} <= names
    assert "layer2.0.downsample.0.weight" in official_state(create_model("ResNet18", 20))
    assert {"features.0.weight", "classifier.4.bias"} <= set(official_state(create_model("vgg11_bn")))
    wide = official_state(create_model("wrn_28_1", legacy_sub_block=True))
    assert {"block2.layer.0.convShortcut.weight", "sub_block1.layer.3.conv2.weight", "fc.weight"} <= set(wide)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("bare", [False, True])
def test_file_round_trip(tmp_path: Path, prefix: str, bare: bool) -> None:
    model = masked()
    checkpoint = to_official(model, arch="resnet20s", epoch=3, best_prec1=91.5)
    assert set(checkpoint) == {"epoch", "arch", "state_dict", "best_prec1", "optimizer"}
    state = {prefix + name: value for name, value in reversed(checkpoint["state_dict"].items())}
    path = tmp_path / ("model.pt" if bare else "checkpoint.pth.tar")
    torch.save(state if bare else checkpoint | {"state_dict": state}, path)
    loaded = load_official_checkpoint(path, keep=0.3).eval()
    assert mask_iou(get_masks(loaded), get_masks(model)) == 1.0
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))


def test_dense_files_have_no_scores() -> None:
    model = create_model("resnet20s", 7).eval()
    loaded = load_official_checkpoint(model.state_dict()).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))
    target = prune_parametrize(create_model("resnet20s", 7), 0.5)
    masks = get_masks(target)
    load_official_state(target, model.state_dict())  # missing scores are tolerated, masks stay
    assert mask_iou(get_masks(target), masks) == 1.0
    torch.testing.assert_close(official_state(target)["fc.weight"], model.fc.weight.detach())


def test_structured_files_need_to_be_told() -> None:
    model = masked(0.5, "filter")
    state = official_state(model)
    with pytest.raises(CheckpointError, match="give keep"):
        load_official_checkpoint(state)
    with pytest.raises(CheckpointError, match="'filter' or 'channel'"):
        load_official_checkpoint(state, keep=0.5)
    loaded = load_official_checkpoint(state, keep=0.5, structure="filter")
    assert mask_iou(get_masks(loaded), get_masks(model)) == 1.0


def test_wrong_and_partial_files_are_refused_with_their_keys() -> None:
    state = dict(create_model("resnet20s").state_dict())
    with pytest.raises(CheckpointError, match=r"does not fit resnet32s: missing layer1\.3\.conv1\.weight"):
        load_official_checkpoint(state, "resnet32s")
    partial = {name: value for name, value in state.items() if not name.startswith("layer2.1.")}
    with pytest.raises(CheckpointError, match=r"nearest being resnet20s: missing layer2\.1\.conv1\.weight"):
        load_official_checkpoint(partial)
    with pytest.raises(CheckpointError, match=r"unexpected extra\.weight"):
        load_official_checkpoint(state | {"extra.weight": torch.ones(2)}, "resnet20s")
    with pytest.raises(CheckpointError, match=r"bn1\.bias has shape \(17,\) instead of \(16,\)"):
        load_official_checkpoint(state | {"bn1.bias": torch.ones(17)}, "resnet20s")
    scored = official_state(masked())
    del scored["layer1.0.conv1.popup_scores"]
    with pytest.raises(CheckpointError, match=r"missing layer1\.0\.conv1\.popup_scores"):
        load_official_checkpoint(scored, keep=0.3)
    for nonsense in ({}, {"state_dict": {}}, {"a": 3}):
        with pytest.raises(CheckpointError, match="no state dict"):
            load_official_checkpoint(nonsense)
    with pytest.raises(CheckpointError, match="no linear layer"):
        load_official_checkpoint({"a": torch.ones(3)})


class Malicious:
    """Would create a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_damaged_and_malicious_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint at"):
        load_official_checkpoint(tmp_path / "absent.pt")
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"state_dict": Malicious(tmp_path / "ran")}, path)
    with pytest.raises(UserError, match=r"holds an object of .*mkdir"):
        load_official_checkpoint(path)
    assert not (tmp_path / "ran").exists()
    torch.save(create_model("resnet20s").state_dict(), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"checkpoint\.pth\.tar"):
        load_official_checkpoint(path)
    path.write_text("hello")
    with pytest.raises(UserError, match=r"checkpoint\.pth\.tar"):
        load_official_checkpoint(str(path))


def test_dense_export_uses_the_real_masks() -> None:
    model = masked()
    state = dense_state(model)
    by_layer = layerwise_dense_state(official_state(model), 0.3)
    plain = load_official_checkpoint(state).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x))
    differing = [name for name in state if not torch.equal(state[name], by_layer[name])]
    assert "layer3.0.conv2.weight" in differing  # the release's export is another mask
    torch.testing.assert_close(bake_masks(model).state_dict(), state)


def test_fixed_masks_are_exported_as_scores() -> None:
    model = masked()
    masks = get_masks(model)
    fix_masks(model, masks)
    loaded = load_official_checkpoint(to_official(model, arch="resnet20s"), keep=0.3)
    assert mask_iou(get_masks(loaded), masks) == 1.0


def test_a_mask_buffer_of_ones_is_ignored() -> None:
    state = dict(create_model("resnet20s").state_dict())
    load_official_checkpoint(state | {"conv1.weight_mask": torch.ones(16, 3, 3, 3)})
