"""Read-out heads (section 2.7)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold_shared.errors import UserError


class CosineHead(nn.Module):
    """AM-softmax without margin: s times the cosine between the feature and each class's column of ``W``.

    Norms are clamped at 1e-12.
    """

    def __init__(self, width: int, classes: int, scale: float = 30.0):
        super().__init__()
        self.scale = scale
        self.W = nn.Parameter(torch.empty(width, classes))
        nn.init.xavier_normal_(self.W)

    def forward(self, features: Float[Tensor, "*b c"]) -> Float[Tensor, "*b k"]:
        """Logits in [-s, s]."""
        return self.scale * F.normalize(features, dim=-1, eps=1e-12) @ F.normalize(self.W, dim=0, eps=1e-12)


def create_head(kind: str, width: int, classes: int) -> nn.Module:
    """``linear`` (truncated normal, std 0.02) or ``cosine``."""
    if classes < 1:
        raise UserError(f"a head needs at least one class, got {classes}")
    if kind == "cosine":
        return CosineHead(width, classes)
    head = nn.Linear(width, classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head
