"""The released checkpoints' layout (section 4): their keys to ours and back.

Beware of their names: `view_crosstrans` is the view transformer and `view_selftrans` the ray transformer.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold_gnt.features import ResUNet
from tenfold_gnt.network import GNT
from tenfold_gnt.view_transformer import SubtractionAttention
from tenfold_shared.checkpoint import load_pickled_tensors
from tenfold_shared.errors import UserError

ATTENTION = {
    "query": "q_fc",
    "key": "k_fc",
    "value": "v_fc",
    "position": "pos_fc",
    "position_heads": "head_fc",
    "weight": "attn_fc",
    "out": "out_fc",
}
BLOCK = {
    "attention_norm": "attn_norm",
    "feed_norm": "ff_norm",
    "feed.expand": "ff.fc1",
    "feed.contract": "ff.fc2",
    **{f"attention.{ours}": f"attn.{theirs}" for ours, theirs in ATTENTION.items()},
    "attention.gate": "attn.gate",
}
NETWORK = {
    "input_mlp": "rgbfeat_fc",
    "ray_blocks": "view_selftrans",
    "view_blocks": "view_crosstrans",
    "position_mlps": "q_fcs",
    "norm": "norm",
    "to_rgb": "rgb_fc",
}
FEATURES = {
    "stem_norm": "bn1",
    "stem": "conv1",
    "up3": "upconv3.conv",
    "merge3": "iconv3",
    "up2": "upconv2.conv",
    "merge2": "iconv2",
    "head": "out_conv",
}


class CheckpointError(UserError):
    """A file that is no checkpoint of the network asked for; the message lists the keys that do not fit."""


def official_block_key(key: str) -> str:
    """A view or ray block's key in the released layout."""
    for ours, theirs in BLOCK.items():
        if key == ours or key.startswith(ours + "."):
            return theirs + key[len(ours) :]
    raise KeyError(key)


def official_network_key(key: str) -> str:
    """A key of `GNT` in the released layout."""
    part, rest = key.split(".", 1)
    if part in ("ray_blocks", "view_blocks"):
        number, inner = rest.split(".", 1)
        return f"{NETWORK[part]}.{number}.{official_block_key(inner)}"
    return f"{NETWORK[part]}.{rest}"


def official_feature_key(key: str) -> str:
    """A key of `ResUNet` in the released layout."""
    part, rest = key.split(".", 1)
    key = f"{FEATURES.get(part, part)}.{rest}"
    key = key.replace(".shortcut.", ".downsample.")
    return re.sub(r"\.norm(\d?)\.", r".bn\1.", key)


def official_network_state(network: nn.Module) -> dict[str, Tensor]:
    """The network's state under the released keys, in the released order."""
    state = {official_network_key(key): value for key, value in network.state_dict().items()}
    parts = list(NETWORK.values())

    def order(item: tuple[int, str]) -> tuple[int, int, int, int]:
        index, key = item
        part = key.split(".", 1)[0]
        if part not in ("view_selftrans", "view_crosstrans"):
            return parts.index(part), 0, 0, index
        _, number, inner = key.split(".", 2)
        return parts.index(part), int(number), _block_rank(inner), index

    return {key: state[key] for _, key in sorted(enumerate(state), key=order)}


def official_block_state(block: nn.Module) -> dict[str, Tensor]:
    """A block's state under the released keys, in the released order."""
    state = {official_block_key(key): value for key, value in block.state_dict().items()}
    return {key: state[key] for key in sorted(state, key=_block_rank)}


def _block_rank(key: str) -> int:
    order = ("attn_norm", "ff_norm", "ff.", "attn.gate", "attn.q_fc", "attn.k_fc")
    for rank, prefix in enumerate(order):
        if key.startswith(prefix):
            return rank
    return len(order)


def official_feature_state(features: nn.Module) -> dict[str, Tensor]:
    """The feature network's state under the released keys; its order is the released one."""
    return {official_feature_key(key): value for key, value in features.state_dict().items()}


def load_official_state(module: nn.Module, state: Mapping[str, Tensor], where: str = "the checkpoint") -> None:
    """Load a state with released keys into a `GNT`, a `ResUNet` or a block.

    Raises:
        CheckpointError: keys or shapes that do not fit; up to eight of each kind are listed.

    """
    if isinstance(module, ResUNet):
        rename = official_feature_key
    else:
        rename = official_network_key if isinstance(module, GNT) else official_block_key
    own = module.state_dict()
    names = {rename(key): key for key in own}
    refuse_misfits(state, {key: own[ours] for key, ours in names.items()}, where, type(module).__name__)
    module.load_state_dict({ours: state[key] for key, ours in names.items()})


def refuse_misfits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str, what: str) -> None:
    """Refuse a state whose keys or shapes are not those expected; up to eight of each kind are listed.

    Raises:
        CheckpointError: such a state.

    """
    problems = []
    for title, keys in (("missing", expected.keys() - state.keys()), ("unknown", state.keys() - expected.keys())):
        if keys:
            problems.append(f"{title}: {_listing(keys)}")
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if shapes:
        problems.append(f"of another shape: {_listing(shapes)}")
    if problems:
        raise CheckpointError(f"{where} does not fit the {what}; {'; '.join(problems)}")


def _listing(items: Iterable[str]) -> str:
    found = sorted(items)
    return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")


def network_shape(state: Mapping[str, Tensor]) -> dict[str, int]:
    """`width`, `depth`, `feature_channels` and `position_every` of a released network, read from its weights.

    Raises:
        CheckpointError: the state holds no such network.

    """
    try:
        depth = len({key.split(".")[1] for key in state if key.startswith("view_crosstrans.")})
        mixed = sorted({int(key.split(".")[1]) for key in state if key.startswith("q_fcs.")})
        channels = state["rgbfeat_fc.0.weight"].shape[1] - 3
        width = state["rgb_fc.weight"].shape[1]
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"the file holds no GNT network ({error} is missing)") from error
    if not depth or not mixed:
        raise CheckpointError("the file holds no GNT network (no view_crosstrans or q_fcs blocks)")
    if width % 8 or channels < 1:
        raise CheckpointError(f"the file holds no GNT network: one of width {width} with {channels} feature channels")
    every = mixed[1] - mixed[0] if len(mixed) > 1 else max(2, depth)
    return {"width": width, "depth": depth, "feature_channels": channels, "position_every": every}


def _is_state(state: object) -> bool:
    return isinstance(state, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())


class OfficialCheckpoint:
    """The networks of a released file.

    Attributes:
        coarse: the (only, or coarse) network.
        fine: the fine network, or None.
        features: the feature network.
        step: training step, from the file's name; None if it does not say.
        training_state: optimiser and scheduler states as stored, for resuming; empty where absent.

    """

    def __init__(self, content: Mapping[str, Any], name: str) -> None:
        for key in ("net_coarse", "feature_net"):
            if key not in content:
                raise CheckpointError(f"{name} lacks {key}; a released checkpoint holds net_coarse and feature_net")
        for key in ("net_coarse", "net_fine", "feature_net"):
            if key in content and not _is_state(content[key]):
                raise CheckpointError(f"{key} of {name} is no dictionary of tensors")
        shape = network_shape(content["net_coarse"])
        self.coarse = self._network(content["net_coarse"], f"net_coarse of {name}")
        self.fine = self._network(content["net_fine"], f"net_fine of {name}") if "net_fine" in content else None
        channels, total = shape["feature_channels"], len(content["feature_net"].get("out_conv.bias", ()))
        fine = max(total - channels, 0)
        self.features = ResUNet(channels, fine or channels, single_net=fine == 0)
        load_official_state(self.features, content["feature_net"], f"feature_net of {name}")
        number = re.search(r"(\d{6,})\.pth$", name)
        self.step = int(number[1]) if number else None
        self.training_state = {key: content[key] for key in ("optimizer", "scheduler") if key in content}

    @staticmethod
    def _network(state: Mapping[str, Tensor], where: str) -> GNT:
        network = GNT(**network_shape(state))  # type: ignore[arg-type]
        load_official_state(network, state, where)
        return network


def load_official_checkpoint(path: Path | str) -> OfficialCheckpoint:
    """Networks from a released `model_<step>.pth`; depth and width are read from the weights.

    Raises:
        UserError: the file is missing, damaged, or holds other keys.

    """
    path = Path(path)
    return OfficialCheckpoint(load_pickled_tensors(path), path.name)


def _is_released(network: GNT) -> bool:
    attention = [block.attention for block in network.view_blocks]
    return type(network) is GNT and all(isinstance(a, SubtractionAttention) and a.double_projection for a in attention)


def save_official_checkpoint(
    path: Path | str,
    coarse: GNT,
    features: ResUNet,
    fine: GNT | None = None,
    training_state: Mapping[str, Any] | None = None,
) -> None:
    """Write networks in the released layout; `training_state` may hold `optimizer` and `scheduler` states.

    Raises:
        CheckpointError: an ablation, which would be read as another function.

    """
    for network in (coarse, fine):
        if network is not None and not _is_released(network):
            raise CheckpointError(
                "the released layout holds networks with subtraction attention, values projected from the keys and ray "
                "transformers; keep another one with safetensors"
            )
    content = {**(training_state or {}), "net_coarse": official_network_state(coarse)}
    content["feature_net"] = official_feature_state(features)
    if fine is not None:
        content["net_fine"] = official_network_state(fine)
    torch.save(content, path)
