"""ToST: train a sparse network better, whatever its mask, on any torch module.

The four techniques are in `activations` (ghost soft neurons), `skips` (ghost skip connections), `lrsi` (learned
layer-wise scales) and `smoothing` (label smoothing); `ghosts` attaches them to a network, fades them and proves that
they are gone. `masking` keeps pruned weights at zero, `pruning` makes masks, `maskfiles` reads and writes them,
`export` saves what the zeros cost, `compat` reads and writes the authors' checkpoints.
"""

from tenfold_tost.activations import GhostActivation, activation, pswish
from tenfold_tost.compat import CheckpointError, load_official_checkpoint, to_official
from tenfold_tost.export import load_compact, save_compact, sparsify
from tenfold_tost.ghosts import (
    Ghosts,
    GhostsRemainError,
    Skips,
    Smoothing,
    Soft,
    SparseRecipe,
    has_ghosts,
    parse_techniques,
)
from tenfold_tost.lrsi import Lrsi, ScaleAdam, ScaleReport, learn_scales
from tenfold_tost.maskfiles import load_masks, save_masks
from tenfold_tost.masking import (
    MaskKeeper,
    apply_masks,
    check_flow,
    check_masks,
    density,
    hamming_distance,
    masks_from_zeros,
    prunable_weights,
    relaxed_zero_filters,
)
from tenfold_tost.models import create_model, model_names
from tenfold_tost.pruning import (
    erk_masks,
    grasp_scores,
    keep_above,
    layerwise_cut,
    magnitude_cut,
    magnitude_scores,
    random_scores,
    snip_scores,
    synflow_masks,
    synflow_scores,
    taylor_scores,
    ticket_rounds,
)
from tenfold_tost.skips import GhostSkip, ghost_skips
from tenfold_tost.smoothing import smoothed_cross_entropy

__all__ = [
    "CheckpointError",
    "GhostActivation",
    "GhostSkip",
    "Ghosts",
    "GhostsRemainError",
    "Lrsi",
    "MaskKeeper",
    "ScaleAdam",
    "ScaleReport",
    "Skips",
    "Smoothing",
    "Soft",
    "SparseRecipe",
    "activation",
    "apply_masks",
    "check_flow",
    "check_masks",
    "create_model",
    "density",
    "erk_masks",
    "ghost_skips",
    "grasp_scores",
    "hamming_distance",
    "has_ghosts",
    "keep_above",
    "layerwise_cut",
    "learn_scales",
    "load_compact",
    "load_masks",
    "load_official_checkpoint",
    "magnitude_cut",
    "magnitude_scores",
    "masks_from_zeros",
    "model_names",
    "parse_techniques",
    "prunable_weights",
    "pswish",
    "random_scores",
    "relaxed_zero_filters",
    "save_compact",
    "save_masks",
    "smoothed_cross_entropy",
    "snip_scores",
    "sparsify",
    "synflow_masks",
    "synflow_scores",
    "taylor_scores",
    "ticket_rounds",
    "to_official",
]
