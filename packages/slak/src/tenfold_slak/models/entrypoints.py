"""timm entry points: `timm.create_model("slak_tiny", features_only=True)` and the rest of timm's conveniences."""

from collections.abc import Callable
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from tenfold_slak.models.slak import VARIANTS, SLaK


def _cfg(**more: Any) -> dict[str, Any]:
    """Evaluation settings of the paper: 224 pixels, bicubic, crop 0.875. Weights: `load_official_checkpoint`."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "min_input_size": (3, 32, 32),
        "fixed_input_size": False,
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "downsample_layers.0.0",
        "classifier": "head",
        "license": "mit",
        "paper_ids": "arXiv:2207.03620",
        **more,
    }


default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg() for name in VARIANTS})


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(
            SLaK,
            name,
            pretrained,
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
            **{**VARIANTS[name].arguments, **kwargs},
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = VARIANTS[name].description
    build.__module__ = __name__
    return register_model(build)


for _name in VARIANTS:
    globals()[_name] = _entrypoint(_name)
