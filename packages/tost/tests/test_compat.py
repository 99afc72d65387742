"""The authors' layout: names, order, masks by zeros, and what is refused."""

from pathlib import Path

import pytest
import torch

from tenfold_shared.errors import UserError
from tenfold_tost import (
    CheckpointError,
    Ghosts,
    Skips,
    SparseRecipe,
    apply_masks,
    create_model,
    erk_masks,
    ghost_skips,
    load_compact,
    load_official_checkpoint,
    masks_from_zeros,
    save_compact,
    sparsify,
    to_official,
)
from tenfold_tost.compat import restore

SKIPS = SparseRecipe(soft=None, skips=Skips(constant=True), smoothing=None, lrsi=None)


@pytest.mark.parametrize("arch", ["resnet18", "oresnet20", "resnet20s", "digits_net", "mobilenet"])
def test_round_trip(arch: str, tmp_path: Path) -> None:
    """Written as a pruned file and read again: the same network, recognised, its mask in its zeros."""
    model = create_model(arch)
    masks = erk_masks(model, 0.2)
    apply_masks(model, masks)
    torch.save(to_official(model, epoch=3, acc=90.0), tmp_path / "pruned.pth.tar")
    read = load_official_checkpoint(tmp_path / "pruned.pth.tar")
    assert type(read) is type(model)
    for name, value in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], value)
    for name, mask in masks_from_zeros(read).items():  # a weight may be drawn as exactly zero
        assert torch.equal(mask, masks[name] & (model.get_parameter(name) != 0))


def test_ghost_skips_have_their_released_names_and_places() -> None:
    model = create_model("resnet18", 100)
    Ghosts(model, SKIPS, torch.zeros(1, 3, 32, 32))
    content = to_official(model)
    keys = list(content["state_dict"])
    first = keys.index("layer2.0.conv_jump1.weight")
    assert keys[first - 1] == "layer2.0.bn2.num_batches_tracked"
    assert keys[first + 1 : first + 3] == ["layer2.0.conv_jump2.weight", "layer2.0.conv_jump1_bn.weight"]
    assert keys.index("layer2.0.shortcut.0.weight") == first + 12
    read = load_official_checkpoint({"state_dict": {f"module.{k}": v for k, v in content["state_dict"].items()}})
    assert len(ghost_skips(read)) == 16
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(read.eval()(x), model.eval()(x))


def test_pairs_of_weights_and_masks() -> None:
    model = create_model("oresnet20")
    masks = erk_masks(model, 0.3)
    state = {}
    for name, value in model.state_dict().items():
        state |= {f"{name}_orig": value, f"{name}_mask": masks[name].float()} if name in masks else {name: value}
    read = load_official_checkpoint(state)
    assert torch.equal(read.conv1.weight, model.conv1.weight * masks["conv1.weight"])


def test_misfits_are_listed(tmp_path: Path) -> None:
    state = create_model("oresnet20").state_dict()
    with pytest.raises(CheckpointError, match=r"missing layer1\.0\.conv1\.weight"):
        restore({k: v for k, v in state.items() if k != "layer1.0.conv1.weight"}, "oresnet20")
    with pytest.raises(CheckpointError, match="nearest being oresnet20: unexpected extra"):
        restore({**state, "extra": torch.ones(1)})
    with pytest.raises(CheckpointError, match="has shape"):
        restore({**state, "conv1.weight": torch.ones(1, 3, 3, 3)}, "oresnet20")
    with pytest.raises(CheckpointError, match="Unknown"):
        restore(state, "resnet99")
    with pytest.raises(CheckpointError, match="linear layer"):
        restore({"a.weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match="no state dict"):
        load_official_checkpoint({"epoch": 3})
    skipped = create_model("oresnet20")
    Ghosts(skipped, SKIPS, torch.zeros(1, 3, 32, 32))
    partial = {k: v for k, v in skipped.state_dict().items() if not k.startswith("layer3.0.conv1.ghost_skip")}
    with pytest.raises(CheckpointError, match=r"missing the skip around layer3\.0\.conv1"):
        restore(partial)
    (tmp_path / "broken.pth.tar").write_bytes(b"no checkpoint")
    for name in ("broken.pth.tar", "absent.pth.tar"):
        with pytest.raises(UserError, match=name):
            load_official_checkpoint(tmp_path / name)


@pytest.mark.parametrize(("arch", "size"), [("digits_net", (1, 8, 8)), ("vgg16_bn", (3, 32, 32))])
def test_sparse_convolutions_give_the_same(arch: str, size: tuple[int, ...], tmp_path: Path) -> None:
    """The compact file is smaller, expands to the very same weights, and the sparse product gives the same outputs."""
    torch.manual_seed(0)
    model = create_model(arch).eval()
    apply_masks(model, erk_masks(model, 0.05))
    save_compact(tmp_path / "compact.safetensors", model, arch=arch)
    assert (tmp_path / "compact.safetensors").stat().st_size < 0.35 * 4 * sum(p.numel() for p in model.parameters())
    state, about = load_compact(tmp_path / "compact.safetensors")
    assert about["arch"] == arch
    read = restore(state, arch)
    assert all(torch.equal(value, read.state_dict()[name]) for name, value in model.state_dict().items())
    x = torch.randn(3, *size)
    with torch.inference_mode():
        torch.testing.assert_close(sparsify(model, 1.0, channels=1)(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (2, 5), "stride": (3, 2), "padding": (1, 4), "bias": False},
        {"kernel_size": (3, 2), "stride": 2, "dilation": (3, 1)},
        {"kernel_size": 1, "stride": 4},
    ],
)
@pytest.mark.parametrize("size", [(9, 12), (12, 9)])
def test_sparse_convolutions_of_any_shape(options: dict, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    dense = torch.nn.Conv2d(6, 7, **options)
    with torch.no_grad():
        dense.weight *= torch.rand_like(dense.weight) < 0.2
    sparse = sparsify(torch.nn.Sequential(dense), below=1.0, channels=1)
    assert not isinstance(sparse[0], torch.nn.Conv2d)
    for x in (torch.randn(2, 6, *size), torch.randn(6, 2, *size).transpose(0, 1), torch.randn(0, 6, *size)):
        torch.testing.assert_close(sparse(x), dense(x).detach())


def test_narrow_and_dense_convolutions_stay_dense() -> None:
    model = torch.nn.Sequential(*(torch.nn.Conv2d(128, width, 1) for width in (128, 127, 128)))
    for conv, density in zip(model, (0.05, 0.05, 0.5), strict=True):
        conv.weight.data *= torch.rand_like(conv.weight) < density
    assert [isinstance(layer, torch.nn.Conv2d) for layer in sparsify(model)] == [False, True, True]


def test_convolutions_whose_padding_is_a_word_stay_dense() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3, padding="same"), torch.nn.Conv2d(3, 3, 3, padding=1))
    for conv in model:
        torch.nn.init.zeros_(conv.weight)
    sparse, x = sparsify(model, channels=1), torch.randn(1, 2, 5, 5)
    assert isinstance(sparse[0], torch.nn.Conv2d)
    assert not isinstance(sparse[1], torch.nn.Conv2d)
    torch.testing.assert_close(sparse(x), model(x).detach())


def test_other_files_are_no_compact_files(tmp_path: Path) -> None:
    from tenfold_shared.checkpoint import save_weights  # noqa: PLC0415

    save_weights(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    with pytest.raises(UserError, match="compact"):
        load_compact(tmp_path / "x.safetensors")
    save_weights(tmp_path / "y.safetensors", {"a": torch.ones(1)}, {"csr_shapes": {"w": [2, 2]}})
    with pytest.raises(UserError, match="incomplete"):
        load_compact(tmp_path / "y.safetensors")
