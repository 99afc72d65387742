"""The ablation "one-stage": one transformer over all (sample, view) tokens of a ray instead of two in turn."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold_gnt.encoding import encode
from tenfold_gnt.network import ENCODED, RenderedRays, mlp
from tenfold_gnt.projection import ViewSamples
from tenfold_gnt.view_transformer import BLOCK_NORM_EPS, FeedForward

HEADS = 4


class MaskedBlock(nn.Module):
    """Pre-norm self-attention over tokens of which some are left out as keys, then a feed-forward network."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=BLOCK_NORM_EPS)
        self.feed_norm = nn.LayerNorm(width, eps=BLOCK_NORM_EPS)
        self.packed = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.feed = FeedForward(width, 4 * width, dropout)
        self.dropout = dropout

    def forward(self, tokens: Float[Tensor, "rays tokens width"], mask: Float[Tensor, "rays tokens"]) -> Tensor:
        """The updated tokens."""
        query, key, value = self._project(tokens)
        attended = F.scaled_dot_product_attention(
            query, key, value, (mask > 0)[:, None, None], self.dropout if self.training else 0.0
        )
        mixed = self.out(attended.transpose(1, 2).flatten(-2))
        tokens = tokens + F.dropout(mixed, self.dropout, self.training)
        return tokens + self.feed(self.feed_norm(tokens))

    def shares(
        self, tokens: Float[Tensor, "rays tokens width"], mask: Float[Tensor, "rays tokens"]
    ) -> Float[Tensor, "rays tokens"]:
        """Attention to every token, of the mean query, averaged over heads, summing to 1."""
        query, key, _ = self._project(tokens)
        logits = (query.mean(2, keepdim=True) @ key.transpose(-1, -2))[:, :, 0] / query.shape[-1] ** 0.5
        return logits.masked_fill(mask[:, None] == 0, -torch.inf).softmax(-1).mean(1)

    def _project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        packed = self.packed(self.attention_norm(tokens)).unflatten(-1, (3, HEADS, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        return query, key, value


class OneStageTransformer(nn.Module):
    """Self-attention over the S · V tokens of a ray; positions and relative directions enter with the tokens.

    Tokens of views that do not see their point are left out of the attention; a ray that no view sees attends to all.
    Attention costs (S V)^2 a ray: use it with few samples.

    Args:
        width: D.
        depth: number of blocks.
        feature_channels: C.
        dropout: in all blocks.

    """

    def __init__(self, width: int = 64, depth: int = 4, feature_channels: int = 32, dropout: float = 0.1) -> None:
        super().__init__()
        self.width = width
        self.input_mlp = mlp(3 + feature_channels + 4 + 2 * ENCODED, width)
        self.blocks = nn.ModuleList(MaskedBlock(width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.to_rgb = nn.Linear(width, 3)

    def forward(
        self,
        samples: ViewSamples,
        points: Float[Tensor, "rays samples 3"],
        directions: Float[Tensor, "rays 3"],
        *,
        return_weights: bool = False,
        return_view_weights: bool = False,
    ) -> RenderedRays:
        """Colours of rays; weights are shares of the last block's attention of the mean query."""
        rays, count, views, _ = samples.rgb_feat.shape
        place = encode(points)[:, :, None].expand(-1, -1, views, -1)
        direction = encode(F.normalize(directions, dim=-1))[:, None, None].expand(-1, count, views, -1)
        parts = [samples.rgb_feat, samples.ray_diff, place, direction]
        tokens = self.input_mlp(torch.cat(parts, -1)).flatten(1, 2)
        mask = samples.mask.flatten(1)
        mask = mask + (mask.amax(-1, keepdim=True) == 0)
        for block in self.blocks:
            tokens = block(tokens, mask)
        weights = view_weights = None
        if return_weights or return_view_weights:
            shares = cast(MaskedBlock, self.blocks[-1]).shares(tokens, mask).view(rays, count, views)
            weights, view_weights = shares.sum(-1), shares if return_view_weights else None
        pooled = (self.norm(tokens) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return RenderedRays(self.to_rgb(pooled), weights if return_weights else None, view_weights)
