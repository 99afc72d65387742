"""What every tokenizer costs before anything is trained: tokens, operations, memory (section 11)."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from tenfold_simple3dformer.models import ModelConfig, build_model, parameters
from tenfold_simple3dformer.tokenizers import attention_cost, sequence_lengths, token_grid

TOKENIZERS = ("naive", "projection", "group", "slices", "occupancy2d")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one sample."""

    tokenizer: str
    sequences: list[int]
    parameters: int
    macs: float
    activations: float
    """Bytes that a training step keeps for each sample, float32: about 34 values of width C a token and block (fused
    attention keeps no scores)."""


def costs(backbone: str, voxels: int, cell: int, classes: int = 40) -> list[Cost]:
    """The cost of every tokenizer on a grid.

    Raises:
        UserError: the grid is smaller than a cell, or there is no such backbone.

    """
    found = []
    for name in TOKENIZERS:
        grid = token_grid(name, voxels, cell)
        config = ModelConfig(backbone=backbone, tokenizer=name, cell=cell)  # type: ignore[arg-type]
        model: Any = build_model(config, "voxel_cls", classes, 1, voxels)
        width, depth, n = model.vit.embed_dim, len(model.vit.blocks), grid[0]
        lengths = sequence_lengths(name, grid)
        tokens = {"group": n * n * (n + 1) + n * n + 1, "slices": n * (n * n + 1)}.get(name, lengths[-1])
        columns = {"projection": n * n * cell**3, "occupancy2d": n * n * cell**2}
        embedding = columns.get(name, n**3 * cell**3) * width
        macs = attention_cost(name, n, width, depth) + embedding
        found.append(Cost(name, lengths, parameters(model), macs, 4.0 * 34 * tokens * width * depth))
    return found


def plan(backbone: str = "small", voxels: int = 30, cell: int = 6, classes: int = 40) -> None:
    """Print tokens, parameters, multiply-accumulates and training memory of every tokenizer.

    Args:
        backbone: its size.
        voxels: side length of the grid.
        cell: side length of a cell, in voxels.
        classes: of the head.

    """
    table = Table(title=f"{backbone}, {voxels}^3 voxels in cells of {cell}^3")
    for column in ("tokenizer", "sequence lengths", "parameters", "GMAC", "MB a training sample"):
        table.add_column(column, justify="left" if column == "tokenizer" else "right")
    for cost in costs(backbone, voxels, cell, classes):
        lengths = " then ".join(map(str, cost.sequences))
        table.add_row(
            cost.tokenizer, lengths, f"{cost.parameters:,}", f"{cost.macs / 1e9:.2f}", f"{cost.activations / 1e6:.1f}"
        )
    Console(width=120).print(table)
