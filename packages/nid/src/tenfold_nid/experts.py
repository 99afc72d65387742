"""The dictionary's atoms and the exact ways to evaluate their mixtures (sections 2.1 and 2.7)."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .gating import Gates
from .networks import CoordinateNetwork, NetworkConfig, batched_mlp, embedding, embedding_flops, stacked_layers

Route = Literal["merge", "bag", "dense"]
BAG_COST = 10
"""Multiply-adds of a matrix product that cost as much as one of a gathered row; measured on CPU for k/E = 1/8 and 1/16.
"""


def cheapest_route(
    *, batch: int, points: int, experts: int, active: int | None, hidden: int, channels: int, training: bool
) -> Route:
    """The evaluation with the fewest multiply-adds; all of them give the same values and gradients (section 2.7).

    Args:
        batch: signals B.
        points: coordinates N.
        experts: atoms E.
        active: atoms per signal k, or None if all are on.
        hidden: trunk width d.
        channels: C.
        training: whether gradients will be taken; the backward pass of ``bag`` fills a dense table.

    Returns:
        ``merge``: mix the heads, then one head a signal, ``B·E·C·d + N·B·C·d``. ``bag``: the same, touching only the k
        active heads. ``dense``: every atom, then the gates, ``N·d·E·C + B·E·N·C``.

    """
    render = points * batch * channels * hidden
    merge = batch * experts * channels * hidden + render
    dense = points * hidden * experts * channels + batch * experts * points * channels
    if dense < merge:
        return "dense"
    if active is not None and not training and BAG_COST * active < experts:
        return "bag"
    return "merge"


class SharedTrunkExperts(CoordinateNetwork):
    """All atoms on one trunk, atom i a linear head: ``b_i(x) = W_i h(x) + c_i`` (section 2.1).

    The heads are one linear layer of E·C outputs; the row of atom i and channel c is ``i·C + c``.

    Args:
        config: shape of the network; ``out_dim`` is the number of channels C.
        num_experts: E.

    """

    def __init__(self, config: NetworkConfig, num_experts: int) -> None:
        heads = {**vars(config), "out_dim": num_experts * config.out_dim}
        super().__init__(NetworkConfig(**heads))
        self.num_experts, self.channels = num_experts, config.out_dim

    def atoms(self, features: Float[Tensor, "*points hidden"]) -> Float[Tensor, "*points experts channels"]:
        """Value of every atom: what a linear solver for the code works on."""
        return self.net.head(features).unflatten(-1, (self.num_experts, self.channels))

    def merged_head(
        self, gates: Gates, route: Route = "merge"
    ) -> tuple[Float[Tensor, "batch channels hidden"], Float[Tensor, "batch channels"]]:
        """One head a signal, ``Ŵ_s = Σ_i g_{s,i} W_i`` and ``ĉ_s = Σ_i g_{s,i} c_i``."""
        head = self.net.head
        weight = head.weight.view(self.num_experts, self.channels * head.in_features)
        bias = head.bias.view(self.num_experts, self.channels)
        if route == "bag" and gates.support is not None and gates.value is not None:
            value = gates.value.to(weight.dtype)  # which may be half under autocast
            mixed = F.embedding_bag(gates.support, weight, per_sample_weights=value, mode="sum")
        else:
            mixed = gates.dense @ weight
        return mixed.view(-1, self.channels, head.in_features), gates.dense @ bias

    def mix(
        self,
        features: Float[Tensor, "*points hidden"],
        gates: Gates,
        bias: Float[Tensor, "batch channels"],
        route: Route | None = None,
    ) -> Float[Tensor, "batch points channels"]:
        """``f_s(x) = Σ_i g_{s,i} b_i(x) + β_s`` from trunk features.

        Args:
            features: h(x), [points, hidden] for coordinates shared by all signals, [batch, points, hidden] otherwise.
            gates: coefficients.
            bias: β.
            route: how to evaluate; None takes the cheapest.

        """
        batch, points = gates.dense.shape[0], features.shape[-2]
        if route is None:
            route = cheapest_route(
                batch=batch,
                points=points if features.ndim == 2 else batch * points,
                experts=self.num_experts,
                active=None if gates.support is None else gates.support.shape[-1],
                hidden=features.shape[-1],
                channels=self.channels,
                training=torch.is_grad_enabled(),
            )
        if route == "dense":
            atoms = self.atoms(features)
            if features.ndim == 3:
                return torch.einsum("bnec,be->bnc", atoms, gates.dense) + bias[:, None]
            mixed = gates.dense @ atoms.transpose(0, 1).flatten(1)
            return mixed.view(batch, points, self.channels) + bias[:, None]
        weight, offset = self.merged_head(gates, route)
        offset = (offset + bias)[:, None]
        if features.ndim == 3:
            return torch.baddbmm(offset, features, weight.mT)
        mixed = features @ weight.reshape(-1, features.shape[-1]).T
        return mixed.view(points, batch, self.channels).transpose(0, 1) + offset


class IndependentExperts(nn.Module):
    """E separate MLPs on a common embedding, evaluated by batched products (section 2.7, item 5).

    Atoms that no signal of the batch uses are not evaluated.

    Args:
        config: shape of every atom's network; ``out_dim`` is the number of channels C.
        num_experts: E.

    """

    def __init__(self, config: NetworkConfig, num_experts: int) -> None:
        super().__init__()
        self.config, self.num_experts, self.channels = config, num_experts, config.out_dim
        self.map = embedding(config)
        self.weights, self.biases = stacked_layers(config, self.map.out_dim, num_experts)  # type: ignore[arg-type]

    def features(self, coords: Float[Tensor, "*points in_dim"]) -> Float[Tensor, "*points width"]:
        """Embedding of the coordinates: all that the atoms share."""
        return self.trunk(self.map(coords))

    def trunk(self, embedded: Float[Tensor, "*points width"]) -> Float[Tensor, "*points width"]:
        """Embedded coordinates as they are: there is no common trunk."""
        return embedded

    def atoms(
        self, features: Float[Tensor, "*points width"], used: Int[Tensor, " used"] | None = None
    ) -> Float[Tensor, "*points atoms channels"]:
        """Value of every atom, or of those listed in ``used``."""
        points = features.reshape(1, -1, features.shape[-1])
        pick = (lambda p: p) if used is None else (lambda p: p[used])
        weights, biases = [pick(p) for p in self.weights], [pick(p) for p in self.biases]
        values = batched_mlp(weights, biases, points, self.config.act_type)
        return values.transpose(0, 1).reshape(*features.shape[:-1], -1, self.channels)

    def mix(
        self,
        features: Float[Tensor, "*points width"],
        gates: Gates,
        bias: Float[Tensor, "batch channels"],
        route: Route | None = None,
    ) -> Float[Tensor, "batch points channels"]:
        """``f_s(x) = Σ_i g_{s,i} b_i(x) + β_s``; ``route`` must be None or ``dense``, heads of separate trunks do not
        merge.
        """
        if route not in {None, "dense"}:
            raise ValueError(f"independent atoms share no trunk, so they cannot be evaluated by {route!r}")
        # The union of the supports is read on the host: it decides how many networks run.
        used = None if gates.support is None else gates.support.unique()
        coefficients = gates.dense if used is None else gates.dense[:, used]
        atoms = self.atoms(features, used)
        return torch.einsum(f"{'b' if atoms.ndim == 4 else ''}nec,be->bnc", atoms, coefficients) + bias[:, None]

    def flops(self) -> int:
        """Multiply-adds and bias additions per coordinate of all atoms."""
        return embedding_flops(self.map) + sum(p.numel() for p in [*self.weights, *self.biases])
