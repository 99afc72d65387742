"""SLaK: convolutional networks with kernels beyond 51x51, by decomposition and dynamic sparsity.

Importing the package stays cheap: everything below is imported when first used. After it, `timm.create_model` knows the
networks (`slak_tiny`, `slak_small`, `slak_base` and the ablations), whether timm was imported before or is imported
later.
"""

import importlib
from typing import Any

from tenfold_slak import _timm_hook

__version__ = "0.1.0"

_EXPORTS = {
    "large_kernel": ["large_kernel_dwconv", "large_kernel_pair", "tune"],
    "layer": ["LargeKernel", "merge_large_kernels"],
    "models.slak": ["SLaK", "VARIANTS", "create"],
    "macs": ["count_macs", "count_parameters"],
    "masks": ["maskable_parameters", "bernoulli_masks", "erk_densities", "snip_densities", "initial_masks"],
    "sparse": ["DynamicSparseTraining", "CosinePruneRate"],
    "ema": ["SparseEMA"],
    "optim": ["cosine_schedule", "layer_ids", "parameter_groups"],
    "erf": ["contribution_maps", "effective_receptive_field"],
    "compat": ["load_official_checkpoint", "to_official", "to_convnext", "from_convnext"],
    "export": ["export_onnx", "export_program"],
    "downstream": ["SLaKBackbone", "UPerNet", "faster_rcnn", "mask_rcnn"],
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]  # noqa: PLE0604 - built from the table above

_timm_hook.install()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
