"""Depthwise convolution with very large kernels: one function, exact backends, a tuner that remembers (section 3).

Three exact facts make the pure-PyTorch form fast on CPUs: taps farther than H - 1 from the centre only ever meet
padding and can be cut; a wide kernel is a tall one on the transposed map; and the weight gradient is itself a depthwise
convolution. The first two are applied here to every backend, so a backend sees tall, cropped kernels only.
"""

import contextlib
import json
import time
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tenfold_slak.backends import BACKENDS, load

#: oneDNN's kernel for channels-last depthwise convolutions on AVX-512, of any shape, is the fastest forward.
CHANNELS_LAST = torch.backends.cpu.get_cpu_capability() == "AVX512"

#: Choices of `tune`, by device, dtype, shapes and whether gradients are needed; `_remembered` are those kept on disk.
_tuned: dict[str, str] = {}
_remembered: dict[str, str] | None = None


def large_kernel_dwconv(
    x: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, "kernels 1 kh kw"],
    backend: str = "auto",
    bias: Float[Tensor, " kernels"] | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """Depthwise cross-correlation, stride 1, zero padding (kh // 2, kw // 2): the output has the size of the input.

    `y[b,c,h,w] = sum_ij weight[c,0,i,j] x[b,c,h+i-kh//2,w+j-kw//2] (+ bias[c])`, exact for any odd kernel, also one
    that is larger than the map. Differentiable in x, weight and bias. Under autocast it computes in autocast's dtype,
    as `conv2d` does; products are accumulated in float32 or better.

    The result of a wide kernel may be a transposed view.

    Args:
        x: maps, any memory format.
        weight: one kernel a channel (`kernels` equals `channels`), odd sizes.
        backend: `auto`, or one of `conv2d` (the framework's), `direct` (CPU), `toeplitz`, `fft`, `triton`. `auto` takes
            what `tune` measured for this shape; on a GPU it measures when first asked and remembers, elsewhere, and whenever
            deterministic algorithms are demanded, it follows a fixed rule.
        bias: added to every position of its channel.

    Raises:
        ValueError: an even kernel, a weight that does not fit x, an unknown backend or one that cannot serve x.
        TypeError: x and weight differ in dtype (outside autocast).

    """
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = (t if t.dtype == torch.float64 else t.to(dtype) for t in (x, weight))
        bias = None if bias is None else bias.to(x.dtype)
    if _recording(x) or not x.shape[0]:
        # Exported graphs hold the plain operator, for any image size and any runtime; it also takes a batch of nothing.
        backend = "conv2d"
    _check(x, weight)
    if backend == "auto":
        backend = _choose(x, weight)
    module = load(backend)
    if not module.supports(x, _cropped(x, weight)):
        raise ValueError(
            f"backend {backend!r} cannot serve a {tuple(weight.shape[2:])} kernel on {x.dtype} maps on {x.device}: "
            "use backend='auto'"
        )
    if backend == "conv2d":
        return module.correlate(x, weight, bias)
    return _LargeKernel.apply(x, weight, bias, module)


def large_kernel_pair(
    x: Float[Tensor, "batch channels height width"],
    tall: Float[Tensor, "kernels 1 kh kw"],
    wide: Float[Tensor, "kernels 1 kw kh"],
    backend: str = "auto",
    bias: Float[Tensor, " kernels"] | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """`dw(x, tall) + dw(x, wide) (+ bias)`: the two-kernel form of inference (section 2.2), see `large_kernel_dwconv`.

    Without gradients on a CPU with AVX-512, `auto` computes in channels-last; maps that come so are not copied.
    """
    if torch.is_grad_enabled():
        return large_kernel_dwconv(x, tall, backend, bias) + large_kernel_dwconv(x, wide, backend)
    plain = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and not _recording(x)
    if backend == "auto" and CHANNELS_LAST and not _tuned and plain:
        _check(x, tall)
        _check(x, wide)
        x = x.contiguous(memory_format=torch.channels_last)
        return _on_cropped(x, tall, bias).add_(_on_cropped(x, wide, None))
    return large_kernel_dwconv(x, tall, backend, bias).add_(large_kernel_dwconv(x, wide, backend))


def _on_cropped(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kernel = _crop(weight, _cropped(x, weight))
    return F.conv2d(x, kernel, bias, padding=(kernel.shape[2] // 2, kernel.shape[3] // 2), groups=x.shape[1])


class _LargeKernel(torch.autograd.Function):
    """Crop, turn upright, run a backend; the gradients by the same two functions of the backend."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, module: ModuleType) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.module = module
        kernel = _crop(weight, _cropped(x, weight))
        if kernel.shape[3] <= kernel.shape[2]:
            return module.correlate(x, kernel, bias)
        return module.correlate(x.transpose(2, 3), kernel.transpose(2, 3), bias).transpose(2, 3)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # A backend that sums in float32 must not be cast back where the backward pass is called under autocast.
        with torch.autocast(grad.device.type, enabled=False):
            return _LargeKernel._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        kernel = _crop(weight, _cropped(x, weight))
        wide = kernel.shape[3] > kernel.shape[2]
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        if wide:
            x, grad, kernel = (t.transpose(2, 3) for t in (x, grad, kernel))
        if ctx.module.WANTS_CONTIGUOUS:
            grad = grad.contiguous()  # once for both gradients
        if ctx.needs_input_grad[0]:
            # An odd kernel with "same" padding: the adjoint is the correlation with the flipped kernel.
            grad_x = ctx.module.correlate(grad, kernel.flip(2, 3))
            grad_x = grad_x.transpose(2, 3) if wide else grad_x
        if ctx.needs_input_grad[1]:
            grad_weight = ctx.module.kernel_gradient(x, grad, (kernel.shape[2], kernel.shape[3]))
            grad_weight = grad_weight.transpose(2, 3) if wide else grad_weight
            # The cut taps met nothing but padding, so their gradient is exactly zero.
            rows, columns = (
                (whole - cut) // 2 for whole, cut in zip(weight.shape[2:], grad_weight.shape[2:], strict=True)
            )
            grad_weight = F.pad(grad_weight, (columns, columns, rows, rows))
        return grad_x, grad_weight, grad_bias, None


def _cropped(x: Tensor, weight: Tensor) -> tuple[int, int]:
    """Kernel size without the taps that lie outside the map for every output: at most 2H - 1 by 2W - 1."""
    return min(weight.shape[2], 2 * x.shape[2] - 1), min(weight.shape[3], 2 * x.shape[3] - 1)


def _crop(weight: Tensor, size: tuple[int, int]) -> Tensor:
    rows, columns = (weight.shape[2] - size[0]) // 2, (weight.shape[3] - size[1]) // 2
    return weight[:, :, rows : rows + size[0], columns : columns + size[1]]


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.shape[0] != x.shape[1] or weight.shape[1] != 1:
        raise ValueError(
            f"a depthwise weight for {x.shape[1]} channels has shape (C, 1, kh, kw); got {tuple(weight.shape)}"
        )
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(
            f"large kernels must have odd sizes, so that they have a centre; got {tuple(weight.shape[2:])}"
        )
    if x.dtype != weight.dtype:
        raise TypeError(f"maps are {x.dtype} but the kernel is {weight.dtype}: convert one, or use torch.autocast")


def _recording(x: Tensor) -> bool:
    """Whether a graph is made of what is computed, or nothing is computed at all."""
    # torch.compiler.is_exporting is newer than the oldest torch we support.
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return x.is_meta or torch.jit.is_tracing() or exporting()


def _rule(x: Tensor, weight: Tensor) -> str:
    """The backend to expect best without measuring: a function of the shapes alone, so that runs can be repeated."""
    if x.is_cuda:
        return "toeplitz" if load("toeplitz").supports(x, _cropped(x, weight)) else "fft"
    # Two long axes have no direct CPU kernel; from about 9 taps the transform is faster.
    return "fft" if min(_cropped(x, weight)) > 9 else "direct"


def _needs_gradients(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def _key(x: Tensor, weight: Tensor) -> str:
    device = torch.cuda.get_device_name(x.device) if x.is_cuda else f"cpu, {torch.get_num_threads()} threads"
    shapes = f"{tuple(x.shape)} {tuple(weight.shape[2:])}"
    return f"torch {torch.__version__}, {device}, {x.dtype}, {shapes}, {_needs_gradients(x, weight)}"


def _cache_file() -> Path:
    from tenfold_shared.download import data_root  # noqa: PLC0415 - not needed where nothing is tuned

    return data_root() / "slak" / "tuned.json"


def _from_disk() -> dict[str, str]:
    """Choices of earlier processes; none where the file is not there or damaged."""
    global _remembered  # noqa: PLW0603 - read once a process
    if _remembered is None:
        _remembered = {}
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found = json.loads(_cache_file().read_text(encoding="utf-8"))
            _remembered = {key: name for key, name in found.items() if name in BACKENDS}
    return _remembered


def _to_disk(key: str, name: str) -> None:
    from tenfold_shared.checkpoint import write_json  # noqa: PLC0415 - not needed where nothing is tuned

    known = _from_disk()
    known[key] = name
    with contextlib.suppress(OSError):  # a folder that cannot be written to costs a measurement in every process
        _cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_json(_cache_file(), known)


def _choose(x: Tensor, weight: Tensor) -> str:
    if not _tuned and not x.is_cuda:
        return _rule(x, weight)
    key = _key(x, weight)
    if key in _tuned:
        return _tuned[key]
    if x.is_cuda and not torch.are_deterministic_algorithms_enabled() and not torch.compiler.is_compiling():
        known = _from_disk()
        return known[key] if key in known else tune(x, weight)
    return _rule(x, weight)


def tune(
    x: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, "channels 1 kh kw"],
    rounds: int = 5,
) -> str:
    """Measure every backend that can serve this shape and remember the fastest for `backend="auto"`.

    Forward alone is timed under `no_grad` or when neither tensor needs a gradient, otherwise forward and backward.
    The choice is kept per device, dtype, shapes, need of gradients and number of threads: for this process, and on GPUs
    for later ones in `slak/tuned.json` of the data root.

    Returns:
        The name of the fastest backend.

    """
    key = _key(x, weight)
    train = _needs_gradients(x, weight)
    x, weight = x.detach(), weight.detach()
    times: dict[str, float] = {}
    for name in BACKENDS:
        try:
            usable = load(name).supports(x, _cropped(x, weight))
        except ImportError:  # Triton is not installed on every platform
            usable = False
        # Interpreted Triton is for tests; it never wins and may take minutes.
        if usable and not (name == "triton" and not x.is_cuda):
            times[name] = min(_time_once(x, weight, name, train) for _ in range(rounds + 1))
    _tuned[key] = min(times, key=times.__getitem__)
    if x.is_cuda:
        _to_disk(key, _tuned[key])
    return _tuned[key]


def _time_once(x: Tensor, weight: Tensor, backend: str, train: bool) -> float:
    with torch.set_grad_enabled(train), torch.autocast(x.device.type, enabled=False):
        x, weight = x.requires_grad_(train), weight.requires_grad_(train)
        _synchronize(x)
        start = time.perf_counter()
        y = large_kernel_dwconv(x, weight, backend)
        if train:
            torch.autograd.grad(y, (x, weight), y.detach())
        _synchronize(x)
        return time.perf_counter() - start


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
