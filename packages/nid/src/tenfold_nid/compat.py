"""The authors' checkpoints and configuration files (section 4).

The state of ``NeuralDictionary`` uses the released names, so a checkpoint needs no renaming: what is missing from it,
the shape of the dictionary, is read off the tensors.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold_shared.checkpoint import load_pickled

from .dictionary import DictionaryConfig, NeuralDictionary
from .errors import DataError
from .networks import CoordinateNetwork, NetworkConfig

RELEASED_CHECKPOINT = "https://huggingface.co/peihaowang/neural-implicit-dict/resolve/main/celeba_pretrained.ckpt"
"""CelebA checkpoint of the authors (269 MB, MIT)."""


def infer_config(state: dict[str, Tensor], **overrides: Any) -> DictionaryConfig:
    """Shape of the dictionary that a released state belongs to.

    The number of active atoms, the activation and the scale of the Fourier map leave no trace in the tensors: the
    first is k = 256 with 4096 atoms and an eighth of the atoms otherwise (the released defaults), the second is a sine
    without an embedding.

    Args:
        state: tensors by their released names.
        overrides: fields of the configuration that are known otherwise.

    Raises:
        DataError: the state is not that of a dictionary; the message lists what is missing.

    """
    gates = [key for key in state if key.startswith("gate_generator.")]
    if not gates:
        raise DataError("this is not the state of a neural implicit dictionary: there is no gate_generator.*")
    fields = _infer_network(state, "experts.")
    gate = _infer_gate(state)
    outputs = fields["out_dim"]
    fields["out_dim"] = _channels(outputs, _code_dim(state, gate["gate"]))
    fields |= {"num_experts": outputs // fields["out_dim"], **gate}
    fields["num_topk"] = max(1, fields["num_experts"] // (16 if fields["num_experts"] == 4096 else 8))
    fields["noise"] = any(key.startswith("noise_generator.") for key in state)
    fields |= overrides
    if fields["gate"] == "linear" and "size" not in overrides:
        side = math.isqrt(state["gate_generator.w"].shape[0] // fields["out_dim"])
        fields["size"] = (side, side)
    return DictionaryConfig(**fields)


def _infer_network(state: dict[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """Shape of a coordinate network, or of the trunk with all heads; a sine is taken where there is no embedding."""
    pattern = re.escape(prefix) + r"net\.net\.(\d+)\.0\.weight"
    found = filter(None, (re.fullmatch(pattern, key) for key in state))
    layers = [match[0] for match in sorted(found, key=lambda match: int(match[1]))]
    if len(layers) < 2:
        raise DataError(f"this is no network: there is no {prefix}net.net.*.0.weight of two layers or more")
    outputs, hidden = state[layers[-1]].shape
    fields = {"num_layers": len(layers), "hidden_dim": hidden, "out_dim": outputs}
    width = state[layers[0]].shape[1]
    if f"{prefix}map.B" in state:
        frequencies = state[f"{prefix}map.B"]
        half, in_dim = frequencies.shape
        scale = float(frequencies.float().std()) if frequencies.numel() > 1 else 1.0
        return fields | {"pos_emb": "ffm", "in_dim": in_dim, "ffm_map_size": 2 * half, "ffm_map_scale": scale}
    if width in {2, 3}:
        return fields | {"pos_emb": "Id", "in_dim": width, "act_type": "sine"}
    return fields | _infer_octaves(width)


def _infer_octaves(width: int) -> dict[str, Any]:
    for in_dim in (2, 3):
        octaves, rest = divmod(width - in_dim, 2 * in_dim)
        if rest == 0:
            return {"pos_emb": "pe", "in_dim": in_dim, "num_freqs": octaves}
    raise DataError(f"no known embedding has width {width}")


def _infer_gate(state: dict[str, Tensor]) -> dict[str, Any]:
    if "gate_generator.codebook.weight" in state:
        return {"gate": "codebook", "num_signals": state["gate_generator.codebook.weight"].shape[0]}
    if "gate_generator.w" in state:
        return {"gate": "linear"}
    if "gate_generator.convs.fc.weight" in state:
        pixels = state["gate_generator.convs.fc.weight"].shape[1]
        side = math.isqrt(pixels)
        if side * side != pixels:
            raise DataError(f"gate_generator.convs.fc.weight covers {pixels} pixels, which is no square image")
        return {"gate": "resnet", "size": (side, side)}
    convolutions = [k for k in state if re.fullmatch(r"gate_generator\.convs\.\d+\.weight", k)]
    if convolutions and "gate_generator.fc.weight" in state:
        hidden = state["gate_generator.fc.weight"].shape[1]
        return {"gate": "conv", "gate_layers": len(convolutions), "gate_hidden": hidden}
    raise DataError("the gate is none of codebook, linear, resnet and conv: " + _list(k for k in state if "gate" in k))


def _code_dim(state: dict[str, Tensor], gate: str) -> int:
    key = {"codebook": "codebook.weight", "linear": "w"}.get(gate, "fc.weight")
    weight = state.get(f"gate_generator.{key}")
    if weight is None:
        raise DataError(f"gate_generator.{key} is missing")
    return weight.shape[1] if gate in {"codebook", "linear"} else weight.shape[0]


def _channels(outputs: int, code_dim: int) -> int:
    """Channels C from E·C outputs and a code of E + C numbers; of the two roots the smaller is C."""
    discriminant = code_dim**2 - 4 * outputs
    root = math.isqrt(max(discriminant, 0))
    if discriminant < 0 or root * root != discriminant or (code_dim - root) % 2:
        raise DataError(
            f"a code of {code_dim} numbers does not fit {outputs} head outputs: "
            "with E atoms and C channels these are E + C and E·C"
        )
    return (code_dim - root) // 2


def load_official_checkpoint(path: str | Path, **overrides: Any) -> NeuralDictionary | CoordinateNetwork:
    """A dictionary from a checkpoint of the released code, with its gating statistics as released, or a baseline's network.

    Args:
        path: file with the entries ``model``, ``optimizer`` and ``current_epoch``, or a bare state.
        overrides: fields of the configuration that the tensors do not tell, such as ``num_topk`` and ``act_type``.

    Raises:
        DataError: the file is missing, or its keys do not fit; the message lists them.
        UserError: the file is damaged, or holds other objects than tensors.

    """
    if not Path(path).is_file():
        raise DataError(f"{path}: there is no such file; the released checkpoint is at {RELEASED_CHECKPOINT}")
    checkpoint = load_pickled(Path(path))
    state = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError(f"{path}: holds no dictionary of tensors under 'model'")
    make: Callable[[], NeuralDictionary | CoordinateNetwork]
    try:
        if any(key.startswith("net.") for key in state):
            make = partial(CoordinateNetwork, NetworkConfig(**_infer_network(state) | overrides))
        else:
            config = infer_config(state, **overrides)
            make = partial(NeuralDictionary, config, load_mode="official", importance_mode="signed")
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    with torch.device("meta"):
        skeleton = make()
    expected = skeleton.state_dict()
    wrong = [k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape]
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    if wrong or missing or unexpected:
        parts = [("missing", missing), ("unexpected", unexpected), ("of another shape", wrong)]
        raise DataError(f"{path}: keys that do not fit - " + "; ".join(f"{n}: {_list(k)}" for n, k in parts if k))
    model = make()
    model.to(next(iter(state.values())).dtype).load_state_dict(state)
    return model.eval()


def _list(keys: Any) -> str:
    return ", ".join(sorted(keys))


def save_official_checkpoint(
    model: NeuralDictionary, path: str | Path, *, optimizer: torch.optim.Optimizer | None = None, epoch: int = 0
) -> None:
    """Write a checkpoint that the released code loads.

    Raises:
        ValueError: the dictionary has parts that the released code does not know.

    """
    if model.config.atoms != "shared" or model.config.gate == "strided":
        raise ValueError(
            f"the released code has no {'independent atoms' if model.config.atoms != 'shared' else 'strided gate'}; "
            "only shared-trunk dictionaries with a conv, resnet, codebook or linear gate can be exported to it"
        )
    if model.config.pos_emb == "rbf":
        raise ValueError(
            "how the released code names the centres of a radial basis is not known: such a dictionary stays ours"
        )
    if optimizer is None:
        optimizer = torch.optim.Adam(model.parameters())
    state = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
    torch.save({"model": state, "optimizer": optimizer.state_dict(), "current_epoch": epoch}, path)


def parse_official_config(path: str | Path) -> dict[str, Any]:
    """Settings of a released configuration file: one ``key = value`` a line, ``#`` begins a comment.

    Returns:
        Numbers, booleans and lists as such, everything else as text.

    Raises:
        DataError: a line is neither.

    """
    settings = {}
    for number, raw in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        key, separator, value = line.partition("=")
        if not separator or not key.strip():
            raise DataError(f"{path}:{number}: expected 'key = value', got {line!r}")
        settings[key.strip()] = _parse_value(value.strip())
    return settings


def _parse_value(text: str) -> Any:
    if text.startswith("[") and text.endswith("]"):
        return [_parse_value(part.strip()) for part in text[1:-1].split(",") if part.strip()]
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text.strip("'\"")
