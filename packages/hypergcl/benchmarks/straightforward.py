"""SetGNN and one fabricated epoch as one writes them down from the paper, for the benchmark to compare with.

Messages are gathered and scattered membership by membership, every pass runs over the whole hypergraph, and InfoNCE keeps its four
similarity matrices for automatic differentiation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Norm, then Linear, ReLU, norm, dropout, Linear."""

    def __init__(self, a: int, hidden: int, b: int, p: float) -> None:
        super().__init__()
        self.n0, self.l0, self.n1, self.l1 = (
            nn.LayerNorm(a),
            nn.Linear(a, hidden),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, b),
        )
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Rows to rows."""
        x = self.n1(F.relu(self.l0(self.n0(x))))
        return self.l1(F.dropout(x, self.p, self.training))


class Model(nn.Module):
    """AllDeepSets with one layer."""

    def __init__(self, features: int, width: int, projection: int, classes: int, p: float = 0.2) -> None:
        super().__init__()
        self.enc_v, self.dec_v = MLP(features, width, width, p), MLP(width, width, width, p)
        self.enc_e, self.dec_e = MLP(width, width, width, p), MLP(width, width, width, p)
        self.classifier, self.projection, self.p = nn.Linear(width, classes), nn.Linear(width, projection), p

    def embed(self, x: Tensor, incidence: Tensor, hyperedges: int) -> Tensor:
        """Node embeddings."""
        nodes = x.shape[0]
        x = F.dropout(F.relu(self.enc_v(F.dropout(x, 0.2, self.training))), self.p, self.training)
        e = x.new_zeros(hyperedges, x.shape[1]).index_add(0, incidence[1], x[incidence[0]])
        e = F.dropout(F.relu(F.relu(self.dec_v(e))), self.p, self.training)
        e = F.dropout(F.relu(self.enc_e(e)), self.p, self.training)
        x = e.new_zeros(nodes, e.shape[1]).index_add(0, incidence[0], e[incidence[1]])
        return F.dropout(F.relu(F.relu(self.dec_e(x))), self.p, self.training)


def info_nce(z1: Tensor, z2: Tensor, t: float) -> Tensor:
    """The loss of both directions from full similarity matrices."""
    a, b = F.normalize(z1), F.normalize(z2)

    def direction(u: Tensor, v: Tensor) -> Tensor:
        intra, inter = torch.exp(u @ u.T / t), torch.exp(u @ v.T / t)
        return -torch.log(inter.diag() / (intra.sum(1) + inter.sum(1) - intra.diag()))

    return ((direction(a, b) + direction(b, a)) / 2).mean()


def epoch(
    model: Model,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    incidence: Tensor,
    hyperedges: int,
    num_real: int,
    labels: Tensor,
    train: Tensor,
    ratio: float = 0.3,
    weight: float = 0.1,
    t: float = 0.3,
) -> None:
    """One fabricated (A2) epoch."""
    model.train()
    optimizer.zero_grad()
    z = []
    for _ in range(2):
        kept = torch.randperm(num_real)[: num_real - int(num_real * ratio)].sort().values
        view = torch.cat([incidence[:, kept], incidence[:, num_real:]], dim=1)
        z.append(model.projection(model.embed(x, view, hyperedges)))
    logits = model.classifier(model.embed(x, incidence, hyperedges))
    loss = F.nll_loss(F.log_softmax(logits[train], 1), labels[train]) + weight * info_nce(z[0], z[1], t)
    loss.backward()
    optimizer.step()
