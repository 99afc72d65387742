"""SetGNN, the hypergraph encoder of the paper: AllDeepSets and AllSetTransformer (sections 2.2, 2.3 and 3)."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tenfold_hypergcl.hypergraph import Incidence, SortedIncidence
from tenfold_hypergcl.mlp import MLP, dropout, linear, relu_dropout
from tenfold_hypergcl.propagate import Features, sum_members
from tenfold_shared.errors import UserError

INPUT_DROPOUT = 0.2
"""The encoder's fixed dropout on its input (section 2.2)."""
SOFTMAX_EPS = 1e-16


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder's sizes and options (sections 3 and 6)."""

    hidden: int = 256
    """Hidden width D."""
    layers: int = 1
    """Node-to-hyperedge-to-node layers (All_num_layers)."""
    mlp_layers: int = 2
    """Linear maps in each half layer's MLPs."""
    attention: bool = False
    """AllSetTransformer instead of AllDeepSets."""
    heads: int = 1
    """Attention heads; they divide the hidden width."""
    dropout: float = 0.2
    """Dropout in and between half layers."""
    norm: Literal["ln", "bn", "none"] = "ln"
    """Normalisation in the MLPs."""
    input_norm: bool = True
    """Whether the deep-sets MLPs start with a norm."""
    aggregate: Literal["sum", "mean"] = "sum"
    """Reducer of AllDeepSets."""
    gpr: bool = False
    """Mix the outputs of all layers (and of an MLP on the features) by a learned linear map."""

    def __post_init__(self) -> None:
        """Refuse what is no encoder."""
        for name in ("hidden", "layers", "mlp_layers", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"--encoder.{name} takes 1 or more, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--encoder.dropout is a share in [0, 1), got {self.dropout}")


class DeepSetsHalf(nn.Module):
    """One direction of AllDeepSets: ``f_dec(sum over members of w * dropout(relu(f_enc(x))))`` (section 2.2)."""

    def __init__(self, in_features: int, config: EncoderConfig) -> None:
        super().__init__()
        width, options = config.hidden, (config.mlp_layers, config.dropout, config.norm, config.input_norm)
        self.p, self.mean = config.dropout, config.aggregate == "mean"
        self.f_enc = MLP(in_features, width, width, *options)
        self.f_dec = MLP(width, width, width, *options)

    def forward(
        self,
        x: Features,
        incidence: Incidence,
        to_hyperedges: bool,
        weight: Tensor | None = None,
        rows: Tensor | None = None,
        p_out: float = 0.0,
    ) -> Float[Tensor, "targets hidden"]:
        """The targets' representations after the ReLU and, in training, dropout ``p_out``; only of ``rows`` if given."""
        into, outof = incidence.by_node, incidence.by_hyperedge
        if to_hyperedges:
            into, outof = outof, into
        sent = self.f_enc(x, relu=True, p_out=self.p)
        received = sum_members(sent, into, outof, weight)
        if self.mean:
            # Weighted messages are divided by the unweighted count (section 2.2).
            received = received / into.offsets.diff().clamp_min(1)[:, None]
        return self.f_dec(received if rows is None else received[rows], relu=True, p_out=p_out)


class AttentionPool(nn.Module):
    """Pooling by multi-head attention with a learned query: one direction of AllSetTransformer (section 2.3)."""

    def __init__(self, in_features: int, config: EncoderConfig) -> None:
        super().__init__()
        width = config.hidden
        if width % config.heads:
            raise ValueError(f"The hidden width {width} is no multiple of the {config.heads} heads.")
        self.heads = config.heads
        self.lin_K = nn.Linear(in_features, width)
        self.lin_V = nn.Linear(in_features, width)
        self.att_r = nn.Parameter(torch.empty(1, config.heads, width // config.heads))
        self.rFF = MLP(width, width, width, config.mlp_layers, norm="none")
        self.ln0 = nn.LayerNorm(width)
        self.ln1 = nn.LayerNorm(width)
        for parameter in (self.lin_K.weight, self.lin_V.weight, self.att_r):
            nn.init.xavier_uniform_(parameter)

    def forward(
        self, x: Features, incidence: Incidence, to_hyperedges: bool, weight: Tensor | None, rows: Tensor | None
    ) -> Float[Tensor, "targets hidden"]:
        """The targets' representations; only of ``rows`` if given."""
        into, outof = incidence.by_node, incidence.by_hyperedge
        into_heads, outof_heads = incidence.per_head(self.heads)
        if to_hyperedges:
            into, outof, into_heads, outof_heads = outof, into, outof_heads, into_heads
        items = x.shape[0]
        key = linear(x, self.lin_K.weight, self.lin_K.bias).view(items, self.heads, -1)
        value = linear(x, self.lin_V.weight, self.lin_V.bias)
        score = F.leaky_relu((key * self.att_r).sum(-1), 0.2)
        alpha = attention(score, into, weight)
        # Back to the order of the list, head by head, as the weights of one sparse product over (item, head) pairs.
        ordered = torch.empty_like(alpha).index_copy(0, into.position, alpha).reshape(-1)
        pooled = sum_members(value.reshape(items * self.heads, -1), into_heads, outof_heads, ordered)
        out = pooled.view(-1, self.heads, pooled.shape[1]) + self.att_r
        out = out.flatten(1) if rows is None else out.flatten(1)[rows]
        out = self.ln0(out)
        return self.ln1(out + F.relu(self.rFF(out)))


def attention(
    score: Float[Tensor, "items heads"], into: SortedIncidence, weight: Float[Tensor, "memberships"] | None
) -> Float[Tensor, "memberships heads"]:
    """Softmax of the items' scores over the members of each target, reweighted by ``weight`` and renormalised (section 2.3).

    Memberships come out in the order of ``into``. A target whose weights are all zero receives zeros.
    """
    rows, shape = into.rows[:, None].expand(-1, score.shape[1]), (into.offsets.numel() - 1, score.shape[1])
    gathered = score[into.index]
    peak = gathered.detach().new_full(shape, -torch.inf).scatter_reduce(0, rows, gathered.detach(), "amax")
    alpha = torch.exp(gathered - peak[into.rows])
    alpha = alpha / alpha.new_zeros(shape).index_add(0, into.rows, alpha)[into.rows]
    if weight is None:
        return alpha
    alpha = alpha * weight[into.position, None].to(alpha.dtype)
    return alpha / (alpha.new_zeros(shape).index_add(0, into.rows, alpha) + SOFTMAX_EPS)[into.rows]


class AttentionHalf(nn.Module):
    """One direction of AllSetTransformer; its pooling is called ``prop`` in the released parameter names (section 4)."""

    def __init__(self, in_features: int, config: EncoderConfig) -> None:
        super().__init__()
        self.prop = AttentionPool(in_features, config)

    def forward(
        self,
        x: Features,
        incidence: Incidence,
        to_hyperedges: bool,
        weight: Tensor | None = None,
        rows: Tensor | None = None,
        p_out: float = 0.0,
    ) -> Float[Tensor, "targets hidden"]:
        """The targets' representations after a ReLU and, in training, dropout ``p_out``; only of ``rows`` if given."""
        return relu_dropout(self.prop(x, incidence, to_hyperedges, weight, rows), p_out, self.training)


class SetEncoder(nn.Module):
    """The stack of half layers (section 2.2): nodes to hyperedges to nodes, ReLU and dropout after each direction."""

    def __init__(self, in_features: int, config: EncoderConfig) -> None:
        super().__init__()
        if config.aggregate not in {"sum", "mean"}:
            raise ValueError(f"aggregate must be 'sum' or 'mean', not {config.aggregate!r}.")
        half = AttentionHalf if config.attention else DeepSetsHalf
        widths = [in_features] + [config.hidden] * (config.layers - 1)
        self.config = config
        self.V2EConvs = nn.ModuleList([half(width, config) for width in widths])
        self.E2VConvs = nn.ModuleList([half(config.hidden, config) for _ in widths])
        if config.gpr:
            hidden, options = config.hidden, (config.mlp_layers, config.dropout, config.norm, False)
            self.MLP = MLP(in_features, hidden, hidden, *options)
            self.GPRweights = nn.Linear(config.layers + 1, 1, bias=False)

    def encode(
        self,
        x: Features,
        incidence: Incidence,
        weight: Float[Tensor, "memberships"] | None = None,
        rows: Int[Tensor, "targets"] | None = None,
        want_hyperedges: bool = False,
    ) -> tuple[Float[Tensor, "targets hidden"], Float[Tensor, "hyperedges hidden"] | None]:
        """The last layer's ``(node, hyperedge)`` representations after the ReLU and before the dropout.

        ``weight`` in [0, 1] scales every membership, in both directions. With ``rows`` only these nodes go through the last step.
        The hyperedges' are None unless asked for, because they would live as long as the graph.
        """
        p, training = self.config.dropout, self.training
        states: list[Tensor] = []
        mixed = self.MLP(x).relu() if self.config.gpr else None
        nodes, hyperedges = x, None
        for layer, (to_edge, to_node) in enumerate(zip(self.V2EConvs, self.E2VConvs, strict=True)):
            last = layer == len(self.V2EConvs) - 1
            keep = last and want_hyperedges
            sent = to_edge(nodes, incidence, True, weight, p_out=0.0 if keep else p)
            if keep:
                hyperedges, sent = sent, dropout(sent, p, training)
            targets = rows if last and mixed is None else None
            nodes = to_node(sent, incidence, False, weight, targets, p_out=0.0 if last else p)
            states.append(nodes)
        if mixed is not None:
            states = [*states[:-1], dropout(states[-1], p, training), mixed]
            combined = self.GPRweights(torch.stack(states, dim=-1)).squeeze(-1)
            return combined if rows is None else combined[rows], hyperedges
        return states[-1], hyperedges


class SetGNN(SetEncoder):
    """SetGNN with its heads (section 3): ``classifier``, ``proj_head``, ``linear`` (probe) and ``decoder`` (link prediction)."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        config: EncoderConfig,
        projection: int = 128,
        head_layers: int = 1,
    ) -> None:
        super().__init__(in_features, config)
        width, options = config.hidden, (head_layers, config.dropout, config.norm, False)
        self.classifier = MLP(width, projection, num_classes, *options)
        self.proj_head = MLP(width, projection, projection, *options)
        self.linear = nn.Linear(width, num_classes)
        self.decoder = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    @property
    def _by_all_rows(self) -> bool:
        """Whether what a row becomes depends on all others: the statistics of batch norm do not leave any out."""
        return self.training and self.config.norm == "bn"

    def embed(
        self,
        x: Features,
        incidence: Incidence,
        weight: Float[Tensor, "memberships"] | None = None,
        rows: Int[Tensor, "targets"] | None = None,
        input_dropout: float = INPUT_DROPOUT,
    ) -> Float[Tensor, "targets hidden"]:
        """Node embeddings, after the encoder's last dropout."""
        nodes, _ = self.encode(dropout(x, input_dropout, self.training), incidence, weight, rows)
        return nodes if self.config.gpr else dropout(nodes, self.config.dropout, self.training)

    def forward(
        self, x: Features, incidence: Incidence, rows: Int[Tensor, "targets"] | None = None
    ) -> Float[Tensor, "targets classes"]:
        """Class logits of all nodes, or of ``rows``."""
        if rows is not None and self._by_all_rows:
            return self(x, incidence)[rows]
        return self.classifier(self.embed(x, incidence, rows=rows))

    def project(
        self,
        x: Features,
        incidence: Incidence,
        weight: Float[Tensor, "memberships"] | None = None,
        input_dropout: float = INPUT_DROPOUT,
        rows: Int[Tensor, "targets"] | None = None,
    ) -> Float[Tensor, "targets projection"]:
        """The representations that the contrastive loss compares (section 2.2), of all nodes or of ``rows``."""
        if rows is not None and self._by_all_rows:
            return self.project(x, incidence, weight, input_dropout)[rows]
        return self.proj_head(self.embed(x, incidence, weight, rows, input_dropout))
