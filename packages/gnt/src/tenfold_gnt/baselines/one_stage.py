"""The ablation "one-stage": a single transformer over all (sample, view) tokens of a ray instead of two in alternation."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold_gnt.network import GNT, RenderedRays
from tenfold_gnt.projection import ViewSamples
from tenfold_gnt.ray_transformer import RayAttention, RayBlock
from tenfold_gnt.encoding import encode
from tenfold_gnt.network import ENCODED, mlp


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
        """Colours of rays; weights and view weights are shares of the last block's attention of the nearest sample."""
        rays, count, views, _ = samples.rgb_feat.shape
        place = encode(points)[:, :, None].expand(-1, -1, views, -1)
        direction = encode(F.normalize(directions, dim=-1))[:, None, None].expand(-1, count, views, -1)
        parts = [samples.rgb_feat, samples.ray_diff, place, direction]
        tokens = self.input_mlp(_join(parts)).flatten(1, 2)
        mask = samples.mask.flatten(1)
        mask = mask + (mask.amax(-1, keepdim=True) == 0)
        for block in self.blocks:
            tokens = block(tokens, mask)
        weights = view_weights = None
        if return_weights or return_view_weights:
            shares = self.blocks[-1].shares(tokens, mask).view(rays, count, views)
            weights, view_weights = shares.sum(-1), shares if return_view_weights else None
        pooled = (self.norm(tokens) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return RenderedRays(self.to_rgb(pooled), weights if return_weights else None, view_weights)


