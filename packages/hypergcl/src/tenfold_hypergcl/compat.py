"""The released code's parameter names (section 4). Ours are the same; only its never-used batch norms have no place here."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold_hypergcl.setgnn import SetEncoder

_UNUSED = re.compile(r"(?:^|\.)bn(?:V2E|E2V)s\.\d+\.")


class CheckpointError(ValueError):
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


def load_official_checkpoint(path: str | Path, module: nn.Module) -> None:
    """Load a state dict that a run of the released code saved (``.pt``, read with ``weights_only``, or ``.safetensors``).

    Raises:
        CheckpointError: if the file is no state dict, or does not fit ``module``.
    """
    path = Path(path)
    state: Any
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # noqa: PLC0415 - only for this format

        state = load_file(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read as a PyTorch state dict: {error}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict (names and tensors).")
    load_state(module, state)
