"""BiP: model pruning as bi-level optimisation, on any torch module.

The paper's algorithm is in `bilevel` (steps and implicit gradient), `projections` (the set S) and `masking` (masks on a
module); `released` repeats the authors' trainers, `baselines` what BiP is compared with, `shrink` removes pruned
channels for good, `compat` reads and writes the authors' checkpoints.
"""

from tenfold_bip.baselines import (
    grasp_importance,
    imp_keep_schedule,
    importance_masks,
    magnitude_importance,
    random_importance,
    snip_importance,
    synflow_masks,
)
from tenfold_bip.bilevel import (
    bilevel_iteration,
    implicit_gradient,
    implicit_gradient_hessian,
    m_step,
    theta_step,
)
from tenfold_bip.compat import CheckpointError, dense_state, load_official_checkpoint, to_official
from tenfold_bip.ledger import Ledger, flops, flops_per_layer
from tenfold_bip.masking import (
    bake_masks,
    check_no_empty_layer,
    expected_iou,
    fix_masks,
    freeze_masks,
    get_masks,
    keep_ratio,
    kept_per_layer,
    mask_iou,
    prune_parametrize,
    set_keep,
    set_masks,
    sparsity,
    split_parameters,
)
from tenfold_bip.models import create_model, model_names
from tenfold_bip.projections import Projection
from tenfold_bip.shrink import UnsupportedOperationError, shrink

__all__ = [
    "CheckpointError",
    "Ledger",
    "Projection",
    "UnsupportedOperationError",
    "bake_masks",
    "bilevel_iteration",
    "check_no_empty_layer",
    "create_model",
    "dense_state",
    "expected_iou",
    "fix_masks",
    "flops",
    "flops_per_layer",
    "freeze_masks",
    "get_masks",
    "grasp_importance",
    "imp_keep_schedule",
    "implicit_gradient",
    "implicit_gradient_hessian",
    "importance_masks",
    "keep_ratio",
    "kept_per_layer",
    "load_official_checkpoint",
    "m_step",
    "magnitude_importance",
    "mask_iou",
    "model_names",
    "prune_parametrize",
    "random_importance",
    "set_keep",
    "set_masks",
    "shrink",
    "snip_importance",
    "sparsity",
    "split_parameters",
    "synflow_masks",
    "theta_step",
    "to_official",
]
