"""Dense products without gradients, by the faster of PyTorch's two libraries for them."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# On x86 PyTorch multiplies single-precision matrices by MKL, which is a quarter slower than oneDNN on processors that are not Intel's;
# this is the operation of oneDNN that its compiler emits. It wants both matrices as they are stored: it is very slow on a transpose.
ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"}
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def multiply(
    x: Float[Tensor, "rows in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, "out"] | None = None,
    relu: bool = False,
) -> Float[Tensor, "rows out"]:
    """``x @ weight.T + bias``, with ``relu`` its positive part, for two matrices of contiguous rows; outside of automatic differentiation."""
    if ONEDNN and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu" if relu else "none", [], "")
    out = F.linear(x, weight, bias)
    return out.relu_() if relu else out


def stored(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """A transpose as :func:`multiply` wants its second matrix."""
    return matrix.contiguous() if ONEDNN and matrix.device.type == "cpu" else matrix
