"""Generative augmentation A6: the variational hypergraph auto-encoder that decides which memberships a view keeps (section 2.6)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tenfold_hypergcl.hypergraph import Hypergraph
from tenfold_hypergcl.propagate import Features
from tenfold_hypergcl.setgnn import EncoderConfig, SetEncoder

KEEP = 1
"""The pair logits' column for keeping a membership; column 0 drops it."""
TARGET_DROP_RATIO = 0.3
"""The drop ratio that the generator's optional regularisers pull towards (section 2.6)."""


@dataclass(frozen=True)
class Noise:
    """The random numbers of one pass through the generator."""

    node: Float[Tensor, "nodes hidden"]
    hyperedge: Float[Tensor, "hyperedges hidden"]
    gumbel: Float[Tensor, "real 2"]

    @classmethod
    def draw(cls, h: Hypergraph, hidden: int, dtype: torch.dtype) -> "Noise":
        """Standard normal noise for the latents, standard Gumbel noise for the real memberships."""
        device = h.incidence.device
        exponential = torch.empty(h.num_real, 2, device=device, dtype=dtype).exponential_()
        return cls(
            torch.randn(h.num_nodes, hidden, device=device, dtype=dtype),
            torch.randn(h.num_hyperedges, hidden, device=device, dtype=dtype),
            -exponential.clamp_min(torch.finfo(dtype).tiny).log(),
        )


@dataclass(frozen=True)
class Latents:
    """The variational posterior of nodes and hyperedges, and a sample of each."""

    node: Float[Tensor, "nodes hidden"]
    node_mean: Float[Tensor, "nodes hidden"]
    node_std: Float[Tensor, "nodes hidden"]
    hyperedge: Float[Tensor, "hyperedges hidden"]
    hyperedge_mean: Float[Tensor, "hyperedges hidden"]
    hyperedge_std: Float[Tensor, "hyperedges hidden"]


def _head(width: int, out: int, positive: bool = False) -> nn.Sequential:
    layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out)]
    return nn.Sequential(*layers, nn.Softplus()) if positive else nn.Sequential(*layers)


class VariationalEncoder(SetEncoder):
    """The inference network: the encoder's stack without input dropout, and a mean and a deviation head for either side."""

    def __init__(self, in_features: int, config: EncoderConfig) -> None:
        super().__init__(in_features, config)
        width = config.hidden
        self.encoder_mean_node = _head(width, width)
        self.encoder_std_node = _head(width, width, positive=True)
        self.encoder_mean_he = _head(width, width)
        self.encoder_std_he = _head(width, width, positive=True)

    def forward(self, x: Features, h: Hypergraph, noise: Noise) -> Latents:
        """``n = mu_n + sigma_n * eps`` for nodes, likewise for hyperedges; in evaluation mode too."""
        nodes, hyperedges = self.encode(x, h, want_hyperedges=True)
        node_mean, node_std = self.encoder_mean_node(nodes), self.encoder_std_node(nodes)
        edge_mean, edge_std = self.encoder_mean_he(hyperedges), self.encoder_std_he(hyperedges)
        return Latents(
            node_mean + node_std * noise.node,
            node_mean,
            node_std,
            edge_mean + edge_std * noise.hyperedge,
            edge_mean,
            edge_std,
        )


class PairDecoder(nn.Module):
    """Drop and keep logits of (node, hyperedge) pairs from the product of their latents."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.decoder = _head(width, 2)

    def forward(self, latents: Latents, pairs: Int[Tensor, "2 pairs"]) -> Float[Tensor, "pairs 2"]:
        """The logits, column 0 = drop, 1 = keep."""
        return self.decoder(latents.node[pairs[0]] * latents.hyperedge[pairs[1]])


class VHGAE(nn.Module):
    """The generator of A6."""

    def __init__(self, in_features: int, config: EncoderConfig) -> None:
        super().__init__()
        self.encoder = VariationalEncoder(in_features, config)
        self.decoder = PairDecoder(config.hidden)

    def forward(self, x: Features, h: Hypergraph, noise: Noise | None = None) -> tuple[Latents, Tensor, Noise]:
        """Latents, the logits ``[memberships, 2]`` of all memberships of ``h``, and the noise that was used."""
        if noise is None:
            noise = Noise.draw(h, self.encoder.config.hidden, next(self.parameters()).dtype)
        latents = self.encoder(x, h, noise)
        return latents, self.decoder(latents, h.incidence), noise


def keep_weights(
    logits: Float[Tensor, "core 2"], h: Hypergraph, gumbel: Float[Tensor, "real 2"], hard: bool = True
) -> Float[Tensor, "memberships"]:
    """The Gumbel-softmax sample (temperature 1) of every real membership's keep decision; singletons always stay.

    The logits are those of the core, real memberships first; it may lack the singletons of nodes the encoder is not shown.

    With ``hard`` the value is exactly 0 or 1 and the gradient is the soft sample's (straight through).
    """
    soft = torch.softmax(logits[: h.num_real] + gumbel, dim=1)[:, KEEP]
    if hard:
        # Ties go to dropping, as argmax would have it.
        soft = (soft.detach() > 0.5).to(soft.dtype) + (soft - soft.detach())
    return torch.cat([soft, soft.new_ones(h.num_memberships - h.num_real)])


def drop_ratio(weights: Float[Tensor, "memberships"], h: Hypergraph) -> Float[Tensor, ""]:
    """The share of real memberships that ``weights`` drops."""
    return 1 - weights[: h.num_real].mean()


def kl_divergence(
    mean: Float[Tensor, "rows hidden"], std: Float[Tensor, "rows hidden"], scale: str = "code"
) -> Float[Tensor, ""]:
    """KL to the standard normal, averaged over rows; ``scale="code"`` divides by the number of rows once more (section 2.6)."""
    if scale not in {"code", "paper"}:
        raise ValueError(f"The scale of the KL terms is 'code' or 'paper', not {scale!r}.")
    mean, std = _wide(mean), _wide(std)
    # A deviation whose softplus underflows would give log 0.
    log_std = std.clamp_min(torch.finfo(std.dtype).tiny).log()
    kl = -0.5 * (1 + 2 * log_std - mean.square() - std.square()).sum(1).mean()
    return kl / mean.shape[0] if scale == "code" else kl


def vhgae_loss(
    positive: Float[Tensor, "memberships 2"],
    negative: Float[Tensor, "negatives 2"],
    latents: Latents,
    kl_scale: str = "code",
) -> Float[Tensor, ""]:
    """``L_vae``: reconstruct all memberships, singletons too, against sampled non-members, plus both KL terms (section 2.6)."""
    kept, dropped = F.log_softmax(_wide(positive), 1)[:, KEEP], F.log_softmax(_wide(negative), 1)[:, 0]
    reconstruction = -kept.mean() - dropped.mean()
    kl_node = kl_divergence(latents.node_mean, latents.node_std, kl_scale)
    return reconstruction + kl_node + kl_divergence(latents.hyperedge_mean, latents.hyperedge_std, kl_scale)


def _wide(x: Tensor) -> Tensor:
    """In single precision at least: means over all rows need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sample_negatives(h: Hypergraph, count: int | None = None, rounds: int = 8) -> Int[Tensor, "2 negatives"]:
    """``count`` (default: as many as memberships) uniform pairs of a node and a hyperedge that is not its own.

    Pairs that turn out to be memberships are drawn again, ``rounds`` times; in a hypergraph so dense that some remain, these few stay.
    """
    count = h.num_memberships if count is None else count
    device = h.incidence.device
    known = _sorted_keys(h)

    def draw(n: int) -> Tensor:
        return torch.randint(h.num_nodes * h.num_hyperedges, (n,), device=device)

    keys = draw(count)
    for _ in range(rounds):
        taken = known[torch.searchsorted(known, keys)] == keys
        keys = torch.where(taken, draw(count), keys)
    return torch.stack([keys // h.num_hyperedges, keys % h.num_hyperedges])


def _sorted_keys(h: Hypergraph) -> Int[Tensor, "memberships_plus_one"]:
    """The numbers of the member pairs in increasing order, and after them one that no pair has."""
    if "_keys" not in h.__dict__:
        keys = h.incidence[0] * h.num_hyperedges + h.incidence[1]
        h.__dict__["_keys"] = F.pad(keys.sort().values, (0, 1), value=h.num_nodes * h.num_hyperedges)
    return h.__dict__["_keys"]
