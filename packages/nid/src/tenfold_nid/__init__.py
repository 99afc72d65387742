"""Neural Implicit Dictionary Learning via Mixture-of-Expert Training (Wang, Fan, Chen and Wang, ICML 2022)."""

from .coordinates import lattice
from .corruptions import observe_fraction, occlude, occluded_pixels, shift_colours
from .ct import project, projection_design, ray_coordinates, sinogram, view_angles
from .data import celeba_image
from .dictionary import DictionaryConfig, Mixture, NeuralDictionary, celeba_config
from .gating import Gates, cv_squared, top_k_gates
from .metrics import psnr, ssim, surface_distance
from .networks import CoordinateNetwork, NetworkConfig, ffm, pe_mlp, siren
from .patches import merge_patches, split_patches
from .shapes import extract_mesh, marching_cubes, point_cloud_loss
from .training import Objective, adam, gate_parameters, is_dense, objective, training_step
