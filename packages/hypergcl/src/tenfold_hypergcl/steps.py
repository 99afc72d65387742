"""The training objectives, one function a step (section 2.6): supervised, fabricated and generative contrastive learning.

Each function computes one loss and leaves the gradients in place; the loop that calls them owns the optimisers.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tenfold_hypergcl.augment import View, common_nodes, shared_rows, take_rows
from tenfold_hypergcl.baselines import Graph
from tenfold_hypergcl.contrast import info_nce, jsd, triplet_margin
from tenfold_hypergcl.generative import (
    TARGET_DROP_RATIO,
    VHGAE,
    Noise,
    drop_ratio,
    keep_weights,
    sample_negatives,
    vhgae_loss,
)
from tenfold_hypergcl.hypergraph import Hypergraph, Incidence, disjoint_union
from tenfold_hypergcl.models import node_logits
from tenfold_hypergcl.propagate import Features, stack_views
from tenfold_hypergcl.setgnn import INPUT_DROPOUT, EncoderConfig, SetGNN


@dataclass(frozen=True)
class ReceptiveField:
    """All that the outputs of some nodes depend on: a part of a hypergraph, its features, and the rows of the nodes in it."""

    incidence: Incidence | Graph
    x: Features
    rows: Int[Tensor, "targets"]


def receptive_field(h: Incidence, x: Features, targets: Int[Tensor, "targets"], layers: int) -> ReceptiveField:
    """The part of ``h`` that ``layers`` layers of an encoder read for ``targets``.

    Sums over incomplete neighbourhoods only occur at nodes that no target reads, so the targets' outputs are those of the whole
    hypergraph. (Not with batch norm, whose statistics are over all rows.)
    """
    device = h.incidence.device
    seen = torch.zeros(h.num_nodes, dtype=torch.bool, device=device)
    seen[targets] = True
    edges = torch.zeros(h.num_hyperedges, dtype=torch.bool, device=device)
    for _ in range(layers):
        edges[h.incidence[1, seen[h.incidence[0]]]] = True
        seen[h.incidence[0, edges[h.incidence[1]]]] = True
    nodes, kept_edges = torch.nonzero(seen).squeeze(1), torch.nonzero(edges).squeeze(1)
    mask = edges[h.incidence[1]]
    new_node = torch.cumsum(seen, 0) - 1
    incidence = torch.stack([new_node[h.incidence[0, mask]], (torch.cumsum(edges, 0) - 1)[h.incidence[1, mask]]])
    return ReceptiveField(
        Incidence(incidence, nodes.numel(), kept_edges.numel()), take_rows(x, nodes), new_node[targets]
    )


def field_of(encoder: EncoderConfig, h: Incidence, x: Features, targets: Int[Tensor, "targets"]) -> ReceptiveField:
    """What the encoder has to read for ``targets``: their receptive field, but everything for the statistics of batch norm."""
    if encoder.norm == "bn":
        return ReceptiveField(h, x, targets)
    return receptive_field(h, x, targets, encoder.layers)


def supervised_loss(model: nn.Module, field: ReceptiveField, labels: Int[Tensor, "targets"]) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of the training nodes on the clean hypergraph, in a forward pass of its own."""
    return F.cross_entropy(node_logits(model, field.x, field.incidence, field.rows), labels)


def contrastive_loss(
    model: SetGNN,
    first: View,
    second: View,
    temperature: float,
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
    loss: str = "info_nce",
    input_dropout: float = INPUT_DROPOUT,
    only: Int[Tensor, "compared"] | None = None,
) -> Float[Tensor, ""]:
    """The contrast of two views (section 2.4).

    ``weights`` scale the views' memberships (A6); None leaves them as they are. ``only`` these nodes of the hypergraph that the views
    were made of are compared, all by default.
    """
    a, b, common = (None, None, common_nodes(first, second)) if only is None else shared_rows(first, second, only)
    z1, z2 = project_views(model, (first, second), weights, input_dropout, (a, b))
    return compare(z1, z2, temperature, loss, common)


def project_views(
    model: SetGNN,
    views: tuple[View, View],
    weights: tuple[Tensor | None, Tensor | None],
    input_dropout: float,
    rows: tuple[Tensor | None, Tensor | None],
) -> tuple[Float[Tensor, "nodes1 width"], Float[Tensor, "nodes2 width"]]:
    """``model.project`` of two views, of all their nodes or of ``rows``: in one pass over their disjoint union, but for batch norm, whose
    statistics are those of one view.
    """
    if model.config.norm == "bn":
        (a, b), (u, v), (i, j) = views, weights, rows
        z1 = model.project(a.x, a.hypergraph, u, input_dropout, i)
        return z1, model.project(b.x, b.hypergraph, v, input_dropout, j)
    weight = None
    if any(part is not None for part in weights):
        known = next(part for part in weights if part is not None)
        weight = torch.cat(
            [
                known.new_ones(view.hypergraph.num_memberships) if part is None else part
                for view, part in zip(views, weights, strict=True)
            ]
        )
    both, sizes = None, [view.hypergraph.num_nodes for view in views]
    if rows[0] is not None and rows[1] is not None:
        both, sizes = torch.cat([rows[0], rows[1] + sizes[0]]), [rows[0].numel(), rows[1].numel()]
    union = disjoint_union([view.hypergraph for view in views])
    z1, z2 = model.project(stack_views([view.x for view in views]), union, weight, input_dropout, both).split(sizes)
    return z1, z2


def compare(
    z1: Float[Tensor, "nodes1 width"],
    z2: Float[Tensor, "nodes2 width"],
    temperature: float,
    loss: str = "info_nce",
    common: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, ""]:
    """The loss named ``info_nce``, ``jsd`` or ``triplet`` between two views' representations."""
    if loss == "info_nce":
        return info_nce(z1, z2, temperature, common)
    if loss not in {"jsd", "triplet"}:
        raise ValueError(f"The contrastive loss is 'info_nce', 'jsd' or 'triplet', not {loss!r}.")
    if common is not None:
        z1, z2 = z1[common[0]], z2[common[1]]
    return jsd(z1, z2) if loss == "jsd" else triplet_margin(z1, z2)


@dataclass(frozen=True)
class GeneratorLosses:
    """What one generator step computed."""

    total: Float[Tensor, ""]
    vhgae: Float[Tensor, ""]
    contrastive: Float[Tensor, ""]
    drop_ratio: Float[Tensor, ""]
    keep: Float[Tensor, "memberships"]


def generator_step(
    model: SetGNN,
    generator: VHGAE,
    h: Hypergraph,
    x: Features,
    contrast_weight: float,
    temperature: float,
    noise: Noise | None = None,
    negatives: Int[Tensor, "2 negatives"] | None = None,
    hard: bool = True,
    kl_scale: str = "code",
    objective: str = "vhgae",
    drop_weight: float = 0.0,
    loss: str = "info_nce",
) -> GeneratorLosses:
    """The generator's half of the adversarial game: ``L_vae - g_l * L(clean view, generated view)`` (section 2.6).

    Leaves the gradients in the generator's ``grad`` and none in the model's. ``objective="drop"`` replaces ``L_vae`` by the distance of
    the drop ratio from 0.3; ``drop_weight`` (``d_l``) adds that distance.
    """
    latents, logits, noise = generator(x, h, noise)
    keep = keep_weights(logits, h, noise.gumbel, hard)
    dropped = drop_ratio(keep, h)
    if objective == "vhgae":
        negatives = sample_negatives(h) if negatives is None else negatives
        vae = vhgae_loss(logits, generator.decoder(latents, negatives), latents, kl_scale)
    elif objective == "drop":
        vae = (dropped - TARGET_DROP_RATIO).abs()
    else:
        raise ValueError(f"The generator's objective is 'vhgae' or 'drop', not {objective!r}.")
    # The clean view does not depend on the generator, so its pass needs no graph; nor are the model's own gradients wanted.
    with torch.no_grad():
        z1 = model.project(x, h)
    with _frozen(model):
        z2 = model.project(x, h, keep)
    contrastive = compare(z1, z2, temperature, loss)
    total = vae - contrast_weight * contrastive
    if drop_weight:
        total = total + drop_weight * (dropped - TARGET_DROP_RATIO).abs()
    parameters = [p for p in generator.parameters() if p.requires_grad]
    for parameter, gradient in zip(parameters, torch.autograd.grad(total, parameters), strict=True):
        parameter.grad = gradient
    return GeneratorLosses(*[value.detach() for value in (total, vae, contrastive, dropped, keep)])


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """The module's parameters as constants of what is computed meanwhile."""
    learned = [p for p in module.parameters() if p.requires_grad]
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class Core:
    """The part of a hypergraph that its generated views depend on: no node without a real membership (about half of Cora's)."""

    hypergraph: Hypergraph
    x: Features
    nodes: Int[Tensor, "kept"]
    hyperedges: Int[Tensor, "kept_hyperedges"]

    def restrict(self, noise: Noise) -> Noise:
        """The part of a whole hypergraph's noise that belongs to the core."""
        return Noise(noise.node[self.nodes], noise.hyperedge[self.hyperedges], noise.gumbel)


def core(h: Hypergraph, x: Features) -> Core:
    """Every real membership and hyperedge of ``h``, and of its nodes and singletons those that have one."""
    mask = torch.zeros(h.num_nodes, dtype=torch.bool, device=h.incidence.device)
    mask[h.incidence[0, : h.num_real]] = True
    nodes, memberships = torch.nonzero(mask).squeeze(1), mask[h.incidence[0]]
    hyperedges = torch.unique(h.incidence[1, memberships])
    return Core(h.relabel(memberships, nodes), take_rows(x, nodes), nodes, hyperedges)


def generate_view(
    generator: VHGAE,
    h: Hypergraph,
    part: Core,
    noise: Noise | None = None,
    hard: bool = True,
) -> Float[Tensor, "memberships"]:
    """The keep weights of a fresh view of ``h`` with the core ``part``, without gradients; the generator runs in evaluation mode and is
    left as it was. The ``noise``, where given, is of the core's sizes.
    """
    mode = generator.training
    generator.eval()
    with torch.no_grad():
        _, logits, noise = generator(part.x, part.hypergraph, noise)
        keep = keep_weights(logits, h, noise.gumbel, hard)
    generator.train(mode)
    return keep


def generated_view(h: Hypergraph, x: Features, keep: Float[Tensor, "memberships"]) -> View:
    """The view of hard keep weights as a smaller hypergraph: a weight of zero and a deleted membership are the same to sums.

    Hyperedges that lost all members reach no node, so they vanish. (With the ``mean`` reducer the two differ: pass weights instead.)
    """
    return View(h.relabel(keep > 0.5), x)
