"""HyperGCL: augmentations in hypergraph contrastive learning, fabricated and generative (Wei et al., NeurIPS 2022)."""

from importlib import import_module
from typing import Any

_WHERE = {
    "Hypergraph": "hypergraph",
    "SetGNN": "setgnn",
    "receptive_field": "steps",
    "supervised_loss": "steps",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
