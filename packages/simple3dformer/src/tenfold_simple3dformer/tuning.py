"""Which parameters are trained (section 11): all, none of the blocks, the norms, or low-rank updates of the attention."""

from collections.abc import Collection
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tenfold_simple3dformer.backbone import freeze_image_path
from tenfold_simple3dformer.point import PointFormer

Mode = Literal["full", "frozen", "norm", "lora"]


class LowRank(nn.Module):
    """W + B A with A ~ N(0, 1 / rank) and B = 0, so that training starts at W."""

    def __init__(self, weight: Float[Tensor, "o i"], rank: int):
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1], dtype=weight.dtype) / rank**0.5)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank, dtype=weight.dtype))

    def forward(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        """The updated weight."""
        return weight + self.b @ self.a


def set_trainable(model: nn.Module, mode: Mode = "full", *, rank: int = 8) -> None:
    """Freeze what a mode does not train; the image path is always frozen, unless `train_image_path` follows.

    ``full`` trains everything else. ``frozen`` trains tokenizer, positions, head and the final norm, ``norm`` also the
    norms of the blocks and the class token, ``lora`` rank-``rank`` updates of qkv and the output projection.
    """
    vit = getattr(model, "vit", None)
    if vit is None:
        return
    if vit.patch_embed is not None:
        freeze_image_path(vit)
    if mode == "full":
        return
    for parameter in vit.parameters():
        parameter.requires_grad_(False)
    for parameter in vit.norm.parameters():
        parameter.requires_grad_(True)
    if mode == "norm":
        for block in vit.blocks:
            for norm in (block.norm1, block.norm2):
                for parameter in norm.parameters():
                    parameter.requires_grad_(True)
        if vit.cls_token is not None:
            vit.cls_token.requires_grad_(True)
    if mode == "lora":
        for block in vit.blocks:
            for linear in (block.attn.qkv, block.attn.proj):
                parametrize.register_parametrization(linear, "weight", LowRank(linear.weight, rank))


def train_image_path(model: nn.Module, loaded: Collection[str]) -> None:
    """For the image term: of the image path only what was ``loaded`` (names in the network) is frozen (section 2.5).

    The rest is random, and would tie the blocks to noise. The positions of a point network are trained even so, as released.
    """
    for name, parameter in model.named_parameters():
        positions = name == "vit.pos_embed"
        if positions or name.startswith(("vit.patch_embed.", "vit.head.")):
            parameter.requires_grad_(name not in loaded or (positions and isinstance(model, PointFormer)))


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with low-rank updates added to the weights that they belong to, under the plain keys."""
    state = {}
    for name, value in model.state_dict().items():
        module, found, part = name.partition(".parametrizations.weight.")
        if not found:
            state[name] = value
        elif part == "original":
            state[f"{module}.weight"] = cast(Tensor, model.get_submodule(module).weight).detach()
    return state


def merge_low_rank(model: nn.Module) -> None:
    """Bake low-rank updates into the weights they belong to, so that the keys are the plain ones again."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations["weight"][0], LowRank):  # type: ignore[index]
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
