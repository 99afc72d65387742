"""Multi-layer perceptrons as the encoders use them (section 3), on dense or sparse input, and a cheap dropout."""

import itertools
from typing import Any, overload

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tenfold_hypergcl.propagate import Features, SparseFeatures
from tenfold_hypergcl.rowwise import draw_kept, layer, thinned, threshold


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        dropped, ctx.scale = threshold(p)
        out = x.relu()
        if dropped:
            out = thinned(out, draw_kept(out, p), p)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        # A value survived both steps exactly when it is positive, so the output is all the memory that the gradient needs.
        (out,) = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad_outputs[0], out, 0)
        return grad if ctx.scale == 1.0 else grad.mul_(ctx.scale), None


def relu_dropout(x: Float[Tensor, "..."], p: float, training: bool) -> Float[Tensor, "..."]:
    """``dropout(relu(x), p)``, of which nothing but the result is stored."""
    return _ReluDropout.apply(x, p if training else 0.0)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        kept, ctx.p = draw_kept(x, p), p
        ctx.save_for_backward(kept)
        return thinned(x, kept, p)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return thinned(grad_outputs[0], kept, ctx.p), None


@overload
def dropout(x: Tensor, p: float, training: bool) -> Tensor: ...


@overload
def dropout(x: Features, p: float, training: bool) -> Features: ...


def dropout(x: Features, p: float, training: bool) -> Features:
    """Inverted dropout of dense or sparse features; the identity outside training."""
    if not training or p == 0:
        return x
    if isinstance(x, SparseFeatures):
        return x.with_values(_Dropout.apply(x.values, p))
    return _Dropout.apply(x, p)


def linear(
    x: Features, weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None
) -> Float[Tensor, "rows out"]:
    """``x @ weight.T + bias`` for dense or sparse ``x``."""
    if isinstance(x, SparseFeatures):
        out = x.matmul(weight.T)
        return out if bias is None else out + bias
    return F.linear(x, weight, bias)


def normalized_linear(x: SparseFeatures, norm: nn.LayerNorm, layer: nn.Linear) -> Float[Tensor, "rows out"]:
    """``layer(norm(x))`` without a dense matrix: the layer norm is affine in each row, so its parts move behind the product."""
    total, squares = x.row_sums
    mean = total / x.num_features
    rstd = torch.rsqrt((squares / x.num_features - mean.square()).clamp_min(0) + norm.eps)
    product = x.matmul((layer.weight * norm.weight).T)
    centred = torch.addcmul(product, mean[:, None], layer.weight @ norm.weight, value=-1)
    return torch.addcmul(torch.addmv(layer.bias, layer.weight, norm.bias), rstd[:, None], centred)


def make_norm(name: str, width: int) -> nn.Module:
    """``ln``: layer norm; ``bn``: batch norm; ``none``: nothing."""
    if name == "ln":
        return nn.LayerNorm(width)
    if name == "bn":
        return nn.BatchNorm1d(width)
    if name == "none":
        return nn.Identity()
    raise ValueError(f"norm must be 'ln', 'bn' or 'none', not {name!r}.")


class MLP(nn.Module):
    """``layers - 1`` times [Linear, ReLU, norm, dropout], then a Linear; with ``input_norm`` a norm comes first (section 3)."""

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int,
        layers: int,
        dropout: float = 0.0,
        norm: str = "ln",
        input_norm: bool = False,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"An MLP has at least one layer, not {layers}.")
        widths = [in_features, *[hidden] * (layers - 1), out_features]
        self.dropout = dropout
        self.lins: Any = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(widths)])
        norms = [make_norm(norm if input_norm else "none", in_features)]
        self.normalizations = nn.ModuleList([*norms, *[make_norm(norm, hidden) for _ in range(layers - 1)]])

    def forward(self, x: Features, relu: bool = False, p_out: float = 0.0) -> Float[Tensor, "rows out"]:
        """Rows of features to rows of outputs; with ``relu`` followed by a ReLU and, in training, dropout ``p_out``."""
        last, read = len(self.lins) - 1, x
        out: Tensor
        for i, (norm, linear_map) in enumerate(zip(self.normalizations, self.lins, strict=True)):
            p_in = self.dropout if self.training and i else 0.0
            p_after = p_out if self.training and i == last else 0.0
            read = out = _step(read, norm, linear_map, p_in, relu or i < last, p_after)
        return out


def _step(x: Features, norm: nn.Module, linear_map: nn.Linear, p_in: float, relu: bool, p_out: float) -> Tensor:
    """Norm, dropout, Linear, ReLU, dropout: in one operation where the norm is by rows."""
    if isinstance(x, SparseFeatures):
        if isinstance(norm, nn.LayerNorm):
            out = normalized_linear(x, norm, linear_map)
        elif isinstance(norm, nn.Identity):
            out = linear(x, linear_map.weight, linear_map.bias)
        else:
            out = linear_map(norm(x.to_dense()))
    elif torch.is_autocast_enabled(x.device.type):
        out = linear_map(dropout(norm(x), p_in, True))
    elif isinstance(norm, nn.BatchNorm1d):
        return layer(norm(x), None, linear_map, p_in, relu, p_out)
    else:
        return layer(x, norm if isinstance(norm, nn.LayerNorm) else None, linear_map, p_in, relu, p_out)
    return relu_dropout(out, p_out, True) if relu else out
