"""One signal as a small network of its own, and codes as bytes (section 11)."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .dictionary import NeuralDictionary
from .experts import SharedTrunkExperts
from .gating import dense_gates, split_code
from .networks import CoordinateNetwork, NetworkConfig


def single_signal(model: NeuralDictionary, code: Float[Tensor, " code"]) -> CoordinateNetwork:
    """Fold the active atoms of a signal into one head: a coordinate network that needs no dictionary any more.

    Args:
        model: the dictionary.
        code: the signal's code.

    Raises:
        ValueError: the atoms share no trunk, or the code has another length.

    """
    experts = model.experts
    if not isinstance(experts, SharedTrunkExperts):
        raise ValueError("only atoms on a shared trunk fold into one network; these are independent networks")
    if code.shape[-1] != model.config.code_dim:
        raise ValueError(f"a code of this dictionary has {model.config.code_dim} numbers, got {code.shape[-1]}")
    network = CoordinateNetwork(NetworkConfig(**{**vars(experts.config), "out_dim": experts.channels}))
    network.to(experts.net.head.weight)
    state = {k: v for k, v in experts.state_dict().items() if not k.startswith(f"net.net.{len(experts.net.net) - 1}.")}
    network.load_state_dict(state, strict=False)
    with torch.no_grad():
        logits, bias = split_code(code[None], model.config.num_experts)
        weight, offset = experts.merged_head(dense_gates(logits))
        network.net.head.weight.copy_(weight[0])
        network.net.head.bias.copy_((offset + bias)[0])
    return network.eval()


def save_onnx(network: CoordinateNetwork, path: str | Path) -> None:
    """Write a coordinate network as ONNX: input ``coords`` [points, m], output ``values`` [points, channels].

    Raises:
        ImportError: onnx or onnxscript is missing.

    """
    try:
        import onnxscript  # noqa: F401, PLC0415
    except ModuleNotFoundError as error:
        raise ImportError("ONNX export needs onnx and onnxscript: pip install 'tenfold-nid[onnx]'") from error
    weight = network.net.head.weight
    coords = torch.zeros(8, network.config.in_dim, device=weight.device, dtype=weight.dtype)
    torch.onnx.export(
        network,
        (coords,),
        str(path),
        input_names=["coords"],
        output_names=["values"],
        dynamic_shapes={"coords": {0: torch.export.Dim("points")}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )


class PackedCodes(NamedTuple):
    """Sparse codes quantised to bytes; ``num_bytes`` is what a file of them takes."""

    gaps: np.ndarray
    """[signals, active] uint8 or uint16: first atom, then differences of ascending atom numbers"""
    value: np.ndarray
    """[signals, active + channels] int8 multiples of the signal's step"""
    step: np.ndarray
    """[signals, 2] float32: quantisation step of coefficients and of biases"""
    num_experts: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return self.gaps.nbytes + self.value.nbytes + self.step.nbytes


def pack_codes(codes: Float[Tensor, "signals code"], num_experts: int, active: int) -> PackedCodes:
    """Keep the ``active`` largest coefficients of each signal, 8 bits each, with the gaps between their positions.

    Raises:
        ValueError: more atoms are to be kept than there are.

    """
    if not 1 <= active <= num_experts:
        raise ValueError(f"between 1 and {num_experts} atoms can be kept, got {active}")
    coefficients, bias = split_code(codes.detach().cpu().float(), num_experts)
    place = coefficients.abs().topk(active, dim=1).indices.sort(dim=1).values
    kept = coefficients.gather(1, place)
    step = torch.stack([kept.abs().amax(dim=1), bias.abs().amax(dim=1)], dim=1).clamp(min=1e-12) / 127
    value = torch.cat([kept / step[:, :1], bias / step[:, 1:]], dim=1).round().to(torch.int8)
    gaps = torch.diff(place, dim=1, prepend=torch.zeros_like(place[:, :1])).numpy()
    kind = np.uint8 if gaps.max() < 256 else np.uint16 if gaps.max() < 65536 else np.uint32
    return PackedCodes(gaps.astype(kind), value.numpy(), step.numpy(), num_experts)


def unpack_codes(packed: PackedCodes) -> Float[Tensor, "signals code"]:
    """Codes from their bytes, zeros where nothing was kept."""
    place = torch.from_numpy(packed.gaps.astype(np.int64)).cumsum(dim=1)
    active = place.shape[1]
    value, step = torch.from_numpy(packed.value).float(), torch.from_numpy(packed.step)
    coefficients = torch.zeros(len(value), packed.num_experts).scatter(1, place, value[:, :active] * step[:, :1])
    return torch.cat([coefficients, value[:, active:] * step[:, 1:]], dim=1)
