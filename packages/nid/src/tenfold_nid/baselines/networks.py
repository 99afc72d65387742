"""One coordinate network a signal, from scratch or from a meta-learned start, and an auto-decoder (section 8)."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..networks import CoordinateNetwork, NetworkConfig, batched_mlp, embedding, stacked_layers

Optimiser = Literal["adam", "sgd"]


class NetworkBatch(nn.Module):
    """Many networks of one shape, one a signal, on a common embedding; layers are batched products.

    Args:
        config: shape of each network.
        count: their number; 1 for the start that meta-learning learns.

    """

    def __init__(self, config: NetworkConfig, count: int) -> None:
        super().__init__()
        self.config = config
        self.map = embedding(config)
        self.weights, self.biases = stacked_layers(config, self.map.out_dim, count)  # type: ignore[arg-type]

    def forward(self, coords: Float[Tensor, "*points in_dim"]) -> Float[Tensor, "nets points out_dim"]:
        """Every network at coordinates common to all [points, m], or its own [nets, points, m]."""
        features = self.map(coords)
        return batched_mlp(
            [*self.weights], [*self.biases], features[None] if features.ndim == 2 else features, self.config.act_type
        )

    def repeated(self, count: int) -> "NetworkBatch":
        """``count`` networks that start from the first one of this batch."""
        batch = NetworkBatch(self.config, count).to(self.weights[0])
        batch.map.load_state_dict(self.map.state_dict())
        with torch.no_grad():
            for mine, start in zip(batch.parameters(), self.parameters(), strict=True):
                mine.copy_(start[:1].expand_as(mine))
        return batch

    def single(self, index: int) -> CoordinateNetwork:
        """One network of the batch on its own."""
        network = CoordinateNetwork(self.config).to(self.weights[0])
        network.map.load_state_dict(self.map.state_dict())
        with torch.no_grad():
            for layer, weight, bias in zip(network.net.net, self.weights, self.biases, strict=True):
                layer[0].weight.copy_(weight[index])  # type: ignore[index]
                layer[0].bias.copy_(bias[index])  # type: ignore[index]
        return network


def signal_losses(
    preds: Float[Tensor, "nets points channels"],
    targets: Float[Tensor, "nets points channels"],
    weights: Float[Tensor, "nets points"] | None,
) -> Float[Tensor, ""]:
    """Mean squared error of each signal over its observed points, summed: each gradient is as if it were alone."""
    squared = (preds - targets).square().mean(dim=-1)
    if weights is None:
        return squared.mean(dim=1).sum()
    return ((squared * weights).sum(dim=1) / weights.sum(dim=1)).sum()


def fit_networks(
    networks: nn.Module,
    coords: Float[Tensor, "*points in_dim"],
    targets: Float[Tensor, "nets points channels"],
    weights: Float[Tensor, "nets points"] | None = None,
    *,
    lr: float = 1e-4,
    optimiser: Optimiser = "adam",
) -> Iterator[int]:
    """Train every network on its signal; yields the number of steps done, 0 first, for as long as it is asked.

    Args:
        networks: a ``NetworkBatch``, or a module that shows one otherwise; trained in place.
        coords: where the signals were sampled.
        targets: their samples.
        weights: 1 for an observed sample, 0 for one that is not.
        lr: step size.
        optimiser: Adam, or plain gradient descent as in the inner loop of MAML.

    """
    parameters = list(networks.parameters())
    chosen = (
        torch.optim.Adam(parameters, lr=lr, fused=True) if optimiser == "adam" else torch.optim.SGD(parameters, lr=lr)
    )
    step = 0
    while True:
        yield step
        loss = signal_losses(networks(coords), targets, weights)
        chosen.zero_grad(set_to_none=True)
        loss.backward()
        chosen.step()
        step += 1


class Adapted(NamedTuple):
    """Networks after a few inner steps from a common start."""

    weights: list[Float[Tensor, "nets out in"]]
    biases: list[Float[Tensor, "nets out"]]


def adapt(
    start: NetworkBatch,
    features: Float[Tensor, "points width"],
    targets: Float[Tensor, "nets points channels"],
    *,
    steps: int,
    lr: float,
    second_order: bool,
) -> Adapted:
    """Inner loop: gradient descent from the start on every signal at once; differentiable when ``second_order``."""
    count, act = len(targets), start.config.act_type
    weights = [w.expand(count, -1, -1) for w in start.weights]
    biases = [b.expand(count, -1) for b in start.biases]
    for _ in range(steps):
        loss = signal_losses(batched_mlp(weights, biases, features[None], act), targets, None)
        gradients = torch.autograd.grad(loss, [*weights, *biases], create_graph=second_order)
        moved = [p - lr * g for p, g in zip([*weights, *biases], gradients, strict=True)]
        weights, biases = moved[: len(weights)], moved[len(weights) :]
    return Adapted(weights, biases)


def maml_step(
    start: NetworkBatch,
    optimizer: torch.optim.Optimizer,
    coords: Float[Tensor, "points in_dim"],
    targets: Float[Tensor, "nets points channels"],
    *,
    inner_steps: int = 2,
    inner_lr: float = 1e-2,
    second_order: bool = True,
) -> Float[Tensor, ""]:
    """One outer step of model-agnostic meta-learning: the loss after the inner steps, differentiated through them."""
    features = start.map(coords)
    adapted = adapt(start, features, targets, steps=inner_steps, lr=inner_lr, second_order=second_order)
    preds = batched_mlp(adapted.weights, adapted.biases, features[None], start.config.act_type)
    loss = signal_losses(preds, targets, None) / len(targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def reptile_step(
    start: NetworkBatch,
    coords: Float[Tensor, "points in_dim"],
    targets: Float[Tensor, "nets points channels"],
    *,
    inner_steps: int = 8,
    inner_lr: float = 1e-2,
    rate: float = 0.1,
) -> Float[Tensor, ""]:
    """One step of Reptile, ``θ ← θ + ε (mean θ' - θ)``, with θ' the networks after the inner steps.

    Returns:
        Squared length of ``mean θ' - θ``; not finite where the inner steps diverge.

    """
    features = start.map(coords)
    with torch.enable_grad():
        adapted = adapt(start, features, targets, steps=inner_steps, lr=inner_lr, second_order=False)
    length = coords.new_zeros(())
    for parameter, moved in zip([*start.weights, *start.biases], [*adapted.weights, *adapted.biases], strict=True):
        target = moved.mean(dim=0, keepdim=True)
        length = length + (target - parameter).square().sum()
        parameter.lerp_(target, rate)
    return length


class AutoDecoder(nn.Module):
    """One network for all signals; a learned latent vector is concatenated to the coordinates (DeepSDF style).

    Args:
        config: shape of the network; ``in_dim`` counts the coordinates alone.
        latent_dim: length of a signal's latent vector.
        num_signals: training signals.

    """

    def __init__(self, config: NetworkConfig, latent_dim: int, num_signals: int) -> None:
        super().__init__()
        self.config = config
        self.map = embedding(config)
        embedded = NetworkConfig(
            in_dim=self.map.out_dim + latent_dim,  # type: ignore[arg-type, operator]
            out_dim=config.out_dim,
            hidden_dim=config.hidden_dim,
            num_layers=config.num_layers,
            pos_emb="Id",
            act_type=config.act_type,
        )
        self.network = CoordinateNetwork(embedded)
        self.latents = nn.Embedding(num_signals, latent_dim)
        nn.init.normal_(self.latents.weight, std=0.01)

    def decode(
        self, latent: Float[Tensor, "batch latent"], coords: Float[Tensor, "*places in_dim"]
    ) -> Float[Tensor, "batch points channels"]:
        """Signals with these latent vectors at coordinates common to all [points, m], or its own [batch, points, m]."""
        features = self.map(coords)
        wide = latent[:, None].expand(-1, coords.shape[-2], -1)
        return self.network(torch.cat([features.expand(len(latent), -1, -1), wide], dim=-1))

    def forward(
        self, ids: Int[Tensor, " batch"], coords: Float[Tensor, "points in_dim"]
    ) -> Float[Tensor, "batch points channels"]:
        """Training signals with these ids."""
        return self.decode(self.latents(ids), coords)


def fit_latents(
    decoder: AutoDecoder,
    coords: Float[Tensor, "*places in_dim"],
    targets: Float[Tensor, "batch points channels"],
    weights: Float[Tensor, "batch points"] | None = None,
    *,
    lr: float = 1e-2,
    prior: float = 1e-4,
) -> Iterator[Float[Tensor, "batch latent"]]:
    """Latent vectors of new signals, the decoder frozen: Adam on error and ``prior · ‖z‖²``, from zero.

    Yields them before the first step and after each, for as long as it is asked.
    """
    latent = torch.zeros(len(targets), decoder.latents.embedding_dim).to(targets).requires_grad_()
    optimizer = torch.optim.Adam([latent], lr=lr)
    while True:
        yield latent.detach().clone()
        loss = signal_losses(decoder.decode(latent, coords), targets, weights) + prior * latent.square().sum()
        (latent.grad,) = torch.autograd.grad(loss, [latent])
        optimizer.step()
