"""Every network of the paper by name, out of one configuration (sections 2, 3, 8)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, cast

from torch import nn

from tenfold_shared.errors import UserError
from tenfold_simple3dformer.backbone import create_vit
from tenfold_simple3dformer.baselines import (
    OccupancyLogistic,
    PointNet,
    PointNet2,
    PointTransformer,
    VisionPermutator3D,
    VoxNet,
)
from tenfold_simple3dformer.detection.detector import Detector
from tenfold_simple3dformer.point import RELEASED_PRESETS, PointFormer
from tenfold_simple3dformer.tokenizers import ReleasedTokenizer, TokenizerName, tokenizer_name
from tenfold_simple3dformer.voxel import VoxelFormer

Arch = Literal[
    "simple3dformer", "voxnet", "permutator", "logistic", "pointnet", "pointnet2", "point_transformer", "3detr", "3detr-m"
]  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "simple3dformer": ("voxel_cls", "point_cls", "part_seg", "scene_seg", "detection", "image_cls"),
    "voxnet": ("voxel_cls",), "permutator": ("voxel_cls",), "logistic": ("voxel_cls",),
    "pointnet": ("point_cls", "part_seg", "scene_seg"), "pointnet2": ("point_cls", "part_seg", "scene_seg"),
    "point_transformer": ("point_cls", "part_seg", "scene_seg"), "3detr": ("detection",), "3detr-m": ("detection",),
}  # fmt: skip
"""Architecture -> the tasks it does."""


@dataclasses.dataclass
class ModelConfig:
    """The network."""

    arch: Arch = "simple3dformer"
    """Simple3D-Former, or what it is compared with."""
    backbone: str = "small"
    """tiny, small, base (DeiT), mini, or any plain ViT of timm."""
    heads: int = 0
    """Attention heads; 0 takes the backbone's own. The release gives base models 3."""
    depth: int = 0
    """Blocks; 0 takes the backbone's own."""
    image_classes: int = 0
    """Classes of the image head; 0 takes the backbone's own."""
    tokenizer: Literal[TokenizerName, ReleasedTokenizer] = "projection"
    """Voxels to tokens; the released names are taken, too."""
    cell: int = 6
    """Side of a cell in voxels."""
    positions: Literal["learned", "zero", "none"] = "learned"
    """Positions of the voxel tokens: learned, from a truncated normal or, as the release's, from zero; or none."""
    group_axis: Literal["z", "released"] = "z"
    """Axis that the group embedding attends along; the release mixes the batch."""
    head: Literal["linear", "cosine"] = "linear"
    """Read-out of classification and segmentation."""
    preset: Literal["3DViT", "3DViT_LWF", "3DViT_1_layer", "3DViT_0_layer"] = "3DViT"
    """Stages of the point network, by the release's name."""
    tokens: Literal["abstraction", "local_op"] = "abstraction"
    """Points to tokens: set abstraction, or the release's unused local operator, for --model.preset 3DViT_1_layer."""
    neighbours: int = 16
    """Neighbours in set abstraction."""
    start: Literal["first", "random"] = "first"
    """Where farthest-point sampling begins; the release starts at random, in evaluation too."""
    centres: int = 2048
    """Detection: tokens of the pre-encoder."""
    reduce: int = 0
    """Detection: tokens after a second stage; 0: none."""
    queries: int = 128
    """Detection: boxes predicted."""
    layers: int = 8
    """Detection: decoder layers."""

    def __post_init__(self) -> None:
        """Refuse sizes that are none."""
        for name in ("cell", "neighbours", "centres", "queries", "layers"):
            if getattr(self, name) < 1:
                raise UserError(f"--model.{name} takes 1 or more, got {getattr(self, name)}")
        for name in ("heads", "depth", "image_classes", "reduce"):
            if getattr(self, name) < 0:
                raise UserError(f"--model.{name} takes 0 or more, got {getattr(self, name)}")


def build_model(config: ModelConfig, task: str, classes: int, inputs: int, voxels: int = 30) -> nn.Module:
    """The network of a task with random weights.

    Args:
        config: which.
        task: as of a recipe.
        classes: classes of the task.
        inputs: channels of a point.
        voxels: side of the grid.

    Raises:
        UserError: the architecture does not do the task, or sizes do not fit.

    """
    if task not in ARCHITECTURES[config.arch]:
        raise UserError(f"--model.arch {config.arch} is for {', '.join(ARCHITECTURES[config.arch])}, not {task}")
    if config.arch != "simple3dformer":
        return _baseline(config, task, classes, inputs, voxels)
    image_classes = classes if task == "image_cls" else config.image_classes or None
    vit = create_vit(config.backbone, heads=config.heads, depth=config.depth, classes=image_classes)
    if task == "image_cls":
        return vit
    if task == "voxel_cls":
        return VoxelFormer(
            vit, classes, cast(TokenizerName, tokenizer_name(config.tokenizer)), voxels=voxels, cell=config.cell, head=config.head,
            positions="none" if config.positions == "none" else "learned", group_axis=config.group_axis,
            zero_positions=config.positions == "zero",
        )  # fmt: skip
    if task == "detection":
        return Detector(
            vit, classes, centres=config.centres, queries=config.queries, layers=config.layers, reduce=config.reduce
        )
    preset: Mapping[str, Any] = RELEASED_PRESETS[config.preset]
    kind: Literal["cls", "seg"] = "cls" if task == "point_cls" else "seg"
    return PointFormer(
        vit, inputs, classes, kind, ratios=preset["ratios"], neighbours=config.neighbours, image_path=preset["image_path"],
        head=config.head, start=config.start, tokenizer=config.tokens,
    )  # fmt: skip


def _baseline(config: ModelConfig, task: str, classes: int, inputs: int, voxels: int) -> nn.Module:
    kind: Literal["cls", "seg"] = "cls" if task == "point_cls" else "seg"
    if config.arch == "voxnet":
        return VoxNet(classes)
    if config.arch == "permutator":
        return VisionPermutator3D(classes, voxels=voxels, cell=config.cell)
    if config.arch == "logistic":
        return OccupancyLogistic(classes, voxels=voxels)
    if config.arch == "pointnet":
        return PointNet(inputs, classes, kind)
    if config.arch == "pointnet2":
        return PointNet2(inputs, classes, kind)
    if config.arch == "point_transformer":
        return PointTransformer(inputs, classes, kind, neighbours=config.neighbours)
    masked = config.arch == "3detr-m"
    return Detector(None, classes, centres=config.centres, queries=config.queries, layers=config.layers, masked=masked)


def parameters(model: nn.Module) -> int:
    """How many parameters a network has."""
    return sum(p.numel() for p in model.parameters())


def image_side_parameters(model: nn.Module) -> int:
    """Parameters of the image path that a voxel or point network carries along."""
    vit: Any = getattr(model, "vit", None)
    if vit is None:
        return 0
    own = 0 if vit.pos_embed is None else vit.pos_embed.numel()
    return own + sum(p.numel() for part in (vit.patch_embed, vit.head) for p in part.parameters())


def released_unused_parameters(model: PointFormer) -> int:
    """Parameters that the release's point networks store and never use, on top of ours.

    An MLP 3 -> out -> out in every set abstraction; in `3DViT` the image positions and a point tokenizer, two local
    operators of which go from 128 and 256 channels to e.
    """
    unused = 0
    for down in model.downs:
        out = down.mlp.linears[-1].out_features  # type: ignore[union-attr,index]
        unused += 3 * out + out + out * out + out
    if model.image_path:
        return unused
    e, c = int(model.embed[0].out_features), int(model.vit.embed_dim)  # type: ignore[arg-type]
    positions = 197 * c
    tokenizer = 64 * model.inputs + 64 * 64 + 4 * 64
    local = sum(inputs * e + e * e + 4 * e for inputs in (128, 256))
    return unused + positions + tokenizer + local
