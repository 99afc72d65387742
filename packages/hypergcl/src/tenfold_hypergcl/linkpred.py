"""Prediction of memberships (the paper's side study, section 6): which node belongs to which hyperedge."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tenfold_hypergcl.generative import sample_negatives
from tenfold_hypergcl.hypergraph import Hypergraph, HypergraphError
from tenfold_hypergcl.mlp import dropout
from tenfold_hypergcl.propagate import Features
from tenfold_hypergcl.setgnn import INPUT_DROPOUT, SetGNN
from tenfold_shared.run import seed_everything


@dataclass(frozen=True)
class MembershipSplit:
    """Training structure (with singletons) and, for validation and test, true memberships and as many pairs that are none."""

    hypergraph: Hypergraph
    valid: Int[Tensor, "2 valid"]
    test: Int[Tensor, "2 test"]
    valid_negatives: Int[Tensor, "2 valid"]
    test_negatives: Int[Tensor, "2 test"]


def split_memberships(h: Hypergraph) -> MembershipSplit:
    """Real memberships split 80/10/10 at random; negatives are drawn against all of them. ``h`` has its singletons.

    Raises:
        HypergraphError: for fewer than ten memberships.
    """
    order = torch.randperm(h.num_real, device=h.incidence.device)
    held = int(0.1 * h.num_real)
    if not held:
        raise HypergraphError(f"A tenth of {h.num_real} memberships is none to test on: there must be ten or more.")
    valid, test = h.incidence[:, order[:held]], h.incidence[:, order[held : 2 * held]]
    mask = torch.ones(h.num_memberships, dtype=torch.bool, device=order.device)
    mask[order[: 2 * held]] = False
    negatives = sample_negatives(h.without_singletons(), 2 * held)
    return MembershipSplit(h.keep(mask), valid, test, negatives[:, :held], negatives[:, held:])


def link_split(h: Hypergraph, seed: int) -> MembershipSplit:
    """The division of the memberships that belongs to a seed."""
    seed_everything(seed, "memberships")
    return split_memberships(h)


def membership_logits(
    model: SetGNN, x: Features, h: Hypergraph, pairs: Int[Tensor, "2 pairs"]
) -> Float[Tensor, "pairs 2"]:
    """``decoder(x_v * e_e)`` of (node, hyperedge) pairs; column 1 = member."""
    nodes, edges = model.encode(dropout(x, INPUT_DROPOUT, model.training), h, want_hyperedges=True)
    assert edges is not None  # They were asked for.
    return model.decoder(nodes[pairs[0]] * edges[pairs[1]])


def membership_loss(model: SetGNN, x: Features, h: Hypergraph) -> Float[Tensor, ""]:
    """Cross-entropy of the real memberships and of as many sampled pairs that are none."""
    positive = h.incidence[:, : h.num_real]
    negative = sample_negatives(h.without_singletons(), h.num_real)
    logits = membership_logits(model, x, h, torch.cat([positive, negative], dim=1))
    yes, no = F.log_softmax(logits, 1).split([h.num_real, h.num_real])
    return -yes[:, 1].mean() - no[:, 0].mean()


@torch.inference_mode()
def membership_auc(
    model: SetGNN, x: Features, h: Hypergraph, positive: Int[Tensor, "2 pairs"], negative: Int[Tensor, "2 others"]
) -> float:
    """ROC-AUC of the membership probability, in evaluation mode."""
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415 - slow to import

    mode = model.training
    model.eval()
    logits = membership_logits(model, x, h, torch.cat([positive, negative], dim=1))
    model.train(mode)
    truth = torch.cat([torch.ones(positive.shape[1]), torch.zeros(negative.shape[1])])
    return float(roc_auc_score(truth.numpy(), torch.softmax(logits.double(), 1)[:, 1].cpu().numpy()))
