"""HyperGCL: augmentations in hypergraph contrastive learning, fabricated and generative (Wei et al., NeurIPS 2022)."""

from importlib import import_module
from typing import Any

_API = {
    "hypergraph": ("Hypergraph", "HypergraphError", "Incidence", "disjoint_union"),
    "propagate": ("SparseFeatures", "sum_members"),
    "setgnn": ("EncoderConfig", "SetEncoder", "SetGNN"),
    "contrast": ("info_nce", "info_nce_rows", "jsd", "triplet_margin"),
    "augment": ("View", "fabricate", "fabricate_pair"),
    "generative": ("VHGAE", "Noise", "keep_weights", "sample_negatives", "vhgae_loss"),
    "models": ("create_model",),
    "steps": ("contrastive_loss", "core", "generate_view", "generator_step", "receptive_field", "supervised_loss"),
    "minibatch": ("HypergraphSampler", "subsample", "train_on_batches"),
    "protocol": ("Split", "random_splits", "stratified_split"),
    "data": ("Dataset", "make_dataset"),
    "recipe": ("Recipe",),
    "train": ("run_recipe",),
    "baselines": ("HNHN", "CliqueNet", "HyperGCN", "HypergraphConvNet", "UniGCNII", "clique_expansion"),
    "compat": ("export_state", "load_official_checkpoint"),
}
_WHERE = {name: module for module, names in _API.items() for name in names}

__all__ = [
    "HNHN",
    "VHGAE",
    "CliqueNet",
    "Dataset",
    "EncoderConfig",
    "HyperGCN",
    "Hypergraph",
    "HypergraphConvNet",
    "HypergraphError",
    "HypergraphSampler",
    "Incidence",
    "Noise",
    "Recipe",
    "SetEncoder",
    "SetGNN",
    "SparseFeatures",
    "Split",
    "UniGCNII",
    "View",
    "clique_expansion",
    "contrastive_loss",
    "core",
    "create_model",
    "disjoint_union",
    "export_state",
    "fabricate",
    "fabricate_pair",
    "generate_view",
    "generator_step",
    "info_nce",
    "info_nce_rows",
    "jsd",
    "keep_weights",
    "load_official_checkpoint",
    "make_dataset",
    "random_splits",
    "receptive_field",
    "run_recipe",
    "sample_negatives",
    "stratified_split",
    "subsample",
    "sum_members",
    "supervised_loss",
    "train_on_batches",
    "triplet_margin",
    "vhgae_loss",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the module of a public name when the name is first used: ``import tenfold_hypergcl`` itself costs nothing."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
