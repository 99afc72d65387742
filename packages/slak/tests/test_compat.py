"""The authors' files in and out, ConvNeXt weights, downstream networks, the receptive field."""

import argparse
import copy
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tenfold_slak.compat import (
    CheckpointError,
    from_convnext,
    infer_arguments,
    load_official_checkpoint,
    to_convnext,
    to_official,
)  # fmt: skip
from tenfold_slak.downstream import SLaKBackbone, UPerNet, _starts, faster_rcnn, mask_rcnn
from tenfold_slak.erf import contribution_maps, effective_receptive_field, plot, rectangle
from tenfold_slak.evaluate import load_model
from tenfold_slak.layer import merge_large_kernels
from tenfold_slak.models.slak import SLaK, create

SMALL = {
    "depths": (1, 1, 2, 1),
    "dims": (6, 8, 12, 16),
    "kernel_sizes": (21, 13, 7, 5),
    "small_kernel": 3,
    "num_classes": 5,
}
VARIETY = [
    {},
    {"decomposed": False},
    {"decomposed": False, "kernel_sizes": (7, 7, 7, 7), "small_kernel": 100},
    {"bn": False},
    {"layer_scale_init": 0.0, "in_chans": 1},
    {"stem_stride": 2},
]


def small(**more) -> SLaK:
    model = SLaK(**{**SMALL, **more})
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.normal_(std=0.3)
            if "running_var" in name:
                tensor.abs_().add_(0.5)
    return model.eval()


@pytest.mark.parametrize("arguments", VARIETY, ids=str)
def test_released_layout_round_trip(arguments: dict, tmp_path: Path) -> None:
    model = small(**arguments)
    path = tmp_path / "checkpoint-best.pth"
    torch.save({**to_official(model), "epoch": "best", "args": argparse.Namespace(lr=4e-3), "optimizer": {}}, path)
    loaded = load_official_checkpoint(path).eval()
    x = torch.randn(1, arguments.get("in_chans", 3), 64, 64)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_prefixes_and_average() -> None:
    model, other = small(), small()
    content = {
        "model": {f"module.{k}": v for k, v in model.state_dict().items()},
        "model_ema": other.state_dict(),
    }
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(load_official_checkpoint(content).eval()(x), model(x))
    torch.testing.assert_close(load_official_checkpoint(content, weights="model_ema").eval()(x), other(x))
    with pytest.raises(CheckpointError, match="no 'ema'"):
        load_official_checkpoint(content, weights="ema")


def test_merged_files_load() -> None:
    model = small()
    merged = merge_large_kernels(copy.deepcopy(model), "one")
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(load_official_checkpoint(to_official(merged)).eval()(x), model(x), rtol=1e-4, atol=1e-4)


def test_full_size_layout() -> None:
    with torch.device("meta"):
        model = create("slak_tiny")
    state = model.state_dict()
    assert len(state) == 470
    assert state["stages.2.8.large_kernel.LoRA1.conv.weight"].shape == (499, 1, 47, 5)
    assert state["stages.2.8.large_kernel.LoRA2.conv.weight"].shape == (499, 1, 5, 47)
    arguments = infer_arguments(state)
    assert arguments["depths"] == (3, 3, 9, 3)
    assert arguments["dims"] == (124, 249, 499, 998)
    assert arguments["kernel_sizes"] == (51, 49, 47, 13)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    state = small().state_dict()
    with pytest.raises(CheckpointError, match=r"missing head\.bias"):
        load_official_checkpoint({k: v for k, v in state.items() if k != "head.bias"})
    with pytest.raises(CheckpointError, match="unexpected extra"):
        load_official_checkpoint({**state, "extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"norm\.weight is \(3,\), should be \(16,\)"):
        load_official_checkpoint({**state, "norm.weight": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="not the weights of a SLaK"):
        load_official_checkpoint({"conv1.weight": torch.zeros(3, 3)})
    with pytest.raises(CheckpointError, match="2 keys do not fit"):
        load_official_checkpoint(state, small(num_classes=4))
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_official_checkpoint(tmp_path / "absent.pth")
    torch.save(state, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"cut\.pth is truncated or corrupted"):
        load_official_checkpoint(tmp_path / "cut.pth")


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError):
        load_official_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


def test_convnext_there_and_back() -> None:
    model = small(**VARIETY[2])
    plain = to_convnext(model)
    assert "stages.0.0.dwconv.bias" in plain
    x = torch.randn(1, 3, 64, 64)
    for read in (from_convnext(plain), load_official_checkpoint({"model": plain})):
        torch.testing.assert_close(read.eval()(x), model(x), rtol=1e-4, atol=1e-4)


def timm_convnext(**more) -> torch.nn.Module:
    model = timm.create_model("convnext_tiny", depths=(1, 1, 2, 1), dims=(6, 8, 12, 16), num_classes=5, **more)
    for tensor in model.state_dict().values():
        tensor.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("arguments", [{}, {"in_chans": 1, "ls_init_value": None}], ids=str)
def test_convnexts_of_timm_are_read(arguments: dict, tmp_path: Path) -> None:
    model = timm_convnext(**arguments)
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})  # as hubs keep them
    x = torch.randn(2, arguments.get("in_chans", 3), 64, 96)
    for read in (from_convnext(model.state_dict()), load_model(tmp_path / "model.safetensors")[0].eval()):
        ours = read.eval()
        torch.testing.assert_close(ours.forward_features(x), model.forward_features(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match=r"unexpected stages\.0\.0\.extra"):
        from_convnext({**model.state_dict(), "stages.0.blocks.0.extra": torch.zeros(1)})


def test_backbone_takes_classifiers_and_keeps_zeros() -> None:
    model = small()
    weight = model.stages[0][0].pwconv1.weight
    weight.data[torch.rand_like(weight) < 0.5] = 0
    zeros = weight == 0
    backbone = SLaKBackbone(SLaK(**{**SMALL, "num_classes": 0})).load(model.state_dict())
    maps = backbone(torch.randn(1, 3, 64, 64))
    assert [tuple(m.shape) for m in maps.values()] == [(1, 6, 16, 16), (1, 8, 8, 8), (1, 12, 4, 4), (1, 16, 2, 2)]
    backbone.stages[0][0].pwconv1.weight.data.fill_(1)
    backbone(torch.randn(1, 3, 64, 64))
    assert torch.equal(backbone.stages[0][0].pwconv1.weight == 0, zeros)
    again = SLaKBackbone(SLaK(**SMALL)).load({f"backbone.{k}": v for k, v in backbone.state_dict().items()})
    torch.testing.assert_close(again.state_dict(), backbone.state_dict())
    with pytest.raises(CheckpointError, match=r"stages\.0"):
        backbone.load({k: v for k, v in model.state_dict().items() if not k.startswith("stages.0")})


def test_the_backbone_of_a_detector_or_segmenter_is_taken_out_of_it() -> None:
    source = SLaKBackbone(SLaK(**{**SMALL, "num_classes": 0}))
    heads = {"neck.a": torch.ones(1), "rpn_head.b": torch.ones(1), "decode_head.c": torch.ones(1)}
    for prefix in ("backbone.", "module.backbone."):
        file = {"state_dict": {**{prefix + name: value for name, value in source.state_dict().items()}, **heads}}
        target = SLaKBackbone(SLaK(**{**SMALL, "num_classes": 0})).load(file)
        for name, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[name], value), name
        network = load_official_checkpoint(file)
        assert torch.equal(network.stages[0][0].pwconv1.weight, source.stages[0][0].pwconv1.weight)


def test_layers_without_released_names_are_not_written() -> None:
    for network in (merge_large_kernels(SLaK(**SMALL), "two"), SLaK(**SMALL, layer="stack")):
        for write in (to_official, to_convnext):
            with pytest.raises(ValueError, match="no names for"):
                write(network)


def test_upernet_learns_and_slides() -> None:
    net = UPerNet(SLaKBackbone(SLaK(**SMALL)), 4, channels=16, auxiliary_channels=8)
    x, labels = torch.randn(2, 3, 64, 96), torch.randint(4, (2, 64, 96))
    labels[:, :4] = 255
    loss = net.loss(x, labels)
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())
    net.eval()
    assert net(x).shape == (2, 4, 64, 96)
    assert net.slide(x, 64, 40).shape == (2, 4, 64, 96)
    torch.testing.assert_close(net.slide(x, 128, 100), net(x))
    with pytest.raises(ValueError, match="leave pixels out"):
        net.slide(x, 32, 48)
    assert _starts(100, 64, 40) == [0, 36]
    assert _starts(104, 64, 40) == [0, 40]


def test_the_segmentation_loss_is_the_mean_over_known_pixels() -> None:
    """As PyTorch takes it, but for a batch without any, which is worth nothing."""
    net = UPerNet(SLaKBackbone(SLaK(**SMALL)), 4, channels=16, auxiliary_channels=8).eval()
    x, labels = torch.randn(2, 3, 64, 64), torch.randint(4, (2, 64, 64))
    labels[:, :5] = 255
    maps = list(net.backbone(x).values())
    main, auxiliary = (
        F.interpolate(scores, size=(64, 64), mode="bilinear")
        for scores in (net.decode_head(maps), net.auxiliary_head(maps[2]))
    )
    losses = [F.cross_entropy(scores, labels, ignore_index=255) for scores in (main, auxiliary)]
    assert torch.equal(net.loss(x, labels), losses[0] + 0.4 * losses[1])
    nothing = net.loss(x, torch.full_like(labels, 255))
    nothing.backward()
    assert nothing == 0
    assert not any(p.grad.any() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("build", [faster_rcnn, mask_rcnn])
def test_detectors(build) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    net = build(SLaKBackbone(SLaK(**SMALL)), 3, 16, min_size=64, max_size=96)
    target = {"boxes": torch.tensor([[3.0, 3, 30, 30]]), "labels": torch.tensor([1])}
    target["masks"] = torch.ones(1, 64, 64, dtype=torch.uint8)
    losses = net.train()([torch.rand(3, 64, 64)], [target])
    assert all(torch.isfinite(value) for value in losses.values())
    assert set(net.eval()([torch.rand(3, 64, 64)])[0]) >= {"boxes", "labels", "scores"}


def test_contribution_by_finite_differences() -> None:
    """The map is the sum over channels of relu of the derivative of the centre's relu sum."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(2, 3, 3, stride=2, padding=1).double()
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64)

    def centre(image: torch.Tensor) -> torch.Tensor:
        maps = conv(image)
        return maps[:, :, maps.shape[2] // 2, maps.shape[3] // 2].relu().sum()

    expected = torch.zeros(6, 6, dtype=torch.float64)
    for c in range(2):
        for i in range(6):
            for j in range(6):
                step = torch.zeros_like(x)
                step[0, c, i, j] = 1e-6
                expected[i, j] += ((centre(x + step) - centre(x - step)) / 2e-6).clamp(min=0)
    torch.testing.assert_close(contribution_maps(conv, x)[0], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("size", [8, 9])
def test_rectangles_by_loops(size: int) -> None:
    field = torch.rand(size, size, dtype=torch.float64)
    centre = size // 2
    for share in (0.0, 0.1, 0.4, 0.8, 0.9999):
        expected = (0, 0.0)
        for i in range(size - centre):
            if centre - i < 0:
                break
            part = field[centre - i : centre + i + 1, centre - i : centre + i + 1].sum() / field.sum()
            if part > share:
                expected = (2 * i + 1, ((2 * i + 1) / size) ** 2)
                break
        assert rectangle(field, share) == pytest.approx(expected)


def test_larger_kernels_see_farther(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = [torch.randn(2, 3, 128, 128)]
    fields = {}
    for kernel in (3, 13):
        model = SLaK(**{**SMALL, "kernel_sizes": (kernel,) * 4, "layer_scale_init": 1.0})
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        fields[f"{kernel}x{kernel}"] = effective_receptive_field(model, images)
        assert model.training
    sides = [field.rectangles[0.5].side for field in fields.values()]
    assert sides[0] < sides[1]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plot(fields, tmp_path / "erf.png")
    assert (tmp_path / "erf.png").stat().st_size > 1000


def test_refused_receptive_fields() -> None:
    with pytest.raises(ValueError, match="before pooling"):
        contribution_maps(small(), torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match="at least one image"):
        effective_receptive_field(small(), [])
    with pytest.raises(ValueError, match="square images"):
        effective_receptive_field(small(), [torch.randn(1, 3, 64, 96)])
