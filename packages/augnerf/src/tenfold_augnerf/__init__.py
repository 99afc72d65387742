"""Aug-NeRF: radiance fields trained against worst-case perturbations, with the adversary connected.

The paper's three levels of perturbation are in `perturbation` (where), `attack` (inner maximisation) and `objective` (outer
step, and its modes of cost); `renderer` is the pipeline they act on, `fields` and `mip` the networks, `weights` the
perturbations of weights, `corruptions` and `geometry` the experiments' data and measures, `compat` the released layouts.
"""

from tenfold_augnerf.attack import Step, attack, maximise, steps_of
from tenfold_augnerf.augment import augment
from tenfold_augnerf.cameras import Rays
from tenfold_augnerf.compat import CheckpointError, load_official_checkpoint, to_official
from tenfold_augnerf.fields import Field, NeRF, Samples
from tenfold_augnerf.mip import MipNeRF, MipRenderer
from tenfold_augnerf.models import MODELS, ModelConfig, create_model
from tenfold_augnerf.objective import Adversary, Batch, Losses, Objective, accumulate
from tenfold_augnerf.perturbation import KEYS, describe_budget, radius
from tenfold_augnerf.renderer import RELEASED, Draws, RaySampling, Renderer, Rendering, Variant, criterion
from tenfold_augnerf.schedules import RadiusControl, RadiusSchedule, learning_rate
from tenfold_augnerf.weights import WeightPerturbation, sharpness_aware

__all__ = [
    "KEYS",
    "MODELS",
    "RELEASED",
    "Adversary",
    "Batch",
    "CheckpointError",
    "Draws",
    "Field",
    "Losses",
    "MipNeRF",
    "MipRenderer",
    "ModelConfig",
    "NeRF",
    "Objective",
    "RadiusControl",
    "RadiusSchedule",
    "RaySampling",
    "Rays",
    "Renderer",
    "Rendering",
    "Samples",
    "Step",
    "Variant",
    "WeightPerturbation",
    "accumulate",
    "attack",
    "augment",
    "create_model",
    "criterion",
    "describe_budget",
    "learning_rate",
    "load_official_checkpoint",
    "maximise",
    "radius",
    "sharpness_aware",
    "steps_of",
    "to_official",
]
