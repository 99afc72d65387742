"""Exponential moving average of the weights of a sparse model (section 2.4)."""

import copy

import torch
from torch import Tensor, nn

from tenfold_slak.masks import Masks, bare_name, by_bare_name


class SparseEMA:
    """A moving average that follows the masks.

    Dense entries: `e = d e + (1 - d) w`. Masked tensors: `e = mask (d e + (1 - d) w) + d w [mask = 1 and e = 0]`, so
    that a pruned entry is zero at once and a newly grown one takes the full current weight. Buffers are averaged
    likewise; integer ones are copied.

    Args:
        model: the model to follow; `module` is its averaged copy, in eval mode.
        decay: d, in [0, 1).

    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of an average is in [0, 1); got {decay}")
        self.decay = decay
        unwrapped = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.module = copy.deepcopy(unwrapped).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, masks: Masks | None = None) -> None:
        """Move towards the model's weights; call it after the masks were applied."""
        masks = masks or {}
        current = by_bare_name(model.state_dict().items())
        for name, average in self.module.state_dict().items():
            value = current[bare_name(name)].to(average.device)
            if not average.is_floating_point():
                average.copy_(value)
                continue
            mask = masks.get(bare_name(name))
            if mask is None:
                average.lerp_(value, 1 - self.decay)
                continue
            grown = mask & (average == 0)
            average.lerp_(value, 1 - self.decay).add_(value * grown, alpha=self.decay).mul_(mask)

    def state_dict(self) -> dict[str, Tensor]:
        """Of the averaged copy."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Into the averaged copy."""
        self.module.load_state_dict(state)
