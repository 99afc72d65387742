"""Linearity grafting, and the bound engine that verifies what comes out.

`grafting` has the grafted activation, `scores` and `selection` the choice of the neurons, `adversarial` the training
objectives. `graph`, `bounds`, `optimise`, `domains`, `branching`, `leaf` and `verify` are the verifier, from the
network's operations to branch and bound; `arithmetic` bounds its rounding errors. `compat` reads the authors' files.
"""

from tenfold_grafting.adversarial import attacked, certified_loss, grad_align, rs_loss, trades
from tenfold_grafting.attacks import margin_attack, robust_mask
from tenfold_grafting.bounds import bound_margins, crown_intervals, margin_spec
from tenfold_grafting.compat import CheckpointError, load_official_checkpoint, to_official
from tenfold_grafting.grafting import GraftedReLU, activation_shapes, graft, graft_activation
from tenfold_grafting.graph import Graph, Normalise, UnsupportedOperationError, trace
from tenfold_grafting.intervals import Box, ibp
from tenfold_grafting.networks import create_network, network_names
from tenfold_grafting.optimise import AlphaSettings, alpha_crown, alpha_crown_joint
from tenfold_grafting.scores import instability, significance, unstable_ratio
from tenfold_grafting.selection import keep_masks, load_masks, overlap, random_selection, select_neurons
from tenfold_grafting.specification import Property, ball, pixel_box
from tenfold_grafting.verify import Verdict, VerifySettings, verified_radius, verify
from tenfold_grafting.zoo import load_network

__all__ = [
    "AlphaSettings",
    "Box",
    "CheckpointError",
    "GraftedReLU",
    "Graph",
    "Normalise",
    "Property",
    "UnsupportedOperationError",
    "Verdict",
    "VerifySettings",
    "activation_shapes",
    "alpha_crown",
    "alpha_crown_joint",
    "attacked",
    "ball",
    "bound_margins",
    "certified_loss",
    "create_network",
    "crown_intervals",
    "grad_align",
    "graft",
    "graft_activation",
    "ibp",
    "instability",
    "keep_masks",
    "load_masks",
    "load_network",
    "load_official_checkpoint",
    "margin_attack",
    "margin_spec",
    "network_names",
    "overlap",
    "pixel_box",
    "random_selection",
    "robust_mask",
    "rs_loss",
    "select_neurons",
    "significance",
    "to_official",
    "trace",
    "trades",
    "unstable_ratio",
    "verified_radius",
    "verify",
]
