"""Checkpoints of ours and of the authors, told apart by what is in them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenfold_shared.checkpoint import load_weights
from tenfold_shared.errors import UserError

from .baselines.linear import LinearDictionary
from .baselines.networks import AutoDecoder, NetworkBatch
from .compat import load_official_checkpoint
from .dictionary import DictionaryConfig, NeuralDictionary
from .networks import NetworkConfig


def weights_file(checkpoint: Path) -> Path:
    """The weights of a run's folder, or the file itself."""
    return checkpoint / "checkpoints" / "last.safetensors" if checkpoint.is_dir() else checkpoint


def load_model(checkpoint: Path) -> tuple[nn.Module, dict[str, Any]]:
    """What a checkpoint holds, and what it says about itself.

    Raises:
        UserError: unreadable, or its tensors do not fit what it says it is (the keys are named).

    """
    path = weights_file(checkpoint)
    if path.suffix != ".safetensors":
        if not path.is_file():
            raise UserError(f"no checkpoint at {path}: give a run's folder, a .safetensors or the authors' .ckpt file")
        found = load_official_checkpoint(path)
        return found, {"method": "nid" if isinstance(found, NeuralDictionary) else "scratch"}
    state, about = load_weights(path)
    try:
        model = _built(about, state)
        model.load_state_dict(state)
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} does not fit what it says it is: {error}") from error
    return model.eval(), about


def load_dictionary(checkpoint: Path) -> tuple[NeuralDictionary, dict[str, Any]]:
    """A neural dictionary.

    Raises:
        UserError: the checkpoint holds something else.

    """
    model, about = load_model(checkpoint)
    if not isinstance(model, NeuralDictionary):
        raise UserError(f"{checkpoint} holds {about['method']}, not a neural dictionary: train one with --method nid")
    return model, about


def _built(about: dict[str, Any], state: dict[str, torch.Tensor]) -> nn.Module:
    method = about["method"]
    if method == "nid":
        config = DictionaryConfig(**{**about["dictionary"], "size": tuple(about["dictionary"]["size"])})
        return NeuralDictionary(config, load_mode=about["load_mode"], importance_mode=about["importance_mode"])
    if method in {"scratch", "maml", "reptile"}:
        return NetworkBatch(NetworkConfig(**about["network"]), about["count"])
    if method == "latent":
        signals, width = about["latents"]
        return AutoDecoder(NetworkConfig(**about["network"]), width, signals)
    return LinearDictionary(torch.zeros_like(state["mean"]), torch.zeros_like(state["atoms"]))
