"""Optimisers and schedules (section 6): ours, and what the released scripts do in fact."""

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import nn

from tenfold_shared.errors import UserError

RELEASED_WARM_UP = 1999
"""Period of the released warm-up, 2 / (1 - beta_2) of Adam; it is stepped once an epoch, so it never ends."""


@dataclasses.dataclass
class Optim:
    """The optimiser, its learning rates and how they change."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    """Optimiser."""
    lr: float = 1e-3
    """Learning rate of what is new: tokenizer, positions, head."""
    lr_blocks: float = 1e-4
    """Learning rate of the backbone."""
    weight_decay: float = 0.05
    """Weight decay."""
    momentum: float = 0.9
    """Momentum of SGD."""
    schedule: Literal["cosine", "step", "released_voxel", "constant"] = "cosine"
    """Learning rate over time; released_voxel multiplies ``step`` with a warm-up that never ends."""
    warmup_epochs: float = 5.0
    """Linear warm-up of the cosine schedule, by step."""
    warmup_steps: int = 0
    """The same in steps; 0: by epochs."""
    step_epochs: int = 20
    """Epochs between the drops of ``step``."""
    gamma: float = 0.5
    """Factor of each drop."""
    floor: float = 0.0
    """Lowest learning rate of ``step``; where ``cosine`` begins its warm-up and ends."""
    clip: float = 0.0
    """Largest norm of the gradient; 0: any."""
    bn_momentum: float = 0.0
    """Momentum of the batch norms, times ``bn_gamma`` every ``bn_epochs``; 0: torch's own, constant."""
    bn_gamma: float = 0.5
    """Factor of the batch norms' momentum."""
    bn_epochs: int = 20
    """Epochs between its drops."""
    bn_floor: float = 0.01
    """Its lowest value."""

    def __post_init__(self) -> None:
        """Refuse rates that are none."""
        if not (self.lr >= 0 and self.lr_blocks >= 0):
            raise UserError(f"--optim.lr and --optim.lr_blocks take 0 or more, got {self.lr} and {self.lr_blocks}")
        for name in ("weight_decay", "momentum", "warmup_epochs", "warmup_steps", "gamma", "floor", "clip", "bn_floor"):
            if not getattr(self, name) >= 0:
                raise UserError(f"--optim.{name} takes 0 or more, got {getattr(self, name)}")
        for name in ("bn_momentum", "bn_gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--optim.{name} takes 0 to 1, got {getattr(self, name)}")
        for name in ("step_epochs", "bn_epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"--optim.{name} takes 1 or more epochs, got {getattr(self, name)}")


def build_optimiser(config: Optim, model: nn.Module) -> torch.optim.Optimizer:
    """Two groups, the backbone's and the new parameters', each with its peak under ``peak``; frozen ones are left out.

    Raises:
        UserError: nothing is left to train.

    """
    blocks = [p for n, p in model.named_parameters() if p.requires_grad and n.startswith("vit.")]
    new = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("vit.")]
    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr": lr, "peak": lr}
        for parameters, lr in ((blocks, config.lr_blocks), (new, config.lr))
        if parameters
    ]
    if not groups:
        raise UserError("nothing is left to train: choose another --tune")
    if config.name == "sgd":
        return torch.optim.SGD(groups, config.lr, config.momentum, weight_decay=config.weight_decay)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(groups, config.lr, weight_decay=config.weight_decay)


def rate(config: Optim, peak: float, step: int, per_epoch: int, total: int) -> float:
    """The learning rate of a step whose peak is ``peak``."""
    epoch = step // per_epoch
    if config.schedule == "constant":
        return peak
    if config.schedule == "cosine":
        warm = config.warmup_steps or round(config.warmup_epochs * per_epoch)
        warm = min(warm, total // 2)
        low = min(config.floor, peak)
        if step < warm:
            return low + (peak - low) * (step + 1) / warm
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
    value = max(peak * config.gamma ** (epoch // config.step_epochs), min(config.floor, peak))
    if config.schedule == "released_voxel":
        value *= min(1.0, (epoch + 1) / RELEASED_WARM_UP)
    return value


def set_rates(optimiser: Any, config: Optim, step: int, per_epoch: int, total: int) -> None:
    """Set the learning rates of a step."""
    for group in optimiser.param_groups:
        group["lr"] = rate(config, group["peak"], step, per_epoch, total)


def set_norm_momentum(model: nn.Module, config: Optim, epoch: int) -> None:
    """Set the momentum of the batch norms for an epoch."""
    if not config.bn_momentum:
        return
    value = max(config.bn_momentum * config.bn_gamma ** (epoch // config.bn_epochs), config.bn_floor)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = value
