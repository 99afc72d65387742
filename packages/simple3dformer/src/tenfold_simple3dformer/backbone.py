"""The image transformer that every task shares, unchanged (section 2.1): any plain ViT of timm.

Its blocks take whatever tokens a tokenizer makes; its class token is the read-out; its image path (patch embedding,
image positions, image head) stays for the learning-without-forgetting term and for comparing with the 2D network.
"""

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tenfold_shared.errors import UserError

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

DEIT = {"tiny": "deit_tiny_patch16_224", "small": "deit_small_patch16_224", "base": "deit_base_patch16_224"}
"""The backbones of the paper by their short names."""


def create_vit(
    name: str = "small", *, heads: int = 0, depth: int = 0, classes: int | None = None, **options: Any
) -> "VisionTransformer":
    """A plain ViT with random weights: linear weights truncated normal (std 0.02, cut at +-2), biases 0.

    Args:
        name: ``tiny``, ``small`` or ``base`` (DeiT), ``mini`` (width 64, 3 blocks, 32-pixel grey images), or the name of
            any ViT in timm.
        heads: attention heads; 0 takes the architecture's own. The released code gives every base model 3.
        depth: blocks; 0 takes the architecture's own.
        classes: classes of the image head; None keeps the architecture's own.
        options: further arguments of timm's constructor.

    Raises:
        UserError: timm has no such model, or it is no plain ViT.

    """
    import timm  # noqa: PLC0415 - slower to import than torch
    from timm.models.vision_transformer import VisionTransformer  # noqa: PLC0415

    if heads:
        options["num_heads"] = heads
    if depth:
        options["depth"] = depth
    if classes is not None:
        options["num_classes"] = classes
    if depth < 0 or heads < 0:
        raise UserError(f"--model.depth and --model.heads take 0 or more, got {depth} and {heads}")
    if name == "mini":
        mini = {
            "img_size": 32,
            "patch_size": 8,
            "in_chans": 1,
            "num_classes": 22,
            "embed_dim": 64,
            "depth": 3,
            "num_heads": 4,
        }
        try:
            return VisionTransformer(**{**mini, **options})
        except (TypeError, ValueError, AssertionError) as error:
            raise UserError(f"backbone mini: {error}") from error
    try:
        vit = timm.create_model(DEIT.get(name, name), pretrained=False, **options)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        near = timm.list_models(f"*{name.split('_', maxsplit=1)[0]}*vit*") or timm.list_models("deit*")
        raise UserError(
            f"backbone {name!r}: {error}; use tiny, small, base, mini or a plain ViT of timm such as {near[0]}"
        ) from error
    return plain(vit, name)


def plain(vit: nn.Module, name: str = "the backbone") -> "VisionTransformer":
    """The module itself when its blocks can be run on tokens of any origin.

    Raises:
        UserError: it is no plain ViT: another architecture, or one with rotary or relative positions inside its blocks.

    """
    from timm.models.vision_transformer import VisionTransformer  # noqa: PLC0415

    distilled = getattr(vit, "dist_token", None) is not None
    if not isinstance(vit, VisionTransformer) or getattr(vit, "rope", None) is not None or distilled:
        raise UserError(
            f"{name} ({type(vit).__name__}) is no plain VisionTransformer of timm; take a ViT, or a DeiT without a "
            "distillation token"
        )
    return vit


def copy_vit(vit: "VisionTransformer") -> "VisionTransformer":
    """An independent copy, for a frozen teacher."""
    return copy.deepcopy(vit)


def width(vit: "VisionTransformer") -> int:
    """Token width C."""
    return int(vit.embed_dim)


def heads(vit: "VisionTransformer") -> int:
    """Attention heads of the first block."""
    return int(cast(Any, vit.blocks[0]).attn.num_heads)


def prefix_length(vit: "VisionTransformer") -> int:
    """Tokens before the data's: the class token and registers, if there are any."""
    return int(vit.num_prefix_tokens)


def run_blocks(
    vit: "VisionTransformer", tokens: Float[Tensor, "b t c"], positions: Float[Tensor, "#b p c"] | None = None
) -> Float[Tensor, "b s c"]:
    """Prepend the class token, add the positions, run all blocks and the final norm (section 2.1).

    Args:
        vit: the backbone.
        tokens: the tokens of one kind of data.
        positions: one for every token, or one more in front for the class token; None adds nothing.

    Returns the prefix tokens (class token, then registers) followed by the data's tokens.
    """
    if positions is not None and positions.shape[1] == tokens.shape[1]:
        tokens, positions = tokens + positions, None
    batch = tokens.shape[0]
    prefix = [] if vit.cls_token is None else [vit.cls_token.expand(batch, -1, -1)]
    if positions is not None:
        tokens = torch.cat([*prefix, tokens], 1) + positions
        prefix = []
    if (
        getattr(vit, "reg_token", None) is not None
    ):  # registers stand between the class token and the data and have no positions
        registers = cast(Tensor, vit.reg_token).expand(batch, -1, -1)
        head = tokens[:, :1] if positions is not None else torch.cat([*prefix, tokens[:, :0]], 1)
        rest = tokens[:, 1:] if positions is not None else tokens
        tokens = torch.cat([head, registers, rest], 1)
    elif prefix:
        tokens = torch.cat([*prefix, tokens], 1)
    return vit.norm(vit.blocks(vit.norm_pre(tokens)))


def read_out(vit: "VisionTransformer", tokens: Float[Tensor, "b s c"]) -> Float[Tensor, "b c"]:
    """Token 0, the class token; for a backbone without one, the mean of the tokens."""
    return tokens.mean(1) if vit.cls_token is None else tokens[:, 0]


def positions_needed(vit: "VisionTransformer", tokens: int) -> int:
    """How many learned positions go with that many data tokens: one more where the class token has one."""
    return tokens + (0 if vit.cls_token is None else 1)


def strip_image_path(vit: "VisionTransformer") -> "VisionTransformer":
    """The backbone without what only images need; its blocks, norm and class token remain."""
    vit.patch_embed = nn.Identity()
    vit.pos_embed = None
    vit.head = nn.Identity()
    return vit


def image_parameters(vit: "VisionTransformer") -> list[nn.Parameter]:
    """Parameters of the image path: patch embedding, image positions, image head."""
    own = [vit.pos_embed] if isinstance(vit.pos_embed, nn.Parameter) else []
    return [*own, *vit.patch_embed.parameters(), *vit.head.parameters()]


def freeze_image_path(vit: "VisionTransformer") -> None:
    """Patch embedding, image positions and image head are constants (section 2.5); blocks, norm and class token train."""
    for parameter in image_parameters(vit):
        parameter.requires_grad_(False)
