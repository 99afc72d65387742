"""The ray transformer (section 2.4): the points of a ray attend to one another.

The weights of the nearest sample read like a distribution over depth.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold_gnt.dropout import dropout
from tenfold_gnt.view_transformer import BLOCK_NORM_EPS, DROPOUT, FeedForward

HEADS = 4
Mode = Literal["qk", "pos", "gate"]


class Rays(NamedTuple):
    """Tokens, and the attention of the nearest sample (query 0), averaged over heads, where it was asked for."""

    tokens: Float[Tensor, "rays samples width"]
    weights: Float[Tensor, "rays samples"] | None


class RayAttention(nn.Module):
    """Multi-head self-attention along the ray, without mask or causal order.

    Args:
        width: D.
        dropout: on the weights and on the output.
        heads: number of heads.
        mode: "qk" (what all published networks use), "pos" (weights from differences of position codes) or "gate" (a
            learned mix of both per head).
        position_width: length of the position codes for "pos" and "gate".
        weights_after_dropout: read the weights after dropout in training, as the released code did: they are rescaled
            and do not sum to 1 then.

    """

    def __init__(
        self,
        width: int,
        dropout: float = DROPOUT,
        heads: int = HEADS,
        mode: Mode = "qk",
        position_width: int | None = None,
        *,
        weights_after_dropout: bool = False,
    ) -> None:
        super().__init__()
        self.dropout, self.heads, self.mode = dropout, heads, mode
        self.weights_after_dropout = weights_after_dropout
        if mode in ("qk", "gate"):
            self.query, self.key = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        if mode in ("pos", "gate"):
            if position_width is None:
                raise ValueError(f"ray attention of mode {mode} needs the width of its position codes")
            self.position = nn.Sequential(
                nn.Linear(position_width, position_width), nn.ReLU(), nn.Linear(position_width, width // 8)
            )
            self.position_heads = nn.Linear(width // 8, heads)
        if mode == "gate":
            self.gate = nn.Parameter(torch.ones(heads))
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "rays samples width"],
        position: Float[Tensor, "rays samples codes"] | None = None,
        *,
        return_weights: bool = False,
    ) -> Rays:
        """Attended tokens; with `return_weights` also the head mean of the weights of query 0."""
        if self.mode == "qk":
            attended, weights = self._fused(x, return_weights)
        else:
            if position is None:
                raise ValueError(f"ray attention of mode {self.mode} needs position codes")
            attended, weights = self._explicit(x, position, return_weights)
        return Rays(dropout(self.out(attended), self.dropout, self.training), weights)

    def _fused(self, x: Tensor, return_weights: bool) -> tuple[Tensor, Tensor | None]:
        """One projection for queries, keys and values, and the library's attention; one row of weights if wanted."""
        rays, samples, width = x.shape
        joint = torch.cat([self.query.weight, self.key.weight, self.value.weight])
        packed = F.linear(x, joint).view(rays, samples, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        drops = self.training and self.dropout > 0
        if drops and (x.device.type == "cpu" or (return_weights and self.weights_after_dropout)):
            # On CPUs the library's attention with dropout is the explicit one as well, with slower random numbers.
            return self._attend(self._dot_weights(query, key), value, return_weights)
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout if drops else 0.0)
        weights = self._dot_weights(query[:, :, :1], key)[:, :, 0].mean(1) if return_weights else None
        return attended.transpose(1, 2).reshape(rays, samples, width), weights

    def _explicit(self, x: Tensor, position: Tensor, return_weights: bool) -> tuple[Tensor, Tensor | None]:
        value = self._split(self.value(x))
        codes = self.position_heads(self.position(position))
        # A linear map of c_i - c_j; its bias is the same for all j and leaves the softmax alone.
        by_position = (codes[:, :, None] - codes[:, None]).permute(0, 3, 1, 2).softmax(-1)
        if self.mode == "pos":
            return self._attend(by_position, value, return_weights)
        by_content = self._dot_weights(self._split(self.query(x)), self._split(self.key(x)))
        gate = self.gate.sigmoid().view(1, -1, 1, 1)
        mixed = (1 - gate) * by_content + gate * by_position
        return self._attend(mixed / mixed.sum(-1, keepdim=True), value, return_weights)

    def _attend(self, weights: Tensor, value: Tensor, return_weights: bool) -> tuple[Tensor, Tensor | None]:
        dropped = dropout(weights, self.dropout, self.training)
        attended = (dropped @ value).transpose(1, 2).flatten(-2)
        shown = dropped if self.weights_after_dropout else weights
        return attended, shown[:, :, 0].mean(1) if return_weights else None

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _dot_weights(self, query: Tensor, key: Tensor) -> Tensor:
        return (query / query.shape[-1] ** 0.5 @ key.transpose(-1, -2)).softmax(-1)


class RayBlock(nn.Module):
    """Pre-norm block: attention along the ray, then a feed-forward network."""

    def __init__(self, width: int, attention: RayAttention, dropout: float = DROPOUT) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=BLOCK_NORM_EPS)
        self.feed_norm = nn.LayerNorm(width, eps=BLOCK_NORM_EPS)
        self.feed = FeedForward(width, 4 * width, dropout)
        self.attention = attention

    def forward(
        self,
        tokens: Float[Tensor, "rays samples width"],
        position: Float[Tensor, "rays samples codes"] | None = None,
        *,
        return_weights: bool = False,
    ) -> Rays:
        """The updated tokens, and the weights where asked for."""
        attended, weights = self.attention(self.attention_norm(tokens), position, return_weights=return_weights)
        tokens = tokens + attended
        return Rays(tokens + self.feed(self.feed_norm(tokens)), weights)
