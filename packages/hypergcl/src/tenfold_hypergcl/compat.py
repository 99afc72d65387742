"""The released code's parameter names (section 4). Ours are the same; only its never-used batch norms have no place here."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold_hypergcl.setgnn import EncoderConfig, SetEncoder, SetGNN
from tenfold_shared.checkpoint import load_pickled_tensors, load_weights
from tenfold_shared.errors import UserError

_UNUSED = re.compile(r"(?:^|\.)bn(?:V2E|E2V)s\.\d+\.")


class CheckpointError(UserError):
    """A checkpoint does not fit the model; the message lists the keys."""


def _encoders(module: nn.Module) -> list[tuple[str, SetEncoder]]:
    return [(name, part) for name, part in module.named_modules() if isinstance(part, SetEncoder)]


def load_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state in the released layout into SetGNN, VHGAE or a baseline.

    Raises:
        CheckpointError: for missing and unknown keys and for wrong shapes, all of them listed.
    """
    useful = {key: value for key, value in state.items() if not _UNUSED.search(key)}
    expected = module.state_dict()
    problems = [f"missing {key}" for key in expected.keys() - useful.keys()]
    problems += [f"unknown {key}" for key in useful.keys() - expected.keys()]
    problems += [
        f"{key} is {list(useful[key].shape)}, not {list(expected[key].shape)}"
        for key in expected.keys() & useful.keys()
        if useful[key].shape != expected[key].shape
    ]
    if problems:
        raise CheckpointError(
            f"The checkpoint does not fit this {type(module).__name__}: " + "; ".join(sorted(problems))
        )
    module.load_state_dict(useful)


def export_state(module: nn.Module) -> dict[str, Tensor]:
    """The state in the released layout, with its unused batch norms at their initial values."""
    state = {key: value.detach().clone() for key, value in module.state_dict().items()}
    for name, encoder in _encoders(module):
        prefix = f"{name}." if name else ""
        like = next(encoder.parameters())
        for side in ("V2E", "E2V"):
            for layer in range(encoder.config.layers):
                key = f"{prefix}bn{side}s.{layer}."
                for part, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                    state[key + part] = like.new_full((encoder.config.hidden,), value)
                state[key + "num_batches_tracked"] = torch.zeros((), dtype=torch.long, device=like.device)
    return state


def released_parameter_count(module: nn.Module) -> int:
    """Trainable parameters as the released code counts them: one unused batch norm per half layer included."""
    unused = sum(4 * encoder.config.hidden * encoder.config.layers for _, encoder in _encoders(module))
    return unused + sum(p.numel() for p in module.parameters() if p.requires_grad)


def recognise(state: Mapping[str, Tensor]) -> SetGNN:
    """An untrained SetGNN of the architecture that a state in the released layout has, by its keys and shapes.

    Raises:
        CheckpointError: if it is no SetGNN's; the keys that are there are named.
    """
    needed = ("V2EConvs.0.", "E2VConvs.0.", "classifier.lins.0.weight", "proj_head.lins.0.weight", "linear.weight")
    lacking = [key for key in needed if not any(name.startswith(key) for name in state)]
    if lacking:
        raise CheckpointError(
            f"The checkpoint is of no SetGNN: it lacks {', '.join(lacking)} and has {', '.join(sorted(state)[:6])}."
        )
    layers = len({name.split(".")[1] for name in state if name.startswith("V2EConvs.")})
    classes, hidden = state["linear.weight"].shape
    heads_of = state.get("V2EConvs.0.prop.att_r")
    mlp = "V2EConvs.0." + ("f_enc." if heads_of is None else "prop.rFF.")
    normed = (f"{mlp}normalizations.", "classifier.normalizations.", "MLP.normalizations.")
    norms = [name for name in state if name.startswith(normed)]
    batch = any(name.endswith("running_mean") for name in norms)
    config = EncoderConfig(
        hidden=hidden,
        layers=layers,
        mlp_layers=sum(name.startswith(f"{mlp}lins.") and name.endswith("weight") for name in state),
        attention=heads_of is not None,
        heads=1 if heads_of is None else heads_of.shape[1],
        norm="bn" if batch else "ln" if norms else "none",
        input_norm=f"{mlp}normalizations.0.weight" in state,
        gpr="GPRweights.weight" in state,
    )
    first = f"{mlp}lins.0.weight" if heads_of is None else "V2EConvs.0.prop.lin_K.weight"
    head_layers = sum(name.startswith("proj_head.lins.") and name.endswith("weight") for name in state)
    return SetGNN(state[first].shape[1], classes, config, state["proj_head.lins.0.weight"].shape[0], head_layers)


def load_official_checkpoint(path: str | Path, module: nn.Module | None = None) -> nn.Module:
    """The model of a state dict that a run of the released code saved (``.pt``, nothing in it can run, or ``.safetensors``).

    Without ``module`` it is a SetGNN, recognised by its keys; VHGAE and the baselines are given as ``module``.

    Raises:
        CheckpointError: if the file holds no state dict, or one that does not fit.
        UserError: if the file is missing, damaged, or holds other objects than tensors.
    """
    path = Path(path)
    state: Any = load_weights(path)[0] if path.suffix == ".safetensors" else load_pickled_tensors(path)
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict (names and tensors).")
    module = recognise(state) if module is None else module
    load_state(module, state)
    return module
