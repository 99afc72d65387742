"""Dynamic sparse training of any module: prune the smallest weights, grow as many elsewhere (section 2.4)."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim import Optimizer

from tenfold_slak.masks import Masks, maskable_parameters

GROWTHS = ("random", "random_exact", "gradient", "momentum")


def prune(weight: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], rate: float) -> Bool[Tensor, "*shape"]:
    """The mask without its share `rate` of smallest weights.

    With n active weights, the `ceil((numel - n) + ceil(rate n))` positions of smallest |w| go; masked weights are zero,
    so they come first. No count is read back to the host.
    """
    active = mask.sum()
    inactive_and_removed = torch.ceil(mask.numel() - active + torch.ceil(rate * active.double()))
    order = torch.sort(weight.detach().abs().flatten(), stable=True).indices
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device)
    return mask & (rank >= inactive_and_removed).view_as(mask)


def grow_random(
    mask: Bool[Tensor, "*shape"], count: Tensor, uniform: Float[Tensor, "*shape"]
) -> Bool[Tensor, "*shape"]:
    """Grow `count` positions in expectation: each with probability count / inactive, drawn over the whole tensor."""
    inactive = (~mask).sum().clamp(min=1)
    return mask | (uniform < count.double() / inactive.double())


def grow_by_score(
    mask: Bool[Tensor, "*shape"], count: Tensor, score: Float[Tensor, "*shape"]
) -> Bool[Tensor, "*shape"]:
    """Grow exactly the `count` inactive positions of the largest score >= 0; a score that is not finite counts as 0."""
    score = torch.nan_to_num(score, nan=0.0, posinf=0.0, neginf=0.0).masked_fill(mask, -1.0)
    order = torch.sort(score.flatten(), descending=True, stable=True).indices
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device)
    return mask | ((rank < count).view_as(mask) & ~mask)


class CosinePruneRate:
    """The share of active weights that an update replaces, decaying by a cosine from its start to 0.005.

    `p(t) = eta_min + (start - eta_min)(1 + cos(pi t / T)) / 2`, by the recursion of PyTorch's `CosineAnnealingLR`,
    which also says how it goes on past T. It is advanced once an optimiser step, before it is used.

    Args:
        start: the first rate, in [0, 1].
        total_steps: T, optimiser steps of the whole training.
        eta_min: the last rate.

    Raises:
        ValueError: a rate outside [0, 1] or a T below 1.

    """

    def __init__(self, start: float, total_steps: int, eta_min: float = 0.005) -> None:
        if not 0 <= start <= 1:
            raise ValueError(f"the prune rate is a share of the active weights, in [0, 1]; got {start}")
        if total_steps < 1:
            raise ValueError(f"the prune rate decays over at least one step; got {total_steps}")
        self.start, self.total_steps, self.eta_min = start, total_steps, eta_min
        self.value, self.steps = start, 0

    def advance(self, steps: int = 1) -> float:
        """Move on and return the rate."""
        for _ in range(steps):
            self.steps += 1
            t, period, span = self.steps, self.total_steps, self.start - self.eta_min
            if (t - 1 - period) % (2 * period) == 0:
                self.value += span * (1 - math.cos(math.pi / period)) / 2
            else:
                ratio = (1 + math.cos(math.pi * t / period)) / (1 + math.cos(math.pi * (t - 1) / period))
                self.value = ratio * (self.value - self.eta_min) + self.eta_min
        return self.value


class DynamicSparseTraining:
    """Keeps a model sparse while the positions of its weights move (section 2.4).

    Call `step` once after each *optimiser* step (after gradient accumulation, after `GradScaler.step`) and before
    `zero_grad`; growth by gradient reads the accumulated gradients. Under autocast nothing else changes.

    Masks are keyed by bare parameter name, so a model may be wrapped by `DistributedDataParallel` before or after.
    Random draws depend on (seed, step, layer) alone: a resumed run continues with the same ones. With a process group,
    rank 0's masks are sent to all ranks at the start and after each change.

    Args:
        model: any module.
        masks: from `initial_masks`; parameters that have none stay dense.
        optimizer: whose SGD momentum is masked with the weights (Adam's moments are left alone, so that regrown weights
            start with warm moments) and read by growth by momentum.
        prune_rate: the decaying share of weights to replace.
        update_frequency: optimiser steps between two changes of the masks; 0 keeps them fixed.
        growth: `random` (count in expectation, as released), `random_exact`, `gradient` or `momentum`.
        seed: of random growth.
        uniform: replaces the draws: `uniform(name, weight)` returns a tensor of the weight's shape in [0, 1).

    Raises:
        ValueError: a mask that has no parameter or another shape, an unknown growth.

    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks,
        optimizer: Optimizer,
        prune_rate: CosinePruneRate,
        update_frequency: int = 100,
        growth: str = "random",
        seed: int = 0,
        uniform: Callable[[str, Tensor], Tensor] | None = None,
    ) -> None:
        if growth not in GROWTHS:
            raise ValueError(f"unknown growth {growth!r}: choose one of {', '.join(GROWTHS)}")
        if update_frequency < 0:
            raise ValueError(f"update_frequency counts optimiser steps, 0 for fixed masks; got {update_frequency}")
        self._all = maskable_parameters(model)
        self.optimizer, self.prune_rate, self.growth, self.seed = optimizer, prune_rate, growth, seed
        self.update_frequency, self.steps = update_frequency, 0
        self._uniform = uniform or self._draw
        self.masks: Masks = {}
        self._take(masks)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The masked parameters, by bare name."""
        return {name: self._all[name] for name in self.masks}

    @torch.no_grad()
    def step(self) -> bool:
        """Mask the weights again and, every `update_frequency` steps, move the masks. Returns whether they moved."""
        self.apply()
        rate = self.prune_rate.advance()
        self.steps += 1
        if not self.update_frequency or self.steps % self.update_frequency:
            return False
        self._update(rate)
        return True

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the masked weights, and the momentum of SGD there."""
        for name, weight in self.parameters.items():
            weight.mul_(self.masks[name])
            buffer = self.optimizer.state.get(weight, {}).get("momentum_buffer")
            if buffer is not None:
                buffer.mul_(self.masks[name])

    def _update(self, rate: float) -> None:
        pruned = {name: prune(weight, self.masks[name], rate) for name, weight in self.parameters.items()}
        for name, weight in self.parameters.items():
            removed = self.masks[name].sum() - pruned[name].sum()
            self.masks[name] = self._grow(name, weight, pruned[name], removed)
        self._broadcast()
        self.apply()

    def _grow(self, name: str, weight: Tensor, mask: Tensor, count: Tensor) -> Tensor:
        if self.growth == "random":
            return grow_random(mask, count, self._uniform(name, weight))
        if self.growth == "random_exact":
            return grow_by_score(mask, count, self._uniform(name, weight))
        if self.growth == "gradient":
            if weight.grad is None:
                raise ValueError(f"growth by gradient found none for {name}: call step() before zero_grad()")
            return grow_by_score(mask, count, weight.grad.abs())
        state = self.optimizer.state.get(weight, {})
        if "exp_avg" in state:
            return grow_by_score(mask, count, (state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)).abs())
        if state.get("momentum_buffer") is not None:
            return grow_by_score(mask, count, state["momentum_buffer"].abs())
        raise ValueError(f"growth by momentum needs an optimiser that keeps one; it has none for {name}")

    def _draw(self, name: str, weight: Tensor) -> Tensor:
        layer = list(self._all).index(name)
        # A generator a draw: no generator state has to be saved, moved between devices or kept equal on all ranks.
        seed = ((self.seed * 1_000_003 + self.steps) * 10_007 + layer) % 2**64  # what a generator takes
        generator = torch.Generator(weight.device).manual_seed(seed)
        return torch.rand(weight.shape, generator=generator, device=weight.device)

    def _broadcast(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            return
        for name, mask in self.masks.items():
            sent = mask.to(torch.uint8)
            dist.broadcast(sent, src=0)
            self.masks[name] = sent.bool()

    @torch.no_grad()
    def _take(self, masks: Masks) -> None:
        for name, mask in masks.items():
            if name not in self._all:
                raise ValueError(f"there is a mask for {name!r}, but the model has no such weight of 2 or 4 dimensions")
            if mask.shape != self._all[name].shape:
                raise ValueError(
                    f"the mask of {name} has shape {tuple(mask.shape)}, its weight {tuple(self._all[name].shape)}"
                )
        self.masks = {
            name: masks[name].to(device=weight.device, dtype=torch.bool, copy=True)
            for name, weight in self._all.items()
            if name in masks
        }
        self._broadcast()
        self.apply()

    def densities(self) -> dict[str, float]:
        """Share of active weights by layer."""
        return {name: float(mask.sum()) / mask.numel() for name, mask in self.masks.items()}

    def state_dict(self) -> dict[str, Any]:
        """Masks, step counter and prune rate: all that a resumed run needs besides model and optimiser."""
        return {
            "masks": {name: mask.clone() for name, mask in self.masks.items()},
            "steps": self.steps,
            "prune_rate": {"value": self.prune_rate.value, "steps": self.prune_rate.steps},
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: a mask that does not fit the model.

        """
        self._take(state["masks"])
        self.steps, self.seed = state["steps"], state["seed"]
        self.prune_rate.value, self.prune_rate.steps = state["prune_rate"]["value"], state["prune_rate"]["steps"]
