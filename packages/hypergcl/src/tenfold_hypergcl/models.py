"""Every classifier of the paper by name: the encoder itself (section 3) and what it is compared with (section 8)."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tenfold_hypergcl.baselines import (
    HNHN,
    CliqueNet,
    Graph,
    HyperGCN,
    HypergraphConvNet,
    UniGCNII,
    clique_expansion,
    gcn_normalized,
    hypergcn_operator,
)
from tenfold_hypergcl.hypergraph import Hypergraph, Incidence
from tenfold_hypergcl.mlp import MLP
from tenfold_hypergcl.propagate import Features, SparseFeatures
from tenfold_hypergcl.setgnn import EncoderConfig, SetGNN

ModelName = Literal["setgnn", "mlp", "hcha", "hgnn", "hnhn", "hypergcn", "unigcnii", "ce-gcn", "ce-gat"]
MODELS: tuple[ModelName, ...] = get_args(ModelName)


def create_model(
    name: ModelName,
    in_features: int,
    classes: int,
    encoder: EncoderConfig,
    projection: int = 128,
    head_layers: int = 1,
    layers: int = 2,
    wide: bool = False,
) -> nn.Module:
    """The model ``name`` of the encoder's width, heads and dropout; ``layers`` counts the baselines' layers, and ``wide`` is HyperGCN's
    rule for Citeseer.

    Raises:
        ValueError: for an unknown name.
    """
    hidden, p, heads = encoder.hidden, encoder.dropout, encoder.heads
    if name == "setgnn":
        return SetGNN(in_features, classes, encoder, projection, head_layers)
    if name == "mlp":
        return MLP(in_features, hidden, classes, layers, p, encoder.norm)
    if name in {"hcha", "hgnn"}:
        return HypergraphConvNet(in_features, hidden, classes, layers, p, symmetric=name == "hgnn")
    if name == "hnhn":
        return HNHN(in_features, hidden, classes, layers, p)
    if name == "hypergcn":
        return HyperGCN(in_features, classes, layers, p, wide)
    if name == "unigcnii":
        return UniGCNII(in_features, hidden, classes, layers, p, heads)
    if name in {"ce-gcn", "ce-gat"}:
        return CliqueNet(in_features, hidden, classes, layers, p, encoder.norm, attention=name == "ce-gat", heads=heads)
    raise ValueError(f"There is no model {name!r}; there are {', '.join(MODELS)}.")


def structure_of(name: ModelName, h: Hypergraph, x: Features) -> Hypergraph | Graph:
    """What the model ``name`` passes messages over: the hypergraph, its clique expansion, or HyperGCN's operator.

    The operator projects the features on one random vector, drawn here.
    """
    if name in {"ce-gcn", "ce-gat"}:
        return gcn_normalized(clique_expansion(h.without_singletons()))
    if name == "hypergcn":
        direction = torch.rand(x.shape[1], 1, device=h.incidence.device)
        signal = x.matmul(direction) if isinstance(x, SparseFeatures) else x @ direction
        return hypergcn_operator(h.without_singletons(), signal.squeeze(1))
    return h


def node_logits(
    model: nn.Module, x: Features, structure: Incidence | Graph, rows: Tensor
) -> Float[Tensor, "targets classes"]:
    """Class logits of the nodes ``rows``."""
    if isinstance(model, SetGNN):
        return model(x, structure, rows)
    return (model(x) if isinstance(model, MLP) else model(x, structure))[rows]


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, object]]:
    """Adam's parameter groups; UniGCNII has its own rates."""
    if isinstance(model, UniGCNII):
        return model.parameter_groups()
    return [{"params": list(model.parameters()), "lr": lr, "weight_decay": weight_decay}]
