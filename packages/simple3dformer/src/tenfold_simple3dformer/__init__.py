"""Simple3D-Former: a 2D vision transformer for voxels, points and indoor scenes.

The image transformer stays as it is (`backbone`); tokenizers (`tokenizers`, `abstraction`), positions and heads make it a
3D network (`voxel`, `point`, `detection`). `weights` puts image weights in and says where each tensor comes from, `lwf`
keeps the image knowledge, `attention` shows what the network looks at, `compat` reads and writes the authors' checkpoints.
"""

import importlib
from typing import Any

_EXPORTS = {
    "backbone": ["create_vit"],
    "compat": ["CheckpointError", "load_official_checkpoint", "to_official"],
    "detection.detector": ["Detector"],
    "lwf": ["lwf_loss", "retention", "teach"],
    "metrics": ["part_segmentation"],
    "models": ["ModelConfig", "build_model"],
    "point": ["PointFormer"],
    "pointops": ["batch_clouds", "farthest_point_sampling", "nearest_neighbours", "normalise_points", "spread"],
    "attention": ["point_rollout", "rollout", "voxel_rollout"],
    "shapes": ["make_shape", "make_shapes"],
    "weights": ["TransferReport", "read_image_weights", "transfer"],
    "tuning": ["set_trainable"],
    "voxel": ["VoxelFormer"],
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_HOME)  # noqa: PLE0605 - built from the table above


def __getattr__(name: str) -> Any:
    """Import what is asked for: timm and SciPy are slow to import."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
