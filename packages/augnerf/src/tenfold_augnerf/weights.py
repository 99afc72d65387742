"""Perturbations of the weights: the adversarial one of section 2.5 (AWP), and the sharpness-aware step (SAM)."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

TINY = 1e-20


def moved() -> None:
    """To be called wherever weights move: autocast would go on with the copies that it made of them before."""
    torch.clear_autocast_cache()


class WeightPerturbation:
    """AWP: a copy of the model takes one Adam step up the loss; the direction, scaled to each weight's norm, is added.

    v = w_proxy - w, then v <- ‖w‖ / (‖v‖ + 1e-20) v, and w + γ v during the outer pass. Only tensors of two or more
    dimensions that are called weights move. The proxy's weights are fresh at every step, its Adam state persists.

    Args:
        model: copied once.
        gamma: γ.
        lr: of the proxy's Adam.

    """

    def __init__(self, model: nn.Module, gamma: float = 0.01, lr: float = 5e-4) -> None:
        self.gamma = gamma
        self.proxy = copy.deepcopy(model)
        self.optimiser = torch.optim.Adam(self.proxy.parameters(), lr=lr)

    def direction(self, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
        """V of every perturbed weight, for the loss that is to rise; a weight without gradient gets zero."""
        self.proxy.load_state_dict(model.state_dict())
        self.optimiser.zero_grad()
        (-loss(self.proxy)).backward()
        self.optimiser.step()
        after = dict(self.proxy.named_parameters())
        found = {}
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "weight" in name:
                difference = (after[name] - weight).detach()
                found[name] = weight.detach().norm() / (difference.norm() + TINY) * difference
        return found

    @contextmanager
    def applied(self, model: nn.Module, direction: Mapping[str, Tensor]) -> Iterator[None]:
        """The model at w + γ v; γ v is taken off again at the end, after whatever the optimiser did meanwhile."""
        weights = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in direction.items():
                weights[name].add_(value, alpha=self.gamma)
        moved()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in direction.items():
                    weights[name].sub_(value, alpha=self.gamma)
            moved()

    def state_dict(self) -> dict[str, Any]:
        """The proxy's Adam state: all that lasts from step to step."""
        return self.optimiser.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.optimiser.load_state_dict(state)


@contextmanager
def sharpness_aware(model: nn.Module, rho: float = 0.05) -> Iterator[None]:
    """SAM: the model at w + ρ g / ‖g‖ for the gradient g it holds, which is cleared; the weights come back at the end."""
    held = [parameter for parameter in model.parameters() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in held if parameter.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    before = [parameter.detach().clone() for parameter in held]
    with torch.no_grad():
        for parameter, gradient in zip(held, gradients, strict=True):
            parameter.add_(gradient * (rho / (norm + 1e-12)))
            parameter.grad = None
    moved()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(held, before, strict=True):
                parameter.copy_(value)
        moved()
