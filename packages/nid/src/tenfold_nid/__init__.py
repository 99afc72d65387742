"""Neural Implicit Dictionary Learning via Mixture-of-Expert Training (Wang, Fan, Chen and Wang, ICML 2022).

A class of signals is represented by a dictionary of coordinate networks, learned once; a new signal by a sparse
combination of them, found by solving a small linear system.
"""

from .compat import load_official_checkpoint, parse_official_config, save_official_checkpoint
from .coordinates import lattice
from .corruptions import observe_fraction, occlude, occluded_pixels, shift_colours
from .ct import pick_views, project, projection_design, ray_coordinates, sinogram, view_angles
from .data import celeba_image
from .dictionary import DictionaryConfig, Mixture, NeuralDictionary, celeba_config
from .errors import DataError
from .experts import IndependentExperts, SharedTrunkExperts, cheapest_route
from .export import pack_codes, save_onnx, single_signal, unpack_codes
from .fitting import (
    CodePrior,
    Posterior,
    System,
    fit_prior,
    gate_code,
    gate_input,
    posterior,
    refine_codes,
    ridge,
    system,
)
from .gating import Gates, cv_squared, dense_gates, importance, load, noisy_load, top_k_gates
from .losses import data_loss, l1_weights, sparsity_loss
from .metrics import atom_usage, psnr, ssim, surface_distance
from .networks import CoordinateNetwork, NetworkConfig, ffm, pe_mlp, siren
from .optimisation import (
    Losses,
    Objective,
    Sampled,
    adam,
    coordinate_chunks,
    gate_parameters,
    is_dense,
    objective,
    training_step,
)
from .patches import blend_windows, extract_windows, merge_patches, split_patches
from .robust import RobustFit, admm, irls
from .shapes import Mesh, extract_mesh, marching_cubes, point_cloud_loss, save_mesh, sdf_from_mesh
from .solvers import FitOptions, PatchModel, finetune_gate, fit_codes, inpaint
from .sparse import fista, omp
from .video import Separation, background_dictionary, separate

__version__ = "0.1.0"

__all__ = [
    "CodePrior",
    "CoordinateNetwork",
    "DataError",
    "DictionaryConfig",
    "FitOptions",
    "Gates",
    "IndependentExperts",
    "Losses",
    "Mesh",
    "Mixture",
    "NetworkConfig",
    "NeuralDictionary",
    "Objective",
    "PatchModel",
    "Posterior",
    "RobustFit",
    "Sampled",
    "Separation",
    "SharedTrunkExperts",
    "System",
    "adam",
    "admm",
    "atom_usage",
    "background_dictionary",
    "blend_windows",
    "celeba_config",
    "celeba_image",
    "cheapest_route",
    "coordinate_chunks",
    "cv_squared",
    "data_loss",
    "dense_gates",
    "extract_mesh",
    "extract_windows",
    "ffm",
    "finetune_gate",
    "fista",
    "fit_codes",
    "fit_prior",
    "gate_code",
    "gate_input",
    "gate_parameters",
    "importance",
    "inpaint",
    "irls",
    "is_dense",
    "l1_weights",
    "lattice",
    "load",
    "load_official_checkpoint",
    "marching_cubes",
    "merge_patches",
    "noisy_load",
    "objective",
    "observe_fraction",
    "occlude",
    "occluded_pixels",
    "omp",
    "pack_codes",
    "parse_official_config",
    "pe_mlp",
    "pick_views",
    "point_cloud_loss",
    "posterior",
    "project",
    "projection_design",
    "psnr",
    "ray_coordinates",
    "refine_codes",
    "ridge",
    "save_mesh",
    "save_official_checkpoint",
    "save_onnx",
    "sdf_from_mesh",
    "separate",
    "shift_colours",
    "single_signal",
    "sinogram",
    "siren",
    "sparsity_loss",
    "split_patches",
    "ssim",
    "surface_distance",
    "system",
    "top_k_gates",
    "training_step",
    "unpack_codes",
    "view_angles",
]
