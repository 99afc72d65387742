"""Ways to compute one depthwise convolution, each a module with the same two functions.

A backend sees *tall* kernels only (height >= width, both odd, height <= 2H - 1): the caller crops and transposes.

- `correlate(x, weight, bias=None)`: `y[b,c,h,w] = sum_ij weight[c,0,i,j] x[b,c,h+i-kh//2,w+j-kw//2] + bias[c]`
- `kernel_gradient(x, grad, kernel_size)`: the gradient of `sum(grad * y)` with respect to `weight`

The gradient with respect to x needs no third function: it is `correlate` of the output gradient with the flipped
kernel. `conv2d` has its own gradients and no `kernel_gradient`. `supports(x, kernel_size)` says whether the backend can
serve this input; `WANTS_CONTIGUOUS` that it would copy a transposed map, so that the caller does it once.
"""

import importlib
from types import ModuleType

#: In the order in which the tuner tries them. `conv2d` is the framework's own convolution and its own gradients.
BACKENDS = ("conv2d", "direct", "toeplitz", "fft", "triton")


def load(name: str) -> ModuleType:
    """The module of a backend (Triton is imported only when it is asked for).

    Raises:
        ValueError: the name is not one of `BACKENDS`.

    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r} for large_kernel_dwconv: choose one of auto, {', '.join(BACKENDS)}")
    return importlib.import_module(f"{__name__}.{name}")
