"""Layers, networks, counts, merging, timm, export."""

import copy
import subprocess
import sys
import textwrap

import jaxtyping
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tenfold_slak
from tenfold_slak.downstream import SLaKBackbone, UPerNet
from tenfold_slak.export import branch_scores, export_onnx, export_program
from tenfold_slak.layer import Branch, DilatedKernel, LargeKernel, SmallKernelStack, merge_large_kernels
from tenfold_slak.macs import count_macs, count_parameters, macs_by_layer
from tenfold_slak.masks import initial_masks, maskable_parameters
from tenfold_slak.models.slak import VARIANTS, SLaK, create
from tenfold_slak.profile import profile_layers

TINY = {
    "depths": (1, 1, 2, 1),
    "dims": (6, 8, 12, 16),
    "kernel_sizes": (21, 13, 7, 5),
    "small_kernel": 3,
    "num_classes": 5,
}


def shaken(model: nn.Module) -> nn.Module:
    """Random weights and running statistics, so that nothing is hidden behind zeros, ones and tiny layer scales."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.2, 0.9).mul_(
                torch.where(torch.rand_like(tensor) < 0.5, -1.0, 1.0)
            ) if tensor.ndim != 1 else (tensor.uniform_(0.2, 0.9))
    return model


def tiny(**more) -> SLaK:
    return shaken(SLaK(**{**TINY, **more}))


# Table of section 3: stored parameters, maskable ones, multiply-adds in G at 224 pixels; None where it states nothing.
TABLE = {
    "slak_tiny": (50_703_838, 50_576_524, 8.705),
    "slak_tiny_31": (49_581_838, 49_454_524, 8.178),
    "slak_tiny_61": (51_264_838, 51_137_524, 8.968),
    "slak_small": (91_131_820, 90_878_758, 16.604),
    "slak_base": (157_950_792, 157_613_790, 28.509),
    "slak_tiny_narrow": (30_816_232, 30_717_984, None),
    "replknet_tiny_51": (38_605_768, 38_520_768, 9.353),
    "replknet_tiny_31": (None, None, 6.165),
    "slak_tiny_convnext": (28_595_752, 28_524_000, 4.456),
    "slak_small_convnext": (None, None, 8.684),
    "slak_base_convnext": (None, None, 15.355),
}


@pytest.mark.parametrize("name", TABLE)
def test_counts_of_the_paper(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda weight, **_: weight)  # hundreds of millions of draws
    parameters, maskable, macs = TABLE[name]
    model = create(name)
    if parameters is not None:
        assert count_parameters(model).stored == parameters
        assert sum(p.numel() for p in maskable_parameters(model).values()) == maskable
    if macs is not None:
        assert round(count_macs(model).stored / 1e9, 3) == macs


def test_the_segmenter_has_the_published_size_on_convnext(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 M parameters, 939 G multiply-adds at 512 x 2048 (README table); norms and activations are not counted here."""
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda weight, **_: weight)
    segmenter = UPerNet(SLaKBackbone(create("slak_tiny_convnext")))
    assert round(count_parameters(segmenter).stored / 1e6) == 60
    assert count_macs(segmenter, (512, 2048)).stored / 1e9 == pytest.approx(939, abs=1)


def test_counts_at_uniform_masks() -> None:
    model = create("slak_tiny")
    expected = 0.6 * count_macs(model).stored
    for name, mask in initial_masks(model, 0.4, "uniform").items():
        model.get_parameter(name).data.mul_(mask)
    assert count_macs(model).nonzero == pytest.approx(expected, rel=2e-3)
    assert count_macs(model).nonzero == pytest.approx(5.223e9, rel=2e-3)
    others = 50_703_838 - 50_576_524
    zeros = sum(p.numel() for n, p in model.named_parameters() if n.endswith(".bias") or "gamma" in n)
    assert 0.6 * 50_576_524 * 0.999 < count_parameters(model).nonzero < 0.6 * 50_576_524 * 1.001 + others
    assert zeros > 0


def test_counts_by_loops() -> None:
    """Hand-counted: weights x positions."""
    model = tiny()
    expected = 0
    for name, p in model.named_parameters():
        if p.ndim not in {2, 4}:
            continue
        part = name.split(".")
        stage = int(part[1]) if part[0] in {"stages", "downsample_layers"} else None
        positions = 1 if stage is None else (64 // (4 * 2**stage)) ** 2
        expected += p.numel() * positions
    assert count_macs(model, 64).stored == expected
    assert sum(c.stored for c in macs_by_layer(model, 64).values()) == expected
    merged = merge_large_kernels(copy.deepcopy(model), "two")
    assert count_macs(merged, 64).stored < expected


def test_a_layer_that_is_used_twice_counts_twice() -> None:
    layer = nn.Conv2d(3, 3, 1, bias=False)
    assert count_macs(nn.Sequential(layer, layer), 8).stored == 2 * 9 * 64


def test_widths_are_truncated() -> None:
    assert create("slak_base", depths=(1, 1, 1, 1)).widths == (166, 332, 665, 1331)


def test_drop_path_rises_over_all_blocks() -> None:
    model = SLaK(**TINY, drop_path_rate=0.4)
    rates = [block.drop_path.rate for stage in model.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    x = torch.ones(2000, 1)
    dropped = model.stages[3][0].drop_path.train()(x)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert float(dropped.mean()) == pytest.approx(1, abs=0.06)


def test_initial_weights() -> None:
    model = SLaK(**{**TINY, "dims": (60, 64, 70, 80)}, head_init_scale=0.5)
    weight = model.stages[2][0].pwconv1.weight
    assert float(weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(model.head.weight.std()) == pytest.approx(0.01, rel=0.2)
    assert not model.stages[0][0].pwconv1.bias.any()
    assert model.stages[0][0].gamma.eq(1e-6).all()
    assert SLaK(**TINY, layer_scale_init=0.0).stages[0][0].gamma is None


@settings(max_examples=15, deadline=None)
@given(
    size=st.tuples(st.integers(2, 12), st.integers(2, 12)),
    kernel=st.sampled_from([5, 9, 25]),
    decomposed=st.booleans(),
    bn=st.booleans(),
)
def test_merging_is_exact(size: tuple[int, int], kernel: int, decomposed: bool, bn: bool) -> None:
    layer = shaken(LargeKernel(3, kernel, 3, decomposed, bn).double()).eval()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = sum((b.bn or nn.Identity())(b.conv(x)) for b in layer.children())
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    for form in ("two", "one"):
        torch.testing.assert_close(layer.merged(form)(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["conv2d", "direct", "toeplitz", "fft"])
def test_eval_mode_is_differentiable(backend: str) -> None:
    gradients = []
    for name in ("conv2d", backend):
        torch.manual_seed(0)
        layer = shaken(LargeKernel(2, 7, 3, backend=name)).eval()
        merged = layer.merged("two")
        x = torch.randn(1, 2, 6, 5, requires_grad=True)
        (layer(x) + merged(x)).square().sum().backward()
        gradients.append([x.grad, layer.LoRA2.conv.weight.grad, merged.wide.grad])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_a_merged_cross_has_the_taps_of_its_rectangles() -> None:
    kernel, _ = shaken(LargeKernel(2, 51, 5)).folded_one()
    assert int(kernel[0].count_nonzero()) == 2 * 51 * 5 - 5 * 5 == 485


@pytest.mark.parametrize(("kernel", "small"), [(51, 5), (31, 5), (13, 3), (7, 7)])
def test_baseline_layers_reach_as_far_at_a_like_cost(kernel: int, small: int) -> None:
    dilated, stack = DilatedKernel(4, kernel, small), SmallKernelStack(4, kernel, small)
    wanted = 2 * kernel * small + small**2
    spacing, side = dilated.conv.dilation[0], dilated.conv.kernel_size[0]
    assert kernel - 2 * spacing < spacing * (side - 1) + 1 <= kernel
    odd = [(kernel - 1) // (2 * apart) * 2 + 1 for apart in range(1, kernel)]
    assert abs(side**2 - wanted) == min(abs(n**2 - wanted) for n in odd)
    assert side**2 <= 1.5 * wanted
    assert wanted - small**2 < sum(branch.conv.weight[0].numel() for branch in stack) <= wanted
    x = torch.randn(2, 4, 12, 9)
    assert dilated(x).shape == stack(x).shape == x.shape


def test_profile_counts_all_multiply_adds() -> None:
    rows = profile_layers(tiny().eval(), 64, 1, 1)
    assert sum(row.macs for row in rows) == count_macs(tiny(), 64).stored
    assert sum(row.kind is LargeKernel for row in rows) == 5
    assert all(row.seconds > 0 for row in rows)


def test_swapped_rectangles_are_seen() -> None:
    """Tall and wide kernels have different roles."""
    layer = shaken(LargeKernel(2, 7, 3)).eval()
    x = torch.randn(1, 2, 9, 9)
    y = layer(x)
    tall, wide = layer.LoRA1.conv.weight, layer.LoRA2.conv.weight
    tall.data, wide.data = wide.data.transpose(2, 3).clone(), tall.data.transpose(2, 3).clone()
    assert not torch.allclose(layer(x), y)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_timm_knows_every_variant(name: str) -> None:
    assert timm.is_model(name)
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7)
    assert model.head.out_features == 7
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
    assert model.default_cfg["crop_pct"] == 0.875


def test_timm_features_only() -> None:
    arguments = {k: v for k, v in TINY.items() if k != "num_classes"}
    model = timm.create_model("slak_tiny", features_only=True, width_factor=1.0, **arguments)
    maps = model(torch.randn(1, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(1, 6, 16, 16), (1, 8, 8, 8), (1, 12, 4, 4), (1, 16, 2, 2)]
    assert model.feature_info.channels() == [6, 8, 12, 16]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    early = timm.create_model("slak_tiny", features_only=True, out_indices=(0, 1), width_factor=1.0, **arguments)
    assert len(early(torch.randn(1, 3, 64, 64))) == 2
    assert sum(p.numel() for p in early.parameters()) < sum(p.numel() for p in model.parameters()) / 2


def test_stages_that_there_are_not_are_refused() -> None:
    """Other networks of timm's have a stage more; its number taken for another stage's would go unnoticed."""
    arguments = {key: value for key, value in TINY.items() if key != "num_classes"}
    with pytest.raises(ValueError, match="4 stages"):
        timm.create_model("slak_tiny", features_only=True, out_indices=(1, 2, 3, 4), width_factor=1.0, **arguments)
    model, x = tiny(), torch.zeros(1, 3, 64, 64)
    assert [m.shape[-1] for m in model.forward_intermediates(x, 2, intermediates_only=True)] == [4, 2]
    assert [m.shape[-1] for m in model.forward_intermediates(x, [-4, -1], intermediates_only=True)] == [16, 2]
    for wrong in (5, [-5], [0, 7]):
        with pytest.raises(ValueError, match="4 stages"):
            model.forward_intermediates(x, wrong)


def test_timm_classifier_conventions() -> None:
    model = tiny().eval()
    x = torch.randn(1, 3, 64, 64)
    assert model(x).shape == (1, 5)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (1, 16)
    model.reset_classifier(0)
    assert model(x).shape == (1, 16)
    model.reset_classifier(3, global_pool="")
    assert model(x).shape == (1, 3, 2, 2)


def test_grad_checkpointing_changes_nothing() -> None:
    """Neither the gradients nor, however often a block is recomputed, the running statistics."""
    gradients, statistics = [], []
    for enable in (False, True):
        torch.manual_seed(1)
        model = tiny().train()
        model.set_grad_checkpointing(enable)
        loss = model(torch.ones(2, 3, 64, 64).cumsum(2) / 64).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        gradients.append(model.downsample_layers[0][0].weight.grad)
        statistics.append(dict(model.named_buffers()))
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(*statistics, rtol=0, atol=0)


def test_import_is_light_and_registers_later() -> None:
    code = """
        import importlib.util, sys, tenfold_slak
        assert "torch" not in sys.modules and "timm" not in sys.modules
        assert importlib.util.find_spec("timm") and "timm" not in sys.modules  # to ask is not to import
        import timm
        assert "slak_tiny" in timm.list_models()
        from tenfold_slak import SLaK, large_kernel_dwconv
        assert "SLaK" in dir(tenfold_slak)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_every_export_exists() -> None:
    for name in tenfold_slak.__all__:
        assert getattr(tenfold_slak, name) is not None
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = tenfold_slak.nothing_here


@pytest.mark.parametrize("form", ["two", "one", None])
def test_torch_export(form: str | None) -> None:
    model = tiny().eval()
    program = export_program(model, torch.randn(2, 3, 64, 64), form)
    x = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


def test_onnx(tmp_path) -> None:
    disabled = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)  # sizes are tensors while a graph is traced
    try:
        _onnx(tmp_path)
    finally:
        jaxtyping.config.update("jaxtyping_disable", disabled)


def _onnx(tmp_path) -> None:
    onnx_reference = pytest.importorskip("onnx.reference", reason="onnx is not installed")
    model = tiny().train()
    x = torch.randn(2, 3, 64, 64)
    path = tmp_path / "slak.onnx"
    twin = export_onnx(model, x, path)
    assert model.training
    (logits,) = onnx_reference.ReferenceEvaluator(str(path)).run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), branch_scores(model, x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.from_numpy(logits), twin, rtol=1e-3, atol=1e-3)


def test_exports_are_compared_with_the_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eval mode folds as merging does, so a mistake in it changes both alike."""
    model, x = tiny(), torch.randn(2, 3, 64, 64)
    expected = branch_scores(model, x)
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(Branch, "folded", lambda self: (self.conv.weight, torch.zeros(self.conv.out_channels)))
    torch.testing.assert_close(branch_scores(model, x), expected, rtol=0, atol=0)
    assert not torch.allclose(model(x), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kernel_sizes": (21, 12, 7, 5)}, "odd"),
        ({"kernel_sizes": (21, 13, 7, 5), "small_kernel": 7}, "cannot be decomposed"),
        ({"depths": (1, 1, 1)}, "each stage has one entry"),
    ],
)
def test_refused_architectures(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SLaK(**{**TINY, **arguments})


def test_refused_images_and_names() -> None:
    with pytest.raises(ValueError, match="32 x 32"):
        tiny()(torch.randn(1, 3, 64, 31))
    with pytest.raises(ValueError, match="slak_tiny_61"):
        create("slak_huge")
