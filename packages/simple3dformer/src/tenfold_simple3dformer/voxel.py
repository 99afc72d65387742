"""Simple3D-Former on voxels (sections 2.2-2.4): classification of an occupancy grid with an image transformer."""

from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tenfold_shared.errors import UserError
from tenfold_simple3dformer.backbone import positions_needed, read_out, run_blocks, width
from tenfold_simple3dformer.heads import create_head
from tenfold_simple3dformer.tokenizers import (
    RELEASED_NAMES,
    GroupEncoder,
    HybridEmbedding,
    InflatedEmbedding,
    SilhouetteEmbedding,
    TokenizerName,
    token_grid,
)

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


class VoxelFormer(nn.Module):
    """A ViT whose tokens are cells of an occupancy grid; it still takes images (`forward_images`).

    Args:
        vit: the backbone; kept as it is, its class token is shared by voxels and images.
        classes: of the 3D task.
        tokenizer: ``naive`` (n^3 tokens), ``projection`` (mean over z, n^2), ``group`` (section 2.3), ``occupancy2d``
            (a silhouette), ``hybrid`` and ``hybrid_naive`` (VoxNet's stem, averaged over z or not), ``slices`` (weight
            sharing: the blocks run on every z-slice with shared positions, the n read-outs are averaged).
        voxels: side V of the grid.
        cell: side T of a cell.
        head: ``linear`` or ``cosine`` (AM-softmax).
        positions: ``learned`` or ``none``.
        group_axis: see `GroupEncoder`.
        zero_positions: start the voxel positions at zero, as the released code does; default truncated normal, std 0.02.

    """

    def __init__(
        self,
        vit: "VisionTransformer",
        classes: int,
        tokenizer: TokenizerName = "projection",
        *,
        voxels: int = 30,
        cell: int = 6,
        head: Literal["linear", "cosine"] = "linear",
        positions: Literal["learned", "none"] = "learned",
        group_axis: Literal["z", "released"] = "z",
        zero_positions: bool = False,
    ):
        super().__init__()
        self.tokenizer, self.voxels, self.cell, self.classes = tokenizer, voxels, cell, classes
        self.grid = token_grid(tokenizer, voxels, cell)
        self.vit = vit
        c = width(vit)
        if tokenizer == "occupancy2d":
            self.embed: nn.Module = SilhouetteEmbedding(c, cell)
        elif tokenizer in ("hybrid", "hybrid_naive"):
            self.embed = HybridEmbedding(c, mean_over_z=tokenizer == "hybrid")
        else:
            self.embed = InflatedEmbedding(c, cell)
        self.group = GroupEncoder(c, self.grid[0], group_axis) if tokenizer == "group" else None
        count = positions_needed(vit, self.grid[0] ** len(self.grid))
        self.pos_embed = nn.Parameter(torch.zeros(1, count, c)) if positions == "learned" else None
        if self.pos_embed is not None and not zero_positions:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.head = create_head(head, c, classes)

    @property
    def cell_side(self) -> float:
        """Voxels along the side of what a token stands for; the hybrid's stem stretches the whole grid."""
        return self.voxels / self.grid[0] if self.tokenizer.startswith("hybrid") else float(self.cell)

    def tokens(self, voxels: Float[Tensor, "b 1 v v v"]) -> Float[Tensor, "b ..."]:
        """E on its lattice: (B, n, n, C), or (B, n, n, n, C) for naive, group and slices (before any grouping)."""
        if voxels.shape[2:] != (self.voxels,) * 3:
            raise UserError(f"the network takes grids of {self.voxels} voxels a side, got {list(voxels.shape[2:])}")
        if self.tokenizer == "projection":
            return self.embed(voxels, mean_over_z=True)
        return self.embed(voxels)

    def features(self, voxels: Float[Tensor, "b 1 v v v"]) -> Float[Tensor, "b c"]:
        """The read-out token after the final norm."""
        embedded = self.tokens(voxels)
        if self.tokenizer == "slices":
            batch, n = embedded.shape[0], embedded.shape[3]
            slices = embedded.permute(0, 3, 1, 2, 4).reshape(batch * n, -1, embedded.shape[-1])
            return read_out(self.vit, run_blocks(self.vit, slices, self.pos_embed)).view(batch, n, -1).mean(1)
        if self.group is not None:
            embedded = self.columns(embedded)
        return read_out(self.vit, run_blocks(self.vit, embedded.flatten(1, -2), self.pos_embed))

    def columns(self, embedded: Float[Tensor, "b n n n c"]) -> Float[Tensor, "b n n c"]:
        """Steps 1-4 of the group embedding: every column of cells becomes one token, through all blocks."""
        assert self.group is not None
        batch, n, _, _, c = embedded.shape
        encoded = self.group(embedded.reshape(batch * n * n, n, c))
        return self.vit.norm(self.vit.blocks(encoded))[:, 0].view(batch, n, n, c)

    def forward(
        self, voxels: Float[Tensor, "b 1 v v v"], images: Float[Tensor, "u ch h w"] | None = None
    ) -> Float[Tensor, "b k"] | tuple[Float[Tensor, "b k"], Float[Tensor, "u m"]]:
        """Logits of the voxels; with images, also theirs, from the same blocks (one call, so that DDP sees both)."""
        logits = self.head(self.features(voxels))
        return logits if images is None else (logits, self.forward_images(images))

    def forward_images(self, images: Float[Tensor, "b ch h w"]) -> Float[Tensor, "b m"]:
        """The 2D network that the blocks came from: logits of its image classes."""
        return self.vit(images)


def released_name(embed_layer: str, pos_embedding: str) -> TokenizerName:
    """Our name of a released tokenizer class and position embedding.

    Raises:
        UserError: the release has no such pair.

    """
    try:
        return RELEASED_NAMES[embed_layer, pos_embedding]
    except KeyError:
        raise UserError(f"no released tokenizer {embed_layer} with positions {pos_embedding}") from None
