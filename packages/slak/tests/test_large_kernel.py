"""Every backend against loops, against the plain convolution, and its gradients against finite differences."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenfold_slak import backends, large_kernel
from tenfold_slak.backends.toeplitz import diagonal_sums, toeplitz_matrices
from tenfold_slak.large_kernel import _from_disk, _rule, _to_disk, _tuned, large_kernel_dwconv, large_kernel_pair, tune

DOUBLE = {"dtype": torch.float64}
EXACT = ["direct", "toeplitz", "fft"]
ALL = [*EXACT, "triton"]


def device_of(backend: str) -> torch.device:
    """Where the backend runs here: Triton on the GPU if there is one, else in its interpreter; the rest on the CPU."""
    if backend != "triton":
        return torch.device("cpu")
    pytest.importorskip("triton", reason="Triton is not available on this platform")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def by_loops(x: Tensor, weight: Tensor) -> Tensor:
    """The definition, one output at a time."""
    batch, channels, height, width = x.shape
    kh, kw = weight.shape[2:]
    y = torch.zeros_like(x)
    for b in range(batch):
        for c in range(channels):
            for h in range(height):
                for w in range(width):
                    for i in range(kh):
                        for j in range(kw):
                            row, column = h + i - kh // 2, w + j - kw // 2
                            if 0 <= row < height and 0 <= column < width:
                                y[b, c, h, w] += weight[c, 0, i, j] * x[b, c, row, column]
    return y


@pytest.mark.parametrize("backend", ["conv2d", *ALL])
@pytest.mark.parametrize("kernel", [(7, 3), (3, 7), (11, 3)])
def test_definition(backend: str, kernel: tuple[int, int]) -> None:
    x, weight = torch.randn(2, 2, 5, 4, **DOUBLE), torch.randn(2, 1, *kernel, **DOUBLE)
    where = device_of(backend)
    y = large_kernel_dwconv(x.to(where), weight.to(where), backend).cpu()
    torch.testing.assert_close(y, by_loops(x, weight), rtol=1e-12, atol=1e-12)


def compare(backend: str, x: Tensor, weight: Tensor, tolerance: float, grad: Tensor | None = None) -> None:
    """Values and all gradients against three lines of plain convolution."""
    bias = torch.randn(x.shape[1], dtype=x.dtype)
    leaves = [t.detach().to(device_of(backend)).requires_grad_() for t in (x, weight, bias)]
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    expected = F.conv2d(*leaves, padding=padding, groups=x.shape[1])
    grad = torch.randn_like(expected) if grad is None else grad.to(expected.device)
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    ours = large_kernel_dwconv(leaves[0], leaves[1], backend, leaves[2])
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    for a, b in zip(torch.autograd.grad(ours, leaves, grad), expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@settings(max_examples=25, deadline=None)
@given(
    backend=st.sampled_from(EXACT),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    half=st.tuples(st.integers(0, 12), st.integers(0, 6)),
    wide=st.booleans(),
)
def test_equals_conv2d(backend: str, batch: int, size: tuple[int, int], half: tuple[int, int], wide: bool) -> None:
    kernel = (2 * half[0] + 1, 2 * half[1] + 1)
    kernel = kernel[::-1] if wide else kernel
    if backend == "toeplitz" and not backends.load("toeplitz").supports(torch.empty(0), kernel):
        backend = "fft"
    x = torch.randn(batch, 3, *size, **DOUBLE)
    compare(backend, x, torch.randn(3, 1, *kernel, **DOUBLE), 1e-11)


@pytest.mark.parametrize("height", [7, 14, 15, 28, 33, 56])
@pytest.mark.parametrize("kernel", [(51, 5), (5, 51), (5, 5)])
def test_triton_at_ragged_sizes(height: int, kernel: tuple[int, int]) -> None:
    compare("triton", torch.randn(2, 1, height, height, **DOUBLE), torch.randn(1, 1, *kernel, **DOUBLE), 1e-11)


def test_triton_tiles_larger_maps() -> None:
    compare("triton", torch.randn(1, 1, 130, 9, **DOUBLE), torch.randn(1, 1, 21, 3, **DOUBLE), 1e-11)


@pytest.mark.parametrize("backend", ["conv2d", *ALL])
@pytest.mark.parametrize(("size", "kernel"), [((5, 4), (7, 3)), ((4, 5), (3, 11)), ((3, 3), (3, 3))])
def test_gradcheck(backend: str, size: tuple[int, int], kernel: tuple[int, int]) -> None:
    leaves = [torch.randn(*shape, **DOUBLE) for shape in ((2, 2, *size), (2, 1, *kernel), (2,))]
    x, weight, bias = (t.to(device_of(backend)).requires_grad_() for t in leaves)
    fast = backend == "triton"  # its interpreter takes too long for the full Jacobian
    function = lambda *t: large_kernel_dwconv(t[0], t[1], backend, t[2])  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, weight, bias), fast_mode=fast)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backend", ["auto", "conv2d", "toeplitz"])
def test_a_pair_is_the_sum_of_its_kernels(backend: str, channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, bias = torch.randn(5, 2, 6, 4, **DOUBLE), torch.randn(2, **DOUBLE)
    tall, wide = torch.randn(2, 1, 9, 3, **DOUBLE), torch.randn(2, 1, 3, 9, **DOUBLE)
    expected = large_kernel_dwconv(x, tall, "conv2d", bias) + large_kernel_dwconv(x, wide, "conv2d")
    monkeypatch.setattr(large_kernel, "CHANNELS_LAST", channels_last)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            y = large_kernel_pair(x, tall, wide, backend, bias)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    single = [t.float() for t in (x, tall, wide)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert large_kernel_pair(*single, backend, bias.float()).dtype == torch.bfloat16
        assert large_kernel_pair(x, tall, wide, backend, bias).dtype == torch.float64
    with torch.no_grad():
        assert large_kernel_pair(x[:0], tall, wide, backend).shape == (0, 2, 6, 4)


def test_second_derivatives_of_the_direct_form() -> None:
    x = torch.randn(1, 2, 4, 3, **DOUBLE, requires_grad=True)
    weight = torch.randn(2, 1, 5, 3, **DOUBLE, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda *t: large_kernel_dwconv(*t, "direct"), (x, weight))


def test_taps_that_meet_only_padding_get_no_gradient() -> None:
    x, weight = torch.randn(2, 3, 6, 6), torch.randn(3, 1, 51, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(large_kernel_dwconv(x, weight, "direct").square().sum(), weight)
    assert gradient.shape == weight.shape
    assert not gradient[:, :, : 25 - 5].any()
    assert not gradient[:, :, 25 + 6 :].any()
    assert gradient[:, :, 20:31].ne(0).all()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_single(backend: str, dtype: torch.dtype) -> None:
    """Against float64 on the same rounded inputs; only the result's own rounding may show, not the sum over B*H*W."""
    where = device_of(backend)
    if backend == "triton" and dtype == torch.bfloat16 and where.type == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    x, weight = torch.randn(4, 3, 28, 28).to(where, dtype), torch.randn(3, 1, 21, 5).to(where, dtype)
    grad = torch.randn(4, 3, 28, 28).to(where, dtype)
    results = []
    for kind, name in ((torch.float64, "conv2d"), (dtype, backend)):
        leaves = [t.to(kind).requires_grad_() for t in (x, weight)]
        y = large_kernel_dwconv(*leaves, name)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, grad.to(kind))])
    for expected, ours in zip(*results, strict=True):
        assert float((ours.double() - expected).norm() / expected.norm()) < 2e-3


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", ["direct", "toeplitz", "fft", "triton"])
def test_any_memory_format(backend: str, form: torch.memory_format) -> None:
    x = torch.randn(2, 3, 6, 9, **DOUBLE).contiguous(memory_format=form)
    grad = torch.randn(2, 3, 6, 9, **DOUBLE).contiguous(memory_format=form)
    compare(backend, x, torch.randn(3, 1, 3, 9, **DOUBLE), 1e-11, grad)


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 9), half=st.integers(0, 12))
def test_diagonal_sums_are_the_adjoint_of_toeplitz_matrices(height: int, half: int) -> None:
    taps = min(2 * half + 1, 2 * height - 1)
    weight = torch.randn(2, 1, taps, 3, **DOUBLE)
    products = torch.randn(2, height, 3, height, **DOUBLE)
    forward = (toeplitz_matrices(weight, height) * products).sum()
    adjoint = (diagonal_sums(products.transpose(1, 2), taps) * weight[:, 0].transpose(1, 2)).sum()
    torch.testing.assert_close(forward, adjoint)


def test_autocast_computes_in_its_dtype() -> None:
    x, weight = torch.randn(1, 2, 8, 8), torch.randn(2, 1, 7, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = large_kernel_dwconv(x, weight)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["direct", "toeplitz", "fft"])
def test_gradients_do_not_depend_on_where_backward_is_called(backend: str) -> None:
    """Under autocast too the weight gradient is summed in float32; float64 stays as it is, as in `conv2d`."""
    x, weight = torch.randn(6, 3, 9, 9), torch.randn(3, 1, 7, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = large_kernel_dwconv(x, weight, backend)
        (inside,) = torch.autograd.grad(y, weight, torch.ones_like(y), retain_graph=True)
        assert large_kernel_dwconv(x.double(), weight.double(), backend).dtype == torch.float64
    (outside,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("backend", ["conv2d", "direct", "toeplitz", "fft"])
def test_no_image_gives_no_gradient(backend: str) -> None:
    weight = torch.randn(3, 1, 7, 5, requires_grad=True)
    large_kernel_dwconv(torch.zeros(0, 3, 9, 9), weight, backend).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_auto_follows_a_rule_then_the_tuner() -> None:
    x, weight = torch.randn(1, 2, 8, 8), torch.randn(2, 1, 7, 3)
    assert _rule(x, weight) == "direct"
    assert _rule(torch.randn(1, 2, 20, 20), torch.randn(2, 1, 31, 31)) == "fft"
    try:
        fastest = tune(x, weight, rounds=1)
        assert fastest in backends.BACKENDS
        assert fastest in _tuned.values()
        torch.testing.assert_close(large_kernel_dwconv(x, weight), large_kernel_dwconv(x, weight, "conv2d"))
    finally:
        _tuned.clear()


def test_choices_are_remembered_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENFOLD_DATA", str(tmp_path))
    monkeypatch.setattr(large_kernel, "_remembered", None)
    _to_disk("one", "toeplitz")
    monkeypatch.setattr(large_kernel, "_remembered", None)
    assert _from_disk() == {"one": "toeplitz"}
    for damaged in ("{", "[]", '{"one": "no such backend"}'):
        (tmp_path / "slak" / "tuned.json").write_text(damaged)
        monkeypatch.setattr(large_kernel, "_remembered", None)
        assert _from_disk() == {}


@pytest.mark.parametrize(
    ("shape", "backend", "words"),
    [
        ((2, 1, 6, 5), "auto", "odd"),
        ((3, 1, 7, 5), "auto", "2 channels"),
        ((2, 1, 7, 5), "cuda", "unknown backend"),
        ((2, 1, 31, 31), "toeplitz", "cannot serve"),
    ],
)
def test_refusals(shape: tuple[int, ...], backend: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        large_kernel_dwconv(torch.randn(1, 2, 40, 40), torch.randn(shape), backend)


def test_refuses_mixed_dtypes() -> None:
    with pytest.raises(TypeError, match="float64"):
        large_kernel_dwconv(torch.randn(1, 2, 8, 8), torch.randn(2, 1, 3, 3, **DOUBLE))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["conv2d", "toeplitz", "fft", "triton", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "size", "kernel"), [(124, 56, 51), (249, 28, 49), (499, 14, 47), (998, 7, 13)])
def test_on_the_gpu(backend: str, dtype: torch.dtype, channels: int, size: int, kernel: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"device": "cuda", "generator": generator}
    for shape in ((kernel, 5), (5, kernel), (5, 5)):
        x = torch.randn(3, channels, size, size, **options).to(dtype)
        weight = torch.randn(channels, 1, *shape, **options).to(dtype)
        grad = torch.randn(3, channels, size, size, **options).to(dtype)
        results = []
        for kind, name in ((torch.float64, "conv2d"), (dtype, backend)):
            leaves = [t.to(kind).requires_grad_() for t in (x, weight)]
            y = large_kernel_dwconv(*leaves, name)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, grad.to(kind))])
        for expected, ours in zip(*results, strict=True):
            # cuDNN's own half-precision weight gradient is coarser than ours; TF32 is float32's default on the GPU.
            limit = 2e-2 if backend in {"conv2d", "auto"} else 3e-3
            assert float((ours.double() - expected).norm() / expected.norm()) < limit
