"""Multi-layer perceptrons as the encoders use them (section 3), on dense or sparse input, and a cheap dropout."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tenfold_hypergcl.propagate import Features, SparseFeatures

LEVELS = 1 << 16


def _keep_threshold(p: float) -> tuple[int, float]:
    """Of ``LEVELS`` equally likely values how many are dropped, and the scale that keeps the mean exact for that count."""
    dropped = round(p * LEVELS)
    return dropped, LEVELS / (LEVELS - dropped)


def random_keep_mask(like: Tensor, p: float) -> Bool[Tensor, "..."]:
    """A mask that is False with probability ``round(p * 65536) / 65536``: four values a random 64-bit word, so several times cheaper
    than one Bernoulli draw a value. Drawn from the global generator of ``like``'s device.
    """
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    levels = words.view(torch.int16)[: like.numel()]
    return (levels >= _keep_threshold(p)[0] - LEVELS // 2).view(like.shape)


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.mark_dirty(x)
        dropped, scale = _keep_threshold(p)
        x.relu_()
        if dropped:
            x.mul_(random_keep_mask(x, p)).mul_(scale)
        ctx.scale = scale
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        # A value survived both steps exactly when it is positive, so the output is all the memory that the gradient needs.
        (out,) = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad_outputs[0], out, 0)
        return grad if ctx.scale == 1.0 else grad.mul_(ctx.scale), None


def relu_dropout_(x: Float[Tensor, "..."], p: float, training: bool) -> Float[Tensor, "..."]:
    """``dropout(relu(x), p)`` in place of ``x`` (the output of a linear map, which needs it no more), storing nothing else."""
    return _ReluDropout.apply(x, p if training else 0.0)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, in_place: bool) -> Tensor:
        ctx.scale = _keep_threshold(p)[1]
        mask = random_keep_mask(x, p)
        ctx.save_for_backward(mask)
        if in_place:
            ctx.mark_dirty(x)
            return x.mul_(mask).mul_(ctx.scale)
        return (x * mask).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return (grad_outputs[0] * mask).mul_(ctx.scale), None, None


def dropout(x: Features, p: float, training: bool) -> Features:
    """Inverted dropout of dense or sparse features; the identity outside training."""
    if not training or p == 0:
        return x
    if isinstance(x, SparseFeatures):
        return x.with_values(_Dropout.apply(x.values, p, False))
    return _Dropout.apply(x, p, False)


def linear(x: Features, weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None) -> Float[Tensor, "rows out"]:
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
    return (
        rstd[:, None] * product
        - (rstd * mean)[:, None] * (layer.weight @ norm.weight)
        + F.linear(norm.bias, layer.weight, layer.bias)
    )


def make_norm(name: str | None, width: int) -> nn.Module:
    """``ln``: layer norm; ``bn``: batch norm; None: nothing."""
    if name == "ln":
        return nn.LayerNorm(width)
    if name == "bn":
        return nn.BatchNorm1d(width)
    if name is None:
        return nn.Identity()
    raise ValueError(f"norm must be 'ln', 'bn' or None, not {name!r}.")


class MLP(nn.Module):
    """``layers - 1`` times [Linear, ReLU, norm, dropout], then a Linear; with ``input_norm`` a norm comes first (section 3)."""

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int,
        layers: int,
        dropout: float = 0.0,
        norm: str | None = "ln",
        input_norm: bool = False,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"An MLP has at least one layer, not {layers}.")
        widths = [in_features, *[hidden] * (layers - 1), out_features]
        self.dropout = dropout
        self.lins = nn.ModuleList([nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)])
        norms = [make_norm(norm if input_norm else None, in_features)]
        self.normalizations = nn.ModuleList([*norms, *[make_norm(norm, hidden) for _ in range(layers - 1)]])

    def forward(self, x: Features) -> Float[Tensor, "rows out"]:
        """Rows of features to rows of outputs."""
        hidden = self._first(x)
        for norm, layer in zip(list(self.normalizations)[1:], list(self.lins)[1:], strict=True):
            hidden = norm(hidden.relu_())  # in place: the linear map before needs its output no more
            if self.training and self.dropout > 0:
                hidden = _Dropout.apply(hidden, self.dropout, not isinstance(norm, nn.Identity))
            hidden = layer(hidden)
        return hidden

    def _first(self, x: Features) -> Tensor:
        norm, layer = self.normalizations[0], self.lins[0]
        if isinstance(x, SparseFeatures):
            if isinstance(norm, nn.LayerNorm):
                return normalized_linear(x, norm, layer)
            if isinstance(norm, nn.Identity):
                return linear(x, layer.weight, layer.bias)
            x = x.to_dense()
        return layer(norm(x))
