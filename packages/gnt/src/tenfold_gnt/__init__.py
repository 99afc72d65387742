"""GNT, the Generalizable NeRF Transformer (Varma T et al., ICLR 2023): novel views by attention alone.

A target ray's sample points are projected into posed source views; a view transformer fuses what they show, a ray
transformer mixes the points of the ray, and the colour is a linear map of the mean token.
"""

from tenfold_gnt.compat import (
    CheckpointError,
    OfficialCheckpoint,
    load_official_checkpoint,
    save_official_checkpoint,
)
from tenfold_gnt.features import FeatureMaps, ResUNet
from tenfold_gnt.network import GNT, RenderedRays, confidence_of, depth_of, occlusion_of
from tenfold_gnt.objective import Optimisation, RayBatch, accumulate_gradients, build_optimiser, train_step
from tenfold_gnt.projection import SourceViews, ViewSamples, sample_views, source_views
from tenfold_gnt.render import Model, Picture, Sampling, Views, prepare_views, render_picture, render_rays

__version__ = "0.1.0"

__all__ = [
    "GNT",
    "CheckpointError",
    "FeatureMaps",
    "Model",
    "OfficialCheckpoint",
    "Optimisation",
    "Picture",
    "RayBatch",
    "RenderedRays",
    "ResUNet",
    "Sampling",
    "SourceViews",
    "ViewSamples",
    "Views",
    "accumulate_gradients",
    "build_optimiser",
    "confidence_of",
    "depth_of",
    "load_official_checkpoint",
    "occlusion_of",
    "prepare_views",
    "render_picture",
    "render_rays",
    "sample_views",
    "save_official_checkpoint",
    "source_views",
    "train_step",
]
