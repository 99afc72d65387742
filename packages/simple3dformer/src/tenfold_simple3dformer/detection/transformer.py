"""Position embeddings, encoder and decoder of the detection transformer (section 2.8). Tensors are sequence-first."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


def scene_coordinates(
    xyz: Float[Tensor, "b n 3"], low: Float[Tensor, "b 3"], high: Float[Tensor, "b 3"]
) -> Float[Tensor, "b n 3"]:
    """Coordinates in [0, 1] of the scene's bounds."""
    return (xyz - low[:, None]) / (high - low)[:, None].clamp(min=1e-6)


class FourierEmbedding(nn.Module):
    """p = 2 pi x; [sin(p B), cos(p B)] with a fixed B ~ N(0, 1) of shape (3, channels / 2)."""

    gauss_B: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("gauss_B", torch.randn(3, channels // 2))

    def forward(
        self, xyz: Float[Tensor, "b n 3"], low: Float[Tensor, "b 3"], high: Float[Tensor, "b 3"]
    ) -> Float[Tensor, "b c n"]:
        """Channels first."""
        with torch.autocast(
            xyz.device.type, enabled=False
        ):  # half precision has no digits left for phases of many turns
            p = 2 * math.pi * scene_coordinates(xyz, low, high) @ self.gauss_B
        return torch.cat([p.sin(), p.cos()], -1).transpose(1, 2)


def sine_embedding(
    xyz: Float[Tensor, "b n 3"],
    low: Float[Tensor, "b 3"],
    high: Float[Tensor, "b 3"],
    channels: int,
    temperature: float = 10000.0,
) -> Float[Tensor, "b c n"]:
    """Interleaved sines and cosines of 2 pi x at geometric wavelengths, a share of the channels for each axis.

    Shares are even and add up to the channels; the first axes take what is left over.
    """
    each = channels // 3 // 2 * 2
    left, parts = channels - 3 * each, []
    for axis, x in enumerate((2 * math.pi * scene_coordinates(xyz, low, high)).unbind(-1)):
        share = each + 2 if 2 * axis < left else each
        frequency = temperature ** (2 * (torch.arange(share, device=xyz.device) // 2).to(xyz.dtype) / share)
        phase = x[..., None] / frequency
        parts.append(torch.stack([phase[..., 0::2].sin(), phase[..., 1::2].cos()], -1).flatten(-2))
    return torch.cat(parts, -1).transpose(1, 2)


class EncoderLayer(nn.TransformerEncoderLayer):
    """The baseline's pre-norm layer: self-attention without positions, feed-forward with ReLU."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.1):
        super().__init__(width, heads, hidden, dropout, "relu", norm_first=True, batch_first=False)


class Encoder(nn.Module):
    """Layers in sequence, no final norm.

    ``radii``: squared radii, one a layer, that attention is limited to (3DETR-m); they are compared with the *unsquared*
    distance, as released.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, layers: int, dropout: float = 0.1, radii: tuple[float, ...] = ()
    ):
        super().__init__()
        self.radii = radii
        self.layers = nn.ModuleList(EncoderLayer(width, heads, hidden, dropout) for _ in range(layers))

    def forward(
        self, source: Float[Tensor, "n b c"], xyz: Float[Tensor, "b n 3"] | None = None
    ) -> Float[Tensor, "n b c"]:
        """Memory."""
        for i, layer in enumerate(self.layers):
            source = layer(source, src_mask=self.mask(xyz, i, layer) if self.radii and xyz is not None else None)
        return source

    def mask(self, xyz: Float[Tensor, "b n 3"], layer: int, module: nn.Module) -> Bool[Tensor, "h n n"]:
        """True where attention is not allowed, one (N, N) a head."""
        far = torch.cdist(xyz.float(), xyz.float()) >= self.radii[layer]
        return far.repeat_interleave(module.self_attn.num_heads, 0)  # type: ignore[union-attr,arg-type]


class DecoderLayer(nn.Module):
    """Pre-norm: self-attention, cross-attention, feed-forward; the query embedding is added to queries and keys."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.1):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, dropout)
        self.multihead_attn = nn.MultiheadAttention(width, heads, dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        target: Float[Tensor, "q b c"],
        memory: Float[Tensor, "n b c"],
        query: Float[Tensor, "q b c"],
        position: Float[Tensor, "n b c"] | None = None,
    ) -> Float[Tensor, "q b c"]:
        """The next target."""
        x = self.norm1(target)
        target = target + self.dropout(self.self_attn(x + query, x + query, x, need_weights=False)[0])
        x = self.norm2(target)
        keys = memory if position is None else memory + position
        target = target + self.dropout(self.multihead_attn(x + query, keys, memory, need_weights=False)[0])
        x = self.linear2(self.dropout(self.linear1(self.norm3(target)).relu()))
        return target + self.dropout(x)


class Decoder(nn.Module):
    """Queries start at zero; the final norm is applied to every layer's output."""

    def __init__(self, width: int, heads: int, hidden: int, layers: int, dropout: float = 0.1):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(width, heads, hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        memory: Float[Tensor, "n b c"],
        query: Float[Tensor, "q b c"],
        position: Float[Tensor, "n b c"] | None = None,
    ) -> Float[Tensor, "layers q b c"]:
        """The normed output of every layer."""
        target, outputs = torch.zeros_like(query), []
        for layer in self.layers:
            target = layer(target, memory, query, position)
            outputs.append(self.norm(target))
        return torch.stack(outputs)


class ConvolutionHead(nn.Module):
    """1x1 convolutions: twice (no bias, batch norm, ReLU, dropout), then one with bias."""

    def __init__(self, width: int, out: int, dropout: float = 0.3):
        super().__init__()
        hidden = [
            layer
            for _ in range(2)
            for layer in (nn.Conv1d(width, width, 1, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout))
        ]
        self.layers = nn.Sequential(*hidden, nn.Conv1d(width, out, 1))

    def forward(self, x: Float[Tensor, "b c q"]) -> Float[Tensor, "b o q"]:
        """Channels first."""
        return self.layers(x)
