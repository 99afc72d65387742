"""Renderers by name and by their sizes (section 3)."""

import dataclasses
from typing import Literal

from torch import nn

from tenfold_augnerf.fields import NeRF
from tenfold_augnerf.mip import MipNeRF, MipRenderer
from tenfold_augnerf.renderer import RaySampling, Renderer, Variant
from tenfold_shared.errors import UserError

MOST_OCTAVES = 60  # of single precision's range


@dataclasses.dataclass
class ModelConfig:
    """The networks."""

    kind: Literal["nerf", "mip-nerf"] = "nerf"
    """Points with a coarse and a fine network, or conical frustums with one for both passes."""
    depth: int = 8
    """Layers of the trunk."""
    width: int = 256
    """Size of the layers; the released Aug-NeRF has 512."""
    octaves: int = 10
    """Octaves of the encoding of points."""
    view_octaves: int = 4
    """Octaves of the encoding of directions."""
    viewdirs: bool = True
    """Let colour depend on the direction."""
    use_embed: bool = True
    """Encode positions and directions."""
    conv_embed: bool = False
    """Convolve the encodings along the ray."""
    density: Literal["relu", "softplus"] = "relu"
    """Activation of the density; softplus cannot die."""

    def __post_init__(self) -> None:
        """Refuse sizes that make no network."""
        if self.depth < 1 or self.depth == 5 or self.width < 2:
            raise UserError(f"--model.depth {self.depth} and width {self.width}: take 2 or more, and any depth but 5")
        least = 1 if self.kind == "mip-nerf" else 0
        if not (least <= self.octaves <= MOST_OCTAVES and 0 <= self.view_octaves <= MOST_OCTAVES):
            raise UserError(
                f"--model.octaves {self.octaves} and view_octaves {self.view_octaves}: take {least} to {MOST_OCTAVES}"
            )
        if self.kind == "mip-nerf" and (not self.viewdirs or not self.use_embed or self.conv_embed):
            raise UserError("--model.viewdirs, use_embed and conv_embed are for --model.kind nerf: leave them out")


MODELS = {
    "nerf": ModelConfig(),
    "nerf-without-views": ModelConfig(viewdirs=False),
    "reference": ModelConfig(width=512),
    "reference-without-views": ModelConfig(width=512, viewdirs=False),
    "reference-identity": ModelConfig(width=512, use_embed=False),
    "reference-conv": ModelConfig(width=512, conv_embed=True),
    "mip-nerf": ModelConfig(kind="mip-nerf", octaves=16),
    "tiny": ModelConfig(depth=4, width=64, octaves=6, view_octaves=2, density="softplus"),
}
"""The specification's architectures; `reference` is the released code's width."""


def create_field(config: ModelConfig) -> nn.Module:
    """One field of the given sizes."""
    if config.kind == "mip-nerf":
        return MipNeRF(config.depth, config.width, config.octaves, config.view_octaves)
    return NeRF(
        config.depth,
        config.width,
        config.octaves,
        config.view_octaves,
        viewdirs=config.viewdirs,
        use_embed=config.use_embed,
        conv_embed=config.conv_embed,
        density=config.density,
    )


def create_model(
    model: str | ModelConfig,
    sampling: RaySampling,
    *,
    white: bool = False,
    variant: Variant = Variant(),  # noqa: B008
) -> Renderer:
    """A renderer by name or sizes; the auxiliary branch adds its third network, drawn last: the others are the same without.

    Raises:
        UserError: an unknown name.

    """
    if isinstance(model, str):
        if model not in MODELS:
            raise UserError(f"there is no model {model!r}: the names are {', '.join(MODELS)}")
        model = MODELS[model]
    fine = create_field(model) if sampling.fine and model.kind == "nerf" else None
    coarse = create_field(model)
    auxiliary = create_field(model) if variant.branch == "auxiliary" else None
    if model.kind == "mip-nerf":
        return MipRenderer(coarse, auxiliary, sampling=sampling, white=white, variant=variant)
    return Renderer(coarse, fine, auxiliary, sampling=sampling, white=white, variant=variant)
